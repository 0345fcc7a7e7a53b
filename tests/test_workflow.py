"""The workflow: valid for every Argo that it names, in step with the code, and its pods locked down."""

import json
import os
import re
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import typer
from overlays import RENDERS, ROOT, WORKFLOW, kubectl, needs_kubectl, read_workflow, site_values
from typer.testing import CliRunner

from kallm.cli import app
from kallm.cluster.podspecs import plan_pods
from kallm.cluster.rules.pods import SAVE_S
from kallm.errors import ExitCode
from kallm.progress import GRACE_S

pytest_plugins = ["overlays"]  # its fixtures: a real cluster, and a namespace there

ARGO = Path(os.environ.get("KALLM_ARGO_SCHEMAS") or ROOT.parent / "shared/data/argo")
RETRIED = {ExitCode.INTERNAL, ExitCode.PREEMPTED, ExitCode.STORAGE_UNAVAILABLE}
FINAL = {code.value for code in ExitCode} - {ExitCode.DONE} - RETRIED


@pytest.fixture
def workflow() -> dict[str, Any]:
    return read_workflow()


@pytest.fixture
def templates(workflow: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {template["name"]: template for template in workflow["spec"]["templates"]}


# --- Argo's schemas, made strict: as published they let unknown keys pass


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a Workflow with unknown keys refused in every object that lists its own."""
    definitions = {
        name: {**definition, "additionalProperties": False} if "properties" in definition else definition
        for name, definition in schema["definitions"].items()
    }
    return {"$ref": "#/definitions/io.argoproj.workflow.v1alpha1.Workflow", "definitions": definitions}


def complaints(version: str, document: dict[str, Any]) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    path = ARGO / f"schema-{version}.json"
    if not path.exists():
        pytest.skip(f"{path} is missing; KALLM_ARGO_SCHEMAS names the folder of Argo's schemas")
    validator = jsonschema.Draft202012Validator(strict(json.loads(path.read_text())))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


@pytest.mark.parametrize("version", ["3.7", "4.0", "4.1"])
def test_the_strict_schema_of_each_argo_accepts_the_workflow(version: str, workflow: dict[str, Any]) -> None:
    assert complaints(version, workflow) == []


@pytest.mark.parametrize("version", ["3.7", "4.0", "4.1"])
def test_the_strict_schema_finds_planted_errors(version: str, workflow: dict[str, Any]) -> None:
    spec = workflow["spec"]
    spec["onExti"] = spec.pop("onExit")
    spec["podPriority"] = 1
    spec["templates"][0]["dag"]["failfast"] = False
    found = "\n".join(complaints(version, workflow))
    assert all(word in found for word in ("onExti", "podPriority", "failfast"))


# --- in step with the code


def test_the_installed_package_carries_the_very_workflow() -> None:
    assert (resources.files("kallm.cluster") / "kallm.yaml").read_bytes() == WORKFLOW.read_bytes()


def test_the_retry_expression_excludes_exactly_the_final_exit_codes(templates: dict[str, dict[str, Any]]) -> None:
    for name in ("plan", "cell", "table"):
        expression = templates[name]["retryStrategy"]["expression"]
        codes = re.search(r"lastRetry\.exitCode in \[(.*?)]", expression)
        assert codes is not None
        assert {int(code) for code in re.findall(r"'(\d+)'", codes[1])} == FINAL
        assert "lastRetry.message matches 'OOMKilled'" in expression


def test_the_description_names_every_exit_code_but_the_internal_one(workflow: dict[str, Any]) -> None:
    text = workflow["metadata"]["annotations"]["workflows.argoproj.io/description"]
    assert {int(code) for code in re.findall(r"\b\d+\b", text)} == (FINAL | RETRIED) - {ExitCode.INTERNAL}


def test_retries_have_a_limit_and_a_backoff_and_no_deadline(templates: dict[str, dict[str, Any]]) -> None:
    for name in ("plan", "cell", "table"):
        strategy = templates[name]["retryStrategy"]
        assert strategy["retryPolicy"] == "Always"
        assert int(strategy["limit"]) > 0
        assert set(strategy["backoff"]) == {"duration", "factor", "cap"}


@pytest.mark.parametrize("overlay", RENDERS)
@needs_kubectl
def test_every_site_gives_cells_longer_than_kallm_takes_to_save(overlay: str) -> None:
    assert SAVE_S > GRACE_S
    assert json.loads(site_values(overlay)["pod-patch"])["terminationGracePeriodSeconds"] >= SAVE_S


def test_the_default_pod_patch_gives_cells_longer_than_kallm_takes_to_save(workflow: dict[str, Any]) -> None:
    (patch,) = [each for each in workflow["spec"]["arguments"]["parameters"] if each["name"] == "pod-patch"]
    assert json.loads(patch["valueFrom"]["default"])["terminationGracePeriodSeconds"] >= SAVE_S


def arguments(template: dict[str, Any], values: dict[str, str]) -> list[str]:
    """Return a template's arguments as Argo fills them in, a parameter whole into one argument."""
    return [
        re.sub(r"{{(?:workflow|inputs)\.parameters\.([\w-]+)}}", lambda match: values[match[1]], argument)
        for argument in template["container"]["args"]
    ]


@pytest.mark.parametrize("share", ["cell", "seed"])
def test_plan_as_the_workflow_calls_it_writes_what_the_cells_ask_for(
    share: str, tmp_path: Path, templates: dict[str, dict[str, Any]]
) -> None:
    study = (
        "---\n# \"quotes\", 'more' and $HOME\n" + (resources.files("kallm.study.presets") / "smoke.yaml").read_text()
    )
    values = {"study": study, "store": str(tmp_path), "cells": "unfinished", "share": share}
    asked = arguments(templates["plan"], values)
    asked[asked.index("/tmp/pods.json")] = str(tmp_path / "pods.json")
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    pods = json.loads((tmp_path / "pods.json").read_text())
    labels = {label for pod in pods for label in pod["cells"].split(",")}
    assert labels == {"linear.seed-0", "kan.seed-0"}
    assert len(pods) == {"cell": 2, "seed": 1}[share]
    for pod in pods:
        asked_for = {parameter["name"] for parameter in templates["cell"]["inputs"]["parameters"]}
        assert set(pod) == asked_for
        assert all(
            re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?", pod[key]) for key in ("name", "variant", "seed")
        )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cell", {"study": "--- x", "store": "s3://bucket/grid", "cells": "kan.seed-0"}),
        ("table", {"study": "--- x", "store": "s3://bucket/grid"}),
    ],
)
def test_the_program_understands_what_the_workflow_calls(
    name: str, expected: dict[str, str], templates: dict[str, dict[str, Any]]
) -> None:
    called, *rest = arguments(templates[name], expected)
    command = typer.main.get_command(app).commands[called]  # type: ignore[attr-defined]
    understood = command.make_context(called, rest).params
    assert {key: understood[key] for key in expected} == expected


