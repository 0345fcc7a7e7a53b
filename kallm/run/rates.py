"""The learning rate of a variant, chosen from the recipe's list by short trials; all its seeds take the same.

The trials start from a seed of their own and train on a share of the corpus. They are judged by cross-entropy on a
validation split of the training conversations that they do not train on; what is held out for the results is not seen.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from kallm.data.packing import Row
from kallm.data.validation import split_validation
from kallm.errors import Diverged
from kallm.model.cache import TrunkPass
from kallm.model.fit import fit_tail_
from kallm.model.start import freeze, start_tail
from kallm.model.trunk import Tail
from kallm.progress import Reporter, Stop
from kallm.results.alone import tell_edge
from kallm.results.record import ChoiceRecord, TrainingRecord, Trial, cell_key, choice_key, read_record
from kallm.run.materials import Materials
from kallm.run.training import receipt_of
from kallm.store.store import Store
from kallm.study.plan import Cell
from kallm.train.attention import training_attention
from kallm.train.loop import Progress, Trainer, make_optimizer, train

__all__ = ["Trials", "choose_rate"]

_SEED = 0
_MOST_JUDGED_TOKENS = 131_072


def choose_rate(
    cell: Cell,
    store: Store,
    materials: Materials,
    reporter: Reporter,
    stop: Stop,
    after_trial: Callable[[], None] = lambda: None,
) -> float:
    """Return the learning rate that a cell trains with: the recipe's only one, or the choice that the store holds.

    Where no cell has made the choice yet, it is made here; each trial is stored when it is done, and not done again.

    Args:
        cell: a cell that is trained.
        store: where the choice lies, ``choices/<hash>.json``.
        materials: the study's.
        reporter: where progress is told.
        stop: polled before each forward pass; may raise.
        after_trial: called when a trial is stored.

    Raises:
        Diverged: every trial did; the cell's record says so.
        WrongConfiguration: there are too few conversations to judge by.
    """
    recipe, workers = materials.plan.study.train, materials.workers
    if cell.choice is None:
        return recipe.rate
    key = choice_key(cell.choice)
    record = read_record(store, ChoiceRecord, key)
    if workers.any_is(record is None):
        with torch.random.fork_rng(devices=[]):
            _make_choice(cell.choice, store, Trials(cell, materials, reporter, stop), after_trial)
        record = read_record(store, ChoiceRecord, key)
    assert record is not None
    told = ", ".join(f"{t.lr:g} {'diverged' if t.nats is None else f'gave {t.nats:.4f}'}" for t in record.trials)
    took = "no learning rate" if record.lr is None else f"learning rate {record.lr:g}"
    judged = f"nats per token on {record.validation['tokens']:,} tokens of validation"
    edge = tell_edge(record.lr, [trial.lr for trial in record.trials])
    reporter.say(f"{cell.label}: {took}, for {told} {judged}{edge}")
    if record.lr is None:
        raise _end_diverged(cell, record, store, materials)
    return record.lr


class Trials:
    """Short trainings of one variant at different learning rates, on the same batches and from the same start."""

    def __init__(self, cell: Cell, materials: Materials, reporter: Reporter, stop: Stop) -> None:
        self.cell, self.materials, self.workers = cell, materials, materials.workers
        self.recipe = materials.plan.study.train
        self._reporter, self._stop = reporter, stop
        dialogues = materials.dialogues.train
        self.tried, self.judged = split_validation(materials.plan.dialogues, dialogues)
        self.rows = materials.pack(self.tried, self.recipe.trial_tokens)
        self.judging = materials.pack(self.judged, min(self.recipe.trial_tokens, _MOST_JUDGED_TOKENS))

    @property
    def validation(self) -> dict[str, int]:
        """How much the trials are judged on."""
        return {"conversations": len(self.judged), "tokens": sum(row.num_supervised for row in self.judging)}

    def run(self, lr: float) -> Trial:
        """Train at one learning rate, the schedule over the trial's own steps, and judge; seeds torch's generator."""
        tail, low = copy.deepcopy(self._started), self.recipe.precision == "bf16"
        recipe, hidden = self.recipe.at(lr), self._pass(self.rows)
        name = f"try {self.cell.name} at {lr:g}"
        with (
            self.materials.autocast(),
            self._reporter.track(name, recipe.epochs * len(self.rows) * recipe.length, "tok") as tracker,
            training_attention(tail, self.rows[0], hidden[0], low=low, say=lambda text: None) as flat,
        ):
            torch.manual_seed(_SEED)
            optimizer, progress = make_optimizer(tail, recipe), Progress()
            trainer = Trainer(
                tail,
                optimizer,
                self.rows,
                hidden,
                recipe,
                seed=_SEED,
                progress=progress,
                workers=self.workers,
                flat=flat,
            )
            nats, cause = None, None
            try:
                train(
                    trainer,
                    after_step=lambda _, figures: tracker.advance(int(figures["tokens"])),
                    stop=self._stop,
                )
                nats = self._judge(tail, optimizer, flat=flat)
            except Diverged as error:
                cause = str(error)
        return Trial(lr=lr, nats=nats, cause=cause, steps=progress.step, tokens=progress.tokens)

    @torch.no_grad()
    def _judge(self, tail: Tail, optimizer: torch.optim.AdamW, *, flat: bool) -> float:
        """Return the mean cross-entropy per token of the validation rows; each process computes all of it."""
        tail.eval()
        hidden, plain = self._pass(self.judging), self.recipe.model_copy(update={"compile": False})
        trainer = Trainer(tail, optimizer, self.judging, hidden, plain, seed=_SEED, progress=Progress(), flat=flat)
        summed, size = 0.0, self.recipe.micro_batch
        for first in range(0, len(self.judging), size):
            self._stop()
            summed += float(trainer.forward([*range(first, min(first + size, len(self.judging)))]))
        nats = summed / self.validation["tokens"]
        if not math.isfinite(nats):
            raise Diverged(f"the cross-entropy on the validation split is {nats:g}")
        return nats

    @cached_property
    def _started(self) -> Tail:
        """The tail that every trial starts from."""
        tail, spec = self.materials.new_tail(), self.cell.variant.spec
        with self.materials.autocast():
            if self.materials.plan.study.start == "random":
                start_tail(tail, spec, self.materials.ffn_inputs, seed=_SEED)
            else:
                fit_tail_(tail, spec, self.materials.calibration_rows, seed=_SEED, stop=self._stop)
        freeze(tail, self.materials.plan.study.trainable)
        return tail

    def _pass(self, rows: Sequence[Row]) -> TrunkPass:
        return TrunkPass(self.materials.trunk_pass.trunk, [row.passage for row in rows])


def _make_choice(choice: str, store: Store, trials: Trials, after_trial: Callable[[], None]) -> None:
    """Make every trial that the store does not hold, create the record, and let go of the trials."""
    found = []
    for lr in trials.recipe.choice or ():
        found.append(_finish_trial(lr, f"choices/{choice}/{lr!r}.json", store, trials))
        after_trial()
    if trials.workers.is_main:
        good = [(trial.nats, trial.lr) for trial in found if trial.nats is not None]
        record = ChoiceRecord(
            choice=choice,
            lr=min(good)[1] if good else None,
            trials=found,
            validation=trials.validation,
            receipt=receipt_of(trials.materials.plan),
        )
        store.create(choice_key(choice), record.to_bytes())  # another process may have been first, with the same choice
        for entry in list(store.list(f"choices/{choice}/")):
            store.delete(entry.key)
    trials.workers.wait()


def _finish_trial(lr: float, key: str, store: Store, trials: Trials) -> Trial:
    trial = read_record(store, Trial, key)
    if trials.workers.any_is(trial is None):
        trial = trials.run(lr)
        if trials.workers.is_main:
            store.create(key, trial.to_bytes())
        trials.workers.wait()
    assert trial is not None
    return trial


def _end_diverged(cell: Cell, choice: ChoiceRecord, store: Store, materials: Materials) -> Diverged:
    """Leave a record that a cell has diverged before its first step; return the error to raise."""
    causes = "; ".join(f"{trial.lr:g}: {trial.cause}" for trial in choice.trials)
    cause = f"every learning rate of train.lr diverged when it was tried ({causes}); name lower ones"
    attempts = store.list(cell_key(cell.id, "attempts/"))
    record = TrainingRecord(
        cell=cell.id,
        variant=cell.name,
        seed=cell.seed,
        outcome="diverged",
        cause=cause,
        weights={},
        parameters=cell.parameters,
        steps=0,
        tokens=0,
        supervised_tokens=0,
        loss_history=[],
        seconds=0.0,
        tokens_per_s=0.0,
        peak_bytes=0,
        attempts=sum(entry.key.endswith(".start.json") for entry in attempts),
        shared=False,
        choice=choice_key(choice.choice),
        receipt=receipt_of(materials.plan),
    )
    if materials.workers.is_main:
        store.create(cell_key(cell.id, "trained.json"), record.to_bytes())
    return Diverged(cause)
