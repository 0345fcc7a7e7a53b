"""Whether any node could ever take a pod, told from the pod's spec and the nodes alone."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["explain_misfit"]

_PASSING_TAINTS = "node.kubernetes.io/"
"""Cordoned, not ready, under pressure: a node with these comes back."""
_BLOCKING = ("NoSchedule", "NoExecute")


def explain_misfit(spec: Mapping[str, Any], nodes: Iterable[Mapping[str, Any]]) -> str | None:
    """Return why no node can meet a pod's requests, even an idle one; None where one can.

    Looks at requested amounts, ``nodeSelector``, required node affinity and taints; what is in use does not count.
    """
    left = list(nodes)
    if not left:
        return "the cluster has no nodes"
    asked = _requests(spec)
    for name, amount in asked.items():
        offers = [_quantity((node["status"].get("allocatable") or {}).get(name, "0")) for node in left]
        if max(offers) < amount:
            unit = "" if max(offers) else ": the resource's name, or the nodes' device plugin, is missing"
            return f"{_tell(name, amount)} is asked for, but the largest node offers {_tell(name, max(offers))}{unit}"
    for why, fits in (
        ("no node has the labels that nodeSelector or affinity asks for", _has_labels),
        ("every such node has a taint that the pod does not tolerate", _is_tolerated),
    ):
        left = [node for node in left if fits(spec, node)]
        if not left:
            return why
    if not any(_has_room(asked, node) for node in left):
        return "no single node offers all of it together: " + ", ".join(_tell(name, asked[name]) for name in asked)
    return None


def _requests(spec: Mapping[str, Any]) -> dict[str, float]:
    """Return what the scheduler counts: the containers' sum, or the largest init container where that is more."""
    total: dict[str, float] = {}
    for container in spec["containers"]:
        for name, amount in _asked_by(container).items():
            total[name] = total.get(name, 0.0) + amount
    for container in spec.get("initContainers") or ():
        for name, amount in _asked_by(container).items():
            total[name] = max(total.get(name, 0.0), amount)
    return {name: amount for name, amount in total.items() if amount}


def _asked_by(container: Mapping[str, Any]) -> dict[str, float]:
    resources = container.get("resources") or {}
    return {
        name: _quantity(amount)
        for name, amount in {**(resources.get("limits") or {}), **(resources.get("requests") or {})}.items()
    }


def _has_room(asked: Mapping[str, float], node: Mapping[str, Any]) -> bool:
    offered = node["status"].get("allocatable") or {}
    return all(_quantity(offered.get(name, "0")) >= amount for name, amount in asked.items())


def _has_labels(spec: Mapping[str, Any], node: Mapping[str, Any]) -> bool:
    labels = node["metadata"].get("labels") or {}
    if any(labels.get(key) != value for key, value in (spec.get("nodeSelector") or {}).items()):
        return False
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is None:
        return True
    fields = {"metadata.name": node["metadata"]["name"]}
    return any(
        all(_matches(each, labels) for each in term.get("matchExpressions") or ())
        and all(_matches(each, fields) for each in term.get("matchFields") or ())
        for term in required["nodeSelectorTerms"]
    )


_OPERATORS: dict[str, Callable[[str | None, list[str]], bool]] = {
    "In": lambda value, values: value in values,
    "NotIn": lambda value, values: value not in values,
    "Exists": lambda value, values: value is not None,
    "DoesNotExist": lambda value, values: value is None,
    "Gt": lambda value, values: value is not None and value.isdigit() and int(value) > int(values[0]),
    "Lt": lambda value, values: value is not None and value.isdigit() and int(value) < int(values[0]),
}


def _matches(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    return _OPERATORS[expression["operator"]](labels.get(expression["key"]), expression.get("values") or [])


def _is_tolerated(spec: Mapping[str, Any], node: Mapping[str, Any]) -> bool:
    taints = [
        taint
        for taint in node.get("spec", {}).get("taints") or ()
        if taint["effect"] in _BLOCKING and not taint["key"].startswith(_PASSING_TAINTS)
    ]
    tolerations = spec.get("tolerations") or []
    return all(any(_tolerates(each, taint) for each in tolerations) for taint in taints)


def _tolerates(toleration: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("key") not in (None, "", taint["key"]):
        return False
    return toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", "")


def _tell(name: str, amount: float) -> str:
    in_bytes = name in ("memory", "ephemeral-storage") or name.startswith("hugepages-")
    return f"{amount / 2**30:.4g} GiB of {name}" if in_bytes else f"{amount:g} {name}"


def _quantity(text: Any) -> float:
    from kubernetes.utils.quantity import parse_quantity

    return float(parse_quantity(text))
