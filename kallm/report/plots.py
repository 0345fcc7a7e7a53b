"""The figures of the report: each a function from the table to inline SVG, or None where there is nothing to draw."""

from collections.abc import Mapping

import matplotlib as mpl

from kallm.report.drawing import (
    BAND,
    FAINT,
    INK,
    RULE,
    STYLE,
    describe,
    draw_estimate,
    draw_references,
    find_colour,
    find_marker,
    finish,
    limit,
    make_axes,
    write_names,
)
from kallm.results.digits import format_estimate
from kallm.results.record import Items, TrainingRecord
from kallm.results.schema import Column, Contrast, Table
from kallm.results.statistics import find_wilson

__all__ = [
    "plot_contrasts",
    "plot_curves",
    "plot_memory",
    "plot_parameters",
    "plot_replies",
    "plot_retained",
    "plot_scores",
    "plot_tasks",
    "plot_times",
]

_MOST_INTERVALS = 5


@mpl.rc_context(STYLE)
def plot_contrasts(table: Table) -> str | None:
    """Draw the paired differences on the primary suite with their intervals, over the band of the declared margin.

    Exploratory pairs with an untrained variant are left to the text; a hollow dot is not distinguished.
    """
    shown = _choose_contrasts(table)
    if not shown:
        return None
    figure, axes = make_axes(len(shown))
    if shown[0].margin is not None:
        axes.axvspan(-shown[0].margin, shown[0].margin, color=BAND, linewidth=0)
    axes.axvline(0, color=FAINT, linewidth=0.8)
    limit(axes, [(each.difference or 0.0, each.half or 0.0) for each in shown], keep=(shown[0].margin or 0.0,))
    for place, each in enumerate(shown):
        colour = INK if each.role == "declared" else FAINT
        fill = "none" if each.verdict == "not distinguished" else colour
        axes.errorbar(
            [each.difference or 0.0],
            [place],
            xerr=[each.half] if each.half else None,
            fmt="o",
            color=colour,
            markerfacecolor=fill,
            markersize=5,
            linewidth=1.3,
        )
    axes.set_yticks(range(len(shown)), [f"{each.left} – {each.right}" for each in shown])
    for label, each in zip(axes.get_yticklabels(), shown, strict=True):
        label.set_color(INK if each.role == "declared" else FAINT)
    axes.set_xlabel(f"difference, {shown[0].unit}")
    return finish(figure, "contrasts", describe("Paired differences with 95 % intervals", (c.text for c in shown)))


@mpl.rc_context(STYLE)
def plot_scores(table: Table, column: Column) -> str | None:
    """Draw one score of every variant with its interval and its seeds, and the marks of the references."""
    rows = [row for row in table.rows if column.key in row.scores]
    if not rows:
        return None
    scale = 100.0 if column.percent else 1.0
    figure, axes = make_axes(len(rows))
    references = [each for each in table.references if column.key in each.scores and each.name != "empty reply"]
    estimates = [row.scores[column.key] for row in rows]
    spans = [(scale * each.mean, scale * (each.half or 0.0)) for each in estimates]
    limit(axes, spans, keep=[scale * each.scores[column.key] for each in references])
    for place, (row, found) in enumerate(zip(rows, estimates, strict=True)):
        draw_estimate(axes, place, found, find_colour(table, row.variant), scale)
    draw_references(axes, references, column.key, scale)
    axes.set_yticks(range(len(rows)), [row.variant for row in rows])
    axes.set_xlabel(f"{column.title}, {column.unit}" if column.unit else column.title)
    told = (f"{row.variant} {format_estimate(row.scores[column.key], column)}" for row in rows)
    return finish(figure, f"score {column.key}", describe(f"{column.suite}, {column.title} by variant", told))


@mpl.rc_context(STYLE)
def plot_curves(table: Table, trainings: Mapping[str, TrainingRecord]) -> str | None:
    """Draw the training loss over steps: every seed thin, the mean over seeds on top; the first fifth may be cut."""
    histories: dict[str, list[dict[int, float]]] = {}
    for cell in table.cells:
        if cell.id in trainings and trainings[cell.id].loss_history:
            histories.setdefault(cell.variant, []).append(dict(trainings[cell.id].loss_history))
    if not histories:
        return None
    figure, axes = make_axes(11, listed=False)
    late = []
    for variant, seeds in histories.items():
        colour = find_colour(table, variant)
        for history in seeds:
            axes.plot([*history], [*history.values()], color=colour, linewidth=0.6, alpha=0.35)
            late += [loss for step, loss in history.items() if step > 0.2 * max(history)]
        steps = sorted(set.intersection(*map(set, seeds)))
        means = [sum(history[step] for history in seeds) / len(seeds) for step in steps]
        axes.plot(steps, means, color=colour, linewidth=1.6, label=variant)
    if late and max(late) > min(late):
        pad = 0.06 * (max(late) - min(late))
        axes.set_ylim(min(late) - pad, max(late) + pad)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("training loss, nats/token")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, handlelength=1.4)
    return finish(figure, "curves", describe("Training loss over optimiser steps, by variant", histories))


