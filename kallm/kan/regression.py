"""Ridge regression of an FFN's last linear map in closed form, from sums that are added up batch by batch.

Legend: N rows (tokens), D width of the residual stream, F features (inputs of the last linear map), O outputs.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kallm.errors import WrongConfiguration
from kallm.kan.ffns import FFN
from kallm.kan.linear import KANLinear

__all__ = ["RIDGES", "LeastSquares", "choose_ridge", "compute_features", "find_last_map"]

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Strengths to choose from, relative to the mean variance of the features; from weak to strong."""
_CHUNK = 2048
"""Rows whose features are widened to float64 at a time."""


class LeastSquares:
    """The normal equations of a weighted ridge regression y ≈ A f + b, in float64.

    With weights w_n, the sums are Σ w f̃ f̃ᵀ, Σ w f̃ yᵀ and Σ w |y|², where f̃ is f with a 1 behind it if there is a b.
    A solution for strength r minimises Σ w |y - A f - b|² + r v Σ w |A|², where v is the features' mean variance (the
    mean of their squares if there is no b); b is not held back. Rows may come in any number of batches.
    """

    def __init__(self, num_features: int, num_outputs: int, *, bias: bool, device: torch.device | str = "cpu") -> None:
        self._bias, size = bias, num_features + bias
        self._gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._cross = torch.zeros(size, num_outputs, dtype=torch.float64, device=device)
        self._squares = torch.zeros((), dtype=torch.float64, device=device)
        self._weight = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(
        self, features: Float[Tensor, "N F"], targets: Float[Tensor, "N O"], weights: Float[Tensor, " N"] | None = None
    ) -> None:
        """Add rows; without weights, each weighs 1."""
        if weights is None:
            weights = features.new_ones(len(features))
        for f, y, w in zip(*(torch.split(each, _CHUNK) for each in (features, targets, weights)), strict=True):
            root = w.double().sqrt()[:, None]
            rows, wanted = f.double() * root, y.double() * root
            if self._bias:
                rows = torch.cat([rows, root], dim=1)
            self._gram.addmm_(rows.T, rows)
            self._cross.addmm_(rows.T, wanted)
            self._squares += wanted.square().sum()
            self._weight += w.double().sum()

    def __add__(self, other: "LeastSquares") -> "LeastSquares":
        """Return the normal equations of both sets of rows."""
        assert (self._bias, self._cross.shape) == (other._bias, other._cross.shape)
        both = LeastSquares(0, 0, bias=self._bias)
        for name in ("_gram", "_cross", "_squares", "_weight"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def solve(self, ridge: float) -> tuple[Float[Tensor, "O F"], Float[Tensor, " O"]]:
        """Return A and b in float64; b is 0 where there is none.

        Raises:
            WrongConfiguration: the sums are not finite, or the features are all constant.
        """
        gram, cross = self._gram.clone(), self._cross
        if self._bias:  # centring by the sums takes b out, so that the ridge cannot pull at it
            mean, mean_y = gram[-1, :-1] / self._weight, cross[-1] / self._weight
            cross = cross[:-1] - self._weight * torch.outer(mean, mean_y)
            gram = gram[:-1, :-1] - self._weight * torch.outer(mean, mean)
        strength = ridge * float(gram.diagonal().mean())
        if not 0 < strength < float("inf"):
            raise WrongConfiguration(
                f"the fit needs features that vary and are finite, but their mean variance is {strength / ridge:g}; "
                "give calibration text with more than one token"
            )
        gram.diagonal().add_(strength)
        solution = torch.cholesky_solve(cross, torch.linalg.cholesky(gram))
        bias = mean_y - mean @ solution if self._bias else solution.new_zeros(solution.shape[1])
        return solution.T.contiguous(), bias

    def error(self, weight: Float[Tensor, "O F"], bias: Float[Tensor, " O"]) -> float:
        """Return the weighted mean over these rows of |y - A f - b|²."""
        solution = torch.cat([weight, bias[:, None]], dim=1).T if self._bias else weight.T
        quadratic = (solution * (self._gram @ solution)).sum() - 2 * (solution * self._cross).sum()
        return float((quadratic + self._squares) / self._weight)


def choose_ridge(fitted: LeastSquares, heldback: LeastSquares, ridges: Sequence[float] = RIDGES) -> float:
    """Return the strength whose solution on some rows has the least error on others; the stronger of equal ones."""
    return min(sorted(ridges, reverse=True), key=lambda ridge: heldback.error(*fitted.solve(ridge)))


def find_last_map(ffn: FFN) -> nn.Linear | None:
    """Return the linear map that an FFN ends with; None for an FFN without one."""
    linears = [module for module in ffn.modules() if isinstance(module, nn.Linear)]
    return linears[-1] if linears else None


@torch.no_grad()
def compute_features(ffn: FFN, x: Float[Tensor, "N D"]) -> Float[Tensor, "N F"]:
    """Return what an FFN's last linear map reads, in float32: its output is the map of it."""
    last = find_last_map(ffn)
    assert last is not None
    layers = [module for module in ffn.modules() if isinstance(module, KANLinear)]
    if layers and layers[-1].linear is last:
        for layer in layers[:-1]:
            x = layer(x)
        return layers[-1].functions(x.float())
    found: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    ffn(x)
    hook.remove()
    return found[0].float()
