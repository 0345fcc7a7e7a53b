"""What the commands share: arguments and options, a study's document, and the console."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kallm.errors import DataMismatch, WrongConfiguration
from kallm.results.record import StudyDocument, read_record, study_key
from kallm.run.snapshots import fetch_snapshots
from kallm.store.store import Store
from kallm.study.plan import Plan, make_plan
from kallm.study.study import preset_names, read_study

__all__ = [
    "DEFAULT_STORE",
    "CellsArgument",
    "CellsOption",
    "GraceOption",
    "SetOption",
    "ShareOption",
    "StoreOption",
    "StudyArgument",
    "find_document",
    "find_plan",
    "find_plan_of",
    "find_studies",
    "is_stored_name",
    "make_console",
]

DEFAULT_STORE = "kallm-store"
_PLAIN_WIDTH = 120

_STUDY_HELP = (
    f"a preset ({', '.join(preset_names())}), a YAML file, YAML text, - for standard input, or NAME.HASH in the store"
)
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help=_STUDY_HELP)]
StoreOption = Annotated[str, typer.Option("--store", help="a folder, or s3://bucket/prefix")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="override one field, e.g. train.lr=0.0005 or seeds=[0]; repeatable")
]

_CELLS_HELP = "all, unfinished, or labels like kan.seed-0,linear.seed-0"
CellsArgument = Annotated[str, typer.Argument(metavar="CELLS", help=_CELLS_HELP)]
CellsOption = Annotated[str, typer.Option("--cells", help=_CELLS_HELP)]
GraceOption = Annotated[
    float,
    typer.Option("--grace-s", min=0.0, help="most seconds from SIGTERM to the exit; less than the site grants"),
]
ShareOption = Annotated[
    str, typer.Option("--share", help="cell: a pod for each cell; seed: one for all variants of a seed, on one trunk")
]


def find_document(store: Store, study: str, set_: list[str] | None = None) -> StudyDocument:
    """Return a study's document: by its full name ``<name>.<hash>`` from the store, else by planning it.

    Raises:
        DataMismatch: what the store holds under that name is no study.
        WrongConfiguration: there is no such study.
    """
    if is_stored_name(study):
        if set_:
            raise WrongConfiguration(f"--set changes a study, but {study} is fixed: name its preset or file instead")
        name, _, study_hash = study.rpartition(".")
        key = study_key(name, study_hash, "study.json")
        stored = read_record(store, StudyDocument, key)
        if stored is None:
            raise WrongConfiguration(f"there is no study {study} in {store.address}: 'kallm plan' tells a study's name")
        if (stored.name, stored.hash) != (name, study_hash):
            raise DataMismatch(f"{store.address}/{key} is the document of {stored.name}.{stored.hash}; restore it")
        return stored
    return make_plan(read_study(study, set_)).document


def find_studies(store: Store, cell: str) -> Iterator[StudyDocument]:
    """Yield the studies in the store that name a cell."""
    for entry in store.list("studies/"):
        if entry.key.endswith("/study.json"):
            document = read_record(store, StudyDocument, entry.key)
            if document is not None and any(each.id == cell for each in document.cells):
                yield document


def find_plan_of(store: Store, cell: str) -> Plan:
    """Return the plan of the first study that names a cell, with what it takes from the hub.

    Raises:
        DataMismatch: what it was planned from has changed since.
        WrongConfiguration: no study names it.
    """
    for document in find_studies(store, cell):
        return find_plan(store, f"{document.name}.{document.hash}", snapshots=True)
    raise WrongConfiguration(f"no study in {store.address} names {cell}: 'kallm run' of its study leaves study.json")


def find_plan(store: Store, study: str, *, snapshots: bool = False) -> Plan:
    """Return the plan of a study that the store holds, ``<name>.<hash>``.

    Args:
        store: where it is.
        study: its full name.
        snapshots: bring what it takes from the hub from the store first, where the store has it.

    Raises:
        DataMismatch: what it was planned from has changed since: a package, or the files of a folder.
        WrongConfiguration: there is no such study.
    """
    document = find_document(store, study)
    settings = {name: value for name, value in document.study.items() if name != "sources"}
    # stored with sorted keys; the order of variants and suites is that of the table
    for group, names in (
        ("variants", [cell.variant for cell in document.cells]),
        ("suites", [suite.name for suite in document.suites]),
    ):
        settings[group] = {name: settings[group][name] for name in names}
    found = read_study(json.dumps(settings, indent=1))
    if snapshots:
        fetch_snapshots(found, store)
    plan = make_plan(found)
    if plan.document.hash != document.hash:
        there, here = document.study.get("sources"), plan.document.study["sources"]
        what = f"from other data: it names {there}, but here is {here}" if there != here else "by another kallm"
        raise DataMismatch(f"{study} was planned {what}; use the same versions, or plan the study anew")
    return plan


def is_stored_name(study: str) -> bool:
    """Say whether a text can only be ``<name>.<hash>``, the full name of a study in a store."""
    return re.fullmatch(r"[a-z0-9][a-z0-9-]*\.[0-9a-f]{12}", study) is not None and not Path(study).exists()


def make_console() -> Console:
    """Return standard output, wide enough for a table where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=_PLAIN_WIDTH)
