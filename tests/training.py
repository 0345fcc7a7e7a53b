"""A tiny tail, its packed rows and the trunk's output, for tests of training; run as a program, one process of several.

As a program it trains as the environment of ``accelerate launch`` says, and saves the weights and losses.
"""

import sys
from pathlib import Path

import torch
from conftest import make_model

from kallm.data.dialogues import Conversation
from kallm.data.packing import Row, pack
from kallm.model.trunk import Tail, split
from kallm.train.loop import Progress, Trainer, make_optimizer
from kallm.train.recipe import Recipe
from kallm.train.workers import Workers

RECIPE = Recipe(tokens=1, length=24, batch=3, micro_batch=2, epochs=2, lr=0.02)


def make_rows(num: int = 30) -> list[Row]:
    """Return rows of packed documents of 5 to 15 tokens."""
    draw = torch.Generator().manual_seed(3)
    told = [Conversation(str(n), ()) for n in range(num)]
    ids = [torch.randint(3, 259, (5 + 7 * n % 11,), generator=draw).tolist() for n in range(num)]
    return pack(told, lambda c: ids[int(c.id)], length=RECIPE.length, num_tokens=None, padding_id=2)


def make_trainer(
    recipe: Recipe = RECIPE,
    *,
    progress: Progress | None = None,
    workers: Workers | None = None,
    flat: bool = False,
) -> tuple[Tail, Trainer]:
    """Return a tail, and its trainer at the start."""
    rows = make_rows()
    trunk, tail = split(make_model(), 2)
    hidden = [trunk(row.passage) for row in rows]
    optimizer = make_optimizer(tail, recipe)
    given = progress or Progress()
    return tail, Trainer(tail, optimizer, rows, hidden, recipe, seed=4, progress=given, workers=workers, flat=flat)


def main() -> None:
    """Train together with the other processes; each saves what it has."""
    workers = Workers()
    tail, trainer = make_trainer(RECIPE.model_copy(update={"batch": int(sys.argv[2])}), workers=workers)
    while not trainer.is_done:
        trainer.advance(lambda: None)
    saved = {"weights": tail.state_dict(), "history": trainer.progress.history, "num": workers.num}
    torch.save(saved, Path(sys.argv[1]) / f"{workers.rank}.pt")
    workers.wait()


if __name__ == "__main__":
    main()
