"""The rows and columns of the table: one row per variant, one column per score of a suite."""

from collections import defaultdict

import numpy as np

from kallm.results.alone import find_rate, make_choice, make_probes
from kallm.results.evidence import Evidence, name_suite
from kallm.results.record import CellEntry, EvaluationRecord, SuiteEntry
from kallm.results.schema import Column, Estimate, Reference, Row
from kallm.results.statistics import find_interval, item_error

__all__ = ["estimate", "make_columns", "make_references", "make_rows"]

_TITLES = {
    "cross_entropy": "cross-entropy",
    "perplexity": "perplexity",
    "bits_per_byte": "bits/byte",
    "acc": "accuracy",
    "acc_norm": "accuracy, normalised",
    "parse_failures": "parse failures",
    "kl": "KL to the original",
    "kl_spread": "KL, spread",
    "lines": "straight lines",
    "strongest_1": "strongest 1 %",
    "strongest_10": "strongest 10 %",
}
_LOWER = ("cross_entropy", "perplexity", "bits_per_byte", "parse_failures", "kl")
_HIGHER = ("acc", "acc_norm")
_SHARES = ("acc", "acc_norm", "parse_failures")
_NARROW = ("cross_entropy", "acc", "parse_failures", "kl")
_ORDER = {name: rank for rank, name in enumerate(_TITLES)}
_REFERENCE_SCORES = {"acc", "acc_norm"}

_Values = list[tuple[int | None, float]]


def estimate(values: _Values, *, items: int | None = None, item_error: float | None = None) -> Estimate:
    """Return the mean over seeds with its interval."""
    found = find_interval([value for _, value in values])
    return Estimate(mean=found.mean, half=found.half, values=values, items=items, item_error=item_error)


def make_columns(evidence: Evidence) -> list[Column]:
    """Return a column for every score that any record names; cross-entropy leads, then the study's order."""
    columns = []
    for suite in evidence.document.suites:
        scores = {}
        for entry in evidence.document.cells:
            record = evidence.evaluations.get((entry.id, suite.id))
            scores.update(record.scores if record else {})
        for name in sorted(scores, key=lambda score: (_ORDER.get(score, len(_ORDER)), score)):
            columns.append(
                _make_column(name_suite(evidence.document, suite), name, scores[name].unit, len(scores) == 1)
            )
    return sorted(columns, key=lambda column: column.score not in ("cross_entropy", "perplexity", "bits_per_byte"))


def make_rows(evidence: Evidence, columns: list[Column], *, done: set[str]) -> list[Row]:
    """Return one row per variant, in the study's order; a score is averaged over the seeds that have it."""
    return [_make_row(evidence, variant, columns, done) for variant in evidence.list_variants()]


def make_references(evidence: Evidence) -> list[Reference]:
    """Return chance, majority class and empty reply, as macro means over tasks like the scores beside them."""
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    tasks: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for suite in evidence.document.suites:
        name = name_suite(evidence.document, suite)
        named = {
            score for (_, key), record in evidence.evaluations.items() if key == suite.id for score in record.scores
        }
        for kind, by_task in evidence.references.get(suite.id, {}).items():
            for score in sorted(_REFERENCE_SCORES & named):
                scores[kind][f"{name}.{score}"] = sum(by_task.values()) / len(by_task)
                tasks[kind][f"{name}.{score}"] = by_task
    order = ("chance", "majority", "empty reply")
    return [Reference(name=kind, scores=scores[kind], tasks=tasks[kind]) for kind in order if kind in scores]


def _make_column(suite: str, score: str, unit: str, alone: bool) -> Column:
    percent = score in _SHARES and unit != "%"
    return Column(
        key=f"{suite}.{score}",
        suite=suite,
        score=score,
        title=_TITLES.get(score, score),
        unit="%" if percent else unit,
        percent=percent,
        better="lower" if score in _LOWER else "higher" if score in _HIGHER else None,
        lead=score in _NARROW or alone,
    )


def _make_row(evidence: Evidence, variant: str, columns: list[Column], done: set[str]) -> Row:
    cells = evidence.find_cells(variant)
    trainings = [(cell.seed, evidence.trainings[cell.id]) for cell in cells if cell.id in evidence.trainings]
    finished = [(seed, record) for seed, record in trainings if record.outcome == "trained"]
    scores: dict[str, Estimate] = {}
    tasks: dict[str, dict[str, Estimate]] = {}
    replies: dict[str, dict[str, float]] = {}
    for suite in evidence.document.suites:
        records = [(cell, evidence.evaluations.get((cell.id, suite.id))) for cell in cells]
        present = [(cell, record) for cell, record in records if record is not None]
        if not present:
            continue
        name = name_suite(evidence.document, suite)
        scores |= _average_scores(evidence, suite, name, present)
        tasks |= _average_tasks(name, present)
        found = [evidence.answers[cell.id, suite.id] for cell, _ in present if (cell.id, suite.id) in evidence.answers]
        if found and found[0].replies:
            replies[name] = {s: sum(each.replies[s] for each in found) / len(found) for s in found[0].replies}
    order = [column.key for column in columns if column.key in scores]
    seconds: _Values = [(seed, record.seconds) for seed, record in finished]
    return Row(
        variant=variant,
        trained=cells[0].trained,
        parameters=cells[0].parameters,
        seeds_done=sum(cell.id in done for cell in cells),
        seeds_planned=len(cells),
        tokens=cells[0].tokens,
        steps=cells[0].steps,
        seconds=estimate(seconds) if seconds else None,
        shared=any(record.shared for _, record in finished),
        lr=find_rate(evidence, cells[0]),
        choice=make_choice(evidence, cells[0].choice),
        probes=make_probes(evidence, cells[0].probe),
        scores={key: scores[key] for key in order},
        tasks=tasks,
        replies=replies,
    )


def _average_scores(
    evidence: Evidence, suite: SuiteEntry, name: str, present: list[tuple[CellEntry, EvaluationRecord]]
) -> dict[str, Estimate]:
    found = {}
    for score in sorted({score for _, record in present for score in record.scores}):
        having = [(cell, record) for cell, record in present if score in record.scores]
        values = [(cell.seed, record.scores[score].value) for cell, record in having]
        answers = [evidence.answers[cell.id, suite.id] for cell, _ in having if (cell.id, suite.id) in evidence.answers]
        error = None
        if answers and score in answers[0].scores and having[0][1].scores[score].unit != "%":
            stacked = np.stack([entry.scores[score] for entry in answers])
            error = item_error(stacked, answers[0].weights, answers[0].strata)
        found[f"{name}.{score}"] = estimate(values, items=having[0][1].scores[score].n, item_error=error)
    return found


def _average_tasks(name: str, present: list[tuple[CellEntry, EvaluationRecord]]) -> dict[str, dict[str, Estimate]]:
    values: dict[str, dict[str, _Values]] = defaultdict(lambda: defaultdict(list))
    items: dict[str, int] = {}
    for cell, record in present:
        for task, scores in sorted(record.tasks.items()):
            for score, told in sorted(scores.items()):
                values[f"{name}.{score}"][task].append((cell.seed, told.value))
                items[task] = told.n
    return {
        key: {task: estimate(each, items=items[task]) for task, each in by_task.items()}
        for key, by_task in values.items()
    }
