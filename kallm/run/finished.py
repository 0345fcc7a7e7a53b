"""Whether a cell has anything left to do; read from the store alone, without torch."""

from kallm.results.record import TrainingRecord, cell_key, evaluation_key, read_record
from kallm.store.store import Store
from kallm.study.plan import Cell

__all__ = ["is_finished"]


def is_finished(store: Store, cell: Cell, suite_ids: list[str]) -> bool:
    """Return whether a cell is trained (or has diverged) and evaluated under every suite."""
    if cell.variant.trained:
        record = read_record(store, TrainingRecord, cell_key(cell.id, "trained.json"))
        if record is None or record.outcome == "diverged":
            return record is not None
    return all(store.get(evaluation_key(cell.id, suite)) is not None for suite in suite_ids)
