"""Cross-entropy of a tail's output without the full logits. Legend: N tokens, D width, V vocabulary."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kallm.data.packing import IGNORED

__all__ = ["CHUNK", "summed_cross_entropy", "summed_cross_entropy_of"]

CHUNK = 512
"""Positions whose logits live at one time; on a CPU as fast as 128 to 2,048."""
_LOW_CHUNK = 2048
"""The same in a low precision, where a product is so fast that adding its head's gradient weighs."""
_ROW_ELEMENTS = {"cpu": 2**19}
"""Logits that are worked on at once: what stays in a core's own cache. On a GPU all of a chunk."""


def summed_cross_entropy(
    hidden: Float[Tensor, "N D"], head: Float[Tensor, "V D"], targets: Int[Tensor, " N"], *, chunk: int | None = None
) -> Float[Tensor, ""]:
    """Return the summed cross-entropy in nats, in fp32; positions without a target never meet the head.

    The logits live for one chunk of positions at a time, forward and backward; None is a measured size. Under autocast
    the products are autocast's, everything else is fp32; double backward is not defined.

    Raises:
        RuntimeError: a target is not in the vocabulary.
    """
    supervised = targets != IGNORED
    hidden, targets = hidden[supervised], targets[supervised]
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            summed: Tensor = _ChunkedLoss.apply(hidden, head, targets, dtype, chunk or _LOW_CHUNK)
        return summed
    return F.linear_cross_entropy(
        hidden.to(head.dtype),
        head,
        targets,
        reduction="sum",
        options=nn.LinearCrossEntropyOptions(batch_chunk_size=chunk or CHUNK),
    ).to(torch.float32)


def summed_cross_entropy_of(
    hidden: Float[Tensor, "N D"], head: nn.Module, targets: Int[Tensor, " N"], *, chunk: int = CHUNK
) -> Float[Tensor, ""]:
    """Return the summed cross-entropy in nats, in fp32, through a head that is more than a matrix product.

    The logits of one chunk of positions are made at a time, and made again for the backward pass.

    Args:
        hidden: normalised last hidden states.
        head: gives logits, [N, V].
        targets: token ids; positions without a target never meet the head.
        chunk: positions at a time.
    """
    supervised = targets != IGNORED

    def sum_chunk(rows: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), wanted, reduction="sum")

    parts = zip(torch.split(hidden[supervised], chunk), torch.split(targets[supervised], chunk), strict=True)
    return torch.stack([checkpoint(sum_chunk, *part, use_reentrant=False) for part in parts]).sum()


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy whose three products run in a low precision, with the gradients made in the forward pass.

    torch's own chunked loss makes the products of a low precision in fp32 on a CPU, which wastes its units for
    bfloat16, and sums the head's gradient in the low precision elsewhere. Here that sum is fp32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype, chunk: int) -> Tensor:
        """Return the sum, and keep the gradients of ``hidden`` and ``head`` that are asked for."""
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        rows, weight = hidden.to(dtype), head.to(dtype)
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        turned_grad = torch.zeros_like(head.T, memory_format=torch.contiguous_format) if wants_head else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        step = max(1, _ROW_ELEMENTS.get(hidden.device.type, chunk * len(weight)) // len(weight))
        for first in range(0, len(rows), chunk):
            part = slice(first, first + chunk)
            logits = rows[part] @ weight.T
            for own, index in zip(torch.split(logits, step), torch.split(targets[part, None], step), strict=True):
                slopes = own.float()
                wanted, top = slopes.gather(1, index), slopes.amax(dim=1, keepdim=True)
                mass = slopes.sub_(top).exp_().sum(dim=1, keepdim=True)
                total += (mass.log() + top - wanted).sum()
                if wants_hidden or wants_head:
                    slopes.div_(mass).scatter_add_(1, index, torch.full_like(mass, -1.0))
                    own.copy_(slopes)
            if hidden_grad is not None:
                hidden_grad[part] = logits @ weight
            if turned_grad is not None:
                turned_grad += rows[part].T.contiguous() @ logits  # a third faster than the other way round
        ctx.kept = hidden_grad, None if turned_grad is None else turned_grad.T
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> tuple[Tensor | None, ...]:
        """Scale the kept gradients by the loss's own, in place: they serve one backward pass."""
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            raise RuntimeError("the chunked loss keeps its gradients for one backward pass, but this is a second one")
        return *(None if value is None else value.mul_(slopes[0]) for value in kept), None, None, None
