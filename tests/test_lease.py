"""The script that makes a cluster of a leased node; every program that it calls is replaced by one that takes notes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

OVERLAYS = Path(__file__).resolve().parent.parent / "k8s"
KEY = "not-a-real-secret"
STUBS = {
    "curl": "echo 'ln -s /bin/true \"$STUBS/k3s\"'",  # what is downloaded installs k3s
    "sudo": 'exec "$@"',
    "install": "true",
    "nvidia-smi": "echo GPU 0",
    "kubectl": "cat >/dev/null; echo node/leased",
    "helm": "true",
}


@pytest.fixture
def lease(tmp_path: Path) -> Path:
    """Return the script in a copy of the overlays that has its names filled in."""
    shutil.copytree(OVERLAYS, tmp_path / "k8s")
    site = tmp_path / "k8s/overlays/chameleon/kustomization.yaml"
    site.write_text(site.read_text().replace("EDIT-", ""))
    (tmp_path / "stubs").mkdir()
    for name, does in STUBS.items():
        stub = tmp_path / "stubs" / name
        stub.write_text(f'#!/bin/bash\necho "{name} $*" >>"$STUBS/../calls"\n{does}\n')
        stub.chmod(0o755)
    return site.parent / "lease"


def run(lease: Path, *words: str, **environment: str) -> tuple[int, str, list[str]]:
    """Run the script and return its code, what it said, and the programs it called."""
    top = lease.parents[3]
    calls = top / "calls"
    calls.unlink(missing_ok=True)
    keys = {"AWS_ACCESS_KEY_ID": "kallm", "AWS_SECRET_ACCESS_KEY": KEY}
    paths = {"PATH": f"{top / 'stubs'}:{os.environ['PATH']}", "STUBS": str(top / "stubs"), "HOME": str(top)}
    done = subprocess.run(
        [lease, *words],
        env={**paths, **keys, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr, calls.read_text().splitlines() if calls.exists() else []


def test_a_second_run_installs_nothing_twice_and_ends_the_same(lease: Path) -> None:
    code, said, first = run(lease, "--skip-gpu")
    assert code == 0, said
    assert "ready:" in said
    code, said, second = run(lease, "--skip-gpu")
    assert code == 0, said
    assert [call for call in first if call.startswith("curl")]
    assert sorted(call for call in first if not call.startswith("curl")) == sorted(second)


def test_all_that_the_cluster_is_told_can_be_told_twice(lease: Path) -> None:
    _, _, calls = run(lease, "--skip-gpu")
    for call in calls:
        if call.startswith("kubectl create"):
            assert "--dry-run=client" in call


def test_no_key_stands_in_the_arguments_of_a_program(lease: Path) -> None:
    _, said, calls = run(lease, "--skip-gpu")
    assert KEY not in said + "\n".join(calls)


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        ([], {"AWS_ACCESS_KEY_ID": ""}, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are not set"),
        (["--gpus"], {}, "From a leased Chameleon node"),
    ],
)
def test_a_wrong_start_does_nothing_and_says_why(
    words: list[str], environment: dict[str, str], expected: str, lease: Path
) -> None:
    code, said, calls = run(lease, *words, **environment)
    assert code == 2
    assert expected in said
    assert calls == []


def test_names_that_were_not_filled_in_are_found_first(lease: Path) -> None:
    site = lease.parent / "kustomization.yaml"
    site.write_text((OVERLAYS / "overlays/chameleon/kustomization.yaml").read_text())
    code, said, calls = run(lease)
    assert (code, calls) == (2, [])
    assert "EDIT-" in said
