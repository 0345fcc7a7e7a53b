"""Squashings: what takes a scaled input into [-1, 1] before the basis. Legend: D inputs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kallm.kan.layerspec import Squash

__all__ = ["SQUASHES", "Squashing"]


@dataclass(frozen=True)
class Squashing:
    """One squashing t(z).

    Attributes:
        value: t for z.
        pull_back: the gradient of z for (z, t, gradient of t), finite everywhere.
        spread: the root mean square of z that calibration aims at, so that t fills [-1, 1].
    """

    value: Callable[[Tensor], Tensor]
    pull_back: Callable[[Tensor, Tensor, Tensor], Tensor]
    spread: float


def _algebraic(z: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    return z * torch.rsqrt(1 + z * z)


def _clamp(z: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    return z.clamp(-1, 1)


SQUASHES: dict[Squash, Squashing] = {
    "tanh": Squashing(torch.tanh, lambda z, t, grad: torch.addcmul(grad, grad * t, t, value=-1), spread=1.0),
    "algebraic": Squashing(_algebraic, lambda z, t, grad: grad * torch.rsqrt(1 + z * z).pow(3), spread=1.0),
    "clamp": Squashing(_clamp, lambda z, t, grad: grad * (z == t), spread=0.5),
    "none": Squashing(lambda z: z, lambda z, t, grad: grad, spread=0.5),
}
