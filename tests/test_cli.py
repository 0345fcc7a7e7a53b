"""The program as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ["run", "plan", "cell", "status", "table"]


def kallm(*arguments: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kallm.cli", *arguments]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(command: str, tmp_path: Path) -> None:
    done = kallm(command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert f"kallm {command} demo" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "dmeo"], "unknown study 'dmeo'"),
        (["plan", "demo", "--set", "train.tokens=0"], "train.tokens: input should be greater than 0"),
        (["plan", "demo", "--set", "trian.tokens=1"], "unknown key 'trian': known are"),
        (["plan", "demo", "--cells", "kam.seed-0"], "study 'demo' has no cell 'kam.seed-0': known are baseline,"),
        (["plan", "demo", "--cells", ","], "no cell is named: expected all, unfinished, or labels"),
        (["plan", "demo", "--share", "sead"], "--share: unknown 'sead': known are cell, seed. Did you mean 'seed'?"),
        (["cell", "demo", "kan.seed-0;kan.seed-1", "--part", "2"], "--part: CELLS has 2 parts, counted from 0, but 2"),
        (["table", "demo.0123456789ab", "--store", ".", "--set", "seeds=[0]"], "--set changes a study, but"),
        (["status", "demo.0123456789ab", "--store", "."], "there is no study demo.0123456789ab in /"),
        (["run", "demo", "--store", "/proc/nothing"], "/proc/nothing"),
        (["run", "demo", "--store", "s4://bucket"], "s4"),
        (["run", "demo", "--sat", "a=1"], "No such option"),
        (["status", "demo", "--store", "nowhere"], "nowhere"),
        (["table", "-"], "standard input was expected to hold"),
    ],
)
def test_wrong_input_is_one_clear_line_and_exit_2_and_leaves_nothing(
    arguments: list[str], sentence: str, tmp_path: Path
) -> None:
    done = kallm(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert sentence in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_plan_is_json_on_standard_output_alone(tmp_path: Path) -> None:
    done = kallm("plan", "demo", cwd=tmp_path)
    planned = json.loads(done.stdout)
    assert len(planned["cells"]) == 7
    assert planned["estimate"]["stored_bytes"] == 4 * 3 * (46_012_608 + 39_382_848)
    assert os.listdir(tmp_path) == []


def test_a_study_comes_from_standard_input_too(study_text: str, tmp_path: Path) -> None:
    done = kallm("plan", "-", cwd=tmp_path, stdin=study_text)
    assert [cell["variant"] for cell in json.loads(done.stdout)["cells"]] == ["baseline", "linear", "small-kan"]


def test_cell_then_plan_status_and_table_tell_what_is_missing(study_text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(study_text)
    done = kallm("cell", "mine.yaml", "small-kan.seed-0", "--table", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cell = done.stdout.strip()
    planned = json.loads(kallm("plan", "mine.yaml", "--cells", "unfinished", cwd=tmp_path).stdout)
    assert [c["variant"] for c in planned["cells"]] == ["baseline", "linear"]
    told = kallm("status", "mine.yaml", cwd=tmp_path)
    assert told.returncode == 0
    assert told.stdout.count("missing") >= 2
    table = kallm("table", "mine.yaml", cwd=tmp_path)
    assert table.returncode == 5
    assert "cells are missing" in table.stderr
    by_name = kallm("table", planned["study"], cwd=tmp_path)
    assert by_name.returncode == 5
    assert by_name.stdout == table.stdout
    (folder,) = (tmp_path / "kallm-store" / "studies").iterdir()
    assert {"study.json", "table.json", "table.csv", "table.md", "report.html"} == {p.name for p in folder.iterdir()}
    assert cell in (folder / "table.json").read_text()


def test_a_plan_says_which_pod_runs_what_and_a_cell_of_a_stored_study_needs_no_file(
    study_text: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(study_text)
    done = kallm("plan", "mine.yaml", "--pods", "pods.json", "--share", "seed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    study = json.loads(done.stdout)["study"]
    assert json.loads((tmp_path / "pods.json").read_text()) == [
        {"name": "baseline", "cells": "baseline", "variant": "baseline", "seed": "none", "study": study},
        {"name": "seed-0", "cells": "linear.seed-0,small-kan.seed-0", "variant": "all", "seed": "0", "study": study},
    ]
    (tmp_path / "mine.yaml").unlink()
    ran = kallm(
        "cell", study, "baseline;baseline,linear.seed-0", "--part", "1", "--progress-file", "percent", cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    assert [line.rpartition(".")[0] for line in ran.stdout.splitlines()] == ["baseline", "linear.seed-0"]
    assert (tmp_path / "percent").read_text() == "100/100\n"
    assert "linear" in kallm("status", study, cwd=tmp_path).stdout


def test_a_stored_study_is_planned_as_it_was(tmp_path: Path) -> None:
    first = kallm("plan", "smoke", "--pods", "pods.json", cwd=tmp_path)
    study = json.loads(first.stdout)["study"]
    again = kallm("cell", study, "nobody", cwd=tmp_path)
    assert "study 'smoke' has no cell 'nobody': known are kan.seed-0, linear.seed-0." in again.stderr
    assert again.returncode == 2


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = kallm("--debug", "plan", "dmeo", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
