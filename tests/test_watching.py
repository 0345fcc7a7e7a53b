"""From the first minute of a study on a cluster to its exit code."""

from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from kallm.cluster.argo import Progress
from kallm.cluster.starting import Start
from kallm.cluster.watching import Pace, await_start, raise_outcome, watch
from kallm.errors import CellsMissing, Diverged, WrongConfiguration
from kallm.results.status import CellStatus

QUICK = Pace(poll_s=0.01, hold_s=0.05, start_s=0.3, watch_s=0.01, patience_s=0.1)


class Stage:
    """An engine whose cluster says what the test wrote down, the last of it for ever."""

    namespace = "mine"

    def __init__(self, *scenes: tuple[Progress, Start]) -> None:
        self.scenes = list(scenes)
        self.removed: list[str] = []

    def progress(self, name: str) -> Progress:
        return self.scenes[0][0]

    def look(self, name: str, *, pending: bool = False) -> Start:
        return self.scenes.pop(0)[1] if len(self.scenes) > 1 else self.scenes[0][1]

    def remove(self, name: str) -> None:
        self.removed.append(name)

    def create(self, manifest: Mapping[str, Any]) -> str:
        raise AssertionError

    def stop(self, name: str) -> bool:
        raise AssertionError

    def names(self) -> list[str]:
        raise AssertionError

    def commands(self, name: str) -> tuple[str, str]:
        raise AssertionError


RUNNING, PENDING = Progress("Running", False, False), Progress("", False, False, begun=False)
OVER, FAILED = Progress("Succeeded", True, True), Progress("Failed · 3/4", True, False)


@pytest.mark.parametrize(
    ("scenes", "told"),
    [
        ([(RUNNING, Start(waiting="x")), (RUNNING, Start(running=True))], ""),
        ([(RUNNING, Start(trouble="a hiccup")), (RUNNING, Start(running=True))], ""),
        ([(OVER, Start(waiting="x"))], ""),
        ([(RUNNING, Start(waiting="no node is free (x)"))], "no node is free (x)"),
    ],
)
def test_what_runs_or_waits_its_turn_is_left_alone(scenes: Any, told: str) -> None:
    stage = Stage(*scenes)
    assert await_start(stage, "it", QUICK) == told
    assert stage.removed == []


@pytest.mark.parametrize(
    ("scene", "sentence"),
    [
        ((RUNNING, Start(trouble="no such image")), "it cannot start and is deleted: no such image"),
        ((FAILED, Start(waiting="x")), "it cannot start and is deleted: Failed"),
        ((PENDING, Start(waiting="x")), "no Argo controller takes it up in this namespace; use --engine jobs"),
    ],
)
def test_what_can_never_start_is_deleted(scene: Any, sentence: str) -> None:
    stage = Stage(scene)
    with pytest.raises(WrongConfiguration, match=sentence):
        await_start(stage, "it", QUICK)
    assert stage.removed == ["it"]


def cell(state: str, variant: str = "kan") -> CellStatus:
    told = {"id": f"{variant}.seed-0.0", "variant": variant, "seed": 0, "detail": "exit 6: memory", "trained": False}
    return CellStatus.model_validate({**told, "state": state})


def test_watching_tells_every_change_once_and_ends_with_the_study() -> None:
    stage = Stage((RUNNING, Start()), (RUNNING, Start()), (RUNNING, Start(waiting="no node is free")), (OVER, Start()))
    console = Console(record=True, force_terminal=False, width=80)
    assert watch(stage, "it", lambda: [cell("running")], console, QUICK) == OVER
    assert console.export_text().splitlines() == [
        "it: Running · 1 running",
        "it: Running · no node is free · 1 running",
        "it: Succeeded · 1 running",
    ]


@pytest.mark.parametrize(
    ("progress", "cells", "error"),
    [
        (OVER, [], None),
        (FAILED, [], CellsMissing),
        (FAILED, [cell("done")], None),
        (OVER, [cell("done"), cell("failed", "linear")], CellsMissing),
        (OVER, [cell("done"), cell("diverged", "linear")], Diverged),
        (OVER, [cell("missing"), cell("diverged", "linear")], CellsMissing),
    ],
)
def test_the_cells_decide_the_exit_code(progress: Progress, cells: Any, error: type[Exception] | None) -> None:
    if error is None:
        raise_outcome(progress, cells, where="")
        return
    with pytest.raises(error):
        raise_outcome(progress, cells, where="")
