"""Two studies, or one study in two stores, figure by figure.

Figures are what a cell computed: weights, losses, scores, items, counts. What a machine adds (time, memory, receipts)
is told apart and never counts.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table as RichTable

from kallm.evaluate.score import Score
from kallm.progress import format_duration
from kallm.results.digits import format_bytes
from kallm.results.evidence import name_suite
from kallm.results.record import (
    CellEntry,
    EvaluationRecord,
    StudyDocument,
    TrainingRecord,
    cell_key,
    evaluation_key,
    read_record,
)
from kallm.store.store import Store

__all__ = ["Comparison", "compare_studies", "render_apart"]


_Record = TrainingRecord | EvaluationRecord
_NOTHING = "–"


@dataclass(frozen=True)
class Comparison:
    """What came out of a comparison."""

    differences: list[str] = field(default_factory=list)
    """One sentence for each figure that differs or has no counterpart."""
    num_equal: int = 0
    apart: list[tuple[str, str, str, str]] = field(default_factory=list)
    """(cell, what, left, right) of times, memory and receipts that differ."""


@dataclass(frozen=True)
class _Side:
    """The records of one study by the label of the cell, which both studies share."""

    entries: dict[str, CellEntry]
    trainings: dict[str, TrainingRecord]
    evaluations: dict[tuple[str, str], EvaluationRecord]


def compare_studies(
    left: tuple[Store, StudyDocument],
    right: tuple[Store, StudyDocument],
) -> Comparison:
    """Compare the records of two studies; cells are matched by variant and seed, suites by name.

    Raises:
        DataMismatch: a record is malformed.
    """
    one, two = _read_side(*left), _read_side(*right)
    differences: list[str] = []
    apart: list[tuple[str, str, str, str]] = []
    num_equal = 0
    for label in dict.fromkeys([*one.entries, *two.entries]):
        figures, others = _list_figures(one, label), _list_figures(two, label)
        for name in dict.fromkeys([*figures, *others]):
            told = _compare(figures, others, name)
            num_equal += not told
            differences += [f"{label}: {name} {told}"] if told else []
        apart += [(label, *row) for row in _compare_apart(one, two, label)]
    return Comparison(differences, num_equal, apart)


def render_apart(comparison: Comparison) -> RichTable:
    """Return times, memory and receipts that differ, as a table for the terminal."""
    table = RichTable(box=None, pad_edge=False, header_style="dim", title_justify="left")
    for name in ("cell", "not counted", "A", "B"):
        table.add_column(name, overflow="fold")
    for row in comparison.apart:
        table.add_row(*row)
    return table


def _read_side(store: Store, document: StudyDocument) -> _Side:
    side = _Side({}, {}, {})
    for entry in document.cells:
        label = entry.variant if entry.seed is None else f"{entry.variant} seed {entry.seed}"
        side.entries[label] = entry
        training = read_record(store, TrainingRecord, cell_key(entry.id, "trained.json"))
        if training is not None:
            side.trainings[label] = training
        for suite in document.suites:
            evaluation = read_record(store, EvaluationRecord, evaluation_key(entry.id, suite.id))
            if evaluation is not None:
                side.evaluations[label, name_suite(document, suite)] = evaluation
    return side


def _list_figures(side: _Side, label: str) -> dict[str, Any]:
    """Return the figures of a cell by name."""
    if label not in side.entries:
        return {}
    figures: dict[str, Any] = {"parameters": side.entries[label].parameters.model_dump()}
    training = side.trainings.get(label)
    if training is not None:
        figures |= {
            "outcome": training.outcome,
            "weights": training.weights.get("sha256"),
            "loss history": training.loss_history,
            "steps": training.steps,
            "tokens": training.tokens,
            "supervised tokens": training.supervised_tokens,
        }
    for (cell, suite), record in side.evaluations.items():
        if cell == label:
            figures |= _list_scores(suite, record)
    return figures


def _list_scores(suite: str, record: EvaluationRecord) -> dict[str, Any]:
    figures: dict[str, Any] = {f"{suite} weights": record.weights, f"{suite} items": record.items.get("sha256")}
    figures |= {f"{suite} {name}": score for name, score in record.scores.items()}
    for task, scores in record.tasks.items():
        figures |= {f"{suite} {task} {name}": score for name, score in scores.items()}
    return figures


def _compare(figures: dict[str, Any], others: dict[str, Any], name: str) -> str:
    """Say how one figure differs; an empty text where it does not."""
    if name not in others or name not in figures:
        return f"is only in {'A' if name in figures else 'B'}"
    one, two = figures[name], others[name]
    if one == two:
        return ""
    if isinstance(one, Score) and isinstance(two, Score):
        return _compare_scores(one, two)
    if name == "loss history":
        return _compare_losses(one, two)
    if isinstance(one, str) and isinstance(two, str):
        return f"are {one:.12} and {two:.12}" if name.endswith(("weights", "items")) else f"is {one} and {two}"
    return f"is {json.dumps(one)} and {json.dumps(two)}"


def _compare_scores(one: Score, two: Score) -> str:
    if one.value != two.value:
        return f"is {one.value:.9g} and {two.value:.9g} {one.unit}: they differ by {abs(one.value - two.value):.3g}"
    changed = [name for name in Score.model_fields if getattr(one, name) != getattr(two, name)]
    return f"has the same value, but another {', '.join(changed)}"


def _compare_losses(one: list[tuple[int, float]], two: list[tuple[int, float]]) -> str:
    first, second = dict(one), dict(two)
    if first.keys() != second.keys():
        return f"has {len(one)} and {len(two)} points, at other steps"
    gaps = {step: abs(first[step] - second[step]) for step in first if first[step] != second[step]}
    widest = max(gaps, key=lambda step: gaps[step])
    return f"differs at {len(gaps)} of {len(one)} points, by at most {gaps[widest]:.3g} (step {widest})"


def _compare_apart(one: _Side, two: _Side, label: str) -> Iterator[tuple[str, str, str]]:
    """Yield (what, left, right) for times, memory and receipts that differ."""
    pairs: list[tuple[str, _Record | None, _Record | None]] = [
        ("training", one.trainings.get(label), two.trainings.get(label))
    ]
    suites = dict.fromkeys(suite for cell, suite in one.evaluations if cell == label)
    pairs += [(suite, one.evaluations[label, suite], two.evaluations.get((label, suite))) for suite in suites]
    for name, left, right in pairs:
        if left is None or right is None:
            continue
        figures, others = _list_apart(left), _list_apart(right)
        for what in dict.fromkeys([*figures, *others]):
            pair = figures.get(what, _NOTHING), others.get(what, _NOTHING)
            if pair[0] != pair[1]:
                yield f"{name} {what}", *pair


def _list_apart(record: _Record) -> dict[str, str]:
    told = {"time": format_duration(record.seconds)}
    if isinstance(record, TrainingRecord):
        told |= {
            "speed": f"{record.tokens_per_s:.4g} tok/s",
            "memory": format_bytes(record.peak_bytes),
            "attempts": str(record.attempts),
            "trunk": "shared" if record.shared else "its own",
        }
    return told | _flatten(record.receipt, "receipt")


def _flatten(value: Any, where: str) -> dict[str, str]:
    if isinstance(value, dict):
        return {name: text for key in value for name, text in _flatten(value[key], f"{where}.{key}").items()}
    return {where: json.dumps(value)}
