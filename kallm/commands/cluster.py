"""The commands that send studies to a cluster, end them there, and hold manifests against a site's rules."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import yaml
from rich.console import Console

from kallm.cluster.client import WORKFLOW, Cluster, connect
from kallm.cluster.engines import GONE, ArgoEngine, Engine, JobsEngine
from kallm.cluster.server import ServerEngine, ServerSettings
from kallm.cluster.submission import (
    EngineName,
    Ground,
    Request,
    Submission,
    check_cluster,
    describe_command,
    dump_manifest,
    gather,
    prepare,
)
from kallm.cluster.watching import await_start, raise_outcome, watch
from kallm.errors import Preempted, WrongConfiguration, did_you_mean
from kallm.options import CellsOption, SetOption, ShareOption, StudyArgument, find_plan, is_stored_name, make_console
from kallm.results.status import CellStatus, read_status
from kallm.run.selection import parse_share
from kallm.study.plan import Plan, make_plan
from kallm.study.study import read_study

__all__ = ["attach_cluster"]

NamespaceOption = Annotated[str | None, typer.Option("--namespace", "-n", help="the context's own unless given")]
ContextOption = Annotated[str | None, typer.Option("--context", help="of the kubeconfig; the current one unless given")]
EngineOption = Annotated[
    str,
    typer.Option("--engine", help="argo; jobs, which needs no Argo; server: an Argo Server (ARGO_SERVER, ARGO_TOKEN)"),
]


def attach_cluster(app: typer.Typer) -> None:
    """Add these commands to the program."""
    for command in (submit, cancel, check):
        app.command()(command)


def submit(
    study: StudyArgument,
    engine: EngineOption = "argo",
    store: Annotated[str | None, typer.Option("--store", help="s3://bucket/prefix; kallm-site's unless given")] = None,
    image: Annotated[str | None, typer.Option("--image", help="kallm-site's unless given; sent by its digest")] = None,
    cells: CellsOption = "unfinished",
    share: ShareOption = "cell",
    namespace: NamespaceOption = None,
    context: ContextOption = None,
    set_: SetOption = None,
    watch_: Annotated[
        bool, typer.Option("--watch", help="show the cells until all is over; leave by the outcome")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be sent, and send nothing")] = False,
) -> None:
    """Train and evaluate a study's unfinished cells on a cluster; what cannot start there is deleted, with the reason.

    kallm submit demo --watch

    kallm submit my-study.yaml --engine jobs --dry-run | kubectl create -f -
    """
    request = Request(_parse_engine(engine), store, image, cells, parse_share(share))
    planned = None if is_stored_name(study) and not set_ else make_plan(read_study(study, set_))
    cluster, place = _open(request.engine, context, namespace, sends=not dry_run)
    ground = gather(request, cluster)
    plan = planned or _find_plan(ground, study)
    submission = prepare(plan, request, ground, cluster.namespace if cluster else None)
    _say("\n".join(submission.notes))
    if dry_run:
        print(dump_manifest(submission.manifest), end="")
        return
    if not submission.cells:
        _say(f"nothing to do: all cells are finished in {submission.address}; 'kallm table' prints their table")
        return
    assert place is not None
    if cluster is not None:
        check_cluster(cluster, submission)
    name = place.create(submission.manifest)
    line = describe_command(request, study, set_ or [], namespace=place.namespace, manifest=submission.manifest)
    _say(f"{name} is created; stands for: {line}")
    _follow(place, name, plan, submission, watch_=watch_)


def cancel(
    name: Annotated[str, typer.Argument(metavar="NAME", help="as 'kallm submit' printed it")],
    engine: Annotated[str | None, typer.Option("--engine", help="server, where an Argo Server runs it")] = None,
    namespace: NamespaceOption = None,
    context: ContextOption = None,
) -> None:
    """End a submitted study: its cells save their state and leave; submitted again, it continues from there.

    kallm cancel kallm-demo-x7k2p
    """  # fmt: skip
    found: list[Engine]
    if engine is not None and _parse_engine(engine) == "server":
        found = [ServerEngine(ServerSettings.from_environment(namespace))]
    else:
        cluster = connect(context, namespace)
        found = [JobsEngine(cluster)]
        if cluster.knows(WORKFLOW):
            found.append(ArgoEngine(cluster))
    for each in found:
        progress = each.progress(name)
        if progress.finished and progress != GONE:
            _say(f"{name} has ended already: {progress.sentence}")
            return
        if progress != GONE and each.stop(name):
            _say(f"{name} ends; what runs saves its state. Stands for: {each.commands(name)[1]}")
            return
    known = [other for each in found for other in each.names()]
    advice = did_you_mean(name, known) if known else "none of kallm's is there"
    raise WrongConfiguration(f"there is no study '{name}' in namespace '{found[0].namespace}': {advice}")


def check(
    files: Annotated[list[str], typer.Argument(metavar="FILE…", help="manifests in YAML; - for standard input")],
    site: Annotated[str, typer.Option("--site", help="nrp or chameleon")],
) -> None:
    """Hold the pods that manifests will create against a site's rules: one line for each finding, and then code 2.

    kubectl kustomize k8s/overlays/nrp | kallm check --site nrp - workflows/kallm.yaml

    kallm submit demo --dry-run | kallm check --site nrp -
    """
    from kallm.cluster.site import check_manifests

    documents = [document for file in files for document in _read_documents(file)]
    findings = check_manifests(site, documents)
    for finding in findings:
        print(finding)
    if findings:
        raise WrongConfiguration(f"{len(findings)} of {site}'s rules are broken by what {', '.join(files)} will create")
    _say(f"nothing to object for site {site}")


def _follow(place: Engine, name: str, plan: Plan, submission: Submission, *, watch_: bool) -> None:
    """Wait for the first pod, and with ``--watch`` for the last; Ctrl-C leaves the study running."""
    follow, end = place.commands(name)
    ours = f"kallm cancel {name} -n {place.namespace}"
    try:
        waiting = await_start(place, name)
        print(name)
        _say(waiting and f"not begun yet: {waiting}")
        if not watch_:
            where = f"kallm status {plan.document.name}.{plan.document.hash} --store {submission.address}"
            _say(f"follow: {where if submission.store else follow}\nend:    {ours}   (or: {end})")
            return
        read = (lambda: _read_cells(plan, submission)) if submission.store else None
        progress = watch(place, name, read, make_console() if sys.stdout.isatty() else Console(stderr=True))
    except KeyboardInterrupt as error:
        raise Preempted(f"{name} goes on without being watched; '{ours}' ends it") from error
    raise_outcome(progress, read() if read else [], where=f"--store {submission.address}")


def _read_cells(plan: Plan, submission: Submission) -> list[CellStatus]:
    assert submission.store is not None
    chosen = {cell.id for cell in submission.cells}
    states = read_status(submission.store, plan.document, now=time.time())
    return [state for state in states if state.id in chosen]


def _open(
    engine: EngineName, context: str | None, namespace: str | None, *, sends: bool
) -> tuple[Cluster | None, Engine | None]:
    if engine == "server":
        return None, ServerEngine(ServerSettings.from_environment(namespace)) if sends else None
    cluster = connect(context, namespace)
    return cluster, ArgoEngine(cluster) if engine == "argo" else JobsEngine(cluster)


def _find_plan(ground: Ground, study: str) -> Plan:
    if ground.store is None:
        raise WrongConfiguration(f"{study} is looked for in the store, but {'; '.join(ground.notes)}")
    return find_plan(ground.store, study)


def _parse_engine(text: str) -> EngineName:
    for engine in get_args(EngineName):
        if text == engine:
            found: EngineName = engine
            return found
    raise WrongConfiguration(f"--engine: unknown '{text}': {did_you_mean(text, get_args(EngineName))}")


def _read_documents(file: str) -> list[dict[str, Any]]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise WrongConfiguration(f"{file} cannot be read as YAML: {' '.join(str(error).split())[:300]}") from error
    if not all(isinstance(document, dict) for document in documents):
        raise WrongConfiguration(f"{file} holds no manifests: expected 'apiVersion:', 'kind:' and so on")
    return documents


def _say(text: str) -> None:
    if text:
        print(text, file=sys.stderr)
