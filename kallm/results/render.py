"""The table as text: markdown, CSV, LaTeX, and a rich table for the terminal. Pure functions of the table."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from kallm.results.digits import format_bytes, format_count, format_estimate, format_score
from kallm.results.schema import Column, Contrast, Counted, Hardware, Probe, Reference, Row, Table

__all__ = [
    "COSTS",
    "DAGGER",
    "NOTHING",
    "NOT_MEASURED",
    "describe_column",
    "render_csv",
    "render_latex",
    "render_markdown",
    "render_rich",
    "tell_seeds",
]

NOTHING = "–"
NOT_MEASURED = "not measured"
DAGGER = "†"
_SHORT = {"cross_entropy": "nats/token", "acc": "acc %", "acc_norm": "norm %", "parse_failures": "unread %"}
_MOST_COLUMNS = 4
_VERDICT_STYLES = {"different": "bold", "equivalent": "bold", "not distinguished": "", "no data": "dim"}


def describe_column(column: Column) -> str:
    """Return a column's heading on one line, with its unit and the better direction."""
    arrow = {"lower": " ↓", "higher": " ↑", None: ""}[column.better]
    unit = f" ({column.unit})" if column.unit and column.unit != column.title else ""
    return f"{column.suite}: {column.title}{unit}{arrow}"


def render_markdown(table: Table) -> str:
    """Return the whole table as GitHub markdown."""
    head = ["variant", "seeds", *map(describe_column, table.columns), *COSTS]
    lines = [f"# {table.name}", "", table.headline, "", _pipe(head), _pipe(["---", *["---:"] * (len(head) - 1)])]
    for row in table.rows:
        scores = [_tell_score(row, column) for column in table.columns]
        lines.append(_pipe([f"**{row.variant}**", tell_seeds(row), *scores, *(tell(row) for tell in COSTS.values())]))
    for reference in table.references:
        scores = [_tell_reference(reference, column) for column in table.columns]
        lines.append(_pipe([f"_{reference.name}_", "", *scores, *[""] * len(COSTS)]))
    lines += ["", "## Memory and speed of each variant alone", "", *_list_probes(table)]
    lines += ["", "## Contrasts", "", *_list_contrasts(table)]
    lines += ["", "## Notes", "", *(f"- {note}" for note in table.notes)]
    lines += ["", "## Cells", "", _pipe(["cell", "state", "", "commit", "device"]), _pipe(["---"] * 5)]
    for cell in table.cells:
        commit = (cell.commit or "")[:12] + ("+" if cell.dirty else "")
        lines.append(_pipe([f"`{cell.id}`", cell.state, cell.detail, commit, cell.device or ""]))
    return "\n".join(lines) + "\n"


