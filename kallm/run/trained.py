"""The whole model of a cell, built from its base model and from what the store holds of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kallm.errors import WrongConfiguration
from kallm.model.retrofit import RetrofitConfig, retrofit_
from kallm.model.sources import load_model, load_tokenizer
from kallm.model.start import freeze
from kallm.model.trunk import Tail, assembled, split
from kallm.results.record import EvaluationRecord, TrainingRecord, cell_key, evaluation_key, read_record
from kallm.run.training import load_trained
from kallm.store.store import Store
from kallm.study.plan import Cell, Plan

__all__ = ["TrainedCell", "open_trained", "read_evaluations", "read_training"]


@dataclass(frozen=True)
class TrainedCell:
    """A cell's whole model, frozen, on the device that it computes on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    precision: torch.autocast
    """The context that the cell was trained and evaluated in: every forward pass belongs into it."""


def read_training(store: Store, cell: Cell) -> TrainingRecord | None:
    """Return a cell's training record; None for a cell that is not trained by design.

    Raises:
        WrongConfiguration: it is not trained yet, or has diverged.
    """
    if not cell.variant.trained:
        return None
    record = read_record(store, TrainingRecord, cell_key(cell.id, "trained.json"))
    if record is None:
        raise WrongConfiguration(f"{cell.id} is not trained yet: 'kallm run' or 'kallm cell' of its study trains it")
    if record.outcome != "trained":
        raise WrongConfiguration(f"{cell.id} has no weights, it diverged: {record.cause}")
    return record


def read_evaluations(store: Store, plan: Plan, cell: Cell) -> list[EvaluationRecord]:
    """Return what evaluations of a cell there are, in the study's order."""
    found = (read_record(store, EvaluationRecord, evaluation_key(cell.id, suite)) for suite in plan.suites)
    return [record for record in found if record is not None]


@contextmanager
def open_trained(plan: Plan, cell: Cell, store: Store) -> Iterator[TrainedCell]:
    """Build the whole model of a cell; it is whole as long as the block runs.

    Raises:
        WrongConfiguration: it is not trained yet, or has diverged.
        DataMismatch: its weights are missing, damaged or other ones.
    """
    record = read_training(store, cell)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(plan.model, torch.float32).to(device).requires_grad_(False)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=plan.study.train.precision == "bf16")
    tokenizer = load_tokenizer(plan.model)
    if record is None:
        yield TrainedCell(model, tokenizer, precision)
        return
    tail = _tail(plan, cell, model)
    load_trained(store, record, tail)
    if plan.study.trainable != "tail+head":  # then the copy of the head is the head, and the model stays tied
        tail.head = model.get_output_embeddings()
    with assembled(model, tail.requires_grad_(False)) as whole:
        yield TrainedCell(whole, tokenizer, precision)


def _tail(plan: Plan, cell: Cell, model: PreTrainedModel) -> Tail:
    """Return a tail of the cell's form; all that trained in it comes from the store."""
    tail = split(model, plan.num_tail_blocks, head=plan.study.head)[1]
    retrofit_(tail, RetrofitConfig(ffn=cell.variant.spec, layers=tail.layers))
    freeze(tail, plan.study.trainable)
    return tail.eval()
