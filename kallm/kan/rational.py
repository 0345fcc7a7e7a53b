"""The group-rational activation. Legend: N rows, D inputs, G groups of d = D / G channels."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kallm.errors import WrongConfiguration

__all__ = ["INITIAL", "Rational"]

_B2, _B4 = 0.24586977, 0.00123291

INITIAL: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "identity": ((0.0, 1.0, 0.0, 0.1, 0.0, 0.01), (0.0, 0.1, 0.0, 0.01)),
    "gelu": ((-0.00308416, 0.5, 0.41751827, _B2 / 2, 0.01493465, _B4 / 2), (0.0, _B2, 0.0, _B4)),
}
"""(a, b) for this denominator: identity exactly; gelu fitted by least squares to 0.0031 at most on [-6, 6]."""


class Rational(nn.Module):
    """F(x) = (a_0 + a_1 x + … + a_5 x⁵) / (1 + |b_1 x + … + b_4 x⁴|), on the real line, about linear in the tails.

    All groups share the numerator, each has its own denominator (Yang and Wang 2025, Kolmogorov-Arnold Transformer).
    The absolute value is of the whole sum: coefficients fitted to 1 + Σ |b_j| |x|ʲ would give another function.
    Input and output [... D] have the same dtype; float32 inside; backward keeps the input alone.

    Args:
        width: D.
        groups: G, a divisor of D.
        start: the function at initialisation.

    Raises:
        WrongConfiguration: the groups do not divide the channels.
    """

    def __init__(
        self,
        width: int,
        *,
        groups: int,
        start: Literal["identity", "gelu"],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if width % groups:
            raise WrongConfiguration(f"groups must divide the {width} channels, but it is {groups}")
        self.groups, self.start = groups, start
        numerator, denominator = INITIAL[start]
        self.numerator = nn.Parameter(torch.tensor(numerator, device=device, dtype=dtype))
        self.denominator = nn.Parameter(torch.tensor([denominator] * groups, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Return F at every input."""
        grouped = x.reshape(-1, self.groups, x.shape[-1] // self.groups)
        y: Tensor = _Recomputed.apply(grouped, self.numerator, self.denominator)
        return y.view(x.shape)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the coefficients of the start."""
        numerator, denominator = INITIAL[self.start]
        self.numerator.copy_(torch.tensor(numerator))
        self.denominator.copy_(torch.tensor(denominator).expand(self.groups, -1))

    def extra_repr(self) -> str:
        """Return the description for ``print``."""
        return f"groups={self.groups}, start={self.start}"


class _Recomputed(torch.autograd.Function):
    """F, with a backward that needs the input only: F' = (P' - F Q')/Q, dF/da_i = xⁱ/Q, dF/db_j = -F sgn(q) xʲ/Q."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "N G d"], numerator: Float[Tensor, " 6"], denominator: Float[Tensor, "G 4"]
    ) -> Float[Tensor, "N G d"]:
        ctx.save_for_backward(x, numerator, denominator)
        inner = torch.promote_types(x.dtype, torch.float32)
        a, b = numerator.to(inner), denominator.to(inner)[..., None]
        p, q = _parts(x.to(inner), a, b)
        return (p / (1 + q.abs())).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "N G d"]) -> tuple[Tensor, Tensor, Tensor]:
        x, numerator, denominator = ctx.saved_tensors
        inner = torch.promote_types(x.dtype, torch.float32)
        a, b, x_inner = numerator.to(inner), denominator.to(inner)[..., None], x.to(inner)
        p, q = _parts(x_inner, a, b)
        whole = 1 + q.abs()
        y, sign, pulled = p / whole, q.sign(), grad.to(inner) / whole
        p_slope = _horner(x_inner, [i * a[i] for i in range(1, 6)])
        q_slope = _horner(x_inner, [j * b[:, j - 1] for j in range(1, 5)])
        grad_x = pulled * (p_slope - y * sign * q_slope)
        bent, power, grad_a, grad_b = pulled * y * sign, torch.ones_like(x_inner), [pulled.sum()], []
        for i in range(1, 6):
            power = power * x_inner
            grad_a.append((pulled * power).sum())
            if i < 5:
                grad_b.append(-(bent * power).sum(dim=(0, 2)))
        return (
            grad_x.to(x.dtype),
            torch.stack(grad_a).to(numerator.dtype),
            torch.stack(grad_b, dim=1).to(denominator.dtype),
        )


def _parts(
    x: Float[Tensor, "N G d"], a: Float[Tensor, " 6"], b: Float[Tensor, "G 4 1"]
) -> tuple[Float[Tensor, "N G d"], Float[Tensor, "N G d"]]:
    """Return the numerator and the sum inside the denominator's absolute value."""
    return _horner(x, list(a)), x * _horner(x, [b[:, j] for j in range(4)])


def _horner(x: Tensor, coefficients: list[Tensor]) -> Tensor:
    """Return c_0 + c_1 x + … from the lowest coefficient up."""
    total = coefficients[-1] * torch.ones_like(x)
    for coefficient in coefficients[-2::-1]:
        total = torch.addcmul(coefficient, total, x)
    return total
