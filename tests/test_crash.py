"""Nothing that was committed is lost, repeated or half there, wherever a process or its store fails."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from drills import (
    assert_whole,
    crash_and_continue,
    flipped,
    make_sources,
    plan_tiny,
    refuse_and_continue,
    results,
    run_in_child,
    warm_up,
)
from faults import LEFT, FaultStore, Moment, leave, stall

from kallm.errors import DataMismatch, ExitCode
from kallm.results.record import EvaluationRecord, TrainingRecord, parse_record, read_items, read_record
from kallm.results.table import build_table
from kallm.store.commit import read_manifest
from kallm.store.local import FolderStore
from kallm.study.plan import Plan

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which a process that uses a GPU cannot")

STRIDE = 31
"""Of the matrix, the default run takes every 31st place; 31 and 2 (before, after) have no common divisor."""


@dataclass(frozen=True)
class Drill:
    """A plan, what an undisturbed run of it gives, and that run's store."""

    plan: Plan
    expected: dict[str, object]
    store: FolderStore
    calls: list[str]


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    """Run the tiny study undisturbed, once for the module, with a cache that all its processes share."""
    folder = tmp_path_factory.mktemp("drill")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KALLM_CACHE", str(folder / "cache"))
        plan = plan_tiny(make_sources(folder))
        warm_up(plan)
        yield undisturbed(plan, folder)


@pytest.fixture(scope="module")
def longer(drill: Drill, tmp_path_factory: pytest.TempPathFactory) -> Drill:
    """The same with enough steps for several checkpoints."""
    sources = drill.store.root.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KALLM_CACHE", str(sources / "cache"))
        plan = plan_tiny((sources / "model", sources / "dialogues"), steps=16)
        warm_up(plan)
        return undisturbed(plan, tmp_path_factory.mktemp("longer"))


def undisturbed(plan: Plan, folder: Path) -> Drill:
    store = FolderStore(folder / "store")
    assert run_in_child(plan, FaultStore(store, log=folder / "calls.txt"), folder / "said.txt") == 0
    return Drill(plan, results(plan, store), store, (folder / "calls.txt").read_text().splitlines())


@pytest.fixture(autouse=True)
def _shared_cache(drill: Drill, _own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALLM_CACHE", str(drill.store.root.parent / "cache"))


def interrupted(drill: Drill, folder: Path, call: str, skip: int = 0) -> FolderStore:
    """Return a store whose process ended after a call that matches."""
    store = FolderStore(folder / "store")
    faulty = FaultStore(store, leave, at=call, skip=skip, moment="after")
    assert run_in_child(drill.plan, faulty, folder / "first.txt") == LEFT
    return store


def with_two_checkpoints(drill: Drill, folder: Path) -> tuple[FolderStore, list[Path]]:
    """Return a store whose process ended in the middle of training, and its checkpoints, the older first."""
    store = interrupted(drill, folder, r"create .*/checkpoints/.*manifest\.json", skip=1)
    return store, sorted(path.parent for path in store.root.glob("cells/*/checkpoints/*/manifest.json"))


def places(drill: Drill, stride: int) -> list[tuple[int, Moment]]:
    """Return every ``stride``-th place of the matrix: a call and a moment."""
    both: tuple[Moment, Moment] = ("before", "after")
    return [(at, moment) for at in range(len(drill.calls)) for moment in both][::stride]


def test_a_process_ended_at_a_call_to_the_store_continues_to_the_same_end(drill: Drill, tmp_path: Path) -> None:
    for at, moment in places(drill, STRIDE):
        folder = tmp_path / f"{moment}-{at}"
        folder.mkdir()
        crash_and_continue(drill.plan, drill.expected, folder, at=at, moment=moment)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("KALLM_SLOW"), reason="takes minutes: set KALLM_SLOW=1, or scripts/drill-store")
def test_a_process_ended_at_any_call_to_the_store_continues_to_the_same_end(drill: Drill, tmp_path: Path) -> None:
    met = 0
    for at, moment in places(drill, 1):
        folder = tmp_path / f"{moment}-{at}"
        folder.mkdir()
        met += crash_and_continue(drill.plan, drill.expected, folder, at=at, moment=moment).met
        shutil.rmtree(folder)
    assert met > len(drill.calls)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
def test_a_store_that_goes_away_ends_the_run_and_leaves_nothing_half_committed(
    drill: Drill, tmp_path: Path, lasting: bool
) -> None:
    for at in range(5 if lasting else 0, len(drill.calls), 29):
        folder = tmp_path / str(at)
        folder.mkdir()
        refuse_and_continue(drill.plan, drill.expected, folder, at=at, lasting=lasting)


