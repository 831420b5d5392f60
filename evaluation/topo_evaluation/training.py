"""What both trainings from a shell are made of: arguments, texts, a task, a base, a plot of the log, a table at last.

`recipes/distill.py`, `recipes/sft.py` and the commands `topo distill` and `topo sft` put these together. Needs the
`train` extra.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging
from trl import ModelConfig, ScriptArguments, get_quantization_config

from topo_adapter import TopologyConfig, TopologyConfigError, set_density
from topo_adapter.training.data import windows_of_training_data

from .embedded import source, standard_library
from .measures import Scores, speed
from .texts import FOLDER, training_documents

_log = logging.get_logger(__name__)

# ---------------------------------------------------------------------------------------------------------
# Arguments


@dataclass
class TextArguments(ScriptArguments):
    """Which text `distill` learns on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or path; None: see text_files."})
    text_files: list[str] | None = field(default=None, metadata={"help": "Text files; None: topo_evaluation's."})
    texts_folder: str = field(default=FOLDER, metadata={"help": "Where topo_evaluation's texts are kept."})


@dataclass
class TaskArguments(ScriptArguments):
    """Which task SFT trains on, and what its table shows."""

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

    arity: int = field(default=_DEFAULT.arity, metadata={"help": "Children per tree vertex."})
    depth: int = field(default=_DEFAULT.depth, metadata={"help": "Digits per address."})
    visible_depth: int = field(
        default=_DEFAULT.visible_depth,
        metadata={"help": "Digits that must agree for a pair to be visible, until the dial is calibrated."},
    )
    visits: int = field(
        default=_DEFAULT.visits,
        metadata={"help": "Most balls that a query visits; the dial gives each head one or so many."},
    )
    router_input: str = field(
        default=_DEFAULT.router_input,
        metadata={"help": "What routers read: 'hidden_states', or 'heads': each head's own query and key."},
    )
    router_dim: int = field(
        default=_DEFAULT.router_dim, metadata={"help": "Width of the hidden layer of routers on hidden states."}
    )
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
        default=_DEFAULT.density_weight, metadata={"help": "Highest price of density in end-to-end training."}
    )
    balance_weight: float = field(
        default=_DEFAULT.balance_weight, metadata={"help": "Weight of per-level balance in end-to-end training."}
    )

    def config(self) -> TopologyConfig:
        """Of an adapter for a causal language model."""
        return TopologyConfig(**vars(self), task_type="CAUSAL_LM")


# ---------------------------------------------------------------------------------------------------------
# Data and model


def rows(text: TextArguments, seed: int) -> Iterable[Any]:
    """What `distill` trains on: text, chats, or whatever else it takes.

    Raises:
        FetchError: a package of the default texts cannot be had.
    """
    if text.dataset_name is None and text.text_files:
        return (Path(name).read_text(encoding="utf-8", errors="ignore") for name in text.text_files)
    if text.dataset_name is None:
        return training_documents(seed, text.texts_folder)
    return load_dataset(
        text.dataset_name, name=text.dataset_config, split=text.dataset_train_split, streaming=text.dataset_streaming
    )


def task(arguments: TaskArguments) -> tuple[Dataset, Dataset | None]:
    """Rows to train on, and rows to measure on; None where there are none.

    Raises:
        TopologyConfigError: the data set is to be streamed.
    """
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


def load_base(model: ModelConfig, device: Any) -> PreTrainedModel:
    """The base that TRL's arguments name, quantised if they say so, on a device; 'embedded' or None: SmolLM2-135M."""
    quantization = get_quantization_config(model)
    name = source(model.model_name_or_path)
    base = AutoModelForCausalLM.from_pretrained(
        name,
        revision=model.model_revision,
        attn_implementation=model.attn_implementation,
        dtype=model.dtype,
        quantization_config=quantization,
        device_map={"": device} if quantization is not None else None,
    )
    base = base.to(device) if quantization is None else base
    size = sum(weight.numel() for weight in base.parameters()) / 1e6
    _log.info(f"Loaded the base {name}: {size:,.0f} million parameters in {base.dtype} on {base.device}.")
    return base


# ---------------------------------------------------------------------------------------------------------
# What is shown at the end


class History(TrainerCallback):
    """What each stage of `distill` logged, for the plot at the end."""

    def __init__(self) -> None:
        self.stages: dict[str, list[dict[str, float]]] = {}

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.stages[Path(str(args.output_dir)).name] = [row for row in state.log_history if "loss" in row]

    def plot(self, path: Path) -> None:
        """Loss and density over the steps of each stage, as a picture. Needs matplotlib, of the `evaluation` extra."""
        import matplotlib  # a training that ends without a picture needs none

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(2, max(len(self.stages), 1), figsize=(10, 6), squeeze=False, sharex="col")
        for column, (stage, logged) in enumerate(self.stages.items()):
            for axis, name in zip(axes[:, column], ("loss", "topology/density"), strict=True):
                axis.plot([row["step"] for row in logged], [row.get(name, float("nan")) for row in logged])
                axis.set(ylabel=name, title=f"stage {stage}" if name == "loss" else "")
                axis.grid(alpha=0.3)
            axes[1, column].set_xlabel("step")
        figure.tight_layout()
        figure.savefig(path, dpi=120)
        plt.close(figure)


def timed(base: Any, length: int) -> Scores:
    """Speed of a base before anything is put into it; empty where `length` is 0. A dense model minds no tokens."""
    ids = torch.randint(base.config.get_text_config().vocab_size, (length,))
    return speed(base, ids) if length else {}


def row_of(trainer: Any, length: int) -> Tensor:
    """So many tokens of the trainer's task, int64 `[length]`.

    Raises:
        TopologyConfigError: model and task have fewer.
    """
    base = trainer.model.get_base_model()
    windows = windows_of_training_data(trainer.train_dataset, base, trainer.processing_class, length, 1)
    if windows is None or windows.shape[1] != length:
        most = 0 if windows is None else windows.shape[1]
        raise TopologyConfigError(f"speed_length must be at most {most}, all that model and task have, got {length}")
    return windows[0]


def table(trainer: Any, densities: list[float], length: int, of_base: Scores) -> str:
    """Markdown: loss of the trainer's evaluation rows and, with `length` > 0, the speed at so many tokens.

    Args:
        trainer: with a calibrated adapter. densities: of rows of `max_length` tokens. of_base: from `timed`.
    """
    model = trainer.model
    lines = [["", "loss", f"prefill of {length} tokens, ms", "decoded token, ms"][: 4 if length else 2]]
    lines.append(["---"] * len(lines[0]))

    def add(name: str, found: Scores) -> None:
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
