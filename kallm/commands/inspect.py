"""The command that draws what one cell learned: inspect."""

from pathlib import Path
from typing import Annotated

import typer

from kallm.errors import WrongConfiguration
from kallm.options import DEFAULT_STORE, StoreOption, find_plan_of, find_studies
from kallm.results.logs import find_cell
from kallm.results.record import EvaluationRecord, Items, evaluation_key, read_items, read_record
from kallm.store.opening import open_store
from kallm.store.store import Store

__all__ = ["attach_inspect"]

_SUFFIXES = (".html", ".png", ".svg")


def attach_inspect(app: typer.Typer) -> None:
    """Add this command to the program."""
    app.command()(inspect)


def inspect(
    cell: Annotated[str, typer.Argument(metavar="CELL", help="a cell's id, or a beginning that no other cell has")],
    store: StoreOption = DEFAULT_STORE,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="ends in .html, .svg or .png; default: CELL.html here")
    ] = None,
) -> None:
    """Draw the strongest functions that a cell's KAN layers learned, over the histograms of their inputs.

    What the suite 'edges' left in the store is drawn; where it has not been run, the cell's weights are loaded.

        kallm inspect kan.seed-0

        kallm inspect kan.seed-0 --out functions.svg --store s3://my-bucket/kallm
    """
    if out is not None and out.suffix not in _SUFFIXES:
        raise WrongConfiguration(f"--out must end in {', '.join(_SUFFIXES)}, but it is '{out}': name another file")
    opened = open_store(store)
    found = find_cell(opened, cell)
    items = _read_layers(opened, found)
    if items is None:
        items = _describe(opened, found)
    if not items:
        raise WrongConfiguration(f"{found} has no KAN layers, so there are no functions to draw: name a cell of a KAN")
    from kallm.report.inspection import FORMATS

    path = Path(f"{found}.html") if out is None else out
    path.write_bytes(FORMATS[path.suffix](".".join(found.split(".")[:-1]), items))
    print(f"the functions of {found} are in {path}")


def _read_layers(store: Store, cell: str) -> Items | None:
    """Return what the suite left of a cell, whichever study asked for it; None where none has run it."""
    for document in find_studies(store, cell):
        for suite in (suite for suite in document.suites if suite.name == "edges"):
            record = read_record(store, EvaluationRecord, evaluation_key(cell, suite.id))
            if record is not None:
                return read_items(store, record)
    return None


def _describe(store: Store, cell: str) -> Items:
    """Load a cell's weights and describe its layers, as the first study that names it says."""
    plan = find_plan_of(store, cell)
    from kallm.run.inspection import describe_cell

    return describe_cell(plan, next(each for each in plan.cells if each.id == cell), store)
