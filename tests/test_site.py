"""Every rule of a site has a manifest that breaks it and nothing else, and our own overlays break none."""

import json
import re
import subprocess
from typing import Any

import pytest
import yaml
from overlays import ROOT, needs_kubectl, read_workflow, render

from kallm.cluster.patch import merge_patch
from kallm.cluster.podspecs import plan_pods
from kallm.cluster.site import SITES, check_manifests
from kallm.errors import WrongConfiguration

FIXTURES = ROOT / "tests/sites"
RULES = [(site, rule) for site, rules in SITES.items() for rule in rules]


def read_all(text: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text))


@pytest.mark.parametrize(("site", "rule"), RULES)
def test_each_rule_finds_its_own_fixture_and_no_other_rule_does(site: str, rule: str) -> None:
    findings = check_manifests(site, read_all((FIXTURES / f"{site}.{rule}.yaml").read_text()))
    assert {finding.rule for finding in findings} == {rule}


def test_no_fixture_is_without_a_rule() -> None:
    assert {path.stem for path in FIXTURES.glob("*.yaml")} == {f"{site}.{rule}" for site, rule in RULES}


@pytest.mark.parametrize(("site", "rule"), RULES)
def test_a_finding_is_one_sentence_with_its_place_its_remedy_and_its_source(site: str, rule: str) -> None:
    for finding in check_manifests(site, read_all((FIXTURES / f"{site}.{rule}.yaml").read_text())):
        assert "\n" not in str(finding)
        assert re.fullmatch(r"[A-Z]\w+ \S+(, template \S+)?: .+: .+ \((https://\S+|docs/\w+\.md)\)", str(finding))


@needs_kubectl
@pytest.mark.parametrize("site", sorted(SITES))
def test_the_sites_own_overlay_with_the_workflow_breaks_nothing_but_the_placeholders(site: str) -> None:
    findings = check_manifests(site, [*render(f"overlays/{site}"), read_workflow()])
    assert {finding.rule for finding in findings} == {"placeholder"}
    assert {finding.sentence.split()[0] for finding in findings} == {"image", "store"}


@needs_kubectl
def test_the_pod_patch_of_the_site_reaches_the_pods_of_the_workflow() -> None:
    pods = {pod.where.rpartition(" ")[2]: pod.spec for pod in plan_pods([*render("overlays/nrp"), read_workflow()])}
    main = pods["cell"]["containers"][0]
    assert main["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {mount["mountPath"] for mount in main["volumeMounts"]} == {"/cache", "/tmp", "/dev/shm"}
    assert pods["cell"]["terminationGracePeriodSeconds"] == 120
    assert "affinity" not in pods["plan"]
    assert main["image"].startswith("gitlab-registry.nrp-nautilus.io/")


def test_without_a_site_the_workflow_saves_in_time_by_its_own_default() -> None:
    (cell,) = [pod for pod in plan_pods([read_workflow()]) if pod.where.endswith("template cell")]
    assert cell.spec["terminationGracePeriodSeconds"] == 120


def test_documents_in_a_list_are_checked_one_by_one() -> None:
    inner = read_all((FIXTURES / "nrp.image.yaml").read_text())
    wrapped = [{"apiVersion": "v1", "kind": "List", "items": inner}]
    assert check_manifests("nrp", wrapped) == check_manifests("nrp", inner)


POD = {
    "containers": [
        {"name": "wait", "image": "w"},
        {
            "name": "main",
            "image": "i",
            "env": [{"name": "A", "value": "1"}],
            "resources": {"limits": {"cpu": "1"}},
            "volumeMounts": [{"name": "cache", "mountPath": "/cache"}],
        },
    ],
    "volumes": [{"name": "cache", "emptyDir": {}}],
    "tolerations": [{"key": "a"}],
    "nodeSelector": {"x": "y"},
}
PATCHES: list[dict[str, Any]] = [
    {"terminationGracePeriodSeconds": 5},
    {"containers": [{"name": "main", "resources": {"limits": {"cpu": "2", "memory": "1Gi"}}}]},
    {
        "containers": [{"name": "main", "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}]}],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    },
    {"tolerations": [{"key": "b"}], "nodeSelector": {"x": None, "z": "1"}},
    {"containers": [{"name": "side", "image": "s"}, {"name": "wait", "$patch": "delete"}]},
    {"containers": [{"name": "main", "env": [{"name": "A", "value": "2"}, {"name": "B", "value": "3"}]}]},
]


@needs_kubectl
@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_is_merged_as_kubernetes_merges_it(patch: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": POD}
    command = ["kubectl", "patch", "--local", "--type=strategic", "-f", "-", "-o", "json", "-p"]
    done = subprocess.run(
        [*command, json.dumps({"spec": patch})], input=json.dumps(pod), capture_output=True, text=True, check=True
    )
    assert in_order(merge_patch(POD, patch)) == in_order(json.loads(done.stdout)["spec"])


def in_order(value: Any) -> Any:
    """Return the value with lists of named things sorted: their order means nothing to Kubernetes."""
    if isinstance(value, dict):
        return {key: in_order(value[key]) for key in sorted(value)}
    return sorted((in_order(item) for item in value), key=json.dumps) if isinstance(value, list) else value


def test_an_unknown_site_is_named_with_the_known_ones() -> None:
    with pytest.raises(WrongConfiguration, match=r"'nrb'.*known are chameleon, nrp\. Did you mean 'nrp'"):
        check_manifests("nrb", [])


@pytest.mark.parametrize(
    "document",
    [
        {"kind": "Job", "spec": {"template": None}},
        {"kind": "ConfigMap", "metadata": {"name": "kallm-site"}, "data": {"parallelism": "four"}},
    ],
)
def test_a_malformed_document_is_one_clear_line(document: Any) -> None:
    with pytest.raises(WrongConfiguration, match="has not the shape"):
        check_manifests("nrp", [document])


def test_a_pod_patch_that_is_no_mapping_is_refused_with_its_place() -> None:
    document = read_workflow()
    cell = next(template for template in document["spec"]["templates"] if template["name"] == "cell")
    cell["podSpecPatch"] = "- terminationGracePeriodSeconds: 120"
    with pytest.raises(WrongConfiguration, match="template cell: podSpecPatch must be a mapping"):
        check_manifests("nrp", [document])
