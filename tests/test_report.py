import hashlib
import re
from xml.etree import ElementTree

import pytest
from studies import SyntheticStudy

from kallm.report.report import write_report
from kallm.results.record import Score, evaluation_key, study_key, write_items
from kallm.results.table import build_table
from kallm.store.local import FolderStore

STUDY = SyntheticStudy(variants=("baseline", "kan", "linear"), contrasts=(("kan", "linear"),), num_items=12)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    store = FolderStore(tmp_path_factory.mktemp("store"))
    document = STUDY.fill(store)
    return store, document, build_table(store, document)


@pytest.fixture(scope="module")
def page(filled):
    return filled[0].get(write_report(*filled)).decode()


LAYERS = [
    {
        "id": f"model.layers.{block}.mlp.layers.{layer}",
        "inputs": 12,
        "outputs": 8,
        "rows": 100,
        "explained": {"lines": 0.7, "degrees": [0.8, 1.0], "strongest_1": -0.001, "strongest_10": 0.4},
        "functions": [
            {
                "output": rank,
                "input": 3 * rank,
                "variance": 0.1,
                "share": 0.05,
                "low": -1.5,
                "high": 2.0,
                "curve": [(x - 32) ** 2 / 1000 - 0.3 for x in range(65)],
                "histogram": [16 - abs(x - 16) for x in range(32)],
            }
            for rank in range(4)
        ],
    }
    for block in (28, 29)
    for layer in (0, 1)
]


def add_layers(study, store):
    """Fill a store, and let the suites ``edges`` and ``retained`` leave what they leave."""
    for entry in study.document.cells:
        if entry.trained:
            study.train(store, entry)
        for suite in study.suites:
            if suite == "heldout":
                study.evaluate(store, entry, suite)
            else:
                kan = suite == "edges" and entry.variant.startswith("kan")
                texts = [{"id": f"c{n}", "kl": 0.1 * n * entry.trained, "tokens": 10} for n in range(8)]
                put(study, store, entry, suite, texts if suite == "retained" else LAYERS if kan else [])
    put_study(study, store)


def put_study(study, store):
    store.put(study_key(study.name, study.document.hash, "study.json"), study.document.to_bytes())


def put(study, store, entry, suite, items):
    """Write an evaluation record of one of these suites."""
    scores = {}
    if suite == "retained":
        mean = sum(item["kl"] for item in items) / sum(item["tokens"] for item in items)
        scores = {name: Score(value=mean, unit="nats/token", n=80) for name in ("kl", "kl_spread")}
    elif items:
        scores = {name: Score(value=70.0, unit="%", n=100) for name in ("lines", "strongest_1", "strongest_10")}
    record = study.evaluate(store, entry, "heldout")
    data, suite_id = write_items(items), f"{suite}.{'5' * 12}"
    key = evaluation_key(entry.id, suite_id).replace(".json", ".items.jsonl.gz")
    store.put(key, data)
    told = {"key": key, "sha256": hashlib.sha256(data).hexdigest(), "count": len(items)}
    changed = record.model_copy(update={"suite": suite_id, "scores": scores, "tasks": {}, "items": told})
    store.put(evaluation_key(entry.id, suite_id), changed.to_bytes())


def parse(page):
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def test_the_page_is_well_formed_and_its_ids_are_unique(page):
    ids = [node.get("id") for node in parse(page).iter() if node.get("id")]
    assert len(ids) == len(set(ids))


def test_the_page_loads_nothing(page):
    for node in parse(page).iter():
        for name, value in node.attrib.items():
            if name.rpartition("}")[2] in ("src", "href"):
                assert value.startswith("#")
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert "<script" not in page


def test_every_figure_has_a_label_and_follows_the_pages_colours(page):
    figures = [node for node in parse(page).iter() if node.tag.endswith("svg")]
    assert len(figures) == 10
    assert all(figure.get("role") == "img" and figure.get("aria-label") for figure in figures)
    assert not re.findall(r"#0[0-9a-f]0[0-9a-f]{3}\b", page)


def test_the_page_tells_the_verdict_and_every_cell(page, filled):
    text = " ".join(" ".join(parse(page).itertext()).split())
    _, _, table = filled
    assert f"kan and linear: {table.contrasts[0].verdict}" in text
    assert all(cell.id in text for cell in table.cells)
    assert all(digest in text for cell in table.cells for digest in cell.records.values())


def test_the_second_report_changes_no_byte(page, filled):
    store, document, _ = filled
    before = {entry.key: entry.modified for entry in store.list()}
    write_report(store, document, build_table(store, document))
    assert {entry.key: entry.modified for entry in store.list()} == before


def test_an_empty_study_still_has_a_page(tmp_path):
    store = FolderStore(tmp_path)
    page = store.get(write_report(store, STUDY.document, build_table(store, STUDY.document))).decode()
    assert "0 of 7 cells are done; 7 missing." in " ".join(parse(page).itertext())


def test_names_cannot_break_the_page(tmp_path):
    store = FolderStore(tmp_path)
    study = SyntheticStudy(variants=("kan",), suites=("heldout",), contrasts=(), notes=("<b>&</b> $x$",))
    page = store.get(write_report(store, study.document, build_table(store, study.fill(store)))).decode()
    assert "&lt;b&gt;&amp;&lt;/b&gt; $x$" in page
    parse(page)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    store = FolderStore(tmp_path_factory.mktemp("learned"))
    study = SyntheticStudy(
        variants=("baseline", "kan", "linear"), suites=("heldout", "edges", "retained"), seeds=(0, 1)
    )
    add_layers(study, store)
    return store.get(write_report(store, study.document, build_table(store, study.document))).decode()


def test_the_edges_are_drawn_and_ranked(learned):
    text = " ".join(parse(learned).itertext())
    assert "What the edges learned" in text
    assert "kan, seed 0, the strongest functions" in text
    for told in ("block 28, layer 1", "block 29, layer 2", "3 → 1", "straight lines", "up to 2", "70.0 %", "−0.1 %"):
        assert told in text
    assert "9 → 3" not in text  # the fourth function is left to kallm inspect
    labels = [node.get("aria-label", "") for node in parse(learned).iter() if node.tag.endswith("svg")]
    drawn = [label for label in labels if label.startswith("The strongest functions of kan, seed 0: ")]
    assert len(drawn) == len(LAYERS)
    assert "block 29, layer 2, straight lines explain 70.0 %, strongest 0 to 0 5.0 %" in drawn[-1]
    ids = [node.get("id") for node in parse(learned).iter() if node.get("id")]
    assert len(ids) == len(set(ids))


def test_retained_ability_and_tokens_to_a_loss_are_shown(learned):
    labels = [node.get("aria-label", "") for node in parse(learned).iter()]
    assert any(label.startswith("Divergence from the original model on held-out text: baseline 0") for label in labels)
    assert any(label == "tokens to reach a training loss, by variant" for label in labels)
    assert "its training" in " ".join(parse(learned).itertext())


def test_a_report_without_these_suites_has_no_such_sections(page):
    assert "What the edges learned" not in page
    assert "Retained ability" not in page
