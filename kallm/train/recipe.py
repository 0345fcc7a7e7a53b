"""The recipe: how a cell is trained, as data. Imports no torch."""

import math
import random
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["Recipe", "ReportTo"]

ReportTo = Literal["tensorboard", "trackio", "wandb"]
_CHANGE_NO_WEIGHT = {"cache_gb", "checkpoint_s", "report_to"}


class Recipe(BaseModel):
    """How a cell is trained: AdamW, linear warm-up, cosine to zero, loss normalised by supervised tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int = Field(gt=0, description="tokens of the corpus that one epoch sees, at most")
    epochs: int = Field(1, gt=0, description="passes over those tokens")
    length: int = Field(1024, gt=1, description="tokens of a packed row")
    batch: int = Field(8, gt=0, description="rows per optimiser step")
    micro_batch: int = Field(8, gt=0, description="rows per forward pass; lower it when memory runs out")
    lr: float | tuple[float, ...] = Field(
        1e-3,
        description="peak learning rate; of a list, each variant takes the best on a validation split",
    )
    lr_share: float = Field(0.1, gt=0, le=1, description="share of the tokens that each rate of a list is tried on")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps with a rising learning rate, then cosine")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's decay rates")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled decay")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast; weights and optimiser stay fp32")
    long_documents: Literal["split", "drop"] = Field("split", description="what becomes of those longer than a row")
    compile: bool = Field(False, description="run the tail through torch.compile; it needs a C++ compiler on a CPU")
    cache_gb: float | None = Field(
        None,
        ge=0,
        description="GB on disk for the trunk's output on the corpus, at most; 0: none, null: four fifths of what is "
        "free there; changes no result",
    )
    checkpoint_s: float = Field(300, gt=0, description="seconds between checkpoints; changes no result")
    report_to: tuple[ReportTo, ...] = Field((), description="where the metrics go besides the store; changes no result")

    @field_validator("lr", mode="before")
    @classmethod
    def _distinct_rates(cls, value: Any) -> Any:
        rates = value if isinstance(value, list | tuple) else [value]
        try:
            numbers = sorted(float(rate) for rate in rates if not isinstance(rate, bool))
        except (TypeError, ValueError, OverflowError):
            numbers = []
        good = len(numbers) == len(rates) > 0 and all(0 < rate < math.inf for rate in numbers)
        if not good or len(set(numbers)) < len(numbers):
            raise ValueError(
                "expected a learning rate above 0, or a list of different ones to choose from "
                f"(such as 0.001, or [0.0003, 0.001, 0.003]), but got {value!r:.60}"
            )
        return numbers[0] if len(numbers) == 1 else tuple(numbers)

    @model_validator(mode="after")
    def _share_is_of_a_list(self) -> "Recipe":
        if self.choice is None and self.lr_share != self.default("lr_share"):
            raise ValueError("lr_share is for a list of learning rates in lr, but lr is one rate; leave lr_share out")
        return self

    @property
    def choice(self) -> tuple[float, ...] | None:
        """The learning rates to choose from, ascending; None where there is one."""
        return self.lr if isinstance(self.lr, tuple) else None

    @property
    def trial_tokens(self) -> int:
        """Tokens of the corpus that each rate of a list is tried on, a row at least."""
        return max(self.length, math.ceil(self.lr_share * self.tokens))

    @property
    def rate(self) -> float:
        """The peak learning rate, of a recipe that names one."""
        assert not isinstance(self.lr, tuple), "choose a learning rate first"
        return self.lr

    def at(self, lr: float) -> "Recipe":
        """Return this recipe with one learning rate."""
        return self.model_copy(update={"lr": lr, "lr_share": self.default("lr_share")})

    def identity(self) -> dict[str, Any]:
        """Return the fields that can change a trained weight; those that came later count once they are set."""
        later = {name for name in ("long_documents", "compile") if getattr(self, name) == self.default(name)}
        later |= {"lr_share"} if self.choice is None else set()
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
            return self.rate * (step + 1) / rising
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / (num_steps - rising)))

    def rows_of(self, step: int, num_rows: int, seed: int) -> list[int]:
        """Return the rows of a step: every epoch has an order of its own, drawn by the seed alone."""
        epoch, place = divmod(step, -(-num_rows // self.batch))
        order = list(range(num_rows))
        random.Random(f"order {seed} {epoch}").shuffle(order)
        return order[place * self.batch : (place + 1) * self.batch]
