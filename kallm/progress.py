"""What a run tells while it works: progress bars or plain lines, the heartbeat in the store, and the stop signal."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType, TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.text import Text

from kallm.errors import ExitCode, Preempted, StorageUnavailable
from kallm.store.sealed import seal
from kallm.store.store import Store

__all__ = ["GRACE_S", "Heartbeat", "Reporter", "Stop", "Tracker", "format_duration"]

PLAIN_INTERVAL_S = 15.0
HEARTBEAT_INTERVAL_S = 30.0
GRACE_S = 60.0


class Stop:
    """Turn SIGTERM and Ctrl-C into a request that long work polls; a second one leaves at once.

    Calling the object raises ``Preempted`` once a stop was requested. Work that has not come to its end ``grace_s``
    seconds after the request is left where it is, with code 75: what was committed before stands.
    """

    def __init__(self, *, grace_s: float = GRACE_S) -> None:
        self.signal: signal.Signals | None = None
        self.grace_s = grace_s
        self._asked, self._saved = threading.Event(), threading.Event()

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal is not None

    def install(self) -> None:
        """Handle SIGTERM and SIGINT from now on."""
        threading.Thread(target=self._watch, name="kallm-grace", daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def disarm(self) -> None:
        """Say that the state is saved: there is no hurry any more."""
        self._saved.set()

    def __call__(self) -> None:
        """Raise ``Preempted`` if a stop was requested."""
        if self.signal is not None:
            raise Preempted(f"stopped by {self.signal.name}; the same command continues from here")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        os.write(2, f"\n{self.signal.name}: saving, then leaving; once more leaves at once\n".encode())
        self._asked.set()

    def _watch(self) -> None:
        """Leave when the grace is over; a thread of its own, for the main one may be inside a long call."""
        self._asked.wait()
        if not self._saved.wait(self.grace_s):
            told = f"kallm: not saved within {format_duration(self.grace_s)}; the last committed checkpoint stands\n"
            os.write(2, told.encode())
            os._exit(ExitCode.PREEMPTED)


class Tracker:
    """Counts one piece of work: how much is done, how fast, how long still."""

    def __init__(self, reporter: "Reporter", name: str, total: int, unit: str, done: int) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self._reporter = reporter
        self._first = done
        self._began = self._told = time.monotonic()
        self.bar = reporter.bars.add_task(name, total=total, completed=done, unit=unit) if reporter.bars else None

    @property
    def rate(self) -> float:
        """Units per second since this process began the work."""
        return (self.done - self._first) / max(time.monotonic() - self._began, 1e-9)

    @property
    def eta_s(self) -> float | None:
        """Seconds until the end at this rate; None before anything is done."""
        return (self.total - self.done) / self.rate if self.done > self._first else None

    def advance(self, count: int = 1) -> None:
        """Count more work as done."""
        self.done += count
        if self._reporter.bars and self.bar is not None:
            self._reporter.bars.update(self.bar, completed=self.done)
        elif time.monotonic() - self._told > PLAIN_INTERVAL_S:
            self._tell()
        self._reporter.write_progress()

    def _tell(self) -> None:
        self._told = time.monotonic()
        left = "" if self.eta_s is None else f", {format_duration(self.eta_s)} left"
        self._reporter.say(f"{self.name}: {self.done}/{self.total} {self.unit}, {self.rate:.3g} {self.unit}/s{left}")


class Reporter:
    """Bars on a terminal, plain lines elsewhere; everything goes to standard error, and the lines are kept.

    Where ``progress_file`` is given, the percentage of the whole goes there as ``N/100``, the form that Argo reads.
    """

    def __init__(self, *, quiet: bool = False, progress_file: Path | None = None) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._file, self._percent = progress_file, 0
        self._transfers: dict[str, float] = {}
        self.lines: list[str] = []
        self.trackers: list[Tracker] = []
        self.bars: Progress | None = None
        if self.console.is_terminal and not quiet:
            self.bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                _CountColumn(),
                console=self.console,
                transient=True,
            )

    def __enter__(self) -> "Reporter":
        if self.bars:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars:
            self.bars.stop()

    def hush(self) -> None:
        """Show nothing any more; lines are kept all the same."""
        self.console.quiet = True
        if self.bars:
            self.bars.stop()

    def say(self, text: str) -> None:
        """Print one line and keep it for the attempt's log."""
        self.lines.append(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}")
        self.console.print(text, markup=False, soft_wrap=True)

    def tell_transfer(self, key: str, done: int, total: int) -> None:
        """Say how far a long upload is; called from any thread, silent about short ones."""
        began = self._transfers.setdefault(key, time.monotonic())
        if done >= total:
            del self._transfers[key]
        elif time.monotonic() - began > PLAIN_INTERVAL_S:
            self._transfers[key] = time.monotonic()
            self.say(f"uploading {key}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB")

    @property
    def fraction(self) -> float:
        """How much of the outermost work is done, 0 to 1; inner work counts as a part of the next unit outside it."""
        fraction = 0.0
        for tracker in reversed(self.trackers):
            fraction = min(1.0, (tracker.done + fraction) / max(tracker.total, 1))
        return fraction

    def write_progress(self) -> None:
        """Tell the percentage, once it has grown, to who reads it from the file."""
        percent = int(100 * self.fraction)
        if self._file is not None and percent > self._percent:
            self._percent = percent
            self._file.write_text(f"{percent}/100\n")

    @contextlib.contextmanager
    def track(self, name: str, total: int, unit: str, *, done: int = 0) -> Iterator[Tracker]:
        """Show one piece of work while it lasts."""
        tracker = Tracker(self, name, total, unit, done)
        self.trackers.append(tracker)
        try:
            yield tracker
        finally:
            self.trackers.remove(tracker)
            if self.bars and tracker.bar is not None:
                self.bars.remove_task(tracker.bar)


