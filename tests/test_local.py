"""A folder as a store: half-written files, full and read-only disks."""

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stores import keys_of

from kallm.errors import StorageUnavailable, WrongConfiguration
from kallm.store.local import FolderStore
from kallm.store.opening import open_store

pytest_plugins = ["stores"]


def test_half_written_files_are_not_listed(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put("a/b", b"one")
    (tmp_path / "a" / ".tmp-0123").write_bytes(b"half")
    assert keys_of(store) == keys_of(store, "a/") == ["a/b"]


def _stopped_at(call: int, action: Callable[[], object]) -> bool:
    """Run an action in a child that ends without any clean-up before its n-th system call; say whether it did."""
    child = os.fork()
    if child == 0:
        left = iter(range(call))

        def stopping(function: Callable[..., Any]) -> Callable[..., Any]:
            def called(*arguments: Any, **options: Any) -> Any:
                if next(left, None) is None:
                    os._exit(9)
                return function(*arguments, **options)

            return called

        for name in ("fsync", "link", "replace", "unlink", "mkdir"):
            setattr(os, name, stopping(getattr(os, name)))
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("before", [None, b"before"])
@pytest.mark.parametrize("method", ["put", "create", "upload"])
def test_a_writer_stopped_anywhere_leaves_all_or_nothing(tmp_path: Path, method: str, before: bytes | None) -> None:
    (tmp_path / "in").write_bytes(b"after")
    seen = set()
    for call in range(100):
        store = FolderStore(tmp_path / f"{call}")
        if before is not None:
            store.put("a/b", before)
        actions = {
            "put": lambda store=store: store.put("a/b", b"after"),
            "create": lambda store=store: store.create("a/b", b"after"),
            "upload": lambda store=store: store.upload(tmp_path / "in", "a/b"),
        }
        stopped = _stopped_at(call, actions[method])
        seen.add(store.get("a/b"))
        assert keys_of(store) == ([] if store.get("a/b") is None else ["a/b"])
        if not stopped:
            break
    assert not stopped
    assert call >= 4
    assert seen == ({before} if method == "create" and before else {before, b"after"})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_unavailable_and_what_stood_stays(small_disk: Path, tmp_path: Path) -> None:
    store = FolderStore(small_disk / "store")
    store.put("a", b"before")
    (tmp_path / "in").write_bytes(b"x" * (2 << 20))
    big = FolderStore(tmp_path / "big")
    big.upload(tmp_path / "in", "a")
    for action in (
        lambda: store.put("a", b"x" * (2 << 20)),
        lambda: store.create("b", b"x" * (2 << 20)),
        lambda: store.upload(tmp_path / "in", "a"),
        lambda: big.download("a", small_disk / "out"),
    ):
        with pytest.raises(StorageUnavailable, match=r"disk/.*: No space left on device; free some space"):
            action()
    assert store.get("a") == b"before"
    assert keys_of(store) == ["a"]
    assert [path.name for path in small_disk.rglob("*") if path.is_file()] == ["a"]


def test_a_read_only_disk_is_unavailable_and_cannot_be_opened_for_writing(small_disk: Path) -> None:
    store = FolderStore(small_disk)
    store.put("a", b"before")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for action in (lambda: store.put("a", b""), lambda: store.create("b", b""), lambda: store.delete("a")):
        with pytest.raises(StorageUnavailable, match=r"Read-only file system; mount it writable"):
            action()
    with pytest.raises(WrongConfiguration, match=r"Read-only file system; mount it writable"):
        open_store(small_disk, writable=True)
    assert open_store(small_disk).get("a") == b"before"


def test_a_limit_on_file_sizes_is_named(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(StorageUnavailable, match="File too large; raise the limit"):
            store.put("a", b"x" * (1 << 17))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert keys_of(store) == []


def test_a_name_without_a_readable_file_is_an_error_not_a_lost_race(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("nowhere")
    with pytest.raises(StorageUnavailable, match=r"/a: the file system says that it exists"):
        FolderStore(tmp_path).create("a", b"")
