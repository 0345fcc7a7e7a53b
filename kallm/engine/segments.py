"""Many texts as few forward passes: whatever several of them begin with is computed once.

Texts are sorted and cut into segments. A segment is a run of tokens that follows those of its parents, whose keys and
values are kept; inside, tokens form a tree, where each sees its ancestors only, at the positions it would have in its
own text. Legend: T tokens of a segment, R rows that predict a wanted token, N wanted tokens.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer
from numpy import ndarray
from torch import Tensor

from kallm.model.trunk import Passage

__all__ = ["LONGEST", "SHARED", "Pair", "Segment", "plan_segments"]

LONGEST = 512
"""Tokens of a segment at most, unless one is asked for that is longer; bounds the logits that are held at once."""
SHARED = 32
"""Fewer tokens than these are rather computed again than given a forward pass of their own."""

Pair = tuple[list[int], list[int]]
"""Token ids of a context, at least one, and of what continues it, at least one."""


def _nothing() -> Int[Tensor, " 0"]:
    return torch.empty(0, dtype=torch.long)


@dataclass(frozen=True, eq=False)
class Segment(Passage):
    """Tokens that follow those of the parents, and which of them are wanted.

    Attributes:
        mask: which token sees which of the segment's own tokens, [T, T]; None means causal.
        parents: the segments before, first to last; all their tokens are seen.
        is_parent: whether others follow.
        rows: positions in the segment whose logits are needed, ascending, [R].
        index: for each wanted token its row's place in ``rows``, [N].
        targets: the wanted tokens, [N].
        owners: the pairs they belong to, [N].
        num_done: how many pairs are complete after this segment.
    """

    parents: tuple["Segment", ...] = ()
    is_parent: bool = False
    rows: Int[Tensor, " R"] = field(default_factory=_nothing)
    index: Int[Tensor, " N"] = field(default_factory=_nothing)
    targets: Int[Tensor, " N"] = field(default_factory=_nothing)
    owners: Int[Tensor, " N"] = field(default_factory=_nothing)
    num_done: int = 0

    @property
    def start(self) -> int:
        """How many tokens stand before it."""
        return sum(len(parent.input_ids) for parent in self.parents)

    def fingerprint(self) -> str:
        """Return a hash of the content and of that of the parents."""
        whole = [super().fingerprint(), *(parent.input_ids.numpy().tobytes().hex() for parent in self.parents)]
        return hashlib.sha256(" ".join(whole).encode()).hexdigest()


def plan_segments(
    pairs: Sequence[Pair],
    *,
    max_tokens: int,
    max_contexts: int | None = None,
    share: bool = True,
    min_shared: int = SHARED,
) -> list[Segment]:
    """Cut the texts into segments, parents before those that follow them.

    Args:
        pairs: contexts and continuations; of the last token of each nothing depends.
        max_tokens: a segment holds no more, unless it is a single text or the beginning of several.
        max_contexts: texts of so many contexts at most go into one segment.
        share: whether a model can take trees and continue from kept keys; else each text is a segment of its own, and
            only a text that another begins with is saved.
        min_shared: so many tokens of a beginning are worth a forward pass of their own.
    """
    return list(_Planner(pairs, max_tokens, max_contexts, min_shared if share else None).segments())


class _Planner:
    """The texts in sorted order, and how much each has in common with the one before."""

    def __init__(
        self, pairs: Sequence[Pair], max_tokens: int, max_contexts: int | None, min_shared: int | None
    ) -> None:
        """``min_shared`` None: nothing is shared."""
        self.pairs, self.max_tokens, self.max_contexts, self.min_shared = pairs, max_tokens, max_contexts, min_shared
        texts = [np.array((context + continuation)[:-1], dtype=">u4") for context, continuation in pairs]
        keys = [text.tobytes() for text in texts]
        self.order = sorted(range(len(pairs)), key=keys.__getitem__)
        self.texts = [texts[number] for number in self.order]
        self.common = np.array([0, *(_count_common(one, two) for one, two in pairwise(self.texts))])
        self.ends = np.cumsum([0, *(len(text) - same for text, same in zip(self.texts, self.common, strict=True))])
        new = (pairs[one][0] != pairs[two][0] for one, two in pairwise(self.order))
        self.contexts = np.cumsum([0, 1, *new])

    def segments(self) -> Iterator[Segment]:
        """Yield the segments depth first, so that parents' keys can be dropped as soon as all theirs are done."""
        left: list[tuple[int, int, int, tuple[Segment, ...]]] = [(0, len(self.texts), 0, ())]
        while left:
            low, high, start, parents = left.pop()
            if low == high:
                continue
            if self._fits(low, high, start) or self._is_one_path(low, high):
                yield from self._last(low, high, start, parents)
                continue
            shared = int(self.common[low + 1 : high].min())
            begins = [low, *(low + 1 + np.flatnonzero(self.common[low + 1 : high] == shared)).tolist(), high]
            if self.min_shared is not None and shared - start >= self.min_shared:
                for begin in range(start, shared, LONGEST):
                    stop = min(begin + LONGEST, shared)
                    parents = (*parents, self._lay(low, high, begin, stop, parents))
                    yield parents[-1]
                start = shared
            left += [(*piece, start, parents) for piece in reversed(self._merge(begins, start))]

    def _merge(self, begins: list[int], start: int) -> list[tuple[int, int]]:
        """Join neighbours as long as they fit into one segment."""
        pieces: list[tuple[int, int]] = []
        for low, high in pairwise(begins):
            if pieces and self._fits(pieces[-1][0], high, start):
                pieces[-1] = (pieces[-1][0], high)
            else:
                pieces.append((low, high))
        return pieces

    def _fits(self, low: int, high: int, start: int) -> bool:
        if self.min_shared is None:
            return False
        size = len(self.texts[low]) - start + self.ends[high] - self.ends[low + 1]
        contexts = self.contexts[high] - self.contexts[low + 1] + 1
        return bool(size <= self.max_tokens) and (self.max_contexts is None or bool(contexts <= self.max_contexts))

    def _is_one_path(self, low: int, high: int) -> bool:
        """Say whether each text begins with all of the one before."""
        return all(self.common[number] == len(self.texts[number - 1]) for number in range(low + 1, high))

    def _last(self, low: int, high: int, start: int, parents: tuple[Segment, ...]) -> Iterator[Segment]:
        """Yield what nothing follows; a single long text in several segments."""
        longest = len(self.texts[high - 1])
        if self.min_shared is not None and self._is_one_path(low, high):
            while longest - start > max(LONGEST, self.max_tokens):
                parents = (*parents, self._lay(low, high, start, start + LONGEST, parents))
                yield parents[-1]
                start += LONGEST
        if any(len(text) > start for text in self.texts[low:high]):
            yield self._lay(low, high, start, None, parents)

    def _lay(self, low: int, high: int, start: int, stop: int | None, parents: tuple[Segment, ...]) -> Segment:
        """Lay the texts' tokens from ``start`` to ``stop`` into one segment; with a stop, all have the same there."""
        ids: list[int] = []
        positions: list[int] = []
        above: list[int] = []
        path: list[int] = []
        wanted: list[tuple[int, int, int]] = []
        num_done = 0
        for number in range(low, high):
            text, pair = self.texts[number], self.order[number]
            depth = start if number == low else max(start, int(self.common[number]))
            del path[depth - start :]
            for place in range(depth, len(text) if stop is None else min(len(text), stop)):
                above.append(path[-1] if path else -1)
                path.append(len(ids))
                ids.append(int(text[place]))
                positions.append(place)
            context, continuation = self.pairs[pair]
            for place, target in enumerate(continuation, start=len(context) - 1):
                if start <= place and (stop is None or place < stop):
                    wanted.append((path[place - start], target, pair))
            last = len(text) - 1
            num_done += start <= last and (stop is None or last < stop)
        rows, index = np.unique(np.array([row for row, _, _ in wanted], dtype=np.int64), return_inverse=True)
        return Segment(
            input_ids=torch.tensor(ids),
            position_ids=torch.tensor(positions),
            mask=_build_mask(above),
            parents=parents,
            is_parent=stop is not None,
            rows=torch.from_numpy(rows),
            index=torch.from_numpy(index),
            targets=torch.tensor([target for _, target, _ in wanted], dtype=torch.long),
            owners=torch.tensor([owner for _, _, owner in wanted], dtype=torch.long),
            num_done=num_done,
        )


def _count_common(one: Integer[ndarray, " A"], two: Integer[ndarray, " B"]) -> int:
    """Return how many tokens two texts begin with alike."""
    length = min(len(one), len(two))
    different = np.flatnonzero(one[:length] != two[:length])
    return int(different[0]) if len(different) else length


def _build_mask(above: list[int]) -> Bool[Tensor, "T T"] | None:
    """Return which token sees which when each sees itself and what the one above it sees; None for a single path."""
    if all(parent == number - 1 for number, parent in enumerate(above)):
        return None
    mask = np.eye(len(above), dtype=bool)
    for number, parent in enumerate(above):
        if parent >= 0:
            mask[number] |= mask[parent]
    return torch.from_numpy(mask)
