"""One sequence that goes through a model alone, and the mask that keeps documents packed into it apart.

Legend: B batch, T tokens.
"""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["FIRST_LENGTH", "Passage", "apart", "trial_passage"]

FIRST_LENGTH = 5
"""Tokens of the first document of a trial passage."""
_SECOND_LENGTH = 9


@dataclass(frozen=True)
class Passage:
    """One sequence that goes through the model alone.

    Attributes:
        input_ids: token ids, [T].
        position_ids: positions, [T]; documents packed into one passage each start at 0 and do not see each other.
        mask: which token (row) sees which (column), [T, T]; None means causal within each document.
    """

    input_ids: Int[Tensor, " T"]
    position_ids: Int[Tensor, " T"]
    mask: Bool[Tensor, "T T"] | None = None

    def fingerprint(self) -> str:
        """Return a hash of the passage's content."""
        digest = hashlib.sha256(self.input_ids.numpy().tobytes())
        digest.update(self.position_ids.numpy().tobytes())
        if self.mask is not None:
            digest.update(self.mask.numpy().tobytes())
        return digest.hexdigest()


def apart(position_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T T"]:
    """Return the mask that keeps packed documents apart: causal, and within the same restart of the positions."""
    document = (position_ids == 0).cumsum(-1)
    return (document[:, :, None] == document[:, None, :]).tril()


def trial_passage(vocab_size: int) -> Passage:
    """Return two short documents in one passage, to try on a model what it does."""
    ids = torch.tensor([(7 * number + 3) % vocab_size for number in range(FIRST_LENGTH + _SECOND_LENGTH)])
    return Passage(ids, torch.cat([torch.arange(FIRST_LENGTH), torch.arange(_SECOND_LENGTH)]))
