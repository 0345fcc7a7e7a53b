"""Submitting to a real cluster: what is wrong is said before anything is created, and what cannot start is deleted."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube import PATCH, connect_or_skip, kallm, make_secret, make_site, own_namespace, patch_running

from kallm.cluster.client import JOB, NODE, POD, SECRET, SERVICE_ACCOUNT, WORKFLOW, Cluster, Kind
from kallm.cluster.patch import merge_patch

pytestmark = pytest.mark.e2e
ENGINES = ("argo", "jobs")
POD_TEMPLATE = Kind("PodTemplate", "/api/v1", "podtemplates")


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return connect_or_skip()


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[Cluster]:
    with own_namespace(cluster) as place:
        yield place


@pytest.fixture
def site(namespace: Cluster) -> Iterator[Cluster]:
    """The namespace, put in order again after each test."""
    yield namespace
    make_site(namespace)
    make_secret(namespace)
    for kind in (WORKFLOW, JOB):
        if namespace.knows(kind):
            for each in namespace.list(kind):
                namespace.delete(kind, each["metadata"]["name"])


@pytest.fixture
def argo(site: Cluster) -> Cluster:
    if not site.knows(WORKFLOW):
        pytest.skip("the cluster has no Argo Workflows")
    return site


def wait_until_gone(place: Cluster) -> None:
    for _ in range(60):
        left = [each for kind in (JOB, WORKFLOW, POD) if place.knows(kind) for each in place.list(kind)]
        if not left:
            return
        time.sleep(1)
    raise AssertionError([each["metadata"]["name"] for each in left])


def refuse(place: Cluster, tmp_path: Path, *arguments: str) -> str:
    """Submit, see that it is refused in one line with code 2 and that nothing is left; return the line."""
    done = kallm("submit", "smoke", "--namespace", place.namespace, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    wait_until_gone(place)
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_dry_run_is_accepted_by_the_api_server(engine: str, site: Cluster, tmp_path: Path) -> None:
    kind = WORKFLOW if engine == "argo" else JOB
    if not site.knows(kind):
        pytest.skip("the cluster has no Argo Workflows")
    done = kallm("submit", "demo", "-n", site.namespace, "--engine", engine, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = yaml.safe_load(done.stdout)
    site.create(kind, manifest, dry_run=True)
    assert site.list(kind) == []
    assert "nothing" not in done.stdout  # the Secret's value


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_missing_is_said_before_anything_is_created(engine: str, site: Cluster, tmp_path: Path) -> None:
    options = ("--engine", engine)
    make_site(site, labelled=False)
    assert "lacks the label workflows.argoproj.io/configmap-type=Parameter" in refuse(site, tmp_path, *options)
    site.delete(Kind("ConfigMap", "/api/v1", "configmaps"), "kallm-site")
    assert "there is no ConfigMap 'kallm-site'" in refuse(site, tmp_path, *options)
    make_site(site)
    make_secret(site, AWS_ACCESS_KEY_ID="nobody")
    assert "without AWS_SECRET_ACCESS_KEY is Secret 'kallm-s3'" in refuse(site, tmp_path, *options)
    site.delete(SECRET, "kallm-s3")
    assert "there is no Secret 'kallm-s3'" in refuse(site, tmp_path, *options)
    make_secret(site)
    site.delete(SERVICE_ACCOUNT, "kallm")
    assert "there is no service account 'kallm'" in refuse(site, tmp_path, *options)
    site.create(SERVICE_ACCOUNT, {"metadata": {"name": "kallm"}})


@pytest.mark.parametrize(
    ("patch", "sentence"),
    [
        ({"containers": [{"name": "main", "resources": {"limits": {"nvidia.com/gpu": "64"}}}]}, "64 nvidia.com/gpu is"),
        ({"nodeSelector": {"kallm": "nowhere"}}, "no node has the labels"),
        ({"priorityClassName": "nowhere"}, "no PriorityClass with name nowhere"),
        ({"contaners": []}, 'unknown field "spec.contaners"'),
        ("[1", "'pod-patch' in kallm-site is no JSON"),
    ],
)
def test_a_pod_patch_that_no_node_can_meet_is_refused(patch: Any, sentence: str, site: Cluster, tmp_path: Path) -> None:
    make_site(site, patch=patch)
    assert sentence in refuse(site, tmp_path, "--engine", "jobs")


def test_a_cluster_that_is_not_there_is_one_line(site: Cluster, tmp_path: Path, monkeypatch: Any) -> None:
    assert "unknown context 'nowhere'" in refuse(site, tmp_path, "--context", "nowhere")
    assert "there is no namespace 'nowhere'" in refuse(site, tmp_path, "--namespace", "nowhere")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    done = kallm("submit", "smoke", cwd=tmp_path)
    assert done.returncode == 2
    assert "no kubeconfig can be read" in done.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_an_image_that_cannot_be_pulled_leaves_nothing_behind(engine: str, site: Cluster, tmp_path: Path) -> None:
    line = refuse(site, tmp_path, "--engine", engine, "--image", "registry.invalid/kallm:none")
    assert "is deleted: the image registry.invalid/kallm:none cannot be pulled" in line


def test_a_node_that_is_full_now_is_waited_for(site: Cluster, tmp_path: Path) -> None:
    node = site.list(NODE)[0]
    cpu = str(int(float(node["status"]["allocatable"]["cpu"])))
    idle = _idle()
    idle["containers"][0] |= {"command": ["sleep", "200"], "resources": {"requests": {"cpu": "100m"}}}
    site.create(POD, {"metadata": {"name": "small"}, "spec": {**idle, "terminationGracePeriodSeconds": 0}})
    patch = json.loads(json.dumps(PATCH))
    patch["containers"][0]["resources"] = {side: {"cpu": cpu, "memory": "16Mi"} for side in ("requests", "limits")}
    make_site(site, patch=patch)
    done = kallm("submit", "smoke", "--namespace", site.namespace, "--engine", "jobs", cwd=tmp_path)
    site.delete(POD, "small")
    assert done.returncode == 0, done.stderr
    assert "not begun yet: no node is free (0/1 nodes are available: 1 Insufficient cpu" in done.stderr
    assert site.get(JOB, done.stdout.strip()) is not None


def test_every_index_of_a_job_trains_its_cells_and_ends_by_its_code(site: Cluster, tmp_path: Path) -> None:
    make_site(site, patch=patch_running('for each in "$@"; do echo "[$each]"; done; [ "$3" = 0 ] || exit 4'))
    done = kallm("submit", "smoke", "--namespace", site.namespace, "--engine", "jobs", "--watch", cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    assert "failed: kan.seed-0" in done.stderr
    name = done.stdout.strip()
    job = site.get(JOB, name)
    assert job is not None
    assert job["status"]["completedIndexes"] == "0"
    assert job["status"]["failedIndexes"] == "1"
    assert len(site.list(POD)) == 2, "a final code is not tried again"


def test_other_codes_are_tried_again(site: Cluster, tmp_path: Path) -> None:
    # the second pod of an index finds nothing of the first one but its own name, so it is told by the clock
    script = f"[ $(date +%s) -ge {int(time.time()) + 25} ] || exit 75"
    make_site(site, patch=patch_running(script))
    done = kallm("submit", "smoke", "-n", site.namespace, "--engine", "jobs", "--watch", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(site.list(POD)) > 2


@pytest.mark.parametrize("engine", ENGINES)
def test_cancel_ends_what_kallm_submitted_and_nothing_else(engine: str, site: Cluster, tmp_path: Path) -> None:
    kind = WORKFLOW if engine == "argo" else JOB
    if not site.knows(kind):
        pytest.skip("the cluster has no Argo Workflows")
    make_site(site, patch=patch_running("sleep 600"))
    dry = kallm("submit", "smoke", "-n", site.namespace, "--engine", engine, "--dry-run", cwd=tmp_path)
    name = site.create(kind, yaml.safe_load(dry.stdout))["metadata"]["name"]
    done = kallm("cancel", name, "-n", site.namespace, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if engine == "jobs":
        wait_until_gone(site)
    else:
        found = site.get(kind, name)
        assert found is not None
        assert found["spec"]["shutdown"] == "Stop"
    job = {"metadata": {"name": "theirs"}, "spec": {"suspend": True, "template": {"spec": _idle()}}}
    site.create(JOB, job)
    done = kallm("cancel", "theirs", "-n", site.namespace, cwd=tmp_path)
    assert done.returncode == 2
    assert site.get(JOB, "theirs") is not None


@pytest.mark.parametrize(
    "patch",
    [
        PATCH,
        {"containers": [{"name": "main", "env": [{"name": "A", "value": "2"}, {"name": "C", "value": "3"}]}]},
        {"containers": [{"name": "main", "env": [{"name": "A", "$patch": "delete"}]}]},
        {"containers": [{"name": "other", "image": "busybox"}], "tolerations": [{"key": "b", "operator": "Exists"}]},
        {"containers": [{"name": "main", "command": ["b"], "volumeMounts": [{"mountPath": "/x", "readOnly": True}]}]},
        {"volumes": [{"name": "x", "emptyDir": {"medium": "Memory"}}], "securityContext": None},
        {"securityContext": {"$patch": "replace", "runAsUser": 5}},
    ],
)
def test_a_patch_is_merged_as_the_api_server_merges_it(patch: dict[str, Any], namespace: Cluster) -> None:
    base = {
        **_idle(),
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "securityContext": {"runAsUser": 7, "runAsGroup": 7},
        "volumes": [{"name": "x", "emptyDir": {"sizeLimit": "1Mi"}}],
    }
    main = base["containers"][0]
    main |= {"command": ["a", "b"], "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "1"}]}
    main["volumeMounts"] = [{"name": "x", "mountPath": "/x"}]
    made = namespace.create(POD_TEMPLATE, {"metadata": {"generateName": "t-"}, "template": {"spec": base}})
    start = made["template"]["spec"]
    merged = _merge_there(namespace, made["metadata"]["name"], patch)
    assert _sorted(_without_defaults(merged)) == _sorted(_without_defaults(merge_patch(start, patch)))


def _merge_there(place: Cluster, name: str, patch: dict[str, Any]) -> dict[str, Any]:
    from kubernetes.client import CoreV1Api

    body = {"template": {"spec": patch}}
    found = CoreV1Api(place.api).patch_namespaced_pod_template(
        name,
        place.namespace,
        body,
        _content_type="application/strategic-merge-patch+json",
        _preload_content=False,
    )
    spec: dict[str, Any] = json.loads(found.data)["template"]["spec"]
    return spec


def _idle() -> dict[str, Any]:
    return {"restartPolicy": "Never", "containers": [{"name": "main", "image": "busybox:1.36"}]}


def _without_defaults(spec: dict[str, Any]) -> dict[str, Any]:
    """Drop what the API server fills in for a new container."""
    containers = [
        {key: value for key, value in each.items() if key != "imagePullPolicy" and value != {}}
        for each in spec["containers"]
    ]
    return {**spec, "securityContext": spec.get("securityContext") or {}, "containers": containers}


def _sorted(value: Any) -> Any:
    """Put lists of named things in the order of their names: merging promises none."""
    if isinstance(value, dict):
        return {key: _sorted(entry) for key, entry in value.items() if not key.startswith("terminationMessage")}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return sorted((_sorted(entry) for entry in value), key=lambda entry: json.dumps(entry, sort_keys=True))
    return value
