"""What processes that died left behind, and its removal; ages are by the store's own clock."""

import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kallm.errors import StorageUnavailable
from kallm.store.local import FolderStore, naming_disk_errors
from kallm.store.s3 import S3Store
from kallm.store.store import TEMPORARY, Entry, Store

__all__ = ["DAY_S", "Leftover", "find_leftovers", "read_clock", "remove_leftover"]

DAY_S = 86_400.0
_PROBES = ".probe"


@dataclass(frozen=True)
class Leftover:
    """One thing that may go; ``size`` is in bytes, None where the server does not tell it."""

    key: str
    size: int | None
    age_s: float
    why: str
    upload: str | None = None
    """The id of an unfinished upload; such a thing is no object."""


def read_clock(store: Store) -> float:
    """Return the store's time in seconds since the epoch: that of an object which is written and deleted.

    Raises:
        StorageUnavailable: the store does not list what was just written.
    """
    key = f"{_PROBES}-{uuid.uuid4().hex}"
    store.put(key, b"")
    try:
        times = [entry.modified for entry in store.list(key)]
    finally:
        store.delete(key)
    if not times:
        raise StorageUnavailable(f"{store.address} does not list what was just written; try again later")
    return times[0]


def find_leftovers(store: Store, unnamed: Iterable[tuple[Entry, str]], older_than_s: float = DAY_S) -> list[Leftover]:
    """Return what may go: objects that nothing names, with the reason, and what writers that died left unfinished.

    Args:
        store: the store.
        unnamed: its objects that no manifest and no record names, each with the reason.
        older_than_s: younger things are left alone: their writers may live.
    """
    now = read_clock(store)
    found = [Leftover(entry.key, entry.size, now - entry.modified, why) for entry, why in unnamed]
    found += [
        Leftover(entry.key, entry.size, now - entry.modified, "left by a check of the store")
        for entry in store.list(_PROBES)
    ]
    if isinstance(store, FolderStore):
        found += _find_temporary(store, now)
    if isinstance(store, S3Store):
        found += _find_uploads(store, now)
    return [leftover for leftover in found if leftover.age_s > older_than_s]


def remove_leftover(store: Store, leftover: Leftover) -> None:
    """Remove one thing that ``find_leftovers`` returned; nothing happens where it is gone."""
    if leftover.upload is not None and isinstance(store, S3Store):
        with store.naming_refusals(leftover.key):
            try:
                store.client.abort_multipart_upload(
                    Bucket=store.bucket, Key=store.full_key(leftover.key), UploadId=leftover.upload
                )
            except store.client.exceptions.NoSuchUpload:
                return
    elif isinstance(store, FolderStore) and _is_temporary(leftover.key):
        path = store.root / leftover.key
        with naming_disk_errors(path):
            path.unlink(missing_ok=True)
    else:
        store.delete(leftover.key)


def _is_temporary(key: str) -> bool:
    return key.rpartition("/")[2].startswith(TEMPORARY)


def _find_temporary(store: FolderStore, now: float) -> Iterator[Leftover]:
    with naming_disk_errors(store.root):
        for folder, _, names in os.walk(store.root):
            for name in sorted(names):
                path = Path(folder) / name
                if not name.startswith(TEMPORARY):
                    continue
                try:
                    state = path.stat()
                except FileNotFoundError:
                    continue  # its writer lives, and is done
                key = path.relative_to(store.root).as_posix()
                yield Leftover(key, state.st_size, now - state.st_mtime, "a half-written file")


def _find_uploads(store: S3Store, now: float) -> Iterator[Leftover]:
    begin = store.full_key(_PROBES).removesuffix(_PROBES)
    with store.naming_refusals():
        pages = store.client.get_paginator("list_multipart_uploads").paginate(Bucket=store.bucket, Prefix=begin)
        uploads = [upload for page in pages for upload in page.get("Uploads", ())]
    for upload in uploads:
        age_s = now - upload["Initiated"].timestamp()
        yield Leftover(upload["Key"].removeprefix(begin), None, age_s, "an unfinished upload", str(upload["UploadId"]))
