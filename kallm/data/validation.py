"""A validation split of the training conversations, for what is chosen before training (a learning rate)."""

import hashlib
import json
from collections.abc import Sequence

from kallm.data.dialogues import CHITCHAT, Conversation
from kallm.errors import WrongConfiguration
from kallm.model.sources import package_file

__all__ = ["split_validation"]

_SHARE = 0.1
"""Of different conversations, where their people are not known."""
_PEOPLE_SHARE = 0.3
"""Of people: of the conversations between two of them, a tenth."""


def split_validation(
    source: str, conversations: Sequence[Conversation]
) -> tuple[list[Conversation], list[Conversation]]:
    """Split training conversations into some to try on and some to judge by; no person talks on both sides.

    Where people are not known, equal conversations stay on one side. Depends on nothing but names and contents.

    Args:
        source: where the conversations come from, its revision resolved.
        conversations: those that are trained on; none that is held out for the results.

    Returns:
        Those to try on and those to judge by, in the given order; what lies between the two is in neither.

    Raises:
        WrongConfiguration: a side would be empty.
    """
    people = _find_people(source, conversations)
    share = _PEOPLE_SHARE if source == f"package:{CHITCHAT}" else _SHARE
    ranked = sorted({person for group in people for person in group}, key=_rank)
    judging = set(ranked[: max(1, round(share * len(ranked)))])
    pairs = list(zip(conversations, people, strict=True))
    tried = [conversation for conversation, group in pairs if not judging & group]
    judged = [conversation for conversation, group in pairs if group <= judging]
    if not tried or not judged:
        raise WrongConfiguration(
            f"{len(conversations)} training conversations are too few for a validation split, which a list of learning "
            "rates is judged by: name one rate in train.lr, or other dialogues"
        )
    return tried, judged


def _find_people(source: str, conversations: Sequence[Conversation]) -> list[frozenset[str]]:
    if source == f"package:{CHITCHAT}":
        stored = json.loads(package_file(CHITCHAT, ".json")[0].read_text())
        return [
            frozenset(turn[0]["sender"] for turn in stored[conversation.id]["messages"] if turn)
            for conversation in conversations
        ]
    return [frozenset([json.dumps(conversation.messages, sort_keys=True)]) for conversation in conversations]


def _rank(person: str) -> bytes:
    return hashlib.sha256(f"validation {person}".encode()).digest()
