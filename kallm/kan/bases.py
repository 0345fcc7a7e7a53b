"""Bases: functions of one number, the constant left out, each with its slope.

The constant function is the same for every input, so a layer keeps it in one bias. Functions are computed in float32
(float64 for float64) and rounded once. Legend: D inputs, K basis functions.
"""

from collections.abc import Iterable
from math import comb, factorial, pi

import torch
from jaxtyping import Float
from torch import Tensor

from kallm.kan.basis import Basis, Blocks
from kallm.kan.layerspec import BASIS_SETTINGS, BasisSpec
from kallm.kan.polynomials import Chebyshev1, Chebyshev2, Gegenbauer, Hermite, Jacobi, Legendre, Monomial

__all__ = ["BASES", "BSpline", "Fourier", "Gaussian", "Switch", "Wavelet", "build_basis"]


class Fourier(Basis):
    """cos(π t), sin(π t), …, cos(n π t), sin(n π t), of period 2; K = 2 × degree."""

    def __init__(self, *, degree: int) -> None:
        self.size = 2 * degree

    def values(self, t: Float[Tensor, "... D"]) -> Blocks:
        angles = [t * (pi * k) for k in range(1, self.size // 2 + 1)]
        return [f(angle) for angle in angles for f in (torch.cos, torch.sin)]

    def with_slopes(self, t: Float[Tensor, "... D"]) -> tuple[Blocks, Blocks]:
        values = self.values(t)
        pairs = zip(values[::2], values[1::2], strict=True)
        return values, [s for k, (cos, sin) in enumerate(pairs, start=1) for s in (sin * (-pi * k), cos * (pi * k))]


class BSpline(Basis):
    """B-splines of any order on a uniform grid over [-1, 1]; outside, the value at the nearer end (de Boor 1978).

    With p = order and s = size + 1 - p intervals of width h = 2/s, the functions are M_p((t + 1)/h + p - j) for
    j = 1 … size, where M_p(v) = Σ_m (-1)^m C(p+1, m) max(v - m, 0)^p / p!. The one for j = 0 is left out: together
    they sum to 1, so that it is the constant's. M_p is symmetric, and only its left half is summed: no cancellation.
    """

    def __init__(self, *, size: int, order: int | None = None) -> None:
        self.size = size
        self._order = min(3, size) if order is None else order
        self._per_unit = (size + 1 - self._order) / 2

    def values(self, t: Float[Tensor, "... D"]) -> Blocks:
        distance = self._offsets(t).abs_()
        terms = ((_reach(distance, edge).pow(self._order), weight) for edge, weight in self._terms())
        return _sum(terms)

    def with_slopes(self, t: Float[Tensor, "... D"]) -> tuple[Blocks, Blocks]:
        order, offset = self._order, self._offsets(t)
        distance = offset.abs()
        inside = (t.abs() <= 1) * (-order * self._per_unit)
        values, slopes = [], []
        for edge, weight in self._terms():
            reach = _reach(distance, edge)
            power = reach.pow(order - 1) if order > 1 else reach.sign()
            values.append((reach.mul_(power), weight))
            slopes.append((power, weight))
        return _sum(values), _sum(slopes).mul_(offset.sign_()).mul_(inside)

    def _offsets(self, t: Float[Tensor, "... D"]) -> Float[Tensor, "K ... D"]:
        """Return the distance, in intervals, from the middle of every function."""
        middles = torch.arange(self.size, device=t.device, dtype=t.dtype) - (self._order - 3) / 2
        return (t.clamp(-1, 1) + 1).mul(self._per_unit) - middles.view(-1, *[1] * t.ndim)

    def _terms(self) -> list[tuple[float, float]]:
        """Return the distance at which each truncated power of M_p's half ends, and its factor."""
        order = self._order
        middle = (order + 1) / 2
        return [(middle - m, (-1) ** m * comb(order + 1, m) / factorial(order)) for m in range(order // 2 + 1)]


def _reach(distance: Tensor, edge: float) -> Tensor:
    """Return max(edge - distance, 0)."""
    return torch.rsub(distance, edge).clamp_min_(0)


def _sum(terms: Iterable[tuple[Tensor, float]]) -> Tensor:
    """Return the sum of tensors times factors; it may write into the first."""
    (first, weight), *rest = terms
    total = first.mul(weight)
    for term, weight in rest:
        total.add_(term, alpha=weight)
    return total


class _Bumps(Basis):
    """One shape ψ(z) at K centres g_j spread over [-1, 1], with z = (t - g_j)/h and h the distance of the centres."""

    def __init__(self, *, size: int) -> None:
        self.size = size
        self._first, self._width = (-1.0, 2 / (size - 1)) if size > 1 else (0.0, 1.0)

    def _places(self, t: Float[Tensor, "... D"]) -> Float[Tensor, "K ... D"]:
        """Return z for every centre."""
        centres = torch.arange(self.size, device=t.device, dtype=t.dtype).view(-1, *[1] * t.ndim)
        return (t - self._first) / self._width - centres


class Gaussian(_Bumps):
    """ψ(z) = exp(-z²) in (0, 1] (Li 2024, FastKAN)."""

    def values(self, t: Float[Tensor, "... D"]) -> Blocks:
        return self._places(t).square().neg_().exp_()

    def with_slopes(self, t: Float[Tensor, "... D"]) -> tuple[Blocks, Blocks]:
        z = self._places(t)
        values = z.square().neg_().exp_()
        return values, (z * values).mul_(-2 / self._width)


class Switch(_Bumps):
    """ψ(z) = 1 - tanh² z in (0, 1], the reflectional switch (Delis 2024, FasterKAN)."""

    def values(self, t: Float[Tensor, "... D"]) -> Blocks:
        return 1 - self._places(t).tanh().square()

    def with_slopes(self, t: Float[Tensor, "... D"]) -> tuple[Blocks, Blocks]:
        bent = self._places(t).tanh()
        values = 1 - bent.square()
        return values, (bent * values).mul_(-2 / self._width)


class Wavelet(_Bumps):
    """ψ(z) = (1 - z²) exp(-z²/2), the Mexican hat, in [-2 exp(-3/2), 1] (Bozorgasl and Chen 2024, Wav-KAN)."""

    def values(self, t: Float[Tensor, "... D"]) -> Blocks:
        square = self._places(t).square()
        return (1 - square) * (square / -2).exp()

    def with_slopes(self, t: Float[Tensor, "... D"]) -> tuple[Blocks, Blocks]:
        z = self._places(t)
        square = z.square()
        bell = (square / -2).exp_()
        return (1 - square) * bell, (square - 3).mul_(z).mul_(bell).div_(self._width)


def build_basis(spec: BasisSpec) -> Basis:
    """Return the basis that a spec names, with its sizes."""
    settings = {name: getattr(spec, name) for name in BASIS_SETTINGS[spec.basis or ""]}
    return BASES[spec.basis or ""](**settings)


BASES: dict[str, type[Basis]] = {
    "bspline": BSpline,
    "chebyshev1": Chebyshev1,
    "chebyshev2": Chebyshev2,
    "fourier": Fourier,
    "gegenbauer": Gegenbauer,
    "hermite": Hermite,
    "jacobi": Jacobi,
    "legendre": Legendre,
    "monomial": Monomial,
    "rbf": Gaussian,
    "switch": Switch,
    "wavelet": Wavelet,
}
