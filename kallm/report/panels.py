"""Small panels of univariate functions, each over the histogram of its inputs, layer below layer."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kallm.report.drawing import BAND, FAINT, INK, RULE, STYLE, WIDTH, describe, finish
from kallm.report.learned import name_layer, tell_learned
from kallm.results.digits import MINUS
from kallm.results.record import Items

__all__ = ["FUNCTIONS_NOTE", "draw_functions", "plot_functions"]

FUNCTIONS_NOTE = (
    "of each layer: input → output, and the variance of what the edge adds over that of its output. Curves are less "
    "their means, over 99 % of the inputs; grey: how often each input occurs"
)

_COLUMNS = 3
_HEAD, _LABEL, _CURVE, _FOOT = 0.24, 0.17, 0.62, 0.24
"""Heights in inches: of a layer's name, of a panel's name, of its curve, of the ends of its range."""
_GAP = 0.12
"""Space between panels, as a share of a column."""


@mpl.rc_context(STYLE)
def plot_functions(name: str, items: Items, colour: str, *, most: int) -> str:
    """Return the strongest functions of each layer as inline SVG.

    Args:
        name: whose they are, in words.
        items: one per layer.
        colour: of the curves.
        most: functions of a layer.
    """
    label = describe(f"The strongest functions of {name}", tell_learned(items, most))
    return finish(draw_functions(items, colour, most=most), f"functions {name} {items[0]['id']}", label)


@mpl.rc_context(STYLE)
def draw_functions(items: Items, colour: str, *, most: int) -> Figure:
    """Draw the strongest functions of each layer; one axes holds all panels, for many axes are slow."""
    shown = [item["functions"][:most] for item in items]
    lines = [-(-len(functions) // _COLUMNS) for functions in shown]
    height = sum(_HEAD + count * (_LABEL + _CURVE + _FOOT) for count in lines)
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(0, _COLUMNS - _GAP)
    axes.set_ylim(height, 0)
    top = 0.0
    for item, functions in zip(items, shown, strict=True):
        scale = max(abs(value) for function in functions for value in function["curve"]) or 1.0
        axes.text(0, top + 0.5 * _HEAD, name_layer(item), va="center", fontsize=8.5, color=INK)
        reach = f"height of a panel ±{scale:.2g}"
        axes.text(_COLUMNS - _GAP, top + 0.5 * _HEAD, reach, va="center", ha="right", fontsize=7.5, color=FAINT)
        top += _HEAD
        for start in range(0, len(functions), _COLUMNS):
            for column, function in enumerate(functions[start : start + _COLUMNS]):
                _draw_panel(axes, (float(column), top), function, colour, scale)
            top += _LABEL + _CURVE + _FOOT
    return figure


def _draw_panel(axes: Axes, corner: tuple[float, float], function: dict[str, Any], colour: str, scale: float) -> None:
    """Draw one function, less its mean over the inputs, in a panel whose upper left corner is given."""
    left, top = corner
    width, floor = 1 - _GAP, top + _LABEL + _CURVE
    middle = floor - _CURVE / 2
    _draw_histogram(axes, left, floor, width, function["histogram"])
    axes.plot([left, left + width], [middle, middle], color=RULE, linewidth=0.6)
    curve = function["curve"]
    xs = [left + width * index / (len(curve) - 1) for index in range(len(curve))]
    axes.plot(xs, [middle - 0.47 * _CURVE * value / scale for value in curve], color=colour, linewidth=1.4)
    text = f"{function['input']} → {function['output']}"
    axes.text(left, top + 0.5 * _LABEL, text, va="center", fontsize=8, color=INK)
    share = f"{100 * function['share']:.2g} %"
    axes.text(left + width, top + 0.5 * _LABEL, share, va="center", ha="right", fontsize=8, color=FAINT)
    for x, value, side in ((left, function["low"], "left"), (left + width, function["high"], "right")):
        told = f"{value:.2g}".replace("-", MINUS)
        axes.text(x, floor + 0.03, told, va="top", ha=side, fontsize=7, color=FAINT)


def _draw_histogram(axes: Axes, left: float, floor: float, width: float, counts: Sequence[int]) -> None:
    most = max(counts) or 1
    step = width / len(counts)
    xs = [left + step * place for index in range(len(counts)) for place in (index, index + 1)]
    tops = [floor - 0.9 * _CURVE * count / most for count in counts for _ in range(2)]
    axes.fill_between(xs, tops, floor, color=BAND, linewidth=0)
    axes.plot([left, left + width], [floor, floor], color=RULE, linewidth=0.6)
