"""A store in a folder: every object a file, written beside its place, flushed to the disk, and moved there whole."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kallm.errors import StorageUnavailable
from kallm.store.store import TEMPORARY, Entry, is_key

__all__ = ["FolderStore", "naming_disk_errors", "replacing"]

_REMEDIES = {
    errno.EACCES: "give this user the right to write there, or name another folder",
    errno.EDQUOT: "free some of the quota, or name another folder",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or name another folder",
    errno.EIO: "the device reports a fault: look at the system's log, and name a folder on another device",
    errno.ENOSPC: "free some space, or name a folder on another disk",
    errno.ENOTSUP: "the file system lacks hard links or locks that a store needs: name a folder on another one",
    errno.EPERM: "the file system may lack hard links, which a store needs: name a folder on another one",
    errno.EROFS: "mount it writable, or name another folder",
    errno.ESTALE: "the network mount went away: mount it again and start again",
}


@contextmanager
def naming_disk_errors(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into one sentence with the path and the remedy.

    Raises:
        StorageUnavailable: the disk is full, read-only, broken, or refuses access.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "make the path usable, or name another folder")
        raise StorageUnavailable(f"cannot use {path}: {error.strerror or error}; {remedy}") from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` when the block ends without an error, whole and on the disk."""
    with _written_beside(path) as file:
        yield file
        _flush(file)
        os.replace(file.name, path)
        _sync_folder(path.parent)


class FolderStore:
    """A store in a folder; many processes and hosts may write to it at once.

    The address is the folder's absolute path. ``link`` and ``rename`` must be atomic there, as they are on local disks,
    NFS and CephFS.
    """

    def __init__(self, root: Path) -> None:
        """Name the folder; it is made by the first write."""
        self.root = root.absolute()
        self.address = str(self.root)

    def get(self, key: str) -> bytes | None:
        """Return an object's bytes, or None where there is none."""
        path = self._path(key)
        with naming_disk_errors(path):
            try:
                return path.read_bytes()
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                return None

    def put(self, key: str, data: bytes) -> None:
        """Write an object, whole or not at all, replacing what was there."""
        path = self._path(key)
        with naming_disk_errors(path):
            _make_folder(path.parent)
            with replacing(path) as file:
                file.write(data)

    def create(self, key: str, data: bytes) -> bool:
        """Write an object only if there is none; return whether this call's bytes are the ones that stand.

        Equal bytes that stand already count as this call's own: on a network mount the reply to ``link`` may be lost.
        """
        path = self._path(key)
        with naming_disk_errors(path):
            _make_folder(path.parent)
            with _written_beside(path) as file:
                file.write(data)
                _flush(file)
                try:
                    os.link(file.name, path)
                    won = True
                except FileExistsError:
                    won = self._stands(key, data)
                _sync_folder(path.parent)
                return won

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Yield the objects whose key starts with ``prefix``, sorted by key as S3 sorts: by the bytes of UTF-8."""
        folder, _, begin = prefix.rpartition("/")
        assert not folder or is_key(folder), f"no prefix: {prefix!r}"
        with naming_disk_errors(self.root):
            entries = [*_walk(self.root / folder, f"{folder}/" if folder else "", begin)]
        yield from sorted(entries, key=lambda entry: os.fsencode(entry.key))

    def upload(self, path: Path, key: str) -> None:
        """Write a file's bytes as an object, whole or not at all."""
        target = self._path(key)
        with path.open("rb") as source, naming_disk_errors(target):
            _make_folder(target.parent)
            with replacing(target) as file:
                shutil.copyfileobj(source, file, 1 << 20)

    def download(self, key: str, path: Path) -> bool:
        """Write an object's bytes to a file, whole or not at all; return False where there is no such object."""
        with naming_disk_errors(path):
            try:
                source = self._path(key).open("rb")
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                return False
            with source:
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as file:
                    shutil.copyfileobj(source, file, 1 << 20)
            return True

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""
        path = self._path(key)
        with naming_disk_errors(path):
            try:
                path.unlink()
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                return
            _sync_folder(path.parent)

    def _path(self, key: str) -> Path:
        assert is_key(key), f"no key: {key!r}"
        return self.root / key

    def _stands(self, key: str, data: bytes) -> bool:
        standing = self.get(key)
        if standing is None:
            raise StorageUnavailable(
                f"cannot create {self.root / key}: the file system says that it exists, but there is no file to read; "
                "see whether a folder or a dead link has that name, or whether another program deletes it"
            )
        return standing == data


@contextmanager
def _written_beside(path: Path) -> Iterator[BinaryIO]:
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        with temporary.open("xb") as file:
            yield file
    finally:
        temporary.unlink(missing_ok=True)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _walk(folder: Path, above: str, begin: str) -> Iterator[Entry]:
    """Yield the files below a folder whose path there starts with ``begin``; what vanishes meanwhile was deleted."""
    try:
        items = [*os.scandir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return
    for item in items:
        if not item.name.startswith(begin) or item.name.startswith(TEMPORARY):
            continue
        key = above + item.name
        if item.is_dir():
            yield from _walk(Path(item.path), f"{key}/", "")
            continue
        try:
            state = item.stat()
        except FileNotFoundError:
            continue
        yield Entry(key, state.st_size, state.st_mtime)
