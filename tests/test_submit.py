"""What is sent to a cluster, and what is made of its answers; the cluster itself is in tests/e2e."""

import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from kallm.cluster.argo import Progress, fill_workflow, read_workflow, render_cell_pod, workflow_progress
from kallm.cluster.checks import parse_site
from kallm.cluster.images import find_digest, split_image
from kallm.cluster.jobs import FINAL_CODES, job_progress, render_job
from kallm.cluster.placement import explain_misfit
from kallm.cluster.server import ServerEngine, ServerSettings
from kallm.cluster.starting import Start, judge_start
from kallm.cluster.submission import Ground, Request, describe_command, dump_manifest, pin, prepare, render_study
from kallm.cluster.watching import Pace, await_start, raise_outcome, watch
from kallm.errors import CellsMissing, Diverged, ExitCode, WrongConfiguration
from kallm.results.status import CellStatus
from kallm.study.plan import make_plan
from kallm.study.study import read_study

SITE = {
    "image": f"registry.example/kallm@sha256:{'1' * 64}",
    "store": "s3://kallm/grid",
    "endpoint": "http://s3.example:7070",
    "parallelism": "3",
    "pod-patch": '{"terminationGracePeriodSeconds": 120, "containers": [{"name": "main", "tty": true}]}',
}
QUICK = Pace(poll_s=0.01, hold_s=0.05, start_s=0.3, watch_s=0.01, patience_s=0.1)


def ground(**changes: str) -> Ground:
    workflow = read_workflow()
    site = parse_site({**SITE, **changes}, workflow)
    return Ground(workflow, site, site.values, None, ())


@pytest.mark.parametrize("preset", ["smoke", "demo"])
def test_the_study_that_is_sent_is_planned_as_the_one_that_was_named(preset: str) -> None:
    plan = make_plan(read_study(preset))
    assert make_plan(read_study(render_study(pin(plan).study))).document == plan.document


def test_what_argo_and_kubernetes_would_expand_is_escaped_in_a_study() -> None:
    note = "{{workflow.name}} costs $(HOME) ${HOME} {{{{ \\ \"quoted\" 'x' ✓"
    plan = make_plan(read_study("smoke", [f"description={note}", f"notes={json.dumps([note])}"]))
    text = render_study(plan.study)
    assert "{{" not in text
    assert "$" not in text
    assert "\n" in text, "or it would be taken for a preset's name"
    assert make_plan(read_study(text)).document == plan.document


def test_a_job_is_the_workflows_cell_but_for_its_arguments() -> None:
    """One truth: image, environment, volumes, security and accounts come from the workflow file."""
    plan = make_plan(read_study("demo"))
    job = prepare(plan, Request("jobs"), ground(), "mine").manifest
    cell = prepare(plan, Request("argo"), ground(), "mine").pod
    theirs, ours = cell["spec"], job["spec"]["template"]["spec"]
    assert {**theirs, "containers": []} == {**ours, "containers": []}
    assert {**theirs["containers"][0], "args": 0} == {**ours["containers"][0], "args": 0}
    assert ours["terminationGracePeriodSeconds"] == 120
    assert ours["containers"][0]["tty"] is True, "the site's patch"
    assert ours["automountServiceAccountToken"] is False
    assert "{{" not in json.dumps(job)
    text, cells = ours["containers"][0]["args"][-2:]
    assert make_plan(read_study(text)).document == plan.document
    assert [part.split(",") for part in cells.split(";")] == [[cell.label] for cell in plan.cells]
    assert job["spec"]["completions"] == len(plan.cells)
    assert job["spec"]["parallelism"] == 3


def test_an_index_is_put_into_the_arguments_by_kubernetes_and_nothing_else_is() -> None:
    workflow = fill_workflow(read_workflow(), {**SITE_VALUES, "study": "a $(HOME)\n", "store": "s3://kallm/$(X)"})
    pods = [{"name": "a", "cells": "kan.seed-0", "variant": "kan", "seed": "0"}]
    job = render_job(workflow, pods, {}, study="x", parallelism=4)
    arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
    expanded = [_expand(argument, {"JOB_COMPLETION_INDEX": "0", "HOME": "/"}) for argument in arguments]
    ours = ["--part", "0", "--table"]
    assert expanded == ["cell", *ours, "--store", "s3://kallm/$(X)", "--", "a $(HOME)\n", "kan.seed-0"]


SITE_VALUES = {**{key: value for key, value in SITE.items() if key != "parallelism"}, "region": "us-east-1"}


