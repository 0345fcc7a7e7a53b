"""Polynomial bases, all by one three-term recurrence. Legend: D inputs, K basis functions."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from kallm.kan.basis import Basis, Blocks

__all__ = ["Chebyshev1", "Chebyshev2", "Gegenbauer", "Hermite", "Jacobi", "Legendre", "Monomial"]


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

    def with_slopes(self, t: Float[Tensor, "... D"]) -> tuple[Blocks, Blocks]:
        values = self.values(t)
        first, constant, _ = self._steps[0]
        slopes = [t.new_full((), first)]
        for n, (a, b, c) in enumerate(self._steps[1:], start=1):
            if n == 1:
                slope, offset = t * (2 * a * first), a * constant + b * first
                slopes.append(slope + offset if offset else slope)
            else:
                rest = torch.add(values[n - 1] * a, slopes[n - 2], alpha=-c) if c else values[n - 1] * a
                slopes.append(_step(t, slopes[n - 1], rest, a, b, 1.0))
        return values, slopes


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
