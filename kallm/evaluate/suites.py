"""Suites: what a trained cell is measured by, their settings and identities. Imports no torch.

Settings say what is measured; their identity names an evaluation's record. A suite's module prepares once for all cells
of a model (tokens, and a cache of the trunk's output) and then scores one subject after another.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pydantic import Field, field_validator

from kallm.data.bbh import SUBSETS, TASKS, BBHItem, content_hash, load_bbh
from kallm.data.dialogues import Conversation
from kallm.engine.subject import Subject
from kallm.errors import did_you_mean
from kallm.evaluate.parse import Normaliser
from kallm.evaluate.score import Score
from kallm.evaluate.settings import EdgesSettings, HeldoutSettings, RetainedSettings, SuiteSettings
from kallm.model.sources import reach_hub

if TYPE_CHECKING:
    import transformers

    import kallm.model.trunk

__all__ = [
    "SUITES",
    "BBHChatSettings",
    "BBHChoiceSettings",
    "Context",
    "EdgesSettings",
    "Evaluation",
    "HeldoutSettings",
    "Prepared",
    "Progress",
    "RetainedSettings",
    "Suite",
    "SuiteSettings",
]


@dataclass(frozen=True)
class Context:
    """What suites prepare from, the same for all cells of a model.

    Attributes:
        model_name: names the frozen weights, so that caches of different models never meet.
        folder: where the trunk's output is kept.
        heldout: the conversations to score.
    """

    trunk: "kallm.model.trunk.Trunk"
    tokenizer: "transformers.PreTrainedTokenizerBase"
    model_name: str
    folder: Path
    heldout: Sequence[Conversation]


@dataclass(frozen=True)
class Evaluation:
    """Scores, the same per task where there are tasks, and what they were computed from, in the order of the data."""

    scores: dict[str, Score]
    tasks: dict[str, dict[str, Score]]
    items: list[dict[str, Any]]


@runtime_checkable
class Progress(Protocol):
    """Told how many items are done."""

    def advance(self, n: int) -> None:
        """Note ``n`` more items."""
        ...


@runtime_checkable
class Prepared(Protocol):
    """A suite made ready for a model."""

    @property
    def num_items(self) -> int:
        """How many items a subject answers."""
        ...

    def score(self, subject: Subject, progress: Progress, stop: Callable[[], None]) -> Evaluation:
        """Score one subject; ``stop`` is called between items and raises where a stop was asked for."""
        ...


class _BBHSettings(SuiteSettings):
    without_effect = frozenset({"source", "subset", "per_task"})  # the items' hash stands for both
    source: str = Field("exemplars", description="exemplars, hub:ORG/NAME[@revision] or a folder of the official files")
    subset: str = Field("all", description="all, leaderboard-24 or dialogue-11")
    per_task: int | None = Field(None, gt=0, description="ask only the first so many items of each task")

    @field_validator("subset")
    @classmethod
    def _known_subset(cls, value: str) -> str:
        if value not in SUBSETS:
            raise ValueError(f"unknown BBH subset '{value}': {did_you_mean(value, SUBSETS)}")
        return value

    def load(self) -> list[BBHItem]:
        """Load the items that the suite asks.

        Raises:
            WrongConfiguration: the source is unknown or out of reach.
            DataMismatch: a file is not the official one.
        """
        return [item for item in _load_items(self.source, self.subset) if self._asks(item)]

    def content(self, *, dialogues: str, heldout: int) -> str:
        """Return a hash of the data that is scored; for the hub its commit, so that a plan downloads nothing."""
        if self.source.startswith("hub:"):
            return f"{_hub_commit(self.source)} {self.subset} {self.per_task}"
        return content_hash(self.load())

    def _asks(self, item: BBHItem) -> bool:
        return self.per_task is None or item.index < self.per_task

    def _describe(self, how: str) -> str:
        if self.source.startswith("hub:"):
            return f"BIG-Bench Hard {how}: {self.subset} ({self.source}, commit {_hub_commit(self.source)[:12]})"
        items = self.load()
        outside = sum(not item.answerable for item in items)
        odd = f"; {outside} official answers are no option and count as wrong" if outside else ""
        kind = "exemplars" if self.source == "exemplars" else "items"
        num_tasks = len({item.task for item in items})
        return f"BIG-Bench Hard {how}: {self.subset}, {len(items):,} {kind} of {num_tasks} tasks{odd}"


class BBHChoiceSettings(_BBHSettings):
    """BIG-Bench Hard by the likelihood of each option; the three tasks with free text are left out."""

    numerics = 2

    @property
    def description(self) -> str:
        """One line for the table."""
        return self._describe("by likelihood")

    def load(self) -> list[BBHItem]:
        """Load the items whose possible answers are known."""
        return [item for item in super().load() if item.options or TASKS[item.task].counts]


class BBHChatSettings(_BBHSettings):
    """BIG-Bench Hard by conversation: a greedy reply, from which the answer is read."""

    numerics = 1
    without_effect = frozenset({"source", "subset", "per_task", "batch_size"})
    max_new_tokens: int = Field(16, gt=0, description="longest reply; 64 holds every official answer, 16 most of them")
    normaliser: Normaliser = Field(
        "kallm", description="kallm reads the answer's form; published compares whole replies"
    )
    batch_size: int = Field(16, gt=0, description="replies at a time; lower it when memory runs out")

    @property
    def description(self) -> str:
        """One line for the table."""
        rule = "" if self.normaliser == "kallm" else ", read by the published rule"
        return self._describe(f"by conversation, replies of at most {self.max_new_tokens} tokens{rule}")


@dataclass(frozen=True)
class Suite:
    """One way to measure a cell.

    Attributes:
        settings: the model of its settings.
        module: holds ``prepare(settings, context) -> Prepared``; imported when first used, because it needs torch.
    """

    settings: type[SuiteSettings]
    module: str

    def prepare(self, settings: SuiteSettings, context: Context) -> Prepared:
        """Make the suite ready for all cells of a model.

        Raises:
            WrongConfiguration: the model or its tokenizer cannot be measured so.
        """
        prepared: Prepared = importlib.import_module(self.module).prepare(settings, context)
        return prepared

    def evaluate(
        self, prepared: Prepared, subject: Subject, progress: Progress, stop: Callable[[], None]
    ) -> Evaluation:
        """Score one subject, without gradients and dropout.

        Args:
            prepared: what ``prepare`` returned.
            subject: whom to score.
            progress: told of every item that is done.
            stop: called between items; raises where a stop was asked for.
        """
        import torch

        with torch.no_grad(), _resting(subject.tail):
            return prepared.score(subject, progress, stop)


@functools.cache
def _load_items(source: str, subset: str) -> tuple[BBHItem, ...]:
    return tuple(load_bbh(source, subset=subset)[0])


@functools.cache
def _hub_commit(source: str) -> str:
    commit: str = reach_hub(source.removeprefix("hub:"), "dataset").sha
    return commit


@contextlib.contextmanager
def _resting(tail: "kallm.model.trunk.Tail") -> Iterator[None]:
    was_training = tail.training
    tail.eval()
    try:
        yield
    finally:
        tail.train(was_training)


SUITES: dict[str, Suite] = {
    "bbh-chat": Suite(BBHChatSettings, "kallm.evaluate.conversation"),
    "bbh-choice": Suite(BBHChoiceSettings, "kallm.evaluate.choices"),
    "edges": Suite(EdgesSettings, "kallm.evaluate.edges"),
    "heldout": Suite(HeldoutSettings, "kallm.evaluate.heldout"),
    "retained": Suite(RetainedSettings, "kallm.evaluate.retained"),
}
