"""Replies of many subjects to the same prompts, which go through the trunk once: its keys, values and output are kept.

Legend: B batch, T tokens of a padded prompt, D width of the residual stream.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache

from kallm.engine.replies import generate
from kallm.engine.subject import Subject
from kallm.errors import OutOfMemory
from kallm.model.trunk import Trunk, assembled

__all__ = ["Replies"]

_KEPT_BYTES = 1 << 30


class Replies:
    """Generates replies; what the trunk made of a batch of prompts is kept for the next subject while there is room."""

    def __init__(self, trunk: Trunk, suite: str) -> None:
        """``suite`` is who asks, for the message."""
        self._trunk, self._suite = trunk, suite
        self._kept: dict[bytes, _Prefill] = {}

    def generate(
        self,
        subject: Subject,
        ids: Int[Tensor, "B T"],
        mask: Int[Tensor, "B T"],
        config: GenerationConfig,
        *,
        stops: Sequence[str] = (),
    ) -> list[str]:
        """Return a subject's replies to one batch of prompts, padded on the left, without special tokens.

        Raises:
            OutOfMemory: too many replies at a time.
        """
        try:
            cache = _run_tail(self._prefill(subject, ids, mask), subject)
            with assembled(subject.model, subject.tail) as model:
                return generate(model, subject.tokenizer, ids, mask, config, cache=cache, stops=stops)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"memory ran out for {len(ids)} replies at a time: lower the batch_size of the suite {self._suite}"
            ) from error

    def _prefill(self, subject: Subject, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"]) -> "_Prefill":
        name = ids.numpy().tobytes() + mask.numpy().tobytes()
        if name in self._kept:
            return self._kept[name]
        device = subject.model.device
        made = _run_trunk(self._trunk, subject.model.config, ids.to(device), mask.to(device))
        if sum(kept.num_bytes for kept in self._kept.values()) + made.num_bytes <= _KEPT_BYTES:
            self._kept[name] = made
        return made


@dataclass(frozen=True)
class _Prefill:
    """One batch of prompts, padded on the left, and what the trunk made of all tokens but the last.

    Attributes:
        mask: attention mask, [B, T].
        hidden: the residual stream before the tail, [B, T - 1, D].
        cache: keys and values of every block; those of the tail's blocks are empty.
    """

    mask: Int[Tensor, "B T"]
    hidden: Float[Tensor, "B P D"]
    cache: Cache

    @property
    def num_bytes(self) -> int:
        """Memory that the kept tensors take."""
        kept = [layer.keys for layer in self.cache.layers if layer.is_initialized]
        return sum(2 * keys.numel() * keys.element_size() for keys in kept) + self.hidden.numel() * 4


def _run_trunk(trunk: Trunk, config: object, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"]) -> _Prefill:
    """Run a batch of prompts through the trunk; ``config`` is the whole model's."""
    whole = DynamicCache(config=config)
    hidden = trunk.body(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=_positions(mask)[:, :-1],
        past_key_values=Cache(layers=whole.layers[: trunk.cut]),
        use_cache=True,
    ).last_hidden_state
    return _Prefill(mask, hidden, whole)


def _run_tail(prefill: _Prefill, subject: Subject) -> Cache:
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
