"""From a reply to an answer, and whether it is right.

``kallm`` reads an answer out of the reply by the form that the task asks for. ``published`` is the rule behind the
published figures: reply and answer are lower-cased, stripped of punctuation and articles, and compared as wholes. Under
it "(A)" becomes nothing at all, so that an empty reply is right wherever the answer is "(A)".
"""

import re
import string
from collections.abc import Callable
from typing import Literal

from kallm.data.bbh import BBHItem, Form, option_texts

__all__ = ["Normaliser", "Status", "is_correct", "parse_answer"]

Normaliser = Literal["kallm", "published"]
Status = Literal["parsed", "unparsed", "empty"]

_STATEMENT = re.compile(
    r"\b(?:answer|option|choice)(?:\s+(?:is|would be|must be|should be)\b|\s*[:=])\s*:?\s*", re.IGNORECASE
)
_QUOTES = "'\"“”‘’"
_EMPHASIS = str.maketrans("", "", "*`")
_OPTION_PATTERNS = (
    re.compile(r"^([A-Z])(?=[.):,;]|\s*$|\s*\n)|^([a-z])(?=[.):]|\s*$)|^([B-HJ-Z])\b(?!')"),
    re.compile(r"(?<!\w)\(\s*([A-Za-z])\s*\)"),
    re.compile(r"\b(?:option|choice|letter)\s+([A-Za-z])\b", re.IGNORECASE),
)
_PRONOUN_LIKE = re.compile(r"([AI])\b")
_NUMBER = re.compile(r"(?<![\w.])([-−]|minus\s+|negative\s+)?(\d[\d,]*(?:\.\d+)?)(?!\w)", re.IGNORECASE)
_BRACKETS = re.compile(r"[()\[\]{}<>](?:[\s,]*[()\[\]{}<>])*")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_ROUND = "twenty thirty forty fifty sixty seventy eighty ninety"
_UNITS, _TENS = _SMALL.split(), _ROUND.split()
_SPELLED = {word: value for value, word in enumerate(_UNITS)}
_SPELLED |= {word: 20 + 10 * index for index, word in enumerate(_TENS)}
_SPELLED |= {f"{ten}-{unit}": _SPELLED[ten] + _SPELLED[unit] for ten in _TENS for unit in _UNITS[1:10]}
_SPELLED_NUMBER = re.compile(
    rf"\b(minus\s+|negative\s+)?({'|'.join(sorted(_SPELLED, key=len, reverse=True))})\b", re.IGNORECASE
)


def parse_answer(reply: str, item: BBHItem, *, normaliser: Normaliser = "kallm") -> tuple[str | None, Status]:
    """Return the answer that a reply gives, in the official answers' spelling, and how the reading went.

    Args:
        reply: what the model wrote.
        item: the question it was asked.
        normaliser: ``kallm`` looks for an answer of the item's form; ``published`` takes the whole reply, normalised.
    """
    if not reply.strip():
        return ("" if normaliser == "published" else None), "empty"
    if normaliser == "published":
        return _normalise(reply), "parsed"
    found = _PARSERS[item.form](reply, item)
    return found, "unparsed" if found is None else "parsed"


def is_correct(parsed: str | None, item: BBHItem, *, normaliser: Normaliser = "kallm") -> bool:
    """Return whether a parsed answer is the official one; an official answer outside the options has no right reply."""
    if parsed is None or not item.answerable:
        return False
    return parsed == (_normalise(item.answer) if normaliser == "published" else item.answer)


def _normalise(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _passages(reply: str) -> list[str]:
    """Return where to look, best first: what follows "the answer is", then the whole reply."""
    statement = _STATEMENT.search(reply)
    return [*([reply[statement.end() :]] if statement else []), reply]


def _parse_option(reply: str, item: BBHItem) -> str | None:
    """Return the option of a leading letter, else of the first "(X)", "option X", or option's text."""
    passages = [passage.translate(_EMPHASIS).strip(_QUOTES + string.whitespace) for passage in _passages(reply)]
    for passage in passages:
        letters = (match[match.lastindex or 0] for pattern in _OPTION_PATTERNS for match in pattern.finditer(passage))
        labels = (f"({letter.upper()})" for letter in letters)
        found = next((label for label in labels if label in item.options), None) or _first_option_text(passage, item)
        if found:
            return found
        pronoun_like = _PRONOUN_LIKE.match(passage) if passage is not passages[-1] else None
        if pronoun_like and f"({pronoun_like[1]})" in item.options:
            return f"({pronoun_like[1]})"
    return None


def _first_option_text(text: str, item: BBHItem) -> str | None:
    """Return the option whose text stands first in the reply, the longest of those that start there."""
    found = []
    for label, wording in option_texts(item.question).items():
        match = re.search(rf"(?<!\w){re.escape(wording.rstrip('.'))}(?!\w)", text, re.IGNORECASE) if wording else None
        if match:
            found.append((match.start(), -len(wording), label))
    return min(found)[2] if found else None


def _parse_word(reply: str, item: BBHItem) -> str | None:
    """Return the first of the two words; "not valid" is the other one."""
    spelling = {option.lower(): option for option in item.options}
    pattern = re.compile(rf"\b(not\s+(?:deductively\s+|logically\s+)?)?({'|'.join(spelling)})\b", re.IGNORECASE)
    for passage in _passages(reply):
        match = pattern.search(passage)
        if match:
            word = spelling[match[2].lower()]
            return next(option for option in item.options if option != word) if match[1] else word
    return None


def _parse_number(reply: str, item: BBHItem) -> str | None:
    """Return the first number after "the answer is", else after the last "=", else of all; digits before words."""
    *stated, whole = _passages(reply)
    equals = [whole.rpartition("=")[2]] if "=" in whole else []
    for passage in (*stated, *equals, whole):
        if match := _NUMBER.search(passage):
            return _digits(match)
        if match := _SPELLED_NUMBER.search(passage):
            return _spelled(match)
    return None


def _digits(match: re.Match[str]) -> str:
    whole, _, decimals = match[2].replace(",", "").partition(".")
    value = str(int(whole)) + (f".{decimals.rstrip('0')}" if decimals.rstrip("0") else "")
    return f"-{value}" if match[1] and value != "0" else value


def _spelled(match: re.Match[str]) -> str:
    value = _SPELLED[match[2].lower()]
    return str(-value if match[1] else value)


def _parse_brackets(reply: str, item: BBHItem) -> str | None:
    """Return the longest run of brackets, without the sequence to complete where the reply repeats it."""
    given = re.sub(r"\s", "", item.question.rpartition("Input:")[2])
    for passage in _passages(reply):
        runs = [re.sub(r"[\s,]", "", run) for run in _BRACKETS.findall(passage)]
        if runs:
            longest = max(runs, key=len).removeprefix(given)
            return " ".join(longest) or None
    return None


def _parse_words(reply: str, item: BBHItem) -> str | None:
    """Return the last of the listed words that the reply holds, as many as were listed."""
    listed = item.question.rpartition("List:")[2].lower().split()
    known = set(listed)
    words = (word.strip(string.punctuation + _QUOTES) for word in re.split(r"[\s,;]+", reply.lower()))
    found = [word for word in words if word in known]
    return " ".join(found[-len(listed) :]) or None


_PARSERS: dict[Form, Callable[[str, BBHItem], str | None]] = {
    "option": _parse_option,
    "word": _parse_word,
    "number": _parse_number,
    "brackets": _parse_brackets,
    "words": _parse_words,
}
