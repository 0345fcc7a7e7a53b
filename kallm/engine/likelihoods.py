"""Likelihoods of many continuations: segments through a whole model, or through a trunk and a tail.

Legend: T tokens of a segment, D width of the residual stream, V vocabulary, R rows that predict a wanted token.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from kallm.engine.passes import compute_logits, precision
from kallm.engine.segments import Pair, Segment, plan_segments
from kallm.engine.subject import Subject
from kallm.model.cache import HiddenCache
from kallm.model.trunk import Passage, Trunk

__all__ = ["Engine", "Halves", "Likelihood", "SegmentTrunk", "WholeModel", "score_segments", "takes_trees"]

Likelihood = tuple[float, bool]
"""A continuation's log-likelihood in nats, and whether each of its tokens is the likeliest one."""
_CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6}
_CLOSE_IN_16_BIT = 0.2


@runtime_checkable
class Engine(Protocol):
    """Gives logits for segments."""

    def plan(self, pairs: Sequence[Pair]) -> list[Segment]:
        """Cut texts into segments that this engine can read."""
        ...

    def compute(self, segments: Sequence[Segment]) -> Callable[[int], Float[Tensor, "R V"]]:
        """Return what gives the fp32 logits of a segment's rows, to be called for one number after the other."""
        ...


class _Walk:
    """Keys and values along the path to the last segment, so that the next one starts where they part."""

    def __init__(self, config: object, run: Callable[[Segment, Cache], object]) -> None:
        self._config, self._run = config, run
        self._path: list[tuple[Segment, Cache]] = []

    def cache_after(self, parents: tuple[Segment, ...]) -> Cache:
        """Return a cache of its own that holds all parents; those not on the path are run."""
        common = 0
        while common < min(len(parents), len(self._path)) and self._path[common][0] is parents[common]:
            common += 1
        del self._path[common:]
        for parent in parents[common:]:
            cache = self._copy()
            self._run(parent, cache)
            self.keep(parent, cache)
        return self._copy()

    def keep(self, segment: Segment, cache: Cache) -> None:
        """Put a segment that was just run at the end of the path, for others follow it."""
        self._path.append((segment, cache))

    def _copy(self) -> Cache:
        """Return a cache that grows without changing the kept one: layers bind new tensors when they grow."""
        if not self._path:
            return DynamicCache(config=self._config)
        return Cache(layers=[copy.copy(layer) for layer in self._path[-1][1].layers])


@dataclass(frozen=True)
class WholeModel:
    """A causal language model as it is.

    Attributes:
        trees: whether it can take trees and continue from kept keys.
        max_tokens: tokens of a forward pass.
        max_contexts: contexts of a forward pass, at most.
    """

    model: PreTrainedModel
    trees: bool
    max_tokens: int
    max_contexts: int | None = None

    def plan(self, pairs: Sequence[Pair]) -> list[Segment]:
        """Cut texts into segments that this model can read."""
        window = _window(self.model.config)
        longest = max((len(context) + len(continuation) for context, continuation in pairs), default=0)
        share = self.trees and (window is None or longest < window)
        return plan_segments(pairs, max_tokens=self.max_tokens, max_contexts=self.max_contexts, share=share)

    def compute(self, segments: Sequence[Segment]) -> Callable[[int], Float[Tensor, "R V"]]:
        """Return what gives the fp32 logits of a segment's rows."""
        walk = _Walk(self.model.config, self._run)

        def compute_one(number: int) -> Float[Tensor, "R V"]:
            segment = segments[number]
            alone = not segment.parents and not segment.is_parent
            cache = None if alone else walk.cache_after(segment.parents)
            logits = self._run(segment, cache)
            if segment.is_parent and cache is not None:
                walk.keep(segment, cache)
            return logits.float()

        return compute_one

    def _run(self, segment: Segment, cache: Cache | None) -> Float[Tensor, "R V"]:
        device = self.model.device
        given: dict[str, Any] = {"input_ids": segment.input_ids[None].to(device)}
        takes = inspect.signature(self.model.forward).parameters
        if segment.mask is not None or cache is not None:  # what has neither is plain text, for any architecture
            given |= {"position_ids": segment.position_ids[None].to(device), "past_key_values": cache}
            given |= {"attention_mask": _mask_of(segment, self.model)}
        given["use_cache"] = cache is not None
        rows = segment.rows.to(device)
        if "logits_to_keep" in takes:
            kept: Tensor = self.model(**given, logits_to_keep=rows).logits[0]
            return kept
        whole: Tensor = self.model(**given).logits[0, rows]
        return whole


