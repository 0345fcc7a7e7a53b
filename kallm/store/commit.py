"""Commits: files first, and last one manifest that names them all; what has no manifest was never written."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from kallm.errors import DataMismatch
from kallm.store.local import naming_disk_errors
from kallm.store.sealed import seal, unseal
from kallm.store.store import Store, is_key

__all__ = ["FileEntry", "Manifest", "commit", "fetch", "list_manifests", "manifest_key", "read_manifest"]

_NAME = "manifest.json"


class FileEntry(BaseModel):
    """One file of a commit; ``size`` is in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Manifest(BaseModel):
    """``<prefix>/manifest.json``: the names, sizes and hashes of a commit's files, and what its writer adds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    prefix: str
    files: dict[str, FileEntry]
    meta: dict[str, Any]

    @field_validator("files")
    @classmethod
    def _check_names(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        wrong = [name for name in files if not is_key(name) or name.rpartition("/")[2] == _NAME]
        if wrong:
            raise ValueError(f"{wrong[0]!r} can be no name of a file in a commit")
        return files

    def to_bytes(self) -> bytes:
        """Return the manifest as canonical JSON that carries its own hash."""
        return seal(self.model_dump(mode="json"))


def manifest_key(prefix: str) -> str:
    """Return the key of a prefix's manifest."""
    return f"{prefix}/{_NAME}"


def commit(store: Store, prefix: str, files: Mapping[str, Path], meta: Mapping[str, Any]) -> Manifest:
    """Upload files under a prefix, then create the manifest that names them; the same commit again does nothing.

    A prefix belongs to one writer (put a nonce into it): two that write other bytes under one prefix spoil each other's
    files, and readers notice.

    Args:
        store: where to write.
        prefix: the key under which everything goes.
        files: for each name under the prefix, the file on the disk.
        meta: JSON values that go into the manifest.

    Raises:
        DataMismatch: another manifest stands there already.
        StorageUnavailable: the store does not take it; nothing is committed.
    """
    entries = {name: _describe(path) for name, path in files.items()}
    data = Manifest(prefix=prefix, files=entries, meta=dict(meta)).to_bytes()
    key = manifest_key(prefix)
    standing = store.get(key)
    if standing is None:
        for name, path in sorted(files.items()):
            store.upload(path, f"{prefix}/{name}")
    if standing != data and not (standing is None and store.create(key, data)):
        raise DataMismatch(f"{store.address}/{key} stands already with other content; commit under another prefix")
    return Manifest.model_validate(unseal(data, key))


def read_manifest(store: Store, prefix: str) -> Manifest | None:
    """Read the manifest of a prefix; None where nothing was committed.

    Raises:
        DataMismatch: the object is there and is not this prefix's manifest.
    """
    key = manifest_key(prefix)
    data = store.get(key)
    if data is None:
        return None
    try:
        manifest = Manifest.model_validate(unseal(data, f"{store.address}/{key}"))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise DataMismatch(f"{store.address}/{key} is no manifest: {where}: {first['msg']}") from error
    if manifest.prefix != prefix:
        raise DataMismatch(f"{store.address}/{key} is the manifest of {manifest.prefix!r}; write it anew in its place")
    return manifest


def fetch(store: Store, manifest: Manifest, folder: Path) -> dict[str, Path]:
    """Download a commit's files into a folder and check every size and SHA-256; files that are there are kept.

    Returns:
        For each name the file on the disk.

    Raises:
        DataMismatch: an object is missing, or its bytes are not the ones that were committed.
    """
    paths = {name: folder / name for name in manifest.files}
    for name, entry in sorted(manifest.files.items()):
        path, key = paths[name], f"{manifest.prefix}/{name}"
        if path.is_file() and _describe(path) == entry:
            continue
        if not store.download(key, path):
            raise DataMismatch(f"{store.address}/{key} is missing, but {manifest_key(manifest.prefix)} names it")
        found = _describe(path)
        if found != entry:
            path.unlink()
            raise DataMismatch(f"{store.address}/{key} is damaged: {_difference(found, entry)}")
    return paths


def list_manifests(store: Store, prefix: str) -> list[str]:
    """Return the committed prefixes at or below a prefix (``""`` is all), sorted by their manifests' keys."""
    below = f"{prefix}/" if prefix else ""
    return [entry.key.removesuffix(f"/{_NAME}") for entry in store.list(below) if entry.key.endswith(f"/{_NAME}")]


def _describe(path: Path) -> FileEntry:
    with naming_disk_errors(path), path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(sha256=sha256, size=file.tell())


def _difference(found: FileEntry, expected: FileEntry) -> str:
    if found.size != expected.size:
        return f"{found.size} bytes instead of {expected.size}"
    return f"its SHA-256 is {found.sha256[:12]}… instead of {expected.sha256[:12]}…"
