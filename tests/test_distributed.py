"""Two processes (gloo, CPU) train what one process trains on the same batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

WORKER = Path(__file__).parent / "distributed_worker.py"


def train(stage: str, processes: int, folder: Path) -> list[dict[str, dict[str, Tensor]]]:
    """The routers before and after, of each process."""
    command = [sys.executable, str(WORKER), stage, str(folder)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *launcher, *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{stage}_{processes}_{rank}.pt") for rank in range(processes)]


@pytest.mark.parametrize("stage", ["local", "kl"])
def test_two_processes_train_as_one(stage: str, tmp_path: Path) -> None:
    (alone,) = train(stage, 1, tmp_path)
    first, second = train(stage, 2, tmp_path)
    moved = 0.0
    for name, right in alone["after"].items():
        assert torch.equal(first["after"][name], second["after"][name]), name
        step = (right - alone["before"][name]).abs().max().item()
        assert (first["after"][name] - right).abs().max().item() <= 0.02 * step + 1e-7, name
        moved = max(moved, step)
    assert moved > 1e-5
