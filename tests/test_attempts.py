"""Several processes on one cell, cells that give up, and how attempts end."""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kallm.errors import DataMismatch, ExitCode, GaveUp, StorageUnavailable
from kallm.progress import Reporter, Stop
from kallm.results.record import TrainingRecord, cell_key, evaluation_key, read_record
from kallm.run.local import run_cells
from kallm.run.trail import MOST_FRUITLESS, StoreClock, Trail, name_place
from kallm.store.local import FolderStore
from kallm.store.sealed import seal
from kallm.study.plan import Plan, make_plan
from kallm.study.study import read_study

CELL = "some.seed-0.abc"
FOREIGN = {"host": "far", "place": "far away", "pid": 1}
HERE = {"host": socket.gethostname(), "place": name_place()}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors are fastest on one thread, and forked processes need it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "store")


@pytest.fixture
def plan(study_text: str) -> Plan:
    return make_plan(read_study(study_text))


def put_start(store: FolderStore, nonce: str, cell: str = CELL, age_s: float = 0, **told: object) -> None:
    put(store, cell_key(cell, "attempts", f"{nonce}.start.json"), age_s, nonce=nonce, **told)


def put_end(store: FolderStore, nonce: str, cell: str = CELL, **told: object) -> None:
    put(store, cell_key(cell, "attempts", f"{nonce}.end.json"), nonce=nonce, **told)


def put(store: FolderStore, key: str, age_s: float = 0, **told: object) -> None:
    store.put(key, seal(told))
    then = time.time() - age_s
    os.utime(store.root / key, (then, then))


def rival(store: FolderStore) -> str | None:
    return Trail(store, CELL).find_rival(StoreClock(store), own="me")


def run(plan: Plan, store: FolderStore, **options: object) -> Reporter:
    with Reporter(quiet=True) as reporter:
        run_cells(plan, list(plan.cells), store, reporter, Stop(), wait_s=0.1, **options)
    return reporter


def ends(store: FolderStore) -> list[dict[str, object]]:
    return [json.loads(path.read_bytes()) for path in sorted(store.root.glob("cells/*/attempts/*.end.json"))]


def test_a_cell_without_open_attempts_has_no_rival_and_no_object_is_written_to_see_it(store: FolderStore) -> None:
    put_start(store, "me", **FOREIGN)
    put_start(store, "1", **FOREIGN)
    put_end(store, "1", exit=0)
    assert rival(store) is None
    assert not (store.root / ".probe").exists()


@pytest.mark.parametrize(("age_s", "alive"), [(0, True), (110, True), (130, False)])
def test_a_start_elsewhere_counts_as_a_sign_for_two_minutes(store: FolderStore, age_s: float, alive: bool) -> None:
    put_start(store, "1", age_s=age_s, **FOREIGN)
    assert rival(store) == ("process 1 on far" if alive else None)
    assert not list(store.list(".probe"))


def test_a_fresh_heartbeat_keeps_the_attempt_alive_that_it_names(store: FolderStore) -> None:
    put_start(store, "1", age_s=1000, **FOREIGN)
    put(store, cell_key(CELL, "heartbeat.json"), nonce="2")
    assert rival(store) is None
    put(store, cell_key(CELL, "heartbeat.json"), nonce="1")
    assert rival(store) == "process 1 on far"
    put(store, cell_key(CELL, "heartbeat.json"), age_s=130, nonce="1")
    assert rival(store) is None


def test_the_age_is_measured_by_the_store_and_not_by_this_machine(store: FolderStore) -> None:
    class AnHourAhead(FolderStore):
        def put(self, key: str, data: bytes) -> None:
            super().put(key, data)
            os.utime(self.root / key, (time.time() + 3600, time.time() + 3600))

    ahead = AnHourAhead(store.root)
    put_start(ahead, "1", age_s=-3600 + 100, **FOREIGN)
    assert rival(ahead) is not None
    put_start(ahead, "1", age_s=-3600 + 140, **FOREIGN)
    assert rival(ahead) is None


