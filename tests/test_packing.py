"""Packed rows against each document alone."""

import pytest
import torch
from conftest import make_model, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from kallm.data.dialogues import Conversation, load_dialogues
from kallm.data.packing import IGNORED, Row, encode, pack
from kallm.errors import WrongConfiguration
from kallm.model.trunk import split


def conversations(lengths: list[int]) -> list[Conversation]:
    return [Conversation(str(n), ({"role": "user", "content": "x" * length},)) for n, length in enumerate(lengths)]


def documents(row: Row) -> list[list[int]]:
    """Cut a row where positions restart."""
    starts = [i for i, position in enumerate(row.passage.position_ids.tolist()) if position == 0]
    ids = row.passage.input_ids.tolist()
    return [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=30), row=st.integers(4, 40))
def test_every_token_is_packed_once_and_predicts_its_own_documents_next(lengths: list[int], row: int) -> None:
    told = conversations(lengths)
    rows = pack(told, lambda c: [3 + int(c.id)] * lengths[int(c.id)], length=row, num_tokens=None, padding_id=2)
    seen = [token for packed in rows for document in documents(packed) for token in document if token != 2]
    pieces = sum(max(0, n % row == 1) for n in lengths)  # a last piece of one token predicts nothing and is dropped
    assert len(seen) == sum(lengths) - pieces
    for packed in rows:
        targets, ids = packed.targets.tolist(), packed.passage.input_ids.tolist()
        for place, target in enumerate(targets):
            assert target in (IGNORED, ids[place])  # each document repeats one token here
        assert len(ids) == row


def test_the_budget_bounds_the_tokens() -> None:
    rows = pack(conversations([10] * 20), lambda c: [5] * 10, length=16, num_tokens=64, padding_id=2)
    supervised = sum(row.num_supervised for row in rows)
    assert supervised <= 64
    assert sum(int((row.passage.input_ids == 5).sum()) for row in rows) == 64


def test_padding_is_less_than_two_percent_of_real_lengths() -> None:
    lengths = [20 + (37 * n) % 400 for n in range(300)]
    rows = pack(conversations(lengths), lambda c: [5] * lengths[int(c.id)], length=512, num_tokens=None, padding_id=2)
    assert sum(lengths) / (len(rows) * 512) > 0.98


def test_packed_documents_do_not_see_each_other() -> None:
    trunk, tail = split(make_model(), 2)
    tokenizer = make_tokenizer()
    told = conversations([3, 9, 5])
    (row,) = pack(told, lambda c: encode(tokenizer, c), length=128, num_tokens=None, padding_id=2)
    with torch.no_grad():
        together = tail(trunk(row.passage)[None], row.passage.position_ids[None])[0]
        place = 0
        for document in documents(row)[:3]:
            ids, positions = torch.tensor(document), torch.arange(len(document))
            alone = tail(trunk(type(row.passage)(ids, positions))[None], positions[None])[0]
            torch.testing.assert_close(together[place : place + len(ids)], alone, atol=1e-5, rtol=1e-5)
            place += len(ids)


def test_packing_depends_on_no_seed_of_the_process() -> None:
    torch.manual_seed(1)
    first = pack(conversations([7] * 9), lambda c: [int(c.id) + 3] * 7, length=20, num_tokens=None, padding_id=2)
    torch.manual_seed(2)
    second = pack(conversations([7] * 9), lambda c: [int(c.id) + 3] * 7, length=20, num_tokens=None, padding_id=2)
    assert [r.passage.fingerprint() for r in first] == [r.passage.fingerprint() for r in second]


def test_documents_longer_than_a_row_are_split_or_dropped_counted_and_said() -> None:
    told: list[str] = []
    settings = {"length": 16, "num_tokens": None, "padding_id": 2, "tell": told.append}
    lengths = [40, 16, 33, 5]
    split_rows = pack(conversations(lengths), lambda c: [5] * lengths[int(c.id)], **settings)
    assert sum(int((row.passage.input_ids == 5).sum()) for row in split_rows) == sum(lengths) - 1
    assert max(int(row.passage.position_ids.max()) for row in split_rows) == 15
    assert told[0] == "packing: 7 documents in 6 rows, 3.12% padding"
    assert told[1] == "packing: 2 documents were longer than a row of 16 tokens and were split"
    assert told[2] == "packing: 1 pieces of a single token predict nothing and were left out"
    told.clear()
    rows = pack(conversations(lengths), lambda c: [5] * lengths[int(c.id)], long_documents="drop", **settings)
    assert sum(int((row.passage.input_ids == 5).sum()) for row in rows) == 16 + 5
    assert told[1] == "packing: 2 documents were longer than a row of 16 tokens and were dropped"


def test_a_corpus_of_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(WrongConfiguration, match="2 conversations gave no document of 2 to 8 tokens"):
        pack(
            conversations([9, 10]),
            lambda c: [5] * 9,
            length=8,
            num_tokens=None,
            padding_id=2,
            long_documents="drop",
        )


def test_every_document_goes_where_it_leaves_the_least_room() -> None:
    lengths = [(37 * n) % 29 + 2 for n in range(200)]
    rows = pack(conversations(lengths), lambda c: [5] * lengths[int(c.id)], length=32, num_tokens=None, padding_id=2)
    rooms: list[int] = []
    for size in sorted(lengths, reverse=True):  # the slow and obvious way
        fitting = [index for index, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= size
        else:
            rooms.append(32 - size)
    assert sorted(rooms) == sorted(32 - int((row.passage.input_ids == 5).sum()) for row in rows)


def test_real_conversations_pack_with_less_than_two_percent_padding(tokenizer) -> None:
    told = load_dialogues("package:chitchat-dataset").train[:400]
    rows = pack(told, lambda c: encode(tokenizer, c), length=1024, num_tokens=None, padding_id=2)
    padding = sum(int((row.targets == IGNORED).sum()) - len(documents(row)) for row in rows)
    assert padding < 0.02 * len(rows) * 1024
