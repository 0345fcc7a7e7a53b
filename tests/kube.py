"""What tests know of a cluster: a namespace of their own with all that a site provides, and kallm as users run it."""

import base64
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kallm.cluster.argo import read_workflow
from kallm.cluster.checks import parse_site
from kallm.cluster.client import CONFIG_MAP, NAMESPACE, SECRET, SERVICE_ACCOUNT, Cluster, connect
from kallm.cluster.submission import Ground
from kallm.errors import WrongConfiguration

SITE = {
    "image": f"registry.example/kallm@sha256:{'1' * 64}",
    "store": "s3://kallm/grid",
    "endpoint": "http://s3.example:7070",
    "parallelism": "3",
    "pod-patch": '{"terminationGracePeriodSeconds": 120, "containers": [{"name": "main", "tty": true}]}',
}
SMALL = "busybox:1.36"
"""An image that the node of the test cluster can pull."""
PATCH = {
    "terminationGracePeriodSeconds": 2,
    "containers": [
        {
            "name": "main",
            "resources": {
                "requests": {"cpu": "10m", "memory": "16Mi", "ephemeral-storage": "16Mi"},
                "limits": {"cpu": "100m", "memory": "64Mi", "ephemeral-storage": "64Mi"},
            },
        }
    ],
}
"""A patch that makes cells small."""


def kallm(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the program; it has no credentials of a store."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "ARGO_"))}
    command = [sys.executable, "-m", "kallm.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)


def patch_running(script: str) -> dict[str, Any]:
    """Return a patch whose cells run a shell script instead of kallm: ``$@`` are kallm's arguments."""
    main = {**PATCH["containers"][0], "command": ["sh", "-c", script, "kallm"]}  # type: ignore[index]
    return {**PATCH, "containers": [main]}


def connect_or_skip() -> Cluster:
    """Return the cluster that KUBECONFIG names."""
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("KUBECONFIG names no cluster")
    try:
        return connect(namespace="default")
    except WrongConfiguration as error:
        pytest.skip(f"KUBECONFIG names no cluster that answers: {error}")


@contextmanager
def own_namespace(cluster: Cluster) -> Iterator[Cluster]:
    """Make a namespace with what k8s/base provides and a Secret, and delete it afterwards."""
    name = f"kallm-test-{uuid.uuid4().hex[:8]}"
    place = connect(namespace=cluster.namespace)
    place.create(NAMESPACE, {"metadata": {"name": name}})
    place.namespace = name
    try:
        for account in ("kallm", "kallm-executor"):
            place.create(SERVICE_ACCOUNT, {"metadata": {"name": account}})
        make_secret(place)
        place.create(
            SECRET,
            {
                "metadata": {
                    "name": "kallm-executor.service-account-token",
                    "annotations": {"kubernetes.io/service-account.name": "kallm-executor"},
                },
                "type": "kubernetes.io/service-account-token",
            },
        )
        make_site(place)
        yield place
    finally:
        place.delete(NAMESPACE, name)


def make_secret(place: Cluster, **keys: str) -> None:
    """Make the Secret of the store anew."""
    keys = keys or {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}
    place.delete(SECRET, "kallm-s3")
    data = {key: base64.b64encode(value.encode()).decode() for key, value in keys.items()}
    place.create(SECRET, {"metadata": {"name": "kallm-s3"}, "data": data})


def make_site(place: Cluster, *, labelled: bool = True, patch: Any = PATCH, **data: str) -> None:
    """Make kallm-site anew; its store is reached by nobody."""
    labels = {"workflows.argoproj.io/configmap-type": "Parameter"} if labelled else {}
    values = {"image": SMALL, "store": "s3://kallm/grid", "endpoint": "http://127.0.0.1:9", "parallelism": "2"}
    values |= {"pod-patch": patch if isinstance(patch, str) else json.dumps(patch)} | data
    place.delete(CONFIG_MAP, "kallm-site")
    place.create(CONFIG_MAP, {"metadata": {"name": "kallm-site", "labels": labels}, "data": values})


def ground(**changes: str) -> Ground:
    """Return what a cluster would say whose kallm-site holds SITE, with changes."""
    workflow = read_workflow()
    site = parse_site({**SITE, **changes}, workflow)
    return Ground(workflow, site, site.values, None, ())
