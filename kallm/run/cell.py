"""One cell: train it from its last checkpoint, then evaluate it, and leave its records in the store."""

import hashlib
import time

from kallm.engine.subject import Subject
from kallm.evaluate.lookup import find_suite
from kallm.model.fit import fit_tail_
from kallm.model.retrofit import Report
from kallm.model.start import freeze, start_tail
from kallm.model.trunk import Tail
from kallm.progress import Reporter, Stop
from kallm.results.record import (
    EvaluationRecord,
    TrainingRecord,
    cell_key,
    evaluation_key,
    read_items,
    read_record,
    write_items,
)
from kallm.run.attempt import Attempt
from kallm.run.finished import is_finished
from kallm.run.materials import Materials
from kallm.run.rates import choose_rate
from kallm.run.trail import StoreClock, Trail
from kallm.run.training import Training, load_trained, receipt_of
from kallm.store.store import Store
from kallm.study.plan import Cell

__all__ = ["begin_training", "run_cell"]


def run_cell(
    cell: Cell,
    store: Store,
    materials: Materials,
    reporter: Reporter,
    stop: Stop,
    clock: StoreClock,
    *,
    shared: bool,
) -> bool:
    """Finish one cell; what is committed already is not done again.

    Args:
        cell: the cell.
        store: where its records go.
        materials: what it shares with the other cells of this process.
        reporter: where progress is told.
        stop: polled everywhere.
        clock: the store's.
        shared: whether other cells run in this process too.

    Returns:
        Whether it is finished; not so where another process began it at the same moment.

    Raises:
        Preempted: a stop was requested; the state is saved.
        Diverged: training left the numbers; the record says so.
        GaveUp: too many attempts in a row came no further.
    """
    if is_finished(store, cell, list(materials.plan.suites)):
        return True
    trail = Trail(store, cell.id)
    trail.check_patience()
    with reporter.track(cell.label, 1 + len(materials.plan.suites), "parts") as parts:
        attempt = Attempt(cell, store, reporter, trail.reached)
        if not attempt.claim(clock):
            return False
        with attempt, materials.autocast():
            materials.prepare_suites()
            tail, weights = _trained_tail(cell, store, materials, reporter, stop, attempt, shared=shared)
            parts.advance()
            for suite_id in materials.plan.suites:
                if store.get(evaluation_key(cell.id, suite_id)) is None:
                    _evaluate(cell, suite_id, tail, weights, store, materials, reporter, stop, attempt)
                parts.advance()
    return True


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
    record = read_record(store, TrainingRecord, cell_key(cell.id, "trained.json"))
    if cell.variant.trained and record is None:
        materials.workers.tell((cell.id, materials.sharing))
        training = begin_training(cell, store, materials, reporter, stop, attempt)
        record = training.run(shared=shared)
        return training.tail.requires_grad_(False), record.weights["sha256"]
    attempt.heartbeat.phase = "load"
    tail = materials.new_tail()
    if record is None:
        return tail.requires_grad_(False), materials.plan.model.identity
    _start(cell, tail, materials, reporter, stop, fitted=False)
    stop()
    freeze(tail, materials.plan.study.trainable)
    load_trained(store, record, tail)
    return tail.requires_grad_(False), record.weights["sha256"]


def begin_training(
    cell: Cell, store: Store, materials: Materials, reporter: Reporter, stop: Stop, attempt: Attempt
) -> Training:
    """Give a cell that is not trained its tail with fresh FFNs, ready to be trained.

    Raises:
        Diverged: of a grid of learning rates, every one did; the record says so.
        Preempted: a stop was requested while one was chosen.
    """

    def count() -> None:
        attempt.commits += 1

    attempt.heartbeat.phase = "learning rate"
    lr = choose_rate(cell, store, materials, reporter, stop, after_trial=count)
    attempt.heartbeat.phase = "load"
    tail = materials.new_tail()
    attempt.heartbeat.phase = "trunk"
    report = _start(cell, tail, materials, reporter, stop, fitted=True)
    stop()
    freeze(tail, materials.plan.study.trainable)
    reporter.say(f"{cell.label}: {report.summary}")
    return Training(cell, tail, store, materials, reporter, stop, attempt, lr=lr)


def _start(cell: Cell, tail: Tail, materials: Materials, reporter: Reporter, stop: Stop, *, fitted: bool) -> Report:
    """Put the cell's fresh FFNs into the tail, fitted where the study says so and nothing trained replaces them."""
    spec, seed = cell.variant.spec, cell.seed
    assert seed is not None
    if not fitted or materials.plan.study.start == "random":
        return start_tail(tail, spec, materials.ffn_inputs, seed=seed)
    rows = materials.calibration_rows
    with reporter.track(f"fit {cell.label}", len(tail.blocks), "blocks") as tracker:
        return fit_tail_(tail, spec, rows, seed=seed, stop=stop, after_block=lambda: tracker.advance(1))


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
    attempt.heartbeat.phase = f"evaluate {name}"
    prepared = materials.prepared(suite_id)
    subject = Subject(model=materials.model, tail=tail, tokenizer=materials.tokenizer)
    began = time.monotonic()
    with reporter.track(f"{name} {cell.label}", prepared.num_items, "items") as tracker:
        evaluation = find_suite(name).evaluate(prepared, subject, tracker, stop)
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
        receipt=receipt_of(materials.plan),
    )
    key = evaluation_key(cell.id, suite_id)
    if store.create(key, record.to_bytes()):
        attempt.commits += 1
    else:
        reporter.say(f"{cell.id}: another process finished {name} first; its record stands")
        standing = read_record(store, EvaluationRecord, key)
        assert standing is not None
        read_items(store, standing)
    told = ", ".join(f"{score} {figure.value:.4g}" for score, figure in evaluation.scores.items())
    reporter.say(f"{cell.label} {name}: {told}")
