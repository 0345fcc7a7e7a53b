"""What is wrong with a study file, in sentences: every problem, one line each."""

import typing
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kallm.errors import did_you_mean

__all__ = ["describe"]


def describe(error: ValidationError, model: type[BaseModel], place: str) -> str:
    """Return one line per problem, each naming the field as the user wrote it."""
    return "\n".join(f"{place}: {_sentence(problem, model)}" for problem in error.errors())


def _sentence(problem: ErrorDetails, model: type[BaseModel]) -> str:
    path = _as_written(problem["loc"])
    given = f", but got {problem['input']!r:.60}"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(problem["loc"][:-1], model)
        where = f" in '{'.'.join(path[:-1])}'" if path[:-1] else ""
        return f"unknown key '{path[-1]}'{where}: {did_you_mean(path[-1], known)}"
    if problem["type"] == "missing":
        return f"'{'.'.join(path)}' is missing"
    if problem["type"] == "value_error":
        return ": ".join(filter(None, (".".join(path), str(problem["ctx"]["error"]))))
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{'.'.join(path)}: {message}{given}"


def _as_written(location: tuple[int | str, ...]) -> list[str]:
    """Drop what the user did not write: the wrapper around a variant's spec, and the union's tag after it."""
    written: list[str] = []
    parts = iter(location)
    for part in parts:
        if part == "spec":
            next(parts, None)
        else:
            written.append(str(part))
    return written


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