def test_a_dead_process_of_this_machine_is_no_rival_and_a_living_one_is(store: FolderStore) -> None:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    put_start(store, "1", **HERE, pid=child)
    assert rival(store) is None
    put_start(store, "1", **HERE, pid=os.getpid())
    assert rival(store) is None
    put_start(store, "1", **HERE, pid=os.getppid())
    assert rival(store) is not None


def put_attempts(store: FolderStore, count: int, cell: str = CELL, **end: object) -> None:
    """Write attempts that came no further, all of them ended."""
    first = len(list(store.list(cell_key(cell, "attempts/"))))
    for number in range(first, first + count):
        put_start(store, f"{number:010d}", cell, reached=[0, 0, 0])
        put_end(store, f"{number:010d}", cell, **({"exit": 70, "reason": "ValueError: no"} | end))


def test_too_many_attempts_in_a_row_without_progress_give_up_and_say_why(store: FolderStore) -> None:
    put_attempts(store, MOST_FRUITLESS - 1)
    Trail(store, CELL).check_patience()
    put_start(store, "9999999999", reached=[0, 0, 0])
    with pytest.raises(GaveUp, match=r"5 attempts .*killed without a word; exit 70: ValueError: no.*delete"):
        Trail(store, CELL).check_patience()


def test_a_preemption_with_progress_begins_the_count_anew(store: FolderStore) -> None:
    put_attempts(store, MOST_FRUITLESS - 1)
    put_attempts(store, 1, exit=75, commits=1)
    put_attempts(store, MOST_FRUITLESS - 1)
    Trail(store, CELL).check_patience()


def test_an_unavailable_storage_never_counts(store: FolderStore) -> None:
    put_attempts(store, 3 * MOST_FRUITLESS, exit=76)
    Trail(store, CELL).check_patience()
    put_attempts(store, MOST_FRUITLESS)
    with pytest.raises(GaveUp):
        Trail(store, CELL).check_patience()


def test_killed_attempts_count_as_progress_where_the_next_one_started_from_further_on(store: FolderStore) -> None:
    for step in range(20):
        put_start(store, f"{step:010d}", reached=[0, 0, 10 * step])
    store.put(cell_key(CELL, "checkpoints/00000200-x/manifest.json"), b"{}")
    assert Trail(store, CELL).reached == (0, 0, 200)
    Trail(store, CELL).check_patience()


def test_a_cell_that_gives_up_does_not_stop_the_others(plan: Plan, store: FolderStore) -> None:
    put_attempts(store, MOST_FRUITLESS, plan.cells[0].id)
    with pytest.raises(GaveUp, match=plan.cells[0].id):
        run(plan, store)
    for cell in plan.cells[1:]:
        assert read_record(store, TrainingRecord, cell_key(cell.id, "trained.json")) is not None
    for path in (store.root / cell_key(plan.cells[0].id, "attempts")).iterdir():
        path.unlink()
    run(plan, store)
    assert store.get(evaluation_key(plan.cells[0].id, next(iter(plan.suites)))) is not None


def test_a_cell_that_another_works_on_is_left_to_the_end_and_waited_for(plan: Plan, store: FolderStore) -> None:
    first = plan.cells[0]
    put_start(store, "0000000001", first.id, **FOREIGN)
    done: list[bool] = []

    def after_cell() -> None:
        done.append(store.get(evaluation_key(first.id, next(iter(plan.suites)))) is not None)
        if len(done) == len(plan.cells) - 1:
            told = {"exit": 75, "reason": "stopped"}
            threading.Timer(1, put_end, (store, "0000000001", first.id), told).start()

    reporter = run(plan, store, after_cell=after_cell)
    assert done == [False, False, True]
    (waiting,) = [line for line in reporter.lines if "waiting for" in line]
    assert f"{first.id} (process 1 on far)" in waiting


def test_two_processes_share_a_study_and_do_nothing_twice(plan: Plan, store: FolderStore) -> None:
    children = []
    for _ in range(2):
        child = os.fork()
        if not child:
            code = 70
            try:
                run(plan, store)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    for cell in plan.cells:
        assert len(list(store.list(cell_key(cell.id, "attempts/")))) == 2
        assert store.get(evaluation_key(cell.id, next(iter(plan.suites)))) is not None


