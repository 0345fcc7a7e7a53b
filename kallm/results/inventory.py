"""What the manifests and records of a cell name, and what nothing names."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from kallm.errors import DataMismatch
from kallm.results.record import (
    EvaluationRecord,
    StudyDocument,
    TrainingRecord,
    cell_key,
    choice_key,
    evaluation_key,
    read_record,
    study_key,
)
from kallm.store.commit import list_manifests, manifest_key, read_manifest
from kallm.store.copy import Step
from kallm.store.store import Entry, Store
from kallm.train.probe import probe_prefix

__all__ = ["find_unnamed", "list_steps"]

_NOTES = ("attempts/", "logs/", "metrics/")


def list_steps(store: Store, document: StudyDocument) -> list[Step]:
    """Return what makes up a study, in the order in which another store must take it: records after what they name.

    Heartbeats are not among it, for they say that somebody works in this store.

    Raises:
        DataMismatch: a record is malformed.
    """
    steps = [Step("record", study_key(document.name, document.hash, "study.json"))]
    for request in sorted({entry.probe for entry in document.cells if entry.probe is not None}):
        # figures of equal hardware are never equal: those that the other store has are as good
        steps += [Step("record", entry.key, unless=entry.key) for entry in store.list(probe_prefix(request))]
    for choice in sorted({entry.choice for entry in document.cells if entry.choice is not None}):
        if store.get(choice_key(choice)) is not None:
            steps.append(Step("record", choice_key(choice)))
    for entry in document.cells:
        steps += _list_cell(store, document, entry.id)
    return steps


def _list_cell(store: Store, document: StudyDocument, cell: str) -> Iterator[Step]:
    yield Step("note", cell_key(cell, "cell.json"))
    for folder in _NOTES:
        yield from (Step("note", entry.key) for entry in store.list(cell_key(cell, folder)))
    key = cell_key(cell, "trained.json")
    training = read_record(store, TrainingRecord, key)
    if training is None:
        for prefix in list_manifests(store, cell_key(cell, "checkpoints")):
            yield Step("checkpoint", prefix, unless=key)
    else:
        if "manifest" in training.weights:
            yield Step("commit", training.weights["manifest"])
        yield Step("record", key)
    for suite in document.suites:
        evaluation = read_record(store, EvaluationRecord, evaluation_key(cell, suite.id))
        if evaluation is not None:
            if evaluation.items:
                yield Step("file", str(evaluation.items["key"]), sha256=str(evaluation.items["sha256"]))
            yield Step("record", evaluation_key(cell, suite.id))


def find_unnamed(store: Store) -> tuple[list[tuple[Entry, str]], list[str]]:
    """Return the checkpoints, weights, items and trials that count no more, and the cells left alone.

    Nothing that a manifest of an unfinished cell names is among them; probes and choices serve every study. An object
    counts as young as the youngest of its commit. A manifest stands before its files, which is the order of removal.

    Returns:
        Each object with the reason; and one sentence for each cell whose records or manifests cannot be read, of which
        nothing is returned.
    """
    cells: dict[str, list[Entry]] = defaultdict(list)
    for entry in store.list("cells/"):
        cells[entry.key.split("/")[1]].append(entry)
    found: list[tuple[Entry, str]] = []
    left: list[str] = []
    for cell, entries in cells.items():
        try:
            # the listing is older than the records read here, so nothing is called unnamed that was named meanwhile
            found += [*_find_commits(store, cell, entries), *_find_items(store, cell, entries)]
        except DataMismatch as error:
            left.append(f"{cell} is left alone: {error}")
    return [*found, *_find_trials(store)], left


def _find_trials(store: Store) -> Iterator[tuple[Entry, str]]:
    """Yield what ``choices/<hash>/`` holds of a choice that is made: its record names every trial."""
    entries = list(store.list("choices/"))
    made = {entry.key for entry in entries if entry.key.count("/") == 1}
    for entry in entries:
        if f"{entry.key.rpartition('/')[0]}.json" in made:
            yield entry, "a trial of a choice that is made"


def _find_commits(store: Store, cell: str, entries: Sequence[Entry]) -> Iterator[tuple[Entry, str]]:
    record = read_record(store, TrainingRecord, cell_key(cell, "trained.json"))
    commits: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        parts = entry.key.split("/")
        if len(parts) > 4 and parts[2] in ("checkpoints", "weights"):
            commits["/".join(parts[:4])].append(entry)
    for prefix, members in commits.items():
        manifest = read_manifest(store, prefix)
        named = {manifest_key(prefix), *(f"{prefix}/{name}" for name in manifest.files)} if manifest else set()
        why = "its manifest does not name it" if manifest else "no manifest names it"
        if manifest and record:
            if prefix.split("/")[2] == "checkpoints":
                named, why = set(), "a checkpoint of a cell that has come to its end"
            elif record.weights.get("manifest") != prefix:
                named, why = set(), "the cell's record names other weights"
        newest = max(entry.modified for entry in members)
        for entry in sorted(members, key=lambda entry: entry.key != manifest_key(prefix)):
            if entry.key not in named:
                yield Entry(entry.key, entry.size, newest), why


def _find_items(store: Store, cell: str, entries: Sequence[Entry]) -> Iterator[tuple[Entry, str]]:
    folder = cell_key(cell, "evaluations/")
    inside = [entry for entry in entries if entry.key.startswith(folder)]
    records = [
        read_record(store, EvaluationRecord, entry.key) for entry in store.list(folder) if entry.key.endswith(".json")
    ]
    named = {record.items.get("key") for record in records if record is not None}
    for entry in inside:
        if entry.key.endswith(".jsonl.gz") and entry.key not in named:
            yield entry, "no evaluation names it"
