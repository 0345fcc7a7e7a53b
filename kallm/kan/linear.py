"""The KAN layer: one matrix product over the functions of all inputs, which backward computes again.

Legend: N rows (B × T tokens), D inputs, O outputs, F functions of all inputs (K × D where there is one basis).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kallm.kan.bases import build_basis
from kallm.kan.basis import Basis, Blocks
from kallm.kan.calibration import require_variation, rescaled, root_mean_square
from kallm.kan.layerspec import LayerSpec
from kallm.kan.squashes import SQUASHES, Squashing

__all__ = ["KANLinear"]

_CHUNK_ELEMENTS = {"cpu": 2**18}
_OTHER_CHUNK_ELEMENTS = 2**26


class KANLinear(nn.Module):
    """A layer of learnable functions: y_o = b_o + Σ_i Σ_k c[o, k, i] (φ_k(t_i) - m[k, i]) with t_i = squash(s_i x_i).

    Input [... D], output [... O] in the weight's dtype, or in autocast's. The weight [O, F] is K-major: one block of
    D columns per function, branch after branch; with stored constants a block of D constants comes first, and their
    sum is the bias. The scale s and the centres m are calibrated by ``reset_parameters``; before, they are 1 and 0.
    Backward keeps the input alone and computes the functions again, in float32.

    Args:
        in_features: D.
        out_features: O.
        layer: the bases, the squashing, and how constants and scale are kept.

    Raises:
        WrongConfiguration: the shares of a parallel mix do not divide the inputs.
    """

    scale: Tensor
    mean: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        layer: LayerSpec,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.layer = in_features, out_features, layer
        self._branches = tuple(_branches(layer, in_features))
        num_columns = layer.num_columns(in_features)
        self._num_constants = in_features if layer.constants == "stored" else 0
        self.linear = nn.Linear(
            self._num_constants + num_columns,
            out_features,
            bias=layer.constants == "folded",
            device=device,
            dtype=dtype,
        )
        ones = torch.ones(in_features, device=device, dtype=dtype)
        if layer.scale == "learned":
            self.register_parameter("scale", nn.Parameter(ones))
        else:
            self.register_buffer("scale", ones)
        self.register_buffer("mean", torch.zeros(num_columns, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... O"]:
        """Return [... O]."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.linear.weight.dtype
        weight: Tensor = self.linear.weight
        bias: Tensor = self.linear.bias
        if self._num_constants:
            bias = weight[:, : self._num_constants].sum(dim=1)
            weight = weight[:, self._num_constants :]
        rows = x.reshape(-1, self.in_features)
        y: Tensor = _Recomputed.apply(rows, weight, bias, self.scale, self.mean, self._branches, dtype)
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def reset_parameters(
        self, *, generator: torch.Generator, inputs: Float[Tensor, "N D"], deviation: float = 1.0
    ) -> Float[Tensor, "N O"]:
        """Draw the weight, calibrate scale and centres on inputs, and return the outputs there, in float32.

        Every channel's scaled input gets the squashing's spread, every function the mean 0, the constants are 0, and
        the outputs have the standard deviation ``deviation``.

        Raises:
            WrongConfiguration: the inputs are constant.
        """
        inputs = inputs.to(self.linear.weight.device, torch.float32)
        require_variation(inputs)
        spread = torch.cat([inputs.new_full((b.stop - b.start,), b.squash.spread) for b in self._branches])
        self.scale.copy_(spread / root_mean_square(inputs))
        functions = _functions(inputs, self.scale, torch.zeros_like(self.mean), self._branches, torch.float32)
        self.mean.copy_(functions.mean(dim=0))
        functions -= self.mean.float()
        drawn = torch.randn(self.out_features, functions.shape[1], generator=generator).to(inputs.device)
        weight, outputs = rescaled(drawn, functions @ drawn.T, deviation)
        self.linear.weight.zero_()
        self.linear.weight[:, self._num_constants :] = weight.to(self.linear.weight.dtype)
        if self.linear.bias is not None:
            self.linear.bias.zero_()
        return outputs

    def extra_repr(self) -> str:
        """Return the description for ``print``."""
        return f"{self.in_features}, {self.out_features}, {self.layer.model_dump(exclude_none=True)}"


@dataclass(frozen=True)
class _Branch:
    """One basis, its inputs from start to stop, and its columns from ``column`` on."""

    basis: Basis
    squash: Squashing
    start: int
    stop: int
    column: int

    def write(self, table: Float[Tensor, "n F"], values: Blocks, mean: Float[Tensor, " F"]) -> None:
        """Write the centred values into this branch's columns of the table."""
        blocks, centres = self._blocks(table), self._blocks(mean[None])
        if isinstance(values, Tensor):
            blocks.copy_(values - centres)
            return
        for value, block, centre in zip(values, blocks, centres, strict=True):
            block.copy_(value - centre)

    def pull_back(self, pulled: Float[Tensor, "n F"], slopes: Blocks) -> Float[Tensor, "n d"]:
        """Return the sum of the functions' gradients times their slopes."""
        blocks = self._blocks(pulled)
        if isinstance(slopes, Tensor):
            return (slopes * blocks).sum(dim=0)
        total = slopes[0] * blocks[0].to(slopes[0].dtype)
        for slope, block in zip(slopes[1:], blocks[1:], strict=True):
            total = torch.addcmul(total, slope, block.to(slope.dtype))
        return total

    def _blocks(self, table: Float[Tensor, "n F"]) -> Float[Tensor, "K n d"]:
        """Return this branch's columns, function by function."""
        width = self.stop - self.start
        own = table[:, self.column : self.column + self.basis.size * width]
        return own.view(-1, self.basis.size, width).transpose(0, 1)


