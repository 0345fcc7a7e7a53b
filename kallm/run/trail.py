"""What the attempts on a cell left in the store: who is at work on it now, how far it got, who got no further."""

import functools
import os
import socket
import time
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

from kallm.errors import ExitCode, GaveUp
from kallm.results.record import cell_key, read_note
from kallm.results.status import STALE_AFTER_S
from kallm.store.gc import read_clock
from kallm.store.store import Entry, Store

__all__ = ["MOST_FRUITLESS", "Reached", "StoreClock", "Trail", "name_place"]

MOST_FRUITLESS = 5
"""Attempts in a row without progress after which a cell gives up: a bad node or an unlucky preemption spoils one or
two, but five spoiled in a row are a fault that the sixth meets too."""

Reached = tuple[int, int, int]
"""How far a cell is, in an order: trained (0 or 1), number of evaluations, step of the newest checkpoint."""

_START, _END = ".start.json", ".end.json"


class _Note(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    nonce: str


class _Start(_Note):
    host: str = ""
    place: str = ""
    pid: int = 0
    reached: Reached = (0, 0, 0)


class _End(_Note):
    exit: int
    reason: str = ""
    commits: int = 0


_AnyNote = TypeVar("_AnyNote", bound=_Note)


class StoreClock:
    """The clock that a store stamps its objects with; hosts may disagree by more than a heartbeat lasts."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def now(self) -> float:
        """Return seconds since the epoch by the store's clock, which is read once, by writing an object."""
        return time.monotonic() + self._offset

    @functools.cached_property
    def _offset(self) -> float:
        return read_clock(self._store) - time.monotonic()


class Trail:
    """One listing of a cell's objects, and what follows from it."""

    def __init__(self, store: Store, cell: str) -> None:
        self._store, self._cell = store, cell
        prefix = cell_key(cell, "")
        self._entries: dict[str, Entry] = {entry.key.removeprefix(prefix): entry for entry in store.list(prefix)}

    @property
    def reached(self) -> Reached:
        """How far the cell is."""
        names = [name.split("/") for name in self._entries]
        evaluations = sum(parts[0] == "evaluations" and parts[-1].endswith(".json") for parts in names)
        manifests = [parts[1] for parts in names if parts[0] == "checkpoints" and parts[-1] == "manifest.json"]
        steps = [int(step) for step in (name.partition("-")[0] for name in manifests) if step.isdecimal()]
        return (int("trained.json" in self._entries), evaluations, max(steps, default=0))

    def find_rival(self, clock: StoreClock, *, own: str | None = None) -> str | None:
        """Return where another living attempt on this cell works; None where there is none.

        An attempt lives while it has no end and gave a sign within 120 seconds (its start or its heartbeat), unless it
        ran here and its process is gone.

        Args:
            clock: what the signs' age is measured with; not read where no attempt is open.
            own: the nonce of the attempt that asks.
        """
        for nonce in self._nonces():
            if nonce == own or f"attempts/{nonce}{_END}" in self._entries:
                continue
            if clock.now() - self._last_sign(nonce) >= STALE_AFTER_S:
                continue
            start = self._read(f"attempts/{nonce}{_START}", _Start)
            if start is not None and not _is_gone(start):
                return f"process {start.pid} on {start.host}"
        return None

    def check_patience(self) -> None:
        """Refuse another attempt after too many in a row that brought the cell no further.

        An attempt brought it further if it committed a checkpoint, a training record or an evaluation: its end says so,
        or, where it was killed, the next one started from further on. Attempts that the storage ended do not count.

        Raises:
            GaveUp: with the reasons of the last attempts, and how to go on.
        """
        reasons: list[str] = []
        later = self.reached
        for nonce in self._nonces():
            start = self._read(f"attempts/{nonce}{_START}", _Start)
            if start is None:
                continue
            end = self._read(f"attempts/{nonce}{_END}", _End)
            further = later > start.reached or (end is not None and (end.commits > 0 or end.exit == ExitCode.DONE))
            later = start.reached
            if further:
                return
            if end is None or end.exit != ExitCode.STORAGE_UNAVAILABLE:
                reasons.append("killed without a word" if end is None else f"exit {end.exit}: {end.reason}")
            if len(reasons) == MOST_FRUITLESS:
                raise GaveUp(self._tell_reasons(reasons))

    def _tell_reasons(self, reasons: list[str]) -> str:
        told = "; ".join(dict.fromkeys(reasons))
        return (
            f"{self._cell} gave up after {len(reasons)} attempts in a row without a new checkpoint or record ({told}); "
            f"remove the cause, then delete the objects under {self._store.address}/{cell_key(self._cell, 'attempts/')}"
            " and run it again, or change the recipe, which makes a new cell"
        )

    def _nonces(self) -> list[str]:
        """Return the attempts that have a start, the newest first: nonces begin with the time."""
        names = [name.removeprefix("attempts/") for name in self._entries if name.startswith("attempts/")]
        return sorted((name.removesuffix(_START) for name in names if name.endswith(_START)), reverse=True)

    def _last_sign(self, nonce: str) -> float:
        signs = [self._entries[f"attempts/{nonce}{_START}"].modified]
        beat = self._entries.get("heartbeat.json")
        if beat is not None and beat.modified > signs[0]:
            told = self._read("heartbeat.json", _Note)
            if told is not None and told.nonce == nonce:
                signs.append(beat.modified)
        return max(signs)

    def _read(self, name: str, kind: type[_AnyNote]) -> _AnyNote | None:
        return read_note(self._store, cell_key(self._cell, name), kind) if name in self._entries else None


@functools.cache
def name_place() -> str:
    """Return what tells this machine's process numbers from all others': host, boot and namespace of processes."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    known = [boot.read_text().strip(), os.readlink(namespace)] if boot.exists() and namespace.is_symlink() else []
    return " ".join([socket.gethostname(), *known])


def _is_gone(start: _Start) -> bool:
    """Say whether an attempt's process ran here and is no more; one's own number was an earlier attempt's."""
    if start.place != name_place():
        return False
    if start.pid == os.getpid():
        return True
    try:
        os.kill(start.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
