"""Cross-entropy on held-out conversations, each alone, on all tokens but the first.

Legend: T tokens, D width of the residual stream, V vocabulary, N rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from kallm.data.packing import encode
from kallm.engine.passes import ROWS, compute_logits, compute_states
from kallm.engine.subject import Subject
from kallm.errors import WrongConfiguration
from kallm.evaluate.score import Score
from kallm.evaluate.suites import Context, Evaluation, HeldoutSettings, Progress
from kallm.model.cache import HiddenCache
from kallm.model.trunk import Passage

__all__ = ["HeldoutText", "needs_chat_template", "prepare", "read_heldout"]


@dataclass(frozen=True)
class HeldoutText:
    """Tokenised conversations and the trunk's output for them.

    Attributes:
        num_bytes: length of the scored text in UTF-8.
    """

    ids: list[str]
    num_bytes: list[int]
    cache: HiddenCache

    @property
    def num_items(self) -> int:
        """How many conversations are scored."""
        return len(self.ids)

    def score(self, subject: Subject, progress: Progress, stop: Callable[[], None]) -> Evaluation:
        """Score one subject."""
        items = []
        for index, (name, num_bytes) in enumerate(zip(self.ids, self.num_bytes, strict=True)):
            stop()
            passage = self.cache.passages[index]
            states = compute_states(subject, passage, self.cache[index])
            nll = _sum_nll(subject, states[:-1], passage.input_ids[1:])
            items.append({"id": name, "tokens": len(passage.input_ids) - 1, "bytes": num_bytes, "nll": nll})
            progress.advance(1)
        return Evaluation(_summarise(items), {}, items)


def prepare(settings: HeldoutSettings, context: Context) -> HeldoutText:
    """Tokenise the held-out conversations.

    Raises:
        WrongConfiguration: there are no conversations, or the tokenizer has no chat template.
    """
    return read_heldout(context, "heldout", max_tokens=settings.max_tokens)


def read_heldout(context: Context, suite: str, *, max_tokens: int) -> HeldoutText:
    """Tokenise the held-out conversations; those of fewer than two tokens are left out, for they hold nothing to score.

    Args:
        context: has the conversations.
        suite: who asks, for the messages.
        max_tokens: of a conversation, from its start.

    Raises:
        WrongConfiguration: there are no conversations, or the tokenizer has no chat template.
    """
    needs_chat_template(context.tokenizer, suite)
    ids, num_bytes, passages = [], [], []
    for conversation in context.heldout:
        tokens = encode(context.tokenizer, conversation)[:max_tokens]
        if len(tokens) > 1:
            ids.append(conversation.id)
            num_bytes.append(len(context.tokenizer.decode(tokens[1:]).encode()))
            passages.append(Passage(torch.tensor(tokens), torch.arange(len(tokens))))
    if not ids:
        raise WrongConfiguration(f"the suite '{suite}' needs held-out conversations, but the dialogues have none")
    return HeldoutText(ids, num_bytes, HiddenCache(context.trunk, passages, context.folder, context.model_name))


def needs_chat_template(tokenizer: object, suite: str) -> None:
    """Raise WrongConfiguration where a tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise WrongConfiguration(
            f"the suite '{suite}' needs a tokenizer with a chat template, but this model's has none: "
            "take the instruction-tuned model, or leave the suite out"
        )


def _sum_nll(subject: Subject, states: Float[Tensor, "N D"], targets: Int[Tensor, " N"]) -> float:
    """Return the summed negative log-likelihood in nats; the logits of a whole conversation are never held at once."""
    total = 0.0
    for rows, wanted in zip(torch.split(states, ROWS), torch.split(targets.to(states.device), ROWS), strict=True):
        nll = F.cross_entropy(compute_logits(subject, rows), wanted, reduction="none")
        total += float(nll.double().sum())
    return total


def _summarise(items: list[dict[str, object]]) -> dict[str, Score]:
    nll, tokens, num_bytes = (sum(item[key] for item in items) for key in ("nll", "tokens", "bytes"))  # type: ignore[misc]
    return {
        "cross_entropy": Score(value=nll / tokens, unit="nats/token", n=tokens),
        "perplexity": Score(value=math.exp(nll / tokens), unit="per token", n=tokens),
        "bits_per_byte": Score(value=nll / math.log(2) / num_bytes, unit="bits/byte", n=num_bytes),
    }