def _expand(text: str, environment: Mapping[str, str]) -> str:
    """Expand as Kubernetes does: ``$(NAME)`` where it is known, ``$$`` is a dollar."""

    def one(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else environment.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", one, text)


def test_final_exit_codes_are_those_of_the_workflow() -> None:
    cell = next(each for each in read_workflow()["spec"]["templates"] if each["name"] == "cell")
    expression = cell["retryStrategy"]["expression"]
    assert re.findall(r"'(\d+)'", expression) == [str(code) for code in FINAL_CODES]
    assert {ExitCode.PREEMPTED, ExitCode.STORAGE_UNAVAILABLE, ExitCode.INTERNAL}.isdisjoint(FINAL_CODES)


def test_all_variants_of_a_seed_share_a_pod_where_asked() -> None:
    job = prepare(make_plan(read_study("demo")), Request("jobs", share="seed"), ground(), "mine").manifest
    cells = job["spec"]["template"]["spec"]["containers"][0]["args"][-1]
    assert cells == "baseline;" + ";".join(f"linear.seed-{seed},kan.seed-{seed}" for seed in range(3))


def test_a_manifest_reads_back_as_it_was() -> None:
    manifest = prepare(make_plan(read_study("demo")), Request("argo"), ground(), "mine").manifest
    text = dump_manifest(manifest)
    assert yaml.safe_load(text) == manifest
    assert "&id" not in text, "kubectl reads aliases, people do not"


def test_an_argo_server_resolves_what_only_the_site_knows() -> None:
    bare = Ground(read_workflow(), parse_site({"parallelism": "1"}, read_workflow()), {}, None, ())
    sent = prepare(make_plan(read_study("smoke")), Request("server"), bare, None).manifest
    parameters = {each["name"]: each for each in sent["spec"]["arguments"]["parameters"]}
    assert "configMapKeyRef" in parameters["image"]["valueFrom"]
    assert "name: smoke" in parameters["study"]["value"]


def test_a_folder_of_this_machine_is_refused(model_folder: Path) -> None:
    plan = make_plan(read_study("smoke", [f"model={model_folder}", "tail=2"]))
    with pytest.raises(WrongConfiguration, match="is a folder of this machine, which pods do not see"):
        prepare(plan, Request(), ground(), "mine")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"parallelism": "many"}, "'parallelism' in kallm-site must be how many"),
        ({"parallelism": "0"}, "'parallelism' in kallm-site must be how many"),
        ({}, "but is missing"),
        ({"parallelism": "1", "pod-patch": "{"}, "'pod-patch' in kallm-site is no JSON"),
        ({"parallelism": "1", "pod-patch": "[]"}, "must be a JSON object"),
    ],
)
def test_a_wrong_value_of_the_site_is_named(data: dict[str, str], sentence: str) -> None:
    with pytest.raises(WrongConfiguration, match=re.escape(sentence)):
        parse_site(data, read_workflow())


def test_a_label_whose_input_is_not_known_is_left_out() -> None:
    workflow = fill_workflow(read_workflow(), {**SITE_VALUES})
    labels = render_cell_pod(workflow, {"cells": "a;b", "name": "x"}, {})["metadata"]["labels"]
    assert labels == {"app.kubernetes.io/name": "kallm"}


@pytest.mark.parametrize(
    ("study", "set_", "request_", "line"),
    [
        ("smoke", [], Request("argo"), "argo submit workflows/kallm.yaml -n mine -p study=smoke -p cells=unfinished"),
        ("smoke", [], Request("jobs"), "kallm submit smoke --engine=jobs --namespace=mine --dry-run | kubectl create"),
        ("smoke", ["seeds=[0]"], Request(), "kallm submit smoke '--set=seeds=[0]' --namespace=mine --dry-run |"),
        ("-", [], Request("server"), "kallm submit - --engine=server --namespace=mine --dry-run | argo submit -"),
    ],
)
def test_every_submission_tells_the_line_it_stands_for(
    study: str, set_: list[str], request_: Request, line: str
) -> None:
    manifest = prepare(make_plan(read_study("smoke")), Request(), ground(), "mine").manifest
    assert describe_command(request_, study, set_, namespace="mine", manifest=manifest).startswith(line)


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


class Stage:
    """An engine whose cluster says what the test wrote down, the last of it for ever."""

    namespace = "mine"

    def __init__(self, *scenes: tuple[Progress, Start]) -> None:
        self.scenes = list(scenes)
        self.removed: list[str] = []

    def progress(self, name: str) -> Progress:
        return self.scenes[0][0]

    def look(self, name: str, *, pending: bool = False) -> Start:
        return self.scenes.pop(0)[1] if len(self.scenes) > 1 else self.scenes[0][1]

    def remove(self, name: str) -> None:
        self.removed.append(name)

    def create(self, manifest: Mapping[str, Any]) -> str:
        raise AssertionError

    def stop(self, name: str) -> bool:
        raise AssertionError

    def names(self) -> list[str]:
        raise AssertionError

    def commands(self, name: str) -> tuple[str, str]:
        raise AssertionError


