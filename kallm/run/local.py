"""A whole study on this machine: every unfinished cell, on one trunk."""

import gc
from collections.abc import Callable

from kallm.errors import Diverged, GaveUp
from kallm.progress import Reporter, Stop, Tracker
from kallm.results.record import cell_key, record_study
from kallm.run.cell import run_cell
from kallm.run.crew import follow
from kallm.run.finished import is_finished
from kallm.run.lockstep import train_together
from kallm.run.materials import Materials
from kallm.run.probes import probe_variants
from kallm.run.queue import WAIT_S, Queue
from kallm.run.training import receipt_of
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
    probe: bool = False,
) -> list[str]:
    """Finish cells, in turn or (those of one seed) in lockstep; one that diverges or gives up does not end the others.

    A cell that another process works on is left until the others are done, and then waited for: it is finished there,
    or goes on here when the other gives no sign any more. With ``probe``, every variant that is still to be trained is
    measured alone first, where the store has no measurement on this hardware.

    Returns:
        The causes of the cells that diverged.

    Raises:
        WrongConfiguration: a package that ``train.report_to`` needs is not installed.
        Preempted: a stop was requested; what was done is saved.
        SystemExit: this is not the main one of several processes (``torchrun``), and has trained beside it to the end.
        GaveUp: all others are finished, but some cells gave up.
    """
    check_reporters(plan.study.train.report_to)
    materials = Materials(plan, reporter, stop)
    workers = materials.workers
    if not workers.is_main:
        reporter.hush()
        follow(plan, store, materials, reporter, stop)
        raise SystemExit(0)
    if isinstance(store, S3Store):
        store.on_transfer = reporter.tell_transfer
    record_study(store, plan.document)
    open_cells = [cell for cell in cells if not is_finished(store, cell, list(plan.suites))]
    if not open_cells:
        reporter.say(f"all {len(cells)} cells are finished: nothing to train, nothing to evaluate")
        workers.tell(None)
        return []
    queue = Queue(open_cells, store, reporter, stop, wait_s=wait_s)
    try:
        if probe and workers.num == 1:
            variants = {cell.name for cell in open_cells}
            probe_variants(plan, store, reporter, stop, receipt=receipt_of(plan), variants=variants)
        with reporter.track(f"study {plan.study.name}", len(cells), "cells", done=len(cells) - len(open_cells)) as told:
            return _finish_all(queue, materials, shared=len(cells) > 1, told=told, after=after_cell)
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
        for cause in _train_with_partners(cell, queue, materials):
            diverged.append(cause)
            reporter.say(cause)
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
    materials.workers.tell(None)
    if gave_up:
        raise GaveUp("; ".join(gave_up))
    return diverged


def _train_with_partners(chosen: Cell, queue: Queue, materials: Materials) -> list[str]:
    """Train a cell and others of its seed in lockstep where that is how they share; return who diverged, and why."""
    left = [cell for cell in queue.cells if _is_untrained(cell, queue.store)]
    if chosen not in left:
        return []
    sharing = materials.sharing or materials.share(left)
    others = [cell for cell in left if cell.seed == chosen.seed and cell is not chosen]
    partners = [chosen, *others][: sharing.together if materials.workers.num == 1 else 1]
    if len(partners) == 1:
        return []
    return train_together(partners, queue.store, materials, queue.reporter, queue.stop, queue.clock)


def _is_untrained(cell: Cell, store: Store) -> bool:
    return cell.variant.trained and store.get(cell_key(cell.id, "trained.json")) is None
