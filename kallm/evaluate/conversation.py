"""BIG-Bench Hard by conversation: a question under the chat template, a greedy reply, the answer read from it.

Legend: B batch, T tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from kallm.data.bbh import BBHItem
from kallm.errors import OutOfMemory
from kallm.evaluate.choices import summarise
from kallm.evaluate.heldout import needs_chat_template, precision
from kallm.evaluate.parse import is_correct, parse_answer
from kallm.evaluate.score import Score
from kallm.evaluate.suites import BBHChatSettings, Context, Evaluation, Progress, Subject
from kallm.model.trunk import assembled

__all__ = ["Conversations", "ask", "generate_replies", "prepare"]

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
        prompts: the text that the model sees.
        tokens: its token ids.
    """

    settings: BBHChatSettings
    items: list[BBHItem]
    prompts: list[str]
    tokens: list[list[int]]

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
        with assembled(subject.model, subject.tail) as model, precision(subject):
            for batch in self._batches():
                stop()
                prompts = [self.tokens[index] for index in batch]
                found = generate_replies(model, subject.tokenizer, prompts, max_new_tokens=self.settings.max_new_tokens)
                replies.update(zip(batch, found, strict=True))
                progress.advance(len(batch))
        answered = [self._answer(index, replies[index]) for index in range(len(self.items))]
        return _with_failures(summarise(answered, {"acc": "correct"}))

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
    return Conversations(settings, items, prompts, tokens)


def ask(item: BBHItem) -> str:
    """Return a question with one line that tells the form of the answer."""
    return f"{item.question}\n{_FORMS[item.form].format(options=' or '.join(item.options))}"


def generate_replies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], *, max_new_tokens: int
) -> list[str]:
    """Return the greedy replies to tokenised prompts, without special tokens.

    Raises:
        OutOfMemory: too many replies at a time.
    """
    ends = _end_tokens(model, tokenizer)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    ids, mask = _pad_left(prompts, padding)
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
        eos_token_id=ends,
        pad_token_id=padding,
    )
    try:
        out = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), generation_config=greedy)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"memory ran out for {len(prompts)} replies at a time: lower the batch_size of the suite bbh-chat"
        ) from error
    replies: list[str] = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return replies


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    named = model.generation_config.eos_token_id
    found = named if isinstance(named, list) else [named]
    return sorted({token for token in (*found, tokenizer.eos_token_id) if token is not None})


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
