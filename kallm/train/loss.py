"""Cross-entropy of a tail's output without the full logits. Legend: N tokens, D width, V vocabulary."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from kallm.data.packing import IGNORED

__all__ = ["summed_cross_entropy"]

CHUNK = 512


def summed_cross_entropy(
    hidden: Float[Tensor, "N D"], head: Float[Tensor, "V D"], targets: Int[Tensor, " N"]
) -> Float[Tensor, ""]:
    """Return the summed cross-entropy in nats, in fp32; positions without a target never meet the head.

    The logits live for one chunk of 512 positions at a time, forward and backward.
    """
    supervised = targets != IGNORED
    return F.linear_cross_entropy(
        hidden[supervised].to(head.dtype),
        head,
        targets[supervised],
        reduction="sum",
        options=nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK),
    ).to(torch.float32)