def _branches(layer: LayerSpec, in_features: int) -> Iterator[_Branch]:
    start = column = 0
    for spec, width in zip(layer.branches, layer.channels(in_features), strict=True):
        yield _Branch(build_basis(spec), SQUASHES[spec.squash or layer.squash], start, start + width, column)
        start, column = start + width, column + width * spec.num_functions


class _Recomputed(torch.autograd.Function):
    """The layer, with a backward that needs the input only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "N D"],
        weight: Float[Tensor, "O F"],
        bias: Float[Tensor, " O"],
        scale: Float[Tensor, " D"],
        mean: Float[Tensor, " F"],
        branches: tuple[_Branch, ...],
        dtype: torch.dtype,
    ) -> Float[Tensor, "N O"]:
        ctx.save_for_backward(x, weight, scale, mean)
        ctx.branches, ctx.dtype, ctx.bias_dtype = branches, dtype, bias.dtype
        return F.linear(_functions(x, scale, mean, branches, dtype), weight.to(dtype), bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "N O"]) -> tuple[Tensor | None, ...]:
        x, weight, scale, mean = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_scale = ctx.needs_input_grad[:4]
        grad_x = grad_weight = grad_bias = grad_scale = None
        if needs_x or needs_scale:
            pulled = grad @ weight.to(ctx.dtype)
            grad_x, grad_scale, functions = _pull_back(x, scale, mean, ctx.branches, pulled, needs_scale)
        elif needs_weight:
            functions = _functions(x, scale, mean, ctx.branches, ctx.dtype)
        if needs_weight:
            grad_weight = (grad.T @ functions).to(weight.dtype)
        if needs_bias:
            grad_bias = grad.sum(dim=0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, grad_scale, None, None, None


def _functions(
    x: Float[Tensor, "N D"],
    scale: Float[Tensor, " D"],
    mean: Float[Tensor, " F"],
    branches: tuple[_Branch, ...],
    dtype: torch.dtype,
) -> Float[Tensor, "N F"]:
    """Return the centred functions of all inputs, rounded once."""
    inner = _inner(x)
    scale, mean = scale.to(inner), mean.to(inner)
    table = x.new_empty((x.shape[0], mean.shape[0]), dtype=dtype)
    for rows in _row_slices(x, mean.shape[0]):
        for branch in branches:
            own = slice(branch.start, branch.stop)
            values = branch.basis.values(branch.squash.value(x[rows, own] * scale[own]))
            branch.write(table[rows], values, mean)
    return table


def _pull_back(
    x: Float[Tensor, "N D"],
    scale: Float[Tensor, " D"],
    mean: Float[Tensor, " F"],
    branches: tuple[_Branch, ...],
    pulled: Float[Tensor, "N F"],
    needs_scale: bool,
) -> tuple[Float[Tensor, "N D"], Float[Tensor, " D"] | None, Float[Tensor, "N F"]]:
    """Return the gradients of x and scale for the functions' gradient ``pulled``, and the functions again."""
    inner, scale_dtype = _inner(x), scale.dtype
    scale, mean = scale.to(inner), mean.to(inner)
    grad_x, grad_scale, table = torch.empty_like(x), torch.zeros_like(scale), torch.empty_like(pulled)
    for rows in _row_slices(x, mean.shape[0]):
        for branch in branches:
            own = slice(branch.start, branch.stop)
            z = x[rows, own] * scale[own]
            t = branch.squash.value(z)
            values, slopes = branch.basis.with_slopes(t)
            branch.write(table[rows], values, mean)
            grad_z = branch.squash.pull_back(z, t, branch.pull_back(pulled[rows], slopes))
            grad_x[rows, own] = grad_z * scale[own]
            if needs_scale:
                grad_scale[own] += (grad_z * x[rows, own]).sum(dim=0)
    return grad_x, grad_scale.to(scale_dtype) if needs_scale else None, table


def _inner(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _row_slices(x: Float[Tensor, "N D"], num_columns: int) -> Iterator[slice]:
    """Yield slices of rows whose functions stay in the CPU's cache, and bound what an accelerator holds at once."""
    if torch.compiler.is_compiling():
        yield slice(None)
        return
    step = max(1, _CHUNK_ELEMENTS.get(x.device.type, _OTHER_CHUNK_ELEMENTS) // max(num_columns, 1))
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)
