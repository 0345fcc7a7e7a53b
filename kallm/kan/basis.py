"""What a basis is. Legend: n rows, d inputs, D inputs of any shape, K basis functions."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Basis", "Blocks", "can_write_into", "centred", "fill"]

Blocks = Tensor | Sequence[Tensor]
"""One tensor [K ... D], or K tensors [... D], of which a slope that is 1 everywhere may be a scalar."""


class Basis(ABC):
    """K functions of one number beside the constant.

    ``values`` and ``with_slopes`` take float32 or float64 and give the functions one after another, as a layer's
    matrix product needs them; calling the basis gives them along the last axis.

    Attributes:
        size: K.
        unit: the derivatives are given as multiples of it, so that a constant factor costs no pass over the memory.
    """

    size: int
    unit: float = 1.0

    @abstractmethod
    def values(self, t: Float[Tensor, "... D"], centres: Float[Tensor, "K D"] | None = None) -> Blocks:
        """Return the K functions at t, less their centres."""

    @abstractmethod
    def with_slopes(
        self, t: Float[Tensor, "... D"], centres: Float[Tensor, "K D"] | None = None
    ) -> tuple[Blocks, Blocks]:
        """Return the K functions at t, less their centres, and their K derivatives over ``unit``."""

    def write(self, blocks: Float[Tensor, "K n d"], t: Float[Tensor, "n d"], centres: Float[Tensor, "K d"]) -> None:
        """Write the centred functions at t into the blocks, whatever their dtype."""
        fill(blocks, self.values(t, centres))

    def pull_back_(
        self, blocks: Float[Tensor, "K n d"], t: Float[Tensor, "n d"], centres: Float[Tensor, "K d"]
    ) -> Float[Tensor, "n d"]:
        """Return t's gradient over ``unit`` for the functions' gradient in blocks, and write the functions there."""
        values, slopes = self.with_slopes(t, centres)
        if isinstance(slopes, Tensor):
            total = slopes.mul_(blocks).sum(dim=0)
        else:
            total = blocks[0].to(t.dtype, copy=True)  # the functions are written over it
            if slopes[0].ndim:
                total.mul_(slopes[0])
            for slope, block in zip(slopes[1:], blocks[1:], strict=True):
                total = torch.addcmul(total, slope, block.to(t.dtype))
        fill(blocks, values)
        return total

    def __call__(self, t: Float[Tensor, "... D"]) -> Float[Tensor, "... D K"]:
        """Return the K functions at t along a new last axis, in t's dtype."""
        inner = t if t.dtype is torch.float64 else t.float()
        return torch.stack(list(self.values(inner)), dim=-1).to(t.dtype)


def fill(blocks: Float[Tensor, "K n d"], values: Blocks) -> None:
    """Write functions into blocks, each rounded once."""
    if isinstance(values, Tensor):
        blocks.copy_(values)
        return
    for value, block in zip(values, blocks.unbind(), strict=True):
        block.copy_(value)


def can_write_into(out: Tensor, dtype: torch.dtype) -> bool:
    """Whether an operation in a dtype can write into a view: one pass over the memory less than a copy."""
    return out.dtype is dtype and not torch.compiler.is_compiling()  # which knows contiguous tensors only


def centred(values: Blocks, centres: Float[Tensor, "K D"] | None) -> Blocks:
    """Return the functions less their centres; it may write into the functions."""
    if centres is None:
        return values
    if isinstance(values, Tensor):
        return values.sub_(centres.view(len(values), *[1] * (values.ndim - 2), -1))
    return [value.sub_(centre) for value, centre in zip(values, centres, strict=True)]
