"""The overlays: what the workflow reads is there, nothing is a credential, and a real cluster takes them."""

import contextlib
import re
import subprocess
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from overlays import (
    RENDERS,
    ROOT,
    WORKFLOW,
    kubectl,
    needs_kubectl,
    read_workflow,
    render,
    rendered,
    site_values,
)

from kallm.cluster.podspecs import plan_pods
from kallm.cluster.rules.pods import refer_to_secrets
from kallm.store.opening import open_store

pytest_plugins = ["overlays"]  # its fixtures: a real cluster, and a namespace there


@needs_kubectl
@pytest.mark.parametrize("overlay", RENDERS)
def test_the_site_has_every_value_that_the_workflow_reads(overlay: str) -> None:
    read = set(re.findall(r"name: kallm-site, key: ([\w-]+)", WORKFLOW.read_text()))
    assert set(site_values(overlay)) == read
    assert int(site_values(overlay)["parallelism"]) <= 4


@needs_kubectl
@pytest.mark.parametrize("overlay", RENDERS)
def test_argo_finds_the_site_by_name_and_label(overlay: str) -> None:
    (found,) = [document for document in render(overlay) if document["kind"] == "ConfigMap"]
    assert found["metadata"]["name"] == "kallm-site"
    assert found["metadata"]["labels"]["workflows.argoproj.io/configmap-type"] == "Parameter"


@needs_kubectl
@pytest.mark.parametrize("overlay", RENDERS)
def test_the_workflows_accounts_exist_and_the_executor_may_only_report(overlay: str) -> None:
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for document in render(overlay):
        by_kind.setdefault(document["kind"], []).append(document)
    accounts = {account["metadata"]["name"] for account in by_kind["ServiceAccount"]}
    executor = read_workflow()["spec"]["executor"]["serviceAccountName"]
    assert accounts == {read_workflow()["spec"]["serviceAccountName"], executor}
    assert [role["rules"] for role in by_kind["Role"]] == [
        [{"apiGroups": ["argoproj.io"], "resources": ["workflowtaskresults"], "verbs": ["create", "patch"]}]
    ]
    (binding,) = by_kind["RoleBinding"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": executor}]
    (secret,) = by_kind["Secret"]
    assert secret["metadata"]["name"] == f"{executor}.service-account-token"
    assert not {"ClusterRole", "ClusterRoleBinding", "Namespace"} & set(by_kind)


@needs_kubectl
@pytest.mark.parametrize("overlay", RENDERS)
def test_no_render_holds_a_credential_or_a_namespace(overlay: str) -> None:
    documents = [*render(overlay), read_workflow()]
    for document in documents:
        assert "namespace" not in document["metadata"]
        assert document["kind"] != "Secret" or not {"data", "stringData"} & set(document)
    for pod in plan_pods(documents):
        assert list(refer_to_secrets(pod)) == []
        references = [
            variable["valueFrom"]["secretKeyRef"]
            for container in pod.containers
            for variable in container.get("env", [])
            if "secretKeyRef" in variable.get("valueFrom", {})
        ]
        assert {reference["name"] for reference in references} <= {"kallm-s3"}
    text = rendered(overlay) + WORKFLOW.read_text()
    assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|eyJ[\w-]{20,}|[0-9a-f]{40}|(?i:password)", text)


@needs_kubectl
@pytest.mark.parametrize("overlay", RENDERS)
def test_images_of_a_render_have_a_version(overlay: str) -> None:
    images = [site_values(overlay)["image"]]
    images += [container["image"] for pod in plan_pods(render(overlay)) for container in pod.containers]
    assert all(re.search(r":v?\d[\w.]*$|@sha256:[0-9a-f]{64}$", image) for image in images)


@pytest.mark.e2e
@pytest.mark.parametrize("overlay", RENDERS)
def test_the_cluster_accepts_each_overlay_strictly(overlay: str, namespace: str) -> None:
    command = ["kubectl", "apply", "-n", namespace, "--dry-run=server", "--validate=strict"]
    done = subprocess.run([*command, "-k", str(ROOT / "k8s" / overlay)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@contextlib.contextmanager
def forwarded(namespace: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wait for the overlay's S3 server and make it AWS_ENDPOINT_URL, by a port of this machine."""
    kubectl("rollout", "status", "deployment/kallm-s3", "-n", namespace, "--timeout=120s")
    command = ["kubectl", "port-forward", "-n", namespace, "service/kallm-s3", ":7070"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"127\.0\.0\.1:(\d+)", process.stdout.readline())
            assert found is not None
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{found[1]}")
            yield
        finally:
            process.terminate()


@pytest.mark.e2e
def test_the_local_overlay_brings_up_a_store_that_survives_its_pod(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "kallm", "AWS_SECRET_ACCESS_KEY": uuid.uuid4().hex}
    kubectl("create", "secret", "generic", "kallm-s3", "-n", namespace, "--from-env-file=/dev/stdin",
            text="".join(f"{name}={value}\n" for name, value in keys.items()))  # fmt: skip
    kubectl("apply", "-n", namespace, "-k", str(ROOT / "k8s/overlays/local"))
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    with forwarded(namespace, monkeypatch):
        store = open_store(site_values("overlays/local")["store"], writable=True)
        assert store.create("note", b"first")
        assert not store.create("note", b"second")
    kubectl("delete", "pod", "-n", namespace, "-l", "app.kubernetes.io/name=kallm-s3")
    with forwarded(namespace, monkeypatch):
        store = open_store(site_values("overlays/local")["store"], writable=True)
        assert store.get("note") == b"first"
        store.delete("note")
