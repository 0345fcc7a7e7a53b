"""Where every cell of a study stands, read from the store alone."""

from collections.abc import Mapping
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict
from rich.table import Table as RichTable
from rich.text import Text

from kallm.errors import ExitCode
from kallm.progress import format_duration
from kallm.results.record import (
    CellEntry,
    StudyDocument,
    TrainingRecord,
    cell_key,
    evaluation_key,
    read_note,
    read_record,
)
from kallm.store.store import Store

__all__ = ["STALE_AFTER_S", "CellStatus", "find_latest_time", "read_status", "render_status"]

STALE_AFTER_S = 120.0
"""A heartbeat older than this counts as stopped; beats come every 30 seconds."""

State = Literal["done", "evaluating", "running", "stale", "failed", "diverged", "missing"]
_STYLES = {
    "done": "green",
    "evaluating": "cyan",
    "running": "cyan",
    "stale": "yellow",
    "failed": "bold red",
    "diverged": "magenta",
    "missing": "dim",
}
_EVALUATING = "evaluat"


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Start(_Read):
    nonce: str
    started: AwareDatetime


class _End(_Read):
    nonce: str
    ended: AwareDatetime
    exit: int
    reason: str | None = None


class _Beat(_Read):
    nonce: str
    at: float
    phase: str
    step: int | None = None
    total: int | None = None
    rate: float | None = None
    unit: str | None = None
    eta_s: float | None = None
    host: str | None = None


class CellStatus(BaseModel):
    """One cell: its state, what is to be said about it, and how far it is while it works."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    variant: str
    seed: int | None
    state: State
    detail: str
    trained: bool
    """Whether the cell has its weights, or needs none."""
    phase: str | None = None
    step: int | None = None
    total: int | None = None
    rate: float | None = None
    unit: str | None = None
    eta_s: float | None = None
    attempts: int = 0


class _Trace(_Read):
    """What a cell's attempts left: starts and ends by nonce, and the last heartbeat."""

    starts: dict[str, _Start]
    ends: dict[str, _End]
    beat: _Beat | None

    def open_beat(self) -> _Beat | None:
        """Return the heartbeat of an attempt that has not ended; a start counts as the first beat."""
        if self.beat is not None and self.beat.nonce not in self.ends:
            return self.beat
        newest = max(self.starts.values(), key=lambda start: (start.started, start.nonce), default=None)
        if newest is None or newest.nonce in self.ends:
            return None
        return _Beat(nonce=newest.nonce, at=newest.started.timestamp(), phase="starting")

    def last_end(self) -> _End | None:
        """Return the end of the newest attempt that has one."""
        return max(self.ends.values(), key=lambda end: (end.ended, end.nonce), default=None)

    def times(self) -> list[float]:
        """Return every time that was written down, in seconds since the epoch."""
        times = [start.started.timestamp() for start in self.starts.values()]
        times += [end.ended.timestamp() for end in self.ends.values()]
        return times + ([self.beat.at] if self.beat else [])


def read_status(store: Store, document: StudyDocument, now: float) -> list[CellStatus]:
    """Read where every cell of the study stands at ``now``, in seconds since the epoch, in the study's order.

    Objects that are no attempt and no heartbeat are passed over.

    Raises:
        DataMismatch: a ``trained.json`` is not a training record.
    """
    return [_read_cell(store, document, entry, now) for entry in document.cells]


def find_latest_time(store: Store, document: StudyDocument) -> float:
    """Return the newest time that the cells' attempts and heartbeats name: a clock that the store itself keeps."""
    return max((time for entry in document.cells for time in _read_trace(store, entry.id).times()), default=0.0)


