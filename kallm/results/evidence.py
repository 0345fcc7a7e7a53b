"""All records of one study, read and checked once: what the table is computed from."""

import hashlib
from dataclasses import dataclass
from typing import Any, TypeVar

from kallm.errors import DataMismatch
from kallm.results.items import Answers, check_same, find_references, reduce_items
from kallm.results.record import (
    CellEntry,
    ChoiceRecord,
    EvaluationRecord,
    StudyDocument,
    SuiteEntry,
    TrainingRecord,
    cell_key,
    choice_key,
    evaluation_key,
    parse_record,
    read_items,
)
from kallm.store.store import Store
from kallm.train.probe import ProbeRecord, probe_prefix

__all__ = ["Evidence", "gather_evidence", "name_suite"]


@dataclass(frozen=True)
class Evidence:
    """Records by cell, evaluations and their items by (cell, suite id), references by suite id, hashes by key.

    Attributes:
        choices: by their hash.
        probes: by request, then by key, in the order of the keys.
    """

    document: StudyDocument
    trainings: dict[str, TrainingRecord]
    evaluations: dict[tuple[str, str], EvaluationRecord]
    answers: dict[tuple[str, str], Answers]
    references: dict[str, dict[str, dict[str, float]]]
    choices: dict[str, ChoiceRecord]
    probes: dict[str, dict[str, ProbeRecord]]
    digests: dict[str, str]

    def find_cells(self, variant: str) -> list[CellEntry]:
        """Return a variant's cells by seed."""
        members = (entry for entry in self.document.cells if entry.variant == variant)
        return sorted(members, key=lambda entry: (entry.seed is not None, entry.seed or 0))

    def find_receipt(self, cell: str) -> dict[str, Any]:
        """Return the receipt of a cell's training, or of its first evaluation where none trained; {} where none is."""
        if cell in self.trainings:
            return self.trainings[cell].receipt
        for suite in self.document.suites:
            if (cell, suite.id) in self.evaluations:
                return self.evaluations[cell, suite.id].receipt
        return {}

    def list_variants(self) -> list[str]:
        """Return the variants in the study's order."""
        return list(dict.fromkeys(entry.variant for entry in self.document.cells))


def gather_evidence(store: Store, document: StudyDocument) -> Evidence:
    """Read and check every record of the study that is there.

    Raises:
        DataMismatch: a record is malformed, of another version, cell or suite, items do not match their hash or their
            record, an evaluation scored other weights than its cell's, or two cells answered different questions.
    """
    trainings: dict[str, TrainingRecord] = {}
    evaluations: dict[tuple[str, str], EvaluationRecord] = {}
    answers: dict[tuple[str, str], Answers] = {}
    references: dict[str, dict[str, dict[str, float]]] = {}
    digests: dict[str, str] = {}
    for entry in document.cells:
        training = _read(store, TrainingRecord, cell_key(entry.id, "trained.json"), digests) if entry.trained else None
        if training is not None:
            _check_cell(training, entry, cell_key(entry.id, "trained.json"))
            trainings[entry.id] = training
        if entry.trained and (training is None or training.outcome == "diverged"):
            continue
        for suite in document.suites:
            key = evaluation_key(entry.id, suite.id)
            record = _read(store, EvaluationRecord, key, digests)
            if record is None:
                continue
            _check_cell(record, entry, key)
            _check_suite(record, suite, key)
            _check_weights(record, training, key)
            evaluations[entry.id, suite.id] = record
            found = _read_answers(store, record, suite, references)
            if found is not None:
                answers[entry.id, suite.id] = found
    _check_questions(document, answers)
    choices = _read_choices(store, document, digests)
    return Evidence(
        document, trainings, evaluations, answers, references, choices, _read_probes(store, document, digests), digests
    )


def name_suite(document: StudyDocument, suite: SuiteEntry) -> str:
    """Return the suite's name, or its id where two suites of the study share the name."""
    return suite.name if sum(other.name == suite.name for other in document.suites) == 1 else suite.id


def _read_choices(store: Store, document: StudyDocument, digests: dict[str, str]) -> dict[str, ChoiceRecord]:
    found = {}
    for choice in sorted({entry.choice for entry in document.cells if entry.choice is not None}):
        record = _read(store, ChoiceRecord, choice_key(choice), digests)
        if record is not None:
            if record.choice != choice:
                raise DataMismatch(f"{choice_key(choice)} is a record of choice {record.choice}; restore or remove it")
            found[choice] = record
    return found


def _read_probes(store: Store, document: StudyDocument, digests: dict[str, str]) -> dict[str, dict[str, ProbeRecord]]:
    found: dict[str, dict[str, ProbeRecord]] = {}
    for request in sorted({entry.probe for entry in document.cells if entry.probe is not None}):
        for key in sorted(entry.key for entry in store.list(probe_prefix(request))):
            record = _read(store, ProbeRecord, key, digests)
            if record is None:
                continue
            if record.request != request:
                raise DataMismatch(f"{key} is a record of request {record.request}; restore or remove it")
            found.setdefault(request, {})[key] = record
    return found


_Record = TypeVar("_Record", TrainingRecord, EvaluationRecord, ChoiceRecord, ProbeRecord)


def _read(store: Store, kind: type[_Record], key: str, digests: dict[str, str]) -> _Record | None:
    data = store.get(key)
    if data is None:
        return None
    digests[key] = hashlib.sha256(data).hexdigest()
    return parse_record(kind, data, key)


def _check_cell(record: TrainingRecord | EvaluationRecord, entry: CellEntry, key: str) -> None:
    if (record.cell, record.variant, record.seed) != (entry.id, entry.variant, entry.seed):
        raise DataMismatch(f"{key} is a record of {record.cell}, expected one of {entry.id}; restore or remove it")


def _check_suite(record: EvaluationRecord, suite: SuiteEntry, key: str) -> None:
    if record.suite != suite.id:
        raise DataMismatch(f"{key} is a record of {record.suite}, expected one of {suite.id}; restore or remove it")


def _check_weights(record: EvaluationRecord, training: TrainingRecord | None, key: str) -> None:
    expected = training.weights.get("sha256") if training is not None else None
    if expected is not None and record.weights != expected:
        raise DataMismatch(
            f"{key} scored weights {record.weights[:12]}, but the cell's are {expected[:12]}; "
            "remove this evaluation and run the cell again"
        )


def _read_answers(
    store: Store, record: EvaluationRecord, suite: SuiteEntry, references: dict[str, dict[str, dict[str, float]]]
) -> Answers | None:
    if not record.items:
        return None
    items = read_items(store, record)
    answers = reduce_items(record, items)
    if answers is not None and suite.id not in references:
        references[suite.id] = find_references(items)
    return answers


def _check_questions(document: StudyDocument, answers: dict[tuple[str, str], Answers]) -> None:
    for suite in document.suites:
        found = [answers[entry.id, suite.id] for entry in document.cells if (entry.id, suite.id) in answers]
        for other in found[1:]:
            check_same(found[0], other)
