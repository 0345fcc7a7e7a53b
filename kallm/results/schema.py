"""The table as data: what ``table.json`` holds, and what the renderings and the report read."""

import json
import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from kallm.results.record import Parameters

__all__ = [
    "Cell",
    "CellState",
    "Choice",
    "Column",
    "Contrast",
    "Counted",
    "Estimate",
    "Hardware",
    "Probe",
    "Reference",
    "Row",
    "Table",
]

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


class Hardware(_Frozen):
    """What variants were measured alone on; ``label`` is a letter that stands for it in the table."""

    label: str
    hash: str
    device: str
    processor: str | None
    num_threads: int | None
    torch: str | None

    @property
    def name(self) -> str:
        """The hardware in words."""
        on = self.device if self.device != "cpu" or self.processor is None else self.processor
        threads = "" if self.num_threads is None else f", {self.num_threads} thread{'s'[: self.num_threads > 1]}"
        return f"{on}{threads if self.device == 'cpu' else ''}, torch {self.torch or 'unknown'}"


class Counted(_Frozen):
    """Bytes that follow from sizes alone."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int


class Probe(_Frozen):
    """What a variant takes alone on one hardware, and its receipt."""

    hardware: str
    """Its letter."""
    rows: int
    length: int
    tokens_per_s: float
    step_s: list[float]
    peak_bytes: int
    reserved_bytes: int | None
    saved_bytes: int
    """What autograd keeps of one forward pass."""
    counted: Counted
    record: str
    """Key of the record."""
    sha256: str
    commit: str | None
    dirty: bool | None
    image: str | None


class Choice(_Frozen):
    """Which learning rate a variant took, and its receipt."""

    lr: float | None
    """None where every trial diverged."""
    trials: list[tuple[float, float | None]]
    """Learning rate, and nats per token on the validation split; None where the trial diverged."""
    tokens: int
    """Of the validation split."""
    record: str
    sha256: str
    commit: str | None
    dirty: bool | None


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
    shared: bool
    """Whether any of its cells shared the trunk with others: then their time is not their own."""
    lr: float | None
    """Peak learning rate; None where nothing trains, or where it is yet to be chosen."""
    choice: Choice | None
    probes: list[Probe]
    """One for each hardware that the variant was measured alone on; memory and speed are theirs, never a cell's."""
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
    hardware: list[Hardware]
    """What the probes of the rows were measured on."""
    rows: list[Row]
    references: list[Reference]
    contrasts: list[Contrast]
    cells: list[Cell]
    notes: list[str]

    def to_bytes(self) -> bytes:
        """Return the table as canonical JSON: sorted keys, two spaces, one final newline."""
        return (json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True) + "\n").encode()
