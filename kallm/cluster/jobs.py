"""The same grid where Argo is not installed: one Indexed Job, its pods made from the workflow's cell template."""

from collections.abc import Mapping, Sequence
from typing import Any

from kallm.cluster.argo import Progress, render_cell_pod, retry_limit
from kallm.errors import ExitCode
from kallm.run.selection import Pod

__all__ = ["FINAL_CODES", "job_progress", "render_job"]

FINAL_CODES = tuple(sorted(code.value for code in ExitCode if 0 < code < ExitCode.INTERNAL))
"""Exit codes that are never tried again."""
_LONGEST_PREFIX = 50
"""A pod's host name is the Job's name with its index, of 63 letters at most."""


def render_job(
    workflow: Mapping[str, Any], pods: Sequence[Pod], patch: Mapping[str, Any], *, study: str, parallelism: int
) -> dict[str, Any]:
    """Return an Indexed Job whose index N trains the cells of ``pods[N]`` and writes the table again.

    Args:
        workflow: with a value for every parameter.
        pods: at least one.
        patch: the site's patch of cell pods.
        study: the study's name.
        parallelism: most pods at once.
    """
    assert pods
    parts = ";".join(pod["cells"] for pod in pods)
    # no pod plans beforehand, so every pod is given the study's text
    text = next(each["value"] for each in workflow["spec"]["arguments"]["parameters"] if each["name"] == "study")
    template = render_cell_pod(workflow, {"cells": parts, "name": study, "study": text}, patch)
    main = next(each for each in template["spec"]["containers"] if each["name"] == "main")
    # Kubernetes itself puts the index there; a study's text is escaped against the same expansion
    main["args"] = ["cell", "--part", "$(JOB_COMPLETION_INDEX)", "--table", *_escape(main["args"])[1:]]
    labels = dict(template["metadata"]["labels"])
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "generateName": f"kallm-{study}"[:_LONGEST_PREFIX].rstrip("-") + "-",
            "labels": labels,
            "annotations": {"kallm/pods": " ".join(pod["name"] for pod in pods)},
        },
        "spec": {
            "completionMode": "Indexed",
            "completions": len(pods),
            "parallelism": min(parallelism, len(pods)),
            "backoffLimitPerIndex": retry_limit(workflow),
            "podFailurePolicy": _failure_policy(),
            "podReplacementPolicy": "Failed",
            "ttlSecondsAfterFinished": int(workflow["spec"]["ttlStrategy"]["secondsAfterCompletion"]),
            "template": template,
        },
    }


def job_progress(job: Mapping[str, Any]) -> Progress:
    """Return how far a Job is, from its status."""
    status, total = job.get("status") or {}, job["spec"]["completions"]
    ended = {
        each["type"]: each.get("message", "") for each in status.get("conditions") or () if each["status"] == "True"
    }
    done, active = status.get("succeeded") or 0, status.get("active") or 0
    phase = (
        "Succeeded" if "Complete" in ended else "Failed" if "Failed" in ended else "Running" if active else "Pending"
    )
    failed = status.get("failedIndexes") or ""
    parts = [
        phase,
        f"{done}/{total}",
        f"failed: {_name_indexes(job, failed)}" if failed else "",
        ended.get("Failed", ""),
    ]
    return Progress(
        sentence=" · ".join(filter(None, parts)),
        finished=phase in ("Succeeded", "Failed"),
        succeeded=phase == "Succeeded",
    )


def _failure_policy() -> dict[str, Any]:
    """A pod that the cluster took away does not count; a final exit code ends its index; all else is tried again."""
    return {
        "rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {
                "action": "FailIndex",
                "onExitCodes": {"containerName": "main", "operator": "In", "values": list(FINAL_CODES)},
            },
        ]
    }


def _escape(arguments: list[str]) -> list[str]:
    return [argument.replace("$", "$$") for argument in arguments]


def _name_indexes(job: Mapping[str, Any], ranges: str) -> str:
    """Turn ``0,2-3`` into the names of those pods."""
    names = str((job["metadata"].get("annotations") or {}).get("kallm/pods", "")).split()
    found: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        found += names[int(first) : int(last or first) + 1]
    return ", ".join(found)
