"""Several processes of one training on this machine's CPU, as ``torchrun`` starts them."""

import os
import socket
import subprocess
from collections.abc import Sequence

__all__ = ["run_processes"]


def run_processes(command: Sequence[str], *, num: int) -> list[subprocess.CompletedProcess[str]]:
    """Run a command so many times at once, each with its rank, and wait for all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num), "CUDA_VISIBLE_DEVICES": ""}
    running = []
    for rank in range(num):
        own = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        running.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    told = [process.communicate(timeout=900) for process in running]
    return [subprocess.CompletedProcess(p.args, p.returncode, *each) for p, each in zip(running, told, strict=True)]
