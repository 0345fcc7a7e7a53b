"""Prompts through the trunk once for all subjects: its keys, values and output are kept, and replies start from there.

Legend: B batch, T tokens of a padded prompt, D width of the residual stream.
"""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from kallm.evaluate.suites import Subject
from kallm.model.trunk import Trunk

__all__ = ["Prefill", "prefill_tail", "prefill_trunk"]


@dataclass(frozen=True)
class Prefill:
    """One batch of prompts, padded on the left, and what the trunk made of all tokens but the last.

    Attributes:
        ids, mask: token ids and attention mask, [B, T].
        hidden: the residual stream before the tail, [B, T - 1, D].
        cache: keys and values of every block; those of the tail's blocks are empty.
    """

    ids: Int[Tensor, "B T"]
    mask: Int[Tensor, "B T"]
    hidden: Float[Tensor, "B P D"]
    cache: Cache

    @property
    def num_bytes(self) -> int:
        """Memory that the kept tensors take."""
        kept = [layer.keys for layer in self.cache.layers if layer.is_initialized]
        return sum(2 * keys.numel() * keys.element_size() for keys in kept) + self.hidden.numel() * 4


def prefill_trunk(trunk: Trunk, config: object, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"]) -> Prefill:
    """Run a batch of prompts through the trunk; ``config`` is the whole model's."""
    whole = DynamicCache(config=config)
    hidden = trunk.body(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=_positions(mask)[:, :-1],
        past_key_values=Cache(layers=whole.layers[: trunk.cut]),
        use_cache=True,
    ).last_hidden_state
    return Prefill(ids, mask, hidden, whole)


def prefill_tail(prefill: Prefill, subject: Subject) -> Cache:
    """Return a cache of its own for one subject, with the tail's keys and values, for ``generate`` to go on from."""
    whole = Cache(layers=[copy.copy(layer) for layer in prefill.cache.layers])
    subject.tail.body(
        inputs_embeds=prefill.hidden,
        attention_mask=prefill.mask[:, :-1],
        position_ids=_positions(prefill.mask)[:, :-1],
        past_key_values=Cache(layers=whole.layers[subject.tail.cut :]),
        use_cache=True,
    )
    return whole


def _positions(mask: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Count positions from each prompt's first token, as ``generate`` does."""
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1).to(torch.long)
