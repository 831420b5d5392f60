"""Run by test_distributed.py, alone or under torchrun: trains a tiny adapter and writes its routers per process."""

import os
import sys
from pathlib import Path

import torch
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


if __name__ == "__main__":
    for stage in sys.argv[2:]:
        main(stage, Path(sys.argv[1]))
