"""Objects from one store into another: what others build on goes first, so that a copy may break off anywhere."""

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kallm.errors import DataMismatch
from kallm.store.commit import Manifest, fetch, manifest_key, read_manifest
from kallm.store.store import Store

__all__ = ["Step", "copy_objects"]


@dataclass(frozen=True)
class Step:
    """One thing to copy.

    ========== =====================================================================================================
    commit     a prefix: the files of its manifest, then the manifest
    checkpoint the same, but it may vanish meanwhile, and is not wanted where the target holds ``unless``
    file       one object, whose SHA-256 a record names
    note       an object that only grows: a longer one in the target is kept
    record     an object that is created once and never replaced; not wanted where the target holds ``unless``
    ========== =====================================================================================================
    """

    kind: Literal["commit", "checkpoint", "file", "note", "record"]
    key: str
    sha256: str | None = None
    unless: str | None = None


def copy_objects(
    source: Store, target: Store, steps: Sequence[Step], after_step: Callable[[], None] = lambda: None
) -> list[str]:
    """Copy in the order of the steps; what stands in the target with equal bytes is read, checked and left alone.

    Returns:
        The keys that were written, in order.

    Raises:
        DataMismatch: bytes do not match their hash, or the target holds another record; the latter is found out before
            anything is written.
    """
    for step in steps:
        if step.kind == "record" and not _is_unwanted(step, target):
            _check_record(source, target, step.key)
    written: list[str] = []
    for step in steps:
        if _is_unwanted(step, target):
            pass
        elif step.kind == "commit":
            written += _copy_commit(source, target, step.key)
        elif step.kind == "checkpoint":
            written += _copy_checkpoint(source, target, step.key)
        elif _copy_object(source, target, step):
            written.append(step.key)
        after_step()
    return written


def _check_record(source: Store, target: Store, key: str) -> None:
    standing = target.get(key)
    if standing is not None and standing != source.get(key):
        raise DataMismatch(
            f"{target.address}/{key} is another record than the one in {source.address}, and records are never "
            "replaced: copy into another store ('kallm compare' tells how the figures differ)"
        )


def _copy_object(source: Store, target: Store, step: Step) -> bool:
    """Copy one object; return whether anything was written."""
    data, standing = source.get(step.key), target.get(step.key)
    if data is None:
        if step.kind == "note":
            return False
        raise DataMismatch(f"{source.address}/{step.key} is missing, but it is named there")
    if step.sha256 is not None and hashlib.sha256(data).hexdigest() != step.sha256:
        raise DataMismatch(f"{source.address}/{step.key} is damaged: its record names another SHA-256")
    if standing == data:
        return False
    if step.kind == "record":
        if not target.create(step.key, data):
            _check_record(source, target, step.key)
        return True
    if step.kind == "note" and standing is not None and len(standing) > len(data):
        return False
    target.put(step.key, data)
    if step.sha256 is not None and target.get(step.key) != data:
        raise DataMismatch(f"{target.address}/{step.key} does not hold the bytes that were just written")
    return True


def _is_unwanted(step: Step, target: Store) -> bool:
    return step.unless is not None and target.get(step.unless) is not None


def _copy_checkpoint(source: Store, target: Store, prefix: str) -> list[str]:
    try:
        return _copy_commit(source, target, prefix)
    except DataMismatch:
        if source.get(manifest_key(prefix)) is None:
            return []  # the cell has gone on and let go of it
        raise


def _copy_commit(source: Store, target: Store, prefix: str) -> list[str]:
    """Copy a commit's files one by one over the disk, each read back from the target; then its manifest."""
    key = manifest_key(prefix)
    manifest = read_manifest(source, prefix)
    if manifest is None:
        raise DataMismatch(f"{source.address}/{key} is missing, but it is named there")
    data, standing = manifest.to_bytes(), target.get(key)
    if standing not in (None, data):
        raise DataMismatch(f"{target.address}/{key} is another manifest than the one in {source.address}")
    sizes = {entry.key: entry.size for entry in target.list(f"{prefix}/")}
    written: list[str] = []
    for name, entry in sorted(manifest.files.items()):
        part = manifest.model_copy(update={"files": {name: entry}})
        place = f"{prefix}/{name}"
        if sizes.get(place) == entry.size and _holds(target, part):
            continue
        with tempfile.TemporaryDirectory() as temporary:
            target.upload(fetch(source, part, Path(temporary))[name], place)
        with tempfile.TemporaryDirectory() as temporary:
            fetch(target, part, Path(temporary))
        written.append(place)
    if standing is None:
        if not target.create(key, data):
            raise DataMismatch(f"{target.address}/{key} is another manifest than the one in {source.address}")
        written.append(key)
    return written


def _holds(store: Store, part: Manifest) -> bool:
    with tempfile.TemporaryDirectory() as temporary:
        try:
            fetch(store, part, Path(temporary))
        except DataMismatch:
            return False
    return True
