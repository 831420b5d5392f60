"""What drives a topology adapter through a training, whatever trainer runs it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS
from transformers.trainer_callback import ExportableState

from ..core.passes import Pass, during
from ..errors import TopologyConfigError, TopologyError
from ..layer import hosts
from ..measuring.calibration import calibrate, check_differentiable, check_sequences
from .cost import Meter
from .data import windows_of_training_data
from .densities import TEMPERATURES, DrawnDensities, check_densities
from .distil import DistilBeside, TrainBeside
from .routers import active_configs, initialize_routers, restore_precision, topology_metrics

#: Of routers, where the trainer's own is the default of its class.
ROUTER_LEARNING_RATE = 3e-3
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
_FIRST_STEPS = 10  # that have to hide something


def _micro_steps(args: TrainingArguments, state: TrainerState, data: Any) -> int:
    """Forwards of the step that begins: those that are accumulated, or what an epoch has left of them."""
    many = args.gradient_accumulation_steps
    try:
        batches = len(data)
    except TypeError:  # a stream, whose end nobody knows
        return many
    last = (state.global_step + 1) % -(-batches // many) == 0
    return batches % many or many if last else many


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

    Alone, with a trainer that lacks `TopologyTrainerMixin`, it refuses fp16, whose loss scale it does not know.
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
        self._meter: Meter | None = None  # of the training that runs
        self._training_at: list[float] | None = None  # homotopy of each configuration, while an evaluation runs at 1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        active_configs(model)
        for host in hosts(model):
            host.schedule.known, host.schedule.driver = True, self
        self._dense_steps = 0
        if not self.scale_is_exact and args.fp16:
            raise TopologyConfigError(
                "a topology needs TopologyTrainerMixin before the trainer class where fp16 is true: its auxiliary "
                "gradient would not be scaled as the loss is. Use TopologySFTTrainer, or bf16."
            )
        if not self.scale_is_exact:  # the mixin did it before anything was sharded
            restore_precision(model)
        if args.eval_on_start:
            self._in_full_force(model)
        self._meter = Meter(state)

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
            if not self.scale_is_exact:
                host.auxiliary_scale = 1 / _micro_steps(args, state, kwargs.get("train_dataloader"))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if self._dense_steps is not None:
            self._look_for_hidden_pairs(model, state)
        if state.global_step >= state.max_steps:  # before the last checkpoint is written
            self._finish(model)
        self._note(args, state, model, kwargs)  # at each step, because any may be saved
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
        self._note(args, state, model, kwargs)
        for host in hosts(model):
            host.schedule.driver = None

    def _note(self, args: TrainingArguments, state: TrainerState, model: nn.Module, given: dict[str, Any]) -> None:
        if self._meter is not None:
            self._meter.note(args, state, model, given.get("train_dataloader"))

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


class DensityCallback(TopologyCallback, ExportableState):
    """What a topology needs beside a trainer's own loss to end as a calibrated adapter; the default of every trainer.

    The first steps distil: the model runs dense, and every router learns to keep its layer's attention. From then on
    each step runs the hard topology at a density drawn for it (`drawn_density`), on the depth map that the density
    dial has for it, from a calibration that is renewed as the routers change; the layers' own losses go on beside the
    trainer's. After the last step the dial is calibrated, before the last checkpoint is written. An adapter that is
    calibrated already does not run dense again.

    Calibration reads windows of the training data (`windows_of_training_data`). Where they hold no token ids, or fit
    window and sinks, and where weights are sharded over processes (FSDP, DeepSpeed), the homotopy is raised over the
    training at the config's `visible_depth` instead, which is warned of.

    Args:
        densities: lowest and highest density to draw, `0 < lowest <= highest <= 1`, at the windows' length.
        distil_share: share of the steps that run dense and distil, in [0, 1).
        learning_rate: the routers' own, > 0. None takes the trainer's where it was set and trains nothing else, and
            3e-3 otherwise: the defaults of most trainers are for whole models, and hardly move a router.
        max_length: most tokens of a window; where rows are not prompts to complete, it has no more than a forward of
            the training, of `per_device_train_batch_size` rows, so that it needs no more memory.
        num_windows: windows calibrated on, >= 1; during training a quarter of them.
        temperature: as `TopologyCallback`'s, over the steps after those that distil.

    Raises:
        TopologyConfigError: an argument is out of range.
    """

    def __init__(
        self,
        densities: tuple[float, float] = (0.05, 0.4),
        distil_share: float = 0.3,
        learning_rate: float | None = None,
        max_length: int = 4096,
        num_windows: int = 16,
        temperature: tuple[float, float] = TEMPERATURES,
    ) -> None:
        super().__init__(temperature)
        if not 0 <= distil_share < 1:
            raise TopologyConfigError(f"distil_share must be in [0, 1), got {distil_share}")
        if learning_rate is not None and not learning_rate > 0:
            raise TopologyConfigError(f"learning_rate must be > 0, got {learning_rate}")
        if max_length < 2 or num_windows < 1:
            raise TopologyConfigError(
                f"max_length must be >= 2 and num_windows >= 1, got {max_length} and {num_windows}"
            )
        check_densities(densities)
        self.densities, self.distil_share, self.learning_rate = densities, distil_share, learning_rate
        self.max_length, self.num_windows = max_length, num_windows
        self._step = ExitStack()  # what is in force during a step
        self._drawn: DrawnDensities | None = None  # None: the homotopy is raised instead
        self._windows: Tensor | None = None
        self._distil_steps = 0
        self._calibrated = False  # since the last step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, model, **kwargs)
        self._step.close()
        self._drawn, self._calibrated = None, False
        self._windows = self._calibration_windows(args, model, kwargs)
        if self._windows is None:
            return
        quarter = self._windows[: max(1, len(self._windows) // 4)]
        self._drawn = DrawnDensities(self.densities, quarter, False, args.seed)
        if state.global_step > 0:
            self._distil_steps = _saved(state, type(self).__name__).get("_distil_steps", 0)
        elif all(config.homotopy == 0 and config.calibration is None for config in active_configs(model)):
            self._distil_steps = int(self.distil_share * state.max_steps)
            initialize_routers(model, self._windows[:1])
        else:
            self._distil_steps = 0
        if not self.scale_is_exact:  # the mixin has given them their own when it made the optimizer
            self._change_learning_rate(args, model, kwargs["optimizer"], kwargs["lr_scheduler"])

    def state(self) -> dict[str, Any]:
        """For checkpoints: a resumed run does not see whether its adapter was a fresh one."""
        return {"args": {}, "attributes": {"_distil_steps": self._distil_steps}}

    def _calibration_windows(self, args: TrainingArguments, model: nn.Module, given: dict[str, Any]) -> Tensor | None:
        if AcceleratorState().distributed_type in _SHARDED:
            why = "its weights are sharded over processes"
        elif not isinstance(model, PeftModel):
            why = f"its model is no PeftModel but a {type(model).__name__}"
        else:
            base = model.get_base_model()
            windows = windows_of_training_data(
                given["train_dataloader"].dataset,
                base,
                given.get("processing_class"),
                self.max_length,
                self.num_windows,
                rows=args.per_device_train_batch_size,
                row_length=getattr(args, "max_length", None),
            )
            try:
                if windows is not None:
                    for config in active_configs(model):
                        check_sequences(windows, config, base, check_padding=False)
                    check_differentiable(base)
                    return windows.to(next(model.parameters()).device)
                why = "its data hold no token ids"
            except TopologyError as error:
                why = str(error)
        warnings.warn(
            f"a topology cannot be calibrated in this training: {why}. It is trained at its visible_depth, "
            "its homotopy raised over the training, and has no density dial until topo_adapter.calibrate is called.",
            stacklevel=2,
        )
        return None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        super().on_step_begin(args, state, control, model, **kwargs)
        if self._drawn is None:
            return
        configs, step = active_configs(model), state.global_step - self._distil_steps
        new: Pass
        if step < 0:
            new = DistilBeside(draw=f"{args.seed}/{state.global_step}")
            for config in configs:
                config.homotopy, config.temperature = 0.0, 1.0
        else:
            for config in configs:
                config.homotopy = 1.0
                first, last = self.temperature
                config.temperature = first * (last / first) ** (step / (state.max_steps - self._distil_steps))
            self._drawn.renew(model, step, state.max_steps - self._distil_steps)
            _, maps = self._drawn.draw(configs, step)
            new = TrainBeside(configs, maps)
        self._step.enter_context(during(model, new))  # around the backward pass too, for gradient checkpointing

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self._step.close()
        super().on_step_end(args, state, control, model, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self._step.close()
        if args.load_best_model_at_end:  # those of the last step are another model's
            self._calibrated = False
        super().on_train_end(args, state, control, model, **kwargs)

    def _finish(self, model: nn.Module) -> None:
        super()._finish(model)
        if self._windows is not None and not self._calibrated:
            calibrate(model, self._windows, check_padding=False)
            self._calibrated = True

    def give_learning_rate(self, args: TrainingArguments, model: nn.Module, optimizer: Optimizer) -> None:
        """Put the routers into parameter groups of their own, with their own rate; no schedule has begun."""
        routers, others = _trained(model)
        rate = self._rate(args, alone=not others)
        for group in list(optimizer.param_groups):
            own = [weight for weight in group["params"] if id(weight) in routers]
            if len(own) == len(group["params"]):
                group["lr"] = rate
            elif own:
                group["params"] = [weight for weight in group["params"] if id(weight) not in routers]
                optimizer.add_param_group({**group, "params": own, "lr": rate})

    def _change_learning_rate(self, args: TrainingArguments, model: nn.Module, optimizer: Any, schedule: Any) -> None:
        """As `give_learning_rate`, of an optimizer whose schedule has begun; its groups are those of checkpoints."""
        _, others = _trained(model)
        rate = self._rate(args, alone=not others)
        if others:
            if rate != args.learning_rate:
                warnings.warn(
                    f"the routers are trained at the trainer's learning rate {args.learning_rate:g}, because other "
                    f"weights are trained beside them, and not at {rate:g}: use TopologySFTTrainer, or put "
                    "TopologyTrainerMixin before the trainer class, and they have a rate of their own.",
                    stacklevel=2,
                )
            return
        for group in optimizer.param_groups:
            begun = group.get("initial_lr", group["lr"])
            group["lr"], group["initial_lr"] = group["lr"] * (rate / begun), rate
        schedule = getattr(schedule, "scheduler", schedule)  # accelerate's wrapper has one inside
        if hasattr(schedule, "base_lrs"):
            schedule.base_lrs = [rate] * len(schedule.base_lrs)

    def _rate(self, args: TrainingArguments, alone: bool) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        untouched = type(args).__dataclass_fields__["learning_rate"].default
        return args.learning_rate if alone and args.learning_rate != untouched else ROUTER_LEARNING_RATE


def _trained(model: nn.Module) -> tuple[set[int], bool]:
    """Ids of the routers' weights, and whether others are trained too."""
    routers = {id(weight) for host in hosts(model) for weight in host.parameters()}
    return routers, any(weight.requires_grad and id(weight) not in routers for weight in model.parameters())


