"""The default recipe: layer-local distillation, then KL end to end (docs/method.md, sections 5.2 and 5.3)."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SchedulerType,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from ..config import TopologyConfig
from ..core.dial import DEFAULT_DENSITY, check_density
from ..core.visibility import always_density
from ..errors import TopologyConfigError, UnsupportedModelError
from ..history import TrainingRun
from ..measuring.calibration import calibrate
from .callback import TopologyCallback
from .cost import data_name
from .data import rows_of, rows_to_calibrate_on, rows_to_train_on
from .densities import CALIBRATIONS, TEMPERATURES
from .kl import KLTrainer
from .local import DistillationTrainer
from .routers import active_configs, initialize_routers, round_routers
from .trainer import last_whole_checkpoint

_log = logging.get_logger(__name__)

#: Arguments of `transformers.TrainingArguments` that each stage has for itself.
_OF_STAGES = {
    "max_steps": "local_steps and kl_steps",
    "num_train_epochs": "local_steps and kl_steps",
    "learning_rate": "local_learning_rate and kl_learning_rate",
}


@dataclass
class DistillConfig(TrainingArguments):
    """Arguments of `distill`: those of `transformers.TrainingArguments`, and each stage's own.

    The defaults are the recipe whose results docs/results.md prints.

    `max_steps`, `num_train_epochs` and `learning_rate` are refused: each stage has its own. Checkpoints go to
    `output_dir/local` and `output_dir/kl`; with `resume_from_checkpoint=True` each stage goes on from its last one, if
    it has any.
    """

    per_device_train_batch_size: int = field(default=1, metadata={"help": "Rows of a step on each device."})
    lr_scheduler_type: SchedulerType | str = field(default="cosine", metadata={"help": "As in TrainingArguments."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or a share of all in [0, 1)."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs."})
    save_steps: float = field(default=100, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints of each stage that are kept."})
    local_steps: int = field(default=100, metadata={"help": "Steps of layer-local distillation, >= 0; 0 skips it."})
    local_learning_rate: float = field(default=1e-2, metadata={"help": "Peak learning rate of that stage, > 0."})
    local_density_weight: float = field(
        default=0.05, metadata={"help": "Nats of kept mass that the density of evenly filled balls may cost, >= 0."}
    )
    num_queries: int = field(
        default=256, metadata={"help": "Queries sampled per step for each layer's own loss, >= 1."}
    )
    kl_steps: int = field(default=1400, metadata={"help": "Steps of the end-to-end stage, >= 0; 0 skips it."})
    kl_learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of that stage, > 0."})
    kl_weight: float = field(default=1.0, metadata={"help": "Weight of KL(dense || topology) in that stage, >= 0."})
    lm_weight: float = field(default=0.0, metadata={"help": "Weight of the next-token loss in that stage, >= 0."})
    local_weight: float = field(
        default=0.0, metadata={"help": "Weight, in that stage, of the losses that the layer-local stage has, >= 0."}
    )
    kl_temperature: float = field(
        default=TEMPERATURES[0], metadata={"help": "First temperature of that stage, > 0; the last is a quarter of it."}
    )
    lowest_density: float = field(default=0.05, metadata={"help": "Lowest density that stage draws, > 0."})
    highest_density: float = field(default=0.4, metadata={"help": "Highest density that stage draws, <= 1."})
    text_column: str = field(default="text", metadata={"help": "Column of the data set that holds text."})
    max_length: int = field(default=8192, metadata={"help": "Tokens per window where the data set holds text, >= 2."})
    adapter_dtype: str = field(
        default="float8_e4m3fn",
        metadata={
            "help": "float32, bfloat16 or float8_e4m3fn: what the trained routers are rounded to, before they are "
            "calibrated. With the last their biases are bfloat16."
        },
    )
    target_density: float = field(
        default=DEFAULT_DENSITY,
        metadata={"help": "Density in (0, 1], at the calibrated length, that the trained adapter runs by default."},
    )
    calibration_rows: int = field(
        default=16,
        metadata={
            "help": "Rows that the density dial is calibrated on after training, >= 1; during it, a quarter of them. "
            "They are the first of the data set and not trained on, unless they are more than a tenth of it."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        lowest = {"local_steps": 0, "kl_steps": 0, "num_queries": 1, "max_length": 2, "calibration_rows": 1}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise TopologyConfigError(f"{name} must be an integer >= {low}, got {getattr(self, name)}")
        for name in ("local_learning_rate", "kl_learning_rate", "kl_temperature"):
            if not getattr(self, name) > 0:
                raise TopologyConfigError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("local_density_weight", "kl_weight", "lm_weight", "local_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise TopologyConfigError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")
        if self.kl_weight == self.lm_weight == 0:
            raise TopologyConfigError("kl_weight or lm_weight must be > 0, got 0 for both")
        if not 0 < self.lowest_density <= self.highest_density <= 1:
            raise TopologyConfigError(
                "lowest_density and highest_density must be 0 < lowest <= highest <= 1, got "
                f"{self.lowest_density} and {self.highest_density}"
            )
        check_density(self.target_density)
        if self.adapter_dtype not in ("float32", "bfloat16", "float8_e4m3fn"):
            raise TopologyConfigError(
                f"adapter_dtype must be float32, bfloat16 or float8_e4m3fn, got {self.adapter_dtype!r}"
            )
        for name, instead in _OF_STAGES.items():
            default, value = type(self).__dataclass_fields__[name].default, getattr(self, name)
            if value != default:
                raise TopologyConfigError(f"{name} must be left alone, got {value}; set {instead}, one for each stage")
        if self.resume_from_checkpoint not in (None, False, True, "true", "True", "false", "False"):
            raise TopologyConfigError(
                "resume_from_checkpoint must be true or false, got "
                f"{self.resume_from_checkpoint!r}: each stage finds its own last checkpoint in output_dir"
            )
        self.resume = self.resume_from_checkpoint in (True, "true", "True")
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch warns of it, and does nothing

    def of_stage(
        self, name: str, steps: int, learning_rate: float, known: TrainingRun | None = None
    ) -> TrainingArguments:
        """These arguments as one stage's trainer takes them.

        Args:
            known: of the stage's record, beside its name.
        """
        stage: Any = copy.copy(self)
        stage.known_of_run = {**(known or {}), "stage": name}
        stage.max_steps, stage.learning_rate = steps, learning_rate
        stage.output_dir = str(self.folder(name))
        return stage

    def folder(self, name: str) -> Path:
        """Where a stage's checkpoints go."""
        return Path(self.output_dir or "trainer_output") / name

    def last_checkpoint(self, name: str) -> str | None:
        """The checkpoint a stage resumes from, the newest that is whole; None to start afresh."""
        return last_whole_checkpoint(self.folder(name)) if self.resume else None


