"""How many tokens each variant needed to reach a training loss, read from the training records' histories.

Histories are smoothed by a running mean over a twentieth of the training; a level is reached where the smoothed loss
first comes down to it. Cells of one seed read the same batches, so that the noise of the batches is common to them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kallm.results.record import TrainingRecord
from kallm.results.schema import Table

__all__ = ["Reach", "find_reach"]

_WINDOW = 1 / 20
_FRACTIONS = (0.1, 0.25, 0.5, 0.75, 1.0)
_FEWEST = 5
"""Fewest points of a history that levels are read from."""

_Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Reach:
    """Tokens to a ladder of losses, from the highest down.

    Attributes:
        pacer: the control of the study's first contrast, or without one the variant whose loss ends lowest; the levels
            are its smoothed losses after 10, 25, 50, 75 and 100 % of its training, rounded up.
        is_control: whether it is the control.
        levels: in nats per token.
        decimals: how many the levels have.
        tokens: by variant and level: mean tokens of the seeds that reached it (None: none did), and their number.
        seeds: by variant, how many seeds are trained.
    """

    pacer: str
    is_control: bool
    levels: tuple[float, ...]
    decimals: int
    tokens: dict[str, tuple[tuple[float | None, int], ...]]
    seeds: dict[str, int]


def find_reach(table: Table, trainings: Mapping[str, TrainingRecord]) -> Reach | None:
    """Return the tokens that each trained variant needed, in the table's order; None where histories are too short."""
    curves: dict[str, list[_Curve]] = {}
    for cell in table.cells:
        record = trainings.get(cell.id)
        if record is not None and record.outcome == "trained" and len(record.loss_history) >= _FEWEST:
            curves.setdefault(cell.variant, []).append(_smooth(record))
    if not curves:
        return None
    control = next((contrast.right for contrast in table.contrasts if contrast.role == "declared"), None)
    pacer = control if control in curves else min(curves, key=lambda variant: _mean_at(curves[variant], 1.0))
    values = [_mean_at(curves[pacer], fraction) for fraction in _FRACTIONS]
    decimals = 2 if values[0] - values[-1] >= 0.1 else 3
    # 1e-9: a level must not go up by a step because a decimal has no exact binary
    levels = sorted({math.ceil(value * 10**decimals - 1e-9) / 10**decimals for value in values}, reverse=True)
    tokens = {
        variant: tuple(_average([_find_tokens(curve, level) for curve in members]) for level in levels)
        for variant, members in curves.items()
    }
    seeds = {variant: len(members) for variant, members in curves.items()}
    return Reach(pacer, pacer == control, tuple(levels), decimals, tokens, seeds)


def _smooth(record: TrainingRecord) -> _Curve:
    """Return (tokens, lowest running mean so far)."""
    history = record.loss_history
    width = max(1, round(len(history) * _WINDOW))
    curve, lowest = [], math.inf
    for end in range(width, len(history) + 1):
        lowest = min(lowest, sum(loss for _, loss in history[end - width : end]) / width)
        curve.append((history[end - 1][0] / record.steps * record.tokens, lowest))
    return curve


def _mean_at(curves: Sequence[_Curve], fraction: float) -> float:
    """Return the mean over seeds of the lowest loss within a fraction of the training."""
    found = [
        next((loss for tokens, loss in curve if tokens >= fraction * curve[-1][0]), curve[-1][1]) for curve in curves
    ]
    return sum(found) / len(found)


def _find_tokens(curve: _Curve, level: float) -> float | None:
    return next((tokens for tokens, loss in curve if loss <= level), None)


def _average(found: Sequence[float | None]) -> tuple[float | None, int]:
    reached = [tokens for tokens in found if tokens is not None]
    return (sum(reached) / len(reached) if reached else None), len(reached)
