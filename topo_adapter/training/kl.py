"""The end-to-end stage: KL of the dense model to its own hard topology (docs/method.md, section 5.3)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.passes import during
from ..errors import TopologyConfigError, UnsupportedModelError
from ..layer import TopologyHost
from .callback import TopologyCallback
from .densities import TEMPERATURES, DrawnDensities, Map, TrainAt, check_densities, loss_weight, warn_of_sparsest_steps
from .distil import Distil, TrainBeside
from .losses import logits_head, next_tokens, token_losses
from .routers import active_configs
from .trainer import TopologyTrainerMixin

#: Positions whose own logits are asked of the model, to check the chunked ones against.
_CHECKED = 4


def _without_dropout(base: nn.Module) -> None:
    """Put a model in training mode into the numerics of evaluation; the routers go on training.

    Linear layers have no randomness and stay: in evaluation mode bitsandbytes repacks their weights for good. Modules
    with gradient checkpointing do it in training mode only, and stay too.
    """
    for module in base.modules():
        keeps = isinstance(module, (TopologyHost, nn.Linear)) or getattr(module, "gradient_checkpointing", False)
        if not keeps:
            module.training = False


class KLTrainer(TopologyTrainerMixin):
    """End-to-end training on KL(dense || topology): the model learns to lose nothing to its own hard topology.

    The teacher is the same model with its adapter disabled. The student runs the merged model's mask (hard routes,
    homotopy 1); the router's gradient passes by the straight-through bridge, for every causal pair. Each step trains
    what the density dial will run: a density is drawn (`drawn_density`, of the arguments' seed and the global step),
    and `choose_depths` makes the depth map of it, from a calibration that is renewed as the routers change: before each
    fifth of the steps. The step's loss is divided by what that calibration expects of its map (over what it expects of
    the middle of the range), so that sparse maps, which lose more, do not drown the rest; `kl` and `lm` are logged as
    they are.
    The price of density is the config's `density_weight`, or what the dial saves by more density at the step's map,
    where that is less.

    Without `densities` each step trains the config's own `visible_depth`. Any tokenised text will do; padding
    (`attention_mask` `[B, T]`) carries no loss, packed documents are told by `position_ids`.

    Evaluation reports the same loss at the config's own `visible_depth`.

    Args:
        densities: lowest and highest density to draw, `0 < lowest <= highest <= 1`, at the length of
            `calibration_rows`; a density below that of the sparsest map is trained at the sparsest.
        calibration_rows: int64 `[B, T]`, needed with `densities`: what `calibrate` measures on, and its
            `check_padding`.
        kl_weight, lm_weight: weights of the KL and of the next-token loss (`labels`, or `input_ids` without them),
            >= 0, not both 0. Both are sums over tokens divided by the number of real tokens of the step.
        local_weight: of the layers' own losses beside, >= 0. num_queries, local_density_weight: of those, see
            `DistillationTrainer`.
        Other arguments: as `transformers.Trainer`.

    Raises:
        TopologyConfigError: an argument is out of range. UnsupportedModelError: no active adapter, or a model that
            does to its logits what cannot be done in chunks (found on the first batch).
    """

    def __init__(
        self,
        *args: Any,
        densities: tuple[float, float] | None = None,
        calibration_rows: Tensor | None = None,
        check_padding: bool = True,
        kl_weight: float = 1.0,
        lm_weight: float = 0.0,
        local_weight: float = 0.0,
        num_queries: int = 256,
        local_density_weight: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        active_configs(self.model)  # refuses a model without one
        self.drawn: DrawnDensities | None = None
        if densities is not None:
            check_densities(densities)
            if calibration_rows is None:
                raise TopologyConfigError("calibration_rows must be given where densities are drawn, got None")
            self.drawn = DrawnDensities(densities, calibration_rows, check_padding, self.args.seed)
            warn_of_sparsest_steps(densities, calibration_rows, active_configs(self.model)[0])
        weights = {
            "kl_weight": kl_weight,
            "lm_weight": lm_weight,
            "local_weight": local_weight,
            "local_density_weight": local_density_weight,
        }
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise TopologyConfigError(f"{name} must be a finite number >= 0, got {weight}")
        if num_queries < 1:
            raise TopologyConfigError(f"num_queries must be an integer >= 1, got {num_queries}")
        if kl_weight == lm_weight == 0:
            raise TopologyConfigError("kl_weight or lm_weight must be > 0, got 0 for both")
        if not isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            raise UnsupportedModelError(
                f"model must be a PeftModel, got {type(self.model).__name__}: the teacher is the model with its "
                "adapter disabled; see get_peft_model"
            )
        self.kl_weight, self.lm_weight, self.local_weight = kl_weight, lm_weight, local_weight
        self.local = Distil(num_queries, local_density_weight)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of the whole accumulated batch
        self._loss_weight = 1.0
        self._target: dict[str, float] = {}  # what the last step drew, for its log
        self._logits_checked = False
        self._since_log: list[Tensor] = []  # sums of KL, of cross-entropy, and tokens, of each forward

    def default_topology_callback(self) -> TopologyCallback:
        return TopologyCallback(TEMPERATURES, homotopy=(1.0, 1.0))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor]:
        """The micro-batches of a step and the number of real tokens in all of them."""
        samples, _ = super().get_batch_samples(*args, **kwargs)
        tokens = torch.tensor(sum(_num_real(sample) for sample in samples), device=self.args.device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            tokens = self.accelerator.reduce(tokens, reduction="sum")
        return samples, tokens

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        configs = active_configs(model)
        step = self.state.global_step
        if self.drawn is None:
            maps = [Map(*config.setting, config.density_weight) for config in configs]
        else:
            self.drawn.renew(self.accelerator.unwrap_model(self.model), step, self.state.max_steps)
            density, maps = self.drawn.draw(configs, step)
            dead = self.drawn.without_ball
            self._target = {"topology/target_density": density, "topology/heads_without_ball": dead}
            self._loss_weight = loss_weight(configs, maps, self.drawn.densities)
        beside = self.local_weight > 0
        new = TrainBeside(configs, maps, self.local_weight, self.local) if beside else TrainAt(configs, maps)
        # around the backward pass too: gradient checkpointing runs the layers again there
        with during(model, new):
            return super().training_step(model, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        peft_model = self.accelerator.unwrap_model(model)
        base = peft_model.get_base_model()
        if model.training:
            _without_dropout(base)
        real = _real(inputs)
        labels = inputs.get("labels", inputs["input_ids"])
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
        if "use_cache" in inspect.signature(base.forward).parameters:
            inputs["use_cache"] = False

        reference = None
        if self.kl_weight:
            with torch.no_grad(), peft_model.disable_adapter():
                reference, _ = _final_states(model, base, inputs)
        hidden, outputs = _final_states(model, base, inputs)
        head = logits_head(base)
        real = real.to(hidden.device)
        with self.accelerator.autocast():
            if not self._logits_checked:
                _check_logits(base, head(hidden[:, -_CHECKED:]), outputs.logits)
                self._logits_checked = True
            targets = next_tokens(labels.to(real.device), real, inputs.get("position_ids")) if self.lm_weight else None
            divergence, cross_entropy = token_losses(
                hidden[real],
                None if reference is None else reference[real],
                None if targets is None else targets[real],
                head,
            )
        sums = torch.stack([divergence.sum(), cross_entropy.sum()])
        tokens = real.sum()
        total = self.kl_weight * sums[0] + self.lm_weight * sums[1]
        if not model.training:
            loss = total / tokens.clamp(min=1)
            return (loss, outputs) if return_outputs else loss
        self._since_log.append(torch.cat([sums.detach().float(), tokens[None].float()]))
        if num_items_in_batch is None:  # called by hand: the mean of this batch, as the trainer would divide it
            loss = total / tokens.clamp(min=1)
        else:
            loss = total / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        # the auxiliary loss has the weight too: it is passed on by the gradient
        loss = self._loss_weight * self.with_auxiliary_scale(model, loss, normalised=num_items_in_batch is not None)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._since_log:
            divergence, cross_entropy, tokens = self.accelerator.reduce(
                torch.stack(self._since_log).sum(0), reduction="sum"
            ).tolist()
            self._since_log.clear()
            logs = {**logs, **self._target}
            if self.kl_weight:
                logs["kl"] = divergence / max(tokens, 1.0)
            if self.lm_weight:
                logs["lm"] = cross_entropy / max(tokens, 1.0)
        super().log(logs, *args, **kwargs)


def _real(inputs: dict[str, Any]) -> Tensor:
    """bool `[B, T]`: False in padding."""
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if ids is None:
        raise UnsupportedModelError(f"a batch must have input_ids, got {sorted(inputs)}")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedModelError(
            f"attention_mask must have the shape {tuple(ids.shape)} of input_ids, got {got}; packed documents are told "
            "by position_ids"
        )
    return mask.bool()


def _num_real(inputs: dict[str, Any]) -> int:
    return int(_real(inputs).sum())


def _final_states(model: nn.Module, base: PreTrainedModel, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """What enters the output embedding, `[B, T, hidden_size]`, and the model's outputs with a few positions' logits.

    The model's own forward runs, whatever wraps it; a hook on the output embedding takes all positions and hands on
    the last few.
    """
    taken: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        taken.append(args[0])
        return (args[0][:, -_CHECKED:], *args[1:])

    embedding = base.get_output_embeddings()
    if embedding is None:
        logits_head(base)  # refuses
    hook = embedding.register_forward_pre_hook(take)
    try:
        outputs = model(**inputs)
    finally:
        hook.remove()
    if len(taken) != 1 or taken[0].shape[:2] != inputs["input_ids"].shape:
        raise UnsupportedModelError(
            f"{type(base).__name__} must run its output embedding once, over the hidden states of all tokens, for its "
            f"loss to be computed in chunks; it ran over {[tuple(x.shape) for x in taken]}. Train on the LM loss with "
            "TopologySFTTrainer instead."
        )
    return taken[0], outputs


@torch.no_grad()
def _check_logits(base: PreTrainedModel, ours: Tensor, own: Tensor) -> None:
    """Refuse a model whose forward does more to its logits than `logits_head` knows of."""
    own = own.to(ours.device, ours.dtype)
    if ours.shape != own.shape or not torch.allclose(ours, own, rtol=0.02, atol=0.02 * own.abs().max().item()):
        got = f"by up to {(ours - own).abs().max().item():.3g}" if ours.shape == own.shape else f"in shape {own.shape}"
        raise UnsupportedModelError(
            f"the logits of {type(base).__name__} must be its output embedding, scaled by logits_scaling or "
            f"logit_scale and capped by final_logit_softcapping of its config; its own logits differ {got}. "
            "Train on the LM loss with TopologySFTTrainer instead."
        )
