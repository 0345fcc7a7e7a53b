"""The report of a study: one self-contained HTML page, drawn from the table and the training records."""

from collections.abc import Iterable
from itertools import groupby

from kallm.report.figures import Sources, make_figures, make_learned
from kallm.report.learned import read_suite_items
from kallm.report.page import escape, make_page, make_section, make_table
from kallm.report.reach import Reach, find_reach
from kallm.results.digits import format_bytes, format_count, format_estimate, format_score
from kallm.results.record import StudyDocument, TrainingRecord, cell_key, read_record, study_key
from kallm.results.render import COSTS, NOTHING, tell_seeds
from kallm.results.schema import Cell, Column, Contrast, Row, Table
from kallm.results.table import build_table, put_changed, write_table
from kallm.store.store import Store

__all__ = ["render_report", "write_report", "write_results"]


def write_report(store: Store, document: StudyDocument, table: Table) -> str:
    """Write ``report.html`` beside ``study.json`` unless the same bytes are there; return its key."""
    found = {
        cell.id: read_record(store, TrainingRecord, cell_key(cell.id, "trained.json"))
        for cell in table.cells
        if cell_key(cell.id, "trained.json") in cell.records
    }
    sources = Sources(
        trainings={cell: record for cell, record in found.items() if record is not None},
        layers=read_suite_items(store, document, table, "edges"),
        conversations=read_suite_items(store, document, table, "retained"),
    )
    key = study_key(document.name, document.hash, "report.html")
    put_changed(store, key, render_report(document, table, sources).encode())
    return key


def write_results(store: Store, document: StudyDocument) -> tuple[Table, list[str]]:
    """Build a study's table from the records that the store holds now, and write it with its report.

    Returns:
        The table, and the keys of its files that changed.
    """
    table = build_table(store, document)
    changed = write_table(store, document, table)
    write_report(store, document, table)
    return table, changed


def render_report(document: StudyDocument, table: Table, sources: Sources) -> str:
    """Return the page: verdict, table, contrasts, figures, notes and receipts. A pure function of its arguments."""
    body = [
        _make_head(document, table),
        make_section("Scores", _make_scores(table), _make_footnote(table)),
        make_section("Contrasts", *_make_contrasts(table)),
        make_section("Parameters, time and memory", _make_costs(table), _make_cost_note(table)),
        make_section("Figures", make_figures(table, sources)),
        make_section("Tokens to reach a loss", *_make_reach(find_reach(table, sources.trainings))),
        make_section("What the edges learned", *make_learned(table, sources)),
        make_section("Notes", _make_list("notes", (escape(note) for note in table.notes))),
        make_section("Cells and receipts", _make_cells(table), _make_receipts(table)),
        f'<footer class="small">KALLM · study {escape(table.name)} · <code>{escape(table.hash)}</code></footer>',
    ]
    return make_page(f"{table.name}: KALLM", body)


def _make_head(document: StudyDocument, table: Table) -> str:
    study = document.study
    tail, seeds = study.get("tail"), study.get("seeds")
    facts = [f"<b>{escape(table.name)}</b>"]
    facts += [escape(str(study["model"]))] if study.get("model") else []
    facts += ["all blocks" if tail == "all" else f"last {tail} blocks"] if tail else []
    facts += [f"{len(seeds)} seeds"] if isinstance(seeds, list) and len(seeds) > 1 else []
    first = next((contrast for contrast in table.contrasts if contrast.role == "declared"), None)
    done = sum(cell.state == "done" for cell in table.cells)
    parts = [f"<h1>{' · '.join(facts)}</h1>"]
    if first is None:
        parts.append(f'<p class="verdict">{escape(table.headline)}</p>')
    else:
        names = f"<span>{escape(first.left)}</span> and <span>{escape(first.right)}:</span>"
        parts.append(f'<p class="verdict">{names} <em>{escape(first.verdict)}</em></p>')
        parts.append(f'<p class="lede">{escape(first.text)}.</p>')
    if study.get("description"):
        parts.append(f'<p class="lede">{escape(str(study["description"]))}</p>')
    if done < len(table.cells):
        counts = groupby(sorted(cell.state for cell in table.cells if cell.state != "done"))
        rest = ", ".join(f"{len(list(members))} {state}" for state, members in counts)
        parts.append(f'<p class="warning">{done} of {len(table.cells)} cells are done; {rest}.</p>')
    return f"<header>\n{chr(10).join(parts)}\n</header>"