def render_csv(table: Table) -> str:
    """Return one line per variant and reference, with unrounded figures; half an interval stands beside its mean."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    counts = ["trainable", "stored", "ffn", "tokens", "lr", "seconds", "seconds ±", "shared"]
    machines: Sequence[Hardware | None] = table.hardware or [None]  # one heading, measured or not
    alone = [f"alone.{label}.{name}" for label in map(_label, machines) for name in ("hardware", *_ALONE)]
    columns = [name for column in table.columns for name in (column.key, f"{column.key} ±")]
    writer.writerow(["kind", "name", "seeds_done", "seeds_planned", *columns, *counts, *alone])
    for row in table.rows:
        figures: list[object] = []
        for column in table.columns:
            found = row.scores.get(column.key)
            figures += [found.mean, found.half] if found else [None, None]
        sizes = [row.parameters.trainable, row.parameters.stored, row.parameters.ffn, row.tokens, row.lr]
        times = [row.seconds.mean, row.seconds.half] if row.seconds else [None, None]
        writer.writerow(
            [
                "variant",
                row.variant,
                row.seeds_done,
                row.seeds_planned,
                *figures,
                *sizes,
                *times,
                row.shared,
                *(figure for machine in machines for figure in _list_alone(row, machine)),
            ]
        )
    for reference in table.references:
        figures = []
        for column in table.columns:
            figures += [reference.scores.get(column.key), None]
        writer.writerow(["reference", reference.name, None, None, *figures, *[None] * len(counts + alone)])
    return out.getvalue()


def render_latex(table: Table) -> str:
    """Return the lead columns as a ``tabular`` for booktabs."""
    columns = [column for column in table.columns if column.lead]
    head = ["variant", "seeds", "trainable", *(f"{column.suite} {column.title} ({column.unit})" for column in columns)]
    lines = [f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", "\\toprule", _ampersand(head), "\\midrule"]
    for row in table.rows:
        scores = (_tell_score(row, column) for column in columns)
        lines.append(_ampersand([row.variant, tell_seeds(row), _count(row.parameters.trainable), *scores]))
    if table.references:
        lines.append("\\midrule")
    for reference in table.references:
        lines.append(_ampersand([reference.name, "", "", *(_tell_reference(reference, column) for column in columns)]))
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def render_rich(table: Table) -> RenderableType:
    """Return the first lead columns, the contrasts and the notes for a terminal of 100 columns or more."""
    several = len(table.hardware) > 1
    columns = [column for column in table.columns if column.lead][: _MOST_COLUMNS - several]
    grid = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    grid.add_column("variant", no_wrap=True)
    grid.add_column("seeds", justify="right", no_wrap=True)
    for column in columns:
        grid.add_column(_stack_heading(column), justify="right", no_wrap=True)
    for name in ("trains\n", "tok/s\nalone", "peak\nalone"):
        grid.add_column(name, justify="right", no_wrap=True)
    for row in table.rows:
        scores = (_tell_score(row, column) for column in columns)
        style = "" if row.seeds_done == row.seeds_planned else "yellow"
        seeds = Text(tell_seeds(row), style=style)
        alone = [_list_figures(row, tell, named=several) for tell in (_tell_speed, _tell_peak)]
        grid.add_row(
            row.variant,
            seeds,
            *scores,
            _count(row.parameters.trainable),
            *("\n".join(each) or NOTHING for each in alone),
        )
    for index, reference in enumerate(table.references):
        if index == 0:
            grid.add_section()
        scores = (_tell_reference(reference, column) for column in columns)
        grid.add_row(reference.name, "", *scores, "", "", "", style="dim")
    parts: list[RenderableType] = [Text(table.headline, style="bold"), Text(), grid]
    shown = [contrast for contrast in table.contrasts if contrast.role != "exploratory"]
    parts += [Text(_tell_contrast(contrast), style=_VERDICT_STYLES[contrast.verdict]) for contrast in shown]
    hidden = len(table.contrasts) - len(shown)
    if hidden:
        parts.append(Text(f"{hidden} exploratory contrasts stand in the report", style="dim"))
    parts += [Text(), *(Text(f"· {note}", style="dim") for note in table.notes)]
    return Group(*parts)


def _tell_score(row: Row, column: Column) -> str:
    found = row.scores.get(column.key)
    return format_estimate(found, column) if found else NOTHING


def _tell_reference(reference: Reference, column: Column) -> str:
    value = reference.scores.get(column.key)
    return "" if value is None else format_score(value, column)


def tell_seeds(row: Row) -> str:
    if not row.trained:
        return NOTHING if row.seeds_done else "missing"
    return f"{row.seeds_done}/{row.seeds_planned}"


def _list_figures(row: Row, tell: Callable[[Probe], str], *, named: bool = True) -> list[str]:
    """Return a figure of each of the variant's probes, with the letter of its hardware."""
    return [f"{tell(probe)} {probe.hardware}" if named else tell(probe) for probe in row.probes]


def _tell_alone(row: Row, tell: Callable[[Probe], str]) -> str:
    return ", ".join(_list_figures(row, tell)) or (NOT_MEASURED if row.trained else NOTHING)


def _tell_speed(probe: Probe) -> str:
    return f"{probe.tokens_per_s:,.0f}"


def _tell_peak(probe: Probe) -> str:
    return format_bytes(probe.peak_bytes)


