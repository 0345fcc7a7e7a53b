"""A store that fails on purpose: at its n-th call the process ends, the call raises, or it takes its time."""

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from kallm.errors import StorageUnavailable
from kallm.store.store import Entry, Store

__all__ = ["LEFT", "FaultStore", "leave", "refuse", "stall"]

LEFT = 99
"""How a process ends that its store ended."""

Moment = Literal["before", "after"]


def leave() -> None:
    """End the process as a power cut would: nothing is flushed, no handler runs."""
    os._exit(LEFT)


def refuse() -> None:
    """Fail as a store does that does not answer."""
    raise StorageUnavailable("the store went away")


def stall(seconds: float) -> Callable[[], None]:
    """Return a fault that only takes its time."""
    return lambda: time.sleep(seconds)


class FaultStore:
    """Counts the calls to another store, from any thread, and does ``act`` before or after the n-th one.

    Args:
        store: what answers.
        act: the fault.
        at: the call, from 0, or a pattern that a call matches (``create .*/trained``); None for never.
        skip: how many calls that match the pattern are let through.
        moment: ``before``: the call does not reach the store; ``after``: it does, and the caller never learns it.
        lasting: every later call fails too, before it reaches the store.
        log: a file that gets one line per call, so that a reader sees which one it was.
    """

    def __init__(
        self,
        store: Store,
        act: Callable[[], None] = leave,
        *,
        at: int | str | None = None,
        skip: int = 0,
        moment: Moment = "before",
        lasting: bool = False,
        log: Path | None = None,
    ) -> None:
        self.address = store.address
        self.calls: list[str] = []
        self._store, self._act, self._at, self._moment, self._lasting = store, act, at, moment, lasting
        self._skip = skip
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND) if log else None
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes | None:
        """Get, unless the call is the one."""
        return self._call("get", key)

    def put(self, key: str, data: bytes) -> None:
        """Put, unless the call is the one."""
        self._call("put", key, data)

    def create(self, key: str, data: bytes) -> bool:
        """Create, unless the call is the one."""
        return self._call("create", key, data)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """List, unless the call is the one; the listing is read whole at once."""
        return iter(self._call("list", prefix))

    def upload(self, path: Path, key: str) -> None:
        """Upload, unless the call is the one."""
        self._call("upload", path, key)

    def download(self, key: str, path: Path) -> bool:
        """Download, unless the call is the one."""
        return self._call("download", key, path)

    def delete(self, key: str) -> None:
        """Delete, unless the call is the one."""
        self._call("delete", key)

    def _call(self, method: str, *arguments: Any) -> Any:
        is_it, is_later = self._recognise(f"{method} {arguments[1] if method == 'upload' else arguments[0]}")
        if (is_it and self._moment == "before") or (is_later and self._lasting):
            self._act()
        answer = getattr(self._store, method)(*arguments)
        if method == "list":
            answer = [*answer]
        if is_it and self._moment == "after":
            self._act()
        return answer

    def _recognise(self, call: str) -> tuple[bool, bool]:
        """Note a call; say whether it is the one, and whether the one is past."""
        with self._lock:
            number = len(self.calls)
            self.calls.append(call)
            if self._log is not None:
                os.write(self._log, f"{call}\n".encode())
            if isinstance(self._at, str) and re.match(self._at, call):
                self._skip -= 1
                self._at = self._at if self._skip >= 0 else number
            return number == self._at, isinstance(self._at, int) and number > self._at
