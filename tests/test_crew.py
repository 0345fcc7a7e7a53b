"""Two processes train one study as one process does, and only the main one writes and speaks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kallm.results.record import TrainingRecord, cell_key, read_record
from kallm.store.local import FolderStore
from kallm.study.plan import Plan, make_plan
from kallm.study.study import read_study


def run_study(study: Path, store: Path, *, num: int) -> list[subprocess.CompletedProcess[str]]:
    """Run ``kallm run`` in several processes, as ``torchrun`` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num)} if num > 1 else {}
    command = [sys.executable, "-m", "kallm.cli", "run", str(study), "--store", str(store), "--no-probe"]
    running = []
    for rank in range(num):
        own = {**os.environ, **place, "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        own |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num > 1 else {}
        running.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    told = [process.communicate(timeout=600) for process in running]
    return [subprocess.CompletedProcess(p.args, p.returncode, *each) for p, each in zip(running, told, strict=True)]


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