def distill(
    model: PreTrainedModel | PeftModel | str,
    dataset: Iterable[Any] | str | os.PathLike,
    config: TopologyConfig | None = None,
    args: DistillConfig | None = None,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> PeftModel:
    """Train a topology adapter on a frozen causal LM: `adapter = topo_adapter.distill(model, dataset)`.

    Stage 1 teaches every layer to keep its own dense attention, without a backward pass through the model; stage 2
    lowers the KL of the dense model to its own hard topology, end to end, at every depth. Then the density dial is
    calibrated, so that `merge_adapter(target_density=...)` can choose each head's depth.

    Args:
        model: a causal LM, a hub id or local path of one, or a PeftModel with an active topology adapter, which is
            trained on.
        dataset: a `datasets.Dataset`, streamed or not, or any iterable; each row is a mapping with `input_ids` (int64
            `[T]`, all rows of one length), with text in `args.text_column`, with `messages`, or with `prompt` and
            `completion` (strings or messages, by the tokenizer's chat template), or it is a string. Or the path of a
            text file or of a directory of such, or an int64 tensor `[rows, T]` of token ids. All but token ids are
            cut into windows of `args.max_length` tokens, each of which begins as the tokenizer begins a text;
            `input_ids` should begin so too. Empty texts are passed over.
        config: of the adapter that is added; None, needed for a PeftModel, is the default.
        args: None is the default; see `DistillConfig`.
        processing_class: tokenizer of what is not token ids; None loads the model's own.
        callbacks: go to the trainers of both stages.

    Returns:
        The trained PeftModel, not merged, at homotopy 1, in evaluation mode, its routers in `args.adapter_dtype`; the
        base's weights are as they were.

    Raises:
        TopologyConfigError: an argument is out of range or of the wrong type, or the data set has no row to train on,
            or windows too short for a `target_density` other than the default.
        UnsupportedModelError: the model cannot be routed, see `TopologyModel` and `KLTrainer`.
    """
    args = DistillConfig() if args is None else args
    if not isinstance(args, DistillConfig):
        raise TopologyConfigError(f"args must be a topo_adapter.DistillConfig, got {type(args).__name__}")
    if isinstance(model, PeftModel) and config is not None:
        raise TopologyConfigError("config must be None for a PeftModel, which has its own; or pass its base model")
    set_seed(args.seed)
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    needed = max(args.local_steps, args.kl_steps) * per_step + args.calibration_rows
    rows, cut_here = rows_of(
        dataset,
        model,
        processing_class,
        length=args.max_length,
        per_step=per_step,
        needed=needed,
        text_column=args.text_column,
    )
    fresh = not isinstance(model, PeftModel)
    adapter = get_peft_model(model, config or TopologyConfig(task_type="CAUSAL_LM")) if fresh else model
    training = args.local_steps > 0 or args.kl_steps > 0
    if training and not any(weight.requires_grad for weight in adapter.parameters()):
        raise UnsupportedModelError(
            "model must have trainable routers, got a frozen adapter; load it with "
            "PeftModel.from_pretrained(..., is_trainable=True)"
        )
    calibration_rows = rows_to_calibrate_on(rows, adapter, args.calibration_rows, not cut_here)
    # the default need not be in reach of short rows; another one was asked for
    asked = None if args.target_density == DEFAULT_DENSITY else args.target_density
    if asked is not None or args.process_index == 0:  # all processes end, one warns
        _check_reach(args.target_density, asked is not None, calibration_rows.shape[1], active_configs(adapter))
    rows = rows_to_train_on(rows, len(calibration_rows))
    known = TrainingRun(length=calibration_rows.shape[1])
    if (data := data_name(dataset)) is not None:
        known["data"] = data
    if training:
        round_routers(adapter, torch.float32)

    checkpoint = args.last_checkpoint("kl")

    def say(sentence: str) -> None:
        if args.process_index == 0:
            _log.info(sentence)

    if args.local_steps and checkpoint is None:  # what the second stage began with is in its checkpoint
        say(
            f"Stage 1 of 2: every layer learns on its own to keep its dense attention, {args.local_steps:,} steps of "
            f"{per_step} window(s) of {calibration_rows.shape[1]:,} tokens; checkpoints go to {args.folder('local')}."
        )
        local = DistillationTrainer(
            model=adapter,
            args=args.of_stage("local", args.local_steps, args.local_learning_rate, known),
            train_dataset=rows,
            callbacks=list(callbacks),
            num_queries=args.num_queries,
            density_weight=args.local_density_weight,
        )
        _train(local, rows, args.last_checkpoint("local"), fresh)
        fresh = False
    if args.kl_steps:
        calibrations = min(CALIBRATIONS, args.kl_steps)
        say(
            f"Stage 2 of 2: all layers learn end to end to predict what the dense model does, {args.kl_steps:,} steps, "
            f"with {calibrations} calibrations on the way and one at the end; each takes a while, on a CPU a minute or "
            f"more. Checkpoints go to {args.folder('kl')}."
        )
        end_to_end = KLTrainer(
            model=adapter,
            args=args.of_stage("kl", args.kl_steps, args.kl_learning_rate, known),
            train_dataset=rows,
            callbacks=[TopologyCallback((args.kl_temperature, args.kl_temperature / 4), (1.0, 1.0)), *callbacks],
            densities=(args.lowest_density, args.highest_density),
            calibration_rows=calibration_rows[: max(1, len(calibration_rows) // 4)],
            check_padding=not cut_here,
            kl_weight=args.kl_weight,
            lm_weight=args.lm_weight,
            local_weight=args.local_weight,
            num_queries=args.num_queries,
            local_density_weight=args.local_density_weight,
        )
        _train(end_to_end, rows, checkpoint, fresh)
    for each in active_configs(adapter):
        each.homotopy = 1.0  # a stage resumed after its last step does not get to do it
    if training:
        round_routers(adapter, getattr(torch, args.adapter_dtype))
    say(f"Trained; one last calibration, on all {len(calibration_rows)} window(s) that are kept for it.")
    calibrate(adapter, calibration_rows, seed=args.seed, target_density=asked, check_padding=not cut_here)
    return adapter.eval()


def _check_reach(density: float, asked: bool, length: int, configs: Sequence[TopologyConfig]) -> None:
    """Say before a training what the calibration at its end would: that no map of its windows is as sparse.

    Raises:
        TopologyConfigError: so it is, and the density was asked for.
    """
    for config in configs:
        near = always_density(length, config.local_window, config.num_sink_tokens)
        if density >= near:
            continue
        found = (
            f"at least {near:.3g} in windows of {length:,} tokens, of whose pairs local_window {config.local_window} "
            f"and {config.num_sink_tokens} sinks show as much by themselves, got {density:g}"
        )
        fix = "lower local_window, train on longer windows (max_length), or ask for a higher target_density"
        if asked:
            raise TopologyConfigError(f"target_density must be {found}; {fix}")
        _log.warning(f"target_density should be {found}: the adapter will run at its sparsest. Or {fix}.")


def _train(trainer: Trainer, rows: Sequence[dict[str, Any]], checkpoint: str | None, fresh: bool) -> None:
    if fresh and checkpoint is None:
        first = torch.as_tensor(rows[0]["input_ids"])[None]  # the trainer has put the model on its device
        initialize_routers(trainer.model, first.to(trainer.args.device))
    if checkpoint is not None and _steps_of(checkpoint) >= trainer.args.max_steps:
        trainer._load_from_checkpoint(checkpoint)  # train() would do a step more
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TopologyCallback):
                for config in active_configs(trainer.model):
                    config.temperature = callback.temperature[1]
        return
    trainer.train(resume_from_checkpoint=checkpoint)
    # the next stage wraps the forward in autocast again
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)


def _steps_of(checkpoint: str) -> int:
    return TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
