"""How replies are generated: greedy unless told otherwise, until a text that ends them.

Legend: B batch, T tokens of a padded prompt.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache, DynamicCache

from kallm.engine.segments import SHARED

__all__ = [
    "StopStrings",
    "count_shared",
    "cut_batches",
    "end_tokens",
    "generate",
    "make_generation",
    "pad_left",
    "padding_token",
    "share_beginning",
]

_SPREAD = 0.7
"""A batch ends before a prompt that is shorter than this share of its longest: padding costs as much as tokens do."""


class StopStrings(StoppingCriteria):
    """Ends each reply of a batch as soon as it holds one of some texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], start: int) -> None:
        """``start`` is the length of the padded prompts in tokens."""
        self._tokenizer, self._stops, self._start = tokenizer, stops, start
        # a token holds a byte at least; one more, because the first token of a text may lose its space
        self._window = 1 + max((len(stop.encode()) for stop in stops), default=0)
        self._done: Bool[Tensor, " B"] | None = None

    def __call__(self, input_ids: Int[Tensor, "B T"], scores: object, **kwargs: object) -> Bool[Tensor, " B"]:
        """Return which replies have ended."""
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :][:, -self._window :])
        ended = [any(stop in text for stop in self._stops) for text in texts]
        found = torch.tensor(ended, device=input_ids.device)
        self._done = found if self._done is None else self._done | found
        return self._done


def make_generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int, **changes: Any
) -> GenerationConfig:
    """Return a configuration of greedy replies, with changes; nothing is left to the model's own sampling defaults."""
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 50,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "eos_token_id": end_tokens(model, tokenizer),
        "pad_token_id": padding_token(model, tokenizer),
    }
    return GenerationConfig(**(settings | changes))


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a reply."""
    named = model.generation_config.eos_token_id
    found = named if isinstance(named, list) else [named]
    return sorted({token for token in (*found, tokenizer.eos_token_id) if token is not None})


def padding_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills a batch; 0 where the model names neither padding nor an end."""
    padding: int | None = tokenizer.pad_token_id
    return next(iter(end_tokens(model, tokenizer)), 0) if padding is None else padding


def cut_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return the numbers of prompts in batches, longest first: little padding, and memory runs out at once or never."""
    batches: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if not batches or len(batches[-1]) == size or lengths[number] < _SPREAD * lengths[batches[-1][0]]:
            batches.append([])
        batches[-1].append(number)
    return batches


def pad_left(
    prompts: Sequence[list[int]], padding: int, *, shared: int = 0
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Return ids and attention mask, [B, T]; the padding comes after the first ``shared`` tokens, equal in all."""
    longest = max(map(len, prompts))
    ids = [prompt[:shared] + [padding] * (longest - len(prompt)) + prompt[shared:] for prompt in prompts]
    mask = [[1] * shared + [0] * (longest - len(prompt)) + [1] * (len(prompt) - shared) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def count_shared(prompts: Sequence[list[int]]) -> int:
    """Return how many tokens of the prompts' common beginning are worth a forward pass of their own."""
    if len(prompts) < 2:
        return 0
    first, last, shortest = min(prompts), max(prompts), min(map(len, prompts))
    common = next((place for place in range(shortest) if first[place] != last[place]), shortest)
    common = min(common, shortest - 1)  # a reply begins with the pass over its prompt's last token
    return common if common >= SHARED else 0


def share_beginning(model: PreTrainedModel, beginning: list[int]) -> Callable[[int], Cache]:
    """Run what all prompts begin with once; return what gives a cache of it for a batch of a size."""
    kept = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([beginning], device=model.device), past_key_values=kept, use_cache=True)

    def start(size: int) -> Cache:
        cache = Cache(layers=[copy.copy(layer) for layer in kept.layers])
        cache.batch_repeat_interleave(size)
        return cache

    return start


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Int[Tensor, "B T"],
    mask: Int[Tensor, "B T"],
    config: GenerationConfig,
    *,
    cache: Cache | None = None,
    stops: Sequence[str] = (),
) -> list[str]:
    """Return the replies to a padded batch of prompts, without special tokens; ``cache`` holds what was run of them."""
    length = ids.shape[1]
    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        past_key_values=cache,
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([StopStrings(tokenizer, stops, length)] if stops else []),
    )
    texts: list[str] = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
    return texts
