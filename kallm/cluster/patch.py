"""Strategic merge, the way that Kubernetes and Argo lay a patch over the spec of a pod."""

from collections.abc import Mapping
from typing import Any

__all__ = ["merge_patch"]

_MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "resourceClaims": "name",
    "schedulingGates": "name",
    "ports": "containerPort",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "topologySpreadConstraints": "topologyKey",
    "hostAliases": "ip",
}
"""Lists of PodSpec whose ``patchStrategy`` is merge; every other list is replaced as a whole, ``tolerations`` too."""


def merge_patch(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pod spec with a patch laid over it: null deletes, ``$patch: delete | replace`` are honoured."""
    if patch.get("$patch") == "replace":
        return {key: value for key, value in patch.items() if key != "$patch"}
    merged = dict(base)
    for key, value in patch.items():
        old = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            merged[key] = merge_patch(old if isinstance(old, dict) else {}, value)
        elif isinstance(value, list) and key in _MERGE_KEYS:
            merged[key] = _merge_list(old if isinstance(old, list) else [], value, _MERGE_KEYS[key])
        else:
            merged[key] = value
    return merged


def _merge_list(base: list[Any], patch: list[Any], name: str) -> list[Any]:
    if any(entry.get("$patch") == "replace" for entry in patch):
        return [entry for entry in patch if "$patch" not in entry]
    merged = {entry.get(name): entry for entry in base}
    for entry in patch:
        if entry.get("$patch") == "delete":
            merged.pop(entry.get(name), None)
        else:
            merged[entry.get(name)] = merge_patch(merged.get(entry.get(name), {}), entry)
    return list(merged.values())
