"""What is measured on text alone: the settings of suites that need no questions, and what all settings have.

Their identity names an evaluation's record. Imports no torch.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["EdgesSettings", "HeldoutSettings", "RetainedSettings", "SuiteSettings"]


class SuiteSettings(BaseModel, ABC):
    """What one suite measures; fields in ``without_effect`` name no result and are left out of the identity."""

    model_config = ConfigDict(frozen=True, extra="forbid", polymorphic_serialization=True)
    numerics: ClassVar[int]
    """Raised whenever the same settings and data would give other items."""
    without_effect: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def description(self) -> str:
        """One line for the table."""

    @abstractmethod
    def content(self, *, dialogues: str, heldout: int) -> str:
        """Return a hash of the data that is scored."""

    def pinned(self) -> "SuiteSettings":
        """Return the same with what comes from the hub named by commit."""
        return self

    def identity(self, *, dialogues: str, heldout: int) -> str:
        """Return a hash of the settings, the data and the version of the computation.

        Args:
            dialogues: hash of the dialogues' content.
            heldout: how many held-out conversations are scored, at most.
        """
        told = {
            "content": self.content(dialogues=dialogues, heldout=heldout),
            "numerics": self.numerics,
            "settings": self.model_dump(mode="json", exclude=set(self.without_effect)),
            "suite": type(self).__name__,
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


class HeldoutSettings(SuiteSettings):
    """Cross-entropy on conversations that no cell trains on."""

    numerics = 1
    max_tokens: int = Field(1024, gt=1, description="a conversation's tokens that are read, from its start")

    @property
    def description(self) -> str:
        """One line for the table."""
        return f"held-out conversations, all tokens but the first of at most {self.max_tokens}"

    def content(self, *, dialogues: str, heldout: int) -> str:
        """Return a hash of the data that is scored."""
        return f"{dialogues} {heldout}"


class RetainedSettings(HeldoutSettings):
    """How far a cell's next-token distribution is from the original model's, on the held-out conversations."""

    @property
    def description(self) -> str:
        """One line for the table."""
        return f"KL divergence from the original model, held-out conversations of at most {self.max_tokens} tokens"


class EdgesSettings(SuiteSettings):
    """What the edges of each KAN layer learned: the strongest functions, and what parts of the edges explain."""

    numerics = 1
    tokens: int = Field(2048, gt=1, description="tokens of held-out conversations that the layers' inputs come from")
    functions: int = Field(6, gt=0, description="the strongest functions of each layer that are kept")

    @property
    def description(self) -> str:
        """One line for the table."""
        return (
            f"share of a KAN layer's output variance that parts of its edges explain, mean over layers, on "
            f"{self.tokens:,} held-out tokens"
        )

    def content(self, *, dialogues: str, heldout: int) -> str:
        """Return a hash of the data that is read."""
        return f"{dialogues} {heldout}"
