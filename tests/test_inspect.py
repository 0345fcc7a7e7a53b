"""``kallm inspect``: the functions of one cell, from the suite's record or from the weights."""

import json
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
import pytest
from click.testing import Result
from finished_study import Finished, contents
from studies import SyntheticStudy
from test_report import LAYERS, add_layers
from typer.testing import CliRunner

from kallm.cli import app
from kallm.errors import WrongConfiguration
from kallm.options import find_plan
from kallm.progress import Reporter, Stop
from kallm.report.report import write_results
from kallm.results.record import EvaluationRecord, Items, evaluation_key, read_items, read_record
from kallm.run.inspection import describe_cell
from kallm.run.local import run_cells
from kallm.store.local import FolderStore
from kallm.study.plan import make_plan
from kallm.study.study import read_study

pytest_plugins = ["finished"]


def kallm(*arguments: str, folder: Path) -> Result:
    """Call the program on a store."""
    return CliRunner().invoke(app, [*arguments, "--store", str(folder)])


@pytest.mark.parametrize("suffix", ["html", "svg", "png"])
def test_the_drawing_is_of_the_kind_that_its_name_says(suffix: str, finished: Finished, tmp_path: Path) -> None:
    out, before = tmp_path / f"functions.{suffix}", contents(finished.folder)
    done = kallm("inspect", "small-kan", "--out", str(out), folder=finished.folder)
    assert done.exit_code == 0, done.output
    assert contents(finished.folder) == before
    if suffix == "png":
        height, width, _ = matplotlib.image.imread(out).shape
        assert width > 800
        assert height > 300
        return
    text = out.read_text()
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert "block 4, layer 2" in " ".join(root.itertext())
    assert "--paper" in text
    again = tmp_path / f"again.{suffix}"
    assert kallm("inspect", "small-kan", "--out", str(again), folder=finished.folder).exit_code == 0
    assert again.read_bytes() == out.read_bytes()


def test_a_page_beside_the_cell_is_the_default(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cell = finished.document.cells[2].id
    assert kallm("inspect", cell, folder=finished.folder).exit_code == 0
    assert (tmp_path / f"{cell}.html").read_text().startswith("<!DOCTYPE html>")


def test_the_suite_leaves_what_the_weights_give(finished: Finished) -> None:
    store = finished.store
    plan = find_plan(store, f"{finished.document.name}.{finished.document.hash}")
    kan = next(cell for cell in plan.cells if cell.name == "small-kan")
    settings = {name: value for name, value in plan.document.study.items() if name != "sources"}
    settings |= {"suites": ["heldout", "edges", "retained"]}
    wider = make_plan(read_study(json.dumps(settings, indent=1)))
    with Reporter(quiet=True) as reporter:
        run_cells(wider, list(wider.cells), store, reporter, Stop())
    table, _ = write_results(store, wider.document)
    (suite,) = (each for each in wider.suites if each.startswith("edges."))
    record = read_record(store, EvaluationRecord, evaluation_key(kan.id, suite))
    assert record is not None
    assert_close(read_items(store, record), describe_cell(plan, kan, store))
    rows = {row.variant: row.scores for row in table.rows}
    assert rows["baseline"]["retained.kl"].mean == 0
    assert rows["small-kan"]["retained.kl"].mean > 0
    assert "edges.lines" in rows["small-kan"]
    assert "edges.lines" not in rows["linear"]


def assert_close(left: Items, right: Items) -> None:
    """Compare all but single edges of nearly equal strength, whose order rounding may turn."""
    assert [item["id"] for item in left] == [item["id"] for item in right]
    for one, two in zip(left, right, strict=True):
        assert one["explained"]["lines"] == pytest.approx(two["explained"]["lines"], abs=1e-3)
        assert one["explained"]["degrees"] == pytest.approx(two["explained"]["degrees"], abs=1e-3)
        ours, theirs = ([f["variance"] for f in item["functions"]] for item in (one, two))
        assert ours == pytest.approx(theirs, rel=1e-2)


def test_what_the_suite_left_is_drawn_without_weights(tmp_path: Path) -> None:
    study = SyntheticStudy(variants=("baseline", "kan"), seeds=(0,), suites=("heldout", "edges"), contrasts=())
    store = FolderStore(tmp_path / "store")
    add_layers(study, store)
    done = kallm("inspect", "kan", "--out", str(tmp_path / "kan.svg"), folder=tmp_path / "store")
    assert done.exit_code == 0, done.output
    drawn = (tmp_path / "kan.svg").read_text()
    for function in LAYERS[0]["functions"]:
        assert f"{function['input']} → {function['output']}" in drawn


@pytest.mark.parametrize("cell", ["linear", "baseline"])
def test_a_cell_without_kan_layers_is_refused(cell: str, finished: Finished) -> None:
    done = kallm("inspect", cell, folder=finished.folder)
    assert isinstance(done.exception, WrongConfiguration)
    assert "has no KAN layers" in str(done.exception)


def test_a_file_of_another_kind_is_refused(finished: Finished, tmp_path: Path) -> None:
    done = kallm("inspect", "small-kan", "--out", str(tmp_path / "x.jpeg"), folder=finished.folder)
    assert isinstance(done.exception, WrongConfiguration)
    assert "must end in .html, .png, .svg" in str(done.exception)
