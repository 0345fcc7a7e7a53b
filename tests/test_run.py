"""Whole studies on a tiny model: interrupted, repeated, damaged, diverged."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kallm.errors import ExitCode, Preempted
from kallm.progress import Reporter, Stop
from kallm.results.record import EvaluationRecord, TrainingRecord, cell_key, evaluation_key, read_record
from kallm.results.table import build_table, write_table
from kallm.run.local import run_cells
from kallm.store.opening import open_store
from kallm.store.store import Store
from kallm.study.plan import Plan, make_plan
from kallm.study.study import read_study

pytest_plugins = ["stores"]


class StopAfter(Stop):
    """Asks for a stop at the given poll, as a signal would."""

    def __init__(self, polls: int) -> None:
        super().__init__()
        self.left = polls

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.signal = signal.SIGTERM
        super().__call__()


def run(plan: Plan, store: Store, stop: Stop | None = None) -> Reporter:
    with Reporter(quiet=True) as reporter:
        run_cells(plan, list(plan.cells), store, reporter, stop or Stop())
    return reporter


def results(plan: Plan, store: Store) -> dict[str, object]:
    """Return all that must not depend on interruptions: weights by hash, losses and scores."""
    found: dict[str, object] = {}
    for cell in plan.cells:
        record = read_record(store, TrainingRecord, cell_key(cell.id, "trained.json"))
        if record is not None:
            found[cell.id] = (record.weights["sha256"], record.loss_history, record.tokens)
        for suite in plan.suites:
            evaluation = read_record(store, EvaluationRecord, evaluation_key(cell.id, suite))
            assert evaluation is not None
            found[f"{cell.id} {suite}"] = (evaluation.scores, evaluation.weights, evaluation.items["sha256"])
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """Keep one uninterrupted run for the module, made when first asked for."""
    made: dict[str, tuple[Plan, Store, Path]] = {}

    def make(text: str) -> tuple[Plan, Store, Path]:
        if text not in made:
            folder = tmp_path_factory.mktemp("store")
            plan, store = make_plan(read_study(text)), open_store(folder, writable=True)
            run(plan, store)
            made[text] = (plan, store, folder)
        return made[text]

    return make


def test_training_learns_and_the_record_counts_it(study_text: str, finished) -> None:
    plan, store, _ = finished(study_text)
    for cell in plan.cells[1:]:
        record = read_record(store, TrainingRecord, cell_key(cell.id, "trained.json"))
        assert record is not None
        losses = [loss for _, loss in record.loss_history]
        assert sum(losses[-2:]) < sum(losses[:2])
        assert record.steps == plan.study.train.num_steps(record.tokens // 64)
        assert record.supervised_tokens < 1024 <= record.tokens


def test_a_second_run_trains_nothing_and_changes_no_byte(study_text: str, finished) -> None:
    plan, store, folder = finished(study_text)
    write_table(store, plan.document, build_table(store, plan.document))
    before = contents(folder)
    reporter = run(plan, store)
    assert write_table(store, plan.document, build_table(store, plan.document)) == []
    assert contents(folder) == before
    assert "nothing to train" in reporter.lines[-1]


def test_a_new_seed_adds_cells_and_retrains_none(study_text: str, tmp_path: Path) -> None:
    plan = make_plan(read_study(study_text))
    store = open_store(tmp_path, writable=True)
    run(plan, store)
    before = contents(tmp_path)
    run(make_plan(read_study(study_text, ["seeds=[0,1]"])), store)
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len({name.split("/")[1] for name in after if name.startswith("cells/")}) == 5


@pytest.mark.parametrize("polls", [1, 2, 9, 14, 17, 23, 30, 38, 47])
def test_stopped_and_continued_equals_uninterrupted_bit_for_bit(
    study_text: str, finished, tmp_path: Path, polls: int
) -> None:
    plan, undisturbed, _ = finished(study_text)
    store = open_store(tmp_path, writable=True)
    with pytest.raises(Preempted):
        run(plan, store, StopAfter(polls))
    run(plan, store)
    assert results(plan, store) == results(plan, undisturbed)
    assert not list(store.list(cell_key(plan.cells[1].id, "checkpoints")))


def test_stopped_at_every_step_still_ends_equal(study_text: str, finished, tmp_path: Path) -> None:
    plan, undisturbed, _ = finished(study_text)
    store = open_store(tmp_path, writable=True)
    stops = 0
    for _ in range(60):
        try:
            run(plan, store, StopAfter(12))
            break
        except Preempted:
            stops += 1
    assert stops > 3
    assert results(plan, store) == results(plan, undisturbed)


def test_a_damaged_checkpoint_is_named_and_not_used(study_text: str, finished, tmp_path: Path) -> None:
    plan, undisturbed, _ = finished(study_text)
    store = open_store(tmp_path, writable=True)
    with pytest.raises(Preempted):
        run(plan, store, StopAfter(23))
    (weights,) = tmp_path.glob("cells/*/checkpoints/*/weights.safetensors")
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    reporter = run(plan, store)
    assert any("is damaged, going back" in line for line in reporter.lines)
    assert results(plan, store) == results(plan, undisturbed)


def test_each_cell_alone_gives_what_the_whole_study_gives(study_text: str, finished, tmp_path: Path) -> None:
    plan, undisturbed, _ = finished(study_text)
    store = open_store(tmp_path, writable=True)
    for cell in reversed(plan.cells):
        with Reporter(quiet=True) as reporter:
            run_cells(plan, [cell], store, reporter, Stop())
    assert results(plan, store) == results(plan, undisturbed)


def test_a_study_in_a_bucket_equals_one_in_a_folder(study_text: str, finished, store: Store) -> None:
    plan, undisturbed, _ = finished(study_text)
    with pytest.raises(Preempted):
        run(plan, store, StopAfter(23))
    run(plan, store)
    assert results(plan, store) == results(plan, undisturbed)
    table, other = (build_table(place, plan.document) for place in (store, undisturbed))
    assert [row.scores for row in table.rows] == [row.scores for row in other.rows]


def test_cells_of_one_seed_see_the_same_batches(study_text: str) -> None:
    recipe = make_plan(read_study(study_text)).study.train
    assert [recipe.rows_of(step, 16, 0) for step in range(8)] == [recipe.rows_of(step, 16, 0) for step in range(8)]
    assert recipe.rows_of(0, 16, 0) != recipe.rows_of(0, 16, 1)


def test_a_cell_that_leaves_the_numbers_is_recorded_and_the_others_finish(study_text: str, tmp_path: Path) -> None:
    plan = make_plan(read_study(study_text, ["train.lr=1e30"]))
    store = open_store(tmp_path, writable=True)
    run(plan, store)
    outcomes = {cell.name: read_record(store, TrainingRecord, cell_key(cell.id, "trained.json")) for cell in plan.cells}
    assert outcomes["baseline"] is None
    assert outcomes["linear"].outcome == outcomes["small-kan"].outcome == "diverged"
    assert "the loss is" in outcomes["linear"].cause
    table = build_table(store, plan.document)
    assert [cell.state for cell in table.cells] == ["done", "diverged", "diverged"]


def test_sigterm_leaves_with_75_and_the_same_command_finishes(study_text: str, finished, tmp_path: Path) -> None:
    plan, undisturbed, _ = finished(study_text)
    study = tmp_path / "study.yaml"
    study.write_text(study_text)
    command = [sys.executable, "-m", "kallm.cli", "run", str(study), "--store", str(tmp_path / "store"), "--no-probe"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "store").glob("cells/linear*/attempts/*.start.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    if process.returncode != 0:  # a study of one second may have finished before the signal was seen
        assert process.returncode == ExitCode.PREEMPTED, told
        assert "the same command continues from here" in told
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert results(plan, open_store(tmp_path / "store")) == results(plan, undisturbed)
    (table,) = (tmp_path / "store").glob("studies/tiny.*/table.json")
    assert len(json.loads(table.read_text())["rows"]) == 3
    assert os.path.getsize(table.with_name("report.html")) > 1000
