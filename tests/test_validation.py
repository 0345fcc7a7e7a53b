"""The split that a learning rate is chosen by: no person and no conversation on both sides."""

import json

import pytest

from kallm.data.dialogues import Conversation, load_dialogues
from kallm.data.validation import split_validation
from kallm.errors import WrongConfiguration
from kallm.model.sources import package_file


def make(texts: list[str]) -> list[Conversation]:
    return [Conversation(f"train-{n}", ({"role": "user", "content": text},)) for n, text in enumerate(texts)]


def test_no_person_is_tried_on_and_judged_by() -> None:
    stored = json.loads(package_file("chitchat-dataset", ".json")[0].read_text())
    dialogues = load_dialogues("package:chitchat-dataset")
    sides = split_validation("package:chitchat-dataset", dialogues.train)
    tried, judged = (
        {turn[0]["sender"] for each in side for turn in stored[each.id]["messages"] if turn} for side in sides
    )
    assert not tried & judged
    assert {each.id for side in sides for each in side} <= {each.id for each in dialogues.train}
    assert not {each.id for side in sides for each in side} & {each.id for each in dialogues.heldout}
    assert len(sides[0]) > 5 * len(sides[1]) > 500


def test_equal_conversations_stay_on_one_side_and_ten_percent_judge() -> None:
    conversations = make([f"text {n % 50}" for n in range(200)])
    tried, judged = split_validation("/a/folder", conversations)
    assert not {str(each.messages) for each in tried} & {str(each.messages) for each in judged}
    assert (len(tried), len(judged)) == (180, 20)
    assert split_validation("/elsewhere", conversations[::-1]) == (tried[::-1], judged[::-1])


def test_too_few_conversations_are_refused() -> None:
    with pytest.raises(WrongConfiguration, match="2 training conversations are too few for a validation split"):
        split_validation("/a/folder", make(["one", "one"]))
