"""The suites ``lm-eval:NAME``: any of lm-eval's tasks, groups and tags. Imports neither torch nor, at first, lm-eval.

lm-eval's own index reads fourteen thousand files; here only those that the name leads to are read.
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from kallm.data.bbh import SUBSETS, TASKS, BBHItem, content_hash, load_bbh
from kallm.errors import WrongConfiguration, did_you_mean
from kallm.evaluate.suites import SuiteSettings
from kallm.model.cachefolder import cache_folder, filling, writing_cache
from kallm.model.sources import reach_hub

if TYPE_CHECKING:
    from lm_eval.tasks._index import Entry

__all__ = ["TaskSettings", "find_entries"]

_DEFINITION = re.compile(r"^[\"']?(?:task|group)[\"']?: *[\"']?([^\s\"'#]+)", re.MULTILINE)
_TAGS = re.compile(r"^[\"']?tag[\"']?: *([^\n]*(?:\n *- [^\n]*)*)", re.MULTILINE)
_INCLUDE = re.compile(r"^[\"']?include[\"']?: *[\"']?([^\s\"'#]+)", re.MULTILINE)
_FILE_FORMATS = {"json", "csv", "text", "parquet"}


class TaskSettings(SuiteSettings):
    """A task, group or tag of lm-eval, with its own prompts, metrics and averages."""

    numerics = 1
    without_effect = frozenset({"data", "revisions", "batch_size"})  # the data's hash stands for the first two
    task: str = Field(description="its name in lm-eval")
    num_fewshot: int | None = Field(None, ge=0, description="examples before each question; by default the task's own")
    per_task: int | None = Field(None, gt=0, description="ask only the first so many items of each task")
    chat: bool = Field(False, description="put prompts under the model's chat template")
    data: str | None = Field(
        None,
        description="instead of the hub: a folder with a data set of the same configurations; for BIG-Bench Hard "
        "exemplars, or a folder of the official files",
    )
    revisions: dict[str, str] = Field({}, description="commits of the hub's data sets; a plan fills them in")
    batch_size: int = Field(16, gt=0, description="replies at a time; lower it when memory runs out")

    @property
    def description(self) -> str:
        """One line for the table."""
        leaves = list(self.leaves())
        shots = "" if self.num_fewshot is None else f", {self.num_fewshot} examples"
        asked = "" if self.per_task is None else f", the first {self.per_task} items of each task"
        source = ", ".join(f"{path} at {commit[:12]}" for path, commit in self.commits().items()) or str(self.data)
        how = ", under the chat template" if self.chat else ""
        counted = f"{len(leaves)} tasks" if len(leaves) > 1 else "1 task"
        return f"lm-eval {_version()}, {self.task}: {counted}{shots}{asked}{how}; data: {source}"

    def content(self, *, dialogues: str, heldout: int) -> str:
        """Return a hash of the tasks' definitions and of their data; for the hub its commits.

        Raises:
            WrongConfiguration: there is no such task, or its data is out of reach.
        """
        definitions = {entry.name: entry.cfg for entry in self.leaves()}
        told = json.dumps([_version(), definitions, self._data_hash()], sort_keys=True, default=str)
        return hashlib.sha256(told.replace(str(_tasks_folder()), "").encode()).hexdigest()

    def pinned(self) -> "TaskSettings":
        """Return the same with the hub's data sets named by commit.

        Raises:
            WrongConfiguration: the hub does not answer.
        """
        return self.model_copy(update={"revisions": self.commits()})

    def leaves(self) -> Iterator["Entry"]:
        """Yield the single tasks that the name stands for."""
        from lm_eval.tasks._index import Kind

        for entry in find_entries(self.task).values():
            if entry.kind in (Kind.TASK, Kind.PY_TASK):
                yield entry

    def commits(self) -> dict[str, str]:
        """Return the commit of every data set that comes from the hub.

        Raises:
            WrongConfiguration: the hub does not answer.
        """
        if self.data is not None:
            return {}
        found = {}
        for entry in self.leaves():
            path = (entry.cfg or {}).get("dataset_path")
            if isinstance(path, str) and path not in _FILE_FORMATS:
                found[path] = self.revisions.get(path) or _commit(path, self.task)
        return found

    def overrides(self, entry: "Entry") -> dict[str, Any]:
        """Return what of a task's definition is replaced, so that it reads the data that this suite names."""
        config = entry.cfg or {}
        if self.data is not None:
            return {"dataset_path": str(self._data_folder())}
        path = config.get("dataset_path")
        if path in _FILE_FORMATS or not isinstance(path, str):
            return {}
        return {"dataset_kwargs": {**(config.get("dataset_kwargs") or {}), "revision": self.commits()[path]}}

    def _data_hash(self) -> str:
        if self.data is None:
            return json.dumps(self.commits(), sort_keys=True)
        if self._is_bbh():
            return content_hash(self._bbh_items())
        return hashlib.sha256(b"".join(_hash_file(path, self._data_folder()) for path in self._files())).hexdigest()

    def _data_folder(self) -> Path:
        assert self.data is not None
        if self._is_bbh():
            return _write_bbh(self._bbh_items())
        folder = Path(self.data)
        if not folder.is_dir():
            raise WrongConfiguration(f"lm-eval:{self.task}: data: expected a folder with a data set, got '{self.data}'")
        return folder.resolve()

    def _files(self) -> list[Path]:
        return sorted(path for path in self._data_folder().rglob("*") if path.is_file())

    def _is_bbh(self) -> bool:
        """Say whether all tasks are of BIG-Bench Hard, whose official files are known by hash."""
        configs = [entry.cfg or {} for entry in self.leaves()]
        return all("bbh" in str(of.get("dataset_path")) and of.get("dataset_name") in TASKS for of in configs)

    def _bbh_items(self) -> list[BBHItem]:
        assert self.data is not None
        named = {(entry.cfg or {})["dataset_name"] for entry in self.leaves()}
        subset = next((name for name, members in sorted(SUBSETS.items()) if set(members) == named), "all")
        return [item for item in load_bbh(self.data, subset=subset)[0] if item.task in named]


