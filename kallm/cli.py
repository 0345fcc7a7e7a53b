"""The program ``kallm``: parse, call, print; nothing else."""

import contextlib
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kallm.commands.cluster import attach_cluster
from kallm.commands.inspect import attach_inspect
from kallm.commands.items import attach_items
from kallm.commands.plan import attach_plan
from kallm.commands.probe import attach_probe
from kallm.commands.speak import attach_speak
from kallm.commands.stored import attach
from kallm.errors import (
    CellsMissing,
    Diverged,
    ExitCode,
    GaveUp,
    KallmError,
    OutOfMemory,
)
from kallm.options import (
    DEFAULT_STORE,
    CellsArgument,
    GraceOption,
    SetOption,
    StoreOption,
    StudyArgument,
    find_document,
    find_plan,
    is_stored_name,
    make_console,
)
from kallm.progress import GRACE_S, Reporter, Stop, format_duration
from kallm.results.record import StudyDocument, study_key
from kallm.run.selection import choose_part, select_cells
from kallm.run.snapshots import fetch_snapshots, names_commits
from kallm.store.opening import open_store
from kallm.store.store import Store
from kallm.study.plan import Plan, make_plan
from kallm.study.study import read_study

if TYPE_CHECKING:
    from kallm.results.table import Table

__all__ = ["main"]

_WATCH_S = 5.0

app = typer.Typer(
    help="Replace the last feed-forward networks of a language model by KAN layers, and measure what it does.\n\n"
    "    kallm run demo         a whole study here, on real weights\n\n"
    "    kallm plan published   what a study would train, and its cost\n\n"
    "    kallm status demo      which cells are done\n\n"
    "    kallm table demo       the table again, from the store alone",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="show a traceback with an error")] = False) -> None:
    """Keep the options that every command has."""


@app.command()
def run(
    study: StudyArgument,
    store: StoreOption = DEFAULT_STORE,
    set_: SetOption = None,
    grace_s: GraceOption = GRACE_S,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="measure memory and speed of each variant alone first")
    ] = True,
) -> None:
    """Train and evaluate every unfinished cell of a study here, then write and print its table.

    Ctrl-C at any moment; the same command continues. A finished study is only read.

        kallm run demo

        kallm run demo --set seeds=[0] --set train.tokens=4096

        kallm run my-study.yaml --store s3://my-bucket/kallm
    """
    stop = Stop(grace_s=grace_s)
    stop.install()
    plan, opened = _prepare(study, store, set_)
    from kallm.run.local import run_cells

    began = time.monotonic()
    try:
        with Reporter() as reporter:
            diverged = run_cells(plan, list(plan.cells), opened, reporter, stop, probe=probe)
    except GaveUp:
        _finish_table(opened, plan.document)
        raise
    table = _finish_table(opened, plan.document)
    print(f"in {format_duration(time.monotonic() - began)}", file=sys.stderr)
    _leave_by(table)
    if diverged:
        raise Diverged(f"the table is written, but {len(diverged)} cells diverged: {'; '.join(diverged)}")


@app.command()
def cell(
    study: StudyArgument,
    cells: CellsArgument,
    store: StoreOption = DEFAULT_STORE,
    set_: SetOption = None,
    part: Annotated[
        int | None, typer.Option("--part", min=0, help="of CELLS in parts between semicolons, take this one")
    ] = None,
    with_table: Annotated[
        bool, typer.Option("--table", help="write the study's table anew after each cell that is finished")
    ] = False,
    progress_file: Annotated[
        Path | None,
        typer.Option("--progress-file", envvar="ARGO_PROGRESS_FILE", help="where the percentage is written, as N/100"),
    ] = None,
    grace_s: GraceOption = GRACE_S,
) -> None:
    """Train and evaluate some cells, the unit that a cluster runs; several of one seed share their trunk.

    kallm cell demo kan.seed-0

    kallm cell demo linear.seed-0,kan.seed-0 --store s3://my-bucket/kallm
    """
    stop = Stop(grace_s=grace_s)
    stop.install()
    plan, opened = _prepare(study, store, set_, inside_cell=True)
    chosen = select_cells(plan, cells if part is None else choose_part(cells, part), opened)
    from kallm.report.report import write_results
    from kallm.run.local import run_cells

    def write_table() -> None:
        if with_table:
            write_results(opened, plan.document)

    with Reporter(progress_file=progress_file) as reporter:
        diverged = run_cells(plan, chosen, opened, reporter, stop, after_cell=write_table)
    write_table()
    if diverged:
        raise Diverged("; ".join(diverged))
    print("\n".join(cell.id for cell in chosen))


