"""Variance-preserving draws: what a fresh FFN needs to know of its inputs. Legend: N rows, D inputs, O outputs."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kallm.errors import WrongConfiguration

__all__ = [
    "_ASSUMED_ROWS",
    "assumed_inputs",
    "deviation",
    "draw_",
    "require_variation",
    "rescaled",
    "root_mean_square",
]

_ASSUMED_ROWS = 2048
"""Rows of unit normal inputs that stand for real ones where there are none."""


def assumed_inputs(
    inputs: Float[Tensor, "N D"] | None, *, width: int, generator: torch.Generator, device: torch.device
) -> Float[Tensor, "N D"]:
    """Return the inputs in float32 on the device; unit normal ones where there are none."""
    if inputs is None:
        inputs = torch.randn(_ASSUMED_ROWS, width, generator=generator)
    return inputs.to(device, torch.float32)


def deviation(values: Float[Tensor, "N D"]) -> float:
    """Return the standard deviation over rows and channels, each channel's mean removed."""
    return float((values - values.mean(dim=0)).square().mean().sqrt())


def require_variation(inputs: Float[Tensor, "N D"]) -> None:
    """Refuse inputs that nothing can be calibrated on.

    Raises:
        WrongConfiguration: the inputs are constant, or not finite.
    """
    found = deviation(inputs)
    if not 0 < found < float("inf"):
        raise WrongConfiguration(
            f"calibration needs at least 2 different rows of finite inputs, but {len(inputs)} rows deviate by {found}"
        )


def root_mean_square(values: Float[Tensor, "N D"]) -> Float[Tensor, " D"]:
    """Return the root mean square of every channel; 1 for a channel that is always zero."""
    found = values.square().mean(dim=0).sqrt()
    return torch.where(found > 0, found, torch.ones_like(found))


def rescaled(
    weight: Float[Tensor, "O F"], outputs: Float[Tensor, "N O"], target: float
) -> tuple[Float[Tensor, "O F"], Float[Tensor, "N O"]]:
    """Return a linear map's drawn weight and its outputs, scaled so that the outputs deviate by target."""
    factor = target / deviation(outputs)
    return weight * factor, outputs * factor


def draw_(
    linear: nn.Linear, inputs: Float[Tensor, "N F"], *, target: float, generator: torch.Generator
) -> Float[Tensor, "N O"]:
    """Draw a linear map so that its outputs on these inputs deviate by target; its bias is 0. Return the outputs."""
    drawn = torch.randn(linear.out_features, linear.in_features, generator=generator).to(inputs.device)
    weight, outputs = rescaled(drawn, inputs @ drawn.T, target)
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.zero_()
    return outputs
