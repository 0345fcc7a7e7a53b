"""A study read again from the store: every size, every SHA-256, and the table computed anew.

What a record or a manifest names is checked against it; records are checked against the stored table, which keeps their
hashes; the table is checked against the records. Notes (attempts, the
heartbeat) carry their own hashes; what carries none and is named nowhere (logs, metrics) is not looked at.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from kallm.errors import DataMismatch
from kallm.results.record import (
    ChoiceRecord,
    EvaluationRecord,
    StudyDocument,
    TrainingRecord,
    cell_key,
    choice_key,
    evaluation_key,
    parse_record,
    study_key,
)
from kallm.results.render import render_csv, render_markdown
from kallm.results.schema import Table
from kallm.results.table import build_table
from kallm.store.commit import Manifest, fetch, list_manifests, manifest_key, read_manifest
from kallm.store.sealed import short_hash, unseal
from kallm.store.store import Store, is_key
from kallm.train.probe import ProbeRecord, probe_prefix

__all__ = ["verify_study"]


def verify_study(
    store: Store, document: StudyDocument, after_cell: Callable[[], None] = lambda: None
) -> tuple[list[str], int]:
    """Read everything that a study's records name, and compute its table again.

    Args:
        store: where the study is.
        document: names the study; its own bytes are read from the store.
        after_cell: called when a cell's objects have been read.

    Returns:
        One sentence for each difference, beginning with the key of the object; and how many objects were read.
    """
    reading = _Reading(store)
    key = study_key(document.name, document.hash, "study.json")
    stored = reading.read(StudyDocument, key, None)
    if stored is not None:
        reading.differences += _check_study(stored, document, key)
    elif store.get(key) is None:
        reading.tell(key, "is missing")
    table = reading.read_table(study_key(document.name, document.hash, "table.json"))
    told = _list_named(table) if table else {}
    for name in sorted(told):
        if not is_key(name) or store.get(name) is None:
            reading.tell(name, "is missing, but table.json names it")
    for entry in document.cells:
        reading.verify_cell(document, entry.id, told)
        after_cell()
    reading.verify_shared(document, told)
    if not reading.differences:
        reading.differences += _compare_tables(store, document)
    return reading.differences, reading.num_objects


_Kind = TypeVar("_Kind", StudyDocument, TrainingRecord, EvaluationRecord, ChoiceRecord, ProbeRecord)


class _Reading:
    """Reads objects, counts them, and keeps what is wrong with them."""

    def __init__(self, store: Store) -> None:
        self.store, self.differences, self.num_objects = store, list[str](), 0

    def tell(self, key: str, what: str) -> None:
        self.differences.append(f"{key}: {what}")

    def get(self, key: str) -> bytes | None:
        data = self.store.get(key)
        self.num_objects += data is not None
        return data

    def read(self, kind: type[_Kind], key: str, sha256: str | None) -> _Kind | None:
        """Read a record and check it against the hash that the table names; None where it is absent or malformed."""
        data = self.get(key)
        if data is None:
            return None
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            self.tell(
                key, f"its SHA-256 is {hashlib.sha256(data).hexdigest()[:12]}…, but table.json names {sha256[:12]}…"
            )
        try:
            record = parse_record(kind, data, key)
        except DataMismatch as error:
            self.tell(key, str(error).removeprefix(f"{key} "))
            return None
        return record

    def read_note(self, key: str) -> dict[str, Any] | None:
        """Read what carries its own hash and is no record; None where it is absent or damaged."""
        data = self.get(key)
        try:
            return None if data is None else unseal(data, key)
        except DataMismatch as error:
            self.tell(key, str(error).removeprefix(f"{key} "))
            return None

    def read_table(self, key: str) -> Table | None:
        """Read the stored table; None where it is absent or malformed."""
        data = self.get(key)
        try:
            return None if data is None else Table.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            self.tell(key, f"is no table: {'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}")
            return None

    def verify_cell(self, document: StudyDocument, cell: str, told: dict[str, str]) -> None:
        """Read a cell's identity, its records and what they name, and the checkpoints that are still there."""
        identity = self.read_note(cell_key(cell, "cell.json"))
        if identity is not None and not _is_identity(identity, cell):
            self.tell(
                cell_key(cell, "cell.json"), f"does not have the hash {cell.rpartition('.')[2]} of the cell's name"
            )
        for note in [*self.store.list(cell_key(cell, "attempts/")), *self.store.list(cell_key(cell, "heartbeat.json"))]:
            self.read_note(note.key)
        key = cell_key(cell, "trained.json")
        training = self.read(TrainingRecord, key, told.get(key))
        if training is not None and training.outcome == "trained":
            self._verify_weights(training, key)
        for suite in document.suites:
            key = evaluation_key(cell, suite.id)
            evaluation = self.read(EvaluationRecord, key, told.get(key))
            if evaluation is not None and evaluation.items:
                self._verify_items(evaluation, key)
        for prefix in list_manifests(self.store, cell_key(cell, "checkpoints")):
            found = [*self._find_damage(prefix)]
            if self.store.get(manifest_key(prefix)) is not None:  # else the cell has gone on and let go of it
                self.differences += found

    def verify_shared(self, document: StudyDocument, told: dict[str, str]) -> None:
        """Read what cells of many studies share: the choices of learning rates, and the probes."""
        for choice in sorted({entry.choice for entry in document.cells if entry.choice is not None}):
            key = choice_key(choice)
            chosen = self.read(ChoiceRecord, key, told.get(key))
            if chosen is not None and chosen.choice != choice:
                self.tell(key, f"is the record of choice {chosen.choice}")
        for request in sorted({entry.probe for entry in document.cells if entry.probe is not None}):
            for entry in self.store.list(probe_prefix(request)):
                probe = self.read(ProbeRecord, entry.key, told.get(entry.key))
                if probe is not None and probe.request != request:
                    self.tell(entry.key, f"is the record of request {probe.request}")

    def _verify_weights(self, record: TrainingRecord, key: str) -> None:
        prefix, sha256 = record.weights.get("manifest", ""), record.weights.get("sha256")
        if not is_key(prefix):
            self.tell(key, "names no manifest of its weights")
            return
        self.differences += self._find_damage(prefix, sha256)

    def _verify_items(self, record: EvaluationRecord, key: str) -> None:
        name = str(record.items.get("key", ""))
        data = self.get(name) if is_key(name) else None
        if data is None:
            self.tell(key, f"names the items {name!r}, which are missing")
        elif hashlib.sha256(data).hexdigest() != record.items.get("sha256"):
            self.tell(name, f"its SHA-256 is {hashlib.sha256(data).hexdigest()[:12]}…, but {key} names another")

    def _find_damage(self, prefix: str, sha256: str | None = None) -> Iterator[str]:
        """Yield what is wrong with a commit; ``sha256`` is that of its only file, where a record names it."""
        key = manifest_key(prefix)
        try:
            manifest = read_manifest(self.store, prefix)
        except DataMismatch as error:
            yield f"{key}: {str(error).removeprefix(f'{self.store.address}/{key} ')}"
            return
        if manifest is None:
            yield f"{key}: is missing"
            return
        self.num_objects += 1
        if sha256 is not None and {file.sha256 for file in manifest.files.values()} != {sha256}:
            yield f"{key}: names other weights than the cell's record"
        for name in manifest.files:
            yield from self._find_damage_of_file(manifest, name)

    def _find_damage_of_file(self, manifest: Manifest, name: str) -> Iterator[str]:
        key = f"{manifest.prefix}/{name}"
        part = manifest.model_copy(update={"files": {name: manifest.files[name]}})
        with tempfile.TemporaryDirectory() as temporary:
            try:
                fetch(self.store, part, Path(temporary))
            except DataMismatch as error:
                yield f"{key}: {str(error).removeprefix(f'{self.store.address}/{key} ')}"
            else:
                self.num_objects += 1


