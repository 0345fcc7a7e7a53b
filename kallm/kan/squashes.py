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
        value_: the same, and z may be written over, where ``pull_back`` does not read it.
        pull_back: the gradient of z for (z, t, gradient of t), finite everywhere; the last may be written over.
        spread: the root mean square of z that calibration aims at, so that t fills [-1, 1].
    """

    value: Callable[[Tensor], Tensor]
    value_: Callable[[Tensor], Tensor]
    pull_back: Callable[[Tensor, Tensor, Tensor], Tensor]
    spread: float


def _algebraic(z: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    return z * torch.rsqrt(1 + z * z)


def _clamp(z: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    return z.clamp(-1, 1)


def _none(z: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    return z


# functions with names of their own, because a model is pickled with its layers


def _pull_tanh(z: Tensor, t: Tensor, grad: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        pulled: Tensor = torch.ops.aten.tanh_backward(grad, t)
        return pulled
    torch.ops.aten.tanh_backward.grad_input(grad, t, grad_input=grad)
    return grad


def _pull_algebraic(z: Tensor, t: Tensor, grad: Tensor) -> Tensor:
    return grad * torch.rsqrt(1 + z * z).pow(3)


def _pull_clamp(z: Tensor, t: Tensor, grad: Tensor) -> Tensor:
    return grad * (z == t)


def _pull_none(z: Tensor, t: Tensor, grad: Tensor) -> Tensor:
    return grad


SQUASHES: dict[Squash, Squashing] = {
    "tanh": Squashing(torch.tanh, torch.tanh_, _pull_tanh, spread=1.0),
    "algebraic": Squashing(_algebraic, _algebraic, _pull_algebraic, spread=1.0),
    "clamp": Squashing(_clamp, _clamp, _pull_clamp, spread=0.5),
    "none": Squashing(_none, _none, _pull_none, spread=0.5),
}