def plot_parameters(table: Table, column: Column) -> str | None:
    """Draw a score against the trainable parameters; names stand beside their dots."""
    sizes = {row.variant: row.parameters.trainable / 1e6 for row in table.rows if row.trained}
    return _plot_sizes(table, column, sizes, "parameters", "trainable parameters, millions")


def plot_memory(table: Table, column: Column) -> str | None:
    """Draw a score against the peak memory of a variant's training alone, on the hardware that measured most."""
    counts = [
        sum(probe.hardware == each.label for row in table.rows for probe in row.probes) for each in table.hardware
    ]
    if not counts:
        return None
    chosen = table.hardware[counts.index(max(counts))].label
    probes = [(row, probe) for row in table.rows for probe in row.probes if probe.hardware == chosen and row.trained]
    sizes = {row.variant: probe.peak_bytes / 2**30 for row, probe in probes}
    return _plot_sizes(table, column, sizes, "memory", "peak memory of training alone, GiB")


@mpl.rc_context(STYLE)
def _plot_sizes(table: Table, column: Column, sizes: Mapping[str, float], name: str, label: str) -> str | None:
    rows = [row for row in table.rows if row.variant in sizes and column.key in row.scores]
    if not rows:
        return None
    scale = 100.0 if column.percent else 1.0
    figure, axes = make_axes(11, listed=False)
    points = [(sizes[row.variant], scale * row.scores[column.key].mean, row.variant) for row in rows]
    for row, (x, y, variant) in zip(rows, points, strict=True):
        colour, half = find_colour(table, variant), row.scores[column.key].half
        if half:
            axes.plot([x, x], [y - scale * half, y + scale * half], color=colour, linewidth=1, alpha=0.7)
        axes.plot([x], [y], find_marker(table, variant), color=colour, markersize=5.5)
    axes.margins(x=0.08, y=0.1)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.36 * (high - low))
    write_names(axes, points, [find_colour(table, variant) for _, _, variant in points])
    axes.set_xlabel(label)
    axes.set_ylabel(f"{column.title}, {column.unit}" if column.unit else column.title)
    told = (
        f"{row.variant} {x:.4g}, {format_estimate(row.scores[column.key], column)}"
        for row, (x, _, _) in zip(rows, points, strict=True)
    )
    return finish(figure, name, describe(f"{column.title} against {label}", told))


@mpl.rc_context(STYLE)
def plot_retained(table: Table, column: Column, conversations: Mapping[str, Items]) -> str | None:
    """Draw the divergence from the original model: a stroke for each conversation (mean over seeds), a dot for all.

    Args:
        table: has the means.
        column: the divergence.
        conversations: by cell id, with ``id``, ``kl`` and ``tokens``.
    """
    rows = [row for row in table.rows if column.key in row.scores]
    if not rows:
        return None
    figure, axes = make_axes(len(rows))
    for place, row in enumerate(rows):
        colour, found = find_colour(table, row.variant), row.scores[column.key]
        members = [
            conversations[cell.id] for cell in table.cells if cell.variant == row.variant and cell.id in conversations
        ]
        means = [sum(item["kl"] / item["tokens"] for item in each) / len(each) for each in zip(*members, strict=True)]
        axes.plot(means, [place] * len(means), "|", color=colour, markersize=9, markeredgewidth=0.8, alpha=0.55)
        axes.plot([found.mean], [place], "o", color=colour, markersize=5.5)
    axes.set_xlim(left=-0.02 * axes.get_xlim()[1])  # a dot at zero is whole
    axes.set_yticks(range(len(rows)), [row.variant for row in rows])
    axes.set_xlabel("KL to the original model, nats/token")
    told = (f"{row.variant} {format_estimate(row.scores[column.key], column)}" for row in rows)
    return finish(figure, "retained", describe("Divergence from the original model on held-out text", told))


