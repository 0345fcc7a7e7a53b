"""Conversations to train on and to hold out: ``package:chitchat-dataset``, ``hub:ORG/NAME[@revision]`` or a folder.

A folder holds ``train`` and ``heldout`` (or ``test``) files, ``.jsonl`` or ``.parquet``, with a column ``messages``:
a list of ``{"role": …, "content": …}``, as chat data on the hub has it.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kallm.errors import WrongConfiguration
from kallm.model.cachefolder import snapshot_folder
from kallm.model.sources import package_file, reach_hub

__all__ = ["Conversation", "Dialogues", "identify_dialogues", "load_dialogues"]

CHITCHAT = "chitchat-dataset"
MIN_TURNS = 4
HELDOUT_SENDERS = 0.3
_FORMATS = (".jsonl", ".parquet")

Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """One conversation; messages are ``{"role", "content"}`` as chat templates take them."""

    id: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Dialogues:
    """Conversations in the source's order, to train on and held out, and how many were left out and why."""

    train: list[Conversation]
    heldout: list[Conversation]
    left_out: dict[str, int]


def identify_dialogues(source: str) -> tuple[str, str]:
    """Return the source with its revision resolved, and a hash (or commit) of its content; loads nothing.

    Raises:
        WrongConfiguration: there is no such source, or the hub is out of reach.
    """
    kind, _, name = source.partition(":")
    if kind == "package":
        if name != CHITCHAT:
            raise WrongConfiguration(f"no dialogues are known in package '{name}': package:{CHITCHAT} has some")
        return source, package_file(name, ".json")[1]
    if kind == "hub":
        revision = name.partition("@")[2]
        snapshot = snapshot_folder(revision)
        if snapshot is not None and snapshot.exists():
            return source, revision
        found = reach_hub(name, "dataset")
        return f"hub:{name.partition('@')[0]}@{found.sha}", found.sha
    files = _files(Path(source))
    digest = hashlib.sha256()
    for split in sorted(files):
        digest.update(files[split].read_bytes())
    return str(Path(source).resolve()), digest.hexdigest()


def load_dialogues(source: str) -> Dialogues:
    """Load and split the conversations of a resolved source.

    Raises:
        WrongConfiguration: it has no column ``messages``, or no conversations.
    """
    kind, _, name = source.partition(":")
    if kind == "package":
        return _load_chitchat(package_file(name, ".json")[0])
    import datasets

    datasets.disable_progress_bars()
    if kind == "hub":
        repository, _, revision = name.partition("@")
        snapshot = snapshot_folder(revision)
        if snapshot is not None and snapshot.exists():
            found = datasets.load_dataset(str(snapshot))
        else:
            found = datasets.load_dataset(repository, revision=revision)
        splits = {"train": found["train"], "heldout": found["test"] if "test" in found else found["train"][:0]}
    else:
        files = _files(Path(source))
        reader = "json" if files["train"].suffix == ".jsonl" else "parquet"
        splits = dict(datasets.load_dataset(reader, data_files={k: str(v) for k, v in files.items()}))
    return Dialogues(
        train=_conversations(splits["train"], source, "train"),
        heldout=_conversations(splits["heldout"], source, "heldout"),
        left_out={},
    )


def _conversations(rows: Iterable[dict[str, Any]], source: str, split: str) -> list[Conversation]:
    found = []
    for number, row in enumerate(rows):
        if "messages" not in row:
            raise WrongConfiguration(f"dialogues '{source}' were expected to have 'messages', but have {sorted(row)}")
        messages = tuple({"role": m["role"], "content": m["content"]} for m in row["messages"])
        found.append(Conversation(f"{split}-{number}", messages))
    if not found:
        raise WrongConfiguration(f"dialogues '{source}' have no {split} conversations")
    return found


def _files(folder: Path) -> dict[str, Path]:
    """Return a folder's files by split."""
    found = {}
    for split, names in (("train", ("train",)), ("heldout", ("heldout", "test"))):
        paths = [folder / f"{name}{suffix}" for name in names for suffix in _FORMATS]
        present = [path for path in paths if path.exists()]
        if not present:
            raise WrongConfiguration(
                f"'{folder}' has no dialogues: expected hub:ORG/NAME, package:{CHITCHAT}, or a folder with "
                f"train and heldout as .jsonl or .parquet, but {names[0]} is missing"
            )
        found[split] = present[0]
    return found


def _load_chitchat(path: Path) -> Dialogues:
    """Load human conversations, split so that no person talks on both sides of the split.

    Conversations between a held-out and another person belong to neither side.
    """
    found = Dialogues([], [], {"too short or alone": 0, "said before": 0, "across the split": 0})
    said: set[str] = set()
    for name, stored in json.loads(path.read_text()).items():
        turns = [(turn[0]["sender"], "\n".join(m["text"] for m in turn)) for turn in stored["messages"] if turn]
        people = sorted({sender for sender, _ in turns})
        if len(turns) < MIN_TURNS or len(people) != 2:
            found.left_out["too short or alone"] += 1
            continue
        fingerprint = " ".join(text.lower() for _, text in turns)
        if fingerprint in said:
            found.left_out["said before"] += 1
            continue
        said.add(fingerprint)
        first = turns[0][0]
        roles = {sender: "user" if sender == first else "assistant" for sender in people}
        conversation = Conversation(name, tuple({"role": roles[s], "content": text} for s, text in turns))
        apart = {_is_held_out(sender) for sender in people}
        if len(apart) == 2:
            found.left_out["across the split"] += 1
        else:
            (found.heldout if apart == {True} else found.train).append(conversation)
    return found


def _is_held_out(sender: str) -> bool:
    """Decide by the person's hash, so that the split depends on nothing else."""
    return int.from_bytes(hashlib.sha256(sender.encode()).digest()[:8], "big") < HELDOUT_SENDERS * 2**64