RUNNING, PENDING = Progress("Running", False, False), Progress("", False, False, begun=False)
OVER, FAILED = Progress("Succeeded", True, True), Progress("Failed · 3/4", True, False)


@pytest.mark.parametrize(
    ("scenes", "told"),
    [
        ([(RUNNING, Start(waiting="x")), (RUNNING, Start(running=True))], ""),
        ([(RUNNING, Start(trouble="a hiccup")), (RUNNING, Start(running=True))], ""),
        ([(OVER, Start(waiting="x"))], ""),
        ([(RUNNING, Start(waiting="no node is free (x)"))], "no node is free (x)"),
    ],
)
def test_what_runs_or_waits_its_turn_is_left_alone(scenes: Any, told: str) -> None:
    stage = Stage(*scenes)
    assert await_start(stage, "it", QUICK) == told
    assert stage.removed == []


@pytest.mark.parametrize(
    ("scene", "sentence"),
    [
        ((RUNNING, Start(trouble="no such image")), "it cannot start and is deleted: no such image"),
        ((FAILED, Start(waiting="x")), "it cannot start and is deleted: Failed"),
        ((PENDING, Start(waiting="x")), "no Argo controller takes it up in this namespace; use --engine jobs"),
    ],
)
def test_what_can_never_start_is_deleted(scene: Any, sentence: str) -> None:
    stage = Stage(scene)
    with pytest.raises(WrongConfiguration, match=sentence):
        await_start(stage, "it", QUICK)
    assert stage.removed == ["it"]


def cell(state: str, variant: str = "kan") -> CellStatus:
    told = {"id": f"{variant}.seed-0.0", "variant": variant, "seed": 0, "detail": "exit 6: memory", "trained": False}
    return CellStatus.model_validate({**told, "state": state})


def test_watching_tells_every_change_once_and_ends_with_the_study() -> None:
    stage = Stage((RUNNING, Start()), (RUNNING, Start()), (RUNNING, Start(waiting="no node is free")), (OVER, Start()))
    console = Console(record=True, force_terminal=False, width=80)
    assert watch(stage, "it", lambda: [cell("running")], console, QUICK) == OVER
    assert console.export_text().splitlines() == [
        "it: Running · 1 running",
        "it: Running · no node is free · 1 running",
        "it: Succeeded · 1 running",
    ]


@pytest.mark.parametrize(
    ("progress", "cells", "error"),
    [
        (OVER, [], None),
        (FAILED, [], CellsMissing),
        (FAILED, [cell("done")], None),
        (OVER, [cell("done"), cell("failed", "linear")], CellsMissing),
        (OVER, [cell("done"), cell("diverged", "linear")], Diverged),
        (OVER, [cell("missing"), cell("diverged", "linear")], CellsMissing),
    ],
)
def test_the_cells_decide_the_exit_code(progress: Progress, cells: Any, error: type[Exception] | None) -> None:
    if error is None:
        raise_outcome(progress, cells, where="")
        return
    with pytest.raises(error):
        raise_outcome(progress, cells, where="")


def test_a_workflow_names_what_failed_for_good() -> None:
    nodes = {
        "a": {"type": "Retry", "phase": "Failed", "displayName": "linear.seed-0", "children": ["b", "c"]},
        "b": {"type": "Pod", "phase": "Failed", "displayName": "x(0)", "message": "main: Error (exit code 75)"},
        "c": {"type": "Pod", "phase": "Failed", "displayName": "x(1)", "message": "main: Error (exit code 4)"},
        "d": {"type": "Retry", "phase": "Succeeded", "displayName": "kan.seed-0", "children": ["e"]},
        "e": {"type": "Pod", "phase": "Succeeded", "displayName": "y(0)"},
    }
    found = workflow_progress({"status": {"phase": "Failed", "progress": "3/4", "nodes": nodes}})
    assert found.sentence == "Failed · 3/4 · failed: linear.seed-0 (main: Error (exit code 4))"
    assert (found.finished, found.succeeded) == (True, False)


def test_a_job_names_the_pods_that_failed_for_good() -> None:
    status = {"succeeded": 1, "failedIndexes": "0,2-3", "conditions": [{"type": "Failed", "status": "True"}]}
    job = {"metadata": {"annotations": {"kallm/pods": "a b c d e"}}, "spec": {"completions": 5}, "status": status}
    assert job_progress(job) == Progress("Failed · 1/5 · failed: a, c, d", finished=True, succeeded=False)


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("busybox", ("registry-1.docker.io", "library/busybox", "latest")),
        ("me/kallm:0.1", ("registry-1.docker.io", "me/kallm", "0.1")),
        ("ghcr.io/me/kallm", ("ghcr.io", "me/kallm", "latest")),
        ("localhost/kallm:1", ("localhost", "kallm", "1")),
        ("r.example:5000/a/b:c", ("r.example:5000", "a/b", "c")),
        (f"r.example/a@sha256:{'0' * 64}", ("r.example", "a", "latest")),
    ],
)
def test_an_images_name_is_split_as_runtimes_do(image: str, parts: tuple[str, str, str]) -> None:
    assert split_image(image) == parts


