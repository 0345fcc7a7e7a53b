"""What is sent to a cluster: the study pinned, the image by digest, the site's values written in; and its checks."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from kallm.cluster.argo import fill_workflow, read_workflow, render_cell_pod
from kallm.cluster.checks import SITE, Site, check_accounts, check_argo, check_room, check_secret, read_site
from kallm.cluster.client import JOB, WORKFLOW, Cluster
from kallm.cluster.images import find_digest, is_pinned, split_image
from kallm.cluster.jobs import render_job
from kallm.errors import StorageUnavailable, WrongConfiguration
from kallm.run.selection import Pod, Share, group_cells, select_cells
from kallm.store.s3 import S3Settings, S3Store
from kallm.store.store import Store, is_key
from kallm.study.plan import Cell, Plan
from kallm.study.study import StatisticsSettings, Study, preset_names

__all__ = [
    "ENGINES",
    "EngineName",
    "Ground",
    "Request",
    "Submission",
    "check_cluster",
    "describe_command",
    "dump_manifest",
    "gather",
    "prepare",
    "render_study",
]

EngineName = Literal["argo", "jobs", "server"]
ENGINES: tuple[EngineName, ...] = ("argo", "jobs", "server")
_CONNECT_S = 3.0
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_LONGEST_PREFIX = 50


@dataclass(frozen=True)
class Request:
    """What a user asks for, besides the study."""

    engine: EngineName = "argo"
    store: str | None = None
    image: str | None = None
    cells: str = "unfinished"
    share: Share = "cell"


@dataclass(frozen=True)
class Ground:
    """What a study meets on a cluster."""

    workflow: dict[str, Any]
    site: Site
    values: dict[str, str]
    """The site's values with the user's over them, by workflow parameter."""
    store: Store | None
    """Where the results go, if it can be read from here."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Submission:
    """One study, ready to be sent."""

    request: Request
    manifest: dict[str, Any]
    """The Workflow or Job."""
    pod: dict[str, Any]
    """Metadata and spec of a cell's pod, with the site's patch."""
    cells: tuple[Cell, ...]
    """What is to be trained or evaluated; empty: nothing is left to do."""
    store: Store | None
    """Where the results go, if it can be read from here."""
    address: str
    """The store's address; empty where only the site knows it."""
    notes: tuple[str, ...]
    """What the user should know, a sentence each."""


def gather(request: Request, cluster: Cluster | None) -> Ground:
    """Read ``kallm-site``, find out the image's digest, and open the store if it can be reached from here.

    Args:
        request: what is asked for.
        cluster: where ``kallm-site`` is read; None leaves the site's values to the cluster.

    Raises:
        WrongConfiguration: ``kallm-site`` or an option is wrong.
    """
    workflow = read_workflow()
    site = Site({}, {}, 1) if cluster is None else read_site(cluster, workflow)
    notes: list[str] = []
    values = dict(site.values) | _image(request, site, notes) | _store_address(request, site)
    store, why = _open(values)
    if store is None:
        notes.append(f"the store is not read from here: {why}")
    return Ground(workflow, site, values, store, tuple(notes))


def prepare(plan: Plan, request: Request, ground: Ground, namespace: str | None) -> Submission:
    """Decide which cells go into which pods, and render what is sent; nothing is created.

    Raises:
        WrongConfiguration: a source is a folder of this machine, or the study has no such cell.
    """
    for source in (plan.model.source, plan.dialogues):
        if not source.startswith(("hub:", "package:")):
            raise WrongConfiguration(
                f"'{source}' is a folder of this machine, which pods do not see: use hub: or package:"
            )
    notes = list(ground.notes)
    if request.cells == "unfinished" and ground.store is None:
        cells = list(plan.cells)
        notes.append(f"which of the {len(cells)} cells are finished is found out there, not here")
    else:
        cells = select_cells(plan, request.cells, ground.store)
    pods = group_cells(plan.document, cells or list(plan.cells), request.share)
    values = ground.values | {"study": render_study(plan.study), "cells": request.cells, "share": request.share}
    manifest, pod = _render(_name(fill_workflow(ground.workflow, values), plan), pods, ground.site, request, plan)
    if namespace is not None:
        manifest["metadata"]["namespace"] = namespace
    return Submission(request, manifest, pod, tuple(cells), ground.store, values.get("store", ""), tuple(notes))


def check_cluster(cluster: Cluster, submission: Submission) -> None:
    """Look for all that would keep the study from running; creates nothing.

    Raises:
        WrongConfiguration: the first thing that is wrong.
    """
    with_argo = submission.request.engine == "argo"
    workflow = read_workflow()
    if with_argo:
        check_argo(cluster)
    check_secret(cluster, submission.pod)
    check_accounts(cluster, workflow, with_executor=with_argo)
    check_room(cluster, submission.pod)
    cluster.create(WORKFLOW if with_argo else JOB, submission.manifest, dry_run=True)


