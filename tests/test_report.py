import re
from xml.etree import ElementTree

import pytest
from studies import SyntheticStudy

from kallm.results.report import write_report
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
    text = " ".join(parse(page).itertext())
    _, _, table = filled
    assert f"kan and linear:  {table.contrasts[0].verdict}" in text
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
