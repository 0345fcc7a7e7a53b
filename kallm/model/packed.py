"""Attention within packed documents only: each document's own block, not the whole square of a row.

A mask keeps documents apart, but the kernel of a CPU computes every masked number too. Legend: B batch, H heads, T
tokens, E width of a head.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

from kallm.model.passage import apart

__all__ = ["masked"]

_WINDOWS = ("sliding_window", "attention_chunk_size")


@contextlib.contextmanager
def masked(
    config: PreTrainedConfig,
    position_ids: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T T"] | None = None,
    *,
    always: bool = False,
) -> Iterator[Bool[Tensor, "B 1 T T"] | None]:
    """Give the mask for a forward pass; where torch's attention takes it on a CPU, each document runs alone.

    The results are those of the mask, up to rounding. A GPU has kernels that skip what is masked.

    Args:
        config: of the model that runs within the block.
        position_ids: each packed document starts at 0.
        mask: which token sees which, where that is more than causal within each document.
        always: whether the model needs a mask to keep documents apart.

    Returns:
        The mask that the model takes; None where it masks by itself.
    """
    takes = config._attn_implementation == "sdpa"
    if mask is not None:
        yield mask[:, None]
    elif takes and _can_run_alone(config, position_ids):
        mask = apart(position_ids)[:, None]
        with _ByDocument(mask, [_lengths(row) for row in position_ids]):
            yield mask
    else:
        yield apart(position_ids)[:, None] if always and takes else None


def _can_run_alone(config: PreTrainedConfig, position_ids: Int[Tensor, "B T"]) -> bool:
    """Whether it is the place for it, there are several documents, and no window narrows what a token sees."""
    if position_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    length = position_ids.shape[1]
    windows = [getattr(config, name, None) or length for name in _WINDOWS]
    return min(windows) >= length and bool((position_ids[:, 1:] == 0).any())


def _lengths(position_ids: Int[Tensor, " T"]) -> list[int]:
    """Return the lengths of the documents in a row."""
    starts = [0, *((position_ids[1:] == 0).nonzero().flatten() + 1).tolist(), len(position_ids)]
    return [end - start for start, end in itertools.pairwise(starts)]


class _ByDocument(TorchFunctionMode):
    """Takes the calls of torch's attention that come with this very mask, and leaves all others as they are."""

    def __init__(self, mask: Bool[Tensor, "B 1 T T"], lengths: list[list[int]]) -> None:
        super().__init__()
        self._mask, self._lengths = mask, lengths

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) == 3 and kwargs.get("attn_mask") is self._mask:
            return _attend(args, self._lengths, kwargs | {"attn_mask": None, "is_causal": True})
        return func(*args, **kwargs)


def _attend(
    heads: Sequence[Float[Tensor, "B H T E"]], lengths: list[list[int]], settings: dict[str, Any]
) -> Float[Tensor, "B H T E"]:
    """Return causal attention within each document, of query, key and value."""
    # split, because the gradient of many slices would be as many full tensors
    documents = [
        [piece for row, own in zip(whole, lengths, strict=True) for piece in torch.split(row[None], own, dim=2)]
        for whole in heads
    ]
    attended = (F.scaled_dot_product_attention(*each, **settings) for each in zip(*documents, strict=True))
    return torch.cat([torch.cat(list(itertools.islice(attended, len(own))), dim=2) for own in lengths])
