"""Bases: functions of one number, the constant left out, each with its slope.

The constant function is the same for every input, so a layer keeps it in one bias. Functions are computed in float32
(float64 for float64) and rounded once. Legend: D inputs, K basis functions.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import comb, factorial, pi

import torch
from jaxtyping import Float
from torch import Tensor

from kallm.kan.layerspec import BASIS_SETTINGS, BasisSpec

__all__ = [
    "BASES",
    "BSpline",
    "Basis",
    "Chebyshev1",
    "Chebyshev2",
    "Fourier",
    "Gaussian",
    "Gegenbauer",
    "Hermite",
    "Jacobi",
    "Legendre",
    "Monomial",
    "Switch",
    "Wavelet",
    "build_basis",
]

Blocks = Sequence[Tensor]
"""K tensors of the input's shape [... D]; a slope that is the same everywhere may be a scalar."""


class Basis(ABC):
    """K functions of one number beside the constant.

    ``values`` and ``slopes`` take float32 or float64 and give one tensor per function, so that a layer can write each
    where it needs it; calling the basis gives them in one tensor.
    """

    size: int

    @abstractmethod
    def values(self, t: Float[Tensor, "... D"]) -> Blocks:
        """Return the K functions at t."""

    @abstractmethod
    def slopes(self, t: Float[Tensor, "... D"], values: Blocks) -> Blocks:
        """Return the derivatives of the K functions at t, given their values there."""

    def __call__(self, t: Float[Tensor, "... D"]) -> Float[Tensor, "... D K"]:
        """Return the K functions at t along a new last axis, in t's dtype."""
        inner = t if t.dtype is torch.float64 else t.float()
        return torch.stack(list(self.values(inner)), dim=-1).to(t.dtype)


class _Recurrence(Basis):
    """Polynomials p_1 … p_K by p_{n+1} = (a t + b) p_n - c p_{n-1} with p_0 = 1 and p_{-1} = 0."""

    def __init__(self, *, degree: int) -> None:
        self.size = degree
        self._steps = [self._step(n) for n in range(degree)]

    @abstractmethod
    def _step(self, n: int) -> tuple[float, float, float]:
        """Return a, b and c of the step from n to n + 1."""

    def values(self, t: Float[Tensor, "... D"]) -> Blocks:
        a, b, _ = self._steps[0]
        values = [t * a + b if b else t * a]
        for n, (a, b, c) in enumerate(self._steps[1:], start=1):
            before = values[n - 2] if n > 1 else t.new_ones(())
            values.append(_step(t, values[n - 1], before, a, b, -c))
        return values

    def slopes(self, t: Float[Tensor, "... D"], values: Blocks) -> Blocks:
        slopes = [t.new_full((), self._steps[0][0])]
        for n, (a, b, c) in enumerate(self._steps[1:], start=1):
            before = slopes[n - 2] if n > 1 else t.new_zeros(())
            rest = torch.add(values[n - 1] * a, before, alpha=-c) if n > 1 and c else values[n - 1] * a
            slopes.append(_step(t, slopes[n - 1], rest, a, b, 1.0))
        return slopes


def _step(t: Tensor, current: Tensor, before: Tensor, a: float, b: float, scale: float) -> Tensor:
    """Return (a t + b) current + scale before, in as few passes over the memory as the constants allow."""
    if not scale and not b:
        return (t * current).mul(a)
    rest = before if scale == 1 else before * scale
    return torch.addcmul(torch.add(rest, current, alpha=b) if b else rest, t, current, value=a)


class Chebyshev1(_Recurrence):
    """T_{n+1} = 2 t T_n - T_{n-1}, T_1 = t, on [-1, 1], where |T_n| ≤ 1 (Mason and Handscomb 2003, eq. 1.3)."""

    def _step(self, n: int) -> tuple[float, float, float]:
        return (2.0 if n else 1.0), 0.0, 1.0


class Chebyshev2(_Recurrence):
    """U_{n+1} = 2 t U_n - U_{n-1}, U_1 = 2 t, on [-1, 1], where |U_n| ≤ n + 1 (Mason and Handscomb 2003, eq. 1.6)."""

    def _step(self, n: int) -> tuple[float, float, float]:
        return 2.0, 0.0, 1.0


class Legendre(_Recurrence):
    """(n + 1) P_{n+1} = (2n + 1) t P_n - n P_{n-1}, P_1 = t, on [-1, 1], where |P_n| ≤ 1 (DLMF 18.9.1)."""

    def _step(self, n: int) -> tuple[float, float, float]:
        return (2 * n + 1) / (n + 1), 0.0, n / (n + 1)


class Gegenbauer(_Recurrence):
    """(n + 1) C_{n+1} = 2 (n + α) t C_n - (n + 2α - 1) C_{n-1}, C_1 = 2 α t, on [-1, 1], α > -1/2 (DLMF 18.9.1)."""

    def __init__(self, *, degree: int, alpha: float) -> None:
        self._alpha = alpha
        super().__init__(degree=degree)

    def _step(self, n: int) -> tuple[float, float, float]:
        return 2 * (n + self._alpha) / (n + 1), 0.0, (n + 2 * self._alpha - 1) / (n + 1)


