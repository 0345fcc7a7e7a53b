"""The command that says what a study would train: plan."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kallm.options import DEFAULT_STORE, CellsOption, SetOption, ShareOption, StoreOption, StudyArgument
from kallm.results.record import record_study
from kallm.run.selection import group_cells, parse_share, select_cells
from kallm.run.snapshots import put_snapshots
from kallm.store.opening import open_store
from kallm.study.plan import estimate_cost, make_plan
from kallm.study.study import read_study

__all__ = ["attach_plan"]


def attach_plan(app: typer.Typer) -> None:
    """Add this command to the program."""
    app.command()(plan)


def plan(
    study: StudyArgument,
    store: StoreOption = DEFAULT_STORE,
    set_: SetOption = None,
    cells: CellsOption = "all",
    share: ShareOption = "cell",
    pods: Annotated[
        Path | None,
        typer.Option(
            help="write there which pod runs which cells, as JSON; the study, and what it takes from the hub, go to "
            "the store, where the pods find them"
        ),
    ] = None,
    tflops: Annotated[float, typer.Option(min=1e-6, help="sustained TFLOP/s that hours are estimated with")] = 0.2,
) -> None:
    """Print a study's cells as JSON, with its cost; loads no weights.

    kallm plan demo

    kallm plan published --tflops 200

    kallm plan demo --cells unfinished | jq '.cells[].id'
    """
    planned = make_plan(read_study(study, set_))
    sharing = parse_share(share)
    opened = open_store(store, writable=pods is not None) if pods is not None or cells == "unfinished" else None
    chosen = select_cells(planned, cells, opened)
    if pods is not None and opened is not None:
        put_snapshots(planned, opened)
        record_study(opened, planned.document)
        pods.write_text(json.dumps(group_cells(planned.document, chosen, sharing)) + "\n")
    cost = estimate_cost(planned, tuple(chosen))
    entries = {entry.id: entry.model_dump(mode="json") for entry in planned.document.cells}
    told = {
        "study": f"{planned.document.name}.{planned.document.hash}",
        "model": planned.model.source,
        "dialogues": planned.dialogues,
        "suites": list(planned.suites),
        "cells": [entries[c.id] for c in chosen],
        "estimate": {
            "trained_tokens": cost.trained_tokens,
            "tried_tokens": cost.tried_tokens,
            "training_hours": round(cost.hours(tflops), 3),
            "at_tflops": tflops,
            "stored_bytes": cost.stored_bytes,
            "checkpoint_bytes_while_running": cost.running_bytes,
        },
    }
    print(json.dumps(told, indent=2))
