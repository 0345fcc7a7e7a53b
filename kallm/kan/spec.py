"""The names and sizes of everything that can stand in for a pretrained FFN: data, read from YAML, without torch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from kallm.errors import WrongConfiguration, did_you_mean
from kallm.kan.layerspec import LayerSpec, Spec

__all__ = [
    "AffineSpec",
    "FFNSpec",
    "KANSpec",
    "KATSpec",
    "MLPSpec",
    "PretrainedSpec",
    "RemovedSpec",
    "SwiGLUSpec",
    "parse_spec",
]


class _Sized(ABC):
    @abstractmethod
    def parameters(self, width: int, pretrained_hidden: int) -> int:
        """Return the exact number of the FFN's parameters for a residual stream of ``width`` channels."""


class PretrainedSpec(Spec, _Sized):
    """The pretrained FFN, kept; counted as a gated FFN without biases, as Llama's."""

    ffn: Literal["pretrained"]

    def parameters(self, width: int, pretrained_hidden: int) -> int:
        return 3 * width * pretrained_hidden


class SwiGLUSpec(Spec, _Sized):
    """Llama's gated FFN without biases."""

    ffn: Literal["swiglu"]
    hidden: int | None = Field(default=None, ge=1, description="hidden channels; null: the pretrained FFN's")

    def parameters(self, width: int, pretrained_hidden: int) -> int:
        return 3 * width * (self.hidden or pretrained_hidden)


class MLPSpec(Spec, _Sized):
    """Two linear maps without biases around one activation."""

    ffn: Literal["mlp"]
    hidden: int = Field(ge=1, description="hidden channels")
    activation: Literal["gelu", "silu", "relu"] = "gelu"

    def parameters(self, width: int, pretrained_hidden: int) -> int:
        return 2 * width * self.hidden


class AffineSpec(Spec, _Sized):
    """One linear map with a bias."""

    ffn: Literal["affine"]

    def parameters(self, width: int, pretrained_hidden: int) -> int:
        return width * width + width


class RemovedSpec(Spec, _Sized):
    """No FFN: zeros, so that the residual stream passes unchanged."""

    ffn: Literal["removed"]

    def parameters(self, width: int, pretrained_hidden: int) -> int:
        return 0


class KATSpec(Spec, _Sized):
    """The group-rational FFN of the Kolmogorov-Arnold Transformer (Yang and Wang, ICLR 2025)."""

    ffn: Literal["kat"]
    hidden: int = Field(ge=1, description="hidden channels")
    groups: int = Field(default=8, ge=1, description="groups of channels with a denominator of their own")

    @model_validator(mode="after")
    def _groups_divide(self) -> "KATSpec":
        if self.hidden % self.groups:
            raise ValueError(f"groups must divide hidden {self.hidden}, but it is {self.groups}")
        return self

    def parameters(self, width: int, pretrained_hidden: int) -> int:
        if width % self.groups:
            raise WrongConfiguration(f"groups must divide the model's width {width}, but it is {self.groups}")
        return 2 * width * self.hidden + self.hidden + width + 2 * (6 + 4 * self.groups)


class KANSpec(LayerSpec, _Sized):
    """A stack of KAN layers: ``basis`` or ``parallel`` for all of them, or ``layers`` with one description each.

    ``squash``, ``constants`` and ``scale`` hold for every layer that does not say otherwise.
    """

    ffn: Literal["kan"]
    hidden: int | tuple[int, ...] | None = Field(
        default=None, description="channels between the layers: one number, a list, or null for the model's width"
    )
    layers: tuple[LayerSpec, ...] | None = Field(default=None, description="in place of one basis")

    @model_validator(mode="before")
    @classmethod
    def _layers_inherit(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and isinstance(data.get("layers"), list | tuple):
            common = {key: data[key] for key in ("squash", "constants", "scale") if key in data}
            layers = [{**common, **layer} if isinstance(layer, Mapping) else layer for layer in data["layers"]]
            return {**data, "layers": layers}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> "KANSpec":
        given = [name for name in ("basis", "parallel", "layers") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a kan needs one of basis, parallel, layers, but it has {' and '.join(given) or 'none'}")
        if self.layers is not None and not self.layers:
            raise ValueError("layers must have at least 1 layer, but it is empty")
        hidden = (self.hidden,) if isinstance(self.hidden, int) else self.hidden or ()
        if any(size < 1 for size in hidden):
            raise ValueError(f"hidden must be at least 1, but it is {min(hidden)}")
        if self.layers is not None and isinstance(self.hidden, tuple) and len(hidden) != len(self.layers) - 1:
            raise ValueError(
                f"hidden needs {len(self.layers) - 1} sizes for {len(self.layers)} layers, not {len(hidden)}"
            )
        if self.layers is not None and len(self.layers) == 1 and hidden:
            raise ValueError("hidden is given, but one layer has nothing between; remove it")
        try:
            for size, (_, _, layer) in zip(self._widths(0)[1:-1], self.stack(0)[1:], strict=True):
                layer.channels(size)
        except WrongConfiguration as error:
            raise ValueError(str(error)) from None
        return self

    def _widths(self, width: int) -> tuple[int, ...]:
        if isinstance(self.hidden, tuple):
            return (width, *self.hidden, width)
        between = len(self.layers) - 1 if self.layers is not None else 1
        return (width, *([self.hidden or width] * between), width)

    def stack(self, width: int) -> list[tuple[int, int, LayerSpec]]:
        """Return inputs, outputs and description of every layer, first to last."""
        pairs = list(pairwise(self._widths(width)))
        if self.layers is not None:
            layers = self.layers
        else:
            layers = (LayerSpec(**{name: getattr(self, name) for name in LayerSpec.model_fields}),) * len(pairs)
        return [(*pair, layer) for pair, layer in zip(pairs, layers, strict=True)]

    def parameters(self, width: int, pretrained_hidden: int) -> int:
        return sum(layer.layer_parameters(*pair) for *pair, layer in self.stack(width))


def _known_ffn(data: Any) -> Any:
    if isinstance(data, Mapping):
        if "ffn" not in data:
            raise ValueError(f"ffn is missing: {did_you_mean('', _FFNS)}")
        if data["ffn"] not in _FFNS:
            raise ValueError(f"unknown ffn '{data['ffn']}': {did_you_mean(str(data['ffn']), _FFNS)}")
    return data


_FFNS = ("affine", "kan", "kat", "mlp", "pretrained", "removed", "swiglu")

FFNSpec = Annotated[
    PretrainedSpec | SwiGLUSpec | MLPSpec | AffineSpec | RemovedSpec | KATSpec | KANSpec,
    Field(discriminator="ffn"),
    BeforeValidator(_known_ffn),
]
"""Which FFN, and its sizes: a pydantic field type, discriminated by ``ffn``."""

_ADAPTER: TypeAdapter[FFNSpec] = TypeAdapter(FFNSpec)


def parse_spec(data: Mapping[str, Any]) -> FFNSpec:
    """Return the spec that plain data (as read from YAML) describes.

    Raises:
        WrongConfiguration: the data describe none; one clause per problem.
    """
    try:
        return _ADAPTER.validate_python(data)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, p['loc'][1:])) + ': ' if p['loc'][1:] else ''}{p['msg'].removeprefix('Value error, ')}"
            for p in error.errors()
        ]
        raise WrongConfiguration("; ".join(problems)) from error
