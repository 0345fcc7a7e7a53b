"""What the commands share: arguments and options, a study's document, and the console."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kallm.errors import DataMismatch
from kallm.results.record import StudyDocument, read_record, study_key
from kallm.store.store import Store, is_key
from kallm.study.plan import make_plan
from kallm.study.study import preset_names, read_study

__all__ = ["DEFAULT_STORE", "SetOption", "StoreOption", "StudyArgument", "find_document", "make_console"]

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


def find_document(store: Store, study: str, set_: list[str] | None = None) -> StudyDocument:
    """Return a study's document: by its full name ``<name>.<hash>`` from the store, else by planning it.

    Raises:
        DataMismatch: what the store holds under that name is no study.
        WrongConfiguration: there is no such study.
    """
    name, _, study_hash = study.rpartition(".")
    if name and is_key(study) and not Path(study).exists():
        key = study_key(name, study_hash, "study.json")
        stored = read_record(store, StudyDocument, key)
        if stored is not None:
            if (stored.name, stored.hash) != (name, study_hash):
                raise DataMismatch(f"{store.address}/{key} is the document of {stored.name}.{stored.hash}; restore it")
            return stored
    return make_plan(read_study(study, set_)).document


def make_console() -> Console:
    """Return standard output, wide enough for a table where it is no terminal."""
    return Console() if sys.stdout.isatty() else Console(width=_PLAIN_WIDTH)
