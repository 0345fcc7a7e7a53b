"""What every store promises: the contract, run over a folder, moto and a real server."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from stores import keys_of

from kallm.store.store import Store, is_key

pytest_plugins = ["stores"]


# every store


def test_what_is_put_is_what_is_got(store: Store) -> None:
    store.put("a/b c/ü+%20.json", b"\x00one")
    store.put("a/empty", b"")
    assert store.get("a/b c/ü+%20.json") == b"\x00one"
    assert store.get("a/empty") == b""
    assert keys_of(store) == ["a/b c/ü+%20.json", "a/empty"]


def test_put_replaces(store: Store) -> None:
    store.put("a/b", b"a longer one")
    store.put("a/b", b"two")
    assert store.get("a/b") == b"two"
    assert [(entry.key, entry.size) for entry in store.list()] == [("a/b", 3)]


def test_missing_objects_are_none_and_their_deletion_nothing(store: Store, tmp_path: Path) -> None:
    store.put("a/b", b"one")
    for key in ("c", "a", "a/c", "d/e/f"):
        assert store.get(key) is None
        assert store.download(key, tmp_path / "out") is False
        store.delete(key)
    assert not (tmp_path / "out").exists()
    assert keys_of(store) == ["a/b"]


def test_create_wins_once_and_equal_bytes_have_won(store: Store) -> None:
    assert store.create("a/b", b"one") is True
    assert store.create("a/b", b"two") is False
    assert store.create("a/b", b"one") is True
    assert store.get("a/b") == b"one"


def test_create_after_a_deletion_wins_again(store: Store) -> None:
    assert store.create("a", b"one")
    store.delete("a")
    assert store.get("a") is None
    assert store.create("a", b"two")
    assert store.get("a") == b"two"


def test_32_creators_of_4_keys_give_4_winners(store: Store) -> None:
    def write(writer: int) -> tuple[str, bytes, bool]:
        key, data = f"race/{writer % 4}", b"%d" % writer
        return key, data, store.create(key, data)

    with ThreadPoolExecutor(32) as pool:
        results = [*pool.map(write, range(32))]
    winners = {key: data for key, data, won in results if won}
    assert sum(won for *_, won in results) == 4
    assert {key: store.get(key) for key in winners} == winners


def test_the_listing_is_sorted_by_bytes_and_true_to_the_prefix(store: Store) -> None:
    keys = ["a-b", "a.b", "a/b.c", "a/b/c/d", "a/b0", "a/b-c/d", "a0", "b/é", "b/z", "ab/c"]
    for number, key in enumerate(keys):
        store.put(key, b"x" * number)
    for prefix in ("", "a", "a/", "a/b", "a/b/", "b/", "zz", "zz/", "a-b/"):
        expected = sorted((key for key in keys if key.startswith(prefix)), key=str.encode)
        assert keys_of(store, prefix) == expected, prefix
    assert {entry.key: entry.size for entry in store.list()} == {key: size for size, key in enumerate(keys)}


def test_the_listing_knows_when_an_object_was_written(store: Store, tmp_path: Path) -> None:
    (tmp_path / "clock").write_bytes(b"")
    store.put("a", b"one")
    assert abs(next(store.list()).modified - (tmp_path / "clock").stat().st_mtime) < 5


@pytest.mark.parametrize("size", [0, 1000, (16 << 20) + 12345])
def test_a_file_comes_back_as_it_went(store: Store, tmp_path: Path, size: int) -> None:
    data = (os.urandom(1 << 16) * (size // (1 << 16) + 1))[:size]
    (tmp_path / "in").write_bytes(data)
    store.upload(tmp_path / "in", "big/file")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_bytes(b"what was there")
    assert store.download("big/file", tmp_path / "out" / "file") is True
    assert (tmp_path / "out" / "file").read_bytes() == data
    assert store.get("big/file") == data
    assert os.listdir(tmp_path / "out") == ["file"]


def test_what_is_no_key_is_refused(store: Store) -> None:
    for key in ("", "/a", "a/", "a//b", "../a", "a/..", "./a", "a\\b", "a\0", ".tmp-1", "a/.tmp-1"):
        assert not is_key(key)
        with pytest.raises(AssertionError):
            store.put(key, b"")
    assert all(map(is_key, ("a", "a/b", "...", ".a/b..", "a b/ü")))
