"""Retained ability: how far a cell's next-token distribution is from the original model's, on held-out conversations.

At every position of a conversation but its last: KL(p ‖ q) = Σ_v p_v (log p_v - log q_v) in nats, with p the original
model's distribution and q the cell's. Legend: T tokens, D width of the residual stream, V vocabulary, N rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from kallm.engine.passes import ROWS, compute_logits, compute_states
from kallm.engine.subject import Subject
from kallm.evaluate.heldout import HeldoutText, read_heldout
from kallm.evaluate.score import Score
from kallm.evaluate.suites import Context, Evaluation, Progress, RetainedSettings

__all__ = ["RetainedText", "prepare"]


@dataclass(frozen=True)
class RetainedText:
    """Conversations on which a subject is held against the original model."""

    text: HeldoutText

    @property
    def num_items(self) -> int:
        """How many conversations are read."""
        return self.text.num_items

    def score(self, subject: Subject, progress: Progress, stop: Callable[[], None]) -> Evaluation:
        """Score one subject; both tails read the same output of the trunk."""
        # a copy like every cell's, so that an untouched one computes the very same bits
        original = Subject(subject.model, subject.tail.pretrained(subject.model).eval(), subject.tokenizer)
        items = []
        for index, name in enumerate(self.text.ids):
            stop()
            passage, hidden = self.text.cache.passages[index], self.text.cache[index]
            states = [compute_states(each, passage, hidden)[:-1] for each in (original, subject)]
            kl = _sum_kl(original, subject, *states)
            items.append({"id": name, "tokens": len(passage.input_ids) - 1, "kl": kl})
            progress.advance(1)
        return Evaluation(_summarise(items), {}, items)


def prepare(settings: RetainedSettings, context: Context) -> RetainedText:
    """Tokenise the held-out conversations.

    Raises:
        WrongConfiguration: there are no conversations, or the tokenizer has no chat template.
    """
    return RetainedText(read_heldout(context, "retained", max_tokens=settings.max_tokens))


def _sum_kl(
    original: Subject, subject: Subject, states: Float[Tensor, "N D"], other_states: Float[Tensor, "N D"]
) -> float:
    """Return the divergence summed over positions; the logits of a whole conversation are never held at once."""
    total = 0.0
    for rows, other_rows in zip(torch.split(states, ROWS), torch.split(other_states, ROWS), strict=True):
        log_p = compute_logits(original, rows).log_softmax(-1)
        log_q = compute_logits(subject, other_rows).log_softmax(-1)
        total += float(F.kl_div(log_q, log_p, reduction="none", log_target=True).double().sum())
    return total


def _summarise(items: list[dict[str, object]]) -> dict[str, Score]:
    """Return the mean per token, and the standard deviation of a conversation's mean around it."""
    kl, tokens = (sum(item[key] for item in items) for key in ("kl", "tokens"))  # type: ignore[misc]
    mean = kl / tokens
    squares = [(float(item["kl"]) / item["tokens"] - mean) ** 2 for item in items]  # type: ignore[arg-type, operator]
    return {
        "kl": Score(value=mean, unit="nats/token", n=tokens),
        "kl_spread": Score(value=math.sqrt(sum(squares) / len(squares)), unit="nats/token", n=len(items)),
    }
