"""Whether a pod can start, and where it could: judged from what a cluster says."""

from typing import Any

import pytest

from kallm.cluster.placement import explain_misfit
from kallm.cluster.starting import Start, judge_start


def node(name: str = "n", *, labels: Any = None, taints: Any = None, **allocatable: str) -> dict[str, Any]:
    offered = {
        "cpu": "8",
        "memory": "32Gi",
        **{key.replace("gpu", "nvidia.com/gpu"): v for key, v in allocatable.items()},
    }
    return {
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {"taints": taints or []},
        "status": {"allocatable": offered},
    }


def spec(requests: Any = None, **fields: Any) -> dict[str, Any]:
    return {"containers": [{"name": "main", "resources": {"requests": requests or {"cpu": "1"}}}], **fields}


def product(operator: str, *values: str) -> dict[str, Any]:
    term = {"matchExpressions": [{"key": "product", "operator": operator, "values": list(values)}]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}


GPU_TAINT = [{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]


@pytest.mark.parametrize(
    ("asked", "nodes", "why"),
    [
        (spec(), [node()], None),
        (spec(), [], "the cluster has no nodes"),
        (spec({"cpu": "9"}), [node()], "9 cpu is asked for, but the largest node offers 8"),
        (spec({"memory": "64Gi"}), [node()], "64 GiB of memory is asked for, but the largest node offers 32 GiB"),
        (spec({"nvidia.com/gpu": "1"}), [node()], "the nodes' device plugin, is missing"),
        (spec({"nvidia.com/gpu": "1"}), [node(), node(gpu="2")], None),
        (spec({"nvidia.com/gpu": "4", "cpu": "32"}), [node(gpu="4"), node(cpu="64")], "no single node offers all"),
        (spec(nodeSelector={"a": "b"}), [node(labels={"a": "c"})], "no node has the labels"),
        (spec(affinity=product("In", "A40", "A100")), [node(labels={"product": "A100"})], None),
        (spec(affinity=product("NotIn", "A100")), [node(labels={"product": "A100"})], "no node has the labels"),
        (spec(affinity=product("Gt", "11")), [node(labels={"product": "12"})], None),
        (spec(affinity=product("Gt", "12")), [node(labels={"product": "12"})], "no node has the labels"),
        (spec(), [node(taints=GPU_TAINT)], "a taint that the pod does not tolerate"),
        (spec(tolerations=[{"key": "gpu", "value": "yes"}]), [node(taints=GPU_TAINT)], None),
        (spec(tolerations=[{"operator": "Exists"}]), [node(taints=GPU_TAINT)], None),
        (spec(), [node(taints=[{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}])], None),
    ],
)
def test_a_pod_fits_an_idle_node_or_it_is_said_why_not(asked: Any, nodes: Any, why: str | None) -> None:
    found = explain_misfit(asked, nodes)
    assert found is None if why is None else why in str(found)


def pod(phase: str = "Pending", **status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p"}, "spec": spec({"cpu": "9"}), "status": {"phase": phase, **status}}


UNPLACED = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes: cpu"}]
TOLD = "0/1 nodes are available: cpu"
EVENT = {"reason": "FailedScheduling", "involvedObject": {"name": "p"}, "message": TOLD}


def waiting(reason: str) -> list[dict[str, Any]]:
    return [{"name": "main", "image": "x:1", "state": {"waiting": {"reason": reason, "message": "Back-off"}}}]


@pytest.mark.parametrize(
    ("pods", "events", "nodes", "start"),
    [
        ([], [], [], Start(waiting="no pod is there yet")),
        ([], [{"reason": "FailedCreate", "message": "quota"}], [], "the cluster refuses the pods: quota"),
        ([pod("Succeeded")], [], [], Start(running=True)),
        ([pod(), pod(containerStatuses=[{"name": "main", "state": {"running": {}}}])], [], [], Start(running=True)),
        ([pod(containerStatuses=waiting("ImagePullBackOff"))], [], [], "the image x:1 cannot be pulled"),
        ([pod(containerStatuses=waiting("CreateContainerConfigError"))], [], [], "the container cannot be made"),
        ([pod(conditions=UNPLACED)], [EVENT], [node(cpu="4")], "offers 4 cpu (0/1 nodes are available"),
        ([pod(conditions=UNPLACED)], [EVENT], [node(cpu="16")], Start(waiting=f"no node is free ({TOLD})")),
        ([pod(conditions=UNPLACED)], [], None, Start(waiting="no node is free (0/1 nodes: cpu)")),
    ],
)  # fmt: skip
def test_pods_say_that_they_run_wait_or_never_will(pods: Any, events: Any, nodes: Any, start: Start | str) -> None:
    found = judge_start(pods, events, nodes)
    assert found == start if isinstance(start, Start) else start in found.trouble
