"""How every figure of the report is drawn: style, colours that follow the page, intervals, and clean SVG.

Colours are placeholders while matplotlib draws, and CSS variables afterwards (``--ink``, ``--faint``, ``--rule``,
``--band``, ``--c0`` to ``--c9``), so one drawing serves light, dark and print. Text stays text in the page's font.
"""

import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.collections import Collection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from kallm.results.schema import Estimate, Reference, Table

__all__ = [
    "BAND",
    "COLOURS",
    "FAINT",
    "INK",
    "RULE",
    "STYLE",
    "WIDTH",
    "describe",
    "draw_estimate",
    "draw_references",
    "find_colour",
    "find_marker",
    "finish",
    "limit",
    "make_axes",
    "paint_",
    "write_names",
]

INK, FAINT, RULE, BAND = "#010101", "#020202", "#030303", "#040404"
COLOURS = [f"#0501{index:02x}" for index in range(10)]
"""The colours of variants."""
_VARIABLES = {INK: "--ink", FAINT: "--faint", RULE: "--rule", BAND: "--band"}
_VARIABLES |= {colour: f"--c{index}" for index, colour in enumerate(COLOURS)}
_MARKERS = "osD^vPXphd"
WIDTH = 5.2
_NAME_WIDTH = 0.3
"""The share of an axis that a name may take."""
_OUTLIER = 2.5
"""A value is shown at the edge, with an arrow, if leaving it out shrinks the span by this factor."""

STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.labelcolor": FAINT,
    "axes.labelpad": 6,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.color": INK,
    "xtick.color": RULE,
    "xtick.labelcolor": FAINT,
    "ytick.color": RULE,
    "ytick.labelcolor": INK,
    "ytick.left": False,
}


def make_axes(
    num_rows: int, *, row_height: float = 0.27, extra: float = 0.75, listed: bool = True
) -> tuple[Figure, Axes]:
    """Return a figure for rows from the top down, or (``listed=False``) for plain x and y of that height."""
    figure = Figure(figsize=(WIDTH, num_rows * row_height + extra), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="x" if listed else "y")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    if listed:
        axes.set_ylim(num_rows - 0.4, -0.6)
    return figure, axes


def find_colour(table: Table, variant: str) -> str:
    """Return a variant's colour: the same in every figure."""
    return COLOURS[_place(table, variant) % len(COLOURS)]


def find_marker(table: Table, variant: str) -> str:
    """Return a variant's marker, so that nothing rests on colour alone."""
    return _MARKERS[_place(table, variant) % len(_MARKERS)]


def limit(axes: Axes, spans: Sequence[tuple[float, float]], keep: Iterable[float] = ()) -> None:
    """Set the x limits to (mean, half) spans and the values to keep; at most two far outliers are left outside."""
    kept = list(keep)
    inside = sorted(spans)

    def bounds(chosen: Sequence[tuple[float, float]]) -> tuple[float, float]:
        lows, highs = [m - h for m, h in chosen], [m + h for m, h in chosen]
        return min([*lows, *kept]), max([*highs, *kept])

    for _ in range(2):
        if len(inside) < 3:
            break
        low, high = bounds(inside)
        rest = min(inside[1:], inside[:-1], key=lambda chosen: bounds(chosen)[1] - bounds(chosen)[0])
        low_rest, high_rest = bounds(rest)
        if high - low < _OUTLIER * max(high_rest - low_rest, 1e-12):
            break
        inside = rest
    low, high = bounds(inside)
    pad = 0.07 * (high - low) or 0.05 * abs(high) or 0.5
    axes.set_xlim(low - pad, high + pad)


