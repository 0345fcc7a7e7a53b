"""What breaks a site's rule in one pod: functions that yield a sentence for each breach."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from kallm.cluster.podspecs import PlannedPod

__all__ = [
    "NRP_GPUS",
    "allow_time_to_save",
    "ask_for_gpus_by_name",
    "ask_for_gpus_with_quota",
    "ask_for_no_nautilus",
    "do_not_sleep",
    "give_resources",
    "hold_few_gpus",
    "keep_data_outside",
    "keep_limits_near_requests",
    "keep_shared_memory_in_limit",
    "name_gpu_product",
    "need_one_node",
    "pin_images",
    "refer_to_secrets",
    "use_priorities",
]

SAVE_S = 90
"""Shortest grace period for a training pod, s: kallm saves its state within 60 s of SIGTERM."""
NRP_PRIORITIES = frozenset({"armada-default", "owner-no-preempt", "opportunistic", "opportunistic2"})
NRP_GPUS = frozenset({"gpu", "a40", "rtxa6000", "rtx8000", "a100", "h100", "h200", "gh200", "rtx6000bw", "mig-small"})
_NRP_QUOTA = frozenset({"a100", "h100", "h200", "gh200"})
_NRP_OPPORTUNISTIC = frozenset({"opportunistic", "opportunistic2"})
_MAX_RATIO = 1.2
_SLEEP = re.compile(r"(^|[\s;&|/])(sleep\s+\S+|tail\s+-f\s+/dev/null)\s*[;\"')]*\s*$")
_SECRET_NAME = re.compile(r"SECRET|PASSWORD|PASSWD|TOKEN|CREDENTIAL|ACCESS_KEY|API_KEY|PRIVATE_KEY")
_HOSTNAME = "kubernetes.io/hostname"


def _quantity(text: object) -> float:
    """Return a Kubernetes quantity (``500m``, ``8Gi``) as a number."""
    from kubernetes.utils.quantity import parse_quantity

    return float(parse_quantity(text))


def _amounts(container: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return requests and limits; Kubernetes takes a request that is not given from its limit."""
    resources = container.get("resources") or {}
    limits = resources.get("limits") or {}
    return {**limits, **(resources.get("requests") or {})}, limits


def _gpus(container: dict[str, Any]) -> dict[str, float]:
    """Return the GPUs that a container asks for, by the name after ``nvidia.com/``."""
    asked, _ = _amounts(container)
    return {name[11:]: _quantity(count) for name, count in asked.items() if name.startswith("nvidia.com/")}


def give_resources(*names: str) -> Callable[[PlannedPod], Iterator[str]]:
    """Return the rule that every container has a request and a limit of each of these resources."""

    def check(pod: PlannedPod) -> Iterator[str]:
        for container in pod.containers:
            for kind, amounts in zip(("request", "limit"), _amounts(container), strict=True):
                missing = [name for name in names if name not in amounts]
                if missing:
                    what = ", ".join(missing)
                    yield f"container {container['name']} has no {kind} of {what}: every container needs one"

    return check


def keep_limits_near_requests(pod: PlannedPod) -> Iterator[str]:
    for container in pod.containers:
        asked, limits = _amounts(container)
        for name, limit in limits.items():
            if _quantity(limit) > _MAX_RATIO * _quantity(asked[name]) + 1e-9:
                yield (
                    f"container {container['name']} may use {limit} of {name} and requests {asked[name]}: "
                    "a limit may be at most 20 % above its request"
                )


def use_priorities(pod: PlannedPod) -> Iterator[str]:
    name = pod.spec.get("priorityClassName")
    if name and name not in NRP_PRIORITIES:
        yield f"priority class {name} is rejected: leave it out, or take one of {', '.join(sorted(NRP_PRIORITIES))}"


def do_not_sleep(pod: PlannedPod) -> Iterator[str]:
    if pod.owner.get("kind") == "Pod":
        return
    for container in pod.containers:
        words = [str(word) for word in (container.get("command") or []) + (container.get("args") or [])]
        if _SLEEP.search(" ".join(words)) or _SLEEP.search(str(container.get("source", ""))):
            yield f"container {container['name']} ends in a sleep, which gets its user banned: let it end with its work"


def ask_for_gpus_by_name(names: Iterable[str], pattern: str = "(?!)") -> Callable[[PlannedPod], Iterator[str]]:
    """Return the rule that GPU resources have one of these names, or one that the pattern matches."""

    def check(pod: PlannedPod) -> Iterator[str]:
        for container in pod.containers:
            for name in _gpus(container):
                if name not in names and not re.fullmatch(pattern, name):
                    known = ", ".join(f"nvidia.com/{each}" for each in sorted(names))
                    yield f"container {container['name']} asks for nvidia.com/{name}: the names there are {known}"

    return check


def name_gpu_product(pod: PlannedPod) -> Iterator[str]:
    """Cells on different GPUs are not compared without a flag in the table, so one product is named."""
    if not any("gpu" in _gpus(container) for container in pod.containers):
        return
    products = [
        value
        for expression in _node_expressions(pod)
        if expression.get("key") == "nvidia.com/gpu.product" and expression.get("operator") == "In"
        for value in expression.get("values") or []
    ]
    if not products and "nvidia.com/gpu.product" not in pod.spec.get("nodeSelector", {}):
        yield (
            "asks for any GPU: require one nvidia.com/gpu.product by node affinity, or cells run on different hardware "
            "and their pairs are flagged in the table"
        )


