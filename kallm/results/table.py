"""The table of a study: computed from the records alone, so that equal records give equal bytes."""

from collections.abc import Iterable

from kallm.results.alone import describe_alone, describe_choices, make_hardware
from kallm.results.contrasts import make_contrasts
from kallm.results.evidence import Evidence, gather_evidence, name_suite
from kallm.results.record import CellEntry, EvaluationRecord, StudyDocument, cell_key, evaluation_key, study_key
from kallm.results.render import render_csv, render_markdown
from kallm.results.rows import make_columns, make_references, make_rows
from kallm.results.schema import Cell, CellState, Contrast, Row, Table
from kallm.results.status import CellStatus, find_latest_time, read_status
from kallm.store.store import Store

__all__ = ["Table", "build_table", "is_complete", "put_changed", "write_table"]


def build_table(store: Store, document: StudyDocument) -> Table:
    """Compute the table of a study from what the store holds.

    Whether an unfinished cell is running is judged by the newest time that any cell wrote down, never by the clock of
    the reader, so the table is a function of the records.

    Raises:
        DataMismatch: a record or its items are not what they should be, or two cells answered different questions.
    """
    evidence = gather_evidence(store, document)
    statuses = read_status(store, document, find_latest_time(store, document))
    columns = make_columns(evidence)
    cells = [_make_cell(evidence, entry, status) for entry, status in zip(document.cells, statuses, strict=True)]
    rows = make_rows(evidence, columns, done={cell.id for cell in cells if cell.state == "done"})
    contrasts = make_contrasts(evidence)
    hardware = make_hardware(evidence)
    return Table(
        name=document.name,
        hash=document.hash,
        headline=_make_headline(cells, contrasts),
        columns=columns,
        hardware=hardware,
        rows=rows,
        references=make_references(evidence),
        contrasts=contrasts,
        cells=cells,
        notes=[
            *document.notes,
            *_make_notes(rows, cells, contrasts),
            *describe_choices(rows),
            *describe_alone(document.name, hardware, rows),
        ],
    )


def is_complete(table: Table) -> bool:
    """Return whether every cell has come to its end; a diverged cell has, for its divergence is a record."""
    return all(cell.state in ("done", "diverged") for cell in table.cells)


def write_table(store: Store, document: StudyDocument, table: Table) -> list[str]:
    """Write ``table.json``, ``table.csv`` and ``table.md`` beside ``study.json``; return the keys that changed."""
    objects = {
        "table.json": table.to_bytes(),
        "table.csv": render_csv(table).encode(),
        "table.md": render_markdown(table).encode(),
    }
    keys = {study_key(document.name, document.hash, name): data for name, data in objects.items()}
    return [key for key, data in keys.items() if put_changed(store, key, data)]


def put_changed(store: Store, key: str, data: bytes) -> bool:
    """Put an object only if its bytes differ from what is there; return whether it did."""
    if store.get(key) == data:
        return False
    store.put(key, data)
    return True


def _make_cell(evidence: Evidence, entry: CellEntry, status: CellStatus) -> Cell:
    training = evidence.trainings.get(entry.id)
    receipt = evidence.find_receipt(entry.id)
    code, hardware = receipt.get("code") or {}, receipt.get("hardware") or {}
    keys = [cell_key(entry.id, "trained.json")]
    keys += [evaluation_key(entry.id, suite.id) for suite in evidence.document.suites]
    state: CellState = "trained" if status.state == "missing" and status.trained and entry.trained else status.state
    return Cell(
        id=entry.id,
        variant=entry.variant,
        seed=entry.seed,
        state=state,
        detail=status.detail,
        scores=_find_scores(evidence, entry),
        seconds=training.seconds if training else None,
        tokens_per_s=training.tokens_per_s if training else None,
        peak_bytes=training.peak_bytes if training else None,
        shared=training.shared if training else False,
        attempts=training.attempts if training else None,
        records={key: evidence.digests[key] for key in keys if key in evidence.digests},
        weights=_find_weights(evidence, entry),
        commit=code.get("commit"),
        dirty=code.get("dirty"),
        image=receipt.get("image"),
        device=hardware.get("device"),
        processor=hardware.get("processor"),
        precision=receipt.get("precision"),
    )


def _find_evaluations(evidence: Evidence, entry: CellEntry) -> Iterable[tuple[str, EvaluationRecord]]:
    for suite in evidence.document.suites:
        if (entry.id, suite.id) in evidence.evaluations:
            yield name_suite(evidence.document, suite), evidence.evaluations[entry.id, suite.id]


def _find_scores(evidence: Evidence, entry: CellEntry) -> dict[str, float]:
    found = _find_evaluations(evidence, entry)
    return {f"{suite}.{name}": score.value for suite, record in found for name, score in sorted(record.scores.items())}


def _find_weights(evidence: Evidence, entry: CellEntry) -> str | None:
    return next((record.weights for _, record in _find_evaluations(evidence, entry)), None)


def _make_headline(cells: list[Cell], contrasts: list[Contrast]) -> str:
    """Say how much of the study stands, and the first verdict that was declared."""
    done = sum(cell.state == "done" for cell in cells)
    counted = "" if done == len(cells) else f" ({done} of {len(cells)} cells done)"
    first = next((contrast for contrast in contrasts if contrast.role == "declared"), None)
    if first is None:
        return f"{done} of {len(cells)} cells done; no contrast was declared"
    return f"{first.text}{counted}"


def _make_notes(rows: list[Row], cells: list[Cell], contrasts: list[Contrast]) -> list[str]:
    notes = [
        "± is half of the 95 % interval over seeds (Student's t); contrasts pair equal seeds and equal items, and "
        "count the variance of both.",
    ]
    if any(contrast.role != "declared" for contrast in contrasts):
        notes.append("Secondary and exploratory contrasts are judged by Holm's adjusted p; their ± is not adjusted.")
    if any(row.trained and row.seeds_done == 1 for row in rows):
        notes.append("A variant with one seed done has no interval, and its contrasts distinguish nothing.")
    open_cells = [cell for cell in cells if cell.state not in ("done", "diverged")]
    if open_cells:
        notes.append(f"Not final: {len(open_cells)} of {len(cells)} cells are not done.")
    notes += [
        f"{_name_cell(cell)} diverged: {cell.detail}; means are over the other seeds, which flatters the variant."
        for cell in cells
        if cell.state == "diverged"
    ]
    notes += [f"{_name_cell(cell)} failed: {cell.detail}." for cell in cells if cell.state == "failed"]
    dirty = sorted({cell.commit or "no commit" for cell in cells if cell.dirty})
    if dirty:
        notes.append(f"Some cells ran code with uncommitted changes after {', '.join(c[:12] for c in dirty)}.")
    flags = sorted({flag for contrast in contrasts if contrast.role == "declared" for flag in contrast.flags})
    return notes + [f"Between the sides of a declared contrast, {flag}." for flag in flags if "differs" in flag]


def _name_cell(cell: Cell) -> str:
    return cell.variant if cell.seed is None else f"{cell.variant}, seed {cell.seed},"
