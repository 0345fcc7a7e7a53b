"""Checkpoints that are committed while training goes on, heartbeats beside the work, and the grace after a signal."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kallm import progress
from kallm.errors import ExitCode, Preempted, StorageUnavailable
from kallm.progress import Heartbeat, Reporter, Stop
from kallm.results.record import TrainingRecord, cell_key, read_record
from kallm.run.background import Background
from kallm.run.local import run_cells
from kallm.store.local import FolderStore
from kallm.study.plan import Cell, Plan, make_plan
from kallm.study.study import read_study


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors are fastest on one thread, and forked processes need it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_an_error_of_the_thread_is_raised_at_the_next_call() -> None:
    def fail() -> None:
        raise StorageUnavailable("away")

    with Background() as background:
        background.start(fail)
        while background.is_busy:
            time.sleep(0.001)
        with pytest.raises(StorageUnavailable):
            background.check()
        background.check()
        background.start(fail)
        with pytest.raises(StorageUnavailable):
            background.wait()
    with pytest.raises(StorageUnavailable), Background() as background:
        background.start(fail)


def test_an_error_of_the_thread_does_not_hide_another_one() -> None:
    def fail_twice() -> None:
        with Background() as background:
            background.start(lambda: next(iter(())))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_twice()


def test_one_job_is_in_flight_and_leaving_waits_for_it() -> None:
    done: list[int] = []
    gate = threading.Event()
    with Background() as background:
        background.start(lambda: done.append(int(gate.wait(10))))
        assert background.is_busy
        background.check()
        gate.set()
        background.start(lambda: done.append(2))
    assert done == [1, 2]


@pytest.fixture
def plan(study_text: str) -> Plan:
    return make_plan(read_study(study_text, ["train.checkpoint_s=1e-9"]))


class SlowUploads(FolderStore):
    """A folder where a checkpoint takes longer than a step, and that notes which were committed and kept."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.kept: list[int] = []
        self.threads: set[str] = set()

    def upload(self, path: Path, key: str) -> None:
        if "/checkpoints/" in key:
            self.threads.add(threading.current_thread().name)
            time.sleep(0.02)
        super().upload(path, key)

    def create(self, key: str, data: bytes) -> bool:
        won = super().create(key, data)
        if "/checkpoints/" in key:
            folder = key.rpartition("/checkpoints/")[0]
            self.kept.append(sum(entry.key.endswith("manifest.json") for entry in self.list(f"{folder}/checkpoints/")))
        return won


class StopAtStep(Stop):
    """Asks for a stop once a checkpoint of some step is committed."""

    def __init__(self, store: FolderStore, cell: Cell, step: int) -> None:
        super().__init__()
        self.store, self.prefix, self.step = store, cell_key(cell.id, "checkpoints/"), step

    def __call__(self) -> None:
        names = [entry.key.removeprefix(self.prefix) for entry in self.store.list(self.prefix)]
        if any(name.endswith("manifest.json") and int(name[:8]) >= self.step for name in names):
            self.signal = signal.SIGTERM
        super().__call__()


def train_one(plan: Plan, store: FolderStore, stop: Stop | None = None) -> TrainingRecord:
    with Reporter(quiet=True) as reporter:
        run_cells(plan, [plan.cells[2]], store, reporter, stop or Stop())
    record = read_record(store, TrainingRecord, cell_key(plan.cells[2].id, "trained.json"))
    assert record is not None
    return record


def test_checkpoints_beside_the_training_change_no_bit_of_it(study_text: str, plan: Plan, tmp_path: Path) -> None:
    undisturbed = train_one(make_plan(read_study(study_text)), FolderStore(tmp_path / "a"))
    slow = SlowUploads(tmp_path / "b")
    record = train_one(plan, slow)
    assert record.weights["sha256"] == undisturbed.weights["sha256"]
    assert all(name.startswith("kallm-background") for name in slow.threads)
    assert len(slow.kept) > 0
    assert max(slow.kept) <= 3
    for step in (1, 3):
        store = SlowUploads(tmp_path / f"stopped-{step}")
        with pytest.raises(Preempted):
            train_one(plan, store, StopAtStep(store, plan.cells[2], step))
        (end,) = store.root.glob("cells/*/attempts/*.end.json")
        assert json.loads(end.read_bytes())["commits"] >= 1
        continued = train_one(plan, store)
        assert continued.weights["sha256"] == undisturbed.weights["sha256"]
        assert continued.loss_history == undisturbed.loss_history


def test_a_checkpoint_that_cannot_be_committed_ends_the_training(plan: Plan, tmp_path: Path) -> None:
    class Full(FolderStore):
        def upload(self, path: Path, key: str) -> None:
            raise StorageUnavailable("full")

    with pytest.raises(StorageUnavailable, match="full"):
        train_one(plan, Full(tmp_path))
    (end,) = tmp_path.glob("cells/*/attempts/*.end.json")
    assert json.loads(end.read_bytes())["exit"] == ExitCode.STORAGE_UNAVAILABLE


def test_heartbeats_go_on_in_long_calls_and_survive_a_lost_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shaky(FolderStore):
        beats = 0

        def put(self, key: str, data: bytes) -> None:
            self.beats += 1
            if self.beats == 3:
                raise StorageUnavailable("away")
            super().put(key, data)

    monkeypatch.setattr(progress, "HEARTBEAT_INTERVAL_S", 0.01)
    store = Shaky(tmp_path)
    with Reporter(quiet=True) as reporter, reporter.track("study", 3, "cells"):
        heartbeat = Heartbeat(store, "heartbeat.json", {"nonce": "x"}, reporter)
        heartbeat.start()
        assert json.loads(store.get("heartbeat.json") or b"").keys() == {"nonce", "at", "phase", "sha256"}
        heartbeat.phase = "train"
        with reporter.track("train", 10, "tok", done=4):
            while store.beats < 5:
                time.sleep(0.01)
        heartbeat.stop()
    beat = json.loads(store.get("heartbeat.json") or b"")
    assert (beat["phase"], beat["step"], beat["total"], beat["unit"]) == ("train", 4, 10, "tok")
    assert sum("a heartbeat is missing" in line for line in reporter.lines) == 1


def test_a_long_upload_is_told_and_a_short_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = Reporter(quiet=True)
    for done in (1, 2, 3):
        reporter.tell_transfer("short", done * 10**6, 3 * 10**6)
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    for done in (1, 2, 3):
        reporter.tell_transfer("long", done * 10**6, 3 * 10**6)
    assert [line.partition(" ")[2] for line in reporter.lines] == [
        "uploading long: 1 of 3 MB", "uploading long: 2 of 3 MB"
    ]  # fmt: skip


@pytest.mark.parametrize(("saved", "code"), [(False, ExitCode.PREEMPTED), (True, ExitCode.DONE)])
def test_what_is_not_saved_within_the_grace_is_left(saved: bool, code: ExitCode, tmp_path: Path) -> None:
    said = tmp_path / "said"
    child = os.fork()
    if not child:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        stop = Stop(grace_s=0.2)
        stop.install()
        os.kill(os.getpid(), signal.SIGTERM)
        if saved:
            stop.disarm()
        threading.Event().wait(1 if saved else 30)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    assert ("not saved within" in said.read_text()) is not saved
