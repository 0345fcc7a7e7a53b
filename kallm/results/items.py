"""What was answered, item by item, as arrays; and the figures that need no model.

Legend of the array shapes: I items. Items are recognised by what they hold: ``nll`` and ``tokens`` (held-out text),
``kl`` and ``tokens`` (retained ability), ``choice`` (scored options), ``status`` (replies); items of any other shape
are left alone.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from kallm.errors import DataMismatch
from kallm.results.record import EvaluationRecord, Items
from kallm.results.statistics import find_score

__all__ = ["Answers", "check_same", "find_references", "reduce_items"]

TOLERANCE = 1e-4
"""How far a record's score may be from its own items, relative to the score; items may be stored rounded."""
STATUSES = ("parsed", "unparsed", "empty")

_KINDS = {
    "text": {"nll", "tokens"},
    "divergence": {"kl", "tokens"},
    "choice": {"choice", "task"},
    "reply": {"status", "task"},
}
_SUMS = {"text": ("nll", "cross_entropy"), "divergence": ("kl", "kl")}
"""What an item of text holds the sum of, and the score that its mean per token is."""


@dataclass(frozen=True)
class Answers:
    """The items of one evaluation, sorted by task and id; every score has one value per item."""

    where: str
    ids: tuple[tuple[str, str], ...]
    """(task, id)."""
    questions: tuple[Any, ...]
    """What must be equal between two cells: tokens and bytes, or gold and options."""
    weights: Float[ndarray, " I"]
    strata: Int[ndarray, " I"]
    tasks: tuple[str, ...]
    """The strata's names, sorted."""
    scores: dict[str, Float[ndarray, " I"]]
    replies: dict[str, float] = field(default_factory=dict)
    kind: str = "choice"


def reduce_items(record: EvaluationRecord, items: Items) -> Answers | None:
    """Return the items as arrays, or None where they are of a shape that only their suite knows.

    Raises:
        DataMismatch: an item is there twice, one is malformed, their count is not the record's, or a score of the
            record does not follow from its items.
    """
    where = f"{record.suite} of {record.cell}"
    kind = _recognise(items)
    if kind is None:
        return None
    if record.items.get("count", len(items)) != len(items):
        raise DataMismatch(f"{where} names {record.items['count']} items, but {len(items)} are stored")
    try:
        answers = _reduce(where, kind, sorted(items, key=_identify))
    except (KeyError, TypeError, ValueError) as error:
        raise DataMismatch(f"{where} has a malformed item: {error!r}") from error
    repeated = [name for name, count in Counter(answers.ids).items() if count > 1]
    if repeated:
        raise DataMismatch(f"{where} has item {repeated[0][1]!r} of {repeated[0][0] or 'its text'} twice")
    _check_scores(record, answers)
    return answers


def check_same(left: Answers, right: Answers) -> None:
    """Check that two evaluations answered the same questions; they are never averaged or paired otherwise.

    Raises:
        DataMismatch: the number of items, an id, its tokens, its options or its answer differ.
    """
    if len(left.ids) != len(right.ids):
        raise DataMismatch(
            f"{left.where} has {len(left.ids)} items, {right.where} has {len(right.ids)}: they cannot be compared; "
            "remove the incomplete evaluation and run its cell again"
        )
    for (task, name), (_, other), *questions in zip(left.ids, right.ids, left.questions, right.questions, strict=True):
        if name != other or questions[0] != questions[1]:
            raise DataMismatch(
                f"item {name!r}{f' of {task}' if task else ''} differs between {left.where} and {right.where}: "
                "they cannot be compared; evaluate both from the same data"
            )


def find_references(items: Items) -> dict[str, dict[str, float]]:
    """Return per task the score of a uniform choice, of the majority class, and (for replies) of an empty reply.

    A gold answer outside its options, and a free answer, cannot be guessed: chance is 0 there. The majority class is
    the best constant answer, either always the same option's text or always the same position.
    """
    kind = _recognise(items)
    if kind not in ("choice", "reply"):
        return {}
    by_task: dict[str, Items] = defaultdict(list)
    for item in items:
        by_task[str(item["task"])].append(item)
    references: dict[str, dict[str, float]] = {"chance": {}, "majority": {}}
    for task, members in sorted(by_task.items()):
        references["chance"][task] = sum(map(_guess, members)) / len(members)
        references["majority"][task] = _count_majority(members, kind) / len(members)
    if kind == "reply":
        references["empty reply"] = {
            task: sum(not str(item["gold"]).strip() for item in members) / len(members)
            for task, members in sorted(by_task.items())
        }
    return references


def _recognise(items: Items) -> str | None:
    first = items[0] if items else {}
    for kind, keys in _KINDS.items():
        if keys <= first.keys():
            return kind
    return None


def _identify(item: dict[str, Any]) -> tuple[str, str]:
    return str(item.get("task", "")), str(item["id"])


def _reduce(where: str, kind: str, items: Items) -> Answers:
    ids = tuple(_identify(item) for item in items)
    tasks = tuple(sorted({task for task, _ in ids}))
    strata = np.array([tasks.index(task) for task, _ in ids], dtype=np.int64)
    questions: tuple[Any, ...]
    replies: dict[str, float] = {}
    weights = np.ones(len(items))
    if kind in _SUMS:
        total, score = _SUMS[kind]
        weights = np.array([float(item["tokens"]) for item in items])
        if (weights <= 0).any():
            raise ValueError("a conversation without tokens")
        scores = {score: np.array([float(item[total]) for item in items]) / weights}
        questions = tuple((item["tokens"], item.get("bytes")) for item in items)
    elif kind == "choice":
        scores = {name: _read(items, of) for name, of in (("acc", "correct"), ("acc_norm", "correct_norm"))}
        questions = tuple((item["gold"], tuple(item.get("options", ())), item["num_options"]) for item in items)
    else:
        scores = {"acc": _read(items, "correct")}
        questions = tuple((str(item["gold"]), item["num_options"]) for item in items)
        counts = Counter(item["status"] for item in items)
        replies = {status: counts[status] / len(items) for status in STATUSES}
    for name in items[0].get("metrics", {}):  # lm-eval's own, of those that it averages
        scores[name] = np.array([float(item["metrics"][name]) for item in items])
    return Answers(where, ids, questions, weights, strata, tasks, scores, replies, kind)


def _read(items: Items, name: str) -> Float[ndarray, " I"]:
    return np.array([float(bool(item[name])) for item in items])


def _check_scores(record: EvaluationRecord, answers: Answers) -> None:
    for name, values in answers.scores.items():
        told = record.scores.get(name)
        if told is None:
            continue
        found = float(find_score(values[None], answers.weights, answers.strata)[0])
        scale = 100 if told.unit == "%" else 1
        if abs(told.value - scale * found) > TOLERANCE * scale * max(1.0, abs(found)):
            raise DataMismatch(f"{answers.where} names {name} {told.value:.6g}, but its items give {scale * found:.6g}")


def _guess(item: dict[str, Any]) -> float:
    num_options = int(item["num_options"])
    gold = item["gold"]
    if num_options == 0 or (isinstance(gold, int) and not 0 <= gold < num_options):
        return 0.0
    return 1 / num_options


def _count_majority(items: Items, kind: str) -> int:
    if kind == "reply":
        return max(Counter(str(item["gold"]) for item in items).values())
    inside = [item for item in items if 0 <= item["gold"] < item["num_options"]]
    positions = Counter(item["gold"] for item in inside)
    texts = Counter(item["options"][item["gold"]] for item in inside)
    return max([*positions.values(), *texts.values(), 0])
