"""Commits are whole or absent, say the same when repeated, and are never believed without their hashes."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kallm.errors import DataMismatch, StorageUnavailable
from kallm.store.commit import Manifest, commit, fetch, list_manifests, read_manifest
from kallm.store.local import FolderStore
from kallm.store.sealed import seal, unseal
from kallm.store.store import Entry, Store

pytest_plugins = ["stores"]

META = {"step": 3, "rng": [1, 2], "loss": 0.1, "none": None}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Three files, one of them in a folder and one empty."""
    contents = {"model.safetensors": b"weights" * 1000, "state/rng.bin": b"\x00\x01", "empty": b""}
    paths = {name: tmp_path / "source" / name.replace("/", "-") for name in contents}
    (tmp_path / "source").mkdir()
    for name, data in contents.items():
        paths[name].write_bytes(data)
    return paths


def _bytes(paths: dict[str, Path]) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in paths.items()}


class StoppingStore:
    """A store that fails from its n-th call on; half of the failing calls reach the store before the reply is lost."""

    def __init__(self, store: Store, calls: int, *, lose_reply: bool) -> None:
        """Wrap a store."""
        self.address = store.address
        self._store, self._left, self._lose_reply = store, calls, lose_reply
        self.stopped = False

    def _call(self, method: str, *arguments: Any) -> Any:
        self._left -= 1
        if self._left >= 0:
            return getattr(self._store, method)(*arguments)
        if self._left == -1 and self._lose_reply:
            getattr(self._store, method)(*arguments)
        self.stopped = True
        raise StorageUnavailable("the store went away")

    def get(self, key: str) -> bytes | None:
        """Get, or fail."""
        return self._call("get", key)

    def put(self, key: str, data: bytes) -> None:
        """Put, or fail."""
        self._call("put", key, data)

    def create(self, key: str, data: bytes) -> bool:
        """Create, or fail."""
        return self._call("create", key, data)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """List, or fail."""
        return self._call("list", prefix)

    def upload(self, path: Path, key: str) -> None:
        """Upload, or fail."""
        self._call("upload", path, key)

    def download(self, key: str, path: Path) -> bool:
        """Download, or fail."""
        return self._call("download", key, path)

    def delete(self, key: str) -> None:
        """Delete, or fail."""
        self._call("delete", key)


def test_what_is_committed_is_what_is_fetched(store: Store, files: dict[str, Path], tmp_path: Path) -> None:
    manifest = commit(store, "cells/x/checkpoints/3-ab", files, META)
    assert read_manifest(store, "cells/x/checkpoints/3-ab") == manifest
    assert (manifest.prefix, manifest.meta) == ("cells/x/checkpoints/3-ab", META)
    assert _bytes(fetch(store, manifest, tmp_path / "here")) == _bytes(files)


