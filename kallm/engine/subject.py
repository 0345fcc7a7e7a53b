"""A model under test. Imports no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import transformers

    import kallm.model.trunk

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """A model under test: the whole pretrained model, whose trunk is frozen, and the tail that takes its place."""

    model: "transformers.PreTrainedModel"
    tail: "kallm.model.trunk.Tail"
    tokenizer: "transformers.PreTrainedTokenizerBase"
