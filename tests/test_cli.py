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
        (["cell", "demo", "--variant", "kam", "--seed", "0"], "--variant: unknown variant 'kam': known are"),
        (["cell", "demo", "--variant", "kan", "--seed", "9"], "--seed: variant 'kan' has the seeds 0, 1, 2, but got 9"),
        (["cell", "demo", "--variant", "kan"], "--seed: variant 'kan' has the seeds 0, 1, 2, but got None"),
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
    done = kallm("cell", "mine.yaml", "--variant", "small-kan", "--seed", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cell = done.stdout.strip()
    planned = json.loads(kallm("plan", "mine.yaml", "--unfinished", cwd=tmp_path).stdout)
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


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = kallm("--debug", "plan", "dmeo", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr
