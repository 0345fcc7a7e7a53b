"""Which cells of a study are meant, and which of them share a pod."""

from typing import Literal, TypedDict, get_args

from kallm.errors import WrongConfiguration, did_you_mean
from kallm.results.record import StudyDocument
from kallm.run.finished import is_finished
from kallm.store.store import Store
from kallm.study.plan import Cell, Plan

__all__ = ["Pod", "Share", "choose_part", "group_cells", "parse_share", "select_cells"]

Share = Literal["cell", "seed"]
"""``cell``: one pod for each cell; ``seed``: one pod for all variants of a seed, which then share one trunk."""


class Pod(TypedDict):
    """What one pod works on; every value can stand in a label and in an argument."""

    name: str
    cells: str
    """Labels of cells, joined by commas: an argument of ``kallm cell``."""
    variant: str
    seed: str
    study: str
    """The full name, ``NAME.HASH``, under which the store holds the study as it was planned."""


def select_cells(plan: Plan, selection: str, store: Store | None = None) -> list[Cell]:
    """Return the cells that ``all``, ``unfinished``, or labels or ids joined by commas name, in the plan's order.

    Raises:
        WrongConfiguration: the study has no such cell, or ``unfinished`` is asked without a store.
    """
    if selection == "all":
        return list(plan.cells)
    if selection == "unfinished":
        assert store is not None
        return [cell for cell in plan.cells if not is_finished(store, cell, list(plan.suites))]
    names = {name.strip() for name in selection.split(",")} - {""}
    labels = [cell.label for cell in plan.cells]
    known = {*labels, *(cell.id for cell in plan.cells)}
    for name in sorted(names - known):
        raise WrongConfiguration(f"study '{plan.study.name}' has no cell '{name}': {did_you_mean(name, labels)}")
    if not names:
        raise WrongConfiguration("no cell is named: expected all, unfinished, or labels like kan.seed-0,linear.seed-0")
    return [cell for cell in plan.cells if {cell.label, cell.id} & names]


def group_cells(document: StudyDocument, cells: list[Cell], share: Share) -> list[Pod]:
    """Return the pods that a study's cells go to, in the order of their first cells; one without a seed has its own."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        together = share == "seed" and cell.seed is not None
        groups.setdefault(f"seed-{cell.seed}" if together else cell.label, []).append(cell)
    return [
        Pod(
            name=name,
            cells=",".join(cell.label for cell in group),
            variant=group[0].name if len(group) == 1 else "all",
            seed="none" if group[0].seed is None else str(group[0].seed),
            study=f"{document.name}.{document.hash}",
        )
        for name, group in groups.items()
    ]


def choose_part(cells: str, part: int) -> str:
    """Return one of the parts between semicolons, counted from 0: a Job's pods differ by a number only.

    Raises:
        WrongConfiguration: there are not so many.
    """
    parts = cells.split(";")
    if part >= len(parts):
        raise WrongConfiguration(f"--part: CELLS has {len(parts)} parts, counted from 0, but {part} was asked for")
    return parts[part]


def parse_share(text: str) -> Share:
    """Return what a word says about sharing.

    Raises:
        WrongConfiguration: it is neither ``cell`` nor ``seed``.
    """
    for share in get_args(Share):
        if text == share:
            return share
    raise WrongConfiguration(f"--share: unknown '{text}': {did_you_mean(text, get_args(Share))}")
