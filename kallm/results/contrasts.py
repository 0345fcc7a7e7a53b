"""Paired comparisons of variants: the declared ones, the same on further suites, and the rest as exploration."""

from itertools import combinations
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from kallm.results.digits import count_decimals, format_number
from kallm.results.evidence import Evidence, name_suite
from kallm.results.items import Answers
from kallm.results.record import CellEntry, SuiteEntry
from kallm.results.schema import Contrast
from kallm.results.statistics import Comparison, compare, decide, flip_signs, holm

__all__ = ["make_contrasts"]

Role = Literal["declared", "secondary", "exploratory"]
_Pair = tuple[CellEntry, CellEntry]
_SCORES = {"text": ("cross_entropy", "nats/token"), "divergence": ("kl", "nats/token")}


def make_contrasts(evidence: Evidence) -> list[Contrast]:
    """Return the contrasts: declared on the primary suite, declared on the others, then every other pair.

    The primary suite is the study's first with held-out text, else its first with items. Declared contrasts are tested
    as they are; within each other role p and the equivalence test's p are Holm-adjusted.
    """
    suites = [suite for suite in evidence.document.suites if _find_kind(evidence, suite) is not None]
    suites.sort(key=lambda suite: _find_kind(evidence, suite) != "text")
    declared = [(left, right) for left, right in evidence.document.contrasts]
    if not suites:
        return [_leave_open(left, right, "", "declared", "") for left, right in declared]
    known = {frozenset(pair) for pair in declared}
    others = [pair for pair in combinations(evidence.list_variants(), 2) if frozenset(pair) not in known]
    made = [_contrast(evidence, suites[0], *pair, "declared") for pair in declared]
    secondary = [_contrast(evidence, suite, *pair, "secondary") for suite in suites[1:] for pair in declared]
    exploratory = [_contrast(evidence, suites[0], *pair, "exploratory") for pair in others]
    return made + _adjust(_keep(secondary)) + _adjust(_keep(exploratory))


def _find_kind(evidence: Evidence, suite: SuiteEntry) -> str | None:
    return next((answers.kind for (_, name), answers in evidence.answers.items() if name == suite.id), None)


def _keep(contrasts: list[Contrast]) -> list[Contrast]:
    return [contrast for contrast in contrasts if contrast.verdict != "no data"]


def _contrast(evidence: Evidence, suite: SuiteEntry, left: str, right: str, role: Role) -> Contrast:
    kind = _find_kind(evidence, suite)
    score, unit = _SCORES.get(kind or "", ("acc", "points"))
    column = f"{name_suite(evidence.document, suite)}.{score}"
    pairs = _pair_cells(evidence, suite, left, right)
    if not pairs:
        return _leave_open(left, right, column, role, unit)
    answers = [evidence.answers[cell.id, suite.id] for cell, _ in pairs]
    others = [evidence.answers[cell.id, suite.id] for _, cell in pairs]
    margin = evidence.document.margin_nats if kind == "text" else None
    values, baseline = _stack(answers, score), _stack(others, score)
    seeded = any(cell.seed is not None for pair in pairs for cell in pair)
    found = compare(values, baseline, answers[0].weights, answers[0].strata, margin=margin, seeded=seeded)
    flips = None
    if role != "exploratory":
        flips = flip_signs((values - baseline).mean(0), answers[0].weights, answers[0].strata)
    seeds = [seed for seed in (a.seed if a.seed is not None else b.seed for a, b in pairs) if seed is not None]
    word = decide(found.p, found.p_equivalent)
    return Contrast.model_validate(
        {
            "left": left,
            "right": right,
            "column": column,
            "role": role,
            "unit": unit,
            "margin": margin,
            "difference": found.difference,
            "half": found.half,
            "detectable": found.detectable,
            "p": found.p,
            "p_adjusted": None,
            "p_equivalent": found.p_equivalent,
            "p_items": flips,
            "seeds": seeds,
            "items": found.items,
            "verdict": word,
            "flags": _find_flags(evidence, pairs),
            "text": _tell(left, right, word, found, unit, margin=margin, seeded=seeded),
        }
    )