def _saved(state: TrainerState, callback: str) -> dict[str, Any]:
    """The attributes of a callback in the checkpoint that a run goes on from."""
    found = state.stateful_callbacks.get(callback, {})
    return (found[0] if isinstance(found, list) else found).get("attributes", {})


def _while_it_drives(event: str) -> Callable[..., None]:
    """A `DensityCallback`'s event, of a callback that may have nothing to do."""

    def on(self: AutomaticCallback, *args: Any, **kwargs: Any) -> None:
        if self._drives:
            getattr(DensityCallback, event)(self, *args, **kwargs)

    return on


class AutomaticCallback(DensityCallback):
    """Of every trainer (transformers' default callbacks); drives where no other callback of a topology does."""

    def __init__(self) -> None:
        super().__init__()
        self._drives: bool | None = None  # None: decided at the first step, when any other has begun to

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self._drives = None
        for host in hosts(model):  # a training that an error ended has left its own; this one's begin after this
            host.schedule.driver = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if self._drives is None:
            trained = [host for host in hosts(model) if any(weight.requires_grad for weight in host.parameters())]
            self._drives = bool(trained) and all(host.schedule.driver is None for host in trained)
            if self._drives:
                super().on_train_begin(args, state, control, model, **kwargs)
        if self._drives:
            super().on_step_begin(args, state, control, model, **kwargs)

    on_step_end = _while_it_drives("on_step_end")
    on_epoch_end = _while_it_drives("on_epoch_end")
    on_evaluate = _while_it_drives("on_evaluate")
    on_log = _while_it_drives("on_log")
    on_train_end = _while_it_drives("on_train_end")


def drive_every_trainer() -> None:
    """Make `AutomaticCallback` one of transformers' default callbacks. Idempotent."""
    if AutomaticCallback not in DEFAULT_CALLBACKS:
        DEFAULT_CALLBACKS.append(AutomaticCallback)
