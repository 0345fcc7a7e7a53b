"""The training of one cell in the store: from its newest good checkpoint to its record."""

import contextlib
import json
import random
import time
from collections.abc import Iterator
from typing import Any, Literal

import torch

from kallm.errors import DataMismatch, Diverged, Preempted
from kallm.model.cachefolder import cache_folder
from kallm.model.trunk import Tail
from kallm.progress import Reporter, Stop
from kallm.receipt import make_receipt
from kallm.results.record import TrainingRecord, cell_key, choice_key, read_record
from kallm.run.attempt import Attempt
from kallm.run.background import Background
from kallm.run.materials import Materials
from kallm.store.commit import list_manifests, read_manifest
from kallm.store.store import Store
from kallm.study.plan import Cell, Plan
from kallm.train.attention import training_attention
from kallm.train.checkpoint import load_checkpoint, load_weights, save_checkpoint, save_weights, take_snapshot
from kallm.train.loop import Hidden, Progress, Trainer, make_optimizer
from kallm.train.measurement import peak_resident
from kallm.train.reporting import Reports

__all__ = ["Training", "load_trained", "receipt_of"]

_KEPT_CHECKPOINTS = 2
_HISTORY_POINTS = 400


class Training:
    """Trains one tail, and keeps its checkpoints and metrics in the store.

    ``run`` is all that one cell needs. Several cells go in lockstep where each is ``opened`` and then told to
    ``advance`` in turn, and is finished with ``complete``. Where several processes train one cell, the main one writes.
    """

    def __init__(
        self,
        cell: Cell,
        tail: Tail,
        store: Store,
        materials: Materials,
        reporter: Reporter,
        stop: Stop,
        attempt: Attempt,
        *,
        lr: float,
    ) -> None:
        assert cell.seed is not None
        self.cell, self.seed, self.tail, self.store = cell, cell.seed, tail, store
        self.materials, self.reporter, self.stop, self.attempt = materials, reporter, stop, attempt
        self.recipe = materials.plan.study.train.at(lr)
        self.optimizer = make_optimizer(tail, self.recipe)
        self.workers = materials.workers
        self.metrics: list[str] = []

    def run(self, *, shared: bool) -> TrainingRecord:
        """Train to the end, commit the weights and create the record.

        Raises:
            Preempted: a stop was requested; a checkpoint of this step is committed.
            Diverged: training left the numbers; the record says so.
        """
        with self.opened(self.materials.hidden):
            while not self.trainer.is_done:
                self.advance(shared=shared)
        return self.complete(shared=shared)

    @contextlib.contextmanager
    def opened(self, hidden: Hidden, background: Background | None = None) -> Iterator[None]:
        """Restore the newest good checkpoint and be ready to advance; a stop inside saves this cell, and goes on out.

        Args:
            hidden: the trunk's output by row.
            background: commits the checkpoints; one that several cells share holds one copy of a cell at a time.
        """
        rows = self.materials.rows
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.Random(f"dropout {self.seed}").getrandbits(63))
            progress = self._restore()
            self._random = torch.get_rng_state()
        self.workers.wait()  # the main process will remove the checkpoint that the others have just read
        self._saved_step, self._saved_at = progress.step, time.monotonic()
        self.attempt.heartbeat.phase = "train"
        total = self.recipe.epochs * len(rows) * self.recipe.length
        name = f"train {self.cell.name} seed {self.seed}"
        with (
            contextlib.nullcontext(background) if background else Background() as self._background,
            self._open_reports() as self._reports,
            self.reporter.track(name, total, "tok", done=progress.tokens) as self._tracker,
            training_attention(
                self.tail, rows[0], hidden[0], low=self.recipe.precision == "bf16", say=self.reporter.say
            ) as flat,
        ):
            self.trainer = Trainer(
                self.tail,
                self.optimizer,
                rows,
                hidden,
                self.recipe,
                seed=self.seed,
                progress=progress,
                workers=self.workers,
                flat=flat,
            )
            try:
                yield
            except Preempted:
                self._begin_save(progress)
                self._background.wait()
                raise
            self._background.wait()

    def advance(self, *, shared: bool) -> None:
        """Take one step of the training that is open.

        Raises:
            Preempted: a stop was requested.
            Diverged: training left the numbers; the record says so.
        """
        try:
            with self._own_random():
                figures = self.trainer.advance(self.stop)
        except Diverged as error:
            self._background.wait()
            self._create_record(self.trainer.progress, {}, "diverged", str(error), shared=shared)
            raise
        progress = self.trainer.progress
        self._tracker.advance(int(figures["tokens"]))
        self.metrics.append(json.dumps({"step": progress.step} | figures, sort_keys=True))
        self._reports.log(figures, progress.step)
        self._background.check()
        if time.monotonic() - self._saved_at > self.recipe.checkpoint_s and not self._background.is_busy:
            self._begin_save(progress)

    def complete(self, *, shared: bool) -> TrainingRecord:
        """Commit the weights of a training that came to its end, and create the record."""
        weights = self._commit_weights() if self.workers.is_main else {}
        return self._create_record(self.trainer.progress, weights, "trained", None, shared=shared)

    @contextlib.contextmanager
    def _own_random(self) -> Iterator[None]:
        """Draw (for dropout) from this cell's own state, whoever else draws in this process; an error takes it back."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random)
            yield
            self._random = torch.get_rng_state()

    def _open_reports(self) -> Reports:
        return Reports(
            self.recipe.report_to if self.workers.is_main else (),
            project=f"kallm-{self.materials.plan.study.name}",
            cell=self.cell.id,
            folder=cache_folder() / "tensorboard",
            config=self.cell.identity,
        )

    def _restore(self) -> Progress:
        """Return to the newest good checkpoint, naming every damaged one."""
        for name in sorted(list_manifests(self.store, cell_key(self.cell.id, "checkpoints")), reverse=True):
            try:
                manifest = read_manifest(self.store, name)
                if manifest is None:
                    continue
                progress = load_checkpoint(self.store, manifest, self.tail, self.optimizer)
            except DataMismatch as error:
                self.reporter.say(f"{name} is damaged, going back to the checkpoint before: {error}")
                continue
            self.reporter.say(f"{self.cell.id}: continuing from step {progress.step}")
            return progress
        return Progress()

    def _begin_save(self, progress: Progress) -> None:
        """Copy the state of a step that has no checkpoint, and commit the copy beside the training."""
        if not self.workers.is_main:
            return
        self._background.wait()
        metrics = self._metrics_bytes()
        with self._own_random():
            snapshot = take_snapshot(self.tail, self.optimizer, progress) if progress.step > self._saved_step else None
        prefix = cell_key(self.cell.id, "checkpoints", f"{progress.step:08d}-{self.attempt.nonce}")

        def save() -> None:
            self._put_metrics(metrics)
            if snapshot is not None:
                save_checkpoint(self.store, prefix, snapshot)
                self.attempt.commits += 1
                self._remove_checkpoints(keep=_KEPT_CHECKPOINTS)

        self._background.start(save)
        self._saved_step, self._saved_at = progress.step, time.monotonic()

    def _metrics_bytes(self) -> bytes:
        return "".join(f"{line}\n" for line in self.metrics).encode()

    def _put_metrics(self, data: bytes) -> None:
        if data:
            self.store.put(cell_key(self.cell.id, "metrics", f"{self.attempt.nonce}.jsonl"), data)

    def _remove_checkpoints(self, *, keep: int) -> None:
        """Remove all but the newest committed checkpoints, each manifest before its files."""
        committed = sorted(list_manifests(self.store, cell_key(self.cell.id, "checkpoints")))
        for name in committed[: max(0, len(committed) - keep)]:
            self.store.delete(f"{name}/manifest.json")
            for entry in list(self.store.list(f"{name}/")):
                self.store.delete(entry.key)

    def _commit_weights(self) -> dict[str, str]:
        manifest = save_weights(self.store, cell_key(self.cell.id, "weights", self.attempt.nonce), self.tail)
        (file,) = manifest.files.values()
        return {"manifest": manifest.prefix, "sha256": file.sha256}

    def _create_record(
        self,
        progress: Progress,
        weights: dict[str, str],
        outcome: Literal["trained", "diverged"],
        cause: str | None,
        *,
        shared: bool,
    ) -> TrainingRecord:
        key = cell_key(self.cell.id, "trained.json")
        if not self.workers.is_main:
            self.workers.wait()
            return self._read_standing(key)
        self._put_metrics(self._metrics_bytes())
        attempts = self.store.list(cell_key(self.cell.id, "attempts/"))
        record = TrainingRecord(
            cell=self.cell.id,
            variant=self.cell.name,
            seed=self.cell.seed,
            outcome=outcome,
            cause=cause,
            weights=weights,
            parameters=self.cell.parameters,
            lr=self.recipe.rate,
            choice=choice_key(self.cell.choice) if self.cell.choice else None,
            steps=progress.step,
            tokens=progress.tokens,
            supervised_tokens=progress.supervised_tokens,
            loss_history=_thinned(progress.history),
            seconds=round(progress.seconds, 3),
            tokens_per_s=round(progress.tokens / max(progress.seconds, 1e-9), 1),
            peak_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident(reset=False),
            attempts=sum(entry.key.endswith(".start.json") for entry in attempts),
            shared=shared,
            receipt=receipt_of(self.materials.plan),
        )
        if self.store.create(key, record.to_bytes()):
            self.attempt.commits += 1
        else:
            self.reporter.say(f"{self.cell.id}: another process finished first; its record stands")
            record = self._read_standing(key)
        self._remove_checkpoints(keep=0)
        self.workers.wait()
        return record

    def _read_standing(self, key: str) -> TrainingRecord:
        """Read the record that another process created, and take over its weights."""
        record = read_record(self.store, TrainingRecord, key)
        assert record is not None
        if record.outcome == "trained":
            load_trained(self.store, record, self.tail)
        return record


def load_trained(store: Store, record: TrainingRecord, tail: Tail) -> None:
    """Put the weights that a record names into a tail.

    Raises:
        DataMismatch: they are missing, damaged or other ones.
    """
    manifest = read_manifest(store, record.weights["manifest"])
    if manifest is None:
        raise DataMismatch(f"{record.weights['manifest']} has no manifest, but the record of {record.cell} names it")
    if {file.sha256 for file in manifest.files.values()} != {record.weights["sha256"]}:
        raise DataMismatch(f"{manifest.prefix} holds other weights than the record of {record.cell} names")
    load_weights(store, manifest, tail)


def receipt_of(plan: Plan) -> dict[str, Any]:
    """Return the receipt of a study's result made in this process."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return make_receipt(device=device, num_threads=torch.get_num_threads(), precision=plan.study.train.precision)


def _thinned(history: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most a few hundred points, each the mean of the steps since the one before."""
    stride = -(-len(history) // _HISTORY_POINTS) or 1
    parts = [history[i : i + stride] for i in range(0, len(history), stride)]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]