def draw_estimate(axes: Axes, place: int, found: Estimate, colour: str, scale: float, marker: str = "o") -> None:
    """Draw a mean with its interval, the seeds as small strokes, or an arrow at the edge where it lies outside."""
    low, high = axes.get_xlim()
    mean = scale * found.mean
    if not low <= mean <= high:
        edge, sign, side = (high, "→", "right") if mean > high else (low, "←", "left")
        text = f"{mean:.4g} {sign}" if sign == "→" else f"{sign} {mean:.4g}"
        axes.text(edge, place, text, color=colour, ha=side, va="center", fontsize=8)
        return
    if found.half is not None:
        half = scale * found.half
        axes.plot([mean - half, mean + half], [place, place], color=colour, linewidth=1.3, solid_capstyle="butt")
        seeds = [scale * value for _, value in found.values]
        axes.plot(seeds, [place] * len(seeds), "|", color=colour, markersize=8, markeredgewidth=0.7, alpha=0.7)
    axes.plot([mean], [place], marker, color=colour, markersize=5.5)


def draw_references(axes: Axes, references: Sequence[Reference], column: str, scale: float) -> None:
    """Draw an upright line for each reference, its name above the rows."""
    for reference, side, shift in zip(references, ("right", "left"), (-3, 3), strict=False):
        value = scale * reference.scores[column]
        axes.axvline(value, color=FAINT, linewidth=0.9, linestyle=(0, (1, 2)), zorder=0)
        axes.annotate(
            reference.name, (value, 1), (shift, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
            ha=side, va="bottom", fontsize=7.5, color=FAINT,
        )  # fmt: skip


def write_names(axes: Axes, points: Sequence[tuple[float, float, str]], colours: Sequence[str]) -> None:
    """Write each point's name to its right, moved apart vertically where names would lie on each other."""
    low, high = axes.get_xlim()
    columns: list[list[tuple[float, float, str, str]]] = []
    for point, colour in sorted(zip(points, colours, strict=True), key=lambda each: each[0][0]):
        if not columns or point[0] - columns[-1][-1][0] > _NAME_WIDTH * (high - low):
            columns.append([])
        columns[-1].append((*point, colour))
    for column in columns:
        _write_column(axes, column, offset=0.04 * (high - low))


def _write_column(axes: Axes, points: Sequence[tuple[float, float, str, str]], *, offset: float) -> None:
    """Write names of points that lie close to each other under one another, each with a line to its point."""
    low, high = axes.get_ylim()
    gap = 0.062 * (high - low)
    points = sorted(points, key=lambda point: point[1])
    places = [y for _, y, _, _ in points]
    for _ in range(200):
        for below, above in pairwise(range(len(places))):
            close = gap - (places[above] - places[below])
            if close > 1e-9 * gap:
                places[below] -= close / 2
                places[above] += close / 2
    right = max(x for x, _, _, _ in points)
    for (x, y, name, colour), place in zip(points, places, strict=True):
        axes.plot([x, right + offset * 0.8], [y, place], color=RULE, linewidth=0.6, zorder=0)
        axes.text(right + offset, place, name, color=colour, va="center", fontsize=8)
    axes.set_ylim(min(low, places[0] - gap), max(high, places[-1] + gap))


def describe(subject: str, parts: Iterable[str]) -> str:
    """Return the text that stands for a figure where it cannot be seen."""
    return f"{subject}: {'; '.join(parts)}."


def finish(figure: Figure, name: str, label: str) -> str:
    """Return the figure as inline SVG: no date, no outside reference, ids of its own, and a label to be read aloud."""
    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": f"kallm {name}"}):
        figure.savefig(
            out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Type", "Format"))
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, f"var({variable})")
    size = re.search(r'viewBox="([^"]*)"', text)
    assert size is not None
    said = html.escape(label, quote=True)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{size[1]}" '
    return f'{head}role="img" aria-label="{said}">' + text[text.index(">") + 1 :].strip()


def paint_(figure: Figure, colours: Mapping[str, str]) -> None:
    """Give lines, texts and areas of a figure true colours, by CSS variable, for a file that follows no page."""
    true = {placeholder: colours[variable] for placeholder, variable in _VARIABLES.items()}
    found: Any = figure.findobj
    for artist in [*found(Line2D), *found(Text)]:
        artist.set_color(true.get(to_hex(artist.get_color()), artist.get_color()))
    for artist in found(Collection):
        artist.set_facecolor([true.get(to_hex(colour), colour) for colour in artist.get_facecolor()])


def _place(table: Table, variant: str) -> int:
    return next(index for index, row in enumerate(table.rows) if row.variant == variant)
