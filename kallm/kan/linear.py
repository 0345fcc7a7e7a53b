"""The KAN layer: one matrix product over the functions of all inputs, which backward computes again.

Legend: N rows (B × T tokens), D inputs, O outputs, F functions of all inputs (K × D where there is one basis).
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kallm.kan.basis import can_write_into
from kallm.kan.branches import Branch, list_branches
from kallm.kan.calibration import require_variation, rescaled, root_mean_square
from kallm.kan.layerspec import LayerSpec

__all__ = ["KANLinear"]

_CHUNK_ELEMENTS = {"cpu": 2**17}
"""How many numbers are computed at once: what stays in a core's own cache."""
_PRODUCT_ELEMENTS = {"cpu": 5 * 2**19}
"""How many numbers are kept for one matrix product: fewer make it slower, more cost fresh memory from the system."""
_OTHER_ELEMENTS = 2**26


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
        self._branches = tuple(list_branches(layer, in_features))
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
        rows = x.reshape(-1, self.in_features)
        if not _is_plain(self.linear):
            # called as a module, so that what wraps it (an adapter, a quantiser, a hook) takes part
            wrapped: Tensor = self.linear(self.functions(rows, dtype))
            return wrapped.view(*x.shape[:-1], self.out_features)
        weight: Tensor = self.linear.weight
        bias: Tensor = self.linear.bias
        if self._num_constants:
            bias = weight[:, : self._num_constants].sum(dim=1)
            weight = weight[:, self._num_constants :]
        y: Tensor = _Recomputed.apply(rows, weight, bias, self.scale, self.mean, self._branches, dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def functions(self, rows: Float[Tensor, "N D"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "N F"]:
        """Return what the linear map reads: the centred functions, behind a 1 for every stored constant."""
        table: Tensor = _Functions.apply(rows, self.scale, self.mean, self._branches, dtype)
        ones = table.new_ones((table.shape[0], self._num_constants))
        return torch.cat([ones, table], dim=1) if self._num_constants else table

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
        branches: tuple[Branch, ...],
        dtype: torch.dtype,
    ) -> Float[Tensor, "N O"]:
        ctx.save_for_backward(x, weight, scale, mean)
        ctx.branches, ctx.dtype, ctx.bias_dtype = branches, dtype, bias.dtype
        weight, bias = weight.to(dtype), bias.to(dtype)
        parts = [
            F.linear(_functions(x[rows], scale, mean, branches, dtype), weight, bias)
            for rows in _row_slices(x, mean.shape[0], _PRODUCT_ELEMENTS)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "N O"]) -> tuple[Tensor | None, ...]:
        x, weight, scale, mean = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_scale = ctx.needs_input_grad[:4]
        grad_x = torch.empty_like(x) if needs_x or needs_scale else None
        grad_scale = torch.zeros_like(scale, dtype=_inner(x)) if needs_scale else None
        grad_weight: Tensor | None = None
        cast = weight.to(ctx.dtype)
        for rows in _row_slices(x, mean.shape[0], _PRODUCT_ELEMENTS):
            if grad_x is not None:
                functions = grad[rows] @ cast
                _pull_back_(functions, x[rows], scale, mean, ctx.branches, grad_x[rows], grad_scale)
            elif needs_weight:
                functions = _functions(x[rows], scale, mean, ctx.branches, ctx.dtype)
            if needs_weight:
                # as a batch of one: oneDNN takes a transposed bf16 factor a quarter faster there than in mm
                part = torch.bmm(grad[rows].T[None], functions[None])[0]
                grad_weight = part if grad_weight is None else grad_weight.to(_inner(x)).add_(part)
        return (
            grad_x if needs_x else None,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            grad.sum(dim=0).to(ctx.bias_dtype) if needs_bias else None,
            None if grad_scale is None else grad_scale.to(scale.dtype),
            *(None, None, None),
        )