def _read_cell(store: Store, document: StudyDocument, entry: CellEntry, now: float) -> CellStatus:
    record = read_record(store, TrainingRecord, cell_key(entry.id, "trained.json")) if entry.trained else None
    trace = _read_trace(store, entry.id)
    trained = record is not None or not entry.trained
    told = {"id": entry.id, "variant": entry.variant, "seed": entry.seed, "attempts": len(trace.starts)}
    if record is not None and record.outcome == "diverged":
        return CellStatus(**told, trained=False, state="diverged", detail=record.cause or "training left the numbers")
    present = {found.key for found in store.list(cell_key(entry.id, "evaluations/"))} if trained else set()
    absent = [suite.name for suite in document.suites if evaluation_key(entry.id, suite.id) not in present]
    if trained and not absent:
        return CellStatus(**told, trained=True, state="done", detail="")
    beat = trace.open_beat()
    if beat is not None:
        return _tell_beat(told, beat, trained=trained, now=now)
    last = trace.last_end()
    owed = f"trained; to evaluate: {', '.join(absent)}" if trained and entry.trained else ""
    if last is None:
        return CellStatus(**told, trained=trained, state="missing", detail=owed)
    if last.exit in (ExitCode.DONE, ExitCode.PREEMPTED):
        reason = last.reason or ("stopped, state saved" if last.exit else "")
        return CellStatus(**told, trained=trained, state="missing", detail=owed or reason)
    reason = f"exit {last.exit}: {last.reason}" if last.reason else f"exit {last.exit}"
    return CellStatus(**told, trained=trained, state="failed", detail=reason)


def _tell_beat(told: Mapping[str, object], beat: _Beat, *, trained: bool, now: float) -> CellStatus:
    age = max(now - beat.at, 0.0)
    state: State = "evaluating" if trained or beat.phase.startswith(_EVALUATING) else "running"
    detail = f"on {beat.host}" if beat.host else ""
    if age >= STALE_AFTER_S:
        state, detail = "stale", f"no sign for {format_duration(age)}{f', last {detail}' if detail else ''}"
    progress = beat.model_dump(include={"phase", "step", "total", "rate", "unit", "eta_s"})
    return CellStatus.model_validate({**told, **progress, "trained": trained, "state": state, "detail": detail})


def _read_trace(store: Store, cell: str) -> _Trace:
    starts, ends = {}, {}
    prefix = cell_key(cell, "attempts/")
    for found in store.list(prefix):
        name = found.key.removeprefix(prefix)
        if name.endswith(".start.json"):
            start = read_note(store, found.key, _Start)
            if start is not None and name == f"{start.nonce}.start.json":
                starts[start.nonce] = start
        elif name.endswith(".end.json"):
            end = read_note(store, found.key, _End)
            if end is not None and name == f"{end.nonce}.end.json":
                ends[end.nonce] = end
    return _Trace(starts=starts, ends=ends, beat=read_note(store, cell_key(cell, "heartbeat.json"), _Beat))


def render_status(statuses: list[CellStatus]) -> RichTable:
    """Return the cells as a table for the terminal."""
    counts = {state: sum(status.state == state for status in statuses) for state in _STYLES}
    summary = " · ".join(f"{count} {state}" for state, count in counts.items() if count) or "no cells"
    table = RichTable(box=None, pad_edge=False, header_style="dim", caption=summary, caption_justify="left")
    for name in ("variant", "seed", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("progress", no_wrap=True, justify="right")
    table.add_column("tries", no_wrap=True, justify="right")
    table.add_column("", overflow="fold", ratio=1)
    for status in statuses:
        table.add_row(
            status.variant,
            "–" if status.seed is None else str(status.seed),
            Text(status.state, style=_STYLES[status.state]),
            _tell_progress(status),
            str(status.attempts or ""),
            Text(status.detail, style="dim"),
        )
    return table


def _tell_progress(status: CellStatus) -> str:
    if status.state not in ("running", "evaluating", "stale") or status.phase is None:
        return ""
    parts = [status.phase]
    if status.step is not None and status.total:
        parts.append(f"{status.step / status.total:.0%}")
    if status.state != "stale" and status.rate:
        parts.append(f"{status.rate:,.3g} {status.unit or ''}/s")
    if status.state != "stale" and status.eta_s is not None:
        parts.append(f"{format_duration(status.eta_s)} left")
    return " · ".join(parts)
