"""One process at work on a cell: when it began, that it lives, how it ended, and its log."""

import contextlib
import os
import secrets
import socket
import time
from types import TracebackType
from typing import Any

from kallm.errors import ExitCode, KallmError, StorageUnavailable
from kallm.progress import Heartbeat, Reporter
from kallm.receipt import commit, image
from kallm.results.record import cell_key
from kallm.run.trail import Reached, StoreClock, Trail, name_place
from kallm.store.sealed import seal
from kallm.store.store import Store
from kallm.study.plan import Cell

__all__ = ["Attempt"]


class Attempt:
    """Tells its beginning when it is entered, that it lives while it lasts, and its end, whatever that is."""

    def __init__(self, cell: Cell, store: Store, reporter: Reporter, reached: Reached) -> None:
        """Name an attempt on a cell that is so far already; nothing is written yet."""
        self.nonce = f"{int(time.time()):010d}-{secrets.token_hex(4)}"
        self.commits = 0
        """Checkpoints and records that this attempt committed."""
        self._cell, self._store, self._reporter, self._reached = cell, store, reporter, reached
        self._first_line = len(reporter.lines)
        self.heartbeat = Heartbeat(
            store, cell_key(cell.id, "heartbeat.json"), {"nonce": self.nonce} | _whereabouts(), reporter
        )

    def claim(self, clock: StoreClock) -> bool:
        """Write the start, unless another living attempt shows up beside it: then take it back and return False.

        Of two that start at once the later listing shows both, so never do both stay; both may step back.
        """
        start = {"nonce": self.nonce, "started": time.time(), "place": name_place(), "reached": self._reached}
        key = self._key("start")
        self._store.create(key, seal(start | _whereabouts()))
        if Trail(self._store, self._cell.id).find_rival(clock, own=self.nonce) is None:
            return True
        self._store.delete(key)
        return False

    def __enter__(self) -> "Attempt":
        self._store.create(
            cell_key(self._cell.id, "cell.json"), seal(self._cell.identity | {"variant": self._cell.name})
        )
        self.heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the log and the end in the store; an error that is under way stays the one that is raised."""
        self.heartbeat.stop()
        end = {"nonce": self.nonce, "ended": time.time(), "commits": self.commits} | _describe(error)
        log = "".join(f"{line}\n" for line in self._reporter.lines[self._first_line :])
        with _unless_under_way(error):
            self._store.put(cell_key(self._cell.id, "logs", f"{self.nonce}.txt"), log.encode())
        with _unless_under_way(error):
            self._store.create(self._key("end"), seal(end))

    def _key(self, moment: str) -> str:
        return cell_key(self._cell.id, "attempts", f"{self.nonce}.{moment}.json")


def _unless_under_way(error: BaseException | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if error is None else contextlib.suppress(StorageUnavailable)


def _whereabouts() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "code": commit(), "image": image()}


def _describe(error: BaseException | None) -> dict[str, Any]:
    """Return the exit code that the program will leave with, and the reason."""
    if error is None:
        return {"exit": int(ExitCode.DONE), "reason": "done"}
    if isinstance(error, KallmError):
        return {"exit": int(error.code), "reason": str(error)}
    name, told = type(error).__name__, str(error).partition("\n")[0]
    code = ExitCode.OUT_OF_MEMORY if name in ("MemoryError", "OutOfMemoryError") else ExitCode.INTERNAL
    return {"exit": int(code), "reason": f"{name}: {told}" if told else name}
