"""One cell's functions as a file of their own: a page, an SVG, or a PNG."""

import io
import re
from collections.abc import Callable

from kallm.report.drawing import COLOURS, paint_
from kallm.report.figures import make_layers
from kallm.report.learned import EDGES_NOTE, make_ranking
from kallm.report.page import COLOURS as CSS
from kallm.report.page import escape, make_page
from kallm.report.panels import draw_functions, plot_functions
from kallm.results.record import Items

__all__ = ["FORMATS"]

_COLOUR = COLOURS[1]
_DOTS_PER_INCH = 200


def _render_html(name: str, items: Items) -> bytes:
    """Return a page with what each layer's edges explain, and the functions."""
    body = [
        f"<header>\n<h1><b>{escape(name)}</b> · what the edges learned</h1>\n</header>",
        f'<p class="small">{escape(EDGES_NOTE)}</p>',
        make_ranking(f"what the edges of {name} explain", [items]),
        make_layers(name, items, _COLOUR, most=_count(items)),
    ]
    return make_page(f"{name}: KALLM", body).encode()


def _render_svg(name: str, items: Items) -> bytes:
    """Return a drawing that brings the page's colours along."""
    text = _plot(name, items)
    end = text.index(">") + 1
    return (text[:end] + f"<style>{CSS}</style>" + text[end:] + "\n").encode()


def _render_png(name: str, items: Items) -> bytes:
    """Return a picture in the page's colours on light ground."""
    colours = dict(re.findall(r"(--\w+):(#\w+)", CSS[: CSS.index("@media")]))
    figure = draw_functions(items, _COLOUR, most=_count(items))
    paint_(figure, colours)
    out = io.BytesIO()
    figure.savefig(
        out, format="png", dpi=_DOTS_PER_INCH, facecolor=colours["--paper"], bbox_inches="tight", pad_inches=0.15,
        metadata={"Software": None},
    )  # fmt: skip
    return out.getvalue()


def _plot(name: str, items: Items) -> str:
    return plot_functions(name, items, _COLOUR, most=_count(items))


def _count(items: Items) -> int:
    return max(len(item["functions"]) for item in items)


FORMATS: dict[str, Callable[[str, Items], bytes]] = {".html": _render_html, ".png": _render_png, ".svg": _render_svg}
"""By a file's suffix: from a cell's name and the layers that the suite ``edges`` describes."""
