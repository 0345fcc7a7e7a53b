"""Equal figures are equal in any store; what differs is told with its size; time and memory do not count."""

import json
from pathlib import Path

import pytest
import typer
from click.testing import Result
from finished_study import Finished, contents
from typer.testing import CliRunner

from kallm.commands.stored import attach
from kallm.errors import DataMismatch, WrongConfiguration
from kallm.results.compare import compare_studies
from kallm.results.logs import find_cell, read_attempts, render_attempt
from kallm.results.record import CellEntry, StudyDocument
from kallm.store.local import FolderStore
from kallm.store.sealed import seal, unseal

pytest_plugins = ["finished"]


def change(path: Path, **changes: object) -> None:
    path.write_bytes(seal(unseal(path.read_bytes(), path.name) | changes))


@pytest.fixture
def original(finished: Finished, _run_once: Finished) -> tuple[FolderStore, StudyDocument]:
    return FolderStore(_run_once.folder), finished.document


def compare(finished: Finished, original: tuple[FolderStore, StudyDocument]):
    return compare_studies(original, (finished.store, finished.document))


def test_a_study_equals_itself(finished: Finished, original) -> None:
    comparison = compare(finished, original)
    assert comparison.differences == comparison.apart == []
    assert comparison.num_equal > 20


def test_time_memory_and_receipts_are_told_apart_and_do_not_count(finished: Finished, original) -> None:
    record = json.loads(finished.find("trained.json").read_text())
    receipt = record["receipt"] | {"image": "another", "new": 1}
    change(finished.find("trained.json"), seconds=7200.0, peak_bytes=2**30, receipt=receipt)
    comparison = compare(finished, original)
    assert comparison.differences == []
    assert {what for _, what, _, _ in comparison.apart} == {
        "training time",
        "training memory",
        "training receipt.image",
        "training receipt.new",
    }
    assert ("linear seed 0", "training receipt.new", "–", "1") in comparison.apart


def test_losses_scores_and_weights_that_differ_are_told_with_their_size(finished: Finished, original) -> None:
    training, evaluation = finished.find("trained.json"), finished.find("evaluations/heldout.????????????.json")
    record, scored = json.loads(training.read_text()), json.loads(evaluation.read_text())
    losses = record["loss_history"]
    losses[1][1] += 0.25
    scores = scored["scores"]
    scores["cross_entropy"]["value"] += 0.5
    change(training, loss_history=losses, weights=record["weights"] | {"sha256": "0" * 64})
    change(evaluation, scores=scores)
    told = {line.partition(": ")[2] for line in compare(finished, original).differences}
    assert f"loss history differs at 1 of {len(losses)} points, by at most 0.25 (step {losses[1][0]})" in told
    assert f"weights are {record['weights']['sha256'][:12]} and {'0' * 12}" in told
    assert any(line.startswith("heldout cross_entropy is ") and line.endswith("they differ by 0.5") for line in told)
    assert len(told) == 3


def test_a_cell_that_is_only_in_one_study_is_a_difference(finished: Finished, original) -> None:
    added = CellEntry.model_validate(finished.document.cells[1].model_dump() | {"seed": 1, "id": "linear.seed-1.x"})
    larger = finished.document.model_copy(update={"cells": [*finished.document.cells, added]})
    comparison = compare_studies(original, (finished.store, larger))
    assert comparison.differences == ["linear seed 1: parameters is only in B"]


def test_logs_are_found_by_the_beginning_of_a_cells_id_and_tell_how_each_attempt_ended(finished: Finished) -> None:
    store, cell = finished.store, finished.cell
    nonce = "9999999999-dead"
    store.put(f"cells/{cell}/attempts/{nonce}.start.json", seal({"nonce": "x", "started": 9999999999, "host": "far"}))
    first, last = read_attempts(store, find_cell(store, "linear.seed"))
    assert first.log == finished.find("logs/*.txt").read_text()
    told = render_attempt(first, 1, 2).splitlines()
    assert told[0].startswith("attempt 1 of 2 · ")
    assert "exit 0 after " in told[0]
    assert [line.strip() for line in told[1:]] == first.log.splitlines()
    assert render_attempt(last, 2, 2).startswith("attempt 2 of 2 · 2286-11-20 17:46:39 UTC · on far · no end: ")


@pytest.mark.parametrize("named", ["linaer", "", "..", "linear/..", "linear.seed-0/x"])
def test_an_unknown_cell_is_refused_with_the_nearest_name(finished: Finished, named: str) -> None:
    with pytest.raises(WrongConfiguration, match=r"unknown cell .* known are baseline"):
        find_cell(finished.store, named)


def test_an_ambiguous_beginning_names_the_cells(finished: Finished) -> None:
    finished.store.put("cells/linear.seed-1.abc/cell.json", b"{}")
    with pytest.raises(WrongConfiguration, match=r"beginning of 2 cells: linear.seed-0.*, linear.seed-1.abc"):
        find_cell(finished.store, "linear")


def invoke(*arguments: str) -> Result:
    app = typer.Typer(rich_markup_mode=None)
    attach(app)
    return CliRunner().invoke(app, arguments)


def test_the_commands_end_well_where_all_is_equal_and_with_a_mismatch_where_not(finished: Finished, original) -> None:
    study = f"{finished.document.name}.{finished.document.hash}"
    mine, other = str(finished.folder), original[0].address
    equal = invoke("compare", study, study, "--store", mine, "--store-b", other)
    assert (equal.exception, equal.stderr) == (None, "")
    assert equal.stdout.endswith("figures equal, 0 different\n")
    whole = invoke("verify", study, "--store", mine)
    assert whole.exception is None
    assert "26 objects read, each as its record names it" in whole.stdout
    change(finished.find("trained.json"), steps=1)
    different = invoke("compare", study, study, "--store", mine, "--store-b", other)
    assert repr(different.exception) == "DataMismatch('1 figure of A and B differ')"
    assert "linear seed 0: steps is 1 and 3" in different.stdout
    damaged = invoke("verify", study, "--store", mine)
    assert isinstance(damaged.exception, DataMismatch)
    assert "trained.json: its SHA-256 is" in damaged.stdout
    refused = invoke("copy", mine, other, study)
    assert "trained.json is another record" in str(refused.exception)
    told = invoke("logs", "linear", "--store", mine)
    assert told.stdout.startswith(f"{finished.cell}: 1 attempt\nattempt 1 of 1 · ")


def test_the_copy_command_writes_the_table_too(finished: Finished, tmp_path: Path) -> None:
    study = f"{finished.document.name}.{finished.document.hash}"
    done = invoke("copy", str(finished.folder), str(tmp_path / "b"), study)
    assert done.exception is None
    written, given = contents(tmp_path / "b"), contents(finished.folder)
    assert written == {key: data for key, data in given.items() if "heartbeat" not in key}


@pytest.mark.parametrize("command", ["verify", "compare", "copy", "logs", "gc"])
def test_help_teaches_by_example(command: str) -> None:
    assert f"  kallm {command} " in invoke(command, "--help").stdout
