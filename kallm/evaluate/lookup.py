"""A suite by its name: one of ``SUITES``, or ``lm-eval:NAME`` for what lm-eval knows. Imports no torch."""

from typing import Any

from kallm.errors import did_you_mean
from kallm.evaluate.suites import SUITES, Suite, SuiteSettings
from kallm.evaluate.tasksettings import TaskSettings

__all__ = ["find_suite", "read_suite"]

_PREFIX = "lm-eval:"
_TASKS = Suite(TaskSettings, "kallm.evaluate.tasks")


def find_suite(name: str) -> Suite:
    """Return the suite of a name.

    Raises:
        ValueError: there is no such suite; whether lm-eval has the task is seen when the study is planned.
    """
    if name.startswith(_PREFIX) and name != _PREFIX:
        return _TASKS
    if name not in SUITES:
        raise ValueError(f"unknown suite '{name}': {did_you_mean(name, [*SUITES, _PREFIX + 'TASK'])}")
    return SUITES[name]


def read_suite(name: str, settings: Any) -> SuiteSettings:
    """Return a suite's settings from what a study file says.

    Raises:
        ValueError: there is no such suite, or a setting is wrong.
    """
    suite = find_suite(name)
    if suite is not _TASKS or not isinstance(settings, dict):
        return suite.settings.model_validate(settings)
    task = name.removeprefix(_PREFIX)
    if settings.get("task", task) != task:
        raise ValueError(f"{name}: task: the suite's name says '{task}'; leave task out")
    return suite.settings.model_validate({**settings, "task": task})