class Interposed(FolderStore):
    """A folder where something happens before a key with ``part`` in it is written."""

    def __init__(self, root: Path, part: str, act) -> None:
        super().__init__(root)
        self.part, self.act = part, act

    def put(self, key: str, data: bytes) -> None:
        if self.part in key:
            self.act(key)
        super().put(key, data)

    def create(self, key: str, data: bytes) -> bool:
        if self.part in key:
            self.act(key)
        return super().create(key, data)


def raise_(error: BaseException):
    def act(key: str) -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ZeroDivisionError("by nothing"), ExitCode.INTERNAL),
        (KeyboardInterrupt(), ExitCode.INTERNAL),
        (MemoryError(), ExitCode.OUT_OF_MEMORY),
        (StorageUnavailable("away"), ExitCode.STORAGE_UNAVAILABLE),
    ],
)
def test_every_end_of_an_attempt_is_told(plan: Plan, store: FolderStore, error: BaseException, code: ExitCode) -> None:
    with pytest.raises(type(error)):
        run(plan, Interposed(store.root, ".items.", raise_(error)))
    (end,) = ends(store)
    assert end["exit"] == code
    assert str(error) in str(end["reason"])
    assert end["commits"] == 0
    (log,) = store.root.glob("cells/*/logs/*.txt")
    assert log.stat().st_size > 0


def test_the_first_error_is_raised_where_the_end_cannot_be_told_either(plan: Plan, store: FolderStore) -> None:
    def refuse(key: str) -> None:
        if ".items." in key:
            refused.append(key)
        if refused and "/cells/" in f"/{key}":
            raise StorageUnavailable(f"full at {key}")

    refused: list[str] = []
    with pytest.raises(StorageUnavailable, match=r"full at .*\.items\."):
        run(plan, Interposed(store.root, "", refuse))
    assert ends(store) == []


def test_an_evaluation_finished_elsewhere_first_stands_if_it_is_whole(plan: Plan, store: FolderStore) -> None:
    run(plan, store)
    key = evaluation_key(plan.cells[0].id, next(iter(plan.suites)))
    record = json.loads(store.get(key) or b"")
    other = FolderStore(store.root.parent / "other")

    def finish_first(key_: str) -> None:
        if key_ == key:
            FolderStore.put(other, record["items"]["key"], store.get(record["items"]["key"]) or b"")
            FolderStore.put(other, key, store.get(key) or b"")

    reporter = run(plan, Interposed(other.root, "evaluations", finish_first))
    assert any("another process finished heldout first" in line for line in reporter.lines)
    assert other.get(key) == store.get(key)


def test_a_torn_evaluation_that_stands_is_refused(plan: Plan, store: FolderStore) -> None:
    def tear(key: str) -> None:
        if key.endswith(".json"):
            FolderStore.put(store, key, b"{")

    with pytest.raises(DataMismatch, match="is damaged: it is no JSON"):
        run(plan, Interposed(store.root, "evaluations", tear))


def test_start_and_heartbeat_tell_who_works_where_and_what_for(
    plan: Plan, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KALLM_IMAGE", "registry/kallm@sha256:0")
    run(plan, store)
    for cell in plan.cells:
        (path,) = (store.root / cell_key(cell.id, "attempts")).glob("*.start.json")
        start, beat = json.loads(path.read_bytes()), json.loads(store.get(cell_key(cell.id, "heartbeat.json")) or b"")
        assert start["nonce"] == beat["nonce"]
        assert start["pid"] == beat["pid"] == os.getpid()
        assert start["host"] == beat["host"] == socket.gethostname()
        assert start["reached"] == [0, 0, 0]
        assert beat["phase"] == "start"
        assert beat["code"].keys() == {"commit", "dirty"}
        assert beat["image"] == "registry/kallm@sha256:0"
    assert [end["commits"] for end in ends(store)] == [1, 2, 2]
