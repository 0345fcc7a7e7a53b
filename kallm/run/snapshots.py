"""What a study takes from the hub, kept in the store: fetched once when planned, and not again by every pod."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from kallm.errors import StorageUnavailable
from kallm.model.cachefolder import filling, snapshot_folder
from kallm.store.commit import commit, fetch, manifest_key, read_manifest
from kallm.store.store import Store
from kallm.study.plan import Plan
from kallm.study.study import Study

__all__ = ["fetch_snapshots", "names_commits", "put_snapshots"]

_MODEL_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


def put_snapshots(plan: Plan, store: Store) -> list[str]:
    """Download what the plan takes from the hub and commit it to the store, unless it is there.

    Returns:
        The sources that are in the store now.

    Raises:
        StorageUnavailable: the hub does not give it; it may later.
    """
    found = list(_hub_sources(plan.study))
    for kind, repository, revision in found:
        if store.get(manifest_key(_prefix(revision))) is None:
            folder = _download(kind, repository, revision)
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
            commit(store, _prefix(revision), files, {"source": f"{repository}@{revision}", "kind": kind})
    return [f"hub:{repository}@{revision}" for _, repository, revision in found]


def fetch_snapshots(study: Study, store: Store) -> None:
    """Bring what a study takes from the hub from the store into the cache, where the store has it.

    Raises:
        DataMismatch: what the store holds is damaged.
    """
    for _, _, revision in _hub_sources(study):
        folder = snapshot_folder(revision)
        if folder is None or folder.exists():
            continue
        manifest = read_manifest(store, _prefix(revision))
        if manifest is None:
            continue
        with filling(folder) as whole:
            fetch(store, manifest, whole)


def names_commits(study: Study) -> bool:
    """Say whether a study takes anything from the hub, and all of it by commit."""
    hub = [source for source in (study.model, study.dialogues.source) if source.startswith("hub:")]
    return bool(hub) and len(list(_hub_sources(study))) == len(hub)


def _hub_sources(study: Study) -> Iterator[tuple[Literal["model", "dataset"], str, str]]:
    """Yield kind, repository and commit of every source that a hub's commit names."""
    sources: list[tuple[Literal["model", "dataset"], str]] = [
        ("model", study.model),
        ("dataset", study.dialogues.source),
    ]
    for kind, source in sources:
        repository, _, revision = source.removeprefix("hub:").partition("@")
        if source.startswith("hub:") and snapshot_folder(revision) is not None:
            yield kind, repository, revision


def _prefix(revision: str) -> str:
    return f"sources/{revision}"


def _download(kind: Literal["model", "dataset"], repository: str, revision: str) -> Path:
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = _MODEL_FILES if kind == "model" else None
    try:
        return Path(snapshot_download(repository, repo_type=kind, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, HTTPError) as error:
        raise StorageUnavailable(
            f"the hub did not give {kind} 'hub:{repository}@{revision}' ({type(error).__name__}): try again later"
        ) from error
