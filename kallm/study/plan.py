"""From a study to its cells: identities, counts and what it will cost. Imports no torch, loads no weights."""

from dataclasses import dataclass
from typing import Any

from kallm.data.dialogues import identify_dialogues
from kallm.errors import WrongConfiguration
from kallm.evaluate.suites import SuiteSettings
from kallm.model.facts import ModelFacts
from kallm.model.sources import look_up_model
from kallm.results.record import CellEntry, Parameters, StudyDocument, SuiteEntry
from kallm.store.sealed import short_hash
from kallm.study.study import Study, Variant
from kallm.train.probe import ProbeRequest

__all__ = ["CALIBRATION_TOKENS", "NUMERICS", "Cell", "Cost", "Plan", "estimate_cost", "make_plan", "request_probe"]

NUMERICS = 5
"""Counts up when the code changes a trained weight: cells trained before keep their own keys."""

CALIBRATION_TOKENS = 32_768
"""Tokens of the corpus, at most, that ``start: fitted`` fits to."""

_CHOICES = 1
"""Counts up when the code changes how a learning rate is chosen."""

_DEMONSTRATION_TOKENS = 1_000_000

_WITHOUT_POSITION_IDS = {"bloom", "falcon_mamba", "mamba", "mamba2", "mpt", "rwkv", "xlnet", "xlstm"}
"""Model types whose forward pass takes no position ids: nothing would keep packed documents, and options, apart."""


@dataclass(frozen=True)
class Cell:
    """One variant and one seed under one recipe: the unit that is trained, evaluated, retried and skipped."""

    name: str
    """The variant's name."""
    variant: Variant
    seed: int | None
    identity: dict[str, Any]
    """All that can change a trained weight."""
    parameters: Parameters

    @property
    def hash(self) -> str:
        """Hash of the identity."""
        return short_hash(self.identity)

    @property
    def id(self) -> str:
        """``<variant>.seed-<n>.<hash>``, or ``<variant>.<hash>`` for a cell that is not trained."""
        return f"{self.label}.{self.hash}"

    @property
    def label(self) -> str:
        """The id without its hash, for people."""
        return self.name if self.seed is None else f"{self.name}.seed-{self.seed}"

    @property
    def choice(self) -> str | None:
        """Hash of all that can change which of several learning rates is taken; None where there is one, or none."""
        if not isinstance(self.identity.get("train", {}).get("lr"), list):
            return None
        return short_hash({"choice": _CHOICES} | {key: self.identity[key] for key in self.identity if key != "seed"})


@dataclass(frozen=True)
class Plan:
    """A study with its sources resolved and its cells named."""

    study: Study
    """With its hub sources pinned to commits."""
    model: ModelFacts
    num_tail_blocks: int
    dialogues: str
    """The dialogues' source with its revision resolved."""
    dialogues_identity: str
    cells: tuple[Cell, ...]
    suites: dict[str, SuiteSettings]
    """By suite id, ``<name>.<hash>``."""
    document: StudyDocument


@dataclass(frozen=True)
class Cost:
    """What a plan will cost at most; floating-point operations count multiply and add apart."""

    trained_tokens: int
    tried_tokens: int
    """Trained on to choose learning rates, beside ``trained_tokens``."""
    flops: float
    stored_bytes: int
    running_bytes: int

    def hours(self, tflops: float) -> float:
        """Return the hours at a sustained rate in TFLOP/s."""
        return self.flops / (tflops * 1e12) / 3600


def make_plan(study: Study) -> Plan:
    """Resolve a study's sources and derive its cells.

    Raises:
        WrongConfiguration: a source does not exist or is out of reach, the tail is longer than the model, or the model
            cannot be trained so.
    """
    model = look_up_model(study.model)
    _check_model(study, model)
    num_tail_blocks = model.num_blocks if study.tail == "all" else study.tail
    if num_tail_blocks > model.num_blocks:
        raise WrongConfiguration(
            f"tail: {num_tail_blocks} blocks are more than the {model.num_blocks} of {study.model}; lower tail"
        )
    source, identity = identify_dialogues(study.dialogues.source)
    study = _pin(study, model.source, source)
    cells = tuple(
        _cell(study, model, num_tail_blocks, identity, name, seed)
        for name, variant in study.variants.items()
        for seed in (study.seeds if variant.trained else (None,))
    )
    suites = {
        f"{name}.{short_hash(settings.identity(dialogues=identity, heldout=study.dialogues.heldout))}": settings
        for name, settings in study.suites.items()
    }
    probes = {
        name: request_probe(study, model, num_tail_blocks, name).hash
        for name, variant in study.variants.items()
        if variant.trained
    }
    document = _document(study, model, cells, probes, suites, {"model": model.identity, "dialogues": identity})
    return Plan(study, model, num_tail_blocks, source, identity, cells, suites, document)


def _check_model(study: Study, model: ModelFacts) -> None:
    if model.kind in _WITHOUT_POSITION_IDS:
        raise WrongConfiguration(
            f"{study.model} is a {model.kind} model, whose forward pass takes no position ids, so packed documents "
            "would see each other: take a model of another kind"
        )
    if study.head == "tied" and not model.tied:
        raise WrongConfiguration(
            f"head: tied needs a model whose embedding is its head, but {study.model} has two matrices; leave head out"
        )


def _pin(study: Study, model: str, dialogues: str) -> Study:
    """Return a study that names commits where it named a hub's moving branches; it has the same cells for ever."""
    pinned: dict[str, Any] = {}
    if study.model.startswith("hub:"):
        pinned["model"] = model
    if study.dialogues.source.startswith("hub:"):
        pinned["dialogues"] = study.dialogues.model_copy(update={"source": dialogues})
    pinned["suites"] = {name: settings.pinned() for name, settings in study.suites.items()}
    return study.model_copy(update=pinned)


