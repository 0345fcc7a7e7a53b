"""The folder for what can be made again, and how it is filled."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kallm.errors import WrongConfiguration

__all__ = ["cache_folder", "filling", "snapshot_folder", "writing_cache"]

_COMMIT = re.compile(r"[0-9a-f]{40}")


def cache_folder() -> Path:
    """Return the folder for what can be made again: ``KALLM_CACHE``, or ``kallm`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("KALLM_CACHE") or Path(base) / "kallm")


def snapshot_folder(revision: str) -> Path | None:
    """Return the folder for a hub commit's files that came from a store; None where the revision is no commit.

    Where the folder exists it is whole, and the hub is not asked for that commit.
    """
    return cache_folder() / "hub" / revision if _COMMIT.fullmatch(revision) else None


@contextlib.contextmanager
def writing_cache(folder: Path) -> Iterator[None]:
    """Turn an error of the operating system into one sentence with the folder and the remedy.

    Raises:
        WrongConfiguration: the folder, which lies in the cache, cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise WrongConfiguration(
            f"the cache folder {folder} cannot be written ({error.strerror or error}): "
            "make it a writable folder, or set KALLM_CACHE to one"
        ) from error


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Give an empty folder that becomes ``folder`` when the block ends without an error, unless another was first.

    What several processes put there at once must be equal.

    Raises:
        WrongConfiguration: the folder, which lies in the cache, cannot be written.
    """
    with writing_cache(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-")
    with temporary as place:
        whole = Path(place) / folder.name  # with the usual rights; the temporary folder is its owner's alone
        whole.mkdir()
        yield whole
        with writing_cache(folder.parent):
            try:
                os.rename(whole, folder)
            except OSError:
                if not folder.is_dir():  # one that another process has filled is not replaced
                    raise
