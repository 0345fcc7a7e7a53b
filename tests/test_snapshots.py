"""What a study takes from the hub: fetched by the plan, found in the store by every pod."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub import commit_of, serve_hub

from kallm.run.snapshots import names_commits
from kallm.store.local import FolderStore
from kallm.study.study import read_study

MODEL, TALK = "someone/tiny", "someone/talk"
NO_HUB = "http://127.0.0.1:9"


@pytest.fixture
def hub_study(study_text: str, model_folder: Path, dialogue_folder: Path) -> str:
    return study_text.replace(str(model_folder), f"hub:{MODEL}").replace(str(dialogue_folder), f"hub:{TALK}")


@pytest.fixture
def folders(model_folder: Path, dialogue_folder: Path, tmp_path: Path) -> dict[str, Path]:
    talk = tmp_path / "talk"
    talk.mkdir()
    shutil.copy(dialogue_folder / "train.jsonl", talk / "train.jsonl")
    shutil.copy(dialogue_folder / "heldout.jsonl", talk / "test.jsonl")
    return {MODEL: model_folder, TALK: talk}


def kallm(home: Path, hub: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the program as on a machine of its own, whose caches are below ``home``."""
    own = {"HOME": home, "HF_HOME": home / "hf", "KALLM_CACHE": home / "kallm", "XDG_CACHE_HOME": home / "cache"}
    environment = os.environ | {name: str(path) for name, path in own.items()}
    environment |= {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "kallm.cli", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_pod_trains_without_the_hub_what_the_plan_has_fetched(
    hub_study: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    store, pods = str(tmp_path / "store"), tmp_path / "pods.json"
    with serve_hub(folders) as hub:
        planned = kallm(tmp_path / "planner", hub, "plan", hub_study, "--store", store, "--pods", str(pods))
        assert planned.returncode == 0, planned.stderr
        here = kallm(tmp_path / "here", hub, "run", hub_study, "--store", str(tmp_path / "other"), "--no-probe")
        assert here.returncode == 0, here.stderr
    (study,) = {pod["study"] for pod in json.loads(pods.read_text())}
    cells = [pod["cells"] for pod in json.loads(pods.read_text())]
    for number, cell in enumerate(cells):
        ran = kallm(tmp_path / f"pod-{number}", NO_HUB, "cell", study, cell, "--store", store)
        assert ran.returncode == 0, ran.stderr
    same = kallm(
        tmp_path / "here", NO_HUB, "compare", study, study, "--store", store, "--store-b", str(tmp_path / "other")
    )
    assert " equal, 0 different" in same.stdout, same.stderr


def test_the_pinned_text_of_a_study_finds_the_store_too(
    hub_study: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    store = str(tmp_path / "store")
    with serve_hub(folders) as hub:
        kallm(tmp_path / "planner", hub, "plan", hub_study, "--store", store, "--pods", str(tmp_path / "pods.json"))
    pinned = hub_study
    for name in (MODEL, TALK):
        pinned = pinned.replace(f"hub:{name}", f"hub:{name}@{commit_of(name)}")
    ran = kallm(tmp_path / "pod", NO_HUB, "cell", pinned, "linear.seed-0", "--store", store)
    assert ran.returncode == 0, ran.stderr
    assert names_commits(read_study(pinned))
    assert not names_commits(read_study(hub_study))


def test_a_damaged_snapshot_is_named_and_leaves_no_cache(
    hub_study: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    store = FolderStore(tmp_path / "store")
    with serve_hub(folders) as hub:
        planned = kallm(
            tmp_path / "planner", hub, "plan", hub_study, "--store", store.address, "--pods", str(tmp_path / "pods")
        )
    key = f"sources/{commit_of(MODEL)}/model.safetensors"
    data = store.get(key)
    assert data is not None
    store.put(key, data[:-1] + b"!")
    study = json.loads(planned.stdout)["study"]
    ran = kallm(tmp_path / "pod", NO_HUB, "cell", study, "linear.seed-0", "--store", store.address)
    assert ran.returncode == 3, ran.stderr
    assert f"{key} is damaged" in ran.stderr
    assert not list((tmp_path / "pod").rglob("*.safetensors"))


def test_a_store_without_a_snapshot_asks_the_hub(hub_study: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with serve_hub(folders) as hub:
        ran = kallm(tmp_path / "pod", hub, "cell", hub_study, "linear.seed-0", "--store", str(tmp_path / "store"))
    assert ran.returncode == 0, ran.stderr
    assert not (tmp_path / "store" / "sources").exists()
