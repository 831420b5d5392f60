"""The end-to-end stage: KL of the dense model to its own hard topology (docs/method.md, section 5.3)."""

from __future__ import annotations

import inspect
import math
import random
import warnings
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import TopologyConfig, VisibleDepth
from ..core.dial import allot, expected_loss, reachable
from ..core.passes import Pass, changed, during
from ..core.visibility import always_density
from ..errors import TopologyConfigError, UnsupportedModelError
from ..layer import TopologyHost
from ..measuring.calibration import calibrate
from .losses import logits_head, next_tokens, token_losses
from .trainer import TopologyCallback, TopologyTrainerMixin, active_configs

#: Positions whose own logits are asked of the model, to check the chunked ones against.
_CHECKED = 4
_STRATA = 8
#: Calibrations in the course of a training, at equal distances; more of them at its start change nothing (docs/log.md).
_CALIBRATIONS = 5
_MAX_SPARSEST = 0.25  # share of the steps that may train the sparsest map unmentioned
_MAX_RATIO = 16.0  # of losses in `_weight`, where a map is expected to lose next to nothing
#: First and last temperature. The forward does not depend on it; in backward a digit whose logit is more than a few
#: temperatures from its threshold has no gradient, and after layer-local distillation most are (docs/log.md).
TEMPERATURES = (2.0, 0.5)


def drawn_density(seed: int, step: int, lowest: float, highest: float) -> float:
    """The density of a training step, log-uniform in `[lowest, highest]`.

    A function of its arguments alone, so every process draws alike and a resumed run goes on as it would have. Each
    run of 8 steps has a density of each eighth of the range, in an order of its own: logs over several steps stay
    comparable.
    """
    block, index = divmod(step, _STRATA)
    strata = list(range(_STRATA))
    random.Random(f"{seed}/{block}").shuffle(strata)  # a string seeds alike on every platform and in every process
    offset = random.Random(f"{seed}/{step}/density").random()
    share = (strata[index] + offset) / _STRATA
    return lowest * (highest / lowest) ** share


class TrainAt(Pass):
    """Each configuration has its depths and price of density, and heads take their likeliest digits."""

    trains = True

    def __init__(self, configs: list[TopologyConfig], maps: list[_Map]) -> None:
        self._in_force = {
            id(config): changed(config, visible_depth=each.depths, density_weight=each.price, gumbel_noise=False)
            for config, each in zip(configs, maps, strict=True)
        }

    def in_force(self, config: TopologyConfig) -> TopologyConfig:
        return self._in_force.get(id(config), config)


class _Map(NamedTuple):
    """Depths to train at, the price of density there, and the loss that the calibration expects."""

    depths: VisibleDepth
    price: float
    loss: float = 0.0


def _nearest_map(config: TopologyConfig, density: float) -> _Map:
    """The depth map of a density, or the sparsest one where that is more.

    The price is what the dial itself would pay for a little more density, in terms of `density_weight` (the mean over
    a layer's heads has that weight), at most the config's own: where density is cheap to the dial, so it is to the
    routers.
    """
    assert config.calibration is not None  # of calibrate
    depths, rate = allot(config.calibration, reachable(config.calibration, density))
    price = min(config.density_weight, rate * sum(map(len, depths.values())) / len(depths))
    return _Map(dict(depths), price, expected_loss(config.calibration, depths))


def _weight(configs: list[TopologyConfig], maps: list[_Map], densities: tuple[float, float]) -> float:
    """Makes the losses of sparse and dense maps alike: what the middle of the range is expected to lose over what this
    step's map is.

    The KL at density .08 is ten times that at .4, and so is its gradient, which would drown the other's.
    """
    middle = math.sqrt(densities[0] * densities[1])
    reference = math.fsum(_nearest_map(config, middle).loss for config in configs)
    if reference <= 0:
        return 1.0
    expected = math.fsum(m.loss for m in maps)
    return reference / max(expected, reference / _MAX_RATIO)


def _warn_of_sparsest_steps(densities: tuple[float, float], rows: Tensor, config: TopologyConfig) -> None:
    """Say so where many of the densities to be drawn are below what window and sinks show of such rows."""
    lowest, highest = densities
    near = always_density(rows.shape[1], config.local_window, config.num_sink_tokens)
    if near <= lowest:
        return
    share = min(1.0, math.log(near / lowest) / math.log(highest / lowest)) if highest > lowest else 1.0
    if share > _MAX_SPARSEST:
        warnings.warn(
            f"{share:.0%} of the densities drawn from {lowest:g} to {highest:g} are below the {near:.3g} that "
            f"local_window {config.local_window} and {config.num_sink_tokens} sinks show of {rows.shape[1]} "
            "tokens; those steps all train the sparsest map. Train on longer rows, raise lowest_density, or lower "
            "local_window.",
            stacklevel=3,
        )


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
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        active_configs(self.model)  # refuses a model without one
        if densities is not None:
            if not 0 < densities[0] <= densities[1] <= 1:
                raise TopologyConfigError(
                    f"densities must be lowest and highest with 0 < lowest <= highest <= 1, got {densities}"
                )
            if calibration_rows is None:
                raise TopologyConfigError("calibration_rows must be given where densities are drawn, got None")
        for name, weight in (("kl_weight", kl_weight), ("lm_weight", lm_weight)):
            if not 0 <= weight < float("inf"):
                raise TopologyConfigError(f"{name} must be a finite number >= 0, got {weight}")
        if kl_weight == lm_weight == 0:
            raise TopologyConfigError("kl_weight or lm_weight must be > 0, got 0 for both")
        if not isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            raise UnsupportedModelError(
                f"model must be a PeftModel, got {type(self.model).__name__}: the teacher is the model with its "
                "adapter disabled; see get_peft_model"
            )
        self.kl_weight, self.lm_weight = kl_weight, lm_weight
        self.densities, self.calibration_rows, self.check_padding = densities, calibration_rows, check_padding
        if densities is not None and calibration_rows is not None:
            _warn_of_sparsest_steps(densities, calibration_rows, active_configs(self.model)[0])
        self._calibrated: int | None = None  # the fifth of the training that the calibration is of
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of the whole accumulated batch
        self._loss_weight = 1.0
        self._drawn: dict[str, float] = {}
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
        if self.densities is None:
            maps = [_Map(config.visible_depth, config.density_weight) for config in configs]
        else:
            self._calibrate(step)
            density = drawn_density(self.args.seed, step, *self.densities)
            self._drawn = {"topology/target_density": density}
            maps = [_nearest_map(config, density) for config in configs]
            self._loss_weight = _weight(configs, maps, self.densities)
        # around the backward pass too: gradient checkpointing runs the layers again there
        with during(model, TrainAt(configs, maps)):
            return super().training_step(model, *args, **kwargs)

    def _calibrate(self, step: int) -> None:
        """Renew the calibration where it is due, or where a resumed run has none."""
        fifth = step * _CALIBRATIONS // self.state.max_steps
        if self._calibrated == fifth:
            return
        assert self.calibration_rows is not None  # the constructor has looked
        model = self.accelerator.unwrap_model(self.model)
        calibrate(model, self.calibration_rows, seed=self.args.seed, check_padding=self.check_padding)
        for config in active_configs(model):  # atomic additions differ between processes, their maps must not
            (config.calibration,) = broadcast_object_list([config.calibration])
        self._calibrated = fifth

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
            logs = {**logs, **self._drawn}
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
