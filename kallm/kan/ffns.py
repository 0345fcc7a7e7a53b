"""FFNS: the modules that stand in for a pretrained FFN, and how each is drawn afresh.

Legend: N rows (tokens), D width of the residual stream.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kallm.errors import WrongConfiguration, did_you_mean
from kallm.kan.calibration import assumed_inputs, deviation, draw_, require_variation
from kallm.kan.linear import KANLinear
from kallm.kan.rational import Rational
from kallm.kan.spec import FFNSpec, KANSpec, KATSpec, MLPSpec, SwiGLUSpec

__all__ = ["FFN", "FFNS", "KAN", "KAT", "MLP", "Affine", "Removed", "SwiGLU", "build"]


class FFN(nn.Module, ABC):
    """A map [... D] → [... D] in place of a pretrained FFN; the dtype is kept, or is autocast's.

    Attributes:
        spec: the description that ``FFNS`` builds the same module from, whatever it stands in for.
        width: D.
    """

    def __init__(self, spec: FFNSpec, *, width: int) -> None:
        super().__init__()
        self.spec, self.width = spec, width

    @abstractmethod
    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Return what is added to the residual stream."""

    @torch.no_grad()
    def reset_parameters(self, *, generator: torch.Generator, inputs: Float[Tensor, "N D"] | None = None) -> None:
        """Draw all weights from a CPU generator, so that the outputs deviate as much as the inputs do.

        Args:
            generator: on the CPU; equal states give equal draws on every device.
            inputs: real inputs of the FFN, a few thousand rows; None stands for 2,048 unit normal rows. Scales and
                centres are calibrated on them, layer after layer, and the output's standard deviation (over rows and
                channels, each channel's mean removed) is made equal to theirs.

        Raises:
            WrongConfiguration: the inputs are constant or not finite.
        """
        device = next(self.parameters(), torch.empty(0)).device
        rows = assumed_inputs(inputs, width=self.width, generator=generator, device=device)
        require_variation(rows)
        self._draw(rows, deviation(rows), generator)

    @abstractmethod
    def _draw(self, inputs: Float[Tensor, "N D"], target: float, generator: torch.Generator) -> None:
        """Draw the weights for float32 inputs and the outputs' standard deviation."""


class SwiGLU(FFN):
    """W_down (silu(W_gate x) · W_up x), without biases (Shazeer 2020); drawn with unit gates and unit factors."""

    def __init__(self, spec: SwiGLUSpec, *, width: int, pretrained_hidden: int, **place: Any) -> None:
        hidden = spec.hidden or pretrained_hidden
        super().__init__(spec.model_copy(update={"hidden": hidden}), width=width)
        self.gate_proj = nn.Linear(width, hidden, bias=False, **place)
        self.up_proj = nn.Linear(width, hidden, bias=False, **place)
        self.down_proj = nn.Linear(hidden, width, bias=False, **place)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Return what is added to the residual stream."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def _draw(self, inputs: Float[Tensor, "N D"], target: float, generator: torch.Generator) -> None:
        gate = draw_(self.gate_proj, inputs, target=1.0, generator=generator)
        up = draw_(self.up_proj, inputs, target=1.0, generator=generator)
        draw_(self.down_proj, F.silu(gate) * up, target=target, generator=generator)


