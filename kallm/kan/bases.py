"""Bases: functions of one number, the constant left out, each with its slope.

The constant function is the same for every input, so a layer keeps it in one bias. Functions are computed in float32
(float64 for float64) and rounded once. Legend: D inputs, K basis functions, I intervals of a grid.
"""

from abc import abstractmethod
from math import comb, factorial, pi

import torch
from jaxtyping import Float
from torch import Tensor

from kallm.kan.basis import Basis, Blocks, can_write_into, centred
from kallm.kan.layerspec import BASIS_SETTINGS, BasisSpec
from kallm.kan.polynomials import Chebyshev1, Chebyshev2, Gegenbauer, Hermite, Jacobi, Legendre, Monomial

__all__ = ["BASES", "BSpline", "Fourier", "Gaussian", "Switch", "Wavelet", "build_basis"]


class Fourier(Basis):
    """cos(π t), sin(π t), …, cos(n π t), sin(n π t), of period 2; K = 2 × degree."""

    unit = pi

    def __init__(self, *, degree: int) -> None:
        self.size = 2 * degree

    def values(self, t: Float[Tensor, "... D"], centres: Float[Tensor, "K D"] | None = None) -> Blocks:
        angles = [t * (pi * k) for k in range(1, self.size // 2 + 1)]
        return centred([f(angle) for angle in angles for f in (torch.cos, torch.sin)], centres)

    def with_slopes(
        self, t: Float[Tensor, "... D"], centres: Float[Tensor, "K D"] | None = None
    ) -> tuple[Blocks, Blocks]:
        values = self.values(t)
        pairs = zip(values[::2], values[1::2], strict=True)
        slopes = [s for k, (cos, sin) in enumerate(pairs, start=1) for s in (sin * -k, cos * k)]
        return centred(values, centres), slopes


class BSpline(Basis):
    """B-splines of any order on a uniform grid over [-1, 1]; outside, the value at the nearer end (de Boor 1978).

    With p = order and s = size + 1 - p intervals of width 2/s, the functions are M_p((t + 1) s/2 + p - j) for
    j = 1 … size, where M_p(v) = Σ_m (-1)^m C(p+1, m) max(v - m, 0)^p / p!. The one for j = 0 is left out: together
    they sum to 1, so that it is the constant's. In an interval the p + 1 functions that are not 0 are the polynomial
    pieces of M_p, which are computed once for every input, and placed by the interval's number.
    """

    def __init__(self, *, size: int, order: int | None = None) -> None:
        self.size = size
        self._order = min(3, size) if order is None else order
        self._num_intervals = size + 1 - self._order
        self._pieces = [_piece(k, self._order) for k in range(self._order // 2 + 1)]
        self._slopes = [[i * a for i, a in enumerate(piece)][1:] for piece in self._pieces]
        self.unit = self._num_intervals / 2

    def values(self, t: Float[Tensor, "... D"], centres: Float[Tensor, "K D"] | None = None) -> Blocks:
        return self._values(*self._place(t), centres)

    def write(self, blocks: Float[Tensor, "K n d"], t: Float[Tensor, "n d"], centres: Float[Tensor, "K d"]) -> None:
        self._write(blocks, *self._place(t), centres)

    def with_slopes(
        self, t: Float[Tensor, "... D"], centres: Float[Tensor, "K D"] | None = None
    ) -> tuple[Blocks, Blocks]:
        place, interval = self._place(t)
        return self._values(place, interval, centres), _zero_outside(self._all_slopes(place, interval), t)

    def pull_back_(
        self, blocks: Float[Tensor, "K n d"], t: Float[Tensor, "n d"], centres: Float[Tensor, "K d"]
    ) -> Float[Tensor, "n d"]:
        place, interval = self._place(t)
        total = _zero_outside(self._all_slopes(place, interval).mul_(blocks).sum(dim=0), t)
        self._write(blocks, place, interval, centres)
        return total

    def _place(self, t: Float[Tensor, "... D"]) -> tuple[Float[Tensor, "... D"], Float[Tensor, "I ... D"]]:
        """Return the place in [0, 1] within its interval, and 1 for the interval that t lies in, 0 for the others."""
        place = torch.add(t.new_full((), self.unit), t, alpha=self.unit).clamp_(0, self._num_intervals)
        number = place.floor().clamp_max_(self._num_intervals - 1)
        numbers = torch.arange(self._num_intervals, device=t.device, dtype=t.dtype).view(-1, *[1] * t.ndim)
        interval = t.new_empty((self._num_intervals, *t.shape))
        return place.sub_(number), torch.eq(number, numbers, out=interval)  # not by way of bool, which is slow

    def _values(
        self, place: Float[Tensor, "... D"], interval: Float[Tensor, "I ... D"], centres: Float[Tensor, "K D"] | None
    ) -> Float[Tensor, "K ... D"]:
        shape = (self.size, *place.shape)
        if centres is None:
            total = place.new_zeros(shape)
        else:
            total = (-centres).view(self.size, *[1] * (place.ndim - 1), -1).expand(shape).contiguous()
        return self._add_pieces_(total, place, interval, self._pieces)

    def _write(
        self,
        blocks: Float[Tensor, "K n d"],
        place: Float[Tensor, "n d"],
        interval: Float[Tensor, "I n d"],
        centres: Float[Tensor, "K d"],
    ) -> None:
        if can_write_into(blocks, place.dtype):
            self._add_pieces_(blocks.copy_(-centres[:, None]), place, interval, self._pieces)
        else:
            blocks.copy_(self._values(place, interval, centres))

    def _all_slopes(
        self, place: Float[Tensor, "... D"], interval: Float[Tensor, "I ... D"]
    ) -> Float[Tensor, "K ... D"]:
        """Return the derivatives over ``unit``; outside the grid those at its nearer end."""
        total = place.new_zeros((self.size, *place.shape))
        return self._add_pieces_(total, place, interval, self._slopes, mirrored=-1)

    def _add_pieces_(
        self,
        total: Float[Tensor, "K ... D"],
        place: Float[Tensor, "... D"],
        interval: Float[Tensor, "I ... D"],
        pieces: list[list[float]],
        mirrored: int = 1,
    ) -> Float[Tensor, "K ... D"]:
        """Add to every function the piece that the interval shows of it; those of the right half are mirror images."""
        rest = 1 - place
        for k in range(self._order + 1):
            left = k <= self._order // 2
            piece, scale = _horner(pieces[k], place) if left else _horner(pieces[self._order - k], rest)
            first = self._order - k - 1  # the function whose piece k lies in interval 0, without the one left out
            skipped = max(0, -first)
            shown = total[first + skipped : first + self._num_intervals]
            shown.addcmul_(interval[skipped:], piece, value=scale if left else mirrored * scale)
        return total


def _piece(k: int, order: int) -> list[float]:
    """Return the coefficients, lowest first, of M_order(k + f) as a polynomial in f on [0, 1]."""
    return [
        sum((-1) ** m * comb(order + 1, m) * comb(order, i) * (k - m) ** (order - i) for m in range(k + 1))
        / factorial(order)
        for i in range(order + 1)
    ]


def _horner(coefficients: list[float], x: Float[Tensor, "... D"]) -> tuple[Float[Tensor, "... D"], float]:
    """Return the polynomial with these coefficients, lowest first, over its highest one, and that one."""
    *lower, highest = coefficients
    if not any(lower):
        return x.pow(len(lower)), highest
    total = x + lower[-1] / highest
    for coefficient in reversed(lower[:-1]):
        total = total.mul_(x).add_(coefficient / highest)
    return total, highest


def _zero_outside(grad: Float[Tensor, "... D"], t: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """Return the gradient where t is on the grid, its ends included, else 0; by torch's own clamp, in one pass."""
    beyond = 1 + torch.finfo(torch.float32).eps
    pulled: Tensor = torch.ops.aten.hardtanh_backward(grad, t.expand_as(grad), -beyond, beyond)
    return pulled


class _Bumps(Basis):
    """One shape ψ(z) at K centres g_j spread over [-1, 1], with z = (t - g_j)/h and h the distance of the centres."""

    def __init__(self, *, size: int) -> None:
        self.size = size
        self._first, self._width = (-1.0, 2 / (size - 1)) if size > 1 else (0.0, 1.0)
        self.unit = 1 / self._width

    def _places(self, t: Float[Tensor, "... D"]) -> Float[Tensor, "K ... D"]:
        """Return z for every centre."""
        centres = torch.arange(self.size, device=t.device, dtype=t.dtype).view(-1, *[1] * t.ndim)
        return (t - self._first) / self._width - centres

    def values(self, t: Float[Tensor, "... D"], centres: Float[Tensor, "K D"] | None = None) -> Blocks:
        return centred(self._shape(self._places(t))[0], centres)

    def with_slopes(
        self, t: Float[Tensor, "... D"], centres: Float[Tensor, "K D"] | None = None
    ) -> tuple[Blocks, Blocks]:
        values, parts = self._shape(self._places(t))
        slopes = self._slope(values, *parts)
        return centred(values, centres), slopes

    @abstractmethod
    def _shape(self, z: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return ψ(z) and what ψ' needs of the way there; z may be overwritten."""

    @abstractmethod
    def _slope(self, values: Tensor, *parts: Tensor) -> Tensor:
        """Return ψ'(z)."""


class Gaussian(_Bumps):
    """ψ(z) = exp(-z²) in (0, 1] (Li 2024, FastKAN)."""

    def _shape(self, z: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return z.square().neg_().exp_(), (z,)

    def _slope(self, values: Tensor, *parts: Tensor) -> Tensor:
        return (parts[0] * -2).mul_(values)


class Switch(_Bumps):
    """ψ(z) = 1 - tanh² z in (0, 1], the reflectional switch (Delis 2024, FasterKAN)."""

    def _shape(self, z: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        bent = z.tanh()
        return torch.addcmul(z.new_ones(()), bent, bent, value=-1), (bent,)

    def _slope(self, values: Tensor, *parts: Tensor) -> Tensor:
        return (parts[0] * -2).mul_(values)


class Wavelet(_Bumps):
    """ψ(z) = (1 - z²) exp(-z²/2), the Mexican hat, in [-2 exp(-3/2), 1] (Bozorgasl and Chen 2024, Wav-KAN)."""

    def _shape(self, z: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        square = z.square()
        bell = (square / -2).exp_()
        return torch.addcmul(bell, square, bell, value=-1), (z, square, bell)

    def _slope(self, values: Tensor, *parts: Tensor) -> Tensor:
        z, square, bell = parts
        return (square - 3).mul_(z).mul_(bell)


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
