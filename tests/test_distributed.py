"""Two processes (gloo, CPU) train what one process trains on the same batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

WORKER = Path(__file__).parent / "distributed_worker.py"
STAGES = ("local", "kl")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what one process and two have trained; all in one start, because imports take longer."""
    folder = tmp_path_factory.mktemp("distributed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(WORKER), str(folder), *STAGES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def routers(folder: Path, stage: str, processes: int) -> list[dict[str, dict[str, Tensor]]]:
    """The routers before and after, of each process."""
    return [torch.load(folder / f"{stage}_{processes}_{rank}.pt") for rank in range(processes)]


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one(stage: str, trained: Path) -> None:
    (alone,) = routers(trained, stage, 1)
    first, second = routers(trained, stage, 2)
    moved = 0.0
    for name, right in alone["after"].items():
        assert torch.equal(first["after"][name], second["after"][name]), name
        step = (right - alone["before"][name]).abs().max().item()
        assert (first["after"][name] - right).abs().max().item() <= 0.02 * step + 1e-7, name
        moved = max(moved, step)
    assert moved > 1e-5
