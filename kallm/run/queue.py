"""Which cell comes next, where other processes may be at work on the same study."""

import random
import time

from kallm.progress import Reporter, Stop
from kallm.run.trail import StoreClock, Trail
from kallm.store.store import Store
from kallm.study.plan import Cell

__all__ = ["WAIT_S", "Queue"]

WAIT_S = 5.0
"""Seconds between two looks at cells that other processes work on."""

_POLL_S = 0.2


class Queue:
    """The cells of a run that are not finished; those that others work on come last."""

    def __init__(
        self, cells: list[Cell], store: Store, reporter: Reporter, stop: Stop, *, wait_s: float = WAIT_S
    ) -> None:
        self.cells = list(cells)
        self.store, self.reporter, self.stop, self.wait_s = store, reporter, stop, wait_s
        self.clock = StoreClock(store)
        self._waits_for = ""

    def choose(self) -> Cell | None:
        """Return a cell that nobody else works on, waiting until there is one; None when all are done.

        The cell may have been finished elsewhere meanwhile.

        Raises:
            Preempted: a stop was requested while waiting.
        """
        while self.cells:
            rivals: list[str] = []
            for cell in self.cells:
                rival = Trail(self.store, cell.id).find_rival(self.clock)
                if rival is None:
                    return cell
                rivals.append(f"{cell.id} ({rival})")
            self._tell(f"waiting for cells that are worked on elsewhere: {', '.join(rivals)}")
            self.pause()
        return None

    def pause(self) -> None:
        """Wait some time that differs between processes, so that two of them do not meet again and again.

        Raises:
            Preempted: a stop was requested.
        """
        until = time.monotonic() + self.wait_s * random.uniform(0.5, 1)
        while (left := until - time.monotonic()) > 0:
            self.stop()
            time.sleep(min(left, _POLL_S))

    def _tell(self, text: str) -> None:
        if text != self._waits_for:
            self._waits_for = text
            self.reporter.say(text)
