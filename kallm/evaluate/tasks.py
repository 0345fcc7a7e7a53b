"""The suites ``lm-eval:NAME``: lm-eval asks and averages, our engine answers, the trunk's work is shared by all cells.

Legend: B batch, T tokens of a padded prompt.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from kallm.engine.likelihoods import Halves, SegmentTrunk
from kallm.engine.passes import precision
from kallm.engine.prefill import Replies
from kallm.engine.subject import Subject
from kallm.errors import WrongConfiguration
from kallm.evaluate.harness import KallmLM
from kallm.evaluate.heldout import needs_chat_template
from kallm.evaluate.suites import Context, Evaluation, Progress
from kallm.evaluate.taskitems import summarise_tasks
from kallm.evaluate.tasksettings import TaskSettings, find_entries

__all__ = ["Tasks", "load_tasks", "prepare"]

_SEED = 1234
"""lm-eval's own, from which examples are drawn."""
_PASS_TOKENS = 512


@dataclass(frozen=True)
class Tasks:
    """lm-eval's tasks with their data.

    Attributes:
        loaded: as lm-eval's ``evaluate`` takes them.
        trunk: reads segments.
        replies: generates them, for one subject after the other.
    """

    settings: TaskSettings
    context: Context
    loaded: dict[str, Any]
    trunk: SegmentTrunk
    replies: Replies
    num_items: int

    def score(self, subject: Subject, progress: Progress, stop: Callable[[], None]) -> Evaluation:
        """Score one subject.

        Raises:
            OutOfMemory: too many replies at a time.
        """

        def done(count: int) -> None:
            stop()
            progress.advance(count)

        stop()
        asked = _Asked(self, subject, done)
        for task in self.loaded["tasks"].values():
            task.set_fewshot_seed(_SEED)  # or the next subject would see other examples
        with _own_randomness(), precision(subject):
            found = evaluate(
                lm=asked,
                task_dict=self.loaded,
                limit=self.settings.per_task,
                bootstrap_iters=0,
                apply_chat_template=self.settings.chat,
                fewshot_as_multiturn=self.settings.chat,
            )
        assert found is not None
        return summarise_tasks(self.settings.task, self.loaded["tasks"], found)


class _Asked(KallmLM):
    """A subject as lm-eval asks it: its tail after the trunk."""

    def __init__(self, tasks: Tasks, subject: Subject, done: Callable[[int], None]) -> None:
        context = tasks.context
        super().__init__(
            model=subject.model,
            tokenizer=subject.tokenizer,
            engine=Halves(tasks.trunk, subject, context.model_name, context.folder, _PASS_TOKENS),
            batch_size=tasks.settings.batch_size,
            done=done,
        )
        self._tasks, self._subject = tasks, subject

    def generate_batch(
        self,
        ids: Int[Tensor, "B T"],
        mask: Int[Tensor, "B T"],
        config: GenerationConfig,
        stops: list[str],
        start: Callable[[int], Cache] | None,
    ) -> list[str]:
        """Return the replies to one padded batch, which the trunk has read once for all subjects."""
        return self._tasks.replies.generate(self._subject, ids, mask, config, stops=stops)


def prepare(settings: TaskSettings, context: Context) -> Tasks:
    """Load the tasks and their data.

    Raises:
        WrongConfiguration: there is no such task, its data or a package it needs is missing, it runs code that models
            write, it shows pictures, or the tokenizer has no chat template.
    """
    if settings.chat:
        needs_chat_template(context.tokenizer, f"lm-eval:{settings.task}")
    loaded = load_tasks(settings)
    num_items = 0
    for name, task in loaded["tasks"].items():
        _check(name, task)
        if settings.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(_SEED)
        with _own_randomness():
            task.build_all_requests(limit=settings.per_task)
        num_items += sum(instance.repeats for instance in task.instances)
    replies = Replies(context.trunk, f"lm-eval:{settings.task}")
    return Tasks(settings, context, loaded, SegmentTrunk(context.trunk), replies, num_items)


def load_tasks(settings: TaskSettings) -> dict[str, Any]:
    """Load the tasks as lm-eval's ``evaluate`` takes them, each with the data that the suite names.

    Raises:
        WrongConfiguration: there is no such task, or its data or a package it needs is missing.
    """
    manager = TaskManager(include_defaults=False)
    leaves = {entry.name for entry in settings.leaves()}
    for name, entry in find_entries(settings.task).items():
        copied = type(entry)(name=name, kind=entry.kind, yaml_path=entry.yaml_path, tags={*entry.tags})
        if name in leaves and entry.yaml_path is not None:
            definition = load_yaml(entry.yaml_path, resolve_func=True)
            copied.yaml_path, copied.cfg = None, {**definition, **settings.overrides(entry)}
        manager.task_index[name] = copied
    try:
        with _own_randomness():
            found: dict[str, Any] = manager.load([settings.task])
    except ModuleNotFoundError as error:
        raise WrongConfiguration(
            f"lm-eval:{settings.task} needs the package '{error.name}', which is missing: pip install {error.name}"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise WrongConfiguration(
            f"the data of lm-eval:{settings.task} cannot be read ({str(error).splitlines()[0]:.200}): use a network, "
            "or name a folder with the data set as 'data'"
        ) from error
    return found


def _check(name: str, task: Task) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise WrongConfiguration(f"lm-eval:{name} runs code that a model writes; that is not done here")
    if getattr(task, "MULTIMODAL", False):
        raise WrongConfiguration(f"lm-eval:{name} asks about pictures or sounds, which a language model cannot take in")


class _own_randomness:  # noqa: N801 - a context, used like a function
    """Seeds the global generators as lm-eval does, and leaves them as they were."""

    def __enter__(self) -> None:
        self._states = random.getstate(), np.random.get_state()
        random.seed(0)
        np.random.seed(_SEED)

    def __exit__(self, *error: object) -> None:
        random.setstate(self._states[0])
        np.random.set_state(self._states[1])
