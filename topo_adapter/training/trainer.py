"""The auxiliary loss under any trainer.

Everything here rides on `transformers.Trainer`; nothing is a trainer of its own.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from ..card import write_adapter_card
from ..config import TopologyConfig
from ..errors import TopologyConfigError
from ..files import read_fields
from ..history import checked_runs
from ..layer import TopologyHost, hosts
from .callback import AutomaticCallback, DensityCallback, TopologyCallback
from .routers import active_configs, restore_precision, topology_metrics


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
        callbacks = self.callback_handler.callbacks
        given = [c for c in callbacks if isinstance(c, TopologyCallback) and not isinstance(c, AutomaticCallback)]
        if not given:
            given = [self.default_topology_callback()]
            self.add_callback(given[0])
        for callback in given:
            callback.scale_is_exact = True
        restore_precision(self.model)

    def default_topology_callback(self) -> TopologyCallback:
        return DensityCallback()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """The trainer's own; the routers have a learning rate of theirs, unless the optimizer was given."""
        made_here = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        for callback in self.callback_handler.callbacks:
            if made_here and isinstance(callback, DensityCallback) and callback.scale_is_exact:  # not the automatic one
                callback.give_learning_rate(self.args, self.model, optimizer)
        return optimizer

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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target: Any = self.model if model is None else model
        trained = {id(weight): weight.requires_grad for weight in target.parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_beside(Path(resume_from_checkpoint), target)
        self._load_runs(Path(resume_from_checkpoint), target)
        for weight in target.parameters():  # loading makes the active adapter trainable, be it frozen or not
            weight.requires_grad_(trained.get(id(weight), weight.requires_grad))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_beside(Path(str(self.state.best_model_checkpoint)), self.model)

    @staticmethod
    def _load_beside(checkpoint: Path, model: Any) -> None:
        """Every adapter of a checkpoint, where transformers loads some: of the best model only the active one, and in
        5.17, resuming, not the one at the top where others, a LoRA's, lie in folders beside it."""
        if not isinstance(model, PeftModel) or len(model.peft_config) < 2:
            return
        for name in list(model.peft_config):
            folder = checkpoint if name == "default" else checkpoint / name
            if (folder / SAFETENSORS_WEIGHTS_NAME).exists():
                model.load_adapter(str(folder), name, is_trainable=True)

    @staticmethod
    def _load_runs(checkpoint: Path, model: Any) -> None:
        """What a checkpoint's configs say of the trainings before."""
        for name, config in getattr(model, "peft_config", {}).items():
            file = (checkpoint if name == "default" else checkpoint / name) / CONFIG_NAME
            if isinstance(config, TopologyConfig) and file.exists():
                config.training_runs = checked_runs(read_fields(file).get("training_runs"))

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
            write_adapter_card(active_configs(self.model)[0], Path(self.args.output_dir))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log({**logs, **topology_metrics(self.model)}, *args, **kwargs)
