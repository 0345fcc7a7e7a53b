"""What must be there before anything is created: the site's settings, its Secret, accounts, and room for a cell."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from kallm.cluster.client import (
    CONFIG_MAP,
    NODE,
    POD,
    SECRET,
    SERVICE_ACCOUNT,
    WORKFLOW,
    Cluster,
    Refused,
)
from kallm.cluster.placement import explain_misfit
from kallm.errors import WrongConfiguration

__all__ = [
    "SITE",
    "Site",
    "check_accounts",
    "check_argo",
    "check_room",
    "check_secret",
    "list_nodes",
    "parse_site",
    "read_site",
]

SITE = "kallm-site"
_LABEL, _VALUE = "workflows.argoproj.io/configmap-type", "Parameter"
_OVERLAY = "kubectl apply -k k8s/overlays/SITE"
_JOBS = "use --engine jobs, which needs no Argo"


@dataclass(frozen=True)
class Site:
    """What the ConfigMap ``kallm-site`` says, the workflow's own defaults where it is silent."""

    values: dict[str, str]
    """By workflow parameter; what neither names is missing."""
    pod_patch: dict[str, Any]
    parallelism: int


def read_site(cluster: Cluster, workflow: Mapping[str, Any]) -> Site:
    """Read ``kallm-site``.

    Raises:
        WrongConfiguration: it is not there, lacks its label, or a value cannot be right.
    """
    found = cluster.get(CONFIG_MAP, SITE)
    if found is None:
        raise WrongConfiguration(
            f"there is no ConfigMap '{SITE}' in namespace '{cluster.namespace}': '{_OVERLAY} -n {cluster.namespace}' "
            "makes it, or --namespace names where it is"
        )
    labels = found["metadata"].get("labels") or {}
    if labels.get(_LABEL) != _VALUE:
        raise WrongConfiguration(
            f"ConfigMap '{SITE}' lacks the label {_LABEL}={_VALUE}, without which Argo does not read it: "
            f"'kubectl label configmap {SITE} -n {cluster.namespace} {_LABEL}={_VALUE} --overwrite' sets it"
        )
    return parse_site(found.get("data") or {}, workflow)


def parse_site(data: Mapping[str, str], workflow: Mapping[str, Any]) -> Site:
    """Check the values of ``kallm-site``; a key that is missing has the workflow's default.

    Raises:
        WrongConfiguration: a value cannot be right.
    """
    values: dict[str, str] = {}
    for parameter in workflow["spec"]["arguments"]["parameters"]:
        source = parameter.get("valueFrom")
        if source is not None:
            value = data.get(source["configMapKeyRef"]["key"], source.get("default"))
            if value is not None:
                values[parameter["name"]] = value
    parallelism = data.get("parallelism", "")
    if not parallelism.isdecimal() or int(parallelism) < 1:
        raise WrongConfiguration(
            f"'parallelism' in {SITE} must be how many cells may run at once, for example \"4\", "
            f"but {f'is {parallelism!r}' if parallelism else 'is missing'}"
        )
    return Site(values, _parse_patch(values.get("pod-patch", "{}")), int(parallelism))


def _parse_patch(text: str) -> dict[str, Any]:
    try:
        patch = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise WrongConfiguration(
            f"'pod-patch' in {SITE} is no JSON: {' '.join(str(error).split())[:200]}; correct it there"
        ) from error
    if not isinstance(patch, dict):
        raise WrongConfiguration(
            f"'pod-patch' in {SITE} must be a JSON object laid over a pod's spec, but is {json.dumps(patch)[:80]}"
        )
    return patch


def check_argo(cluster: Cluster) -> None:
    """Check that the cluster knows workflows.

    Raises:
        WrongConfiguration: it does not.
    """
    if not cluster.knows(WORKFLOW):
        raise WrongConfiguration(
            f"context '{cluster.context}' has no Argo Workflows (kind Workflow of argoproj.io/v1alpha1): {_JOBS}"
        )


def check_secret(cluster: Cluster, pod: Mapping[str, Any]) -> None:
    """Check that the Secrets which a pod's environment names exist, with their keys.

    Raises:
        WrongConfiguration: one does not.
    """
    wanted: dict[str, set[str]] = {}
    for container in pod["spec"]["containers"]:
        for variable in container.get("env") or ():
            reference = (variable.get("valueFrom") or {}).get("secretKeyRef")
            if reference is not None and not reference.get("optional"):
                wanted.setdefault(reference["name"], set()).add(reference["key"])
    for name, keys in wanted.items():
        try:
            found = cluster.get(SECRET, name)
        except Refused as error:
            if error.status != 403:
                raise
            continue  # who may not read Secrets may still use them; a missing one shows when the pod starts
        absent = keys if found is None else keys - set(found.get("data") or {})
        if absent:
            what = "there is no Secret" if found is None else f"without {' and '.join(sorted(absent))} is Secret"
            literals = " ".join(f"--from-literal={key}=…" for key in sorted(keys))
            raise WrongConfiguration(
                f"{what} '{name}' in namespace '{cluster.namespace}': 'kubectl create secret generic {name} "
                f"-n {cluster.namespace} {literals}' makes it"
            )


def check_accounts(cluster: Cluster, workflow: Mapping[str, Any], *, with_executor: bool) -> None:
    """Check that the service accounts of the pods exist, and Argo's executor can show a token.

    Raises:
        WrongConfiguration: one does not.
    """
    accounts = [workflow["spec"]["serviceAccountName"]]
    executor = workflow["spec"]["executor"]["serviceAccountName"]
    if with_executor:
        accounts.append(executor)
    for account in accounts:
        if cluster.get(SERVICE_ACCOUNT, account) is None:
            raise WrongConfiguration(
                f"there is no service account '{account}' in namespace '{cluster.namespace}': "
                f"'{_OVERLAY} -n {cluster.namespace}' makes it"
            )
    token = f"{executor}.service-account-token"
    try:
        missing = with_executor and cluster.get(SECRET, token) is None
    except Refused as error:
        if error.status != 403:
            raise
        return
    if missing:
        raise WrongConfiguration(
            f"there is no Secret '{token}' in namespace '{cluster.namespace}', with which Argo reports results: "
            f"'{_OVERLAY} -n {cluster.namespace}' makes it"
        )


def check_room(cluster: Cluster, pod: Mapping[str, Any]) -> None:
    """Ask the API server whether it would take a cell's pod, and look whether any node could, were it idle.

    Raises:
        WrongConfiguration: it would not, or none could.
    """
    body = {"apiVersion": "v1", "kind": "Pod", **pod}
    body["metadata"] = {**pod["metadata"], "generateName": "kallm-check-"}
    # as the server would make it: a site may add tolerations or defaults to every pod
    try:
        made = cluster.create(POD, body, dry_run=True)
    except Refused as error:
        raise WrongConfiguration(
            f"a cell's pod, with 'pod-patch' of {SITE} over it, cannot be made: {error}"
        ) from error
    nodes = list_nodes(cluster)
    misfit = None if nodes is None else explain_misfit(made["spec"], nodes)
    if misfit is not None:
        raise WrongConfiguration(
            f"no node can meet what a cell asks for: {misfit}. Correct 'pod-patch' in {SITE}, or look at "
            "'kubectl describe nodes'"
        )


def list_nodes(cluster: Cluster) -> list[dict[str, Any]] | None:
    """Return the nodes, or None where the user may not see them."""
    try:
        return cluster.list(NODE)
    except Refused as error:
        if error.status != 403:
            raise
        return None
