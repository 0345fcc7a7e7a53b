"""A whole study on this machine: every unfinished cell in turn, on one trunk, then the table."""

import gc
from collections.abc import Callable

from kallm.errors import Diverged
from kallm.progress import Reporter, Stop
from kallm.results.record import study_key
from kallm.run.cell import run_cell
from kallm.run.finished import is_finished
from kallm.run.materials import Materials
from kallm.store.store import Store
from kallm.study.plan import Cell, Plan

__all__ = ["record_study", "run_cells"]


def record_study(store: Store, plan: Plan) -> None:
    """Leave ``study.json``, which the table and every reader start from."""
    store.create(study_key(plan.document.name, plan.document.hash, "study.json"), plan.document.to_bytes())


def run_cells(
    plan: Plan,
    cells: list[Cell],
    store: Store,
    reporter: Reporter,
    stop: Stop,
    *,
    after_cell: Callable[[], None] = lambda: None,
) -> list[str]:
    """Finish cells one after the other; a diverged one does not end the others.

    Returns:
        The causes of the cells that diverged.

    Raises:
        Preempted: a stop was requested; what was done is saved.
    """
    record_study(store, plan)
    open_cells = [cell for cell in cells if not is_finished(store, cell, list(plan.suites))]
    if not open_cells:
        reporter.say(f"all {len(cells)} cells are finished: nothing to train, nothing to evaluate")
        return []
    diverged: list[str] = []
    materials = Materials(plan, reporter, stop)
    with reporter.track(f"study {plan.study.name}", len(cells), "cells", done=len(cells) - len(open_cells)) as tracker:
        for number, cell in enumerate(open_cells, start=1):
            reporter.say(f"cell {number} of {len(open_cells)}: {cell.id}")
            try:
                run_cell(cell, store, materials, reporter, stop, shared=len(cells) > 1)
            except Diverged as error:
                diverged.append(f"{cell.id}: {error}")
                reporter.say(diverged[-1])
            gc.collect()
            tracker.advance()
            after_cell()
    return diverged
