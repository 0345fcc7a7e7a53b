"""Bases: functions of one number, the constant left out, each with its slope.

The constant function is the same for every input, so a layer keeps it in one bias. Functions are computed in float32
(float64 for float64) and rounded once. Legend: D inputs, K basis functions.
"""

from abc import abstractmethod
from math import comb, factorial, pi

import torch
import torch.nn.functional as F
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

    With p = order and s = size + 1 - p intervals of width h = 2/s, the functions are M_p((t + 1)/h + p - j) for
    j = 1 … size, where M_p(v) = Σ_m (-1)^m C(p+1, m) max(v - m, 0)^p / p!. The one for j = 0 is left out: together
    they sum to 1, so that it is the constant's. M_p is symmetric, and only its left half is summed: no cancellation.
    """

    def __init__(self, *, size: int, order: int | None = None) -> None:
        self.size = size
        self._order = order = min(3, size) if order is None else order
        self._per_unit = (size + 1 - order) / 2
        self._weights = [(-1) ** m * comb(order + 1, m) / factorial(order) for m in range(order // 2 + 1)]
        self.unit = -order * self._per_unit * self._weights[0]

    def values(self, t: Float[Tensor, "... D"], centres: Float[Tensor, "K D"] | None = None) -> Blocks:
        return self._sum(*self._reaches_and_powers(self._offsets(t).abs_()), centres)

    def write(self, blocks: Float[Tensor, "K n d"], t: Float[Tensor, "n d"], centres: Float[Tensor, "K d"]) -> None:
        self._sum(*self._reaches_and_powers(self._offsets(t).abs_()), centres, out=blocks)

    def with_slopes(
        self, t: Float[Tensor, "... D"], centres: Float[Tensor, "K D"] | None = None
    ) -> tuple[Blocks, Blocks]:
        offset = self._offsets(t)
        reaches, powers = self._reaches_and_powers(offset.abs())
        slopes = _zero_outside(self._slopes_(powers, offset), t)
        return self._sum(reaches, powers, centres), slopes

    def pull_back_(
        self, blocks: Float[Tensor, "K n d"], t: Float[Tensor, "n d"], centres: Float[Tensor, "K d"]
    ) -> Float[Tensor, "n d"]:
        offset = self._offsets(t)
        reaches, powers = self._reaches_and_powers(offset.abs())
        total = _zero_outside(self._slopes_(powers, offset).mul_(blocks).sum(dim=0), t)
        self._sum(reaches, powers, centres, out=blocks)
        return total

    def _offsets(self, t: Float[Tensor, "... D"]) -> Float[Tensor, "K ... D"]:
        """Return the distance, in intervals, from the middle of every function."""
        first = -(self._order - 3) / 2 - self._per_unit
        middles = torch.arange(first, first + self.size, device=t.device, dtype=t.dtype)
        return t.clamp(-1, 1).mul_(self._per_unit) - middles.view(-1, *[1] * t.ndim)

    def _reaches_and_powers(self, distance: Float[Tensor, "K ... D"]) -> tuple[list[Tensor], list[Tensor]]:
        """Return max(e - distance, 0) for the ends e of M_p's half, and their powers p - 1."""
        reaches = [torch.rsub(distance, (self._order + 1) / 2).clamp_min_(0)]
        for _ in self._weights[1:]:
            reaches.append(F.softshrink(reaches[-1], 1.0))  # max(reach - 1, 0) in one pass
        return reaches, [reach.pow(self._order - 1) if self._order > 1 else reach.sign() for reach in reaches]

    def _slopes_(self, powers: list[Tensor], offset: Float[Tensor, "K ... D"]) -> Float[Tensor, "K ... D"]:
        """Return the derivatives over ``unit`` inside the grid; the offset is lost."""
        slopes, *others = powers
        for power, weight in zip(others, self._weights[1:], strict=True):
            slopes = torch.add(slopes, power, alpha=weight / self._weights[0])
        return offset.sign_().mul_(slopes)

    def _sum(
        self,
        reaches: list[Tensor],
        powers: list[Tensor],
        centres: Float[Tensor, "K D"] | None,
        out: Float[Tensor, "K ... D"] | None = None,
    ) -> Float[Tensor, "K ... D"]:
        """Return the functions less their centres, or write them, rounded once."""
        total = (
            reaches[0].new_zeros(())
            if centres is None
            else -centres.view(len(centres), *[1] * (reaches[0].ndim - 2), -1)
        )
        *inner, (reach, power, weight) = zip(reaches, powers, self._weights, strict=True)
        for each, its_power, its_weight in inner:
            total = torch.addcmul(total, each, its_power, value=its_weight)
        straight = out is not None and can_write_into(out, power.dtype)
        total = torch.addcmul(total, reach, power, value=weight, out=out if straight else None)
        return total if out is None or straight else out.copy_(total)


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