def estimate_cost(plan: Plan, cells: tuple[Cell, ...]) -> Cost:
    """Estimate training alone: the trunk once over the corpus, each tail forward and backward over its tokens.

    Trials of learning rates, of each variant once, run the trunk every time. With a tied head the gradient runs through
    the frozen blocks of every cell, forward and backward.
    """
    recipe, trained = plan.study.train, [cell for cell in cells if cell.variant.trained]
    tokens, tied = recipe.tokens * recipe.epochs, plan.study.head == "tied"
    trunk = sum(plan.model.blocks[: plan.model.num_blocks - plan.num_tail_blocks])
    tails = [cell.parameters.trainable for cell in trained]
    frozen = 2.0 * trunk * recipe.tokens if trained else 0.0
    if tied:
        frozen = 4.0 * trunk * tokens * len(trained)
    tried = {cell.choice: cell.parameters.trainable for cell in trained if cell.choice is not None}
    trial_tokens = len(recipe.choice or ()) * recipe.trial_tokens * recipe.epochs
    trials = sum(((4.0 if tied else 2.0) * trunk + 6.0 * trainable) * trial_tokens for trainable in tried.values())
    return Cost(
        trained_tokens=tokens * len(trained),
        tried_tokens=trial_tokens * len(tried),
        flops=frozen + 6.0 * tokens * sum(tails) + trials,
        stored_bytes=4 * sum(tails),
        running_bytes=2 * 12 * max(tails, default=0),
    )


def request_probe(study: Study, model: ModelFacts, num_tail_blocks: int, variant: str) -> ProbeRequest:
    """Return what to measure of a variant alone: its tail under the study's recipe, one forward pass a step."""
    return ProbeRequest(
        model=model,
        num_tail_blocks=num_tail_blocks,
        spec=study.variants[variant].spec,
        head=study.head,
        trainable=study.trainable,
        precision=study.train.precision,
        compile=study.train.compile,
        rows=study.train.micro_batch,
        length=study.train.length,
    )


def _cell(study: Study, model: ModelFacts, num_tail_blocks: int, dialogues: str, name: str, seed: int | None) -> Cell:
    variant, recipe = study.variants[name], study.train
    identity: dict[str, Any] = {
        "numerics": NUMERICS,
        "model": model.identity,
        "spec": variant.spec.model_dump(mode="json"),
        "precision": recipe.precision,
        "trained": variant.trained,
    }
    if variant.trained:
        identity |= {
            "tail": num_tail_blocks,
            "head": study.head,
            "trainable": study.trainable,
            "start": study.start,
            "seed": seed,
            "dialogues": dialogues,
            "train": recipe.identity(),
        }
        if study.start == "fitted":
            identity["calibration_tokens"] = CALIBRATION_TOKENS
    return Cell(name, variant, seed, identity, _count(study, model, num_tail_blocks, name))


def _count(study: Study, model: ModelFacts, num_tail_blocks: int, name: str) -> Parameters:
    """Count trainable, stored and FFN parameters of a variant."""
    spec, tail = study.variants[name].spec, slice(model.num_blocks - num_tail_blocks, None)
    pretrained = sum(model.ffns[tail])
    ffn = pretrained
    if spec.ffn != "pretrained":
        ffn = num_tail_blocks * spec.parameters(model.width, model.ffn_hidden)
    if not study.variants[name].trained:
        return Parameters(trainable=0, stored=model.total, ffn=ffn)
    whole_tail = sum(model.blocks[tail]) - pretrained + ffn + model.other
    trainable = {"ffn": ffn, "tail": whole_tail, "tail+head": whole_tail + model.head}[study.trainable]
    untied = model.head if model.tied and study.head == "untied" and study.trainable == "tail+head" else 0
    return Parameters(trainable=trainable, stored=model.total - pretrained + ffn + untied, ffn=ffn)


def _document(
    study: Study,
    model: ModelFacts,
    cells: tuple[Cell, ...],
    probes: dict[str, str],
    suites: dict[str, SuiteSettings],
    sources: dict[str, str],
) -> StudyDocument:
    recipe = study.train
    steps = recipe.epochs * -(-recipe.tokens // (recipe.length * recipe.batch))
    notes = list(study.notes)
    if recipe.tokens * recipe.epochs < _DEMONSTRATION_TOKENS:
        notes.insert(0, f"a demonstration budget: {recipe.tokens * recipe.epochs:,} training tokens a cell")
    if study.head == "tied":
        notes.append("the head is tied: the embedding trains, so every cell runs the whole model and shares no trunk")
    if model.note:
        notes.append(model.note)
    entries = [
        CellEntry(
            id=cell.id,
            variant=cell.name,
            seed=cell.seed,
            trained=cell.variant.trained,
            parameters=cell.parameters,
            tokens=recipe.tokens * recipe.epochs if cell.variant.trained else 0,
            steps=steps if cell.variant.trained else 0,
            probe=probes.get(cell.name),
            choice=cell.choice,
        )
        for cell in cells
    ]
    contrasts = [pair for pair in study.statistics.contrasts if set(pair) <= set(study.variants)]
    settings = study.model_dump(mode="json")
    return StudyDocument(
        name=study.name,
        hash=short_hash(
            {"study": settings, "sources": sources, "cells": [entry.id for entry in entries], "suites": [*suites]}
        ),
        study=settings | {"sources": sources},
        cells=entries,
        suites=[SuiteEntry(id=key, name=key.rpartition(".")[0], description=suites[key].description) for key in suites],
        margin_nats=study.statistics.margin_nats,
        contrasts=contrasts,
        notes=notes,
    )