class _Functions(torch.autograd.Function):
    """The functions alone, with a backward that needs the input only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "N D"],
        scale: Float[Tensor, " D"],
        mean: Float[Tensor, " F"],
        branches: tuple[Branch, ...],
        dtype: torch.dtype,
    ) -> Float[Tensor, "N F"]:
        ctx.save_for_backward(x, scale, mean)
        ctx.branches = branches
        return _functions(x, scale, mean, branches, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "N F"]) -> tuple[Tensor | None, ...]:
        x, scale, mean = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_scale = torch.zeros_like(scale, dtype=_inner(x)) if ctx.needs_input_grad[1] else None
        # a copy, because the functions are written over it
        _pull_back_(grad.clone(), x, scale, mean, ctx.branches, grad_x, grad_scale)
        return grad_x, None if grad_scale is None else grad_scale.to(scale.dtype), None, None, None


def _is_plain(linear: nn.Module) -> bool:
    """Whether a linear map's weight and bias are all that it does."""
    return type(linear) is nn.Linear and not linear._forward_hooks and not linear._forward_pre_hooks


def _functions(
    x: Float[Tensor, "N D"],
    scale: Float[Tensor, " D"],
    mean: Float[Tensor, " F"],
    branches: tuple[Branch, ...],
    dtype: torch.dtype,
) -> Float[Tensor, "N F"]:
    """Return the centred functions of all inputs, rounded once."""
    inner = _inner(x)
    scale, mean = scale.to(inner), mean.to(inner)
    table = x.new_empty((x.shape[0], mean.shape[0]), dtype=dtype)
    slices = _row_slices(x, mean.shape[0], _CHUNK_ELEMENTS)
    for branch in branches:
        own_scale, centres = branch.inputs(scale), branch.blocks(mean[None])[:, 0]
        for rows in slices:
            t = branch.squash.value_(_scaled(branch.inputs(x[rows]), own_scale))
            branch.basis.write(branch.blocks(table[rows]), t, centres)
    return table


def _pull_back_(
    pulled: Float[Tensor, "N F"],
    x: Float[Tensor, "N D"],
    scale: Float[Tensor, " D"],
    mean: Float[Tensor, " F"],
    branches: tuple[Branch, ...],
    grad_x: Float[Tensor, "N D"],
    grad_scale: Float[Tensor, " D"] | None,
) -> None:
    """Write x's gradient for the functions' gradient ``pulled``, add scale's, and put the functions into ``pulled``."""
    inner = _inner(x)
    scale, mean = scale.to(inner), mean.to(inner)
    slices = _row_slices(x, mean.shape[0], _CHUNK_ELEMENTS)
    for branch in branches:
        own_scale, centres = branch.inputs(scale), branch.blocks(mean[None])[:, 0]
        factor = own_scale * branch.basis.unit
        for rows in slices:
            z = _scaled(branch.inputs(x[rows]), own_scale)
            t = branch.squash.value_(z)
            grad_z = branch.squash.pull_back(z, t, branch.basis.pull_back_(branch.blocks(pulled[rows]), t, centres))
            if grad_scale is not None:
                exact = branch.inputs(x[rows]).to(inner)
                branch.inputs(grad_scale).add_((grad_z * exact).sum(dim=0), alpha=branch.basis.unit)
            _write_product(branch.inputs(grad_x[rows]), grad_z, factor)


def _scaled(x: Float[Tensor, "n d"], scale: Float[Tensor, " d"]) -> Float[Tensor, "n d"]:
    """Return x times scale in scale's dtype, in memory of its own."""
    return x * scale if x.dtype is scale.dtype else x.to(scale.dtype).mul_(scale)


def _write_product(out: Float[Tensor, "n d"], values: Float[Tensor, "n d"], factor: Float[Tensor, " d"]) -> None:
    """Write values times factor, rounded once; the values may be written over."""
    if can_write_into(out, values.dtype):
        torch.mul(values, factor, out=out)
    else:
        out.copy_(values.mul_(factor))


def _inner(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _row_slices(x: Float[Tensor, "N D"], num_columns: int, elements: dict[str, int]) -> list[slice]:
    """Return slices of all rows, of about equal size, each with at most so many functions on x's device."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    parts = max(1, -(-x.shape[0] * num_columns // elements.get(x.device.type, _OTHER_ELEMENTS)))
    step = max(1, -(-x.shape[0] // parts))
    return [slice(start, start + step) for start in range(0, max(1, x.shape[0]), step)]
