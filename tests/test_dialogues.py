"""Conversations: the split by people, and the formats of a folder."""

import json
from pathlib import Path

import pytest

from kallm.data.dialogues import identify_dialogues, load_dialogues
from kallm.errors import WrongConfiguration
from kallm.model.sources import package_file


def test_no_person_talks_on_both_sides_of_the_split() -> None:
    source, _ = identify_dialogues("package:chitchat-dataset")
    dialogues = load_dialogues(source)
    stored = json.loads(package_file("chitchat-dataset", ".json")[0].read_text())

    def people(conversations) -> set[str]:
        return {message["sender"] for c in conversations for turn in stored[c.id]["messages"] for message in turn}

    assert not people(dialogues.train) & people(dialogues.heldout)
    assert (len(dialogues.train), len(dialogues.heldout)) == (1926, 156)
    assert len(stored) == 1926 + 156 + sum(dialogues.left_out.values())


def test_real_conversations_alternate_and_repeat_nobody() -> None:
    dialogues = load_dialogues("package:chitchat-dataset")
    told = [*dialogues.train, *dialogues.heldout]
    for conversation in told:
        roles = [message["role"] for message in conversation.messages]
        assert len(roles) >= 4
        assert roles[0] == "user"
        assert set(roles) == {"user", "assistant"}
    texts = [tuple(m["content"].lower() for m in c.messages) for c in told]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_folder_gives_its_rows_in_order(tmp_path: Path, suffix: str) -> None:
    import datasets

    rows = [
        {"messages": [{"role": "user", "content": f"n{n}"}, {"role": "assistant", "content": "ok"}]} for n in range(5)
    ]
    for split, part in (("train", rows[:3]), ("test", rows[3:])):
        data = datasets.Dataset.from_list(part)
        write = data.to_json if suffix == ".jsonl" else data.to_parquet
        write(tmp_path / f"{split}{suffix}")
    source, identity = identify_dialogues(str(tmp_path))
    dialogues = load_dialogues(source)
    assert [c.messages[0]["content"] for c in dialogues.train] == ["n0", "n1", "n2"]
    assert [c.messages[0]["content"] for c in dialogues.heldout] == ["n3", "n4"]
    (tmp_path / f"train{suffix}").write_bytes((tmp_path / f"test{suffix}").read_bytes())
    assert identify_dialogues(str(tmp_path))[1] != identity


def test_rows_without_messages_are_named(tmp_path: Path) -> None:
    for split in ("train", "heldout"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(WrongConfiguration, match=r"expected to have 'messages', but have \['text'\]"):
        load_dialogues(str(tmp_path))