def _tell_rate(row: Row) -> str:
    return NOTHING if row.lr is None else f"{row.lr:g}{' (chosen)' if row.choice else ''}"


def _count(count: int) -> str:
    return format_count(count) if count else "0"


COSTS: dict[str, Callable[[Row], str]] = {
    "trainable": lambda row: _count(row.parameters.trainable),
    "stored": lambda row: _count(row.parameters.stored),
    "FFN": lambda row: _count(row.parameters.ffn),
    "tokens": lambda row: _count(row.tokens),
    "learning rate": _tell_rate,
    "tok/s alone": lambda row: _tell_alone(row, _tell_speed),
    "peak memory alone": lambda row: _tell_alone(row, _tell_peak),
}

_ALONE: dict[str, Callable[[Probe], int | float | None]] = {
    "tokens_per_s": lambda probe: probe.tokens_per_s,
    "peak_bytes": lambda probe: probe.peak_bytes,
    "reserved_bytes": lambda probe: probe.reserved_bytes,
    "saved_bytes": lambda probe: probe.saved_bytes,
    "parameter_bytes": lambda probe: probe.counted.parameters,
    "gradient_bytes": lambda probe: probe.counted.gradients,
    "optimizer_bytes": lambda probe: probe.counted.optimizer,
    "activation_bytes": lambda probe: probe.counted.activations,
    "logit_bytes": lambda probe: probe.counted.logits,
}
_HEADINGS = ("tok/s", "peak", "reserved", "saved for backward", *(f"counted {name}" for name in Counted.model_fields))


def _label(machine: Hardware | None) -> str:
    return "A" if machine is None else machine.label


def _list_alone(row: Row, machine: Hardware | None) -> list[object]:
    found = [probe for probe in row.probes if machine is not None and probe.hardware == machine.label]
    if machine is None or not found:
        return [None] * (1 + len(_ALONE))
    return [machine.name, *(tell(found[0]) for tell in _ALONE.values())]


def _list_probes(table: Table) -> Iterable[str]:
    """Yield one line per variant and hardware: what was measured, beside the bytes that follow from sizes alone."""
    names = {machine.label: machine.name for machine in table.hardware}
    yield _pipe(["variant", "hardware", *_HEADINGS])
    yield _pipe(["---", "---", *["---:"] * len(_HEADINGS)])
    for row in table.rows:
        for probe in row.probes:
            bytes_ = [tell(probe) for name, tell in _ALONE.items() if name != "tokens_per_s"]
            sizes = [NOTHING if size is None else format_bytes(int(size)) for size in bytes_]
            yield _pipe([row.variant, f"{probe.hardware}: {names[probe.hardware]}", _tell_speed(probe), *sizes])
        if row.trained and not row.probes:
            yield _pipe([row.variant, NOT_MEASURED, *[""] * len(_HEADINGS)])


def _tell_contrast(contrast: Contrast) -> str:
    suite = contrast.column.partition(".")[0]
    return f"{suite}: {contrast.text}" if contrast.role == "secondary" else contrast.text


def _list_contrasts(table: Table) -> Iterable[str]:
    for contrast in table.contrasts:
        label = "" if contrast.role == "declared" else f" _({contrast.role})_"
        flags = f" [{'; '.join(contrast.flags)}]" if contrast.flags else ""
        yield f"- {_tell_contrast(contrast)}{label}{flags}"
    if not table.contrasts:
        yield "None."


def _stack_heading(column: Column) -> str:
    arrow = {"lower": " ↓", "higher": " ↑", None: ""}[column.better]
    return f"{column.suite}\n{_SHORT.get(column.score, column.title)}{arrow}"


def _pipe(fields: Iterable[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in fields) + " |"


def _ampersand(fields: Iterable[str]) -> str:
    marks = {"±": "$\\pm$", "−": "$-$", "–": "--", "%": "\\%", "_": "\\_", "&": "\\&", DAGGER: "$\\dagger$"}
    return " & ".join("".join(marks.get(letter, letter) for letter in text) for text in fields) + " \\\\"
