"""What the edges of a KAN layer have learned, on real inputs of it.

Edge (o, i) adds φ_oi(x_i) = Σ_k c[o, k, i] (φ_k(squash(s_i x_i)) - m[k, i]) to output o, with its stored constant where
the layer keeps one; a layer's output is its bias and the sum of its edges. A part of the edges, or of each edge,
*explains* 1 - Σ_o Var(y_o - ŷ_o) / Σ_o Var(y_o) of the output: what is left when all else stands still at its mean.
Inputs are not independent, so shares of single edges need not add up to one, and a part alone may explain less than 0.

Legend: N rows, D inputs, O outputs, F functions of all inputs, K of one input, E edges, P points.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kallm.kan.branches import list_branches
from kallm.kan.linear import KANLinear

__all__ = ["Edges", "Explained", "StrongEdge"]

_OTHER_DEGREE = 3
_HIGHEST_DEGREE = 6


@dataclass(frozen=True)
class Explained:
    """Which share of a layer's output variance its parts explain.

    Attributes:
        lines: every edge replaced by its best straight line in the input.
        degrees: every edge replaced by its best polynomial in the squashed input, of degree 1, 2, …: cumulative.
        strongest: by share of the edges, the strongest of them.
    """

    lines: float
    degrees: tuple[float, ...]
    strongest: dict[float, float]


@dataclass(frozen=True)
class StrongEdge:
    """One edge: where it leads, the variance of what it adds, and that over the variance of its output."""

    output: int
    input: int
    variance: float
    share: float


class Edges:
    """The edges of one layer over some of its inputs; everything is computed in float64.

    Args:
        layer: with its weights.
        rows: what it reads, N rows; two at least.
    """

    def __init__(self, layer: KANLinear, rows: Float[Tensor, "N D"]) -> None:
        self.layer = layer
        self.rows = rows.detach().double()
        self._branches = tuple(list_branches(layer.layer, layer.in_features))
        self._weight = layer.linear.weight.detach().double()
        self._owner = self._find_owners()
        functions = layer.functions(self.rows, torch.float64).detach()
        self._means = functions.mean(dim=0)
        self._functions = functions - self._means
        self._inputs = self.rows - self.rows.mean(dim=0)
        self._outputs = self._functions @ self._weight.T

    @cached_property
    def variances(self) -> Float[Tensor, "O D"]:
        """The variance of what each edge adds: c_oi' C_i c_oi with the covariance C_i of input i's functions."""
        found = self._weight.new_zeros(self.layer.out_features, self.layer.in_features)
        constants = self._num_constants
        for branch in self._branches:
            functions = branch.blocks(self._functions[:, constants:])
            weight = branch.blocks(self._weight[:, constants:])
            covariance = torch.einsum("knd,lnd->dkl", functions, functions) / len(self.rows)
            branch.inputs(found).copy_(torch.einsum("kod,dkl,lod->od", weight, covariance, weight))
        return found.clamp_min(0)

    def rank(self, count: int) -> list[StrongEdge]:
        """Return the edges whose contributions vary most, strongest first; among equals by output, then input."""
        variances = self.variances
        outputs = self._outputs.square().mean(dim=0)
        order = torch.argsort(variances.flatten(), descending=True, stable=True)[:count]
        found = []
        for index in order.tolist():
            output, source = divmod(index, self.layer.in_features)
            variance = float(variances[output, source])
            total = float(outputs[output])
            found.append(StrongEdge(output, source, variance, variance / total if total else 0.0))
        return found

    def explain(self, *, shares: tuple[float, ...]) -> Explained:
        """Return what the edges' parts explain.

        Args:
            shares: of the edges, between 0 and 1: how much the strongest of them explain, at least one edge.
        """
        cumulative, degrees = torch.zeros_like(self._functions), []
        for degree in self._project():
            cumulative += degree
            degrees.append(self._explain(cumulative @ self._weight.T))
        return Explained(
            lines=self._explain(self._straighten() @ self._weight.T),
            degrees=tuple(degrees),
            strongest={share: self._explain(self._keep(share)) for share in shares},
        )

    def sample(self, edges: Sequence[StrongEdge], grid: Float[Tensor, "P D"]) -> Float[Tensor, "E P"]:
        """Return what some edges add at P values of each input, less its mean over the rows."""
        functions = self.layer.functions(grid.double(), torch.float64).detach() - self._means
        owns = [(edge, self._owner == edge.input) for edge in edges]
        return torch.stack([functions[:, own] @ self._weight[edge.output, own] for edge, own in owns])

    @property
    def _num_constants(self) -> int:
        return self._weight.shape[1] - self.layer.layer.num_columns(self.layer.in_features)

    def _find_owners(self) -> Int[Tensor, " F"]:
        """Return which input each column of the weight belongs to."""
        numbers = torch.arange(self.layer.in_features, device=self._weight.device)
        own = [numbers[branch.start : branch.stop].repeat(branch.basis.size) for branch in self._branches]
        return torch.cat([numbers[: self._num_constants], *own])

    def _explain(self, part: Float[Tensor, "N O"]) -> float:
        """Return the share of the outputs' variance that a centred part of them explains."""
        total = float(self._outputs.square().sum())
        return 1 - float((self._outputs - part).square().sum()) / total if total else 0.0

    def _keep(self, share: float) -> Float[Tensor, "N O"]:
        """Return the outputs of the strongest edges alone, centred."""
        variances = self.variances
        count = max(1, round(share * variances.numel()))
        kept = torch.zeros_like(variances).flatten()
        kept[torch.argsort(variances.flatten(), descending=True, stable=True)[:count]] = 1
        return self._functions @ (self._weight * kept.view_as(variances)[:, self._owner]).T

    def _straighten(self) -> Float[Tensor, "N F"]:
        """Return every function's best straight line in its input."""
        spread = self._inputs.square().sum(dim=0)
        own = self._inputs[:, self._owner]
        slopes = (self._functions * own).sum(dim=0) / spread.clamp_min(torch.finfo(spread.dtype).tiny)[self._owner]
        return own * slopes

    def _project(self) -> list[Float[Tensor, "N F"]]:
        """Return every function's projections on orthonormal polynomials of its squashed input, degree 1 upwards.

        Best over the rows; as each is orthogonal to those before, sums of them are the best of their degree.
        """
        directions: list[Tensor] = [torch.ones_like(self._inputs)]
        squashed = self._squash()
        power = torch.ones_like(squashed)
        found = []
        for _ in range(self._num_degrees):
            power = power * squashed
            new = power.clone()
            for _ in range(2):  # once more takes away what rounding left
                for old in directions:
                    new -= old * (old * new).mean(dim=0)
            size = new.square().mean(dim=0).sqrt()
            alive = size > 1e-9 * power.square().mean(dim=0).sqrt()
            directions.append(torch.where(alive, new / torch.where(alive, size, 1), 0))
            own = directions[-1][:, self._owner]
            found.append(own * (own * self._functions).mean(dim=0))
        return found

    @property
    def _num_degrees(self) -> int:
        """Return the layer's own degree where its functions are polynomials, else a few."""
        specs = self.layer.layer.branches
        degrees = [spec.degree if spec.degree and spec.basis != "fourier" else _OTHER_DEGREE for spec in specs]
        return min(max(degrees), _HIGHEST_DEGREE)

    def _squash(self) -> Float[Tensor, "N D"]:
        z = self.rows * self.layer.scale.detach().double()
        return torch.cat([branch.squash.value(branch.inputs(z)) for branch in self._branches], dim=1)
