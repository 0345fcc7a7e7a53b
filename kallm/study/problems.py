"""What is wrong with a study file, in sentences: every problem, one line each."""

import math
import typing
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kallm.errors import WrongConfiguration, did_you_mean

__all__ = ["check_plain", "describe", "in_one_line"]

_DEEPEST, _MOST_VALUES, _LARGEST = 20, 20_000, 2**63 - 1
_LONGEST_LINE = 600


def check_plain(value: Any, place: str) -> None:
    """Check that a study as read from YAML is a tree of moderate size with text as keys and finite numbers.

    YAML's aliases make loops, and trees far larger than their text; what follows may look at every value.

    Raises:
        WrongConfiguration: names the field.
    """
    left: list[tuple[tuple[str, ...], Any]] = [((), value)]
    for _ in range(_MOST_VALUES):
        if not left:
            return
        path, item = left.pop()
        wrong = _why_not_plain(path, item)
        if wrong:
            raise WrongConfiguration(in_one_line(": ".join(filter(None, (place, ".".join(path), wrong)))))
        if isinstance(item, dict):
            left += [((*path, key), inner) for key, inner in item.items()]
        elif isinstance(item, list):
            left += [((*path, str(index)), inner) for index, inner in enumerate(item)]
    raise WrongConfiguration(f"{place} holds more than {_MOST_VALUES:,} values; aliases count each time they stand")


def _why_not_plain(path: tuple[str, ...], item: Any) -> str:
    if len(path) > _DEEPEST:
        return f"nested deeper than {_DEEPEST} levels"
    if isinstance(item, int) and abs(item) > _LARGEST:
        return f"must be a number of at most 64 bits, but has {item.bit_length()}"
    if isinstance(item, float) and not math.isfinite(item):
        return f"must be a finite number, but is {item}"
    keys = [key for key in item if not isinstance(key, str)] if isinstance(item, dict) else []
    return f"the key {keys[0]!r:.60} must be text; put it into quotes" if keys else ""


def in_one_line(sentence: str) -> str:
    """Return a sentence with what cannot be printed escaped, and the middle of a very long one left out."""
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in sentence)
    if len(line) <= _LONGEST_LINE:
        return line
    return f"{line[: _LONGEST_LINE // 2]} … {line[-_LONGEST_LINE // 2 :]}"


def describe(error: ValidationError, model: type[BaseModel], place: str) -> str:
    """Return one line per problem, each naming the field as the user wrote it."""
    return "\n".join(in_one_line(f"{place}: {_sentence(problem, model)}") for problem in error.errors())


def _sentence(problem: ErrorDetails, model: type[BaseModel]) -> str:
    path = _as_written(problem["loc"])
    given = f", but got {problem['input']!r:.60}"
    error = problem.get("ctx", {}).get("error")
    if isinstance(error, ValidationError):
        inner = [typing.cast(ErrorDetails, {**p, "loc": (*problem["loc"], *p["loc"])}) for p in error.errors()]
        return "; ".join(_sentence(each, model) for each in inner)
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1], model)
        where = f" in '{'.'.join(path[:-1])}'" if path[:-1] else ""
        return f"unknown key '{path[-1]}'{where}: {did_you_mean(path[-1], known)}"
    if problem["type"] == "missing":
        return f"'{'.'.join(path)}' is missing"
    if problem["type"] == "value_error":
        return ": ".join(filter(None, (".".join(path), str(error))))
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{'.'.join(path)}: {message}{given}"


def _as_written(location: tuple[int | str, ...]) -> list[str]:
    """Drop what the user did not write: the wrapper around a variant's spec, and the union's tag after it."""
    if location[:1] == ("variants",) and location[2:3] == ("spec",):
        location = location[:2] + location[4:]
    return [str(part) for part in location]


def _known_keys(location: tuple[int | str, ...], model: Any) -> list[str]:
    """Return the fields of the model at a location, walking annotations the way pydantic did."""
    kinds = [model]
    for part in location:
        kinds = [found for kind in kinds for found in _step(kind, part)]
    keys = {name for kind in kinds for member in _members(kind) for name in member.model_fields}
    return sorted(keys) or ["nothing"]


def _step(kind: Any, part: int | str) -> list[Any]:
    found: list[Any] = []
    for member in _members(kind):
        if part in member.model_fields:
            found.append(member.model_fields[str(part)].annotation)
        elif any(part == _tag(field.annotation) for field in member.model_fields.values()):
            found.append(member)
    origin = typing.get_origin(kind)
    if origin in (dict, tuple, list):
        found += [argument for argument in typing.get_args(kind) if argument is not Ellipsis]
    return found


def _members(kind: Any) -> list[type[BaseModel]]:
    """Return the pydantic models that an annotation may stand for."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (dict, tuple, list):
        return []
    return [member for argument in arguments for member in _members(argument)]


def _tag(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Literal else None