def _node_expressions(pod: PlannedPod) -> Iterator[dict[str, Any]]:
    affinity = (pod.spec.get("affinity") or {}).get("nodeAffinity") or {}
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    for term in terms.get("nodeSelectorTerms") or []:
        yield from term.get("matchExpressions") or []


def hold_few_gpus(most: int) -> Callable[[PlannedPod], Iterator[str]]:
    """Return the rule that a pod asks for at most so many GPUs."""

    def check(pod: PlannedPod) -> Iterator[str]:
        count = sum(sum(_gpus(container).values()) for container in pod.containers)
        if count > most:
            yield f"asks for {count:g} GPUs: a pod may hold at most {most}"

    return check


def ask_for_gpus_with_quota(pod: PlannedPod) -> Iterator[str]:
    if pod.spec.get("priorityClassName") in _NRP_OPPORTUNISTIC:
        return
    for container in pod.containers:
        for name in sorted(_NRP_QUOTA & set(_gpus(container))):
            yield (
                f"container {container['name']} asks for nvidia.com/{name}, of which the quota is 0: ask for a "
                "quota, or take priority class opportunistic and be preempted at any time"
            )


def keep_shared_memory_in_limit(pod: PlannedPod) -> Iterator[str]:
    memory = {
        volume["name"]: volume["emptyDir"].get("sizeLimit")
        for volume in pod.spec.get("volumes") or []
        if (volume.get("emptyDir") or {}).get("medium") == "Memory"
    }
    for container in pod.containers:
        mounted = {mount["name"] for mount in container.get("volumeMounts") or []} & set(memory)
        limit = _amounts(container)[1].get("memory")
        if not mounted or limit is None:
            continue
        if any(memory[name] is None for name in mounted):
            yield f"container {container['name']} has a memory volume without sizeLimit: give one, below {limit}"
        elif sum(_quantity(memory[name]) for name in mounted) >= _quantity(limit):
            yield f"container {container['name']} has memory volumes that fill its limit of {limit}: make them smaller"


def refer_to_secrets(pod: PlannedPod) -> Iterator[str]:
    for container in pod.containers:
        for variable in container.get("env") or []:
            if variable.get("value") and _SECRET_NAME.search(variable["name"].upper()):
                where = f"container {container['name']}"
                yield f"{where} has the value of {variable['name']} for all to read: use valueFrom.secretKeyRef"


def pin_images(pod: PlannedPod) -> Iterator[str]:
    for container in pod.containers:
        image = container.get("image", "")
        tag = image.rpartition("/")[2].partition(":")[2]
        if "{{" not in image and "@sha256:" not in image and tag in ("", "latest"):
            yield f"container {container['name']} runs {image or 'nothing'}, which may change: name a version or digest"


def allow_time_to_save(pod: PlannedPod) -> Iterator[str]:
    trains = any((container.get("args") or [""])[0] == "cell" for container in pod.containers)
    grace_s = pod.spec.get("terminationGracePeriodSeconds", 30)
    if trains and grace_s < SAVE_S:
        yield f"has {grace_s} s between SIGTERM and SIGKILL: kallm may take 60 s to save, so give it {SAVE_S} or more"


def ask_for_no_nautilus(pod: PlannedPod) -> Iterator[str]:
    """What only NRP has, left over in a manifest."""
    if pod.spec.get("priorityClassName") in NRP_PRIORITIES:
        yield f"priority class {pod.spec['priorityClassName']} exists on NRP only: leave it out"
    tolerated = [toleration.get("key") for toleration in pod.spec.get("tolerations") or []]
    labels = [expression.get("key") for expression in _node_expressions(pod)]
    for key in sorted({str(key) for key in [*tolerated, *labels, *pod.spec.get("nodeSelector", {})]}):
        if key.startswith("nautilus.io/"):
            yield f"looks for {key}, which only NRP's nodes have: leave it out"


def need_one_node(pod: PlannedPod) -> Iterator[str]:
    """A lease often is one node."""
    if "nodeAntiAffinity" in (pod.retry.get("affinity") or {}):
        yield "avoids the nodes of earlier attempts, so on a single node it waits for ever: drop nodeAntiAffinity"
    rules = (pod.spec.get("affinity") or {}).get("podAntiAffinity") or {}
    required = rules.get("requiredDuringSchedulingIgnoredDuringExecution") or []
    if any(term.get("topologyKey") == _HOSTNAME for term in required):
        yield "requires a node without its like, so on a single node it waits for ever: prefer it instead"


def keep_data_outside(pod: PlannedPod) -> Iterator[str]:
    for volume in pod.spec.get("volumes") or []:
        if "hostPath" in volume or "persistentVolumeClaim" in volume:
            yield f"volume {volume['name']} is on a leased disk, and wiped when the lease ends: use the object store"
