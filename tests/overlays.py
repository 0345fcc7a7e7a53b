"""What the tests of the overlays share: their renders, and a namespace of a real cluster."""

import functools
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
OVERLAYS = ROOT / "k8s"
WORKFLOW = ROOT / "workflows/kallm.yaml"
RENDERS = ["base", "overlays/local", "overlays/nrp", "overlays/chameleon"]

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def read_workflow() -> dict[str, Any]:
    return yaml.safe_load(WORKFLOW.read_text())


@functools.cache
def rendered(overlay: str) -> str:
    """Return the text of what `kubectl apply -k` would send; a warning of kustomize is an error here."""
    command = ["kubectl", "kustomize", str(OVERLAYS / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def render(overlay: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(rendered(overlay)))


def site_values(overlay: str) -> dict[str, str]:
    (found,) = [document for document in render(overlay) if document["metadata"]["name"] == "kallm-site"]
    return found["data"]


def kubectl(*words: str, text: str | None = None) -> str:
    done = subprocess.run(["kubectl", *words], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cluster() -> None:
    """Skip unless KUBECONFIG names a cluster that answers."""
    if "KUBECONFIG" not in os.environ or shutil.which("kubectl") is None:
        pytest.skip("KUBECONFIG names no cluster, or kubectl is missing")
    if subprocess.run(["kubectl", "get", "--raw=/readyz"], capture_output=True, timeout=30, check=False).returncode:
        pytest.skip("the cluster that KUBECONFIG names does not answer")


@pytest.fixture
def namespace(cluster: None) -> Iterator[str]:
    name = f"kallm-test-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    yield name
    kubectl("delete", "namespace", name, "--wait=false")
