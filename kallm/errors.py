"""Exit codes, and the errors that carry them.

KallmError
├── WrongConfiguration   2   the study, an option or a source is wrong; nothing was computed
├── DataMismatch         3   stored bytes do not match their hash, or data is not what the study names
├── Diverged             4   training left the numbers
├── CellsMissing         5   the table is written, but cells are missing
├── OutOfMemory          6   names the setting to lower
├── GaveUp               7   N attempts in a row without progress
├── Preempted           75   stopped by a signal, state saved
└── StorageUnavailable  76   the store does not answer, is full, or refuses us
"""

import difflib
from collections.abc import Iterable
from enum import IntEnum

__all__ = [
    "CellsMissing",
    "DataMismatch",
    "Diverged",
    "ExitCode",
    "GaveUp",
    "KallmError",
    "OutOfMemory",
    "Preempted",
    "StorageUnavailable",
    "WrongConfiguration",
    "did_you_mean",
]


class ExitCode(IntEnum):
    """The one table of exit codes; the workflow and the Jobs policy read the same numbers."""

    DONE = 0
    WRONG_CONFIGURATION = 2
    DATA_MISMATCH = 3
    DIVERGED = 4
    CELLS_MISSING = 5
    OUT_OF_MEMORY = 6
    GAVE_UP = 7
    INTERNAL = 70
    PREEMPTED = 75
    STORAGE_UNAVAILABLE = 76


class KallmError(Exception):
    """An error with one clear sentence for the user and an exit code."""

    code = ExitCode.INTERNAL


class WrongConfiguration(KallmError):  # noqa: N818 - the names say what happened, as the exit codes do
    code = ExitCode.WRONG_CONFIGURATION


class DataMismatch(KallmError):  # noqa: N818
    code = ExitCode.DATA_MISMATCH


class Diverged(KallmError):  # noqa: N818
    code = ExitCode.DIVERGED


class CellsMissing(KallmError):  # noqa: N818
    code = ExitCode.CELLS_MISSING


class OutOfMemory(KallmError):  # noqa: N818
    code = ExitCode.OUT_OF_MEMORY


class GaveUp(KallmError):  # noqa: N818
    code = ExitCode.GAVE_UP


class Preempted(KallmError):  # noqa: N818
    code = ExitCode.PREEMPTED


class StorageUnavailable(KallmError):  # noqa: N818
    code = ExitCode.STORAGE_UNAVAILABLE


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``known are a, b, c. Did you mean 'b'?`` for the end of a message."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"known are {', '.join(names)}." + (f" Did you mean '{near[0]}'?" if near else "")
