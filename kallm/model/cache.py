"""The trunk's output by passage: kept on disk for every cell, epoch, fit and evaluation, or held for one step.

A passage always goes through the trunk alone, so its values depend neither on the batch it is used in nor on how they
were kept. Legend: T tokens, D width of the residual stream.
"""

import errno
import hashlib
import math
import shutil
import warnings
import weakref
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kallm.errors import WrongConfiguration
from kallm.model.cachefolder import writing_cache
from kallm.model.eviction import disk_bytes, hold, make_room, removable_bytes
from kallm.model.trunk import Passage, Trunk

__all__ = ["HiddenCache", "TrunkPass", "available_bytes", "free_disk_bytes", "kept_bytes"]

_FREE_SHARE = 0.8
"""Of a disk's free bytes, what a cache may take: checkpoints and other programs need some too."""

_VERSION = 2
"""Counts up when the code changes a number that a trunk gives."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def free_disk_bytes(folder: Path) -> int:
    """Return what is free on the disk that a folder lies on, or will lie on once it is made.

    Raises:
        WrongConfiguration: the folder's disk does not answer.
    """
    with writing_cache(folder):
        return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free


def available_bytes(trunk: Trunk, passages: Sequence[Passage], folder: Path, model: str) -> int:
    """Return what such a ``HiddenCache`` may take of the disk, files included that would give way; none is removed.

    Raises:
        WrongConfiguration: the folder's disk does not answer.
    """
    removable = removable_bytes(folder, keep=_paths(trunk, passages, folder, model)[1])
    return int(_FREE_SHARE * (free_disk_bytes(folder) + removable))


def kept_bytes(trunk: Trunk, passages: Sequence[Passage], folder: Path, model: str) -> int:
    """Return what the file of such a ``HiddenCache`` takes of the disk already; nothing is opened or made."""
    return disk_bytes(_paths(trunk, passages, folder, model)[0])


class TrunkPass:
    """The trunk's output, computed when it is asked for; that of one step is held for all tails that go in lockstep."""

    def __init__(self, trunk: Trunk, passages: Sequence[Passage]) -> None:
        self.trunk, self.passages = trunk, passages
        self._held: dict[int, Float[Tensor, "T D"]] = {}

    def hold(self, indices: Sequence[int], stop: Callable[[], None]) -> None:
        """Run the trunk on some passages and hold its output until the next call; what is held already stays.

        Args:
            indices: the passages of the next step.
            stop: polled before each passage; may raise.
        """
        self._held = {index: self._held[index] for index in indices if index in self._held}
        for index in indices:
            if index not in self._held:
                stop()
                self._held[index] = self.trunk(self.passages[index])

    def __getitem__(self, index: int) -> Float[Tensor, "T D"]:
        """Return the residual stream before the tail for one passage, [T, D]."""
        return self._held[index] if index in self._held else self.trunk(self.passages[index])


