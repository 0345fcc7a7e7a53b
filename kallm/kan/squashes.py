"""Squashings: what takes a scaled input into [-1, 1] before the basis. Legend: D inputs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kallm.kan.layerspec import Squash

__all__ = ["SQUASHES", "Squashing"]

_Slope = Callable[[Float[Tensor, "... D"], Float[Tensor, "... D"]], Tensor | None]


@dataclass(frozen=True)
class Squashing:
    """One squashing t(z).

    Attributes:
        value: t for z.
        slope: dt/dz for (z, t), finite everywhere; None stands for 1.
        spread: the root mean square of z that calibration aims at, so that t fills [-1, 1].
    """

    value: Callable[[Float[Tensor, "... D"]], Float[Tensor, "... D"]]
    slope: _Slope
    spread: float


def _algebraic(z: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    return z * torch.rsqrt(1 + z * z)


def _tanh_slope(z: Float[Tensor, "... D"], t: Float[Tensor, "... D"]) -> Tensor:
    return 1 - t * t


def _algebraic_slope(z: Float[Tensor, "... D"], t: Float[Tensor, "... D"]) -> Tensor:
    return torch.rsqrt(1 + z * z).pow(3)


def _clamp(z: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    return z.clamp(-1, 1)


def _clamp_slope(z: Float[Tensor, "... D"], t: Float[Tensor, "... D"]) -> Tensor:
    return (z == t).to(z.dtype)


def _same(z: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    return z


def _same_slope(z: Float[Tensor, "... D"], t: Float[Tensor, "... D"]) -> None:
    return None


SQUASHES: dict[Squash, Squashing] = {
    "tanh": Squashing(torch.tanh, _tanh_slope, 1.0),
    "algebraic": Squashing(_algebraic, _algebraic_slope, 1.0),
    "clamp": Squashing(_clamp, _clamp_slope, 0.5),
    "none": Squashing(_same, _same_slope, 0.5),
}
