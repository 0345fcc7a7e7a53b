"""The names and sizes of one KAN layer and its bases: data, read from YAML, without torch.

Legend: K basis functions.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kallm.errors import WrongConfiguration, did_you_mean

__all__ = ["BASIS_SETTINGS", "BasisSpec", "BranchSpec", "Constants", "LayerSpec", "Scale", "Spec", "Squash"]

Squash = Literal["tanh", "algebraic", "clamp", "none"]
Constants = Literal["folded", "stored"]
Scale = Literal["fixed", "learned"]

BASIS_SETTINGS: dict[str, tuple[str, ...]] = {
    "bspline": ("size", "order"),
    "chebyshev1": ("degree",),
    "chebyshev2": ("degree",),
    "fourier": ("degree",),
    "gegenbauer": ("degree", "alpha"),
    "hermite": ("degree",),
    "jacobi": ("degree", "alpha", "beta"),
    "legendre": ("degree",),
    "monomial": ("degree",),
    "rbf": ("size",),
    "switch": ("size",),
    "wavelet": ("size",),
}
"""What each basis must be given (``order`` may be left out); the functions themselves are in ``bases.py``."""

_OPTIONAL = {"order"}
_SETTINGS = ("degree", "size", "order", "alpha", "beta")


class Spec(BaseModel):
    """Frozen data that refuses an unknown key with the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        for key in data if isinstance(data, Mapping) else ():
            if key not in cls.model_fields:
                raise ValueError(f"unknown key '{key}': {did_you_mean(str(key), cls.model_fields)}")
        return data


class BasisSpec(Spec):
    """One basis and its sizes: polynomials and ``fourier`` take a degree, functions on a grid take a size."""

    basis: str | None = Field(default=None, description="the functions' name in BASES")
    degree: int | None = Field(default=None, description="highest degree (polynomials) or frequency (fourier), from 1")
    size: int | None = Field(default=None, description="functions per channel beside the constant, from 1")
    order: int | None = Field(default=None, description="bspline: degree of the pieces; null: 3, or size if smaller")
    alpha: float | None = Field(default=None, description="gegenbauer: over -1/2, not 0; jacobi: over -1")
    beta: float | None = Field(default=None, description="jacobi: over -1")

    @model_validator(mode="after")
    def _settings_fit_the_basis(self) -> "BasisSpec":
        given = [name for name in _SETTINGS if getattr(self, name) is not None]
        if self.basis is None:
            if given:
                raise ValueError(f"{given[0]} is given without a basis; name the basis that it belongs to")
            return self
        if self.basis not in BASIS_SETTINGS:
            raise ValueError(f"unknown basis '{self.basis}': {did_you_mean(self.basis, BASIS_SETTINGS)}")
        takes = BASIS_SETTINGS[self.basis]
        for name in given:
            if name not in takes:
                raise ValueError(f"basis '{self.basis}' takes {' and '.join(takes)}, not {name}; remove {name}")
        for name in takes:
            if name not in given and name not in _OPTIONAL:
                raise ValueError(f"basis '{self.basis}' needs {name}; give it")
        self._check_ranges()
        return self

    def _check_ranges(self) -> None:
        for name in ("degree", "size", "order"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} of basis '{self.basis}' must be at least 1, but it is {value}")
        if self.order is not None and self.size is not None and self.order > self.size:
            raise ValueError(f"order of basis 'bspline' must be at most size {self.size}, but it is {self.order}")
        low = -0.5 if self.basis == "gegenbauer" else -1.0
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if value is not None and (value <= low or (self.basis == "gegenbauer" and value == 0)):
                rule = f"over {low}" + (" and not 0" if self.basis == "gegenbauer" else "")
                raise ValueError(f"{name} of basis '{self.basis}' must be {rule}, but it is {value}")

    @property
    def num_functions(self) -> int:
        """How many functions one channel has beside the constant (K)."""
        if self.degree is not None:
            return self.degree * (2 if self.basis == "fourier" else 1)
        return self.size or 0


class BranchSpec(BasisSpec):
    """One basis of a parallel mix, and how many shares of the channels it gets."""

    squash: Squash | None = Field(default=None, description="null: the layer's")
    share: int = Field(default=1, ge=1, description="channels in proportion to the other branches' shares")

    @model_validator(mode="after")
    def _has_a_basis(self) -> "BranchSpec":
        if self.basis is None:
            raise ValueError("a branch of parallel needs a basis; name one")
        return self


class LayerSpec(BasisSpec):
    """One KAN layer: one basis for all channels, or several in parallel for shares of the channels."""

    parallel: tuple[BranchSpec, ...] | None = Field(default=None, description="in place of one basis")
    squash: Squash = Field(default="tanh", description="what takes an input into [-1, 1]")
    constants: Constants = Field(default="folded", description="one bias, or one stored coefficient per edge, no bias")
    scale: Scale = Field(default="fixed", description="the factor of each input channel: calibrated, or trained too")

    @model_validator(mode="after")
    def _has_functions(self) -> "LayerSpec":
        if type(self) is LayerSpec and (self.basis is None) == (self.parallel is None):
            raise ValueError("a layer needs either basis or parallel; give one of them")
        if self.parallel is not None and len(self.parallel) < 2:
            raise ValueError(f"parallel must have at least 2 bases, but it has {len(self.parallel)}")
        return self

    @property
    def branches(self) -> tuple[BranchSpec, ...]:
        """The bases side by side; one branch where the layer has one basis."""
        if self.parallel is not None:
            return tuple(b.model_copy(update={"squash": b.squash or self.squash}) for b in self.parallel)
        settings = {name: getattr(self, name) for name in ("basis", *_SETTINGS)}
        return (BranchSpec(**settings, squash=self.squash),)

    def channels(self, in_features: int) -> tuple[int, ...]:
        """Return how many of the input channels each branch gets.

        Raises:
            WrongConfiguration: the shares do not divide the channels.
        """
        shares = [branch.share for branch in self.branches]
        if in_features % sum(shares):
            raise WrongConfiguration(
                f"shares {' + '.join(map(str, shares))} of parallel must divide the channels, which are {in_features}"
            )
        return tuple(in_features // sum(shares) * share for share in shares)

    def num_columns(self, in_features: int) -> int:
        """Return how many functions all channels have together beside the constants."""
        counts = zip(self.channels(in_features), self.branches, strict=True)
        return sum(channels * branch.num_functions for channels, branch in counts)

    def layer_parameters(self, in_features: int, out_features: int) -> int:
        """Return the exact number of a layer's parameters."""
        constants = out_features * (in_features if self.constants == "stored" else 1)
        scale = in_features if self.scale == "learned" else 0
        return out_features * self.num_columns(in_features) + constants + scale
