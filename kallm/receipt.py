"""The receipt of a result: with what code, packages and hardware it was made. Imports no torch."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["commit", "image", "make_receipt"]

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "lm-eval", "safetensors", "numpy")


@functools.cache
def commit() -> dict[str, Any]:
    """Return the commit of the code and whether the tree differs from it; an image names it in ``KALLM_COMMIT``."""
    named = os.environ.get("KALLM_COMMIT")
    if named:
        return {"commit": named, "dirty": False}
    folder = Path(__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return {"commit": None, "dirty": None}
    return {
        "commit": _git(folder, "rev-parse", "HEAD"),
        "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no")),
    }


def image() -> str | None:
    """Return the container image that this runs in, as ``KALLM_IMAGE`` names it; None outside one."""
    return os.environ.get("KALLM_IMAGE")


def make_receipt(*, device: str, num_threads: int, precision: str) -> dict[str, Any]:
    """Return code, package versions and hardware; equal runs on one machine give equal receipts."""
    return {
        "code": commit(),
        "image": image(),
        "kallm": importlib.metadata.version("kallm"),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "hardware": {
            "device": device,
            "processor": _processor(),
            "cores": os.cpu_count(),
            "num_threads": num_threads,
            "machine": platform.machine(),
        },
        "precision": precision,
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(("git", "-C", folder, *arguments), capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    """Return the processor's name, as Linux or Python tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
