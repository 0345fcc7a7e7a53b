"""What is sent to a cluster: the study, the workflow, the Job, and what is refused before."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from kube import SITE, ground

from kallm.cluster.argo import Progress, fill_workflow, read_workflow, render_cell_pod, workflow_progress
from kallm.cluster.checks import parse_site
from kallm.cluster.jobs import FINAL_CODES, job_progress, render_job
from kallm.cluster.submission import Ground, Request, describe_command, dump_manifest, prepare, render_study
from kallm.errors import ExitCode, WrongConfiguration
from kallm.study.plan import make_plan
from kallm.study.study import read_study


@pytest.mark.parametrize("preset", ["smoke", "demo"])
def test_the_study_that_is_sent_is_planned_as_the_one_that_was_named(preset: str) -> None:
    plan = make_plan(read_study(preset))
    assert make_plan(read_study(render_study(plan.study))).document == plan.document


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
    labels = render_cell_pod(workflow, {"cells": "a;b", "name": "x", "study": "y"}, {})["metadata"]["labels"]
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


@pytest.mark.parametrize("module", ["kallm.cli", "kallm.commands.cluster"])
def test_the_kubernetes_client_is_imported_only_when_a_cluster_is_asked(module: str) -> None:
    code = f"import sys, {module}; sys.exit(bool({{'kubernetes', 'argo_workflows', 'torch'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
