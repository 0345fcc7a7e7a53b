"""BIG-Bench Hard: its 27 tasks, named subsets, and where their items come from.

The facts about the tasks stand in ``bbh.yaml``. Items come from the official exemplars in lm-eval's package (81,
offline), from a folder of the official files, or from the hub.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from kallm.errors import DataMismatch, WrongConfiguration, did_you_mean

__all__ = ["SUBSETS", "TASKS", "BBHItem", "Form", "Task", "content_hash", "load_bbh", "option_texts"]

Form = Literal["option", "word", "number", "brackets", "words"]
Examples = list[tuple[str, str]]

_OPTION = re.compile(r"^\(([A-Z])\)[ \t]*(.*?)[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Task:
    """One of the 27 tasks.

    Attributes:
        form: shape of the answer: a lettered option, one word of two, a number, brackets, a list of words.
        options: the possible answers where they are the same for every item; empty for lettered and free answers.
        counts: the numbers that likelihood scores compare where the answer is a count; else empty.
        sha256: hash of the official file.
    """

    name: str
    form: Form
    options: tuple[str, ...]
    counts: tuple[str, ...]
    num_items: int
    sha256: str


@dataclass(frozen=True)
class BBHItem:
    """One question.

    Attributes:
        id: ``<task>/<index>``, counted from 0.
        options: the possible answers, such as ``(A)`` or ``True``; empty where the answer is free.
    """

    id: str
    task: str
    question: str
    answer: str
    options: tuple[str, ...]
    form: Form

    @property
    def index(self) -> int:
        """The item's place in its task, counted from 0."""
        return int(self.id.rpartition("/")[2])

    @property
    def answerable(self) -> bool:
        """Whether the official answer is one of the options; where it is not, every reply counts as wrong."""
        return not self.options or self.answer in self.options


def load_bbh(source: str, *, subset: str) -> tuple[list[BBHItem], str]:
    """Load the items of a subset, by task and then by index, with the hash of their content.

    Args:
        source: ``exemplars``, a folder of the official ``<task>.json`` files, or ``hub:ORG/NAME[@revision]``.
        subset: a name in ``SUBSETS``.

    Raises:
        WrongConfiguration: the subset or the source is unknown, the folder lacks tasks, or the hub cannot be reached.
        DataMismatch: a file is not the official one.
    """
    if subset not in SUBSETS:
        raise WrongConfiguration(f"unknown BBH subset '{subset}': {did_you_mean(subset, SUBSETS)}")
    read = _reader(source, SUBSETS[subset])
    items = [item for name in SUBSETS[subset] for item in _items(TASKS[name], read(name))]
    return items, content_hash(items)


def content_hash(items: Iterable[BBHItem]) -> str:
    """Return the SHA-256 of all that items say; it does not depend on where they came from."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(astuple(item)).encode() + b"\n")
    return digest.hexdigest()


def option_texts(question: str) -> dict[str, str]:
    """Return the lettered options of a question: ``{"(A)": "circle", …}``; empty where it has none."""
    _, found, listing = question.rpartition("Options:")
    return {f"({letter})": text for letter, text in _OPTION.findall(listing)} if found else {}


def _items(task: Task, examples: Examples) -> list[BBHItem]:
    items = []
    for index, (question, answer) in enumerate(examples):
        options = tuple(option_texts(question)) if task.form == "option" else task.options
        if task.form == "option" and not options:
            raise DataMismatch(f"item {index} of {task.name} lists no options such as '(A) …' after 'Options:'")
        items.append(BBHItem(f"{task.name}/{index}", task.name, question, answer, options, task.form))
    return items


def _reader(source: str, tasks: tuple[str, ...]) -> Callable[[str], Examples]:
    """Return the function that reads one task of a source."""
    if source == "exemplars":
        return partial(_read_exemplars, _exemplars_folder())
    if source.startswith("hub:"):
        return partial(_read_hub, source)
    folder = Path(source)
    if not folder.is_dir():
        raise WrongConfiguration(
            f"unknown BBH source '{source}': expected 'exemplars', 'hub:ORG/NAME', or a folder with the official files"
        )
    missing = [name for name in tasks if not (folder / f"{name}.json").is_file()]
    if missing:
        raise WrongConfiguration(
            f"the BBH folder {source} must hold one <task>.json per task, but lacks {', '.join(missing)}; "
            "take the folder 'bbh' of github.com/suzgunmirac/BIG-Bench-Hard, or a subset without them"
        )
    return partial(_read_official, folder)


def _exemplars_folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")  # finds the package without running it, which takes seconds
    if spec is None or not spec.submodule_search_locations:
        raise WrongConfiguration("the BBH exemplars come with lm-eval, which is not installed: pip install lm-eval")
    return Path(spec.submodule_search_locations[0], "tasks", "bbh", "fewshot")


def _read_exemplars(folder: Path, task: str) -> Examples:
    path = folder / f"{task}.yaml"
    if not path.is_file():
        raise DataMismatch(f"lm-eval has no {path}: expected the version that requirements.lock names")
    samples = yaml.safe_load(path.read_text(encoding="utf-8"))["fewshot_config"]["samples"]
    return [(sample["input"], sample["target"]) for sample in samples]


def _read_official(folder: Path, task: str) -> Examples:
    data = (folder / f"{task}.json").read_bytes()
    if hashlib.sha256(data).hexdigest() != TASKS[task].sha256:
        raise DataMismatch(
            f"{folder / task}.json is not the official file: expected SHA-256 {TASKS[task].sha256}, "
            f"got {hashlib.sha256(data).hexdigest()}; fetch it again"
        )
    return [(example["input"], example["target"]) for example in json.loads(data)["examples"]]


def _read_hub(source: str, task: str) -> Examples:
    import datasets

    name, _, revision = source.removeprefix("hub:").partition("@")
    try:
        rows = datasets.load_dataset(name, task, split="test", revision=revision or None)
        return [(row["input"], row["target"]) for row in rows]
    except (OSError, ValueError, KeyError) as error:
        raise WrongConfiguration(
            f"cannot read BBH task {task} from '{source}' ({error}): expected one configuration per task, "
            "split 'test', columns 'input' and 'target'; without network use 'exemplars' or a folder"
        ) from error


def _read_facts() -> tuple[dict[str, Task], dict[str, tuple[str, ...]]]:
    facts: dict[str, Any] = yaml.safe_load(resources.files(__package__).joinpath("bbh.yaml").read_text("utf-8"))
    tasks = {name: _task(name, **fact) for name, fact in facts["tasks"].items()}
    return tasks, {name: tuple(members) for name, members in facts["subsets"].items()}


def _task(
    name: str, *, form: Form, items: int, sha256: str, options: Iterable[str] = (), counts: Sequence[int] = ()
) -> Task:
    numbers = tuple(str(count) for count in range(counts[0], counts[1] + 1)) if counts else ()
    return Task(name, form, tuple(options), numbers, items, sha256)


TASKS, SUBSETS = _read_facts()
