"""The table as data: what ``table.json`` holds, and what the renderings and the report read."""

import json
import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from kallm.results.record import Parameters

__all__ = ["Cell", "CellState", "Column", "Contrast", "Estimate", "Reference", "Row", "Table"]

CellState = Literal["done", "evaluating", "running", "stale", "failed", "diverged", "trained", "missing"]
SIGNIFICANT = 9


def _shorten(value: Any) -> Any:
    """Keep nine significant digits of every float, so that the order of a sum changes no byte."""
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT}g}") if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [_shorten(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _shorten(entry) for key, entry in value.items()}
    return value


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _round(cls, value: Any) -> Any:
        return _shorten(value)


class Column(_Frozen):
    """One score of one suite; ``key`` is ``<suite>.<score>``."""

    key: str
    suite: str
    score: str
    title: str
    unit: str
    percent: bool
    better: Literal["lower", "higher"] | None
    lead: bool
    """Whether the narrow renderings show it."""


class Estimate(_Frozen):
    """A mean over seeds with half of its 95 % interval; ``half`` is None where there is one seed or none."""

    mean: float
    half: float | None
    values: list[tuple[int | None, float]]
    items: int | None = None
    """How many items (tokens, for cross-entropy) are behind one seed's figure."""
    item_error: float | None = None
    """Standard error from the choice of items; all variants share it, so contrasts are surer than it says."""


class Row(_Frozen):
    """One variant."""

    variant: str
    trained: bool
    parameters: Parameters
    seeds_done: int
    seeds_planned: int
    tokens: int
    steps: int
    seconds: Estimate | None
    tokens_per_s: float | None
    peak_bytes: int | None
    shared: bool
    """Whether any of its cells shared the trunk with others: then time and memory are not its own."""
    scores: dict[str, Estimate]
    tasks: dict[str, dict[str, Estimate]]
    """Column, then task."""
    replies: dict[str, dict[str, float]]
    """Suite, then the shares of parsed, unparsed and empty replies over all seeds."""


class Reference(_Frozen):
    """A figure that needs no model: uniform choice, the majority class, an empty reply."""

    name: Literal["chance", "majority", "empty reply"]
    scores: dict[str, float]
    tasks: dict[str, dict[str, float]]


class Cell(_Frozen):
    """One cell: how far it is, its own figures, and its receipts."""

    id: str
    variant: str
    seed: int | None
    state: CellState
    detail: str
    scores: dict[str, float]
    seconds: float | None
    tokens_per_s: float | None
    peak_bytes: int | None
    shared: bool
    attempts: int | None
    records: dict[str, str]
    """Key and SHA-256 of every record of the cell."""
    weights: str | None
    commit: str | None
    dirty: bool | None
    image: str | None
    device: str | None
    processor: str | None
    precision: str | None


class Contrast(_Frozen):
    """A paired comparison, left minus right, and its verdict in words."""

    left: str
    right: str
    column: str
    role: Literal["declared", "secondary", "exploratory"]
    unit: str
    difference: float | None
    half: float | None
    p: float | None
    p_adjusted: float | None
    """Holm's, within the contrasts of one role; None for declared contrasts, which are not adjusted."""
    margin: float | None
    p_equivalent: float | None
    detectable: float | None
    p_items: float | None
    """Sign-flip test over items, for these trained models as they are."""
    seeds: list[int]
    items: int
    verdict: Literal["different", "equivalent", "not distinguished", "no data"]
    text: str
    flags: list[str]
    """What else differs between the two sides: precision, device, code, start."""


class Table(_Frozen):
    """All results of one study; a pure function of the stored records."""

    format: Literal[1] = 1
    name: str
    hash: str
    headline: str
    columns: list[Column]
    rows: list[Row]
    references: list[Reference]
    contrasts: list[Contrast]
    cells: list[Cell]
    notes: list[str]

    def to_bytes(self) -> bytes:
        """Return the table as canonical JSON: sorted keys, two spaces, one final newline."""
        return (json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True) + "\n").encode()
