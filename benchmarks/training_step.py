"""Memory and time of a training step of a Llama-3.1-8B-shaped model, both stages of the recipe; appends to a file.

    python -m benchmarks.training_step --output results/h100.jsonl       # 4-bit, 32,768 tokens
    python -m benchmarks.training_step --stages local --dtype bf16 --lengths 8192

Random weights and tokens; the trainers are those of the recipe, so what they do beside the model is in the time. The
end-to-end stage runs with gradient checkpointing.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from topo_adapter import DistillationTrainer, TopologyConfig, initialize_routers
from topo_adapter.training.kl import KLTrainer

from .cases import label
from .harness import Table, summary
from .models import NAME, build, llama_config

_WARM_UP = 2  # steps that compile


@dataclass
class Arguments:
    output: str = field(default="runs/benchmark.jsonl", metadata={"help": "JSON lines; rows are appended."})
    dtype: str = field(default="nf4", metadata={"help": "bf16, or nf4: 4-bit weights through bitsandbytes."})
    stages: list[str] = field(default_factory=lambda: ["local", "kl"], metadata={"help": "local, kl or both."})
    lengths: list[int] = field(default_factory=lambda: [32768])
    steps: int = field(default=4, metadata={"help": "Timed steps, after two that compile."})
    layers: int = field(default=32, metadata={"help": "Fewer for a quick try."})
    commit: str = field(default="")


class Clock(TrainerCallback):
    """Milliseconds between the ends of steps, and peak memory after those that compile."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if len(self.ends) == _WARM_UP:
            torch.cuda.reset_peak_memory_stats()

    def times(self) -> list[float]:
        ends = self.ends[_WARM_UP - 1 :]
        return [1e3 * (later - earlier) for earlier, later in itertools.pairwise(ends)]


def trainer(stage: str, model: Any, arguments: Arguments, length: int, folder: str, clock: Clock) -> Trainer:
    steps = arguments.steps + _WARM_UP
    rows = [{"input_ids": torch.randint(0, model.config.vocab_size, (length,))} for _ in range(steps)]
    settings = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_checkpointing=stage == "kl",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    kind: Any = DistillationTrainer if stage == "local" else KLTrainer
    made: Trainer = kind(model=model, args=settings, train_dataset=rows, callbacks=[clock])
    return made


def main(arguments: Arguments) -> None:
    unknown = set(arguments.stages) - {"local", "kl"}
    if unknown or arguments.dtype not in ("bf16", "nf4"):
        raise ValueError(f"stages must be local or kl and dtype bf16 or nf4, got {arguments.stages}, {arguments.dtype}")
    settings = {"dtype": arguments.dtype, "layers": arguments.layers}
    table = Table(Path(arguments.output), arguments.commit, NAME, settings)
    base = build(llama_config(arguments.layers), arguments.dtype == "nf4")
    model = get_peft_model(base, TopologyConfig(task_type="CAUSAL_LM", router_dim=32, balance_weight=0.01))
    initialize_routers(model, torch.randint(0, base.config.vocab_size, (1, 2048), device="cuda"))
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for stage in arguments.stages:
        for length in arguments.lengths:
            config = f"{stage} step {label(length)}, {arguments.dtype}"
            model.peft_config["default"].homotopy = 0.0 if stage == "local" else 1.0
            clock = Clock()
            try:
                with tempfile.TemporaryDirectory() as folder:
                    trainer(stage, model, arguments, length, folder, clock).train()
                values = {"length": length, "batch": 1, "peak_mb": torch.cuda.max_memory_allocated() / 1e6}
                note = {"note": f"adapter of {2 * size / 1e6:.1f} MB in bf16"}
                table.add("training", config, "topology", summary(clock.times()), values | note)
            except Exception as problem:
                table.failed("training", config, "topology", problem)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    main(parsed)