def _pair_cells(evidence: Evidence, suite: SuiteEntry, left: str, right: str) -> list[_Pair]:
    """Pair the evaluated cells of one seed; a cell without a seed pairs with every seed of the other side."""

    def by_seed(variant: str) -> dict[int | None, CellEntry]:
        cells = evidence.find_cells(variant)
        return {cell.seed: cell for cell in cells if (cell.id, suite.id) in evidence.answers}

    ours, theirs = by_seed(left), by_seed(right)
    if None in ours:
        return [(ours[None], cell) for cell in theirs.values()]
    if None in theirs:
        return [(cell, theirs[None]) for cell in ours.values()]
    return [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]


def _stack(answers: list[Answers], score: str) -> Float[ndarray, "S I"]:
    return np.stack([entry.scores[score] for entry in answers])


def _adjust(contrasts: list[Contrast]) -> list[Contrast]:
    """Judge contrasts of one role again by Holm's p; one without p keeps its verdict."""
    tested = [contrast for contrast in contrasts if contrast.p is not None]
    p_values = holm([contrast.p for contrast in tested if contrast.p is not None])
    equivalents = holm([1.0 if contrast.p_equivalent is None else contrast.p_equivalent for contrast in tested])
    judged = {}
    for contrast, p, equivalent in zip(tested, p_values, equivalents, strict=True):
        word = decide(p, None if contrast.p_equivalent is None else equivalent)
        start = f"{contrast.left} – {contrast.right}: "
        text = contrast.text.replace(f"{start}{contrast.verdict}", f"{start}{word}", 1) + f", adjusted p {_tell_p(p)}"
        judged[id(contrast)] = contrast.model_copy(
            update={"p_adjusted": float(f"{p:.9g}"), "verdict": word, "text": text}
        )
    return [judged.get(id(contrast), contrast) for contrast in contrasts]


def _leave_open(left: str, right: str, column: str, role: Role, unit: str) -> Contrast:
    none = ("difference", "half", "detectable", "p", "p_adjusted", "p_equivalent", "p_items", "margin")
    told = {"left": left, "right": right, "column": column, "role": role, "unit": unit, "verdict": "no data"}
    text = f"{left} – {right}: no data: no seed of both is evaluated yet"
    return Contrast.model_validate({**told, **dict.fromkeys(none), "seeds": [], "items": 0, "flags": [], "text": text})


def _tell(left: str, right: str, word: str, found: Comparison, unit: str, *, margin: float | None, seeded: bool) -> str:
    scale = 100 if unit == "points" else 1
    decimals = count_decimals(found.difference * scale, found.half * scale if found.half else None)
    text = f"{left} – {right}: {word}: difference {format_number(found.difference * scale, decimals)}"
    if found.half is not None:
        text += f" ± {format_number(found.half * scale, decimals)}"
    text += f" {unit}"
    if found.half is None:
        return text + (
            ", one seed, so no interval" if seeded and found.seeds == 1 else ", no variation, so no interval"
        )
    if found.detectable is not None:
        text += f", smallest detectable {format_number(found.detectable * scale, decimals)}"
    return text + (f", margin {margin:g}" if margin is not None else "")


def _tell_p(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _find_flags(evidence: Evidence, pairs: list[_Pair]) -> list[str]:
    """Say what else differs between the two sides, and whether code was changed after its commit."""
    flags = []
    told = [[_describe(evidence, cell) for cell in pair] for pair in pairs]
    for name in ("precision", "device", "code", "start"):
        differing = sorted({f"{a[name]} / {b[name]}" for a, b in told if a[name] != b[name]})
        if differing:
            flags.append(f"{name} differs: {', '.join(differing)}")
    if any(side["dirty"] for pair in told for side in pair):
        flags.append("code with uncommitted changes")
    return flags


def _describe(evidence: Evidence, cell: CellEntry) -> dict[str, Any]:
    receipt = evidence.find_receipt(cell.id)
    code, hardware = receipt.get("code") or {}, receipt.get("hardware") or {}
    return {
        "precision": receipt.get("precision"),
        "device": hardware.get("device"),
        "code": str(code.get("commit"))[:12],
        "start": _find_start(evidence, cell),
        "dirty": code.get("dirty"),
    }


def _find_start(evidence: Evidence, cell: CellEntry) -> Any:
    """Return how the variant's FFNs began: as the study says, unless they are the pretrained ones."""
    study = evidence.document.study
    variants = study.get("variants")
    variant = variants.get(cell.variant) if isinstance(variants, dict) else None
    spec = variant.get("spec", variant) if isinstance(variant, dict) else {}
    return "pretrained" if spec.get("ffn") == "pretrained" else study.get("start")