def render_study(study: Study) -> str:
    """Return a study as YAML text with all settings written out: no default of the image can change a cell.

    Braces and dollars, which Argo and Kubernetes would expand, are escaped.
    """
    told = study.model_dump(mode="json")
    if study.statistics.contrasts == StatisticsSettings().contrasts:
        del told["statistics"]["contrasts"]  # written out, they would have to exist
    text: str = yaml.safe_dump(told, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    if "{{" not in text and "$" not in text:
        return text
    escaped = json.dumps(told, indent=1, ensure_ascii=False)
    return escaped.replace("{{", "\\u007b\\u007b").replace("$", "\\u0024")


def dump_manifest(manifest: Mapping[str, Any]) -> str:
    """Return a manifest as YAML that ``kubectl create -f -`` reads."""
    text: str = yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def describe_command(
    request: Request, study: str, set_: list[str], *, namespace: str, manifest: Mapping[str, Any]
) -> str:
    """Return the ``argo`` or ``kubectl`` line that does the same."""
    if request.engine == "jobs" or set_ or study == "-":
        options = [f"--{name}={value}" for name, value in vars(request).items() if value != getattr(Request, name)]
        place = [f"--namespace={namespace}", "--dry-run"]
        ours = shlex.join(["kallm", "submit", study, *(f"--set={each}" for each in set_), *options, *place])
        return f"{ours} | {'argo submit -' if request.engine == 'server' else 'kubectl create -f -'} -n {namespace}"
    values = {each["name"]: each.get("value") for each in manifest["spec"]["arguments"]["parameters"]}
    given = {"cells": request.cells, "share": request.share, "store": request.store, "image": values["image"]}
    parts = [f"-p {name}={shlex.quote(value)}" for name, value in given.items() if value]
    is_file = "\n" not in study and study not in preset_names() and Path(study).is_file()
    named = f'"$(cat {shlex.quote(study)})"' if is_file else shlex.quote(study)
    return f"argo submit workflows/kallm.yaml -n {namespace} -p study={named} {' '.join(parts)}"


def _image(request: Request, site: Site, notes: list[str]) -> dict[str, str]:
    image = request.image or site.values.get("image")
    if image is None:
        if request.engine == "server":
            return {}
        raise WrongConfiguration(f"no image is named: give one with --image, or as 'image' in {SITE}")
    split_image(image)
    if is_pinned(image):
        return {"image": image}
    digest, why = find_digest(image)
    if digest is None:
        notes.append(f"the image stays '{image}', a tag that may move: {why}")
        return {"image": image}
    return {"image": f"{image}@{digest}"}


def _store_address(request: Request, site: Site) -> dict[str, str]:
    address = request.store or site.values.get("store")
    if address is None:
        return {}
    bucket, _, prefix = address.rstrip("/").removeprefix("s3://").partition("/")
    if not address.startswith("s3://") or not _BUCKET.fullmatch(bucket) or (prefix and not is_key(prefix)):
        raise WrongConfiguration(
            f"the store of a cluster must be s3://bucket/prefix, which all pods reach, but is '{address}': "
            f"name one with --store, or as 'store' in {SITE}"
        )
    return {"store": address.rstrip("/")}


def _open(values: Mapping[str, str]) -> tuple[Store | None, str]:
    """Open the store with the user's own credentials, at the user's own endpoint or else the site's."""
    if "store" not in values:
        return None, "only the site's settings name it; --store names one"
    bucket, _, prefix = values["store"].removeprefix("s3://").partition("/")
    own = S3Settings.from_environment()
    try:
        settings = S3Settings.model_validate(
            own.model_dump()
            | {
                "endpoint": own.endpoint or values.get("endpoint") or None,
                "attempts": 1,
                "connect_timeout_s": _CONNECT_S,
            }
        )
    except ValidationError as error:
        raise WrongConfiguration(
            f"'endpoint' in {SITE} {error.errors()[0]['msg'].removeprefix('Value error, ')}"
        ) from error
    try:
        store = S3Store(bucket, prefix, settings)
        next(iter(store.list("studies/")), None)
    except (StorageUnavailable, WrongConfiguration) as error:
        return None, str(error)
    return store, ""


def _render(
    filled: dict[str, Any], pods: list[Pod], site: Site, request: Request, plan: Plan
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is sent, and a cell's pod."""
    if request.engine == "jobs":
        job = render_job(filled, pods, site.pod_patch, study=plan.study.name, parallelism=site.parallelism)
        return job, job["spec"]["template"]
    if request.engine == "server":
        return filled, {}
    return filled, render_cell_pod(filled, {key: str(value) for key, value in pods[0].items()}, site.pod_patch)


def _name(workflow: dict[str, Any], plan: Plan) -> dict[str, Any]:
    prefix = f"kallm-{plan.study.name}"[:_LONGEST_PREFIX].rstrip("-")
    return {**workflow, "metadata": {**workflow["metadata"], "generateName": f"{prefix}-"}}


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as such, and what stands twice twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
