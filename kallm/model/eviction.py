"""What gives way in a folder of trunk outputs: the file that was not opened for longest, and that no process has open.

A file ``NAME.hidden`` of values stands beside ``NAME.crc32``. Whoever has it open holds a shared lock on the latter,
whose modification time says when it was opened last.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

__all__ = ["disk_bytes", "hold", "make_room", "removable_bytes"]


def hold(checksums: Path) -> IO[bytes]:
    """Mark a file as open and as just used; the mark lasts until what is returned is closed."""
    file = open(checksums, "ab")  # noqa: SIM115 - stays open for as long as the values are read
    with contextlib.suppress(OSError):  # a file system without locks, where nothing is ever removed
        fcntl.flock(file, fcntl.LOCK_SH)
    os.utime(checksums)
    return file


def disk_bytes(file: Path) -> int:
    """Return what a file takes of the disk, which for a sparse one is less than its size; 0 where there is none."""
    return file.stat().st_blocks * 512 if file.exists() else 0


def removable_bytes(folder: Path, keep: Path) -> int:
    """Return what all files but one take that no process has open; ``keep`` is that one's file of checksums."""
    return sum(size for _, size in _unused(folder, keep))


def make_room(folder: Path, num_bytes: int, keep: Path) -> int:
    """Remove files that were not opened for longest until so many bytes are freed; return what was."""
    freed = 0
    for checksums, size in _unused(folder, keep):
        if freed >= num_bytes:
            break
        checksums.with_suffix(".hidden").unlink(missing_ok=True)
        checksums.unlink(missing_ok=True)
        freed += size
    return freed


def _unused(folder: Path, keep: Path) -> Iterator[tuple[Path, int]]:
    """Yield files that no process has open, those not opened for longest first, each locked while it is looked at."""
    found = []
    for checksums in set(folder.glob("*.crc32")) - {keep}:
        with contextlib.suppress(FileNotFoundError):
            found.append((checksums.stat().st_mtime, checksums))
    for _, checksums in sorted(found):
        with contextlib.suppress(OSError), open(checksums, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield checksums, disk_bytes(checksums.with_suffix(".hidden"))
