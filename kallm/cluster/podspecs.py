"""The pods that a manifest will create: out of Pods, Jobs, Deployments and Argo's Workflows, after their patches.

A Workflow's templates are worked out as its controller does it: parameters are put in (those of ``kallm-site`` too,
when that ConfigMap stands among the documents), then ``podSpecPatch`` is merged over the spec.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from kallm.cluster.patch import merge_patch
from kallm.errors import WrongConfiguration

__all__ = ["PlannedPod", "describe", "flatten", "plan_pods"]

_PARAMETER = re.compile(r"\{\{\s*workflow\.parameters\.([\w.-]+)\s*\}\}")
_TEMPLATED = {"Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"}
_WORKFLOWS = {"Workflow", "WorkflowTemplate", "ClusterWorkflowTemplate", "CronWorkflow"}


@dataclass(frozen=True)
class PlannedPod:
    """One pod that a document will create; `where` names both for a message."""

    where: str
    owner: dict[str, Any]
    spec: dict[str, Any]
    retry: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        """Return all containers, those of the start first."""
        return [*self.spec.get("initContainers", []), *self.spec.get("containers", [])]


def flatten(documents: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the documents, those inside a ``List`` one by one."""
    for document in documents:
        if str(document.get("kind", "")).endswith("List") and "items" in document:
            yield from flatten(document["items"])
        else:
            yield document


def describe(document: dict[str, Any]) -> str:
    """Return ``Kind name`` for a message."""
    metadata = document.get("metadata") or {}
    return (
        f"{document.get('kind', 'document')} {metadata.get('name') or metadata.get('generateName') or 'without a name'}"
    )


def plan_pods(documents: list[dict[str, Any]]) -> Iterator[PlannedPod]:
    """Yield every pod that the documents will create.

    Raises:
        WrongConfiguration: a `podSpecPatch` is no mapping.
    """
    for document in documents:
        kind, spec = document.get("kind"), document.get("spec") or {}
        if kind == "Pod":
            yield PlannedPod(describe(document), document, spec, {})
        elif kind in _TEMPLATED:
            yield PlannedPod(describe(document), document, spec["template"]["spec"], {})
        elif kind == "CronJob":
            yield PlannedPod(describe(document), document, spec["jobTemplate"]["spec"]["template"]["spec"], {})
        elif kind in _WORKFLOWS:
            workflow = spec.get("workflowSpec") or {} if kind == "CronWorkflow" else spec
            yield from _plan_workflow(document, workflow, documents)


def _plan_workflow(
    document: dict[str, Any], workflow: dict[str, Any], documents: list[dict[str, Any]]
) -> Iterator[PlannedPod]:
    parameters = _read_parameters(workflow, documents)
    for template in workflow.get("templates", []):
        main = template.get("container") or template.get("script")
        sets = (template.get("containerSet") or {}).get("containers", [])
        if not main and not sets:
            continue
        spec: dict[str, Any] = {
            "containers": [*([{"name": "main", **main}] if main else sets), *template.get("sidecars", [])],
            "initContainers": template.get("initContainers", []),
            "volumes": [*workflow.get("volumes", []), *template.get("volumes", [])],
            "restartPolicy": "Never",
        }
        for field in (
            "affinity", "nodeSelector", "tolerations", "securityContext", "serviceAccountName", "schedulerName",
            "automountServiceAccountToken",
        ):  # fmt: skip
            value = template.get(field, workflow.get(field))
            if value is not None:
                spec[field] = value
        priority = template.get("priorityClassName") or workflow.get("podPriorityClassName")
        if priority:
            spec["priorityClassName"] = priority
        where = f"{describe(document)}, template {template.get('name')}"
        spec = _fill(spec, parameters)
        for patch in (workflow.get("podSpecPatch"), template.get("podSpecPatch")):
            spec = merge_patch(spec, _read_patch(_fill(patch, parameters), where))
        retry = template.get("retryStrategy") or workflow.get("retryStrategy") or {}
        yield PlannedPod(where, document, spec, retry)


def _read_parameters(workflow: dict[str, Any], documents: list[dict[str, Any]]) -> dict[str, str]:
    """Return the workflow's parameters: their values, those of ConfigMaps that are at hand, else the defaults."""
    maps = {
        document["metadata"]["name"]: document.get("data") or {}
        for document in documents
        if document.get("kind") == "ConfigMap"
    }
    values = {}
    for parameter in (workflow.get("arguments") or {}).get("parameters", []):
        source = parameter.get("valueFrom") or {}
        reference = source.get("configMapKeyRef") or {}
        value = parameter.get("value", source.get("default", parameter.get("default")))
        value = maps.get(reference.get("name"), {}).get(reference.get("key"), value)
        if value is not None:
            values[parameter["name"]] = str(value)
    return values


def _fill(value: Any, parameters: dict[str, str]) -> Any:
    """Return the value with ``{{workflow.parameters.…}}`` replaced where the parameter is known."""
    if isinstance(value, str):
        return _PARAMETER.sub(lambda match: parameters.get(match[1], match[0]), value)
    if isinstance(value, dict):
        return {name: _fill(item, parameters) for name, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, parameters) for item in value]
    return value


def _read_patch(text: str | None, where: str) -> dict[str, Any]:
    if not text or _PARAMETER.search(text):
        return {}
    try:
        patch = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise WrongConfiguration(f"{where}: podSpecPatch is neither JSON nor YAML: {error}") from error
    if not isinstance(patch, dict):
        raise WrongConfiguration(f"{where}: podSpecPatch must be a mapping, and is {text!r}")
    return patch
