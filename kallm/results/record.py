"""What a finished cell leaves in the store, and where: one training record, one evaluation record per suite.

Records are created once and never changed; a reader needs nothing but the store and ``study.json``.
"""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from kallm.errors import DataMismatch
from kallm.evaluate.score import Score
from kallm.store.sealed import seal, unseal
from kallm.store.store import Store

__all__ = [
    "CellEntry",
    "ChoiceRecord",
    "EvaluationRecord",
    "Items",
    "Parameters",
    "StudyDocument",
    "SuiteEntry",
    "TrainingRecord",
    "Trial",
    "cell_key",
    "choice_key",
    "evaluation_key",
    "parse_record",
    "read_items",
    "read_note",
    "read_record",
    "record_study",
    "study_key",
    "write_items",
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_bytes(self) -> bytes:
        """Return the record as canonical JSON that carries its own hash."""
        return seal(self.model_dump(mode="json"))


class Parameters(_Frozen):
    """The three counts of the table."""

    trainable: int
    stored: int
    ffn: int


class CellEntry(_Frozen):
    """One cell as ``study.json`` names it."""

    id: str
    variant: str
    seed: int | None
    trained: bool
    parameters: Parameters
    tokens: int
    steps: int
    probe: str | None = None
    """Hash of what ``kallm probe`` measures of the variant alone; None for a cell that is not trained."""
    choice: str | None = None
    """Hash of the choice among the learning rates of ``train.lr``; None where there is nothing to choose."""


class SuiteEntry(_Frozen):
    """One suite as ``study.json`` names it; ``id`` is ``<name>.<hash>``."""

    id: str
    name: str
    description: str


class StudyDocument(_Frozen):
    """``studies/<name>.<hash>/study.json``: all that the table needs to know besides the records."""

    format: Literal[1] = 1
    name: str
    hash: str
    study: dict[str, Any]
    cells: list[CellEntry]
    suites: list[SuiteEntry]
    margin_nats: float
    contrasts: list[tuple[str, str]]
    notes: list[str]


class TrainingRecord(_Frozen):
    """``trained.json``: created last, it says that the cell is trained (or has diverged)."""

    format: Literal[1] = 1
    cell: str
    variant: str
    seed: int | None
    outcome: Literal["trained", "diverged"]
    cause: str | None = None
    weights: dict[str, str]
    """Manifest key and the SHA-256 of the final weights: ``{"manifest": …, "sha256": …}``; empty where none trained."""
    parameters: Parameters
    steps: int
    tokens: int
    supervised_tokens: int
    loss_history: list[tuple[int, float]]
    """(optimiser step, mean loss in nats per token since the previous entry)."""
    seconds: float
    tokens_per_s: float
    peak_bytes: int
    attempts: int
    shared: bool
    """Whether the trunk was shared with other cells of the process: then time and memory are not this cell's own."""
    lr: float | None = None
    """Peak learning rate."""
    choice: str | None = None
    """Key of the choice that the learning rate is from; None where the recipe names one rate."""
    receipt: dict[str, Any]


class Trial(_Frozen):
    """A short training at one learning rate."""

    lr: float
    nats: float | None
    """Mean cross-entropy per token on the validation split; None where it diverged."""
    cause: str | None = None
    """Of the divergence."""
    steps: int
    tokens: int


class ChoiceRecord(_Frozen):
    """``choices/<hash>.json``: which of the recipe's learning rates a variant takes, for all its seeds, and why."""

    format: Literal[1] = 1
    choice: str
    lr: float | None
    """Of the trial with the lowest cross-entropy, the lower one of equals; None where every trial diverged."""
    trials: list[Trial]
    """By learning rate, ascending."""
    validation: dict[str, int]
    """How much the trials were judged on: ``{"conversations": …, "tokens": …}``; they trained on none of it."""
    receipt: dict[str, Any]

    @model_validator(mode="after")
    def _is_the_best(self) -> "ChoiceRecord":
        judged = [(trial.nats, trial.lr) for trial in self.trials if trial.nats is not None]
        if self.lr != (min(judged)[1] if judged else None):
            raise ValueError(f"lr is {self.lr}, which is not that of the best trial")
        return self


class EvaluationRecord(_Frozen):
    """``evaluations/<suite>.<hash>.json``: created last, after the items that it names."""

    format: Literal[1] = 1
    cell: str
    variant: str
    seed: int | None
    suite: str
    weights: str
    """SHA-256 of the weights that were scored."""
    scores: dict[str, Score]
    tasks: dict[str, dict[str, Score]]
    items: dict[str, Any]
    """``{"key": …, "sha256": …, "count": …}`` of the items' object."""
    seconds: float
    receipt: dict[str, Any]


Items = list[dict[str, Any]]
_Record = TypeVar("_Record", bound=BaseModel)
_Note = TypeVar("_Note", bound=BaseModel)


def cell_key(cell: str, *parts: str) -> str:
    """Return the key of an object of a cell."""
    return "/".join(("cells", cell, *parts))


def study_key(name: str, study_hash: str, *parts: str) -> str:
    """Return the key of an object of a study."""
    return "/".join(("studies", f"{name}.{study_hash}", *parts))


def evaluation_key(cell: str, suite_id: str) -> str:
    """Return the key of a cell's evaluation record under a suite."""
    return cell_key(cell, "evaluations", f"{suite_id}.json")


def choice_key(choice: str) -> str:
    """Return the key of a choice among learning rates, by its hash."""
    return f"choices/{choice}.json"


def parse_record(kind: type[_Record], data: bytes, key: str) -> _Record:
    """Parse a record.

    Raises:
        DataMismatch: the bytes are not such a record.
    """
    try:
        return kind.model_validate(unseal(data, key))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise DataMismatch(f"{key} is no {kind.__name__}: {where}: {first['msg']}") from error


def read_record(store: Store, kind: type[_Record], key: str) -> _Record | None:
    """Read a record; None where there is none.

    Raises:
        DataMismatch: the object is there and is not such a record.
    """
    data = store.get(key)
    return None if data is None else parse_record(kind, data, key)


def record_study(store: Store, document: StudyDocument) -> None:
    """Leave ``study.json``, which the table and every reader start from.

    Raises:
        DataMismatch: what stands there is damaged.
    """
    key = study_key(document.name, document.hash, "study.json")
    if not store.create(key, document.to_bytes()):
        read_record(store, StudyDocument, key)


def read_note(store: Store, key: str, kind: type[_Note]) -> _Note | None:
    """Read a passing note (a heartbeat, an attempt's start or end); None where there is none.

    A damaged note is as good as none: notes are no records, and nothing rests on one alone. ``kallm verify`` names it.
    """
    data = store.get(key)
    if data is None:
        return None
    try:
        return kind.model_validate(unseal(data, key))
    except (DataMismatch, ValidationError):
        return None


def write_items(items: Iterable[dict[str, Any]]) -> bytes:
    """Return items as gzipped JSON lines; equal items give equal bytes."""
    lines = "".join(json.dumps(item, sort_keys=True, ensure_ascii=False) + "\n" for item in items)
    return gzip.compress(lines.encode(), mtime=0)


def read_items(store: Store, record: EvaluationRecord) -> Items:
    """Read the items that a record names.

    Raises:
        DataMismatch: they are missing, or their hash is another one.
    """
    key = str(record.items["key"])
    data = store.get(key)
    if data is None:
        raise DataMismatch(f"{key} is missing, but the record of {record.cell} names it")
    if hashlib.sha256(data).hexdigest() != record.items["sha256"]:
        raise DataMismatch(f"{key} has another hash than the record of {record.cell} names")
    return list(_lines(data))


def _lines(data: bytes) -> Iterator[dict[str, Any]]:
    for line in gzip.decompress(data).decode().splitlines():
        yield json.loads(line)
