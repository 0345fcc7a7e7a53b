"""Only what nothing names goes, only when it is old, and only when asked."""

import os
import time
from pathlib import Path

import pytest
import typer
from finished_study import Finished, contents
from typer.testing import CliRunner

from kallm.commands.stored import attach
from kallm.results.inventory import find_unnamed
from kallm.results.record import cell_key
from kallm.results.verify import verify_study
from kallm.store.gc import DAY_S, find_leftovers, read_clock, remove_leftover
from kallm.store.local import FolderStore
from kallm.store.s3 import S3Store
from kallm.store.sealed import seal, unseal
from kallm.store.store import Store

pytest_plugins = ["finished", "stores"]


def age(folder: Path, days: float = 3) -> None:
    """Make every file of a folder older."""
    then = time.time() - days * DAY_S
    for path in folder.rglob("*"):
        os.utime(path, (then, then))


def collect(store: Store, older_than_s: float = DAY_S) -> set[str]:
    unnamed, left_alone = find_unnamed(store)
    assert left_alone == []
    leftovers = find_leftovers(store, unnamed, older_than_s)
    for leftover in leftovers:
        remove_leftover(store, leftover)
    return {leftover.key for leftover in leftovers}


def litter(finished: Finished) -> set[str]:
    """Leave what killed processes leave; return its keys."""
    cell = finished.cell
    checkpoint = finished.add_checkpoint(cell)
    keys = {
        cell_key(cell, "checkpoints/00000003-dead/weights.safetensors"),
        cell_key(cell, "weights/dead/weights.safetensors"),
        cell_key(cell, "evaluations/heldout.0123456789ab.items.dead.jsonl.gz"),
        ".probe-dead",
        ".probe/clock-dead",
    }
    for key in keys:
        finished.store.put(key, b"half")
    for name in (f"cells/{cell}/weights/.tmp-dead", ".tmp-dead"):
        (finished.folder / name).write_bytes(b"half")
        keys.add(name)
    return keys | {f"{checkpoint}/manifest.json", f"{checkpoint}/weights.safetensors"}


def test_a_clean_store_has_nothing_to_remove_however_old(finished: Finished) -> None:
    age(finished.folder)
    before = contents(finished.folder)
    assert collect(finished.store) == set()
    assert contents(finished.folder) == before


def test_what_nothing_names_goes_and_the_rest_keeps_its_bytes(finished: Finished) -> None:
    before = contents(finished.folder)
    keys = litter(finished)
    age(finished.folder)
    assert collect(finished.store) == keys
    assert contents(finished.folder) == before
    assert verify_study(finished.store, finished.document)[0] == []


def test_what_is_younger_than_a_day_stays(finished: Finished) -> None:
    litter(finished)
    age(finished.folder, days=0.99)
    assert collect(finished.store) == set()


def test_one_young_file_keeps_its_whole_commit(finished: Finished) -> None:
    prefix = cell_key(finished.cell, "weights/slow")
    finished.store.put(f"{prefix}/first", b"")
    age(finished.folder)
    finished.store.put(f"{prefix}/second", b"")
    assert collect(finished.store) == set()


def test_what_a_cell_in_training_needs_stays_however_old(finished: Finished) -> None:
    prefix = finished.add_checkpoint(finished.cell)
    finished.find("trained.json").unlink()
    weights = finished.find("weights/*/weights.safetensors")
    age(finished.folder)
    assert collect(finished.store) == set()
    assert weights.exists()
    finished.store.put(f"{prefix}/another", b"")
    age(finished.folder)
    assert collect(finished.store) == {f"{prefix}/another"}


def test_weights_of_the_process_that_came_second_go_manifest_first(finished: Finished, tmp_path: Path) -> None:
    own = finished.find("weights/*/manifest.json").parent
    second = own.with_name("second")
    second.mkdir()
    for name in ("weights.safetensors", "manifest.json"):
        (second / name).write_bytes((own / name).read_bytes())
    manifest = unseal((own / "manifest.json").read_bytes(), "manifest.json")
    (second / "manifest.json").write_bytes(seal(manifest | {"prefix": cell_key(finished.cell, "weights/second")}))
    unnamed, _ = find_unnamed(finished.store)
    prefix = cell_key(finished.cell, "weights/second")
    assert [entry.key for entry, _ in unnamed] == [f"{prefix}/manifest.json", f"{prefix}/weights.safetensors"]


@pytest.mark.parametrize(
    "pattern", ["trained.json", "weights/*/manifest.json", "evaluations/heldout.????????????.json"]
)
def test_a_cell_whose_records_cannot_be_read_is_left_alone(finished: Finished, pattern: str) -> None:
    litter(finished)
    finished.find(pattern).write_bytes(b"{")
    unnamed, left_alone = find_unnamed(finished.store)
    assert not unnamed
    assert len(left_alone) == 1
    assert left_alone[0].startswith(f"{finished.cell} is left alone: ")


def test_the_clock_is_the_stores_and_leaves_nothing(store: Store) -> None:
    assert abs(read_clock(store) - time.time()) < 5
    assert list(store.list()) == []


def test_objects_and_unfinished_uploads_of_a_bucket_go(bucket: str) -> None:
    store = S3Store(bucket, "some/prefix")
    kept, orphan = "cells/a/metrics/x.jsonl", "cells/a/weights/dead/weights.safetensors"
    for key in (kept, orphan):
        store.put(key, b"data")
    assert collect(store) == set()
    for place in ("some/prefix/cells/a/weights/b/weights.safetensors", "other/prefix/x"):
        store.client.create_multipart_upload(Bucket=bucket, Key=place)
    assert collect(store, older_than_s=-5.0) == {orphan, "cells/a/weights/b/weights.safetensors"}
    assert [entry.key for entry in store.list()] == [kept]
    uploads = store.client.list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert [upload["Key"] for upload in uploads] == ["other/prefix/x"]
    assert collect(store, older_than_s=-5.0) == set()


def test_an_upload_that_is_gone_already_is_no_error(bucket: str) -> None:
    store = S3Store(bucket)
    upload = store.client.create_multipart_upload(Bucket=bucket, Key="cells/a/weights/b/c")
    (leftover,) = find_leftovers(store, [], older_than_s=-5.0)
    store.client.abort_multipart_upload(Bucket=bucket, Key="cells/a/weights/b/c", UploadId=upload["UploadId"])
    remove_leftover(store, leftover)


def invoke(*arguments: str) -> str:
    app = typer.Typer(rich_markup_mode=None)
    attach(app)
    done = CliRunner().invoke(app, ["gc", *arguments])
    assert done.exception is None
    return done.stdout


def test_the_command_only_shows_unless_told(finished: Finished) -> None:
    keys = litter(finished)
    age(finished.folder)
    before = contents(finished.folder)
    size = sum(len(before[key]) for key in keys)
    shown = invoke("--store", str(finished.folder))
    assert {line.partition(": ")[0] for line in shown.splitlines()[:-1]} == keys
    assert shown.splitlines()[-1] == f"{len(keys)} objects, {size} bytes: would be removed: add --yes"
    assert contents(finished.folder) == before
    removed = invoke("--store", str(finished.folder), "--yes")
    assert removed.splitlines()[:-1] == shown.splitlines()[:-1]
    assert contents(finished.folder).keys() == before.keys() - keys
    assert FolderStore(finished.folder).get(cell_key(finished.cell, "trained.json")) is not None
