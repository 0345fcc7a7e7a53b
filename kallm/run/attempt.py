"""One process at work on a cell: when it began, that it lives, how it ended, and its log."""

import json
import os
import secrets
import socket
import time
from typing import Any

from kallm.progress import Heartbeat, Reporter
from kallm.results.record import cell_key
from kallm.store.store import Store
from kallm.study.plan import Cell

__all__ = ["Attempt"]


class Attempt:
    """Tells its beginning when it is made; ``end`` tells the rest."""

    def __init__(self, cell: Cell, store: Store, reporter: Reporter) -> None:
        self.nonce = f"{int(time.time()):010d}-{secrets.token_hex(4)}"
        self.heartbeat = Heartbeat(store, cell_key(cell.id, "heartbeat.json"), self.nonce)
        self._cell, self._store, self._reporter = cell, store, reporter
        self._first_line = len(reporter.lines)
        store.create(cell_key(cell.id, "cell.json"), _to_bytes(cell.identity | {"variant": cell.name}))
        self._tell("start", {"started": time.time(), "host": socket.gethostname(), "pid": os.getpid()})

    def end(self, code: int, reason: str) -> None:
        """Leave the attempt's end and its log in the store."""
        log = "".join(f"{line}\n" for line in self._reporter.lines[self._first_line :])
        self._store.put(cell_key(self._cell.id, "logs", f"{self.nonce}.txt"), log.encode())
        self._tell("end", {"ended": time.time(), "exit": code, "reason": reason})

    def _tell(self, moment: str, what: dict[str, Any]) -> None:
        key = cell_key(self._cell.id, "attempts", f"{self.nonce}.{moment}.json")
        self._store.create(key, _to_bytes({"nonce": self.nonce} | what))


def _to_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
