"""The commands that look after what is stored: verify, compare, copy, logs, gc.

What computes statistics is imported where it is used: SciPy takes half a second, and most commands need none.
"""

import sys
from typing import Annotated

import typer
from rich.filesize import decimal

from kallm.errors import DataMismatch
from kallm.options import DEFAULT_STORE, SetOption, StoreOption, StudyArgument, find_document, make_console
from kallm.progress import Reporter, format_duration
from kallm.results.inventory import find_unnamed, list_steps
from kallm.results.logs import find_cell, read_attempts, render_attempt
from kallm.results.record import StudyDocument, study_key
from kallm.store.copy import copy_objects
from kallm.store.gc import find_leftovers, remove_leftover
from kallm.store.opening import open_store

__all__ = ["attach"]


def attach(app: typer.Typer) -> None:
    """Add these commands to the program."""
    for command in (verify, compare, copy, logs, gc):
        app.command()(command)


def verify(study: StudyArgument, store: StoreOption = DEFAULT_STORE, set_: SetOption = None) -> None:
    """Read everything that a study's records name again: every size, every SHA-256, and the table computed anew.

    Prints one line for each difference and leaves with 3 if there is any. Changes nothing.

        kallm verify demo

        kallm verify demo.0a1b2c3d4e5f --store s3://my-bucket/kallm
    """
    from kallm.results.verify import verify_study

    opened = open_store(store)
    document = find_document(opened, study, set_)
    with Reporter() as reporter, reporter.track("verify", len(document.cells), "cells") as tracker:
        differences, num_objects = verify_study(opened, document, tracker.advance)
    for difference in differences:
        print(difference)
    if differences:
        raise DataMismatch(f"{_name(document)}: {_count(len(differences), 'difference')} in {opened.address}")
    print(f"{_name(document)}: {_count(num_objects, 'object')} read, each as its record names it")
    if opened.get(study_key(document.name, document.hash, "table.json")) is None:
        print("no table is stored, so the records' own hashes were not checked: 'kallm table' writes one")


def compare(
    left: Annotated[str, typer.Argument(metavar="A", help="a study, named as everywhere, or NAME.HASH in the store")],
    right: Annotated[str, typer.Argument(metavar="B", help="another one; or the same, with --store-b")],
    store: StoreOption = DEFAULT_STORE,
    store_b: Annotated[str | None, typer.Option("--store-b", help="where B is, unless it is where A is")] = None,
) -> None:
    """Compare two studies, or one study in two stores, figure by figure: weights, losses, scores, items, counts.

    Cells are matched by variant and seed. Times, memory and receipts are listed apart and do not count. Leaves with 0
    where all figures are equal, else with 3.

        kallm compare demo demo --store-b s3://my-bucket/kallm

        kallm compare demo.0a1b2c3d4e5f demo.f5e4d3c2b1a0
    """
    from kallm.results.compare import compare_studies, render_apart

    opened = open_store(store)
    other = opened if store_b is None else open_store(store_b)
    comparison = compare_studies((opened, find_document(opened, left)), (other, find_document(other, right)))
    for difference in comparison.differences:
        print(difference)
    print(f"{_count(comparison.num_equal, 'figure')} equal, {len(comparison.differences)} different")
    if comparison.apart:
        make_console().print(render_apart(comparison))
    if comparison.differences:
        raise DataMismatch(f"{_count(len(comparison.differences), 'figure')} of A and B differ")


def copy(
    store_a: Annotated[str, typer.Argument(metavar="STORE_A", help="from here: a folder, or s3://bucket/prefix")],
    store_b: Annotated[str, typer.Argument(metavar="STORE_B", help="to here")],
    study: StudyArgument,
    set_: SetOption = None,
) -> None:
    """Copy a study from one store to another: every file checked against its hash, every record after what it names.

    Break it off at any moment; the same command continues, and what is there already is checked and kept. A record is
    never replaced: where the other store holds another one for a cell, nothing is copied.

        kallm copy kallm-store s3://my-bucket/kallm demo

        kallm copy s3://my-bucket/kallm kallm-store demo.0a1b2c3d4e5f
    """
    source = open_store(store_a)
    document = find_document(source, study, set_)
    steps = list_steps(source, document)
    target = open_store(store_b, writable=True)
    with Reporter() as reporter, reporter.track("copy", len(steps), "objects") as tracker:
        written = copy_objects(source, target, steps, tracker.advance)
    if source.get(study_key(document.name, document.hash, "table.json")) is not None:
        from kallm.report.report import write_results

        written += write_results(target, document)[1]  # the target may hold more cells than the source
    print(f"{_name(document)}: {_count(len(written), 'object')} written to {target.address}, the others were there")


def logs(
    cell: Annotated[str, typer.Argument(metavar="CELL", help="a cell's id, or a beginning that no other cell has")],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Print every attempt at a cell, oldest first: when it began, how it ended, and its log.

    kallm logs kan.seed-0

    kallm logs baseline --store s3://my-bucket/kallm
    """
    opened = open_store(store)
    found = find_cell(opened, cell)
    attempts = read_attempts(opened, found)
    print(f"{found}: {_count(len(attempts), 'attempt')}")
    for number, attempt in enumerate(attempts, start=1):
        print(render_attempt(attempt, number, len(attempts)))


def gc(
    store: StoreOption = DEFAULT_STORE,
    yes: Annotated[bool, typer.Option("--yes", help="remove it; without, it is only shown")] = False,
) -> None:
    """Show, and with --yes remove, what killed processes left in a store: what no manifest and no record names.

    That is: checkpoints of cells that are finished, weights and items that no record names, half-written files and
    unfinished uploads. What is younger than a day by the store's own clock stays, and so does all that a cell needs.

        kallm gc

        kallm gc --store s3://my-bucket/kallm --yes
    """
    opened = open_store(store)
    unnamed, left_alone = find_unnamed(opened)
    leftovers = find_leftovers(opened, unnamed)
    for leftover in leftovers:
        size = "–" if leftover.size is None else decimal(leftover.size)
        print(f"{leftover.key}: {leftover.why}, {size}, {format_duration(leftover.age_s)} old")
        if yes:
            remove_leftover(opened, leftover)
    for sentence in left_alone:
        print(sentence, file=sys.stderr)
    total = decimal(sum(leftover.size or 0 for leftover in leftovers))
    done = "removed" if yes else "would be removed: add --yes" if leftovers else "nothing to remove"
    print(f"{_count(len(leftovers), 'object')}, {total}: {done}")


def _name(document: StudyDocument) -> str:
    return f"{document.name}.{document.hash}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
