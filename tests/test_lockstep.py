"""Cells that share the trunk end with the weights of cells that do not: in lockstep, on a cache, or each alone."""

import json
import os
import shutil
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_run import StopAfter

from kallm.errors import ExitCode, Preempted, WrongConfiguration
from kallm.model import cache
from kallm.model.trunk import Passage, Trunk
from kallm.progress import Reporter, Stop
from kallm.results.record import EvaluationRecord, TrainingRecord, cell_key, evaluation_key, read_record
from kallm.run.local import run_cells
from kallm.run.trail import Trail
from kallm.store.commit import commit, list_manifests
from kallm.store.local import FolderStore
from kallm.store.sealed import seal
from kallm.study.plan import Cell, Plan, make_plan
from kallm.study.study import read_study

KAN = {"ffn": "kan", "basis": "chebyshev2", "degree": 2, "hidden": 24}
VARIANTS = "variants=" + json.dumps(["baseline", "linear", {"small-kan": KAN}, "affine"])
UNCACHED, TWO_SEEDS = "train.cache_gb=0", "seeds=[0,1]"


class StopAtStep(StopAfter):
    """Asks for a stop so many polls after all cells are open."""

    def __init__(self, reporter: Reporter, polls: int) -> None:
        super().__init__(polls + 1)
        self.reporter = reporter

    def __call__(self) -> None:
        if any("in lockstep, on" in line for line in self.reporter.lines):
            super().__call__()


def planned(text: str, *overrides: str) -> Plan:
    return make_plan(read_study(text, [VARIANTS, "train.tokens=640", *overrides]))


def run(plan: Plan, store: FolderStore, stop: Stop | None = None, cells: list[Cell] | None = None) -> Reporter:
    with Reporter(quiet=True) as reporter:
        run_cells(plan, list(plan.cells) if cells is None else cells, store, reporter, stop or Stop(), wait_s=0.1)
    return reporter


def stop_in_lockstep(plan: Plan, store: FolderStore, polls: int) -> Reporter:
    with pytest.raises(Preempted), Reporter(quiet=True) as reporter:
        run_cells(plan, list(plan.cells), store, reporter, StopAtStep(reporter, polls))
    return reporter


def told(reporter: Reporter) -> list[str]:
    return [line.partition(" ")[2] for line in reporter.lines if line.partition(" ")[2].startswith("trunk: ")]


def trained(plan: Plan, store: FolderStore, cell: Cell) -> TrainingRecord | None:
    return read_record(store, TrainingRecord, cell_key(cell.id, "trained.json"))


def results(plan: Plan, store: FolderStore) -> dict[str, object]:
    """Return all that must not depend on how the trunk is shared."""
    found: dict[str, object] = {}
    for cell in plan.cells:
        record = trained(plan, store, cell)
        if record is not None:
            found[cell.id] = (record.weights.get("sha256"), record.loss_history, record.tokens, record.outcome)
        for suite in plan.suites:
            evaluation = read_record(store, EvaluationRecord, evaluation_key(cell.id, suite))
            if evaluation is not None:
                found[f"{cell.id} {suite}"] = (evaluation.scores, evaluation.weights, evaluation.items["sha256"])
    return found


def steps(store: FolderStore, cell: Cell) -> list[int]:
    """Return the steps of a cell's committed checkpoints."""
    names = list_manifests(store, cell_key(cell.id, "checkpoints"))
    return sorted(int(name.rpartition("/")[2].partition("-")[0]) for name in names)


@pytest.fixture(scope="module")
def _made() -> dict[str, FolderStore]:
    return {}


