"""Several processes on one study, as ``torchrun`` starts them: the main one leads, the others train what it trains.

Only the main process claims cells, evaluates, and writes; the others wait for the next cell that is to be trained.
"""

from kallm.errors import Diverged
from kallm.progress import Reporter, Stop
from kallm.run.attempt import Attempt
from kallm.run.cell import begin_training
from kallm.run.materials import Materials
from kallm.run.trail import Trail
from kallm.store.store import Store
from kallm.study.plan import Plan

__all__ = ["follow"]


def follow(plan: Plan, store: Store, materials: Materials, reporter: Reporter, stop: Stop) -> None:
    """Train beside the main process, cell after cell, until it has no more.

    Raises:
        Preempted: a stop was requested, here or in another process.
    """
    cells = {cell.id: cell for cell in plan.cells}
    while (told := materials.workers.hear()) is not None:
        name, materials.sharing = told
        cell = cells[name]
        attempt = Attempt(cell, store, reporter, Trail(store, cell.id).reached)  # never claimed: it writes nothing
        try:
            with materials.autocast():
                begin_training(cell, store, materials, reporter, stop, attempt).run(shared=True)
        except Diverged:  # in every process alike; the main one tells it
            continue
