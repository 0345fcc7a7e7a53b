"""What the edges of each cell's KAN layers learned, as the suite ``edges`` left it: read from the store, and as words.

An item is one layer; see ``kallm.evaluate.edges``. Matplotlib is not imported here.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kallm.report.page import escape, make_table
from kallm.results.digits import MINUS
from kallm.results.record import EvaluationRecord, Items, StudyDocument, evaluation_key, read_items, read_record
from kallm.results.schema import Table
from kallm.store.store import Store

__all__ = ["EDGES_NOTE", "make_ranking", "name_layer", "read_suite_items", "tell_learned"]

EDGES_NOTE = (
    "Shares of the variance of a layer's output on held-out text, mean over seeds: what is explained where every edge "
    "keeps only its best straight line in the input, or its best polynomial in the squashed input up to a degree, and "
    "where only the edges with the strongest contributions are left."
)


def read_suite_items(store: Store, document: StudyDocument, table: Table, name: str) -> dict[str, Items]:
    """Return the items that the suites of one name left, by cell id, in the table's order; empty ones are left out.

    Raises:
        DataMismatch: items are missing or damaged.
    """
    found: dict[str, Items] = {}
    for cell in table.cells:
        for suite in (suite for suite in document.suites if suite.name == name):
            key = evaluation_key(cell.id, suite.id)
            record = read_record(store, EvaluationRecord, key) if key in cell.records else None
            items = read_items(store, record) if record is not None and record.items else []
            if items:
                found[cell.id] = items
    return found


def name_layer(item: Mapping[str, Any]) -> str:
    """Return a layer's name in words: ``block 25, layer 1``."""
    numbers = re.findall(r"\.(\d+)(?=\.|$)", f".{item['id']}")
    return f"block {numbers[0]}, layer {int(numbers[-1]) + 1}" if len(numbers) == 2 else str(item["id"])


def make_ranking(label: str, cells: Sequence[Items]) -> str:
    """Return a table of what the parts of each layer explain, from the items of a variant's seeds."""
    num_degrees = max(len(item["explained"]["degrees"]) for items in cells for item in items)
    degrees = ["degree 1", *(f"up to {degree}" for degree in range(2, num_degrees + 1))]
    names = ["layer", "edges", "straight lines", *degrees, "strongest 1 %", "strongest 10 %"]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = []
    for layer in zip(*cells, strict=True):
        told = [item["explained"] for item in layer]
        cumulative = [[*each["degrees"], *[each["degrees"][-1]] * num_degrees][:num_degrees] for each in told]
        shares = [
            [each["lines"], *own, each["strongest_1"], each["strongest_10"]]
            for each, own in zip(told, cumulative, strict=True)
        ]
        means = [sum(column) / len(column) for column in zip(*shares, strict=True)]
        figures = [f"{layer[0]['inputs'] * layer[0]['outputs']:,}", *map(_tell_share, means)]
        cells_of_row = "".join(f"<td>{figure}</td>" for figure in figures)
        rows.append(f'<tr><th scope="row">{escape(name_layer(layer[0]))}</th>{cells_of_row}</tr>')
    return make_table(label, [head], rows)


def tell_learned(items: Items, most: int) -> Iterable[str]:
    """Yield one sentence per layer for whoever cannot see its functions."""
    for item in items:
        edges = (f"{f['input']} to {f['output']} {_tell_share(f['share'])}" for f in item["functions"][:most])
        lines = f"straight lines explain {_tell_share(item['explained']['lines'])}"
        yield f"{name_layer(item)}, {lines}, strongest {', '.join(edges)}"


def _tell_share(share: float) -> str:
    text = f"{abs(100 * share):.1f}"
    return f"{MINUS if share < 0 and text != '0.0' else ''}{text} %"
