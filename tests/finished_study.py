"""What a study that ran to its end left, for the tests that read and damage it."""

from dataclasses import dataclass
from pathlib import Path

from kallm.results.record import StudyDocument, cell_key
from kallm.store.commit import commit
from kallm.store.local import FolderStore
from kallm.store.store import Store

CHECKPOINT = "00000002-1700000000-abcd"


@dataclass(frozen=True)
class Finished:
    """A study and the folder that it ran into."""

    document: StudyDocument
    folder: Path

    @property
    def store(self) -> Store:
        """The folder as a store."""
        return FolderStore(self.folder)

    @property
    def cell(self) -> str:
        """The id of a trained cell."""
        return self.document.cells[1].id

    def find(self, pattern: str) -> Path:
        """Return the only file of the trained cell that matches."""
        (path,) = self.folder.glob(f"cells/{self.cell}/{pattern}")
        return path

    def add_checkpoint(self, cell: str) -> str:
        """Commit something as a checkpoint of a cell; return its prefix."""
        prefix, file = cell_key(cell, "checkpoints", CHECKPOINT), self.folder.parent / "checkpoint"
        file.write_bytes(bytes(range(256)))
        commit(self.store, prefix, {"weights.safetensors": file}, {"step": 2})
        return prefix


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
