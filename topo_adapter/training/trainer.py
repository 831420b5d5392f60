"""Schedules, and the auxiliary loss under any trainer.

Everything here rides on `transformers.Trainer`; nothing is a trainer of its own.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..config import TopologyConfig
from ..core.passes import Pass, during
from ..errors import TopologyConfigError
from ..layer import TopologyHost, active_layers, evaluating, hosts
from ..ops.router import TopologyRouter


def active_configs(model: nn.Module) -> list[TopologyConfig]:
    """The configurations in force in a model, each once.

    Raises:
        UnsupportedModelError: the model has no active topology adapter.
    """
    return list({id(config): config for _, config, _ in active_layers(model)}.values())


def round_routers(model: nn.Module, dtype: torch.dtype, only_8_bit: bool = False) -> None:
    """`TopologyRouter.round_to` for the routers in force, all of them or those with 8-bit weights."""
    for host in hosts(model):
        if (active := host.in_force()) is None:
            continue
        if not only_8_bit or any(weight.dtype.itemsize == 1 for weight in active.router.parameters()):
            active.router.round_to(dtype)


def restore_precision(model: nn.Module) -> None:
    """Routers that no optimizer would move are float32 again.

    8-bit ones, as `distill` leaves them, and those of a quantised base: TRL makes whatever it trains on one bfloat16.
    """
    quantised = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    round_routers(model, torch.float32, only_8_bit=not quantised)


def topology_metrics(model: nn.Module) -> dict[str, float]:
    """Temperature, homotopy and the layers' mean density, balance and auxiliary loss at the last step."""
    config = active_configs(model)[0]
    values: dict[str, list[Tensor]] = {}
    for host in hosts(model):
        for name, value in host.metrics.items():
            values.setdefault(name, []).append(value.float().cpu())
    metrics = {f"topology/{name}": torch.stack(v).mean().item() for name, v in sorted(values.items())}
    return {"topology/temperature": config.temperature, "topology/homotopy": config.homotopy, **metrics}


_FIRST_STEPS = 10  # that have to hide something