def _make_scores(table: Table) -> str:
    groups = [(suite, list(columns)) for suite, columns in groupby(table.columns, key=lambda column: column.suite)]
    first = '<th rowspan="2" scope="col">variant</th><th rowspan="2" scope="col">seeds</th>'
    first += "".join(
        f'<th class="group" colspan="{len(columns)}" scope="colgroup"><span>{escape(suite)}</span></th>'
        for suite, columns in groups
    )
    second = "".join(f'<th scope="col">{_head_column(column)}</th>' for column in table.columns)
    rows = [f"<tr>{_make_row(table, row)}</tr>" for row in table.rows]
    for index, reference in enumerate(table.references):
        figures = [
            format_score(reference.scores[column.key], column) if column.key in reference.scores else ""
            for column in table.columns
        ]
        cells = "".join(f"<td>{text}</td>" for text in ["", *figures])
        kind = "reference first" if index == 0 else "reference"
        rows.append(f'<tr class="{kind}"><th scope="row">{escape(reference.name)}</th>{cells}</tr>')
    return make_table("scores by variant", [first, second] if second else [first], rows)


def _make_costs(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("variant", *COSTS))
    rows = []
    for row in table.rows:
        cells = "".join(f"<td>{escape(tell(row))}</td>" for tell in COSTS.values())
        rows.append(f'<tr><th scope="row">{escape(row.variant)}</th>{cells}</tr>')
    return make_table("parameters, time and memory by variant", [head], rows)


def _head_column(column: Column) -> str:
    arrow = {"lower": " ↓", "higher": " ↑", None: ""}[column.better]
    unit = f"<br/>{escape(column.unit)}" if column.unit and column.unit != column.title else ""
    return f"{escape(column.title)}{arrow}{unit}"


def _make_row(table: Table, row: Row) -> str:
    figures = []
    for column in table.columns:
        text = format_estimate(row.scores[column.key], column) if column.key in row.scores else NOTHING
        mean, sign, half = text.partition(" ± ")
        figures.append(f"{mean}<i>{sign}{half}</i>" if sign else mean)
    cells = "".join(f"<td>{text}</td>" for text in [tell_seeds(row), *figures])
    return f'<th scope="row">{escape(row.variant)}</th>{cells}'


def _make_footnote(table: Table) -> str:
    text = "± half of the 95 % interval over seeds; a figure without ± has one seed, or needs none."
    return f'<p class="small">{text}</p>' if table.columns else ""


def _make_cost_note(table: Table) -> str:
    notes = [f"{each.label}: alone on {each.name}." for each in table.hardware]
    if any(row.shared for row in table.rows):
        notes.append("† trunk shared with other cells, so not this cell's own time and memory.")
    return f'<p class="small">{escape(" ".join(notes))}</p>' if notes else ""


def _make_contrasts(table: Table) -> Iterable[str]:
    for role, label in (("declared", ""), ("secondary", "On the other suites"), ("exploratory", "Exploratory pairs")):
        members = [contrast for contrast in table.contrasts if contrast.role == role]
        if not members:
            continue
        entries = _make_list("contrasts", (_tell_contrast(contrast) for contrast in members))
        if role == "declared":
            yield entries
        else:
            yield f"<details><summary>{label} ({len(members)})</summary>{entries}</details>"


