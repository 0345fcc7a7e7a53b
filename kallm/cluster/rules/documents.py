"""What breaks a site's rule in one document: functions that yield a sentence for each breach."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import yaml

__all__ = [
    "ask_for_no_nautilus_endpoint",
    "belong_to_a_controller",
    "do_not_linger",
    "give_resources_to_executor",
    "keep_secrets_out",
    "keep_store_outside",
    "limit_parallelism",
    "replace_placeholders",
    "stay_in_namespace",
    "use_inside_endpoint",
]

MOST_PODS = 4
_CLUSTER_WIDE = frozenset(
    {"ClusterRole", "ClusterRoleBinding", "ClusterWorkflowTemplate", "CustomResourceDefinition", "Namespace",
     "PersistentVolume", "PriorityClass", "StorageClass", "ValidatingWebhookConfiguration"}
)  # fmt: skip
_SERVICES = frozenset({"Deployment", "StatefulSet", "ReplicaSet", "DaemonSet"})


def _site_values(document: dict[str, Any]) -> dict[str, str]:
    """Return the values of ``kallm-site``; none for any other document."""
    if document.get("kind") != "ConfigMap" or document["metadata"].get("name") != "kallm-site":
        return {}
    return document.get("data") or {}


def give_resources_to_executor(document: dict[str, Any]) -> Iterator[str]:
    """Argo's own containers, init and wait, take their resources from its controller's configuration."""
    if document.get("kind") != "ConfigMap" or document["metadata"].get("name") != "workflow-controller-configmap":
        return
    data = document.get("data") or {}
    whole = yaml.safe_load(data.get("config", "")) or {}
    executor = yaml.safe_load(data.get("executor", "")) or whole.get("executor")
    resources = (executor or {}).get("resources") or {}
    if not {"requests", "limits"} <= set(resources):
        yield "executor.resources has no requests and limits, so Argo's init and wait containers have none: give them"


def belong_to_a_controller(document: dict[str, Any]) -> Iterator[str]:
    if document.get("kind") == "Pod":
        yield "a pod without a controller is taken for interactive and destroyed after 6 hours: make it a Job"


def do_not_linger(document: dict[str, Any]) -> Iterator[str]:
    if document.get("kind") in _SERVICES:
        yield f"a {document['kind']} is removed after two weeks without an exception: use Jobs and the site's storage"


def stay_in_namespace(document: dict[str, Any]) -> Iterator[str]:
    if document.get("kind") in _CLUSTER_WIDE:
        yield f"a {document['kind']} belongs to the whole cluster, where users have no rights: ask the administrators"


def limit_parallelism(document: dict[str, Any]) -> Iterator[str]:
    in_job = (document.get("spec") or {}).get("parallelism") if document.get("kind") == "Job" else None
    asked = _site_values(document).get("parallelism") or in_job
    if int(asked or 0) > MOST_PODS:
        yield f"runs {asked} pods at once: {MOST_PODS} are a fair share, because there is no queue"


def use_inside_endpoint(document: dict[str, Any]) -> Iterator[str]:
    endpoint = _site_values(document).get("endpoint", "")
    if (urlsplit(endpoint).hostname or "").endswith(".nrp-nautilus.io"):
        yield f"endpoint {endpoint} is for outside, and throttled: take the pool's inside address, http://rook-ceph-rgw-…"


def keep_secrets_out(document: dict[str, Any]) -> Iterator[str]:
    if document.get("kind") == "Secret" and (document.get("data") or document.get("stringData")):
        yield "holds a secret in a file: make it with `kubectl create secret`, and refer to it"


def replace_placeholders(document: dict[str, Any]) -> Iterator[str]:
    for name, value in _site_values(document).items():
        if "EDIT-" in str(value):
            yield f"{name} is still {value}: put your own name there"


def keep_store_outside(document: dict[str, Any]) -> Iterator[str]:
    values = _site_values(document)
    store, endpoint = values.get("store", ""), values.get("endpoint", "")
    host = urlsplit(endpoint).hostname or ""
    if store and not store.startswith("s3://"):
        yield f"store {store} is a folder of a node, which is wiped when the lease ends: use s3://BUCKET/PREFIX"
    elif host and ("." not in host or host.endswith((".svc", ".local"))):
        yield f"endpoint {endpoint} is inside the lease, and wiped when it ends: use an object store outside"


def ask_for_no_nautilus_endpoint(document: dict[str, Any]) -> Iterator[str]:
    """What only NRP has, left over in the site's values."""
    endpoint = _site_values(document).get("endpoint", "")
    if (urlsplit(endpoint).hostname or "").startswith("rook-ceph-rgw-"):
        yield f"endpoint {endpoint} is an address inside NRP: use the pool's outside one, or another object store"
