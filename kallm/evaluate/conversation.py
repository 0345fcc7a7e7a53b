"""BIG-Bench Hard by conversation: a question under the chat template, a greedy reply, the answer read from it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kallm.data.bbh import BBHItem
from kallm.engine.passes import precision
from kallm.engine.prefill import Replies
from kallm.engine.replies import cut_batches, make_generation, pad_left, padding_token
from kallm.engine.subject import Subject
from kallm.evaluate.choices import summarise
from kallm.evaluate.heldout import needs_chat_template
from kallm.evaluate.parse import is_correct, parse_answer
from kallm.evaluate.score import Score
from kallm.evaluate.suites import BBHChatSettings, Context, Evaluation, Progress

__all__ = ["Conversations", "ask", "prepare"]

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
        replies: generates them, for one subject after the other.
    """

    settings: BBHChatSettings
    items: list[BBHItem]
    prompts: list[str]
    tokens: list[list[int]]
    replies: Replies

    @property
    def num_items(self) -> int:
        """How many questions are asked."""
        return len(self.items)

    def score(self, subject: Subject, progress: Progress, stop: Callable[[], None]) -> Evaluation:
        """Score one subject.

        Raises:
            OutOfMemory: too many replies at a time.
        """
        found: dict[int, str] = {}
        config = make_generation(subject.model, subject.tokenizer, max_new_tokens=self.settings.max_new_tokens)
        padding = padding_token(subject.model, subject.tokenizer)
        with precision(subject):
            for batch in cut_batches([len(ids) for ids in self.tokens], self.settings.batch_size):
                stop()
                ids, mask = pad_left([self.tokens[index] for index in batch], padding)
                found.update(zip(batch, self.replies.generate(subject, ids, mask, config), strict=True))
                progress.advance(len(batch))
        answered = [self._answer(index, found[index]) for index in range(len(self.items))]
        return _with_failures(summarise(answered, {"acc": "correct"}))

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
    return Conversations(settings, items, prompts, tokens, Replies(context.trunk, "bbh-chat"))


def ask(item: BBHItem) -> str:
    """Return a question with one line that tells the form of the answer."""
    return f"{item.question}\n{_FORMS[item.form].format(options=' or '.join(item.options))}"


def _with_failures(evaluation: Evaluation) -> Evaluation:
    """Add the share of replies in which no answer was found, over all items."""
    failed = [item["status"] != "parsed" for item in evaluation.items]
    share = Score(value=sum(failed) / len(failed), unit="fraction", n=len(failed))
    return Evaluation(evaluation.scores | {"parse_failures": share}, evaluation.tasks, evaluation.items)