@mpl.rc_context(STYLE)
def plot_tasks(table: Table, column: Column) -> str | None:
    """Draw a score task by task, with Wilson's interval where few variants leave room, and a tick for chance."""
    rows = [row for row in table.rows if row.tasks.get(column.key)]
    if not rows or not column.percent:
        return None
    tasks = sorted({task for row in rows for task in row.tasks[column.key]})
    figure, axes = make_axes(len(tasks), row_height=0.32, extra=1.1)
    axes.hlines([place + 0.5 for place in range(len(tasks) - 1)], -2, 102, color=RULE, linewidth=0.5)
    chance = next((each.tasks.get(column.key, {}) for each in table.references if each.name == "chance"), {})
    ticks = [(100 * chance[task], place) for place, task in enumerate(tasks) if task in chance]
    for x, place in ticks:
        axes.plot([x, x], [place - 0.36, place + 0.36], color=FAINT, linewidth=1.4, zorder=1)
    for index, row in enumerate(rows):
        shift = 0.64 * ((index + 0.5) / len(rows) - 0.5)
        colour, found = find_colour(table, row.variant), row.tasks[column.key]
        points = [(found[task], place + shift) for place, task in enumerate(tasks) if task in found]
        for each, height in points:
            if len(rows) <= _MOST_INTERVALS and each.items:
                low, high = find_wilson(each.mean, each.items)
                axes.plot([100 * low, 100 * high], [height, height], color=colour, linewidth=0.7, alpha=0.55)
        marks = [100 * each.mean for each, _ in points], [height for _, height in points]
        axes.plot(*marks, find_marker(table, row.variant), color=colour, markersize=3.4, label=row.variant)
    axes.set_xlim(-2, 102)
    axes.set_yticks(range(len(tasks)), [task.replace("_", " ") for task in tasks], fontsize=7.5)
    axes.set_xlabel(f"{column.title}, %; upright: chance" if ticks else f"{column.title}, %")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, handletextpad=0.2)
    return finish(figure, f"tasks {column.key}", describe(f"{column.suite}, {column.title} task by task", tasks))


@mpl.rc_context(STYLE)
def plot_replies(table: Table, suite: str) -> str | None:
    """Draw the shares of replies that could not be read, or were empty."""
    rows = [row for row in table.rows if suite in row.replies]
    if not rows:
        return None
    figure, axes = make_axes(len(rows), extra=1.0)
    for place, row in enumerate(rows):
        unparsed, empty = (100 * row.replies[suite].get(kind, 0.0) for kind in ("unparsed", "empty"))
        labels = ("no answer found", "empty") if place == 0 else (None, None)
        axes.barh(place, unparsed, height=0.45, color=FAINT, label=labels[0])
        axes.barh(place, empty, left=unparsed, height=0.45, color=RULE, label=labels[1])
        end = (unparsed + empty, place)
        axes.annotate(f"{end[0]:.1f}", end, (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.variant for row in rows])
    axes.margins(x=0.12)
    axes.set_xlabel("share of replies, %")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, handlelength=1)
    told = (f"{row.variant} {100 - 100 * row.replies[suite].get('parsed', 0.0):.1f} %" for row in rows)
    return finish(figure, f"replies {suite}", describe("Replies without a readable answer", told))


@mpl.rc_context(STYLE)
def plot_times(table: Table) -> str | None:
    """Draw the training time of a cell, from zero: mean, interval and seeds."""
    found = [(row, row.seconds) for row in table.rows if row.seconds is not None]
    if not found:
        return None
    figure, axes = make_axes(len(found))
    axes.set_xlim(0, max(each.mean + (each.half or 0.0) for _, each in found) / 60 * 1.06 or 1)
    for place, (row, each) in enumerate(found):
        draw_estimate(axes, place, each, find_colour(table, row.variant), 1 / 60)
    axes.set_yticks(range(len(found)), [row.variant + (" †" if row.shared else "") for row, _ in found])
    axes.set_xlabel("training time of a cell, minutes")
    told = (f"{row.variant} {each.mean / 60:.1f} minutes" for row, each in found)
    return finish(figure, "times", describe("Training time of a cell", told))


def _choose_contrasts(table: Table) -> list[Contrast]:
    untrained = {row.variant for row in table.rows if not row.trained}
    known = [each for each in table.contrasts if each.role != "secondary" and each.difference is not None]
    return [each for each in known if each.role == "declared" or not {each.left, each.right} & untrained]
