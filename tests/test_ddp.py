"""Two processes that share a batch learn what one process learns from all of it."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from kan_examples import MIX

from kallm.kan.ffns import FFN, build
from kallm.kan.spec import parse_spec

SPECS = [
    {"ffn": "kan", "basis": "chebyshev2", "degree": 2},
    {"ffn": "kan", **MIX, "constants": "stored", "scale": "learned"},
    {"ffn": "kat", "hidden": 16},
]

WORKER = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from test_ddp import SPECS, loss, make, rows

torch.set_num_threads(1)
rank, folder = int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
for index in range(len(SPECS)):
    module = make(index)
    shared = DistributedDataParallel(module)  # named, because its hooks go when it goes
    loss(shared, rows()[rank::2]).backward()
    torch.save([parameter.grad for parameter in module.parameters()], folder / f"{index}-{rank}.pt")
dist.destroy_process_group()
"""


def make(index: int) -> FFN:
    module = build(parse_spec(SPECS[index]), width=8, pretrained_hidden=16)
    module.reset_parameters(generator=torch.Generator().manual_seed(0))
    return module


def rows() -> torch.Tensor:
    return torch.randn(12, 5, 8, generator=torch.Generator().manual_seed(1))


def loss(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    mean: torch.Tensor = module(x).square().mean()
    return mean


def test_two_processes_average_to_one_processs_gradient(tmp_path: Path) -> None:
    here = str(Path(__file__).parent)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, here, str(rank), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    for index in range(len(SPECS)):
        module = make(index)
        loss(module, rows()).backward()
        for rank in range(2):
            found = torch.load(tmp_path / f"{index}-{rank}.pt")
            for mine, parameter in zip(found, module.parameters(), strict=True):
                torch.testing.assert_close(mine, parameter.grad)