@pytest.fixture
def alone(study_text: str, _made: dict[str, FolderStore], tmp_path: Path) -> FolderStore:
    """Each cell in a run of its own, without a cache; made once."""
    if study_text not in _made:
        plan, store = planned(study_text, UNCACHED), FolderStore(tmp_path / "alone")
        for cell in plan.cells:
            once = ["trunk: one pass per batch, for 1 cell and 1 epoch read it only once"]
            assert told(run(plan, store, cells=[cell])) == (once if cell.variant.trained else [])
        _made[study_text] = store
    return _made[study_text]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count what goes through the trunk: its tokens, passage by passage."""
    found: list[int] = []
    forward = Trunk.forward

    def count(self: Trunk, passage: Passage) -> torch.Tensor:
        found.append(len(passage.input_ids))
        return forward(self, passage)

    monkeypatch.setattr(Trunk, "forward", count)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lockstep_cache_and_separate_runs_give_the_same_bits(study_text: str, tmp_path: Path, precision: str) -> None:
    changes = [TWO_SEEDS, "train.epochs=2", f"train.precision={precision}"]
    lockstep, cached = FolderStore(tmp_path / "lockstep"), FolderStore(tmp_path / "cached")
    plan = planned(study_text, *changes)
    shared = run(planned(study_text, UNCACHED, *changes), lockstep)
    assert "for 3 cells in lockstep" in told(shared)[0]
    assert sum("in lockstep, on one trunk pass per batch" in line for line in shared.lines) == 2
    assert "kept on disk" in told(run(plan, cached))[0]
    separate = FolderStore(tmp_path / "separate")
    for cell in plan.cells:
        run(planned(study_text, UNCACHED, *changes), separate, cells=[cell])
    assert results(plan, lockstep) == results(plan, cached) == results(plan, separate)
    assert len(results(plan, lockstep)) == 6 + 7


def test_in_lockstep_the_trunk_sees_each_batch_once(study_text: str, tmp_path: Path, counted: list[int]) -> None:
    plan = planned(study_text, UNCACHED, "train.epochs=2")
    store = FolderStore(tmp_path / "store")
    trained_cells = [cell for cell in plan.cells if cell.variant.trained]
    run(plan, store)
    record = trained(plan, store, trained_cells[0])
    assert record is not None
    num_rows = record.tokens // 2 // 64
    num_first = 4  # they calibrate fresh FFNs
    assert counted.count(64) == 2 * num_rows + num_first  # other lengths: held-out text, and the split's own trial


def test_one_seed_and_one_epoch_of_three_cells_equal_each_alone(
    study_text: str, tmp_path: Path, alone: FolderStore
) -> None:
    plan, store = planned(study_text, UNCACHED), FolderStore(tmp_path / "store")
    run(plan, store)
    assert results(plan, store) == results(plan, alone)
    records = [trained(plan, store, cell) for cell in plan.cells if cell.variant.trained]
    assert all(record is not None and record.shared for record in records)


@pytest.mark.parametrize("polls", [1, 4, 9, 16, 21])
def test_a_stop_saves_every_open_cell_and_the_next_run_continues(
    study_text: str, tmp_path: Path, alone: FolderStore, polls: int
) -> None:
    plan, store = planned(study_text, UNCACHED), FolderStore(tmp_path / "store")
    stop_in_lockstep(plan, store, polls)
    for cell in plan.cells[1:]:
        (end,) = (store.root / cell_key(cell.id, "attempts")).glob("*.end.json")
        assert json.loads(end.read_bytes())["exit"] == ExitCode.PREEMPTED
    if polls > 8:
        assert all(len(steps(store, cell)) == 1 for cell in plan.cells[1:])
    run(plan, store)
    assert results(plan, store) == results(plan, alone)
    for cell in plan.cells[1:]:
        assert not list(store.list(cell_key(cell.id, "checkpoints")))


def test_cells_whose_checkpoints_stand_at_different_steps_catch_up(
    study_text: str, tmp_path: Path, alone: FolderStore, counted: list[int]
) -> None:
    plan, store = planned(study_text, UNCACHED), FolderStore(tmp_path / "store")
    stop_in_lockstep(plan, store, 17)
    before = {cell.name: steps(store, cell) for cell in plan.cells[1:]}
    for path in (store.root / cell_key(plan.cells[1].id, "checkpoints")).iterdir():
        shutil.rmtree(path)
    assert before["small-kan"][0] > 1
    reporter = run(plan, store)
    assert sum("continuing from step" in line for line in reporter.lines) == 2
    assert results(plan, store) == results(plan, alone)


def test_one_cell_that_diverges_drops_out_and_the_others_go_on(
    study_text: str, tmp_path: Path, alone: FolderStore
) -> None:
    plan, store = planned(study_text, UNCACHED), FolderStore(tmp_path / "store")
    stop_in_lockstep(plan, store, 12)
    kan = plan.cells[2]
    poison(store, kan)
    with Reporter(quiet=True) as reporter:
        (cause,) = run_cells(plan, list(plan.cells), store, reporter, Stop())
    assert cause.startswith(f"{kan.id}: the loss is nan")
    record = trained(plan, store, kan)
    assert record is not None
    assert record.outcome == "diverged"
    expected = {key: value for key, value in results(plan, alone).items() if kan.id not in key}
    assert {key: value for key, value in results(plan, store).items() if kan.id not in key} == expected
    ends = [json.loads(path.read_bytes())["exit"] for path in store.root.glob("cells/*/attempts/*.end.json")]
    assert ends.count(ExitCode.DIVERGED) == 1
    assert not list(store.list(cell_key(kan.id, "checkpoints")))


def poison(store: FolderStore, cell: Cell) -> None:
    """Commit a newest checkpoint whose weights are no numbers."""
    (prefix,) = list_manifests(store, cell_key(cell.id, "checkpoints"))
    with TemporaryDirectory() as folder:
        paths = {path.name: path for path in (store.root / prefix).iterdir() if path.name != "manifest.json"}
        weights = {
            name: torch.full_like(value, torch.nan) for name, value in load_file(paths["weights.safetensors"]).items()
        }
        paths["weights.safetensors"] = Path(folder) / "weights.safetensors"
        save_file(weights, paths["weights.safetensors"])
        commit(store, f"{prefix}-poisoned", paths, {})


def test_all_open_cells_are_claimed_and_alive(study_text: str, tmp_path: Path) -> None:
    plan, store = planned(study_text, UNCACHED), FolderStore(tmp_path / "store")
    seen: list[tuple[int, int]] = []

    class Look(Stop):
        def __call__(self) -> None:
            starts = [path for path in store.root.glob("cells/*/attempts/*.start.json")
                      if not path.with_name(path.name.replace("start", "end")).exists()]  # fmt: skip
            beats = [json.loads(path.read_bytes()) for path in store.root.glob("cells/*/heartbeat.json")]
            nonces = {path.name.partition(".")[0] for path in starts}
            seen.append((len(starts), sum(beat["nonce"] in nonces for beat in beats)))

    run(plan, store, Look())
    assert max(seen) == (3, 3)


def test_a_cell_that_another_works_on_is_left_out_of_the_lockstep(
    study_text: str, tmp_path: Path, alone: FolderStore
) -> None:
    plan, store = planned(study_text, UNCACHED), FolderStore(tmp_path / "store")
    away = plan.cells[2]
    start = {"nonce": "0000000001", "host": "far", "place": "far away", "pid": 1, "reached": [0, 0, 0]}
    store.put(cell_key(away.id, "attempts", "0000000001.start.json"), seal(start))
    with Reporter(quiet=True) as reporter, pytest.raises(Preempted):
        run_cells(plan, list(plan.cells), store, reporter, WaitingStop(reporter), wait_s=0.1)
    (line,) = [line for line in reporter.lines if "in lockstep, on" in line]
    assert line.endswith("linear.seed-0, affine.seed-0")
    assert Trail(store, away.id).reached == (0, 0, 0)
    store.delete(cell_key(away.id, "attempts", "0000000001.start.json"))
    run(plan, store)
    assert results(plan, store) == results(plan, alone)


class WaitingStop(Stop):
    """Asks for a stop once a run only waits."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self.reporter = reporter

    def __call__(self) -> None:
        if any("waiting for cells" in line for line in self.reporter.lines):
            self.signal = signal.SIGTERM
        super().__call__()


