"""Where a cell's metrics go besides the store: TensorBoard, W&B or trackio, through accelerate's trackers."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from kallm.errors import WrongConfiguration
from kallm.train.recipe import ReportTo

__all__ = ["Reports", "check_reporters"]


def check_reporters(names: Sequence[ReportTo]) -> None:
    """Look for the packages that a recipe's ``report_to`` needs.

    Raises:
        WrongConfiguration: one is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise WrongConfiguration(
                f"train.report_to names {name}, but the package {name} is not installed: "
                f"run 'pip install {name}', or take it out of train.report_to"
            )


class Reports:
    """The open runs of one cell, one for each name; a cell that continues continues its runs."""

    def __init__(
        self, names: Sequence[ReportTo], *, project: str, cell: str, folder: Path, config: Mapping[str, Any]
    ) -> None:
        """Open the runs.

        Args:
            names: the recipe's ``report_to``; empty opens nothing.
            project: groups the cells of a study.
            cell: names the run.
            folder: where TensorBoard writes, in a folder of the cell's name.
            config: facts of the run, kept by W&B and trackio.

        Raises:
            WrongConfiguration: a package is not installed.
        """
        check_reporters(names)
        self._trackers: list[GeneralTracker] = []
        for name in dict.fromkeys(names):
            if name == "tensorboard":
                tracker = TensorBoardTracker(cell, folder / project)
            elif name == "wandb":
                tracker = WandBTracker(project, id=cell, name=cell, resume="allow", config=dict(config))
            else:
                tracker = TrackioTracker(project, name=cell, resume="allow", config=dict(config), embed=False)
            tracker.start()
            self._trackers.append(tracker)

    def log(self, figures: Mapping[str, float | str], step: int) -> None:
        """Report the numbers of a step."""
        numbers = {f"train/{key}": value for key, value in figures.items() if not isinstance(value, str)}
        for tracker in self._trackers:
            tracker.log(numbers, step=step)

    def __enter__(self) -> "Reports":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._trackers:
            tracker.finish()
