"""Conversations packed into rows of equal length, without leaks between them.

Each document of a row has positions that start at 0, and transformers keeps documents with restarting positions apart
when it gets neither an attention mask nor a cache. The last token of a document predicts nothing.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kallm.data.dialogues import Conversation
from kallm.errors import WrongConfiguration
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

    def fingerprint(self) -> str:
        """Return a hash of the row's tokens, positions and targets."""
        return hashlib.sha256(self.passage.fingerprint().encode() + self.targets.numpy().tobytes()).hexdigest()


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
    long_documents: Literal["split", "drop"] = "split",
    tell: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Pack conversations into rows by best fit, in one order that depends on no seed of a cell.

    Args:
        conversations: what to pack.
        encode_one: gives a conversation's token ids.
        length: tokens of a row, T.
        num_tokens: stop when that many tokens are packed; None packs everything.
        padding_id: fills the ends of rows, unsupervised, as documents of their own.
        long_documents: ``split`` cuts a document longer than a row into several documents, ``drop`` leaves it out.
        tell: is told how much padding there is, and what was split, dropped or left out.

    Raises:
        WrongConfiguration: nothing is left to pack.
    """
    order = list(conversations)
    random.Random(_ORDER_SEED).shuffle(order)
    documents: list[list[int]] = []
    left, num_long, num_single = num_tokens, 0, 0
    for conversation in order:
        if left is not None and left <= 0:
            break
        ids = encode_one(conversation)
        num_long += len(ids) > length
        if len(ids) > length and long_documents == "drop":
            continue
        ids = ids[:left]
        left = None if left is None else left - len(ids)
        pieces = [ids[i : i + length] for i in range(0, len(ids), length)]
        num_single += sum(len(piece) == 1 for piece in pieces)
        documents += [piece for piece in pieces if len(piece) > 1]
    if not documents:
        raise WrongConfiguration(
            f"the corpus is empty: {len(conversations)} conversations gave no document of 2 to {length} tokens; "
            "raise train.length or train.tokens, or name other dialogues"
        )
    rows = _best_fit(documents, length)
    padding = 1 - sum(map(len, documents)) / (len(rows) * length)
    tell(f"packing: {len(documents):,} documents in {len(rows):,} rows, {padding:.2%} padding")
    if num_long:
        done = "split" if long_documents == "split" else "dropped"
        tell(f"packing: {num_long:,} documents were longer than a row of {length:,} tokens and were {done}")
    if num_single:
        tell(f"packing: {num_single:,} pieces of a single token predict nothing and were left out")
    return [_row(row, length, padding_id) for row in rows]


def _best_fit(documents: list[list[int]], length: int) -> list[list[list[int]]]:
    """Put the longest documents first, each where it leaves the least room (best-fit decreasing)."""
    rows: list[list[list[int]]] = []
    with_room: list[list[int]] = [[] for _ in range(length)]
    rooms = 0  # bit r is set where some row has room for exactly r more tokens
    for document in sorted(documents, key=len, reverse=True):
        size = len(document)
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            index = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            rows.append([])
            index, room = len(rows) - 1, length
        rows[index].append(document)
        with_room[room - size].append(index)
        rooms |= 1 << (room - size)
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
