"""What an exported model's file has in place of pydantic and of surgery; the other definitions in it are KALLM's own.

It imports nothing of kallm: ``exported.py`` writes these definitions, as they stand here, into ``modeling_kallm.py``.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

__all__ = ["Field", "Spec", "WrongConfiguration", "put_ffns_"]


class WrongConfiguration(ValueError):  # noqa: N818 - named as in kallm
    """Sizes that do not fit."""


def Field(default: Any = None, **_: Any) -> Any:  # noqa: N802 - named as in pydantic
    """Return a field's default; what else is told of it was checked when the model was written."""
    return default


class Spec:
    """Plain data from ``config.json``: lists become tuples, and objects the specs that the field's annotation names."""

    model_fields: dict[str, str] = {}  # noqa: RUF012 - every subclass has its own

    def __init_subclass__(cls) -> None:
        """Collect the fields of the class and of those that it extends."""
        cls.model_fields = {**cls.model_fields, **inspect.get_annotations(cls)}

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, self._read(value, self.model_fields[name]))

    @classmethod
    def _read(cls, value: Any, annotation: str) -> Any:
        if isinstance(value, list):
            return tuple(cls._read(each, annotation) for each in value)
        if isinstance(value, dict):
            known = [globals().get(word) for word in re.findall(r"\w+", annotation)]
            kind = next(each for each in known if isinstance(each, type) and issubclass(each, Spec))
            return kind(**value)
        return value

    def model_copy(self, update: Mapping[str, Any]) -> Any:
        """Return the same data with some values changed."""
        return type(self)(**{**self.model_dump(), **update})

    def model_dump(self, *, exclude_none: bool = False) -> dict[str, Any]:
        """Return the values by name."""
        values = {name: getattr(self, name) for name in self.model_fields}
        return {name: value for name, value in values.items() if value is not None or not exclude_none}


def put_ffns_(
    model: nn.Module,
    described: list[dict[str, Any]],
    specs: Mapping[str, Any],
    ffns: Mapping[str, Any],
    put_ffn_: Callable[[nn.Module, str, nn.Module], None],
) -> None:
    """Put fresh modules where the config says; ``from_pretrained`` fills them."""
    for each in described:
        spec = specs[each["spec"]["ffn"]](**each["spec"])
        for name in each["names"]:
            put_ffn_(model, name, ffns[spec.ffn](spec, width=each["width"], pretrained_hidden=each["width"]))