def _tell_contrast(contrast: Contrast) -> str:
    text = escape(contrast.text)
    start = f"{escape(contrast.left)} – {escape(contrast.right)}: "
    rest = text.removeprefix(start).removeprefix(escape(contrast.verdict))
    found = [f"{contrast.column.partition('.')[0]}"] if contrast.column else []
    if contrast.seeds:
        found.append(f"{len(contrast.seeds)} paired seed{'s' if len(contrast.seeds) > 1 else ''}")
    found += [f"{contrast.items:,} items"] if contrast.items else []
    found += [f"p {_tell_p(contrast.p)}"] if contrast.p is not None else []
    found += [f"equivalence p {_tell_p(contrast.p_equivalent)}"] if contrast.p_equivalent is not None else []
    found += [f"sign-flip p over items {_tell_p(contrast.p_items)}"] if contrast.p_items is not None else []
    small = escape(" · ".join([*found, *contrast.flags]))
    return f'{start}<span class="word">{escape(contrast.verdict)}</span>{rest}<small>{small}</small>'


def _tell_p(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _make_reach(reach: Reach | None) -> Iterable[str]:
    if reach is None:
        return
    levels = [f"{level:.{reach.decimals}f}" for level in reach.levels]
    head = '<th scope="col">variant</th>' + "".join(f'<th scope="col">{level}</th>' for level in levels)
    rows = []
    for variant, found in reach.tokens.items():
        cells = "".join(f"<td>{_tell_reach(*each, reach.seeds[variant])}</td>" for each in found)
        rows.append(f'<tr><th scope="row">{escape(variant)}</th>{cells}</tr>')
    yield make_table("tokens to reach a training loss, by variant", [head], rows)
    who = "the control of the first contrast" if reach.is_control else "which ends lowest"
    note = (
        "Tokens trained on until the training loss, in nats per token and smoothed over a twentieth of the training, "
        "first comes down to each level; mean over the seeds that reach it. The levels are where "
        f"{reach.pacer}, {who}, stands after 10, 25, 50, 75 and 100 % of its training."
    )
    yield f'<p class="small">{escape(note)}</p>'


def _tell_reach(tokens: float | None, reached: int, seeds: int) -> str:
    if tokens is None:
        return "<i>not reached</i>"
    some = f" <i>{reached} of {seeds} seeds</i>" if reached < seeds else ""
    return format_count(round(tokens)) + some


def _make_list(kind: str, entries: Iterable[str]) -> str:
    items = "\n".join(f"<li>{entry}</li>" for entry in entries)
    return f'<ul class="{kind}">\n{items}\n</ul>' if items else ""


def _make_cells(table: Table) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in ("cell", "state", "", "tokens/s", "peak", "precision"))
    return make_table("cells", [head], (f"<tr>{_make_cell(cell)}</tr>" for cell in table.cells))


def _make_cell(cell: Cell) -> str:
    name = cell.variant if cell.seed is None else f"{cell.variant}, seed {cell.seed}"
    speed = format_count(round(cell.tokens_per_s)) if cell.tokens_per_s else ""
    peak = format_bytes(cell.peak_bytes) if cell.peak_bytes else ""
    return (
        f'<th scope="row">{escape(name)}</th><td class="left state-{cell.state}">{cell.state}</td>'
        f'<td class="words">{escape(cell.detail)}</td><td>{speed}</td><td>{peak}</td>'
        f"<td>{escape(cell.precision or '')}</td>"
    )


def _make_receipts(table: Table) -> str:
    entries = []
    for cell in table.cells:
        if not cell.records:
            continue
        code = (cell.commit or "no commit")[:12] + (" with uncommitted changes" if cell.dirty else "")
        made = " · ".join(part for part in (code, cell.image, cell.device, cell.processor, cell.precision) if part)
        weights = f"<br/>weights <code>{escape(cell.weights)}</code>" if cell.weights else ""
        hashes = "".join(
            f"<br/><code>{escape(key)}</code> <code>{digest}</code>" for key, digest in cell.records.items()
        )
        entries.append(f'<li class="small">{escape(cell.id)}: {escape(made)}{weights}{hashes}</li>')
    if not entries:
        return ""
    listed = "\n".join(entries)
    title = "Receipts: code, hardware, SHA-256 of every record"
    return f'<details><summary>{title}</summary><ul class="contrasts hashes">\n{listed}\n</ul></details>'
