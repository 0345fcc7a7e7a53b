"""One cell: train it from its last checkpoint, then evaluate it, and leave its records in the store."""

import hashlib
import time
from collections.abc import Callable

from kallm.errors import KallmError
from kallm.evaluate.suites import SUITES, Subject
from kallm.model.start import freeze, start_tail
from kallm.model.trunk import Tail
from kallm.progress import Reporter, Stop, Tracker
from kallm.results.record import EvaluationRecord, TrainingRecord, cell_key, evaluation_key, read_record, write_items
from kallm.run.attempt import Attempt
from kallm.run.finished import is_finished
from kallm.run.materials import Materials
from kallm.run.training import Training, load_trained, receipt_of
from kallm.store.store import Store
from kallm.study.plan import Cell

__all__ = ["run_cell"]


def run_cell(cell: Cell, store: Store, materials: Materials, reporter: Reporter, stop: Stop, *, shared: bool) -> None:
    """Finish one cell; what is committed already is not done again.

    Args:
        cell: the cell.
        store: where its records go.
        materials: what it shares with the other cells of this process.
        reporter: where progress is told.
        stop: polled everywhere.
        shared: whether other cells run in this process too.

    Raises:
        Preempted: a stop was requested; the state is saved.
        Diverged: training left the numbers; the record says so.
    """
    if is_finished(store, cell, list(materials.plan.suites)):
        return
    attempt = Attempt(cell, store, reporter)
    try:
        with materials.autocast():
            tail, weights = _trained_tail(cell, store, materials, reporter, stop, attempt, shared=shared)
            for suite_id in materials.plan.suites:
                if store.get(evaluation_key(cell.id, suite_id)) is None:
                    _evaluate(cell, suite_id, tail, weights, store, materials, reporter, stop, attempt)
    except KallmError as error:
        attempt.end(int(error.code), str(error))
        raise
    attempt.end(0, "done")


def _trained_tail(
    cell: Cell,
    store: Store,
    materials: Materials,
    reporter: Reporter,
    stop: Stop,
    attempt: Attempt,
    *,
    shared: bool,
) -> tuple[Tail, str]:
    """Return the cell's tail, trained here or before, and the hash of its weights."""
    tail = materials.new_tail()
    if not cell.variant.trained:
        return tail.requires_grad_(False), materials.plan.model.identity
    assert cell.seed is not None
    report = start_tail(tail, cell.variant.spec, materials.ffn_inputs, seed=cell.seed)
    stop()
    freeze(tail, materials.plan.study.trainable)
    record = read_record(store, TrainingRecord, cell_key(cell.id, "trained.json"))
    if record is None:
        reporter.say(f"{cell.label}: {report.summary}")
        record = Training(cell, tail, store, materials, reporter, stop, attempt).run(shared=shared)
    else:
        load_trained(store, record, tail)
    return tail.requires_grad_(False), record.weights["sha256"]


def _evaluate(
    cell: Cell,
    suite_id: str,
    tail: Tail,
    weights: str,
    store: Store,
    materials: Materials,
    reporter: Reporter,
    stop: Stop,
    attempt: Attempt,
) -> None:
    """Score a cell under one suite and create the record."""
    name = suite_id.rpartition(".")[0]
    prepared = materials.prepared(suite_id)
    subject = Subject(model=materials.model, tail=tail, tokenizer=materials.tokenizer)
    began = time.monotonic()
    with reporter.track(f"{name} {cell.label}", prepared.num_items, "items") as tracker:
        evaluation = SUITES[name].evaluate(prepared, subject, tracker, _polled(stop, attempt, name, tracker))
    items = write_items(evaluation.items)
    items_key = cell_key(cell.id, "evaluations", f"{suite_id}.items.{attempt.nonce}.jsonl.gz")
    store.put(items_key, items)
    record = EvaluationRecord(
        cell=cell.id,
        variant=cell.name,
        seed=cell.seed,
        suite=suite_id,
        weights=weights,
        scores=evaluation.scores,
        tasks=evaluation.tasks,
        items={"key": items_key, "sha256": hashlib.sha256(items).hexdigest(), "count": len(evaluation.items)},
        seconds=round(time.monotonic() - began, 3),
        receipt=receipt_of(materials),
    )
    store.create(evaluation_key(cell.id, suite_id), record.to_bytes())
    told = ", ".join(f"{score} {figure.value:.4g}" for score, figure in evaluation.scores.items())
    reporter.say(f"{cell.label} {name}: {told}")


def _polled(stop: Stop, attempt: Attempt, phase: str, tracker: Tracker) -> Callable[[], None]:
    """Return what a suite calls between items."""

    def poll() -> None:
        stop()
        attempt.heartbeat.beat(phase, tracker)

    return poll