class SegmentTrunk(Trunk):
    """A trunk that reads segments, each after its parents."""

    def __init__(self, trunk: Trunk) -> None:
        torch.nn.Module.__init__(self)
        self.cut, self.body = trunk.cut, trunk.body
        self._walk = _Walk(trunk.body.config, self._run)

    @torch.no_grad()
    def forward(self, passage: Passage) -> Float[Tensor, "T D"]:
        """Return the residual stream before the tail for one segment, [T, D]."""
        assert isinstance(passage, Segment)
        cache = self._walk.cache_after(passage.parents)
        hidden = self._run(passage, cache)
        if passage.is_parent:
            self._walk.keep(passage, cache)
        return hidden

    def _run(self, segment: Segment, cache: Cache) -> Float[Tensor, "T D"]:
        device = next(self.body.parameters()).device
        hidden: Tensor = self.body(
            input_ids=segment.input_ids[None].to(device),
            position_ids=segment.position_ids[None].to(device),
            attention_mask=_mask_of(segment, self.body),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return hidden[0]


@dataclass(frozen=True)
class Halves:
    """A trunk, whose output is kept on disk for the next subject, and a subject's tail.

    Segments are cut the same whatever the subject and the batch, so that the trunk's output is found again.
    """

    trunk: SegmentTrunk
    subject: Subject
    model_name: str
    folder: Path
    max_tokens: int

    def plan(self, pairs: Sequence[Pair]) -> list[Segment]:
        """Cut texts into segments."""
        return plan_segments(pairs, max_tokens=self.max_tokens)

    def compute(self, segments: Sequence[Segment]) -> Callable[[int], Float[Tensor, "R V"]]:
        """Return what gives the fp32 logits of a segment's rows."""
        hidden = HiddenCache(self.trunk, segments, self.folder, self.model_name)
        numbers = {id(segment): number for number, segment in enumerate(segments)}
        body = self.subject.tail.body

        def run(segment: Segment, cache: Cache) -> Float[Tensor, "T D"]:
            device = self.subject.tail.head.weight.device
            with precision(self.subject):
                states: Tensor = body(
                    inputs_embeds=hidden[numbers[id(segment)]][None].to(device),
                    position_ids=segment.position_ids[None].to(device),
                    attention_mask=_mask_of(segment, body),
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
            return states[0]

        walk = _Walk(body.config, run)

        def compute_one(number: int) -> Float[Tensor, "R V"]:
            segment = segments[number]
            cache = walk.cache_after(segment.parents)
            states = run(segment, cache)
            if segment.is_parent:
                walk.keep(segment, cache)
            return compute_logits(self.subject, states[segment.rows.to(states.device)])

        return compute_one


@torch.no_grad()
def score_segments(
    engine: Engine, segments: Sequence[Segment], num_pairs: int, done: Callable[[int], object]
) -> list[Likelihood]:
    """Return the likelihood of every pair; ``done`` is told how many are complete after each pass."""
    totals = torch.zeros(num_pairs, dtype=torch.float64)
    greedy = torch.ones(num_pairs, dtype=torch.bool)
    compute = engine.compute(segments)
    for number, segment in enumerate(segments):
        logits = compute(number)
        if len(segment.targets):
            found, is_best = _measure(logits, segment.index.to(logits.device), segment.targets.to(logits.device))
            totals.index_add_(0, segment.owners, found.double().cpu())
            greedy[segment.owners[~is_best.cpu()]] = False
        done(segment.num_done)
    return list(zip(totals.tolist(), greedy.tolist(), strict=True))


@torch.no_grad()
def takes_trees(model: PreTrainedModel) -> bool:
    """Say whether a model reads a tree after kept keys as it reads each text alone; it is tried on a few tokens.

    What has no position ids, such as a state-space model, does not, and neither does what keeps no masks apart.
    """
    if not {"position_ids", "past_key_values", "attention_mask"} <= inspect.signature(model.forward).parameters.keys():
        return False
    if getattr(model.config, "alibi", False) or model.config._attn_implementation not in ("eager", "sdpa"):
        return False
    ids = [number % model.config.vocab_size for number in range(2, 18)]
    first, again = ids[:4], ids[:7]
    pairs = [(again, ids[7:10]), (again, ids[10:13]), ([*first, ids[13]], ids[14:15])]
    close = _CLOSE.get(model.dtype, _CLOSE_IN_16_BIT)
    found = [
        score_segments(WholeModel(model, trees=True, max_tokens=8), segments, len(pairs), lambda _: None)
        for segments in (
            plan_segments(pairs, max_tokens=8, share=False),
            plan_segments(pairs, max_tokens=8, min_shared=len(first)),
        )
    ]
    return all(abs(alone[0] - together[0]) <= close for alone, together in zip(*found, strict=True))


def _window(config: Any) -> int | None:
    """Return how far back the nearest-sighted block sees; None where each sees everything."""
    kinds = {*(getattr(config, "layer_types", None) or ())}
    if kinds - {"full_attention", "sliding_attention", "chunked_attention"}:
        return 0
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return None if kinds == {"full_attention"} else min((size for size in windows if size), default=None)


def _mask_of(segment: Segment, module: PreTrainedModel) -> Shaped[Tensor, "1 1 T S"] | None:
    """Return which token sees which, those of the parents first; None where that is plainly causal."""
    if segment.mask is None:
        return None
    weight = next(module.parameters())
    before = torch.ones(len(segment.input_ids), segment.start, dtype=torch.bool)
    seen = torch.cat([before, segment.mask], dim=1)[None, None].to(weight.device)
    if module.config._attn_implementation != "eager":
        return seen
    # eager attention adds its mask to the scores
    return torch.zeros(seen.shape, device=weight.device, dtype=weight.dtype).masked_fill(
        ~seen, torch.finfo(weight.dtype).min
    )


def _measure(
    logits: Float[Tensor, "R V"], index: Int[Tensor, " N"], targets: Int[Tensor, " N"]
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Return the wanted tokens' log-likelihoods, and which of them are the likeliest."""
    found = logits[index, targets] - logits.logsumexp(-1)[index]
    return found, logits.argmax(-1)[index] == targets