class Jacobi(_Recurrence):
    """P_{n+1} = (a_n t + b_n) P_n - c_n P_{n-1}, P_1 = ((α + β + 2) t + α - β) / 2, on [-1, 1] (DLMF 18.9.1-2)."""

    def __init__(self, *, degree: int, alpha: float, beta: float) -> None:
        self._alpha, self._beta = alpha, beta
        super().__init__(degree=degree)

    def _step(self, n: int) -> tuple[float, float, float]:
        alpha, beta = self._alpha, self._beta
        if n == 0:
            return (alpha + beta + 2) / 2, (alpha - beta) / 2, 0.0
        total = 2 * n + alpha + beta
        common = 2 * (n + 1) * (n + alpha + beta + 1)
        a = (total + 1) * (total + 2) / common
        b = (alpha**2 - beta**2) * (total + 1) / (common * total)
        c = 2 * (n + alpha) * (n + beta) * (total + 2) / (common * total)
        return a, b, c


class Monomial(_Recurrence):
    """t, t², …, t^K on the real line; within [-1, 1] after a squash."""

    def _step(self, n: int) -> tuple[float, float, float]:
        return 1.0, 0.0, 0.0


class Hermite(_Recurrence):
    """He_{n+1} = t He_n - n He_{n-1}, He_1 = t, on the real line (the probabilists' form, DLMF 18.9.1)."""

    def _step(self, n: int) -> tuple[float, float, float]:
        return 1.0, 0.0, float(n)


class Fourier(Basis):
    """cos(π t), sin(π t), …, cos(n π t), sin(n π t), of period 2; K = 2 × degree."""

    def __init__(self, *, degree: int) -> None:
        self.size = 2 * degree

    def values(self, t: Float[Tensor, "... D"]) -> Blocks:
        angles = [t * (pi * k) for k in range(1, self.size // 2 + 1)]
        return [f(angle) for angle in angles for f in (torch.cos, torch.sin)]

    def slopes(self, t: Float[Tensor, "... D"], values: Blocks) -> Blocks:
        pairs = zip(values[::2], values[1::2], strict=True)
        return [s for k, (cos, sin) in enumerate(pairs, start=1) for s in (sin * (-pi * k), cos * (pi * k))]


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
        order, left, _ = self._order, *self._left(t)
        total = left.clamp_min(0).pow(order)
        for m in range(1, order // 2 + 1):
            total = torch.add(total, (left - m).clamp_min(0).pow(order), alpha=(-1) ** m * comb(order + 1, m))
        return (total / factorial(order)).unbind(0)

    def slopes(self, t: Float[Tensor, "... D"], values: Blocks) -> Blocks:
        order, left, sign = self._order, *self._left(t)
        total = _power(left, order - 1)
        for m in range(1, order // 2 + 1):
            total = torch.add(total, _power(left - m, order - 1), alpha=(-1) ** m * comb(order + 1, m))
        inside = (t.abs() <= 1) * (self._per_unit / factorial(order - 1))
        return (total * sign * inside).unbind(0)

    def _left(self, t: Float[Tensor, "... D"]) -> tuple[Float[Tensor, "K ... D"], Float[Tensor, "K ... D"]]:
        """Return the arguments of M_p mirrored into its left half, and 1 or -1 where they were mirrored."""
        first = torch.arange(self._order - 1, self._order - 1 - self.size, -1, device=t.device, dtype=t.dtype)
        place = (t.clamp(-1, 1) + 1) * self._per_unit + first.view(-1, *[1] * t.ndim)
        middle = (self._order + 1) / 2
        return middle - (place - middle).abs(), (middle - place).sign()


def _power(base: Tensor, exponent: int) -> Tensor:
    return (base > 0).to(base.dtype) if exponent == 0 else base.clamp_min(0).pow(exponent)


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
        return self._places(t).square().neg().exp().unbind(0)

    def slopes(self, t: Float[Tensor, "... D"], values: Blocks) -> Blocks:
        return [z * value * (-2 / self._width) for z, value in zip(self._places(t), values, strict=True)]


class Switch(_Bumps):
    """ψ(z) = 1 - tanh² z in (0, 1], the reflectional switch (Delis 2024, FasterKAN)."""

    def values(self, t: Float[Tensor, "... D"]) -> Blocks:
        return (1 - self._places(t).tanh().square()).unbind(0)

    def slopes(self, t: Float[Tensor, "... D"], values: Blocks) -> Blocks:
        return [z.tanh() * value * (-2 / self._width) for z, value in zip(self._places(t), values, strict=True)]


class Wavelet(_Bumps):
    """ψ(z) = (1 - z²) exp(-z²/2), the Mexican hat, in [-2 exp(-3/2), 1] (Bozorgasl and Chen 2024, Wav-KAN)."""

    def values(self, t: Float[Tensor, "... D"]) -> Blocks:
        square = self._places(t).square()
        return ((1 - square) * (square / -2).exp()).unbind(0)

    def slopes(self, t: Float[Tensor, "... D"], values: Blocks) -> Blocks:
        z = self._places(t)
        square = z.square()
        return ((square - 3) * z * (square / -2).exp() / self._width).unbind(0)


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
