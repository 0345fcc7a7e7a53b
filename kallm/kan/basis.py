"""What a basis is. Legend: D inputs, K basis functions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Basis", "Blocks"]

Blocks = Tensor | Sequence[Tensor]
"""One tensor [K ... D], or K tensors [... D], of which a slope that is the same everywhere may be a scalar."""


class Basis(ABC):
    """K functions of one number beside the constant.

    ``values`` and ``with_slopes`` take float32 or float64 and give the functions one after another, as a layer's
    matrix product needs them; calling the basis gives them along the last axis.
    """

    size: int

    @abstractmethod
    def values(self, t: Float[Tensor, "... D"]) -> Blocks:
        """Return the K functions at t."""

    @abstractmethod
    def with_slopes(self, t: Float[Tensor, "... D"]) -> tuple[Blocks, Blocks]:
        """Return the K functions and their K derivatives at t."""

    def __call__(self, t: Float[Tensor, "... D"]) -> Float[Tensor, "... D K"]:
        """Return the K functions at t along a new last axis, in t's dtype."""
        inner = t if t.dtype is torch.float64 else t.float()
        return torch.stack(list(self.values(inner)), dim=-1).to(t.dtype)
