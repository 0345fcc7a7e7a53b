"""One figure of an evaluation. Imports no torch."""

from pydantic import BaseModel, ConfigDict

__all__ = ["Score"]


class Score(BaseModel):
    """A figure, its unit, and the number of items (or tokens, for cross-entropy) behind it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    unit: str
    n: int
