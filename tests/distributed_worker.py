"""Run by test_distributed.py: trains a tiny adapter in one process, then in two, and writes their routers.

The processes are forked with the variables that torchrun sets: each that starts anew takes ten seconds to import.
"""

import os
import socket
import sys
from pathlib import Path

import torch
import torch.multiprocessing
from peft_helpers import routed, router_parameters, tiny, tokens

from topo_adapter import initialize_routers
from topo_adapter.training.kl import KLTrainer
from topo_adapter.training.local import DistillationTrainer
from topo_adapter.training.recipe import DistillConfig


def main(stage: str, folder: Path) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(0)
    model = routed(tiny(num_hidden_layers=2), depth=3, local_window=4, num_sink_tokens=2, gumbel_noise=False)
    rows = [{"input_ids": ids} for ids in tokens(8, 40)]
    arguments = DistillConfig(
        output_dir=str(folder / "runs"),
        per_device_train_batch_size=4 // processes,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo" if processes > 1 else None,
        disable_tqdm=True,
    ).of_stage(stage, 2, 1e-2)
    # plain gradient descent: Adam's first steps are the signs of gradients, whatever their scale
    arguments.optim, arguments.max_grad_norm = "sgd", 0.0
    if stage == "local":
        model.peft_config["default"].homotopy = 0.0
        initialize_routers(model, rows[0]["input_ids"][None])
        # without the price of density, which is of each process's own rows: a product of means over them
        trainer = DistillationTrainer(
            model=model, args=arguments, train_dataset=rows, num_queries=40, density_weight=0.0
        )
    else:
        rows_of_calibration = tokens(2, 40, seed=3)
        trainer = KLTrainer(
            model=model, args=arguments, train_dataset=rows, densities=(0.5, 0.9), calibration_rows=rows_of_calibration
        )
    before = {name: weight.detach().clone() for name, weight in router_parameters(model).items()}
    trainer.train()
    after = {name: weight.detach() for name, weight in router_parameters(model).items()}
    rank = int(os.environ.get("RANK", 0))
    torch.save({"before": before, "after": after}, folder / f"{stage}_{processes}_{rank}.pt")


def process(rank: int, processes: int, port: int, folder: Path, stages: list[str]) -> None:
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for stage in stages:
        main(stage, folder)


if __name__ == "__main__":
    for processes in (1, 2):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        torch.multiprocessing.start_processes(
            process, (processes, port, Path(sys.argv[1]), sys.argv[2:]), nprocs=processes, start_method="fork"
        )
