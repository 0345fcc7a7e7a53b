"""How the cells of a run share the trunk: by a cache on disk, by lockstep, or not at all. Decided before training.

The estimate counts how often the trunk would go over the corpus. One pass needs no cache. More than one do: then the
trunk's output is kept on disk where it fits, and else the cells of a seed go in lockstep, as many as memory holds.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kallm.study.plan import Cell, Plan

__all__ = ["Room", "Sharing", "Work", "choose_sharing", "work_of"]

_MEMORY_SHARE = 0.8
"""Of the free memory, what the tails may take: activations need some too."""
_VALUE_BYTES = 4
_GB = 1e9
_ONE_RUN = {"trackio", "wandb"}
"""Reporters that keep one run open in a process."""


@dataclass(frozen=True)
class Work:
    """What is left to train.

    Attributes:
        trunk_blocks: blocks of the trunk; where there are none, its output is only the embedding.
        seeds: the seed of each unfinished cell.
        epochs: passes over the corpus, of each cell.
        num_rows, length: the packed corpus.
        batch: rows of an optimiser step.
        width: of the residual stream.
        tail_parameters: of the largest tail, frozen ones too.
        trainable: parameters of the largest tail that train.
        alone: why cells cannot be open together; None where they can.
    """

    trunk_blocks: int
    seeds: Sequence[int]
    epochs: int
    num_rows: int
    length: int
    batch: int
    width: int
    tail_parameters: int
    trainable: int
    alone: str | None = None

    @property
    def hidden_bytes(self) -> int:
        """What the trunk's output for the corpus takes: rows × tokens × width × 4."""
        return self.num_rows * self.length * self.width * _VALUE_BYTES

    @property
    def cell_bytes(self) -> int:
        """What each further cell takes that is open: its tail, and AdamW's two moments."""
        return 4 * self.tail_parameters + 8 * self.trainable

    @property
    def common_bytes(self) -> int:
        """What is there once, however many cells are open: a step's hidden states, gradients, a checkpoint's copy."""
        rows = min(self.batch, self.num_rows)
        return rows * self.length * self.width * _VALUE_BYTES + 16 * self.trainable

    def num_passes(self, together: int) -> int:
        """Return how often the trunk goes over the corpus where so many cells of a seed share a pass."""
        return self.epochs * sum(-(-count // together) for count in Counter(self.seeds).values())


@dataclass(frozen=True)
class Room:
    """What there is to hold it.

    Attributes:
        disk_bytes: what a cache may take of the disk now.
        kept_bytes: what of the corpus's cache is on the disk already.
        bound_bytes: ``train.cache_gb``; None leaves it to the disk.
        memory_bytes: free where the tails train.
        folder: where the cache lies, for the sentence.
    """

    disk_bytes: int
    kept_bytes: int
    bound_bytes: int | None
    memory_bytes: int
    folder: str


@dataclass(frozen=True)
class Sharing:
    """How the cells share the trunk.

    Attributes:
        cached: whether the trunk's output is kept on disk; then cells train one after the other.
        together: how many cells of a seed go in lockstep, at most; 1 where it is cached.
        why: one line for people.
    """

    cached: bool
    together: int
    why: str


def work_of(plan: Plan, cells: Sequence[Cell], *, num_rows: int, trunk_blocks: int) -> Work:
    """Return what some cells of a plan, all of them to be trained, have before them."""
    model, recipe = plan.model, plan.study.train
    tail = slice(model.num_blocks - plan.num_tail_blocks, None)
    rest = sum(model.blocks[tail]) - sum(model.ffns[tail]) + model.other + model.head
    single = sorted(_ONE_RUN & set(recipe.report_to))
    return Work(
        trunk_blocks=trunk_blocks,
        seeds=[cell.seed for cell in cells if cell.seed is not None],
        epochs=recipe.epochs,
        num_rows=num_rows,
        length=recipe.length,
        batch=recipe.batch,
        width=model.width,
        tail_parameters=max(cell.parameters.ffn for cell in cells) + rest,
        trainable=max(cell.parameters.trainable for cell in cells),
        alone=f"train.report_to names {' and '.join(single)}, where one cell at a time reports" if single else None,
    )


def choose_sharing(work: Work, room: Room) -> Sharing:
    """Return how unfinished cells share the trunk; nothing is touched."""
    cells, epochs = _count(len(work.seeds), "cell"), _count(work.epochs, "epoch")
    if not work.trunk_blocks:
        return Sharing(False, 1, "trunk: none, for the tail is the whole model; cells train one after the other")
    if work.num_passes(1) == 1:
        return Sharing(False, 1, f"trunk: one pass per batch, for {cells} and {epochs} read it only once")
    size = f"{work.hidden_bytes / _GB:.3g} GB"
    refusal = _refuse_cache(work, room)
    if refusal is None:
        told = f"trunk: kept on disk, {size} in {room.folder}, and run once instead of {work.num_passes(1)} times"
        return Sharing(True, 1, f"{told} ({cells}, {epochs})")
    together, limit = _count_together(work, room)
    passes = f"the trunk goes over the corpus {_count(work.num_passes(together), 'time')}"
    how = f"for {together} cells in lockstep" if together > 1 else "cell by cell"
    parts = [refusal, *([limit] if limit else []), f"so {passes} ({cells}, {epochs})"]
    return Sharing(False, together, f"trunk: one pass per batch {how}: {'; '.join(parts)}")


def _refuse_cache(work: Work, room: Room) -> str | None:
    """Return why the corpus is not cached, or None."""
    size = f"its output would take {work.hidden_bytes / _GB:.3g} GB"
    if room.bound_bytes is not None and work.hidden_bytes > room.bound_bytes:
        return f"{size}, but train.cache_gb allows {room.bound_bytes / _GB:.3g}"
    if work.hidden_bytes - room.kept_bytes > room.disk_bytes:
        return f"{size}, but the disk of {room.folder} has room for {room.disk_bytes / _GB:.3g}"
    return None


def _count_together(work: Work, room: Room) -> tuple[int, str | None]:
    """Return how many cells of a seed go in lockstep, and why not all of them where there are more."""
    wanted = max(Counter(work.seeds).values())
    if wanted > 1 and work.alone is not None:
        return 1, work.alone
    fitting = max(1, int((_MEMORY_SHARE * room.memory_bytes - work.common_bytes) // max(work.cell_bytes, 1)))
    if fitting >= wanted:
        return wanted, None
    free = f"{room.memory_bytes / _GB:.3g} GB of memory are free"
    return fitting, f"a tail with its optimiser takes {work.cell_bytes / _GB:.3g} GB and {free}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