class HiddenCache:
    """The trunk's output for a list of passages, computed once and kept in a memory-mapped file.

    The file is named by a hash of all that its numbers depend on, and each passage's numbers stand beside their
    checksum: what a crash left half written is computed again. Several processes may fill one file: they write equal
    bytes. Where the disk has no room, files that nobody has open give way, those unused for longest first; where that
    is not enough, it is said once and nothing is kept: the trunk runs at every reading.

    Attributes:
        is_kept: whether the disk had room so far.
        num_bytes: what the file takes when it is full.
    """

    def __init__(
        self,
        trunk: Trunk,
        passages: Sequence[Passage],
        folder: Path,
        model: str,
        *,
        say: Callable[[str], None] = _warn,
    ) -> None:
        """Open or begin the file.

        Args:
            trunk: with weights in float32 or bfloat16, which is also how its output is kept.
            passages: what goes through the trunk, each alone.
            folder: where the files lie; made where it is missing.
            model: names the frozen weights, so that caches of different models never meet.
            say: is told where the disk has no room.

        Raises:
            WrongConfiguration: the folder cannot be written, or the trunk has another dtype.
        """
        self.trunk, self.passages, self.folder, self._say = trunk, passages, folder, say
        weight = next(trunk.body.parameters())
        if weight.dtype not in (torch.float32, torch.bfloat16):
            raise WrongConfiguration(f"the trunk's dtype must be float32 or bfloat16, but it is {weight.dtype}")
        self._dtype = weight.dtype
        self._stored = np.dtype(np.float32 if weight.dtype is torch.float32 else np.int16)
        self._starts = np.cumsum([0, *(len(p.input_ids) for p in passages)])
        self._width: int = trunk.body.config.hidden_size
        self.num_bytes = int(self._starts[-1]) * self._width * self._stored.itemsize
        self._paths = _paths(trunk, passages, folder, model)
        self.is_kept = True
        with writing_cache(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._map()
        if self.is_kept:
            self._find_room()

    def __len__(self) -> int:
        return len(self.passages)

    def num_missing(self) -> int:
        """Return how many passages have not been through the trunk yet."""
        return int((self._known == 0).sum()) if self.is_kept else len(self)

    @property
    def num_left_bytes(self) -> int:
        """What the missing passages will take."""
        missing = np.diff(self._starts)[self._known == 0] if self.is_kept else np.diff(self._starts)
        return int(missing.sum()) * self._width * self._stored.itemsize

    def __getitem__(self, index: int) -> Float[Tensor, "T D"]:
        """Return the residual stream before the tail for one passage, [T, D]."""
        if self.is_kept and self._known[index]:
            data = np.array(self._rows[int(self._starts[index]) : int(self._starts[index + 1])])
            if _check(data) == self._known[index]:
                values = torch.from_numpy(data)
                return values if self._dtype is torch.float32 else values.view(torch.bfloat16)
        hidden = self.trunk(self.passages[index]).cpu()
        if self.is_kept:
            self._keep(index, hidden)
        return hidden

    def _map(self) -> None:
        try:
            self._rows = _mapped(self._paths[0], self._stored, (int(self._starts[-1]), self._width))
            self._known = _mapped(self._paths[1], np.dtype(np.uint32), (len(self),))
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            self._give_up("no file may be so large there")
        else:
            weakref.finalize(self, hold(self._paths[1]).close)

    def _find_room(self) -> None:
        """See that what is missing fits on the disk, and let other files give way for it."""
        short = math.ceil(self.num_left_bytes / _FREE_SHARE) - free_disk_bytes(self.folder)
        if short > 0 and removable_bytes(self.folder, keep=self._paths[1]) >= short:
            freed = make_room(self.folder, short, keep=self._paths[1])
            self._say(f"removed {freed / 1e9:.3g} GB of the trunk's output that was unused for longest")
        elif short > 0:
            self._give_up(f"only {free_disk_bytes(self.folder) / 1e9:.3g} GB are free there")

    def _keep(self, index: int, hidden: Float[Tensor, "T D"]) -> None:
        """Write one passage; not through the map, where a full disk would end the process without a word."""
        data = (hidden if self._dtype is torch.float32 else hidden.view(torch.int16)).contiguous().numpy()
        try:
            _write(self._paths[0], int(self._starts[index]) * self._width * self._stored.itemsize, data.tobytes())
            _write(self._paths[1], 4 * index, np.uint32(_check(data)).tobytes())
        except FileNotFoundError:
            self._give_up("its files were removed")
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            self._give_up(f"the disk became full: {free_disk_bytes(self.folder) / 1e9:.3g} GB are free now")

    def _give_up(self, why: str) -> None:
        """Keep nothing any more, and remove what was kept: files that cannot be completed only take room."""
        self.is_kept = False
        for path in self._paths:
            path.unlink(missing_ok=True)
        self._say(
            f"the trunk's output on {len(self):,} texts is not kept and the trunk runs whenever it is read: it would "
            f"take {self.num_bytes / 1e9:.3g} GB in {self.folder}, but {why}; make room, or set KALLM_CACHE to a "
            "folder on a larger disk"
        )


def _paths(trunk: Trunk, passages: Sequence[Passage], folder: Path, model: str) -> tuple[Path, Path]:
    """Return the files of the values and of their checksums, named by what the values depend on."""
    dtype = next(trunk.body.parameters()).dtype
    content = hashlib.sha256(f"{_VERSION} {model} {trunk.cut} {dtype} {torch.__version__}".encode())
    for passage in passages:
        content.update(passage.fingerprint().encode())
    stem = folder / content.hexdigest()[:24]
    return stem.with_suffix(".hidden"), stem.with_suffix(".crc32")


def _check(data: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> int:
    """Return a checksum that is never 0, which stands for what is missing."""
    return zlib.crc32(np.ascontiguousarray(data).data) or 1


def _mapped(
    path: Path, dtype: "np.dtype[np.generic]", shape: tuple[int, ...]
) -> "np.memmap[tuple[int, ...], np.dtype[np.generic]]":
    """Map a file for reading; a new one is sparse, and zeros."""
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    with open(path, "ab") as file:
        if file.tell() != num_bytes:
            file.truncate(num_bytes)
    return np.memmap(path, dtype=dtype, mode="r", shape=shape)


def _write(path: Path, place: int, data: bytes) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.seek(place)
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, "the disk took a part only")
