"""A copied study is the study: any store to any other, in any number of tries."""

from pathlib import Path

import pytest
from faults import FaultStore, refuse
from finished_study import Finished, contents

from kallm.errors import DataMismatch, StorageUnavailable
from kallm.results.compare import compare_studies
from kallm.results.inventory import list_steps
from kallm.results.record import cell_key
from kallm.results.verify import verify_study
from kallm.store.copy import copy_objects
from kallm.store.local import FolderStore
from kallm.store.sealed import seal, unseal
from kallm.store.store import Store

pytest_plugins = ["finished", "stores"]


def copy(source: Store, target: Store, finished: Finished) -> list[str]:
    return copy_objects(source, target, list_steps(source, finished.document))


def cells_of(folder: Path) -> dict[str, bytes]:
    """Return all that a copy carries: the table is written anew, and heartbeats stay."""
    found = contents(folder)
    return {key: data for key, data in found.items() if "heartbeat" not in key and "/table." not in key
            and "report.html" not in key}  # fmt: skip


def test_a_copy_there_and_back_is_the_same_bytes(finished: Finished, store: Store, tmp_path: Path) -> None:
    written = copy(finished.store, store, finished)
    assert sorted(written) == sorted(cells_of(finished.folder))
    assert verify_study(store, finished.document)[0] == []
    comparison = compare_studies((finished.store, finished.document), (store, finished.document))
    assert comparison.differences == comparison.apart == []
    back = FolderStore(tmp_path / "back")
    copy(store, back, finished)
    assert contents(back.root) == cells_of(finished.folder)


def test_a_second_copy_writes_nothing(finished: Finished, store: Store) -> None:
    copy(finished.store, store, finished)
    assert copy(finished.store, store, finished) == []


def test_files_go_before_their_manifest_and_all_of_it_before_the_record(finished: Finished, tmp_path: Path) -> None:
    written = copy(finished.store, FolderStore(tmp_path / "b"), finished)
    mine = [key.removeprefix(cell_key(finished.cell, "")) for key in written if finished.cell in key]
    kinds = [key.split("/")[0] + "/" * key.endswith(("manifest.json", ".json")) for key in mine]
    assert kinds[-5:] == ["weights", "weights/", "trained.json/", "evaluations", "evaluations/"]


def test_broken_off_at_every_write_and_continued_it_is_whole(finished: Finished, tmp_path: Path) -> None:
    target = FolderStore(tmp_path / "b")
    tries, calls = 0, 12
    while True:
        try:
            copy(finished.store, FaultStore(target, refuse, at=calls, moment="after", lasting=True), finished)
            break
        except StorageUnavailable:
            for entry in finished.document.cells:
                if target.get(cell_key(entry.id, "trained.json")) is not None:
                    assert list(target.list(cell_key(entry.id, "weights/")))
            tries, calls = tries + 1, calls + 5
    assert tries > 5
    assert contents(target.root) == cells_of(finished.folder)


def test_another_record_in_the_target_is_named_and_nothing_is_written(finished: Finished, tmp_path: Path) -> None:
    target = FolderStore(tmp_path / "b")
    key = cell_key(finished.cell, "trained.json")
    record = unseal(finished.store.get(key), key)
    target.put(key, seal(record | {"seconds": 1.0}))
    before = contents(target.root)
    with pytest.raises(DataMismatch, match=f"{key} is another record"):
        copy(finished.store, target, finished)
    assert contents(target.root) == before


@pytest.mark.parametrize("pattern", ["weights/*/weights.safetensors", "evaluations/*.jsonl.gz"])
def test_damage_in_the_source_is_named_and_no_record_follows_it(
    finished: Finished, tmp_path: Path, pattern: str
) -> None:
    path = finished.find(pattern)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    target = FolderStore(tmp_path / "b")
    with pytest.raises(DataMismatch, match=path.name):
        copy(finished.store, target, finished)
    suites = [entry.key for entry in target.list(cell_key(finished.cell, "evaluations/"))]
    assert not [key for key in suites if key.endswith(".json")]


def test_damage_in_the_target_is_repaired(finished: Finished, tmp_path: Path) -> None:
    target = FolderStore(tmp_path / "b")
    copy(finished.store, target, finished)
    (path,) = target.root.glob(f"cells/{finished.cell}/weights/*/weights.safetensors")
    path.write_bytes(b"\0" * path.stat().st_size)
    assert copy(finished.store, target, finished) == [path.relative_to(target.root).as_posix()]
    assert contents(target.root) == cells_of(finished.folder)


def test_checkpoints_go_along_only_while_neither_side_is_trained(finished: Finished, tmp_path: Path) -> None:
    trained = FolderStore(tmp_path / "b")
    copy(finished.store, trained, finished)
    prefix = finished.add_checkpoint(finished.cell)
    assert copy(finished.store, trained, finished) == []
    finished.find("trained.json").unlink()
    assert not [key for key in copy(finished.store, trained, finished) if key.startswith(prefix)]
    new = FolderStore(tmp_path / "c")
    written = copy(finished.store, new, finished)
    assert [key for key in written if key.startswith(prefix)] == [
        f"{prefix}/weights.safetensors",
        f"{prefix}/manifest.json",
    ]


def test_logs_that_grew_in_the_target_are_kept(finished: Finished, tmp_path: Path) -> None:
    target = FolderStore(tmp_path / "b")
    copy(finished.store, target, finished)
    (path,) = target.root.glob(f"cells/{finished.cell}/metrics/*.jsonl")
    longer = path.read_bytes() + b"{}\n"
    path.write_bytes(longer)
    assert copy(finished.store, target, finished) == []
    assert path.read_bytes() == longer
