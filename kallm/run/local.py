"""A whole study on this machine: every unfinished cell in turn, on one trunk."""

import gc
from collections.abc import Callable

from kallm.errors import Diverged, GaveUp
from kallm.progress import Reporter, Stop, Tracker
from kallm.results.record import record_study
from kallm.run.cell import run_cell
from kallm.run.finished import is_finished
from kallm.run.materials import Materials
from kallm.run.queue import WAIT_S, Queue
from kallm.store.s3 import S3Store
from kallm.store.store import Store
from kallm.study.plan import Cell, Plan
from kallm.train.reporting import check_reporters

__all__ = ["run_cells"]


def run_cells(
    plan: Plan,
    cells: list[Cell],
    store: Store,
    reporter: Reporter,
    stop: Stop,
    *,
    after_cell: Callable[[], None] = lambda: None,
    wait_s: float = WAIT_S,
) -> list[str]:
    """Finish cells one after the other; one that diverges or gives up does not end the others.

    A cell that another process works on is left until the others are done, and then waited for: it is finished there,
    or goes on here when the other gives no sign any more.

    Returns:
        The causes of the cells that diverged.

    Raises:
        WrongConfiguration: a package that ``train.report_to`` needs is not installed.
        Preempted: a stop was requested; what was done is saved.
        GaveUp: all others are finished, but some cells gave up.
    """
    check_reporters(plan.study.train.report_to)
    if isinstance(store, S3Store):
        store.on_transfer = reporter.tell_transfer
    record_study(store, plan.document)
    open_cells = [cell for cell in cells if not is_finished(store, cell, list(plan.suites))]
    if not open_cells:
        reporter.say(f"all {len(cells)} cells are finished: nothing to train, nothing to evaluate")
        return []
    queue = Queue(open_cells, store, reporter, stop, wait_s=wait_s)
    try:
        with reporter.track(f"study {plan.study.name}", len(cells), "cells", done=len(cells) - len(open_cells)) as told:
            return _finish_all(
                queue, Materials(plan, reporter, stop), shared=len(cells) > 1, told=told, after=after_cell
            )
    finally:
        stop.disarm()


def _finish_all(
    queue: Queue, materials: Materials, *, shared: bool, told: Tracker, after: Callable[[], None]
) -> list[str]:
    store, reporter, stop = queue.store, queue.reporter, queue.stop
    diverged: list[str] = []
    gave_up: list[str] = []
    total = len(queue.cells)
    while (cell := queue.choose()) is not None:
        reporter.say(f"cell {total - len(queue.cells) + 1} of {total}: {cell.id}")
        try:
            if not run_cell(cell, store, materials, reporter, stop, queue.clock, shared=shared):
                queue.pause()
                continue
        except Diverged as error:
            diverged.append(f"{cell.id}: {error}")
            reporter.say(diverged[-1])
        except GaveUp as error:
            gave_up.append(str(error))
            reporter.say(gave_up[-1])
        queue.cells.remove(cell)
        gc.collect()
        told.advance()
        after()
    if gave_up:
        raise GaveUp("; ".join(gave_up))
    return diverged
