"""Conversations packed into rows of equal length, without leaks between them.

Each document of a row has positions that start at 0, and transformers keeps documents with restarting positions apart
when it gets neither an attention mask nor a cache. The last token of a document predicts nothing.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kallm.data.dialogues import Conversation
from kallm.model.trunk import Passage

__all__ = ["IGNORED", "Row", "encode", "pack"]

IGNORED = -100
_ORDER_SEED = 0


@dataclass(frozen=True)
class Row:
    """One packed row.

    Attributes:
        passage: token ids and positions, each [T].
        targets: the id that each token should predict, [T]; IGNORED at the end of a document and in padding.
    """

    passage: Passage
    targets: Int[Tensor, " T"]

    @property
    def num_supervised(self) -> int:
        """How many tokens have a target."""
        return int((self.targets != IGNORED).sum())


def encode(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    """Return a conversation's token ids under the model's chat template."""
    text = tokenizer.apply_chat_template(list(conversation.messages), tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def pack(
    conversations: Sequence[Conversation],
    encode_one: Callable[[Conversation], list[int]],
    *,
    length: int,
    num_tokens: int | None,
    padding_id: int,
) -> list[Row]:
    """Pack conversations into rows by best fit, in one order that depends on no seed of a cell.

    Args:
        conversations: what to pack.
        encode_one: gives a conversation's token ids; documents longer than a row are cut into several.
        length: tokens of a row, T.
        num_tokens: stop when that many tokens are packed; None packs everything.
        padding_id: fills the ends of rows, unsupervised, as documents of their own.
    """
    order = list(conversations)
    random.Random(_ORDER_SEED).shuffle(order)
    documents: list[list[int]] = []
    left = num_tokens
    for conversation in order:
        if left is not None and left <= 0:
            break
        ids = encode_one(conversation)[:left]
        left = None if left is None else left - len(ids)
        documents += [ids[i : i + length] for i in range(0, len(ids), length)]
    return [_row(row, length, padding_id) for row in _best_fit([d for d in documents if len(d) > 1], length)]


def _best_fit(documents: list[list[int]], length: int) -> list[list[list[int]]]:
    """Put the longest documents first, each where it leaves the least room (best-fit decreasing)."""
    rows: list[list[list[int]]] = []
    with_room: dict[int, list[int]] = {}
    for document in sorted(documents, key=len, reverse=True):
        size = len(document)
        room = min((r for r in with_room if r >= size and with_room[r]), default=None)
        if room is None:
            rows.append([])
            index, room = len(rows) - 1, length
        else:
            index = with_room[room].pop()
        rows[index].append(document)
        with_room.setdefault(room - size, []).append(index)
    return rows


def _row(documents: list[list[int]], length: int, padding_id: int) -> Row:
    ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for document in documents:
        ids += document
        positions += range(len(document))
        targets += [*document[1:], IGNORED]
    room = length - len(ids)
    passage = Passage(torch.tensor(ids + [padding_id] * room), torch.tensor([*positions, *range(room)]))
    return Row(passage, torch.tensor(targets + [IGNORED] * room))
