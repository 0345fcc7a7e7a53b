"""Polynomial bases, all by one three-term recurrence. Legend: n rows, d or D inputs, K basis functions."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from kallm.kan.basis import Basis, Blocks, can_write_into, centred

__all__ = ["Chebyshev1", "Chebyshev2", "Gegenbauer", "Hermite", "Jacobi", "Legendre", "Monomial", "Polynomials"]


class Polynomials(Basis):
    """Polynomials p_1 … p_K by p_{n+1} = (a t + b) p_n - c p_{n-1} with p_0 = 1 and p_{-1} = 0.

    The first two are computed straight from t, because most layers have no more.
    """

    def __init__(self, *, degree: int) -> None:
        self.size = degree
        self._steps = [self._step(n) for n in range(degree)]
        first, constant, _ = self._steps[0]
        self.unit = first
        self._lowest = [(constant, first, 0.0)]
        for a, b, c in self._steps[1:2]:
            self._lowest.append((b * constant - c, a * constant + b * first, a * first))

    @abstractmethod
    def _step(self, n: int) -> tuple[float, float, float]:
        """Return a, b and c of the step from n to n + 1."""

    def values(self, t: Float[Tensor, "... D"], centres: Float[Tensor, "K D"] | None = None) -> Blocks:
        if centres is None:
            return self._polynomials(t)
        lowest = [_quadratic(t, *low, centre) for low, centre in zip(self._lowest, centres, strict=False)]
        if self.size <= 2:
            return lowest
        return [*lowest, *centred(self._polynomials(t)[2:], centres[2:])]

    def with_slopes(
        self, t: Float[Tensor, "... D"], centres: Float[Tensor, "K D"] | None = None
    ) -> tuple[Blocks, Blocks]:
        values = self._polynomials(t)
        slopes = [t.new_ones(())]
        if self.size > 1:
            _, linear, square = self._lowest[1]
            slopes.append((t * (2 * square / self.unit)).add_(linear / self.unit))
        for n, (a, b, c) in enumerate(self._steps[2:], start=2):
            rest = torch.add(values[n - 1] * (a / self.unit), slopes[n - 2], alpha=-c)
            slopes.append(_step(t, slopes[n - 1], rest, a, b))
        return centred(values, centres), slopes

    def write(self, blocks: Float[Tensor, "K n d"], t: Float[Tensor, "n d"], centres: Float[Tensor, "K d"]) -> None:
        if self.size > 2:
            super().write(blocks, t, centres)
            return
        straight = can_write_into(blocks, t.dtype)
        for low, centre, block in zip(self._lowest, centres, blocks.unbind(), strict=True):
            value = _quadratic(t, *low, centre, out=block if straight else None)
            if not straight:
                block.copy_(value)

    def pull_back_(
        self, blocks: Float[Tensor, "K n d"], t: Float[Tensor, "n d"], centres: Float[Tensor, "K d"]
    ) -> Float[Tensor, "n d"]:
        if self.size != 2:
            return super().pull_back_(blocks, t, centres)
        _, linear, square = self._lowest[1]
        total = blocks[0].to(t.dtype, copy=True)  # the functions are written over it
        total.addcmul_(t, blocks[1].to(t.dtype), value=2 * square / self.unit)
        if linear:
            total.add_(blocks[1].to(t.dtype), alpha=linear / self.unit)
        self.write(blocks, t, centres)
        return total

    def _polynomials(self, t: Float[Tensor, "... D"]) -> list[Tensor]:
        values = [_quadratic(t, *low, None) for low in self._lowest]
        for n, (a, b, c) in enumerate(self._steps[2:], start=2):
            values.append(_step(t, values[n - 1], values[n - 2] * -c, a, b))
        return values


def _quadratic(
    t: Tensor, constant: float, linear: float, square: float, centre: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """Return constant + linear t + square t² - centre, in as few passes over the memory as the constants allow."""
    start = t.new_full((), constant) if centre is None else constant - centre
    if not linear:
        return torch.addcmul(start, t, t, value=square, out=out)
    total = torch.add(start, t, alpha=linear, out=out)
    return total.addcmul_(t, t, value=square) if square else total


def _step(t: Tensor, current: Tensor, rest: Tensor, a: float, b: float) -> Tensor:
    """Return (a t + b) current + rest."""
    return torch.addcmul(torch.add(rest, current, alpha=b) if b else rest, t, current, value=a)


class Chebyshev1(Polynomials):
    """T_{n+1} = 2 t T_n - T_{n-1}, T_1 = t, on [-1, 1], where |T_n| ≤ 1 (Mason and Handscomb 2003, eq. 1.3)."""

    def _step(self, n: int) -> tuple[float, float, float]:
        return (2.0 if n else 1.0), 0.0, 1.0


class Chebyshev2(Polynomials):
    """U_{n+1} = 2 t U_n - U_{n-1}, U_1 = 2 t, on [-1, 1], where |U_n| ≤ n + 1 (Mason and Handscomb 2003, eq. 1.6)."""

    def _step(self, n: int) -> tuple[float, float, float]:
        return 2.0, 0.0, 1.0


class Legendre(Polynomials):
    """(n + 1) P_{n+1} = (2n + 1) t P_n - n P_{n-1}, P_1 = t, on [-1, 1], where |P_n| ≤ 1 (DLMF 18.9.1)."""

    def _step(self, n: int) -> tuple[float, float, float]:
        return (2 * n + 1) / (n + 1), 0.0, n / (n + 1)


class Gegenbauer(Polynomials):
    """(n + 1) C_{n+1} = 2 (n + α) t C_n - (n + 2α - 1) C_{n-1}, C_1 = 2 α t, on [-1, 1], α > -1/2 (DLMF 18.9.1)."""

    def __init__(self, *, degree: int, alpha: float) -> None:
        self._alpha = alpha
        super().__init__(degree=degree)

    def _step(self, n: int) -> tuple[float, float, float]:
        return 2 * (n + self._alpha) / (n + 1), 0.0, (n + 2 * self._alpha - 1) / (n + 1)


class Jacobi(Polynomials):
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


class Monomial(Polynomials):
    """t, t², …, t^K on the real line; within [-1, 1] after a squash."""

    def _step(self, n: int) -> tuple[float, float, float]:
        return 1.0, 0.0, 0.0


class Hermite(Polynomials):
    """He_{n+1} = t He_n - n He_{n-1}, He_1 = t, on the real line (the probabilists' form, DLMF 18.9.1)."""

    def _step(self, n: int) -> tuple[float, float, float]:
        return 1.0, 0.0, float(n)