@pytest.mark.parametrize("image", ["", "A/B", "a b", "a:", "https://r.example/a", "a@sha256:12"])
def test_what_is_no_image_is_refused(image: str) -> None:
    with pytest.raises(WrongConfiguration, match="is no name of an image"):
        split_image(image)


Answer = Callable[[str, str, Mapping[str, str], bytes], tuple[int, dict[str, str], bytes]]


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Start a server on the loopback that answers as the test says; return its host and port."""
    servers = []

    def start(answer: Answer) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                status, headers, data = answer(self.command, self.path, self.headers, body)
                self.send_response(status)
                for name, value in {"content-length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else data)

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

            def log_message(self, *arguments: object) -> None:
                """Keep the test's output clean."""

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_digest_is_asked_of_a_registry_that_wants_a_token(serve: Callable[[Answer], str]) -> None:
    digest = f"sha256:{'a' * 64}"

    def answer(method: str, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        if path.startswith("/token"):
            assert "scope=repository" in path
            return 200, {}, b'{"token": "t"}'
        if headers.get("authorization") != "Bearer t":
            realm = f"http://{headers['host']}/token"
            return 401, {"www-authenticate": f'Bearer realm="{realm}",service="r",scope="repository:a/b:pull"'}, b""
        known = path == "/v2/a/b/manifests/1"
        return (200, {"docker-content-digest": digest}, b"") if known else (404, {}, b"")

    host = serve(answer)
    assert find_digest(f"{host}/a/b:1") == (digest, "")
    assert find_digest(f"{host}/a/b:2") == (None, f"{host} answers 404 without a login")


def test_a_registry_that_does_not_answer_leaves_the_tag() -> None:
    digest, why = find_digest("127.0.0.1:1/a:b")
    assert digest is None
    assert "127.0.0.1:1 does not answer from here" in why


def test_an_argo_server_is_asked_by_its_own_api(serve: Callable[[Answer], str]) -> None:
    pytest.importorskip("argo_workflows", reason="the extra argo is not installed")
    asked = []

    def answer(method: str, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        asked.append((method, path, headers.get("authorization"), body))
        if "nowhere" in path:
            return 404, {}, b'{"message": "not found"}'
        if "mine/refused" in path:
            return 403, {}, b'{"message": "not allowed"}'
        status = {"phase": "Running", "nodes": {"a": {"type": "Pod", "phase": "Pending", "message": "ErrImagePull: x"}}}
        return 200, {}, json.dumps({"metadata": {"name": "kallm-x"}, "status": status, "new": {"in": 4.1}}).encode()

    settings = ServerSettings(server=serve(answer), token="Bearer t", secure=False, namespace="mine")  # type: ignore[arg-type]
    engine = ServerEngine(settings)
    manifest = prepare(make_plan(read_study("smoke")), Request("server"), ground(), None).manifest
    assert engine.create(manifest) == "kallm-x"
    assert asked[0][:3] == ("POST", "/api/v1/workflows/mine", "Bearer t")
    assert json.loads(asked[0][3])["workflow"] == manifest
    assert engine.progress("kallm-x").sentence == "Running"
    assert engine.look("kallm-x").trouble == "a pod cannot start: ErrImagePull: x"
    assert engine.stop("kallm-x") is True
    assert asked[-1][:2] == ("PUT", "/api/v1/workflows/mine/kallm-x/stop")
    assert engine.stop("nowhere") is False
    assert engine.progress("nowhere").finished
    with pytest.raises(WrongConfiguration, match="refuses this: not allowed"):
        engine.progress("refused")


def test_an_argo_server_that_is_not_named_or_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARGO_SERVER", raising=False)
    with pytest.raises(WrongConfiguration, match="set ARGO_SERVER to host:port"):
        ServerSettings.from_environment()
    monkeypatch.setenv("ARGO_SERVER", "127.0.0.1:1")
    monkeypatch.setenv("ARGO_SECURE", "perhaps")
    with pytest.raises(WrongConfiguration, match="ARGO_SECURE is wrong"):
        ServerSettings.from_environment()
    monkeypatch.setenv("ARGO_SECURE", "false")
    monkeypatch.setitem(sys.modules, "argo_workflows", None)
    with pytest.raises(WrongConfiguration, match=re.escape("pip install kallm[argo]")):
        ServerEngine(ServerSettings.from_environment())


@pytest.mark.parametrize("module", ["kallm.cli", "kallm.commands.cluster"])
def test_the_kubernetes_client_is_imported_only_when_a_cluster_is_asked(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'kubernetes', 'argo_workflows', 'torch'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
