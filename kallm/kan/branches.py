"""The branches of a KAN layer: which basis works on which inputs.

Legend: n rows, D inputs of the layer, d of one branch, K functions of each input, F functions of all.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from kallm.kan.bases import build_basis
from kallm.kan.basis import Basis
from kallm.kan.layerspec import LayerSpec
from kallm.kan.squashes import SQUASHES, Squashing

__all__ = ["Branch", "list_branches"]


@dataclass(frozen=True)
class Branch:
    """One basis, its inputs from start to stop, and its columns from ``column`` on."""

    basis: Basis
    squash: Squashing
    start: int
    stop: int
    column: int

    def inputs(self, table: Float[Tensor, "... D"]) -> Float[Tensor, "... d"]:
        """Return the view of this branch's inputs."""
        return table[..., self.start : self.stop]

    def blocks(self, table: Float[Tensor, "n F"]) -> Float[Tensor, "K n d"]:
        """Return the view of this branch's columns, function by function."""
        width = self.stop - self.start
        own = table[:, self.column : self.column + self.basis.size * width]
        return own.view(-1, self.basis.size, width).transpose(0, 1)


def list_branches(layer: LayerSpec, in_features: int) -> Iterator[Branch]:
    """Yield a layer's branches, each behind the inputs and columns of those before."""
    start = column = 0
    for spec, width in zip(layer.branches, layer.channels(in_features), strict=True):
        yield Branch(build_basis(spec), SQUASHES[spec.squash or layer.squash], start, start + width, column)
        start, column = start + width, column + width * spec.num_functions