class Heartbeat:
    """Writes ``heartbeat.json`` of a cell every 30 seconds from a thread: others see it alive in long calls too.

    Attributes:
        phase: what the cell is doing now; how far it is comes from the innermost piece of work that was begun since.
    """

    def __init__(self, store: Store, key: str, facts: Mapping[str, object], reporter: Reporter) -> None:
        """Name the key, and what every beat tells besides its time, phase and position."""
        self.phase = "start"
        self._store, self._key, self._facts, self._reporter = store, key, dict(facts), reporter
        self._outer = len(reporter.trackers)
        self._ended = threading.Event()

    def start(self) -> None:
        """Write the first beat, then go on in a thread.

        Raises:
            StorageUnavailable: the first beat could not be written.
        """
        self._beat()
        threading.Thread(target=self._go_on, name="kallm-heartbeat", daemon=True).start()

    def stop(self) -> None:
        """Begin no more beats."""
        self._ended.set()

    def _go_on(self) -> None:
        while not self._ended.wait(HEARTBEAT_INTERVAL_S):
            try:
                self._beat()
            except StorageUnavailable as error:
                self._reporter.say(f"a heartbeat is missing, the work goes on: {error}")

    def _beat(self) -> None:
        told = {**self._facts, "at": time.time(), "phase": self.phase}
        for tracker in self._reporter.trackers[self._outer :][-1:]:
            told |= {"step": tracker.done, "total": tracker.total, "rate": tracker.rate}
            told |= {"unit": tracker.unit, "eta_s": tracker.eta_s}
        self._store.put(self._key, seal(told))


class _CountColumn(ProgressColumn):
    """``12,288/16,384 tok · 560 tok/s · 8 s left``."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        text = f"{task.completed:,.0f}/{task.total:,.0f} {unit}"
        if task.speed:
            text += f" · {task.speed:,.3g} {unit}/s"
        if task.time_remaining is not None:
            text += f" · {format_duration(task.time_remaining)} left"
        return Text(text)


def format_duration(seconds: float) -> str:
    """Return ``8 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
