"""Where two variants answered a question differently: what was asked, and both answers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kallm.errors import DataMismatch, WrongConfiguration, did_you_mean
from kallm.results.record import (
    CellEntry,
    EvaluationRecord,
    Items,
    StudyDocument,
    SuiteEntry,
    evaluation_key,
    read_items,
    read_record,
)
from kallm.store.store import Store

__all__ = ["Comparison", "compare_answers", "find_suites", "render_pair"]

_PROMPT = 600
_REPLY = 300


@dataclass(frozen=True)
class Comparison:
    """Two cells' answers to one suite's questions; ``missing`` names the cells without an evaluation."""

    suite: str
    left: str
    right: str
    num_items: int
    num_only_left: int
    """Items that only the left cell has right."""
    num_only_right: int
    differing: list[tuple[dict[str, Any], dict[str, Any]]]
    missing: tuple[str, ...] = ()


def find_suites(document: StudyDocument, named: str | None) -> list[SuiteEntry]:
    """Return the suites of a study, or those of one name.

    Raises:
        WrongConfiguration: there is none of that name.
    """
    found = [suite for suite in document.suites if named in (None, suite.name, suite.id)]
    if not found:
        known = [suite.name for suite in document.suites]
        raise WrongConfiguration(f"{document.name} has no suite '{named}': {did_you_mean(str(named), known)}")
    return found


def compare_answers(
    store: Store, document: StudyDocument, left: str, right: str, suite: SuiteEntry
) -> Iterator[Comparison]:
    """Yield two variants' answers, cell by cell of one seed; a variant without seeds is set beside each of the other's.

    Suites without questions, such as held-out text, yield nothing.

    Raises:
        WrongConfiguration: the study has no such variant.
        DataMismatch: items are damaged, or two cells answered different questions.
    """
    for one, two in _pair(document, left, right):
        records = [read_record(store, EvaluationRecord, evaluation_key(cell.id, suite.id)) for cell in (one, two)]
        names = (_label(one), _label(two))
        missing = tuple(name for name, record in zip(names, records, strict=True) if record is None)
        if missing:
            yield Comparison(suite.name, *names, 0, 0, 0, [], missing)
            continue
        ours, theirs = (_by_id(store, record) for record in records if record is not None)
        if not all("correct" in item for item in (*ours.values(), *theirs.values())):
            continue
        if ours.keys() != theirs.keys():
            odd = sorted(ours.keys() ^ theirs.keys())[0]
            raise DataMismatch(
                f"{names[0]} and {names[1]} answered different questions, such as {odd[1]!r}: evaluate again"
            )
        pairs = [(ours[name], theirs[name]) for name in ours]
        yield Comparison(
            suite.name,
            *names,
            num_items=len(pairs),
            num_only_left=sum(bool(a["correct"]) and not b["correct"] for a, b in pairs),
            num_only_right=sum(bool(b["correct"]) and not a["correct"] for a, b in pairs),
            differing=[(a, b) for a, b in pairs if _tell_choice(a) != _tell_choice(b)],
        )


def render_pair(comparison: Comparison, pair: tuple[dict[str, Any], dict[str, Any]]) -> str:
    """Return one question and both answers as text."""
    item = pair[0]
    lines = [f"── {item['id']} ({comparison.suite}); right: {_tell_gold(item)}"]
    if "prompt" in item:
        lines.append(_shorten(str(item["prompt"]).strip(), _PROMPT))
    for name, answer in zip((comparison.left, comparison.right), pair, strict=True):
        verdict = "right" if answer["correct"] else "wrong"
        lines.append(f"  {name}: {_tell_choice(answer)}, {verdict}{_tell_more(answer)}")
    return "\n".join(lines)


def _pair(document: StudyDocument, left: str, right: str) -> list[tuple[CellEntry, CellEntry]]:
    known = {cell.variant for cell in document.cells}
    for name in (left, right):
        if name not in known:
            raise WrongConfiguration(f"{document.name} has no variant '{name}': {did_you_mean(name, known)}")
    return [
        (one, two)
        for one in document.cells
        for two in document.cells
        if (one.variant, two.variant) == (left, right) and (one.seed == two.seed or None in (one.seed, two.seed))
    ]


def _label(cell: CellEntry) -> str:
    return cell.variant if cell.seed is None else f"{cell.variant}.seed-{cell.seed}"


def _by_id(store: Store, record: EvaluationRecord) -> dict[tuple[str, str], dict[str, Any]]:
    items: Items = read_items(store, record) if record.items else []
    return {(str(item.get("task", "")), str(item["id"])): item for item in items}


def _tell_choice(item: dict[str, Any]) -> str:
    if "options" in item:
        return str(item["options"][item["choice"]])
    return str(item["parsed"]) if item.get("status") == "parsed" else str(item.get("status", ""))


def _tell_gold(item: dict[str, Any]) -> str:
    if "options" not in item:
        return str(item["gold"])
    return str(item["options"][item["gold"]]) if item["gold"] >= 0 else "none of the options"


def _tell_more(item: dict[str, Any]) -> str:
    """Return the options' probabilities, largest first, or the raw reply."""
    if "reply" in item:
        return f"; reply: {_shorten(repr(item['reply']), _REPLY)}"
    if "loglikelihoods" not in item or "options" not in item:
        return ""
    found = sorted(zip(item["loglikelihoods"], item["options"], strict=True), key=lambda pair: -pair[0])
    whole = math.fsum(math.exp(value - found[0][0]) for value, _ in found)
    told = ", ".join(
        f"{option} {math.exp(value - found[0][0]) / whole:.0%} ({value:.3f})" for value, option in found[:4]
    )
    return f"; {told}{', …' if len(found) > 4 else ''}"


def _shorten(text: str, longest: int) -> str:
    """Return a text without its middle where it is long; the question stands at the end."""
    return text if len(text) <= longest else f"{text[: longest // 4]} … {text[-3 * longest // 4 :]}"
