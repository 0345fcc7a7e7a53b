"""BIG-Bench Hard by conversation: a question under the chat template, a greedy reply, the answer read from it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kallm.data.bbh import BBHItem
from kallm.errors import OutOfMemory
from kallm.evaluate.choices import summarise
from kallm.evaluate.heldout import needs_chat_template, precision
from kallm.evaluate.parse import is_correct, parse_answer
from kallm.evaluate.prefill import Prefill, prefill_tail, prefill_trunk
from kallm.evaluate.replies import cut_batches, generate, make_generation, pad_left, padding_token
from kallm.evaluate.score import Score
from kallm.evaluate.suites import BBHChatSettings, Context, Evaluation, Progress, Subject
from kallm.model.trunk import Trunk, assembled

__all__ = ["Conversations", "ask", "generate_replies", "prepare"]

_KEPT_BYTES = 1 << 30
_FORMS = {
    "option": "Answer with the letter of the right option only, for example (A).",
    "word": "Answer with one word only: {options}.",
    "number": "Answer with one number only.",
    "brackets": "Answer with the missing closing brackets only, separated by spaces.",
    "words": "Answer with the sorted words only, separated by spaces.",
}


@dataclass(frozen=True)
class Conversations:
    """Questions under the chat template.

    Attributes:
        trunk: runs the prompts once, while what it makes of them has room.
        prompts: the text that the model sees.
        tokens: its token ids.
        kept: what the trunk made of each batch.
    """

    settings: BBHChatSettings
    items: list[BBHItem]
    trunk: Trunk
    prompts: list[str]
    tokens: list[list[int]]
    kept: dict[int, Prefill] = field(default_factory=dict)

    @property
    def num_items(self) -> int:
        """How many questions are asked."""
        return len(self.items)

    def score(self, subject: Subject, progress: Progress, stop: Callable[[], None]) -> Evaluation:
        """Score one subject.

        Raises:
            OutOfMemory: too many replies at a time.
        """
        replies: dict[int, str] = {}
        batches = cut_batches([len(ids) for ids in self.tokens], self.settings.batch_size)
        with precision(subject):
            for number, batch in enumerate(batches):
                stop()
                found = generate_replies(
                    subject, self._prefill(number, batch, subject), max_new_tokens=self.settings.max_new_tokens
                )
                replies.update(zip(batch, found, strict=True))
                progress.advance(len(batch))
        answered = [self._answer(index, replies[index]) for index in range(len(self.items))]
        return _with_failures(summarise(answered, {"acc": "correct"}))

    def _prefill(self, number: int, batch: list[int], subject: Subject) -> Prefill:
        """Return what the trunk makes of a batch of prompts, kept for the next subject while there is room."""
        if number in self.kept:
            return self.kept[number]
        ids, mask = pad_left([self.tokens[index] for index in batch], padding_token(subject.model, subject.tokenizer))
        device = subject.tail.head.weight.device
        made = prefill_trunk(self.trunk, subject.model.config, ids.to(device), mask.to(device))
        if sum(prefill.num_bytes for prefill in self.kept.values()) + made.num_bytes <= _KEPT_BYTES:
            self.kept[number] = made
        return made

    def _answer(self, index: int, reply: str) -> dict[str, Any]:
        item, normaliser = self.items[index], self.settings.normaliser
        parsed, status = parse_answer(reply, item, normaliser=normaliser)
        return {
            "id": item.id,
            "task": item.task,
            "prompt": self.prompts[index],
            "reply": reply,
            "parsed": parsed,
            "status": status,
            "gold": item.answer,
            "correct": is_correct(parsed, item, normaliser=normaliser),
            "num_options": len(item.options),
        }


def prepare(settings: BBHChatSettings, context: Context) -> Conversations:
    """Put the questions under the chat template and tokenise them.

    Raises:
        WrongConfiguration: the tokenizer has no chat template.
    """
    needs_chat_template(context.tokenizer, "bbh-chat")
    items = settings.load()
    prompts = [
        context.tokenizer.apply_chat_template(
            [{"role": "user", "content": ask(item)}], tokenize=False, add_generation_prompt=True
        )
        for item in items
    ]
    tokens = [context.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    return Conversations(settings, items, context.trunk, prompts, tokens)


def ask(item: BBHItem) -> str:
    """Return a question with one line that tells the form of the answer."""
    return f"{item.question}\n{_FORMS[item.form].format(options=' or '.join(item.options))}"


def generate_replies(subject: Subject, prefill: Prefill, *, max_new_tokens: int) -> list[str]:
    """Return the greedy replies to a batch of prompts, without special tokens.

    Raises:
        OutOfMemory: too many replies at a time.
    """
    config = make_generation(subject.model, subject.tokenizer, max_new_tokens=max_new_tokens)
    try:
        cache = prefill_tail(prefill, subject)
        with assembled(subject.model, subject.tail) as model:
            return generate(model, subject.tokenizer, prefill.ids, prefill.mask, config, cache=cache)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"memory ran out for {len(prefill.ids)} replies at a time: lower the batch_size of the suite bbh-chat"
        ) from error


def _with_failures(evaluation: Evaluation) -> Evaluation:
    """Add the share of replies in which no answer was found, over all items."""
    failed = [item["status"] != "parsed" for item in evaluation.items]
    share = Score(value=sum(failed) / len(failed), unit="fraction", n=len(failed))
    return Evaluation(evaluation.scores | {"parse_failures": share}, evaluation.tasks, evaluation.items)
