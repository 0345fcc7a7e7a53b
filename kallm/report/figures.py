"""The report's figures in their order; matplotlib, slow to start, is imported only where one is drawn."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kallm.report.learned import EDGES_NOTE, make_ranking
from kallm.report.page import escape
from kallm.results.record import Items, TrainingRecord
from kallm.results.schema import Table

__all__ = ["Sources", "make_figures", "make_layers", "make_learned"]

_FUNCTIONS = 3


@dataclass(frozen=True)
class Sources:
    """What the report is drawn from beside the table, each by cell id.

    Attributes:
        trainings: the training records.
        layers: what the suite ``edges`` left.
        conversations: what the suite ``retained`` left.
    """

    trainings: Mapping[str, TrainingRecord]
    layers: Mapping[str, Items] = field(default_factory=dict)
    conversations: Mapping[str, Items] = field(default_factory=dict)


def make_figures(table: Table, sources: Sources) -> str:
    """Return every figure that has something to show."""
    from kallm.report import plots

    leads = [column for column in table.columns if column.lead and column.score not in ("parse_failures", "kl")]
    strokes = "dot: mean, line: 95 % interval, strokes: seeds"
    margin = "band: declared margin; filled: distinguished or equivalent"
    drawn = [("Paired differences", margin, plots.plot_contrasts(table))]
    drawn += [(f"{column.suite}, {column.title}", strokes, plots.plot_scores(table, column)) for column in leads]
    for column in leads[:1]:
        drawn.append((f"{column.title} by size", "trainable parameters", plots.plot_parameters(table, column)))
        drawn.append((f"{column.title} by memory", "each variant trained alone", plots.plot_memory(table, column)))
    for column in (column for column in table.columns if column.score == "kl"):
        how = "dot: mean over tokens, strokes: conversations"
        drawn.append(("Retained ability", how, plots.plot_retained(table, column, sources.conversations)))
    drawn.append(("Learning curves", "thin: seeds, thick: their mean", plots.plot_curves(table, sources.trainings)))
    for suite in sorted({suite for row in table.rows for suite in row.replies}):
        drawn.append((f"{suite}, unreadable replies", "mean over seeds", plots.plot_replies(table, suite)))
    drawn.append(("Time per cell", "training alone", plots.plot_times(table)))
    drawn += [(f"{column.suite}, task by task", column.title, plots.plot_tasks(table, column)) for column in leads]
    figures = [_make_figure(title, hint, svg) for title, hint, svg in drawn if svg]
    return f'<div class="figures">\n{chr(10).join(figures)}\n</div>' if figures else ""


def make_learned(table: Table, sources: Sources) -> Iterable[str]:
    """Yield, for each variant with KAN layers, what parts of the edges explain, and the strongest functions."""
    members: dict[str, list[str]] = {}
    for cell in table.cells:
        if cell.id in sources.layers:
            members.setdefault(cell.variant, []).append(cell.id)
    if not members:
        return
    from kallm.report.drawing import find_colour

    yield f'<p class="small">{escape(EDGES_NOTE)}</p>'
    seeds = {cell.id: "" if cell.seed is None else f", seed {cell.seed}" for cell in table.cells}
    for variant, cells in members.items():
        name = f"{variant}{seeds[cells[0]]}"
        drawn = make_layers(name, sources.layers[cells[0]], find_colour(table, variant), most=_FUNCTIONS)
        ranking = make_ranking(f"what the edges of {variant} explain", [sources.layers[cell] for cell in cells])
        opened = ' open="open"' if len(members) == 1 else ""
        yield f"<details{opened}><summary>{escape(variant)}</summary>\n{ranking}\n{drawn}\n</details>"


def make_layers(name: str, items: Items, colour: str, *, most: int) -> str:
    """Return the strongest functions of each layer, a figure for each, so that screens and pages can part them."""
    from kallm.report.panels import FUNCTIONS_NOTE, plot_functions

    caption = f'<p class="small"><b>{escape(name)}, the strongest functions</b> {escape(FUNCTIONS_NOTE)}.</p>'
    figures = "\n".join(f"<figure>{plot_functions(name, [item], colour, most=most)}</figure>" for item in items)
    return f'{caption}\n<div class="figures">\n{figures}\n</div>'


def _make_figure(title: str, hint: str, svg: str) -> str:
    """Return a figure with its caption."""
    caption = f"<b>{escape(title)}</b> <span>{escape(hint)}</span>"
    return f"<figure><figcaption>{caption}</figcaption>\n{svg}</figure>"
