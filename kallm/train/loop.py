"""The training loop of one cell: straight down, the same batches for every cell of a seed."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from kallm.data.packing import Row
from kallm.errors import Diverged
from kallm.model.trunk import HiddenCache, Tail
from kallm.train.loss import summed_cross_entropy
from kallm.train.recipe import Recipe

__all__ = ["Progress", "make_optimizer", "train"]


@dataclass
class Progress:
    """How far a cell is; all of it is in its checkpoints.

    Attributes:
        step: optimiser steps done.
        tokens: tokens seen, padding included.
        supervised_tokens: tokens that had a target.
        history: (step, mean loss of that step in nats per supervised token).
        seconds: time spent in steps, over all attempts that a checkpoint remembers.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


def make_optimizer(tail: Tail, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW over the tail's trainable parameters."""
    trainable = [parameter for parameter in tail.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True)


def train(
    tail: Tail,
    optimizer: torch.optim.AdamW,
    rows: Sequence[Row],
    hidden: HiddenCache,
    recipe: Recipe,
    *,
    seed: int,
    progress: Progress,
    after_step: Callable[[Progress, dict[str, float]], None],
    stop: Callable[[], None],
) -> None:
    """Train a tail from ``progress`` to the end of the recipe, in place.

    Args:
        tail: what trains; the parameters that do not require gradients stay.
        optimizer: from ``make_optimizer``, its state restored where ``progress`` is not at the start.
        rows: the packed corpus.
        hidden: the trunk's output for each row.
        recipe: how to train.
        seed: sets the order of the rows.
        progress: where training stands; updated after each step.
        after_step: called with the progress and the step's figures; may save, may raise.
        stop: polled before each forward pass; raises to stop, and the step is then not counted.

    Raises:
        Diverged: the loss or the gradient is not finite.
    """
    num_steps = recipe.num_steps(len(rows))
    tail.train()
    while progress.step < num_steps:
        began = time.monotonic()
        batch = recipe.rows_of(progress.step, len(rows), seed)
        lr = recipe.lr_at(progress.step, num_steps)
        loss, norm = _step(tail, optimizer, batch, rows, hidden, recipe, lr, stop)
        tokens, seconds = len(batch) * recipe.length, time.monotonic() - began
        progress.step += 1
        progress.tokens += tokens
        progress.supervised_tokens += sum(rows[index].num_supervised for index in batch)
        progress.seconds += seconds
        progress.history.append((progress.step, loss))
        figures = {"loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens, "seconds": seconds}
        after_step(progress, figures)


def _step(
    tail: Tail,
    optimizer: torch.optim.AdamW,
    batch: list[int],
    rows: Sequence[Row],
    hidden: HiddenCache,
    recipe: Recipe,
    lr: float,
    stop: Callable[[], None],
) -> tuple[float, float]:
    """Take one optimiser step; return the loss in nats per supervised token and the gradient's norm."""
    supervised = sum(rows[index].num_supervised for index in batch)
    loss = 0.0
    for first in range(0, len(batch), recipe.micro_batch):
        stop()
        part = batch[first : first + recipe.micro_batch]
        summed = _forward(tail, [rows[index] for index in part], [hidden[index] for index in part])
        torch.autograd.backward(summed / supervised)
        loss += float(summed.detach()) / supervised
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(trainable, recipe.clip))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Diverged(f"the loss is {loss:g} and the gradient's norm {norm:g}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def _forward(tail: Tail, rows: list[Row], hidden: list[torch.Tensor]) -> torch.Tensor:
    """Return the summed loss of some rows."""
    device = tail.head.weight.device
    out = tail(
        torch.stack(hidden).to(device),
        torch.stack([row.passage.position_ids for row in rows]).to(device),
    )
    targets = torch.stack([row.targets for row in rows]).to(device)
    return summed_cross_entropy(out.flatten(0, 1), tail.head.weight, targets.flatten())