def test_a_store_that_takes_its_time_changes_nothing(drill: Drill, tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    slow = FaultStore(store, stall(0.05), at=0, lasting=True)
    assert run_in_child(drill.plan, slow, tmp_path / "said.txt") == 0
    assert results(drill.plan, store) == drill.expected


def damage(data: bytes, how: str) -> bytes:
    return {"flip": flipped(data, 4 * len(data) + 3), "cut": data[: len(data) // 2], "empty": b""}[how]


@pytest.mark.parametrize("how", ["flip", "cut", "empty"])
@pytest.mark.parametrize("name", ["weights.safetensors", "state.safetensors"])
def test_a_damaged_file_of_a_checkpoint_is_named_and_the_one_before_is_used(
    longer: Drill, tmp_path: Path, name: str, how: str
) -> None:
    store, (older, newest) = with_two_checkpoints(longer, tmp_path)
    (newest / name).write_bytes(damage((newest / name).read_bytes(), how))
    assert run_in_child(longer.plan, store, tmp_path / "again.txt") == 0
    said = (tmp_path / "again.txt").read_text()
    assert f"{newest.name}/{name} is damaged" in said
    assert f"continuing from step {int(older.name.partition('-')[0])}" in said
    assert results(longer.plan, store) == longer.expected
    assert_whole(longer.plan, store)


def test_without_one_good_checkpoint_training_begins_again_and_says_so(longer: Drill, tmp_path: Path) -> None:
    store, checkpoints = with_two_checkpoints(longer, tmp_path)
    for checkpoint in checkpoints:
        manifest = checkpoint / "manifest.json"
        manifest.write_bytes(damage(manifest.read_bytes(), "cut"))
    assert run_in_child(longer.plan, store, tmp_path / "again.txt") == 0
    said = (tmp_path / "again.txt").read_text()
    assert all(f"{checkpoint.name} is damaged" in said for checkpoint in checkpoints)
    assert "continuing" not in said
    assert results(longer.plan, store) == longer.expected


@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
@pytest.mark.parametrize("name", ["weights.safetensors", "manifest.json"])
def test_damaged_final_weights_are_named_and_not_scored(drill: Drill, tmp_path: Path, name: str, how: str) -> None:
    store = interrupted(drill, tmp_path, r"create .*/trained\.json")
    (path,) = store.root.glob(f"cells/*/weights/*/{name}")
    if how == "gone":
        path.unlink()
    elif (name, how) == ("manifest.json", "flip"):
        path.write_bytes(path.read_bytes().replace(b'"size": ', b'"size": 1'))
    else:
        path.write_bytes(damage(path.read_bytes(), how))
    assert run_in_child(drill.plan, store, tmp_path / "again.txt") == ExitCode.DATA_MISMATCH
    assert path.parent.name in (tmp_path / "again.txt").read_text().splitlines()[-1]
    assert not [*store.root.glob("cells/small-kan*/evaluations/*.json")]


@pytest.mark.parametrize(
    "kind", ["cell.json", "attempts/*.start.json", "heartbeat.json", "metrics/*.jsonl", "checkpoints/*/extra"]
)
def test_damaged_notes_hold_nothing_up(longer: Drill, tmp_path: Path, kind: str) -> None:
    store, checkpoints = with_two_checkpoints(longer, tmp_path)
    (checkpoints[0] / "extra").write_bytes(b"left over")
    paths = [*store.root.glob(f"cells/small-kan*/{kind}")]
    assert paths
    for path in paths:
        path.write_bytes(damage(path.read_bytes(), "cut"))
    assert run_in_child(longer.plan, store, tmp_path / "again.txt") == 0
    assert results(longer.plan, store) == longer.expected


@pytest.mark.parametrize("kind", ["trained.json", "evaluations/*.json", "evaluations/*.jsonl.gz"])
def test_a_cut_record_never_reaches_the_table(drill: Drill, tmp_path: Path, kind: str) -> None:
    shutil.copytree(drill.store.root, tmp_path / "store")
    (path,) = (tmp_path / "store").glob(f"cells/small-kan*/{kind}")
    path.write_bytes(damage(path.read_bytes(), "cut"))
    with pytest.raises(DataMismatch, match=path.name.partition(".")[0]):
        build_table(FolderStore(tmp_path / "store"), drill.plan.document)


def test_any_flipped_bit_of_the_items_is_found(drill: Drill, tmp_path: Path) -> None:
    shutil.copytree(drill.store.root, tmp_path / "store")
    (path,) = (tmp_path / "store").glob("cells/small-kan*/evaluations/*.jsonl.gz")
    record = next(path.parent.glob("*.json")).read_bytes()
    evaluation, data = parse_record(EvaluationRecord, record, "record"), path.read_bytes()
    for bit in range(0, 8 * len(data), 37):
        path.write_bytes(flipped(data, bit))
        with pytest.raises(DataMismatch):
            read_items(FolderStore(tmp_path / "store"), evaluation)


@pytest.mark.parametrize("kind", ["trained.json", "evaluations/heldout.*.json", "weights/*/manifest.json"])
def test_any_flipped_bit_of_a_record_is_found(drill: Drill, tmp_path: Path, kind: str) -> None:
    (path,) = drill.store.root.glob(f"cells/small-kan*/{kind}")
    data, key = path.read_bytes(), str(path.relative_to(drill.store.root))
    store = FolderStore(tmp_path)

    def read() -> object:
        if path.name == "manifest.json":
            return read_manifest(store, key.rpartition("/")[0])
        return read_record(store, TrainingRecord if path.name == "trained.json" else EvaluationRecord, key)

    for bit in range(0, 8 * len(data), 37):
        store.put(key, flipped(data, bit))
        with pytest.raises(DataMismatch):
            read()


def test_the_matrix_sees_every_kind_of_call(drill: Drill) -> None:
    """Guard the guard: a study that saved nothing would pass everything above."""
    methods = {call.partition(" ")[0] for call in drill.calls}
    assert methods == {"get", "put", "create", "list", "upload", "delete"}
    assert sum("/checkpoints/" in call and call.startswith("create") for call in drill.calls) >= 1
    assert json.loads((next(drill.store.root.glob("cells/small-kan*")) / "trained.json").read_text())["steps"] == 4