def test_a_full_disk_falls_back_says_so_and_changes_no_bit(
    study_text: str, tmp_path: Path, alone: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store = planned(study_text), FolderStore(tmp_path / "store")
    monkeypatch.setenv("KALLM_CACHE", str(tmp_path / "cache"))
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 50_000, 50_000)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: usage)
    with pytest.warns(UserWarning, match="not kept"):  # the held-out text's cache
        reporter = run(plan, store)
    (sentence,) = told(reporter)
    assert "in lockstep: its output would take" in sentence
    assert f"but the disk of {tmp_path / 'cache' / 'trunk'} has room for 4e-05" in sentence
    assert results(plan, store) == results(plan, alone)


def test_a_disk_that_fills_up_while_the_trunk_runs_falls_back(
    study_text: str, tmp_path: Path, alone: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store = planned(study_text), FolderStore(tmp_path / "store")
    monkeypatch.setenv("KALLM_CACHE", str(tmp_path / "cache"))
    write, written = cache._write, []

    def fill(path: Path, place: int, data: bytes) -> None:
        written.append(path)
        if len(written) == 13:  # the eight before are the held-out text's
            raise OSError(28, os.strerror(28))
        write(path, place, data)

    monkeypatch.setattr(cache, "_write", fill)
    reporter = run(plan, store)
    assert [("kept on disk" in line, "in lockstep" in line) for line in told(reporter)] == [
        (True, False),
        (False, True),
    ]
    assert sum("the disk became full" in line for line in reporter.lines) == 1
    assert results(plan, store) == results(plan, alone)


def test_a_cache_folder_that_cannot_be_written_is_refused_before_anything_trains(
    study_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store = planned(study_text, UNCACHED), FolderStore(tmp_path / "store")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KALLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(WrongConfiguration, match="cannot be written"):
        run(plan, store, cells=list(plan.cells[1:]))
    assert not list(store.root.glob("cells/*/trained.json"))


def test_dropout_draws_from_a_cells_own_state(study_text: str, tmp_path: Path, model_folder: Path) -> None:
    folder = tmp_path / "dropping"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    changes = [UNCACHED, f'model="{folder}"']
    plan, store = planned(study_text, *changes), FolderStore(tmp_path / "store")
    stop_in_lockstep(plan, store, 13)
    run(plan, store)
    separate = FolderStore(tmp_path / "separate")
    for cell in reversed(plan.cells):
        torch.rand(3)
        run(plan, separate, cells=[cell])
    assert results(plan, store) == results(plan, separate)
    plain = FolderStore(tmp_path / "plain")
    other = planned(study_text, UNCACHED)
    run(other, plain, cells=[other.cells[1]])
    first, second = trained(plan, store, plan.cells[1]), trained(other, plain, other.cells[1])
    assert first is not None
    assert second is not None
    assert first.weights["sha256"] != second.weights["sha256"]
