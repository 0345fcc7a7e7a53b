"""The Argo workflow: the packaged file with its parameters filled in, and how far a submitted one is."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from kallm.cluster.patch import merge_patch

__all__ = ["Progress", "fill_workflow", "read_workflow", "render_cell_pod", "retry_limit", "workflow_progress"]

_CELL = "cell"
_POD_FIELDS = (
    "affinity",
    "automountServiceAccountToken",
    "dnsConfig",
    "dnsPolicy",
    "hostAliases",
    "imagePullSecrets",
    "nodeSelector",
    "schedulerName",
    "securityContext",
    "serviceAccountName",
    "tolerations",
    "volumes",
)
"""Fields that a workflow's spec, or a template, hands on to its pods under their own names."""
_OF_ARGO = {
    "annotations", "container", "inputs", "metadata", "name", "podSpecPatch", "retryStrategy", "synchronization",
    "activeDeadlineSeconds",
}  # fmt: skip
_REFERENCE = re.compile(r"\{\{([^{}]+)\}\}")


@dataclass(frozen=True)
class Progress:
    """How far a submitted study is, as the cluster tells it."""

    sentence: str
    finished: bool
    succeeded: bool
    begun: bool = True
    """Whether a controller has taken it up."""


def read_workflow() -> dict[str, Any]:
    """Return the workflow file that ships with the package."""
    workflow: dict[str, Any] = yaml.safe_load((resources.files("kallm.cluster") / "kallm.yaml").read_text())
    return workflow


def fill_workflow(workflow: Mapping[str, Any], values: Mapping[str, str]) -> dict[str, Any]:
    """Return the workflow with values for parameters; one that is not named keeps its own value or reference."""
    spec = workflow["spec"]
    parameters = spec["arguments"]["parameters"]
    assert set(values) <= {parameter["name"] for parameter in parameters}, values.keys()
    filled = [
        {key: value for key, value in parameter.items() if key != "valueFrom"} | {"value": values[parameter["name"]]}
        if parameter["name"] in values
        else parameter
        for parameter in parameters
    ]
    return {**workflow, "spec": {**spec, "arguments": {**spec["arguments"], "parameters": filled}}}


def render_cell_pod(workflow: Mapping[str, Any], inputs: Mapping[str, str], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata and spec of the pod that the workflow's cell template makes, with the site's patch over it.

    Args:
        workflow: with a value for every parameter.
        inputs: the template's inputs; a label whose input is missing is left out.
        patch: what ``podSpecPatch`` stands for.
    """
    spec = workflow["spec"]
    template = _cell_template(workflow)
    unknown = set(template) - _OF_ARGO - set(_POD_FIELDS)
    assert not unknown, f"the cell template has fields that no pod is made from: {unknown}"
    values = {f"workflow.parameters.{each['name']}": each["value"] for each in spec["arguments"]["parameters"]}
    values |= {f"inputs.parameters.{name}": value for name, value in inputs.items()}
    pod = {field: spec[field] for field in _POD_FIELDS if field in spec}
    pod |= {field: template[field] for field in _POD_FIELDS if field in template}
    pod["containers"] = [{"name": "main"} | _substitute(template["container"], values)]
    pod["restartPolicy"] = "Never"
    if "activeDeadlineSeconds" in template:
        pod["activeDeadlineSeconds"] = int(template["activeDeadlineSeconds"])
    labels = spec.get("podMetadata", {}).get("labels", {}) | template.get("metadata", {}).get("labels", {})
    known = {key: label for key, label in labels.items() if set(_REFERENCE.findall(label)) <= set(values)}
    return {"metadata": {"labels": _substitute(known, values)}, "spec": merge_patch(pod, patch)}


def retry_limit(workflow: Mapping[str, Any]) -> int:
    """Return how often a cell's pod is started again at most."""
    return int(_cell_template(workflow)["retryStrategy"]["limit"])


def workflow_progress(workflow: Mapping[str, Any]) -> Progress:
    """Return how far a workflow is, from its status."""
    status = workflow.get("status") or {}
    phase = str(status.get("phase") or "")
    parts = [phase or "not taken up yet", str(status.get("progress") or ""), str(status.get("message") or "")]
    failed = _failed(status.get("nodes") or {})
    parts.append(f"failed: {', '.join(failed)}" if failed else "")
    return Progress(
        sentence=" · ".join(filter(None, parts)),
        finished=phase in ("Succeeded", "Failed", "Error"),
        succeeded=phase == "Succeeded",
        begun=bool(phase),
    )


def _failed(nodes: Mapping[str, Any]) -> list[str]:
    """Return what was tried for the last time and failed, each with the message of its last pod."""
    found = []
    for node in nodes.values():
        if node["type"] == "Retry" and node.get("phase") in ("Failed", "Error"):
            last = nodes.get((node.get("children") or [""])[-1], node)
            found.append(f"{node['displayName']} ({last.get('message') or node['phase']})")
    return found


def _cell_template(workflow: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in workflow["spec"]["templates"] if each["name"] == _CELL)
    return found


def _substitute(value: Any, values: Mapping[str, str]) -> Any:
    """Put values in the place of ``{{…}}``, once: a value may hold braces of its own."""
    if isinstance(value, str):
        return _REFERENCE.sub(lambda match: values[match[1].strip()], value)
    if isinstance(value, list):
        return [_substitute(entry, values) for entry in value]
    if isinstance(value, dict):
        return {key: _substitute(entry, values) for key, entry in value.items()}
    return value
