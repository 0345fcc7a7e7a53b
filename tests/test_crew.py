"""Two processes train one study as one process does, and only the main one writes and speaks."""

import subprocess
import sys
from pathlib import Path

import pytest
from processes import run_processes

from kallm.results.record import TrainingRecord, cell_key, read_record
from kallm.store.local import FolderStore
from kallm.study.plan import Plan, make_plan
from kallm.study.study import read_study


def run_study(study: Path, store: Path, *, num: int) -> list[subprocess.CompletedProcess[str]]:
    """Run ``kallm run`` in several processes."""
    command = [sys.executable, "-m", "kallm.cli", "run", str(study), "--store", str(store), "--no-probe"]
    return run_processes(command, num=num)


def trainings(plan: Plan, store: Path) -> dict[str, TrainingRecord]:
    opened = FolderStore(store)
    found = {
        cell.id: read_record(opened, TrainingRecord, cell_key(cell.id, "trained.json"))
        for cell in plan.cells
        if cell.variant.trained
    }
    return {name: record for name, record in found.items() if record is not None}


def test_two_processes_finish_a_study_as_one_does(study_text: str, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(study_text)
    (alone,) = run_study(study, tmp_path / "alone", num=1)
    main, other = run_study(study, tmp_path / "both", num=2)
    assert [alone.returncode, main.returncode, other.returncode] == [0, 0, 0], main.stderr + other.stderr
    plan = make_plan(read_study(str(study)))
    one, two = trainings(plan, tmp_path / "alone"), trainings(plan, tmp_path / "both")
    assert len(one) == len(two) == 2
    for name, record in one.items():
        losses = [loss for _, loss in two[name].loss_history]
        assert losses == pytest.approx([loss for _, loss in record.loss_history], rel=1e-4)
        assert two[name].supervised_tokens == record.supervised_tokens
    assert "linear" in main.stdout
    assert other.stdout == ""
