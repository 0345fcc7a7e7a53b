"""What can be asked of a place that runs studies, and the two that are asked by the Kubernetes API: Argo and Jobs."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from kallm.cluster.argo import Progress, workflow_progress
from kallm.cluster.checks import list_nodes
from kallm.cluster.client import EVENT, JOB, POD, WORKFLOW, Cluster, Kind
from kallm.cluster.jobs import job_progress
from kallm.cluster.starting import Start, judge_start

__all__ = ["GONE", "ArgoEngine", "Engine", "JobsEngine"]

GONE = Progress("it was deleted", finished=True, succeeded=False)
_MOST_EVENTS_OF = 3
_OURS = "app.kubernetes.io/name=kallm"


@runtime_checkable
class Engine(Protocol):
    """A place that runs studies."""

    @property
    def namespace(self) -> str:
        """The namespace it runs them in."""

    def create(self, manifest: Mapping[str, Any]) -> str:
        """Submit, and return the name that it got."""

    def progress(self, name: str) -> Progress:
        """Return how far it is."""

    def look(self, name: str, *, pending: bool = False) -> Start:
        """Return how its pods begin; only of those that have not begun, where ``pending``."""

    def stop(self, name: str) -> bool:
        """End it so that what runs saves its state; return whether there was anything of that name."""

    def remove(self, name: str) -> None:
        """Delete it with its pods."""

    def names(self) -> list[str]:
        """Return what of kallm's is there."""

    def commands(self, name: str) -> tuple[str, str]:
        """Return the command lines that follow it and that end it, without kallm."""


class _ClusterEngine:
    kind: Kind
    label: str

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.namespace = cluster.namespace

    def create(self, manifest: Mapping[str, Any]) -> str:
        return str(self.cluster.create(self.kind, dict(manifest))["metadata"]["name"])

    def look(self, name: str, *, pending: bool = False) -> Start:
        pods = self.cluster.list(POD, labels=f"{self.label}={name}")
        if pending:
            pods = [pod for pod in pods if (pod.get("status") or {}).get("phase") == "Pending"]
        waiting = [pod["metadata"]["name"] for pod in pods][:_MOST_EVENTS_OF]
        events = [
            event
            for each in (name, *waiting)
            for event in self.cluster.list(EVENT, fields=f"involvedObject.name={each}")
        ]
        return judge_start(pods, events, list_nodes(self.cluster))

    def remove(self, name: str) -> None:
        self.cluster.delete(self.kind, name)

    def names(self) -> list[str]:
        """Return what of kallm's is there."""
        return [each["metadata"]["name"] for each in self.cluster.list(self.kind, labels=_OURS)]

    def _find(self, name: str) -> dict[str, Any] | None:
        """Return an object that kallm made, or None: what others made is not touched."""
        found = self.cluster.get(self.kind, name)
        label, _, value = _OURS.partition("=")
        return found if found and (found["metadata"].get("labels") or {}).get(label) == value else None


class ArgoEngine(_ClusterEngine):
    """Argo's controller, through its custom resource."""

    kind, label = WORKFLOW, "workflows.argoproj.io/workflow"

    def progress(self, name: str) -> Progress:
        found = self.cluster.get(WORKFLOW, name)
        return GONE if found is None else workflow_progress(found)

    def stop(self, name: str) -> bool:
        if self._find(name) is None:
            return False
        # the pods get SIGTERM and their grace, and the table is written
        self.cluster.patch(WORKFLOW, name, {"spec": {"shutdown": "Stop"}})
        return True

    def commands(self, name: str) -> tuple[str, str]:
        place = f"-n {self.namespace} {name}"
        return f"argo watch {place}", f"argo stop {place}"


class JobsEngine(_ClusterEngine):
    """Kubernetes alone."""

    kind, label = JOB, "batch.kubernetes.io/job-name"

    def progress(self, name: str) -> Progress:
        found = self.cluster.get(JOB, name)
        return GONE if found is None else job_progress(found)

    def stop(self, name: str) -> bool:
        if self._find(name) is None:
            return False
        self.remove(name)
        return True

    def commands(self, name: str) -> tuple[str, str]:
        return (
            f"kubectl get pods -n {self.namespace} -l {self.label}={name} -w",
            f"kubectl delete job -n {self.namespace} {name}",
        )
