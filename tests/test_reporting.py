"""Metrics besides the store."""

import importlib.util
import json
import sqlite3
import time
from pathlib import Path

import pytest

from kallm.errors import WrongConfiguration
from kallm.train import reporting
from kallm.train.recipe import Recipe
from kallm.train.reporting import Reports, check_reporters
from kallm.train.workers import Workers

pytestmark = pytest.mark.usefixtures("workers")


@pytest.fixture
def workers() -> Workers:
    """The processes of a training, which accelerate's trackers ask for."""
    return Workers()


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_package_that_is_missing_is_named_before_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "find_spec", lambda name: None)
    with pytest.raises(WrongConfiguration, match=f"train.report_to names {name}, but the package {name} is not"):
        check_reporters(Recipe(tokens=1, report_to=[name]).report_to)


def test_a_recipe_that_reports_nowhere_opens_nothing(tmp_path: Path) -> None:
    with Reports((), project="p", cell="c", folder=tmp_path, config={}) as reports:
        reports.log({"loss": 1.0}, step=1)
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_every_number_of_a_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first in (1, 3):  # a cell that continues
        with Reports(("tensorboard",), project="p", cell="c", folder=tmp_path, config={}) as reports:
            for step in (first, first + 1):
                reports.log({"loss": step / 2, "batch": "0a1b"}, step=step)
    told = EventAccumulator(str(tmp_path / "p" / "c")).Reload()
    assert told.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in told.Scalars("train/loss")] == [(n, n / 2) for n in (1, 2, 3, 4)]


def test_trackio_gets_every_number_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is imported
    with Reports(("trackio",), project="p", cell="c", folder=tmp_path, config={"a": 1}) as reports:
        reports.log({"loss": 0.5}, step=1)
    (kept,) = tmp_path.rglob("p.db")
    with sqlite3.connect(kept) as database:
        assert [json.loads(row[0]) for row in database.execute("select metrics from metrics")] == [{"train/loss": 0.5}]


def test_wandb_gets_every_number_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with Reports(("wandb",), project="some-project", cell="some-cell", folder=tmp_path, config={"a": 1}) as reports:
        for step in (1, 2):
            reports.log({"loss": step / 2, "batch": "0a1b"}, step=step)
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-some-cell.wandb")
    wanted, deadline = (b"some-project", b"some-cell", b"train/loss"), time.monotonic() + 60
    while not all(word in kept.read_bytes() for word in wanted):  # wandb's own process writes after its run has ended
        assert time.monotonic() < deadline, kept.read_bytes()
        time.sleep(0.1)
    assert b"train/batch" not in kept.read_bytes()