@app.command()
def status(
    study: StudyArgument,
    store: StoreOption = DEFAULT_STORE,
    set_: SetOption = None,
    watch: Annotated[bool, typer.Option("--watch", help="look again every few seconds, until Ctrl-C")] = False,
) -> None:
    """Show which cells of a study are done, running, stale, failed or missing, from the store alone.

    kallm status demo

    kallm status demo --watch --store s3://my-bucket/kallm
    """
    from rich.live import Live

    from kallm.results.status import read_status, render_status

    opened = open_store(store)
    document = find_document(opened, study, set_)
    console = make_console()
    if not watch:
        console.print(render_status(read_status(opened, document, now=time.time())))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(render_status(read_status(opened, document, now=time.time())), refresh=True)
            time.sleep(_WATCH_S)


@app.command()
def table(
    study: StudyArgument,
    store: StoreOption = DEFAULT_STORE,
    set_: SetOption = None,
    latex: Annotated[bool, typer.Option("--latex", help="print the table as LaTeX")] = False,
) -> None:
    """Write a study's table and report from the records in the store, and print the table.

    kallm table demo

    kallm table demo.0a1b2c3d4e5f --store s3://my-bucket/kallm
    """
    opened = open_store(store, writable=True)
    _leave_by(_finish_table(opened, find_document(opened, study, set_), latex=latex))


attach(app)
attach_cluster(app)
attach_inspect(app)
attach_items(app)
attach_plan(app)
attach_probe(app)
attach_speak(app)


def main() -> None:
    """Run the program and leave with a code of ``errors.py``."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own bars would stand between ours
    try:
        sys.exit(_run(debug="--debug" in sys.argv))
    finally:
        # the work is over and its code stands: while Python shuts down, it would give signals their deadly default back
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def _run(*, debug: bool) -> ExitCode:
    try:
        app()
    except KallmError as error:
        return _tell(error, error.code, debug=debug)
    except MemoryError as error:
        return _tell(_out_of_memory(error), ExitCode.OUT_OF_MEMORY, debug=debug)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return _tell(_out_of_memory(error), ExitCode.OUT_OF_MEMORY, debug=debug)
    return ExitCode.DONE


def _prepare(study: str, store: str, set_: list[str] | None, *, inside_cell: bool = False) -> tuple[Plan, Store]:
    """Check everything that can be wrong before anything expensive starts."""
    wanted = None if is_stored_name(study) and not set_ else read_study(study, set_)
    planned = None if wanted is None or names_commits(wanted) else make_plan(wanted)
    opened = open_store(store, writable=True, inside_cell=inside_cell)
    if planned is None and wanted is not None:
        fetch_snapshots(wanted, opened)
        planned = make_plan(wanted)
    return planned or find_plan(opened, study, snapshots=True), opened


def _finish_table(store: Store, document: StudyDocument, *, latex: bool = False) -> "Table":
    from kallm.report.report import write_results
    from kallm.results.render import render_latex, render_rich

    built, _ = write_results(store, document)
    if latex:
        print(render_latex(built))
    else:
        make_console().print(render_rich(built))
    folder = study_key(document.name, document.hash)
    print(
        f"table.json, table.csv, table.md and report.html are in {store.address.rstrip('/')}/{folder}", file=sys.stderr
    )
    return built


def _leave_by(built: "Table") -> None:
    from kallm.results.table import is_complete

    if not is_complete(built):
        raise CellsMissing("the table is written, but cells are missing: 'kallm status' names them")


def _out_of_memory(error: Exception) -> OutOfMemory:
    return OutOfMemory(f"out of memory: lower train.micro_batch or train.length ({str(error).splitlines()[0]:.120})")


def _tell(error: Exception, code: ExitCode, *, debug: bool) -> ExitCode:
    if debug:
        traceback.print_exception(error)
    print(f"kallm: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
