"""BIG-Bench Hard by conversation: a question under the chat template, a greedy reply, the answer read from it.

Legend: B batch, T tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig

from kallm.data.bbh import BBHItem
from kallm.errors import OutOfMemory
from kallm.evaluate.choices import summarise
from kallm.evaluate.heldout import needs_chat_template, precision
from kallm.evaluate.parse import is_correct, parse_answer
from kallm.evaluate.prefill import Prefill, prefill_tail, prefill_trunk
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
        with precision(subject):
            for number, batch in enumerate(self._batches()):
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
        ids, mask = _pad_left([self.tokens[index] for index in batch], _padding(subject))
        device = subject.tail.head.weight.device
        made = prefill_trunk(self.trunk, subject.model.config, ids.to(device), mask.to(device))
        if sum(prefill.num_bytes for prefill in self.kept.values()) + made.num_bytes <= _KEPT_BYTES:
            self.kept[number] = made
        return made

    def _batches(self) -> Iterator[list[int]]:
        """Yield indices, longest prompts first: little padding, and memory runs out at once or never."""
        order = sorted(range(len(self.tokens)), key=lambda index: -len(self.tokens[index]))
        for start in range(0, len(order), self.settings.batch_size):
            yield order[start : start + self.settings.batch_size]

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
    # What is not said here, generate takes from the model's own sampling defaults.
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=_end_tokens(subject),
        pad_token_id=_padding(subject),
    )
    try:
        cache = prefill_tail(prefill, subject)
        with assembled(subject.model, subject.tail) as model:
            out = model.generate(
                prefill.ids, attention_mask=prefill.mask, past_key_values=cache, generation_config=greedy
            )
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"memory ran out for {len(prefill.ids)} replies at a time: lower the batch_size of the suite bbh-chat"
        ) from error
    replies: list[str] = subject.tokenizer.batch_decode(out[:, prefill.ids.shape[1] :], skip_special_tokens=True)
    return replies


def _end_tokens(subject: Subject) -> list[int]:
    named = subject.model.generation_config.eos_token_id
    found = named if isinstance(named, list) else [named]
    return sorted({token for token in (*found, subject.tokenizer.eos_token_id) if token is not None})


def _padding(subject: Subject) -> int:
    padding: int | None = subject.tokenizer.pad_token_id
    return _end_tokens(subject)[0] if padding is None else padding


def _pad_left(prompts: list[list[int]], padding: int) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Return ids and attention mask, [B, T]."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _with_failures(evaluation: Evaluation) -> Evaluation:
    """Add the share of replies in which no answer was found, over all items."""
    failed = [item["status"] != "parsed" for item in evaluation.items]
    share = Score(value=sum(failed) / len(failed), unit="fraction", n=len(failed))
    return Evaluation(evaluation.scores | {"parse_failures": share}, evaluation.tasks, evaluation.items)