class TopologyCallback(TrainerCallback):
    """Drives temperature, homotopy and the auxiliary loss's ramp; each is a function of the global step alone.

    That makes a resumed run continue where it stopped. After the last step homotopy is 1, as after a run that was
    stopped early, which is warned of. Evaluation in between runs at homotopy 1 too: the losses of all steps are of the
    model that training ends with, so that `load_best_model_at_end` and early stopping compare what they should.

    Args:
        temperature: first and last Gumbel-Softmax temperature, interpolated geometrically.
        homotopy: first and last homotopy coefficient, reached linearly after `homotopy_share` of training;
            None leaves it alone until the last step (distillation trains at 0).
        homotopy_share, ramp_share: share of training, in (0, 1], after which homotopy and the weight of the
            auxiliary loss have reached their final values.

    Alone, with a trainer that lacks `TopologyTrainerMixin`, it refuses fp16 and gradient accumulation, where the
    auxiliary gradient would be scaled wrongly.
    """

    def __init__(
        self,
        temperature: tuple[float, float] = (1.0, 0.1),
        homotopy: tuple[float, float] | None = (0.0, 1.0),
        homotopy_share: float = 0.7,
        ramp_share: float = 0.1,
    ) -> None:
        if min(temperature) <= 0:
            raise TopologyConfigError(f"temperature must hold two numbers > 0, got {temperature}")
        if homotopy is not None and not all(0 <= c <= 1 for c in homotopy):
            raise TopologyConfigError(f"homotopy must hold two numbers in [0, 1], got {homotopy}")
        for name, share in (("homotopy_share", homotopy_share), ("ramp_share", ramp_share)):
            if not 0 < share <= 1:
                raise TopologyConfigError(f"{name} must be in (0, 1], got {share}")
        self.temperature, self.homotopy = temperature, homotopy
        self.homotopy_share, self.ramp_share = homotopy_share, ramp_share
        self.scale_is_exact = False  # set by TopologyTrainerMixin
        self._dense_steps: int | None = None  # steps without a hidden pair; None: not looked for, or all is well
        self._training_at: list[float] | None = None  # homotopy of each configuration, while an evaluation runs at 1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        active_configs(model)
        for host in hosts(model):
            host.schedule.known = True
        self._dense_steps = 0
        if not self.scale_is_exact and (args.fp16 or args.gradient_accumulation_steps > 1):
            raise TopologyConfigError(
                "TopologyCallback alone needs fp16=False and gradient_accumulation_steps=1, got "
                f"fp16={args.fp16} and {args.gradient_accumulation_steps}: the auxiliary gradient would not be scaled "
                "with the loss. Use TopologySFTTrainer, or put TopologyTrainerMixin before your trainer class."
            )
        if not self.scale_is_exact:  # the mixin did it before anything was sharded
            restore_precision(model)
        if args.eval_on_start:
            self._in_full_force(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        progress = state.global_step / max(state.max_steps, 1)
        first, last = self.temperature
        for config in active_configs(model):
            config.temperature = first * (last / first) ** progress
            if self.homotopy is not None:
                begin, end = self.homotopy
                config.homotopy = begin + (end - begin) * min(progress / self.homotopy_share, 1.0)
        for host in hosts(model):
            host.auxiliary_ramp = min(progress / self.ramp_share, 1.0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if self._dense_steps is not None:
            self._look_for_hidden_pairs(model, state)
        if state.global_step >= state.max_steps:  # before the last checkpoint is written
            self._finish(model)
        if control.should_evaluate:
            self._in_full_force(model)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if control.should_evaluate:
            self._in_full_force(model)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if self._training_at is not None:
            for config, homotopy in zip(active_configs(model), self._training_at, strict=True):
                config.homotopy = homotopy
            self._training_at = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        reached = min(config.homotopy for config in active_configs(model))
        if self.homotopy is not None and reached < 1:
            warnings.warn(
                f"training ended after {state.global_step} of {state.max_steps} steps, at homotopy {reached:.2g}: the "
                "adapter is in full force now, as in evaluations before, but its routers were not trained so. Train "
                "on to the end, or raise homotopy earlier: TopologyCallback(homotopy_share=...).",
                stacklevel=2,
            )
        self._finish(model)

    def _finish(self, model: nn.Module) -> None:
        for config in active_configs(model):
            config.temperature, config.homotopy = self.temperature[1], 1.0

    def _in_full_force(self, model: nn.Module) -> None:
        """Until `on_evaluate`, unless training leaves homotopy alone."""
        if self.homotopy is not None and self._training_at is None:
            configs = active_configs(model)
            self._training_at = [config.homotopy for config in configs]
            for config in configs:
                config.homotopy = 1.0

    def _look_for_hidden_pairs(self, model: nn.Module, state: TrainerState) -> None:
        """Warn where the first steps hid nothing from anyone: then the routers learn nothing."""
        densities = [host.metrics["density"] for host in hosts(model) if "density" in host.metrics]
        if not densities or any(bool(density < 1) for density in densities):
            self._dense_steps = None  # all is well
            return
        assert self._dense_steps is not None  # of the caller
        self._dense_steps += 1
        if self._dense_steps == min(_FIRST_STEPS, state.max_steps):
            config = active_configs(model)[0]
            warnings.warn(
                f"in the first {self._dense_steps} training steps no query had a key hidden from it: rows (or "
                f"packed documents) of up to {config.local_window + config.num_sink_tokens} tokens are covered by "
                f"local_window {config.local_window} and {config.num_sink_tokens} sinks, and the routers learn "
                "nothing. Train on longer rows, or lower local_window.",
                stacklevel=2,
            )
            self._dense_steps = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if "topology/homotopy" not in state.log_history[-1]:  # the mixin has put them there for all reporters
            state.log_history[-1].update(topology_metrics(model))


class _RememberScale(torch.autograd.Function):
    """Identity on the loss; its backward runs first and tells the layers what the loss is scaled by."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, layers: list[TopologyHost], share: float) -> Tensor:
        ctx.layers, ctx.share = layers, share
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        scale = grad.detach() * ctx.share
        for layer in ctx.layers:
            layer.auxiliary_scale = scale
        return grad, None, None


def last_whole_checkpoint(folder: str | os.PathLike) -> str | None:
    """The newest checkpoint of a folder whose saving came to its end: transformers writes the trainer's state last."""
    if not Path(folder).is_dir():
        return None
    steps = {path: path.name.removeprefix("checkpoint-") for path in Path(folder).glob("checkpoint-*")}
    for path in sorted((path for path, n in steps.items() if n.isdecimal()), key=lambda path: -int(steps[path])):
        try:
            TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
            for config in path.glob(f"**/{CONFIG_NAME}"):
                TopologyConfig.from_pretrained(config.parent)
        except (OSError, ValueError, TypeError, KeyError) as error:
            warnings.warn(f"checkpoint {path} is passed over, it is not whole: {error}", stacklevel=2)
            continue
        return str(path)
    return None


class TopologyTrainerMixin(Trainer):
    """Put before a `transformers.Trainer` class: `class MyTrainer(TopologyTrainerMixin, SFTTrainer): ...`.

    Adds a `TopologyCallback` if none is given, scales the auxiliary gradient exactly as the main loss (fp16 loss
    scaling, gradient accumulation, anything a backward multiplies in), and logs the topology's metrics.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise TopologyConfigError(
                f"the trainer must see one GPU per process, got {self.args.n_gpu}: DataParallel copies the routers, "
                "and the auxiliary gradient would miss its scale. Launch with `accelerate launch` or torchrun, or set "
                "CUDA_VISIBLE_DEVICES to one GPU."
            )
        given = [c for c in self.callback_handler.callbacks if isinstance(c, TopologyCallback)]
        if not given:
            given = [self.default_topology_callback()]
            self.add_callback(given[0])
        for callback in given:
            callback.scale_is_exact = True
        restore_precision(self.model)

    def default_topology_callback(self) -> TopologyCallback:
        return TopologyCallback()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if not model.training:
            return result
        # Trainer divides the loss by the number of accumulation steps unless it was normalised over the whole batch
        # already; the auxiliary loss is a mean per forward and has to be divided either way.
        normalised = getattr(self, "loss_is_scaled_for_ga", None)
        if normalised is None:
            by_model = self.model_accepts_loss_kwargs and kwargs.get("num_items_in_batch") is not None
            normalised = by_model or self.compute_loss_func is not None
        if isinstance(result, tuple):
            return (self.with_auxiliary_scale(model, result[0], normalised), *result[1:])
        return self.with_auxiliary_scale(model, result, normalised)

    def with_auxiliary_scale(self, model: nn.Module, loss: Tensor, normalised: bool) -> Tensor:
        """The loss unchanged; its backward tells the layers what their auxiliary gradient is scaled by.

        Args:
            normalised: the loss is divided by what the whole accumulated batch holds, so that the trainer will not
                divide it by the number of accumulation steps.
        """
        share = 1 / self.current_gradient_accumulation_steps if normalised else 1.0
        return _RememberScale.apply(loss, hosts(model), share)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; `resume_from_checkpoint=True` takes the newest checkpoint that is whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir or ".") or True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # an earlier run's checkpoint in this place is whole no longer once its first file is written over
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The trainer's own, which says nothing of how a topology is loaded, and that."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            active_configs(self.model)[0].write_card(Path(self.args.output_dir))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, **topology_metrics(self.model)}, *args, **kwargs)


@torch.no_grad()
def initialize_routers(model: nn.Module, input_ids: Tensor) -> None:
    """Data-dependent initialisation: spread the tokens of a text evenly over the tree, in every routed layer.

    Call it once on a fresh adapter, before training, with the same text on every process.

    Args:
        model: a PeftModel with an active topology adapter at `homotopy = 0`.
        input_ids: int64 `[B, T]`, unpadded; a few hundred tokens are enough.

    Raises:
        UnsupportedModelError: no active adapter. TopologyConfigError: the adapter is trained already.
    """
    for config in active_configs(model):
        if config.homotopy != 0:
            raise TopologyConfigError(f"homotopy must be 0 to initialise routers, got {config.homotopy}")
    with during(model, _Standardise()), evaluating(model):
        model(input_ids=input_ids, use_cache=False)


class _Standardise(Pass):
    """Spreads what enters each router evenly over its tree."""

    def entered(self, router: TopologyRouter, hidden_states: Tensor, inputs: dict[str, Any]) -> None:
        router.standardise(hidden_states)
