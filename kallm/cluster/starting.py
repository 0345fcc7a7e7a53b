"""The first minute of what was submitted: it runs, it waits for a free node, or it cannot start and says why."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kallm.cluster.placement import explain_misfit

__all__ = ["Start", "judge_start"]

_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
_CONTAINER = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_LONGEST = 400


@dataclass(frozen=True)
class Start:
    """What the pods say of themselves."""

    running: bool = False
    """A container of kallm runs, or has run."""
    trouble: str = ""
    """Why nothing will ever run; one sentence."""
    waiting: str = ""
    """What it waits for, where that may come to an end by itself."""


def judge_start(
    pods: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    nodes: Sequence[Mapping[str, Any]] | None,
) -> Start:
    """Return whether pods have begun, or why not.

    Args:
        pods: of one workflow or Job.
        events: about the pods, and about the workflow or Job itself.
        nodes: of the cluster; None where the user may not see them, and then a full cluster and a pod that is too
            large for it look the same.
    """
    if any(_has_run(pod) for pod in pods):
        return Start(running=True)
    for pod in pods:
        found = _judge_containers(pod) or _judge_place(pod, events, nodes)
        if found is not None:
            return found
    if not pods:
        refused = [event for event in events if event.get("reason") in ("FailedCreate", "FailedCreatePod")]
        if refused:
            return Start(trouble=f"the cluster refuses the pods: {_shorten(refused[-1].get('message'))}")
        return Start(waiting="no pod is there yet")
    return Start(waiting="the image is being pulled, or the containers are being made")


def _has_run(pod: Mapping[str, Any]) -> bool:
    status = pod.get("status") or {}
    if status.get("phase") in ("Succeeded", "Failed"):
        return True
    return any(
        each["name"] == "main" and set(each.get("state") or {}) & {"running", "terminated"}
        for each in status.get("containerStatuses") or ()
    )


def _judge_containers(pod: Mapping[str, Any]) -> Start | None:
    status = pod.get("status") or {}
    for each in (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())):
        waiting = (each.get("state") or {}).get("waiting") or {}
        reason, message = str(waiting.get("reason") or ""), _shorten(waiting.get("message"))
        if reason in _IMAGE:
            return Start(trouble=f"the image {each.get('image')} cannot be pulled ({reason}): {message}")
        if reason in _CONTAINER:
            return Start(trouble=f"the container cannot be made ({reason}): {message}")
    return None


def _judge_place(
    pod: Mapping[str, Any], events: Sequence[Mapping[str, Any]], nodes: Sequence[Mapping[str, Any]] | None
) -> Start | None:
    conditions = (pod.get("status") or {}).get("conditions") or ()
    unplaced = [each for each in conditions if each["type"] == "PodScheduled" and each["status"] == "False"]
    if not unplaced:
        return None
    name = pod["metadata"]["name"]
    told = [
        str(event.get("message"))
        for event in events
        if event.get("reason") == "FailedScheduling" and event["involvedObject"].get("name") == name
    ]
    reason = _shorten((told or [unplaced[0].get("message")])[-1])
    misfit = None if nodes is None else explain_misfit(pod["spec"], nodes)
    if misfit is None:
        return Start(waiting=f"no node is free ({reason})")
    return Start(trouble=f"no node can ever take pod {name}: {misfit} ({reason})")


def _shorten(message: Any) -> str:
    """Return a message of Kubernetes in one line, without what it says twice."""
    text = " ".join(str(message or "no message").split())
    text = re.sub(r"^Back-off pulling image \S+: ", "", text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
