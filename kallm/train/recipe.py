"""The recipe: how a cell is trained, as data. Imports no torch."""

import math
import random
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Recipe", "ReportTo"]

ReportTo = Literal["tensorboard", "trackio", "wandb"]
_CHANGE_NO_WEIGHT = {"checkpoint_s", "report_to"}


class Recipe(BaseModel):
    """How a cell is trained: AdamW, linear warm-up, cosine to zero, loss normalised by supervised tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int = Field(gt=0, description="tokens of the corpus that one epoch sees, at most")
    epochs: int = Field(1, gt=0, description="passes over those tokens")
    length: int = Field(1024, gt=1, description="tokens of a packed row")
    batch: int = Field(8, gt=0, description="rows per optimiser step")
    micro_batch: int = Field(8, gt=0, description="rows per forward pass; lower it when memory runs out")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps with a rising learning rate, then cosine")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's decay rates")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled decay")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast; weights and optimiser stay fp32")
    long_documents: Literal["split", "drop"] = Field("split", description="what becomes of those longer than a row")
    compile: bool = Field(False, description="run the tail through torch.compile; it needs a C++ compiler on a CPU")
    checkpoint_s: float = Field(300, gt=0, description="seconds between checkpoints; changes no result")
    report_to: tuple[ReportTo, ...] = Field((), description="where the metrics go besides the store; changes no result")

    def identity(self) -> dict[str, Any]:
        """Return the fields that can change a trained weight; those that came later count once they are set."""
        later = {name for name in ("long_documents", "compile") if getattr(self, name) == self.default(name)}
        return self.model_dump(mode="json", exclude=_CHANGE_NO_WEIGHT | later)

    @classmethod
    def default(cls, name: str) -> Any:
        """Return the default of a field."""
        return cls.model_fields[name].default

    def num_steps(self, num_rows: int) -> int:
        """Return the optimiser steps of a cell."""
        return self.epochs * -(-num_rows // self.batch)

    def lr_at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of a step, counted from 0: it rises over the warm-up, then falls as a cosine."""
        rising = math.ceil(self.warmup * num_steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / (num_steps - rising)))

    def rows_of(self, step: int, num_rows: int, seed: int) -> list[int]:
        """Return the rows of a step: every epoch has an order of its own, drawn by the seed alone."""
        epoch, place = divmod(step, -(-num_rows // self.batch))
        order = list(range(num_rows))
        random.Random(f"order {seed} {epoch}").shuffle(order)
        return order[place * self.batch : (place + 1) * self.batch]
