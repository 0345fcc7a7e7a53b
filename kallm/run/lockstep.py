"""Cells of one seed in lockstep: each batch goes through the trunk once, and is read by every cell."""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kallm.errors import Diverged, GaveUp
from kallm.progress import Reporter, Stop
from kallm.run.attempt import Attempt
from kallm.run.background import Background
from kallm.run.cell import begin_training
from kallm.run.materials import Materials
from kallm.run.trail import StoreClock, Trail
from kallm.run.training import Training
from kallm.store.store import Store
from kallm.study.plan import Cell

__all__ = ["train_together"]


@dataclass
class _Member:
    """A cell that is open: its training, and what closes it and then its attempt."""

    training: Training
    opened: contextlib.ExitStack
    attempt: contextlib.ExitStack

    @property
    def step(self) -> int:
        return self.training.trainer.progress.step

    def complete(self) -> None:
        """Commit the weights, create the record, and leave."""
        self.opened.close()
        self.training.complete(shared=True)
        self.attempt.close()

    def drop(self, error: Diverged) -> None:
        """Leave as the error says."""
        with contextlib.suppress(Diverged), self.attempt, self.opened:
            raise error


def train_together(
    cells: Sequence[Cell], store: Store, materials: Materials, reporter: Reporter, stop: Stop, clock: StoreClock
) -> list[str]:
    """Train cells of one seed, each to its end; those that are not trained and not worked on elsewhere.

    Where their checkpoints stand at different steps, those behind go first. A cell that diverges drops out, the others
    go on. What else becomes of a cell (its evaluation, its giving up) is told when its own turn comes.

    Returns:
        The causes of the cells that diverged.

    Raises:
        Preempted: a stop was requested; every open cell is saved.
    """
    diverged: list[str] = []
    with materials.autocast():
        materials.prepare_suites()
        with _opened(cells, store, materials, reporter, stop, clock) as members:
            while members:
                for member in _next_step(members, materials, stop):
                    try:
                        member.training.advance(shared=True)
                    except Diverged as error:
                        diverged.append(f"{member.training.cell.id}: {error}")
                        member.drop(error)
                        members.remove(member)
    gc.collect()
    return diverged


@contextlib.contextmanager
def _opened(
    cells: Sequence[Cell], store: Store, materials: Materials, reporter: Reporter, stop: Stop, clock: StoreClock
) -> Iterator[list[_Member]]:
    """Open the cells; what is still open when the block is left, for whatever reason, is closed by that reason."""
    with Background() as background, contextlib.ExitStack() as all_of_them:
        members: list[_Member] = []
        materials.trunk_pass.hold([0], stop)  # each looks at the first row when it opens
        for cell in cells:
            attempt = all_of_them.enter_context(contextlib.ExitStack())
            training = _claimed(cell, store, materials, reporter, stop, clock, attempt)
            if training is not None:
                opened = attempt.enter_context(contextlib.ExitStack())
                opened.enter_context(training.opened(materials.trunk_pass, background))
                members.append(_Member(training, opened, attempt))
        labels = ", ".join(member.training.cell.label for member in members)
        reporter.say(f"in lockstep, on one trunk pass per batch: {labels}")
        yield members


def _claimed(
    cell: Cell,
    store: Store,
    materials: Materials,
    reporter: Reporter,
    stop: Stop,
    clock: StoreClock,
    stack: contextlib.ExitStack,
) -> Training | None:
    """Claim a cell and begin its training; None where another works on it, or its patience is at an end."""
    trail = Trail(store, cell.id)
    try:
        trail.check_patience()
    except GaveUp:
        return None
    attempt = Attempt(cell, store, reporter, trail.reached)
    if not attempt.claim(clock):
        return None
    stack.enter_context(attempt)
    try:
        return begin_training(cell, store, materials, reporter, stop, attempt)
    except Diverged:  # at every learning rate; the record stands and is told when the cell's turn comes
        return None


def _next_step(members: list[_Member], materials: Materials, stop: Stop) -> list[_Member]:
    """Complete who is at the end, and return who takes the next step, its batch run through the trunk."""
    for member in [each for each in members if each.training.trainer.is_done]:
        member.complete()
        members.remove(member)
    if not members:
        return []
    step = min(member.step for member in members)
    behind = [member for member in members if member.step == step]
    first = behind[0].training
    materials.trunk_pass.hold(first.workers.share(first.trainer.next_rows()), stop)
    return behind