def test_the_manifest_is_written_in_one_way(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    store = FolderStore(tmp_path / "store")
    commit(store, "p", {"a": path}, {"z": 1, "b": (1, 2)})
    # the SHA-256 of "abc" is the example of FIPS 180-2, appendix B.1
    whole = (
        b'{\n  "files": {\n    "a": {\n      "sha256": '
        b'"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",\n      "size": 3\n    }\n  },\n'
        b'  "format": 1,\n  "meta": {\n    "b": [\n      1,\n      2\n    ],\n    "z": 1\n  },\n  "prefix": "p"\n}\n'
    )
    compact = json.dumps(json.loads(whole), sort_keys=True, separators=(",", ":")).encode()
    own = b',\n  "sha256": "%s"\n}\n' % hashlib.sha256(compact).hexdigest().encode()
    assert store.get("p/manifest.json") == whole.removesuffix(b"\n}\n") + own


def test_a_second_commit_does_nothing_and_another_is_refused(store: Store, files: dict[str, Path]) -> None:
    manifest = commit(store, "p", files, META)
    written = [*store.list()]
    assert commit(store, "p", files, META) == manifest
    assert [*store.list()] == written
    with pytest.raises(DataMismatch, match=r"p/manifest.json stands already with other content"):
        commit(store, "p", files, {**META, "step": 4})
    files["empty"].write_bytes(b"no more")
    with pytest.raises(DataMismatch, match=r"p/manifest.json stands already with other content"):
        commit(store, "p", files, META)
    assert [*store.list()] == written


def test_what_has_no_manifest_is_not_there(store: Store, files: dict[str, Path]) -> None:
    store.upload(files["empty"], "c/2-b/empty")
    commit(store, "c/1-a", files, {})
    commit(store, "c/3-c", files, {})
    commit(store, "cc", files, {})
    assert read_manifest(store, "c/2-b") is None
    assert list_manifests(store, "c") == ["c/1-a", "c/3-c"]
    assert list_manifests(store, "") == ["c/1-a", "c/3-c", "cc"]
    assert list_manifests(store, "nothing") == []


@pytest.mark.parametrize("lose_reply", [False, True])
def test_a_commit_stopped_at_any_call_is_whole_or_absent_and_can_be_done_again(
    files: dict[str, Path], tmp_path: Path, lose_reply: bool
) -> None:
    for calls in range(100):
        store = FolderStore(tmp_path / f"{calls}")
        stopping = StoppingStore(store, calls, lose_reply=lose_reply)
        try:
            commit(stopping, "p", files, META)
        except StorageUnavailable:
            assert stopping.stopped
        manifest = read_manifest(store, "p")
        assert list_manifests(store, "") == ([] if manifest is None else ["p"])
        if manifest is not None:
            assert _bytes(fetch(store, manifest, tmp_path / "here")) == _bytes(files)
        assert commit(store, "p", files, META) == read_manifest(store, "p")
        if not stopping.stopped:
            break
    assert calls == 1 + len(files) + 1


def test_every_damage_is_found_and_named(store: Store, files: dict[str, Path], tmp_path: Path) -> None:
    manifest = commit(store, "p", files, {})
    key = "p/model.safetensors"
    good = files["model.safetensors"].read_bytes()
    flipped = good[:100] + bytes([good[100] ^ 1]) + good[101:]
    for data, reason in (
        (flipped, "is damaged: its SHA-256 is"),
        (good[:-1], "is damaged: 6999 bytes instead of 7000"),
        (good + b"x", "is damaged: 7001 bytes instead of 7000"),
        (b"", "is damaged: 0 bytes"),
        (None, r"is missing, but p/manifest.json names it"),
    ):
        store.delete(key) if data is None else store.put(key, data)
        with pytest.raises(DataMismatch, match=rf"{store.address}/{key} {reason}"):
            fetch(store, manifest, tmp_path / "here")
        assert not (tmp_path / "here" / "model.safetensors").exists()
    store.put(key, good)
    assert _bytes(fetch(store, manifest, tmp_path / "here")) == _bytes(files)


def test_good_local_files_are_kept_and_bad_ones_replaced(files: dict[str, Path], tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    manifest = commit(store, "p", files, {})
    paths = fetch(store, manifest, tmp_path / "here")
    kept = paths["model.safetensors"].stat()
    paths["state/rng.bin"].write_bytes(b"\x00\x02")
    store.delete("p/model.safetensors")
    assert _bytes(fetch(store, manifest, tmp_path / "here")) == _bytes(files)
    assert paths["model.safetensors"].stat() == kept


_MANIFEST = {"format": 1, "prefix": "p", "files": {}, "meta": {}}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is damaged: it is no JSON"),
        (b"{", "is damaged: it is no JSON"),
        (b"[]", "is damaged: it carries no hash of its own"),
        (b'{"format": 1, "prefix": "p", "files": {}, "meta": {}}', "is damaged: it carries no hash of its own"),
        (seal({"format": 1, "prefix": "p", "files": {}, "meta": {}})[:-1], "not the one that its own hash names"),
        (seal({"format": 2, "prefix": "p", "files": {}, "meta": {}}), "format: Input should be 1"),
        (seal({"format": 1, "prefix": "p", "files": {}}), "meta: Field required"),
        (seal({"format": 1, "prefix": "q", "files": {}, "meta": {}}), "is the manifest of 'q'"),
        (seal(_MANIFEST | {"files": {"../a": {"sha256": "0" * 64, "size": 1}}}), "'../a'"),
        (seal(_MANIFEST | {"files": {"a": {"sha256": "A", "size": 1}}}), "files.a.sha256"),
    ],
)
def test_what_is_no_manifest_is_refused_by_name(tmp_path: Path, data: bytes, reason: str) -> None:
    store = FolderStore(tmp_path)
    store.put("p/manifest.json", data)
    with pytest.raises(DataMismatch, match=r"p/manifest\.json .*") as caught:
        read_manifest(store, "p")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_equals_what_its_bytes_say(files: dict[str, Path], tmp_path: Path) -> None:
    manifest = commit(FolderStore(tmp_path / "store"), "p", files, {"pair": (1, 2)})
    assert Manifest.model_validate(unseal(manifest.to_bytes(), "it")) == manifest
    assert manifest.meta == {"pair": [1, 2]}