@functools.cache
def find_entries(name: str) -> "dict[str, Entry]":
    """Return what a name stands for in lm-eval: itself, and all groups, tags and tasks that belong to it.

    Raises:
        WrongConfiguration: lm-eval has no such task, group or tag.
    """
    from lm_eval.tasks._index import Kind, TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    places = _scan()
    index: dict[str, Entry] = {}
    left = [name]
    if name not in places:
        raise WrongConfiguration(f"lm-eval {_version()} has no task or group '{name}': {_near(name, places)}")
    while left:
        current = left.pop()
        for path in places.get(current, ()):
            TaskIndex.process_cfg(load_yaml(path, resolve_func=False), path, index)
        entry = index.get(current)
        if entry is None:
            raise WrongConfiguration(f"lm-eval {_version()} names '{current}', but its definition was not found")
        members = sorted(entry.tags) if entry.kind is Kind.TAG else []
        if entry.kind is Kind.GROUP:
            given = (entry.cfg or {}).get("task") or []
            members = [each if isinstance(each, str) else each.get("task") or each.get("group") for each in given]
        left += [member for member in members if member not in index and member in places]
    wanted = _reachable(name, index)
    return {each: entry for each, entry in index.items() if each in wanted}


def _reachable(name: str, index: "dict[str, Entry]") -> set[str]:
    """Return the names that a name leads to; a file may define more."""
    found, left = set(), [name]
    while left:
        current = left.pop()
        entry = index.get(current)
        if current in found or entry is None:
            continue
        found.add(current)
        given = (entry.cfg or {}).get("task") if isinstance((entry.cfg or {}).get("task"), list) else []
        left += [each if isinstance(each, str) else each.get("task") or each.get("group") for each in given or []]
        left += [] if entry.cfg else sorted(entry.tags)
    return found


@functools.cache
def _scan() -> dict[str, list[Path]]:
    """Return for every name in lm-eval's folder the files that define it, without parsing them."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(_tasks_folder().rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        for name in {match[1] for match in _DEFINITION.finditer(text)} | _tags_of(path, text):
            found[name].append(path)
    return dict(found)


def _tags_of(path: Path, text: str) -> set[str]:
    """Return the tags that a file's tasks have, its own or those of the file it includes."""
    own = {tag for match in _TAGS.finditer(text) for tag in re.findall(r"[\w.-]*\w", match[1])}
    included = _INCLUDE.search(text)
    if own or included is None:
        return own
    other = path.parent / included[1]
    return _tags_of(other, other.read_text(encoding="utf-8")) if other.is_file() else set()


@functools.cache
def _tasks_folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")  # finds the package without running it, which takes seconds
    if spec is None or not spec.submodule_search_locations:
        raise WrongConfiguration("suites 'lm-eval:…' need lm-eval, which is not installed: pip install lm-eval")
    return Path(spec.submodule_search_locations[0], "tasks")


def _version() -> str:
    return importlib.metadata.version("lm-eval")


def _near(name: str, known: dict[str, list[Path]]) -> str:
    told = did_you_mean(name, known).rpartition("Did you mean")
    return f"did you mean{told[2]}" if told[1] else "'lm-eval ls tasks' lists what there is"


@functools.cache
def _commit(path: str, task: str) -> str:
    try:
        commit: str = reach_hub(path, "dataset").sha
    except WrongConfiguration as error:
        raise WrongConfiguration(
            f"lm-eval:{task} asks questions of the data set '{path}', which cannot be had ({error.__cause__!r:.80}): "
            "use a network, name a folder with it as 'data', or leave the suite out"
        ) from error
    return commit


def _hash_file(path: Path, folder: Path) -> bytes:
    told = path.relative_to(folder).as_posix().encode()
    return hashlib.sha256(told + b"\0" + path.read_bytes()).digest()


def _write_bbh(items: list[BBHItem]) -> Path:
    """Return a folder with the items as a data set that has one configuration per task, as the hub's has."""
    folder = cache_folder() / "lm-eval" / content_hash(items)[:24]
    if folder.exists():
        return folder
    by_task: dict[str, list[BBHItem]] = defaultdict(list)
    for item in items:
        by_task[item.task].append(item)
    configs = [
        {"config_name": task, "data_files": [{"split": "test", "path": f"{task}.jsonl"}]} for task in sorted(by_task)
    ]
    with filling(folder) as whole, writing_cache(folder.parent):
        whole.joinpath("README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
        for task, members in by_task.items():
            lines = [json.dumps({"input": item.question, "target": item.answer}) + "\n" for item in members]
            whole.joinpath(f"{task}.jsonl").write_text("".join(lines))
    return folder
