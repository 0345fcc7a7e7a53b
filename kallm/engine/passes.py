"""One passage through a subject's tail, and the logits of some of its positions.

Legend: T tokens, D width of the residual stream, W of what the trunk gave, V vocabulary, N rows.
"""

import contextlib
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from kallm.engine.subject import Subject
from kallm.model.passage import Passage

__all__ = ["ROWS", "compute_logits", "compute_states", "precision"]

ROWS = 256
"""Rows of logits at a time: [256, V] in fp32 are 50 MB for a vocabulary of 49,152."""


def precision(subject: Subject) -> AbstractContextManager[object]:
    """Return the context in which a subject computes: autocast where the trunk is narrower than the tail's weights."""
    weight = subject.tail.head.weight
    if subject.model.dtype == weight.dtype:
        return contextlib.nullcontext()
    return torch.autocast(weight.device.type, dtype=subject.model.dtype)


def compute_states(subject: Subject, passage: Passage, hidden: Float[Tensor, "T W"]) -> Float[Tensor, "T D"]:
    """Return the tail's normalised last hidden states for one passage, [T, D], from the trunk's output."""
    device = subject.tail.head.weight.device
    mask = None if passage.mask is None else passage.mask[None].to(device)
    with precision(subject):
        states: Tensor = subject.tail(hidden[None].to(device), passage.position_ids[None].to(device), mask)
    return states[0]


def compute_logits(subject: Subject, states: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
    """Return fp32 logits, [N, V]."""
    with precision(subject):
        logits: Tensor = subject.tail.head(states)
    return logits.float()
