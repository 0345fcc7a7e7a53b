"""The store: one interface over a folder and an S3 bucket."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

__all__ = ["TEMPORARY", "Entry", "Store", "is_key"]

TEMPORARY = ".tmp-"
"""How the names of half-written files begin; no part of a key begins so."""


@dataclass(frozen=True)
class Entry:
    """One object of a listing; ``modified`` is in seconds since the epoch, by the store's own clock."""

    key: str
    size: int
    modified: float


@runtime_checkable
class Store(Protocol):
    """Seven methods; keys are relative, with ``/`` between parts, and no object's key is a folder in another's.

    Every method raises ``StorageUnavailable`` when the store does not answer, is full, or refuses access.
    """

    address: str

    def get(self, key: str) -> bytes | None:
        """Return an object's bytes, or None where there is none."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write an object, whole or not at all, replacing what was there."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write an object only if there is none; return whether this call's bytes are the ones that stand."""
        ...

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Yield the objects whose key starts with ``prefix``, sorted by key."""
        ...

    def upload(self, path: Path, key: str) -> None:
        """Write a file's bytes as an object, whole or not at all."""
        ...

    def download(self, key: str, path: Path) -> bool:
        """Write an object's bytes to a file; return False where there is no such object."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens where there is none."""
        ...


def is_key(text: str) -> bool:
    """Say whether a text names an object: relative, parts joined by ``/``, none of them empty, ``.`` or ``..``."""
    if "\\" in text or "\0" in text:
        return False
    return all(part not in ("", ".", "..") and not part.startswith(TEMPORARY) for part in text.split("/"))