class MLP(FFN):
    """W_down f(W_up x), without biases; drawn so that f gets unit inputs."""

    _activations: ClassVar[dict[str, Callable[[Tensor], Tensor]]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}

    def __init__(self, spec: MLPSpec, *, width: int, pretrained_hidden: int, **place: Any) -> None:
        super().__init__(spec, width=width)
        self.up_proj = nn.Linear(width, spec.hidden, bias=False, **place)
        self.down_proj = nn.Linear(spec.hidden, width, bias=False, **place)
        self._activation = self._activations[spec.activation]

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Return what is added to the residual stream."""
        return self.down_proj(self._activation(self.up_proj(x)))

    def _draw(self, inputs: Float[Tensor, "N D"], target: float, generator: torch.Generator) -> None:
        hidden = draw_(self.up_proj, inputs, target=1.0, generator=generator)
        draw_(self.down_proj, self._activation(hidden), target=target, generator=generator)


class Affine(FFN):
    """W x + b; b starts at 0."""

    def __init__(self, spec: FFNSpec, *, width: int, pretrained_hidden: int, **place: Any) -> None:
        super().__init__(spec, width=width)
        self.linear = nn.Linear(width, width, **place)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Return what is added to the residual stream."""
        return self.linear(x)

    def _draw(self, inputs: Float[Tensor, "N D"], target: float, generator: torch.Generator) -> None:
        draw_(self.linear, inputs, target=target, generator=generator)


class Removed(FFN):
    """Zeros: the residual stream passes unchanged."""

    def __init__(self, spec: FFNSpec, *, width: int, pretrained_hidden: int, **place: Any) -> None:
        super().__init__(spec, width=width)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Return zeros."""
        return torch.zeros_like(x)

    def _draw(self, inputs: Float[Tensor, "N D"], target: float, generator: torch.Generator) -> None:
        """Draw nothing."""


class KAT(FFN):
    """W_2 F_2(W_1 F_1(x) + b_1) + b_2 with group-rational F_1 = identity and F_2 = gelu at the start (ICLR 2025)."""

    def __init__(self, spec: KATSpec, *, width: int, pretrained_hidden: int, **place: Any) -> None:
        super().__init__(spec, width=width)
        self.act1 = Rational(width, groups=spec.groups, start="identity", **place)
        self.fc1 = nn.Linear(width, spec.hidden, **place)
        self.act2 = Rational(spec.hidden, groups=spec.groups, start="gelu", **place)
        self.fc2 = nn.Linear(spec.hidden, width, **place)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Return what is added to the residual stream."""
        return self.fc2(self.act2(self.fc1(self.act1(x))))

    def _draw(self, inputs: Float[Tensor, "N D"], target: float, generator: torch.Generator) -> None:
        self.act1.reset_parameters()
        self.act2.reset_parameters()
        hidden = draw_(self.fc1, self.act1(inputs), target=1.0, generator=generator)
        draw_(self.fc2, self.act2(hidden), target=target, generator=generator)


class KAN(FFN):
    """KAN layers one after another, nothing between them; see ``KANLinear`` for the formula."""

    def __init__(self, spec: KANSpec, *, width: int, pretrained_hidden: int, **place: Any) -> None:
        super().__init__(spec, width=width)
        self.layers = nn.Sequential(
            *(KANLinear(inputs, outputs, layer=layer, **place) for inputs, outputs, layer in spec.stack(width))
        )

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Return what is added to the residual stream."""
        return self.layers(x)

    def _draw(self, inputs: Float[Tensor, "N D"], target: float, generator: torch.Generator) -> None:
        for index, layer in enumerate(cast(list[KANLinear], list(self.layers)), start=1):
            last = index == len(self.layers)
            inputs = layer.reset_parameters(generator=generator, inputs=inputs, deviation=target if last else 1.0)


def build(
    spec: FFNSpec,
    *,
    width: int,
    pretrained_hidden: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> FFN:
    """Return the module that a spec describes; ``reset_parameters`` draws its weights.

    Raises:
        WrongConfiguration: the sizes do not divide the width, or the spec keeps the pretrained FFN.
    """
    if spec.ffn not in FFNS:
        raise WrongConfiguration(f"ffn '{spec.ffn}' is not built: {did_you_mean(spec.ffn, FFNS)}")
    spec.parameters(width, pretrained_hidden)
    return FFNS[spec.ffn](spec, width=width, pretrained_hidden=pretrained_hidden, device=device, dtype=dtype)


FFNS: dict[str, Any] = {
    "affine": Affine,
    "kan": KAN,
    "kat": KAT,
    "mlp": MLP,
    "removed": Removed,
    "swiglu": SwiGLU,
}
