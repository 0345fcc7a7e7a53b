"""Sealed JSON: small objects that carry the SHA-256 of their own content, so that no flipped bit is read as a value."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from kallm.errors import DataMismatch

__all__ = ["seal", "short_hash", "unseal"]

_SEAL = "sha256"
_SHORT = 12


def short_hash(value: Any) -> str:
    """Return the first twelve digits of a JSON value's SHA-256, as they stand in the names of cells and studies."""
    return _hash(value)[:_SHORT]


def seal(value: Mapping[str, Any]) -> bytes:
    """Return canonical JSON (sorted keys, two spaces, one final newline) with the hash of the rest as ``sha256``."""
    assert _SEAL not in value
    return (json.dumps({**value, _SEAL: _hash(value)}, indent=2, sort_keys=True) + "\n").encode()


def unseal(data: bytes, name: str) -> dict[str, Any]:
    """Return what was sealed.

    Raises:
        DataMismatch: the bytes are not exactly what ``seal`` returned; the message begins with ``name``.
    """
    try:
        value = json.loads(data)
    except ValueError as error:  # what is no UTF-8 is no JSON either
        raise DataMismatch(f"{name} is damaged: it is no JSON ({error})") from error
    except RecursionError as error:
        raise DataMismatch(f"{name} is damaged: it is nested too deep") from error
    if not isinstance(value, dict) or _SEAL not in value:
        raise DataMismatch(f"{name} is damaged: it carries no hash of its own")
    del value[_SEAL]
    if seal(value) != data:
        raise DataMismatch(f"{name} is damaged: its content is not the one that its own hash names")
    return value


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
