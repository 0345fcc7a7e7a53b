"""What the attempts at a cell left: when each began, how it ended, and its log; read from the store alone."""

from pydantic import AwareDatetime, BaseModel, ConfigDict

from kallm.errors import WrongConfiguration, did_you_mean
from kallm.progress import format_duration
from kallm.results.record import cell_key, read_note
from kallm.store.store import Store, is_key

__all__ = ["AttemptLog", "find_cell", "read_attempts", "render_attempt"]


class _Note(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Start(_Note):
    started: AwareDatetime
    host: str | None = None
    pid: int | None = None


class _End(_Note):
    ended: AwareDatetime
    exit: int
    reason: str | None = None


class AttemptLog(BaseModel):
    """One process at work on a cell; what it did not live to tell is None."""

    model_config = ConfigDict(frozen=True)

    nonce: str
    start: _Start | None
    end: _End | None
    log: str | None


def find_cell(store: Store, named: str) -> str:
    """Return the id of the cell that a text names: the id, or a beginning that no other cell has.

    Raises:
        WrongConfiguration: the store holds no such cell, or several.
    """
    known = sorted({entry.key.split("/")[1] for entry in store.list("cells/")})
    if not known:
        raise WrongConfiguration(f"{store.address} holds no cells: name the store that a study was run into (--store)")
    found = [cell for cell in known if cell.startswith(named)] if named else []
    if named in found or len(found) == 1:
        return named if named in found else found[0]
    if found:
        raise WrongConfiguration(f"'{named}' is the beginning of {len(found)} cells: {', '.join(found)}; write more")
    short = {cell.rpartition(".")[0] for cell in known}  # their hashes hide which name is near
    raise WrongConfiguration(f"unknown cell '{named}' in {store.address}: {did_you_mean(named, short)}")


def read_attempts(store: Store, cell: str) -> list[AttemptLog]:
    """Return a cell's attempts, oldest first; a note that cannot be read counts as absent.

    Args:
        store: where the cell is.
        cell: its id.
    """
    assert is_key(cell), f"no cell: {cell!r}"
    folder = cell_key(cell, "attempts/")
    nonces = {entry.key.removeprefix(folder).split(".")[0] for entry in store.list(folder)}
    found = [
        AttemptLog(
            nonce=nonce,
            start=read_note(store, f"{folder}{nonce}.start.json", _Start),
            end=read_note(store, f"{folder}{nonce}.end.json", _End),
            log=_decode(store.get(cell_key(cell, "logs", f"{nonce}.txt"))),
        )
        for nonce in nonces
    ]
    return sorted(found, key=lambda attempt: (_begin(attempt), attempt.nonce))


def render_attempt(attempt: AttemptLog, number: int, total: int) -> str:
    """Return a head line that tells beginning and end, then the lines of the log, indented."""
    parts = [f"attempt {number} of {total}"]
    if attempt.start is not None:
        parts.append(f"{attempt.start.started:%Y-%m-%d %H:%M:%S UTC}")
        parts += [f"on {attempt.start.host}"] if attempt.start.host else []
    if attempt.end is None:
        parts.append("no end: it runs, or was killed")
    else:
        took = f" after {format_duration(attempt.end.ended.timestamp() - _begin(attempt))}" if attempt.start else ""
        reason = f": {attempt.end.reason}" if attempt.end.reason else ""
        parts.append(f"exit {attempt.end.exit}{took}{reason}")
    log = attempt.log if attempt.log is not None else "no log: it is written at the end"
    return "\n".join([" · ".join(parts), *(f"    {line}" for line in log.splitlines())])


def _decode(data: bytes | None) -> str | None:
    return None if data is None else data.decode(errors="replace")


def _begin(attempt: AttemptLog) -> float:
    return attempt.start.started.timestamp() if attempt.start is not None else 0.0
