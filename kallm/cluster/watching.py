"""From submission to the end: the first minute, the live table, and with what outcome it ended."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from kallm.cluster.argo import Progress
from kallm.cluster.client import Unreachable
from kallm.cluster.engines import Engine
from kallm.errors import CellsMissing, Diverged, StorageUnavailable, WrongConfiguration
from kallm.results.status import CellStatus, render_status

__all__ = ["Pace", "await_start", "raise_outcome", "watch"]


@dataclass(frozen=True)
class Pace:
    """How long to wait for what, in seconds."""

    poll_s: float = 2.0
    hold_s: float = 12.0
    """Trouble must last this long: a registry may answer the second time."""
    start_s: float = 60.0
    watch_s: float = 5.0
    patience_s: float = 600.0
    """A cluster or a store may be gone this long while it is watched."""


def await_start(engine: Engine, name: str, pace: Pace = Pace()) -> str:
    """Wait until a pod runs, at most a minute; what can never start is deleted.

    Returns:
        what it waits for, where nothing runs yet; else an empty text.

    Raises:
        WrongConfiguration: it cannot start; nothing of it is left.
    """
    began, troubled = time.monotonic(), None
    while True:
        progress, start, now = engine.progress(name), engine.look(name), time.monotonic()
        if start.running or (progress.finished and progress.succeeded):
            return ""
        troubled = (troubled or now) if start.trouble else None
        late = now - began >= pace.start_s
        if progress.finished:
            _give_up(engine, name, progress.sentence)
        if start.trouble and troubled is not None and (late or now - troubled >= pace.hold_s):
            _give_up(engine, name, start.trouble)
        if late and not progress.begun:
            _give_up(engine, name, "no Argo controller takes it up in this namespace; use --engine jobs")
        if late:
            return start.waiting
        time.sleep(pace.poll_s)


def watch(
    engine: Engine,
    name: str,
    read_cells: Callable[[], list[CellStatus]] | None,
    console: Console,
    pace: Pace = Pace(),
) -> Progress:
    """Show cells and pods until all is over: a live table on a terminal, else a line for every change.

    ``read_cells`` reads the store; None where it cannot be read from here.

    Raises:
        Unreachable: the cluster did not answer for ten minutes.
        StorageUnavailable: the store did not.
    """
    told, heard = "", time.monotonic()
    with _screen(console) as show:
        while True:
            try:
                progress = engine.progress(name)
                cells = read_cells() if read_cells else []
                pods = "" if progress.finished else _tell_pods(engine, name)
            except (Unreachable, StorageUnavailable) as error:
                if time.monotonic() - heard > pace.patience_s:
                    raise
                show(Text(f"no answer, the study goes on: {error}"), str(error))
                time.sleep(pace.watch_s)
                continue
            heard = time.monotonic()
            lines = "\n".join(filter(None, (f"{name}: {progress.sentence}", pods)))
            counts = Counter(cell.state for cell in cells)
            line = " · ".join([lines.replace("\n", " · "), *(f"{count} {state}" for state, count in counts.items())])
            show(Group(render_status(cells), Text(lines)) if cells else Text(lines), "" if line == told else line)
            told = line
            if progress.finished:
                return progress
            time.sleep(pace.watch_s)


def raise_outcome(progress: Progress, cells: Collection[CellStatus], *, where: str) -> None:
    """Leave with the code that the cells' states ask for; the cluster's word counts where none could be read.

    Raises:
        CellsMissing: some are neither done nor diverged.
        Diverged: all others are done.
    """
    if not cells:
        if not progress.succeeded:
            raise CellsMissing(f"it ended as: {progress.sentence}. 'kallm status' names the cells, with {where}")
        return
    missing = [cell for cell in cells if cell.state not in ("done", "diverged")]
    if missing:
        named = "; ".join(f"{_label(cell)}: {cell.detail or cell.state}" for cell in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CellsMissing(f"{len(missing)} of {len(cells)} cells are missing ({named}{more}): submit it again")
    diverged = [_label(cell) for cell in cells if cell.state == "diverged"]
    if diverged:
        raise Diverged(f"all cells have ended, but {len(diverged)} diverged: {', '.join(diverged)}")


def _give_up(engine: Engine, name: str, why: str) -> None:
    engine.remove(name)
    raise WrongConfiguration(f"{name} cannot start and is deleted: {why}")


def _tell_pods(engine: Engine, name: str) -> str:
    start = engine.look(name, pending=True)
    return start.trouble or (start.waiting if start.waiting.startswith("no node") else "")


@contextlib.contextmanager
def _screen(console: Console) -> Iterator[Callable[[RenderableType, str], None]]:
    """Yield what shows a picture on a terminal, and elsewhere a line unless it is empty."""
    if not console.is_terminal:
        yield lambda picture, line: console.print(line, markup=False, soft_wrap=True) if line else None
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda picture, line: live.update(picture, refresh=True)


def _label(cell: CellStatus) -> str:
    return cell.variant if cell.seed is None else f"{cell.variant}.seed-{cell.seed}"
