"""The training of one tail: straight down, the same batches for every cell of a seed."""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import psutil
import torch
from jaxtyping import Float
from torch import Tensor, nn

from kallm.data.packing import Row
from kallm.errors import Diverged, Preempted
from kallm.model.trunk import Tail
from kallm.model.whole import OwnHead
from kallm.train.loss import summed_cross_entropy, summed_cross_entropy_of
from kallm.train.recipe import Recipe
from kallm.train.workers import Workers

__all__ = ["Hidden", "Progress", "StepFigures", "Trainer", "make_optimizer", "train"]

DIVERGED_NATS = 1.0
DIVERGED_SHARE = 0.1
DIVERGED_STEPS = 10

StepFigures = dict[str, float | str]


@runtime_checkable
class Hidden(Protocol):
    """The trunk's output by row: a cache, or what one pass of the trunk gave for all cells."""

    def __getitem__(self, index: int, /) -> Float[Tensor, "T D"]:
        """Return the residual stream before the tail for one row."""


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
    return torch.optim.AdamW(
        trainable, lr=recipe.rate, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )


class Trainer:
    """Takes the steps of a recipe with one tail, one at a time, so that several tails can go in lockstep.

    Attributes:
        progress: where training stands; updated after each step.
        num_steps: the optimiser steps of the whole training.
    """

    def __init__(
        self,
        tail: Tail,
        optimizer: torch.optim.AdamW,
        rows: Sequence[Row],
        hidden: Hidden,
        recipe: Recipe,
        *,
        seed: int,
        progress: Progress,
        workers: Workers | None = None,
        flat: bool = False,
    ) -> None:
        """Take up training where ``progress`` says it stands.

        Args:
            tail: what trains, in place; the parameters that do not require gradients stay.
            optimizer: from ``make_optimizer``, its state restored where ``progress`` is not at the start.
            rows: the packed corpus.
            hidden: the trunk's output for each row.
            recipe: how to train.
            seed: sets the order of the rows.
            progress: a new one, or a checkpoint's.
            workers: the processes that share each batch, where there are several.
            flat: whether the rows of a forward pass go as one long row, as flash attention needs them.

        Raises:
            WrongConfiguration: there are more processes than rows in a batch.
        """
        self._tail, self._optimizer, self._rows, self._hidden = tail, optimizer, rows, hidden
        self._recipe, self._seed, self.progress = recipe, seed, progress
        self._workers, self._flat = workers or Workers(), flat
        self._workers.check(recipe.batch)
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._forward = torch.compile(tail) if recipe.compile else tail
        self.num_steps = recipe.num_steps(len(rows))

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken."""
        return self.progress.step >= self.num_steps

    def next_rows(self) -> list[int]:
        """Return the rows of the step that comes next, of all processes together."""
        return self._recipe.rows_of(self.progress.step, len(self._rows), self._seed)

    def advance(self, stop: Callable[[], None]) -> StepFigures:
        """Take one step and return its figures.

        Args:
            stop: polled before each forward pass (by several processes: once a step); raises to stop, and the step is
                then not counted.

        Raises:
            Diverged: the loss or the gradient is not finite, or the loss has been above its start for long.
            Preempted: ``stop`` raised it, here or in another process.
        """
        began, progress, batch = time.monotonic(), self.progress, self.next_rows()
        self._tail.train()
        lr = self._recipe.lr_at(progress.step, self.num_steps)
        loss, norm = self._step(batch, lr, self._agreed(stop))
        tokens, seconds = len(batch) * self._recipe.length, time.monotonic() - began
        progress.step += 1
        progress.tokens += tokens
        progress.supervised_tokens += self._supervised(batch)
        progress.seconds += seconds
        progress.history.append((progress.step, loss))
        _check_history(progress.history, self.num_steps)
        return {
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens": tokens,
            "seconds": seconds,
            "memory_bytes": _memory_bytes(),
            "batch": _batch_hash([self._rows[index] for index in batch]),
        }

    def _agreed(self, stop: Callable[[], None]) -> Callable[[], None]:
        """Return what to poll within a step: several processes ask once, before it, and stop together."""
        if self._workers.num == 1:
            return stop
        error = None
        try:
            stop()
        except Preempted as asked:
            error = asked
        if self._workers.any_is(error is not None):
            raise error or Preempted("another process of this training was stopped")
        return lambda: None

    def _supervised(self, batch: list[int]) -> int:
        return sum(self._rows[index].num_supervised for index in batch)

    def _step(self, batch: list[int], lr: float, stop: Callable[[], None]) -> tuple[float, float]:
        """Take one optimiser step; return the loss in nats per supervised token and the gradient's norm."""
        supervised, own = self._supervised(batch), self._workers.share(batch)
        loss = 0.0
        self._optimizer.zero_grad(set_to_none=True)  # a step that was stopped halfway left its gradients
        for first in range(0, len(own), self._recipe.micro_batch):
            stop()
            summed = self.forward(own[first : first + self._recipe.micro_batch])
            torch.autograd.backward(summed / supervised)
            loss += float(summed.detach()) / supervised
        self._workers.sum_gradients_(self._parameters)
        loss = self._workers.sum_value(loss)
        norm = float(nn.utils.clip_grad_norm_(self._parameters, self._recipe.clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(f"the loss is {loss:g} and the gradient's norm {norm:g} at step {self.progress.step + 1}")
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def forward(self, indices: list[int]) -> Float[Tensor, ""]:
        """Return the summed loss of some rows, in nats, ready for a backward pass."""
        head, rows = self._tail.head.weight, [self._rows[index] for index in indices]
        hidden = torch.stack([self._hidden[index] for index in indices])
        positions = torch.stack([row.passage.position_ids for row in rows])
        if self._flat:
            hidden, positions = hidden.flatten(0, 1)[None], positions.flatten()[None]
        out = self._forward(hidden.to(head.device), positions.to(head.device))
        targets = torch.stack([row.targets for row in rows]).to(head.device)
        if isinstance(self._tail.head, OwnHead):
            return summed_cross_entropy_of(out.flatten(0, 1), self._tail.head, targets.flatten())
        return summed_cross_entropy(out.flatten(0, 1), head, targets.flatten())


def train(
    trainer: Trainer,
    *,
    after_step: Callable[[Progress, StepFigures], None],
    stop: Callable[[], None],
) -> None:
    """Take all steps that are left.

    Args:
        trainer: what trains.
        after_step: called with the progress and the step's figures; may save, may raise.
        stop: polled as ``Trainer.advance`` says.

    Raises:
        Diverged: training left the numbers, or the loss stayed above its start.
    """
    while not trainer.is_done:
        figures = trainer.advance(stop)
        after_step(trainer.progress, figures)


def _check_history(history: list[tuple[int, float]], num_steps: int) -> None:
    """Judge by the mean of the last tenth of the steps (at least ten), when that many have followed the first.

    Raises:
        Diverged: it is more than one nat above the loss of the first step.
    """
    window = max(DIVERGED_STEPS, math.ceil(DIVERGED_SHARE * num_steps))
    if len(history) <= window:
        return
    mean, start = sum(loss for _, loss in history[-window:]) / window, history[0][1]
    if mean > start + DIVERGED_NATS:
        raise Diverged(
            f"the loss has been above its start for long: {mean:.4g} nats on the mean of the {window} steps to step "
            f"{history[-1][0]}, {start:.4g} at the first step; lower train.lr"
        )


def _batch_hash(rows: list[Row]) -> str:
    return hashlib.sha256("".join(row.fingerprint() for row in rows).encode()).hexdigest()[:12]


def _memory_bytes() -> int:
    """Return what this process holds now: allocated on the GPU, or resident."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(psutil.Process().memory_info().rss)