# --- what a pod may do


def test_only_cells_take_the_sites_patch_and_its_semaphore(templates: dict[str, dict[str, Any]]) -> None:
    assert [name for name, template in templates.items() if "podSpecPatch" in template] == ["cell"]
    assert [name for name, template in templates.items() if "synchronization" in template] == ["cell"]


def test_no_container_is_privileged_and_main_gets_no_token(workflow: dict[str, Any]) -> None:
    spec = workflow["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["executor"]["serviceAccountName"] != spec["serviceAccountName"]
    for pod in plan_pods([workflow]):
        assert pod.spec["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "runAsGroup": 10001,
            "seccompProfile": {"type": "RuntimeDefault"},
        }
        (main,) = pod.containers
        assert main["command"] == ["kallm"]
        assert main["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_a_cells_pod_carries_its_variant_and_seed(templates: dict[str, dict[str, Any]]) -> None:
    labels = templates["cell"]["metadata"]["labels"]
    assert labels == {"variant": "{{inputs.parameters.variant}}", "seed": "{{inputs.parameters.seed}}"}


# --- a real cluster


@pytest.mark.e2e
def test_the_real_definitions_accept_the_workflow_strictly(cluster: None, namespace: str) -> None:
    definition = ["kubectl", "get", "customresourcedefinition", "workflows.argoproj.io"]
    if subprocess.run(definition, capture_output=True, check=False).returncode:
        if not (ARGO / "crds").is_dir():
            pytest.skip(f"the cluster has no Workflows, and {ARGO / 'crds'} is missing")
        kubectl("apply", "--server-side", "-f", str(ARGO / "crds"))
        kubectl("wait", "--for=condition=Established", "crd/workflows.argoproj.io", "--timeout=60s")
    create = ("create", "-n", namespace, "--dry-run=server", "--validate=strict", "-f")
    assert "created (server dry run)" in kubectl(*create, str(WORKFLOW))
    wrong = WORKFLOW.read_text().replace("failFast:", "failfast:")
    done = subprocess.run(["kubectl", *create, "-"], input=wrong, capture_output=True, text=True, check=False)
    assert 'unknown field "spec.templates[0].dag.failfast"' in done.stderr