def _list_named(table: Table) -> dict[str, str]:
    """Return the key and SHA-256 of every record that a table names."""
    named = {key: sha256 for cell in table.cells for key, sha256 in cell.records.items()}
    for row in table.rows:
        named |= {probe.record: probe.sha256 for probe in row.probes}
        named |= {row.choice.record: row.choice.sha256} if row.choice else {}
    return named


def _check_study(stored: StudyDocument, document: StudyDocument, key: str) -> Iterator[str]:
    settings = {name: value for name, value in stored.study.items() if name != "sources"}
    value = {
        "study": settings,
        "sources": stored.study.get("sources"),
        "cells": [entry.id for entry in stored.cells],
        "suites": [suite.id for suite in stored.suites],
    }
    if (stored.name, stored.hash) != (document.name, document.hash) or short_hash(value) != document.hash:
        yield f"{key}: does not have the hash {document.hash} of the study's name"


def _is_identity(value: dict[str, Any], cell: str) -> bool:
    variant = value.pop("variant", None)
    return cell.split(".")[0] == variant and short_hash(value) == cell.rpartition(".")[2]


def _compare_tables(store: Store, document: StudyDocument) -> Iterator[str]:
    """Compute the table from the records and yield where the stored files differ from it."""
    try:
        table = build_table(store, document)
    except DataMismatch as error:
        yield str(error)
        return
    computed = {
        "table.json": table.to_bytes(),
        "table.csv": render_csv(table).encode(),
        "table.md": render_markdown(table).encode(),
    }
    for name, data in computed.items():
        key = study_key(document.name, document.hash, name)
        stored = store.get(key)
        if stored is None or stored == data:
            continue
        changes = [*_find_changes(json.loads(stored), json.loads(data), "")] if name == "table.json" else []
        yield from (f"{key}: {change}" for change in changes)
        if not changes:
            yield f"{key}: differs from what the records give ('kallm table' writes it anew)"


def _find_changes(stored: Any, computed: Any, where: str) -> Iterator[str]:
    """Yield one sentence for each leaf in which two JSON values differ."""
    if isinstance(stored, dict) and isinstance(computed, dict):
        for name in sorted(stored.keys() | computed.keys()):
            below = f"{where}.{name}" if where else name
            yield from _find_changes(stored.get(name), computed.get(name), below)
    elif isinstance(stored, list) and isinstance(computed, list) and len(stored) == len(computed):
        for index, (left, right) in enumerate(zip(stored, computed, strict=True)):
            yield from _find_changes(left, right, f"{where}[{index}]")
    elif stored != computed:
        yield f"{where} is {json.dumps(stored):.60}, but the records give {json.dumps(computed):.60}"
