"""BIG-Bench Hard by likelihood: every option of an item in one forward pass.

The question and all options form a tree: an option sees the question and itself, at the positions that it would have
alone. Legend: T tokens of the tree, L tokens of all options together, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kallm.data.bbh import TASKS, BBHItem
from kallm.engine.passes import compute_logits, compute_states
from kallm.engine.subject import Subject
from kallm.errors import WrongConfiguration
from kallm.evaluate.score import Score
from kallm.evaluate.suites import BBHChoiceSettings, Context, Evaluation, Progress
from kallm.model.cache import HiddenCache
from kallm.model.trunk import Passage

__all__ = ["Choices", "Tree", "build_tree", "encode_options", "prepare", "prompt_of", "summarise"]


@dataclass(frozen=True)
class Tree:
    """A question and its options as one passage.

    Attributes:
        passage: the question's tokens, then every option's but the last, [T].
        first_row: the question's last token: from here on every position predicts a token of an option.
        rows: counted from there, the position that predicts each token of the options, [L].
        targets: those tokens, [L].
        lengths: how many of them each option has.
    """

    passage: Passage
    first_row: int
    rows: Int[Tensor, " L"]
    targets: Int[Tensor, " L"]
    lengths: tuple[int, ...]

    def log_likelihoods(self, subject: Subject, hidden: Float[Tensor, "T D"]) -> list[float]:
        """Return every option's log-likelihood in nats, given the trunk's output."""
        states = compute_states(subject, self.passage, hidden)
        log_probs = compute_logits(subject, states[self.first_row :]).log_softmax(-1)
        chosen = log_probs[self.rows.to(states.device), self.targets.to(states.device)].double().cpu()
        return [float(part.sum()) for part in torch.split(chosen, list(self.lengths))]


@dataclass(frozen=True)
class Choices:
    """Items as trees, and the trunk's output for them."""

    items: list[BBHItem]
    options: list[tuple[str, ...]]
    trees: list[Tree]
    cache: HiddenCache

    @property
    def num_items(self) -> int:
        """How many items are scored."""
        return len(self.items)

    def score(self, subject: Subject, progress: Progress, stop: Callable[[], None]) -> Evaluation:
        """Score one subject."""
        answered = []
        for index, (item, options) in enumerate(zip(self.items, self.options, strict=True)):
            stop()
            found = self.trees[index].log_likelihoods(subject, self.cache[index])
            answered.append(_answer(item, options, found))
            progress.advance(1)
        return summarise(answered, {"acc": "correct", "acc_norm": "correct_norm"})


def prepare(settings: BBHChoiceSettings, context: Context) -> Choices:
    """Tokenise questions and options.

    Raises:
        WrongConfiguration: the tokenizer joins an option to the end of its question.
    """
    items = settings.load()
    options = [item.options or TASKS[item.task].counts for item in items]
    trees = [
        _tree_of(context.tokenizer, prompt_of(item), choices) for item, choices in zip(items, options, strict=True)
    ]
    passages = [tree.passage for tree in trees]
    return Choices(items, options, trees, HiddenCache(context.trunk, passages, context.folder, context.model_name))


def prompt_of(item: BBHItem) -> str:
    """Return the text that options continue, after a space."""
    return f"Q: {item.question}\nA:"


def encode_options(
    tokenizer: PreTrainedTokenizerBase, context: str, continuations: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Return the token ids of a context and of what continues it as lm-eval splits them.

    Both are tokenised together; the continuation is what follows as many tokens as the context has alone. Spaces at the
    context's end belong to the continuation.
    """
    texts = [context.rstrip(), *(context + continuation for continuation in continuations)]
    ids, *wholes = tokenizer(texts)["input_ids"]
    return ids, [whole[len(ids) :] for whole in wholes]


def build_tree(question: Sequence[int], options: Sequence[Sequence[int]]) -> Tree:
    """Lay a question and its options into one passage.

    Args:
        question: token ids.
        options: token ids of each option, at least one each.
    """
    start = len(question)
    ids, positions, branches = list(question), list(range(start)), [0] * start
    rows: list[int] = []
    for branch, option in enumerate(options, start=1):
        rows += [0, *range(len(ids) - start + 1, len(ids) - start + len(option))]
        ids += option[:-1]
        positions += range(start, start + len(option) - 1)
        branches += [branch] * (len(option) - 1)
    of = torch.tensor(branches)
    mask = ((of[None, :] == 0) | (of[None, :] == of[:, None])).tril()
    passage = Passage(torch.tensor(ids), torch.tensor(positions), mask if len(ids) > start else None)
    targets = [token for option in options for token in option]
    return Tree(passage, start - 1, torch.tensor(rows), torch.tensor(targets), tuple(map(len, options)))


def summarise(items: list[dict[str, Any]], fields: dict[str, str]) -> Evaluation:
    """Return an evaluation whose scores are means over tasks of the share of items for which a field is true."""
    by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item in items:
        by_task[item["task"]].append(item)
    tasks = {
        task: {name: _share([float(item[key]) for item in members], len(members)) for name, key in fields.items()}
        for task, members in by_task.items()
    }
    scores = {name: _share([of[name].value for of in tasks.values()], len(items)) for name in fields}
    return Evaluation(scores, tasks, items)


def _share(values: Sequence[float], n: int) -> Score:
    return Score(value=float(np.mean(values)), unit="fraction", n=n)


def _tree_of(tokenizer: PreTrainedTokenizerBase, prompt: str, options: Sequence[str]) -> Tree:
    question, continuations = encode_options(tokenizer, prompt, [f" {option}" for option in options])
    for option, continuation in zip(options, continuations, strict=True):
        if not continuation:
            raise WrongConfiguration(f"this model's tokenizer joins '{option}' to the question: leave bbh-choice out")
    return build_tree(question, continuations)


def _answer(item: BBHItem, options: tuple[str, ...], log_likelihoods: list[float]) -> dict[str, Any]:
    """Return one item's record; equal likelihoods choose the first option, as lm-eval does."""
    gold = options.index(item.answer) if item.answer in options else -1
    choice = int(np.argmax(log_likelihoods))
    choice_norm = int(np.argmax(np.array(log_likelihoods) / [len(option) for option in options]))
    return {
        "id": item.id,
        "task": item.task,
        "prompt": prompt_of(item),
        "gold": gold,
        "choice": choice,
        "choice_norm": choice_norm,
        "correct": choice == gold,
        "correct_norm": choice_norm == gold,
        "num_options": len(options),
        "options": list(options),
        "loglikelihoods": log_likelihoods,
    }
