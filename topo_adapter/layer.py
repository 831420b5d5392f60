"""The child module of an attention module, the pre-hook that routes, and the attention function.

Data flow of one attention forward: the pre-hook sees hidden states, mask and cache, asks the child for a
`TopologyCall` and passes it on as a keyword argument; the attention module projects and rotates as
always and calls the attention function registered here, which finds the call among its arguments. No
state is kept between the two, so gradient checkpointing may run a layer as often as it likes.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .attention import decode_attention, hard_attention, serves_decode
from .backend import graph_is_recorded, sent
from .cache import KeyRecords, cache_among
from .config import TopologyConfig
from .errors import MergeError, UnsupportedModelError
from .gates import Geometry, acting_arguments, eager_attention_of, refuse_inputs, refuse_unmodelled
from .layout import (
    SequenceLayout,
    contiguous_layout,
    layout_from_cu_seq_lens,
    layout_from_mask,
    layout_from_padding,
    layout_from_position_ids,
    layout_from_recorded_mask,
)
from .objective import attach_loss, balance_loss, distillation_loss, gradient_at_once
from .plan import Plan, make_plan
from .records import Keys
from .relaxation import bridged_attention
from .router import Routes, TopologyRouter
from .scoring import Scoring
from .tree import address_to_digits, digits_to_address
from .visibility import Visibility, per_head

#: Name of the child module and of the attention implementation. It must contain none of the substrings
#: that transformers looks for ("flash", "sdpa", "paged", "flex_attention").
CHILD = "topo_adapter"
IMPLEMENTATION = "topology"


@dataclass(frozen=True)
class RecordedRoutes:
    """Digits of one layer, for anyone who wants to rebuild the mask of docs/method.md section 2.

    visits: int64 `[B, H, m, T]`, `H` query heads: the leaves whose balls a query sees, -1 for none. query_digits,
    key_digits: int64 `[B, H, T, L]`, those of the first visit and of the keys. visible_depth: int64 `[H]`.
    """

    query_digits: Tensor
    key_digits: Tensor
    visible_depth: Tensor
    visits: Tensor

    def visibility(self, layout: SequenceLayout, config: TopologyConfig) -> Visibility:
        """Who sees whom of these tokens, by the rule of a config."""
        return Visibility(
            self.visits,
            layout,
            Keys(digits_to_address(self.key_digits, config.arity), layout),
            config.arity,
            config.depth,
            tuple(self.visible_depth.tolist()),
            config.local_window,
            config.num_sink_tokens,
        )


@dataclass(frozen=True)
class Distillation:
    """Turns a forward into one of layer-local distillation: the base runs, each layer reports a loss."""

    num_queries: int
    density_weight: float
    losses: list[Tensor]


@dataclass(frozen=True)
class TopologyCall:
    """Everything the attention function needs beside q, k and v.

    mask: what the layouts were read from; the attention must be given the same.
    """

    host: TopologyHost
    config: TopologyConfig
    visibility: Visibility
    routes: Routes | None
    merged: bool
    training: bool
    mask: Any

    @property
    def hard(self) -> bool:
        """Whether the hard topology is all that this forward asks for: merged, or in full force without gradients."""
        if self.merged:
            return True
        settled = self.config.homotopy == 1 and not self.training and not torch.is_grad_enabled()
        # the soft path in torch can be traced whole; the hard one asks for values, where no kernel runs it
        return settled and self.host.distillation is None and not graph_is_recorded()


@dataclass
class Schedule:
    """Whether anything raises the homotopy of a model's adapters, or it was said that nothing does."""

    known: bool = False

    def miss(self) -> None:
        """Warn, once, of a training that leaves the adapter without effect."""
        if not self.known:
            self.known = True
            warnings.warn(
                "a topology adapter is being trained at homotopy 0 and nothing is known to raise it: the model "
                "stays the base, the adapter will have no effect, and with gradient accumulation or fp16 its "
                "auxiliary gradient is scaled wrongly. Use TopologySFTTrainer, put TopologyTrainerMixin before "
                "your trainer class, or add topo_adapter.TopologyCallback(); ignore this if your own loop raises "
                "config.homotopy to 1.",
                stacklevel=2,
            )


class AttentionObserver(Protocol):
    """Turns a forward into one of calibration: each layer attends at its visible depths and shows that to the observer.

    Layers whose heads all have depth 0 run the base.
    """

    def __call__(
        self, call: TopologyCall, query: Tensor, key: Tensor, value: Tensor, out: Tensor, scoring: Scoring
    ) -> None:
        """query `[B, H, T, D]`; key, value `[B, H_kv, T, D]`; out `[B, T, H, D]`, the attention's output."""


class TopologyHost(nn.Module):
    """Routing of one attention module; the subclasses decide which router is in force."""

    def __init__(self, attention: nn.Module, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.base_config: Any = attention.config
        kind = type(attention)
        # names of what the module's forward takes by position, after itself
        self.inputs = tuple(inspect.signature(inspect.unwrap(kind.forward)).parameters)[1:]
        self.eager_attention, self.acting_arguments = eager_attention_of(kind), acting_arguments(kind)
        # gradient of the auxiliary loss, set by the trainer, and factor on its weights, set by the callback
        self.auxiliary_scale: float | Tensor = 1.0
        self.auxiliary_ramp = 1.0
        self.metrics: dict[str, Tensor] = {}
        self.recorder: dict[int, RecordedRoutes] | None = None
        self.distillation: Distillation | None = None
        self.observer: AttentionObserver | None = None
        self.density_recorder: Callable[[TopologyCall, Plan], None] | None = None
        self.density_counts: Tensor | None = None  # what the recorder made of the last recording
        self.standardising = False
        self.schedule = Schedule()
        self.unused: set[str] = set()  # adapters that were never loaded nor in force
        self._constants: dict[tuple[int, ...], Tensor] = {}

    def in_force(self) -> tuple[TopologyRouter, TopologyConfig, bool] | None:
        """The active router, its configuration and whether it is merged; None if the base is to run."""
        raise NotImplementedError

    def replaces_attention(self) -> bool:
        """Whether forwards run the topology in place of the base attention."""
        active = self.in_force()
        return active is not None and (active[2] or active[1].homotopy > 0)

    def depths(self, config: TopologyConfig) -> list[int]:
        """Visible depth of each query head."""
        return config.depths_of_layer(self.geometry.layer, self.geometry.num_heads, self.geometry.num_kv_heads)

    def on_device(self, values: tuple[int, ...], device: torch.device) -> Tensor:
        """int32 constants, kept: a copy from the host may not be recorded in a graph."""
        known = self._constants.get(values)
        if known is None or known.device != device:
            known = self._constants[values] = torch.tensor(values, dtype=torch.int32, device=device)
        return known

    def prepare(self, hidden_states: Tensor, inputs: dict[str, Any]) -> TopologyCall | None:
        """Route the hidden states `[B, T, hidden_size]` that enter the attention module.

        Args:
            inputs: everything the module is called with, by name.

        Returns None where the base attention is all there is to run.
        """
        active = self.in_force()
        if active is None:
            return None
        router, config, merged = active
        if self.standardising:
            router.standardise(hidden_states)
        refuse_inputs(self.geometry.layer, inputs)
        distilling, observed = self.distillation is not None, self.observer is not None
        cache = cache_among(inputs)
        # trainers that sample from their model do so in training mode; no gradient is asked for then
        sampling = cache is not None and not torch.is_grad_enabled()
        training = self.training and not merged and not distilling and not sampling
        dense = config.homotopy == 0 and not merged
        if training and dense and torch.is_grad_enabled() and next(router.parameters()).requires_grad:
            self.schedule.miss()
        if dense and not (training or distilling or observed or self.recorder is not None):
            return None

        depths = self.depths(config)
        differentiable = distilling or (not merged and not observed and torch.is_grad_enabled())
        chosen, routed = None, True
        choosing = any(0 < depth <= config.depth for depth in depths)
        if not (differentiable or training or observed or self.recorder is not None or choosing):
            routed = False  # every head is dense or has no tree: nobody asks for addresses
            batch, length = hidden_states.shape[:2]
            nowhere = torch.zeros(1, 1, 1, dtype=torch.int32, device=hidden_states.device)
            query_address = key_address = nowhere.expand(batch, router.num_heads, length)
        elif differentiable or training:
            with torch.set_grad_enabled(differentiable):
                states = hidden_states.detach() if distilling else hidden_states
                chosen = router.route(states, config.temperature, training and config.gumbel_noise)
            query_address, key_address = chosen.query.address(config.arity), chosen.key.address(config.arity)
        else:
            query_address, key_address = router.addresses(hidden_states, merged)

        if training and cache is not None and cache.get_seq_length(self.geometry.layer) > 0:
            raise UnsupportedModelError(
                "the key-value cache must be empty in training: cached keys have addresses but no gradient. "
                "Train on whole sequences, or generate under torch.no_grad()."
            )
        records = None
        if cache is not None and not dense:
            window = getattr(self.base_config, "sliding_window", None)
            records = KeyRecords(cache, self.geometry.layer, router, routed, window)
        if self.recorder is not None:
            self.recorder[self.geometry.layer] = self._record(query_address, key_address, depths, config)
        mask = inputs.get("attention_mask")
        query = self._layout(hidden_states, mask, inputs, records)
        # cached keys have addresses only: no bridge to them
        routes = chosen if differentiable and (records is None or records.empty) else None
        keys = Keys(key_address, query) if records is None else records.append(key_address, query)
        visibility = Visibility(
            query_address[:, :, None],
            query,
            keys,
            config.arity,
            config.depth,
            tuple(depths),
            config.local_window,
            config.num_sink_tokens,
            # every step of training may have a map of its own: not to be kept
            self.on_device if merged else sent,
        )
        return TopologyCall(self, config, visibility, routes, merged, training, mask)

    def _layout(
        self, hidden_states: Tensor, mask: Any, inputs: dict[str, Any], records: KeyRecords | None
    ) -> SequenceLayout:
        """Documents and positions of the tokens of this forward, from whatever the model passes down."""
        batch, length = hidden_states.shape[:2]
        layer = self.geometry.layer
        past = None if records is None or records.empty else records
        past_length = 0 if past is None else past.length
        if mask is None:
            position_ids = inputs.get("position_ids")
            if position_ids is not None and position_ids.ndim == 3:
                # rotary sections of multimodal models have a leading axis; text tokens restart in all of them alike
                position_ids = position_ids[0]
            if past is not None:
                return past.continued_layout(batch, length, position_ids)
            # flash kernels tell packed documents by these, if they are given; others never look at them
            if "flash" in self.base_config._attn_implementation and inputs.get("cu_seq_lens_q") is not None:
                return layout_from_cu_seq_lens(inputs["cu_seq_lens_q"], batch, length)
            if position_ids is not None:
                return layout_from_position_ids(position_ids, batch, layer)
            return contiguous_layout(batch, length, hidden_states.device)
        if not isinstance(mask, Tensor):
            raise UnsupportedModelError(
                f"attention_mask must be a tensor or None, got {type(mask).__name__}; load the model with "
                "attn_implementation='sdpa', 'eager' or 'flash_attention_2'."
            )
        if mask.ndim == 2:
            real = mask.bool()[:, : int(past_length) + length]
            return layout_from_padding(real).last(length)
        if mask.ndim == 4 and mask.shape[0] == 1 < batch:
            mask = mask.expand(batch, -1, -1, -1)
        if mask.ndim == 4 and graph_is_recorded():
            return layout_from_recorded_mask(mask, past_length)
        return layout_from_mask(mask, None if past is None else past.layout, int(past_length), layer)

    def _record(
        self, query_address: Tensor, key_address: Tensor, depths: list[int], config: TopologyConfig
    ) -> RecordedRoutes:
        heads = self.geometry.num_heads
        query, key = (
            per_head(address_to_digits(x, config.arity, config.depth), heads) for x in (query_address, key_address)
        )
        visits = per_head(query_address.long(), heads)[:, :, None]
        return RecordedRoutes(query, key, torch.tensor(depths, device=query.device), visits)


class TopologyLayer(TopologyHost, BaseTunerLayer):
    """PEFT layer of a topology adapter: a child module that holds one router per adapter name."""

    adapter_layer_names = ("topo_routers",)
    other_param_names = ("topo_configs",)

    def __init__(self, attention: nn.Module, geometry: Geometry) -> None:
        super().__init__(attention, geometry)
        self.topo_routers = nn.ModuleDict({})
        self.topo_configs: dict[str, TopologyConfig] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: TopologyConfig, device: torch.device) -> None:
        """Add a router. Raises TopologyConfigError if `config` does not fit this layer."""
        self.depths(config)
        geometry = self.geometry
        heads = geometry.num_heads if config.route_per == "query_head" else geometry.num_kv_heads
        router = TopologyRouter(
            geometry.hidden_size,
            heads,
            config.arity,
            config.depth,
            config.router_dim,
            config.tie_query_key,
            config.init_weights,
        )
        # under PEFT's low_cpu_mem_usage the parameters are created on meta and stay there until loaded
        self.topo_routers[adapter_name] = router if router.down.weight.is_meta else router.to(device)
        self._attention_device = device
        self.topo_configs[adapter_name] = config
        self.unused.add(adapter_name)
        BaseTunerLayer.set_adapter(self, self._active(), inference_mode=config.inference_mode)

    def _active(self) -> list[str]:
        return list(self.active_adapters)  # type: ignore[arg-type]  # BaseTunerLayer is untyped, Module says Tensor

    @property
    def weight(self) -> Tensor:
        """PEFT's mixin promises the weight of a wrapped base layer; there is none."""
        raise AttributeError("a topology layer is a child of its attention module and wraps no weight")

    bias = weight

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own looks for a wrapped base layer, which a child module does not have
        if adapter_name in self.topo_routers:
            self.topo_routers[adapter_name].to(device or self._attention_device)

    def in_force(self) -> tuple[TopologyRouter, TopologyConfig, bool] | None:
        names = self.merged_adapters or [name for name in self._active() if name in self.topo_routers]
        if self.disable_adapters or not names:
            return None
        if len(names) > 1:
            raise MergeError(f"one topology adapter can be active at a time, got {names}; call set_adapter with one")
        self.unused.discard(names[0])
        router = self.topo_routers[names[0]]
        assert isinstance(router, TopologyRouter)  # narrows the type; a ModuleDict holds plain Modules
        return router, self.topo_configs[names[0]], bool(self.merged_adapters)

    def check_merge(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> list[str]:
        """The one adapter to merge here, or none. Raises MergeError if merging is refused."""
        names = [n for n in (adapter_names or self._active()) if n in self.topo_routers]
        if len(names) > 1:
            raise MergeError(f"merging needs exactly one active topology adapter, got {names}; call set_adapter first")
        for name in names:
            config = self.topo_configs[name]
            if config.homotopy < 1:
                raise MergeError(
                    f"homotopy must be 1 to merge adapter {name!r}, got {config.homotopy}: the topology is not fully "
                    "in force, so the merged model would differ. Finish training with a TopologyCallback, which raises "
                    "it; set it by hand only if these routers were trained in force by a loop of your own."
                )
            for key, value in self.topo_routers[name].state_dict().items():
                if safe_merge and not torch.isfinite(value.float()).all():
                    raise MergeError(f"router weight {key} of adapter {name!r} must be finite, got NaN or infinity")
        return names

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Freeze routing to the hard choice at the configured depths and switch to the hard path."""
        names = check_adapters_to_merge(self, self.check_merge(adapter_names, safe_merge))
        if self.merged_adapters and names:
            raise MergeError(f"adapter {self.merged_adapters[0]!r} is merged already; call unmerge_adapter first")
        for name in names:
            router = self.topo_routers[name]
            assert isinstance(router, TopologyRouter)  # narrows the type
            router.forget_packing()
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Back to the unmerged path. No weight was changed, so this is exact."""
        self.merged_adapters.clear()


class MergedTopology(TopologyHost):
    """The hard topology of a model without PEFT wrapper; what `merge_and_unload` leaves behind."""

    def __init__(
        self, attention: nn.Module, geometry: Geometry, router: TopologyRouter, config: TopologyConfig
    ) -> None:
        super().__init__(attention, geometry)
        self.router = router.requires_grad_(False)
        self.topology_config = config

    def in_force(self) -> tuple[TopologyRouter, TopologyConfig, bool] | None:
        return self.router, self.topology_config, True


# ---------------------------------------------------------------------------------------------------------
# Installing the child


def install(attention: Any, host: TopologyHost) -> None:
    """Make `host` the child of `attention` and route its forwards."""
    setattr(attention, CHILD, host)
    routed = copy.copy(host.base_config)
    # the public setter would recurse into sub-configs that are shared with the rest of the model
    routed._attn_implementation_internal = IMPLEMENTATION
    attention.config = routed
    attention.register_forward_pre_hook(_route_forward, with_kwargs=True)


def uninstall(attention: nn.Module) -> None:
    """Undo `install`."""
    host = getattr(attention, CHILD)
    attention.config = host.base_config
    for key, hook in list(attention._forward_pre_hooks.items()):
        if hook is _route_forward:
            del attention._forward_pre_hooks[key]
            attention._forward_pre_hooks_with_kwargs.pop(key, None)
    delattr(attention, CHILD)


def hosts(model: nn.Module) -> list[TopologyHost]:
    """The topology children of a model, in layer order of its modules."""
    return [module for module in model.modules() if isinstance(module, TopologyHost)]


def active_layers(model: nn.Module) -> list[tuple[TopologyHost, TopologyConfig, bool]]:
    """The hosts whose adapter is in force, its config, and whether it is merged.

    Raises:
        UnsupportedModelError: there is none.
    """
    found = [(host, active[1], active[2]) for host in hosts(model) if (active := host.in_force()) is not None]
    if not found:
        raise UnsupportedModelError("model must have an active, enabled topology adapter; see get_peft_model")
    return found


# ---------------------------------------------------------------------------------------------------------
# Running it


def _route_forward(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    host = getattr(attention, CHILD)
    inputs = {**dict(zip(host.inputs, args, strict=False)), **kwargs}
    # None is said too: an attention function that hears nothing knows that the module lost its arguments
    return args, {**kwargs, "topology": host.prepare(inputs[host.inputs[0]], inputs)}


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every module's own again.

    Linear layers have no other numerics in training and keep their mode: on a CPU those of bitsandbytes repack their
    weights for good when they first run in evaluation mode, and pass no gradient from then on.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            if not isinstance(module, nn.Linear):
                module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def base_attention(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function the module would call without a topology."""
    host = getattr(attention, CHILD)
    return AttentionInterface().get_interface(host.base_config._attn_implementation, host.eager_attention)


def topology_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    topology: TopologyCall | Literal["lost"] | None = "lost",
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of a routed module (signature of transformers' attention interface).

    Args:
        query: `[B, H, T, D]`; key, value: `[B, H_kv, S, D]`, cached tokens included.
        topology: what the pre-hook prepared; None runs the base attention.

    Returns:
        `[B, T, H, D]`, contiguous as the base functions return it, and None (attention weights are not materialised).

    Raises:
        UnsupportedModelError: the module hands over anything that the topology does not model.
    """
    if isinstance(topology, str):
        raise UnsupportedModelError(
            f"{type(module).__name__} must pass its keyword arguments on to its attention function, got a call without "
            "the one that the topology added; leave the layer out with layers_to_transform."
        )
    base = base_attention(module)
    if topology is None:
        return base(module, query, key, value, attention_mask, **kwargs)
    host, config = topology.host, topology.config
    refuse_unmodelled(module, topology, query, key, attention_mask, kwargs)
    visibility = topology.visibility
    scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    scoring = Scoring(scale, kwargs.get("softcap"))

    if host.observer is None and topology.hard:
        return _hard_attention(topology, query, key, value, scoring).transpose(1, 2).contiguous(), None
    if host.observer is not None:
        if any(visibility.depths):
            out, weights = _bridged(topology, query, key, value, scoring, None)[0], None
        else:
            out, weights = base(module, query, key, value, attention_mask, **kwargs)
        host.observer(topology, query, key, value, out, scoring)
        return out, weights

    weights, plan, far_pairs = None, None, None
    if topology.training or host.distillation is not None:
        with torch.no_grad():
            plan = make_plan(visibility)
            host.metrics["density"] = (plan.visible_count() / plan.causal_count().clamp(min=1)).mean()
    if config.homotopy == 0 or host.distillation is not None:
        out, weights = base(module, query, key, value, attention_mask, **kwargs)
        if host.distillation is not None:
            _report_distillation(topology, query.detach(), key.detach(), scoring)
        elif topology.routes is not None and topology.routes.query.probs.requires_grad:
            # adds exactly zero to the base's output and the router's gradient to the backward pass
            detached = query.detach(), key.detach(), value.detach()
            extra, far_pairs = _bridged(topology, *detached, scoring, plan)
            out = out + (extra - extra.detach())
    else:
        out, far_pairs = _bridged(topology, query, key, value, scoring, plan)
    if topology.training and topology.routes is not None and far_pairs is not None:
        out = _with_auxiliary_loss(out, topology, far_pairs)
    return out, weights


def _hard_attention(call: TopologyCall, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """The hard topology, `[B, H, T, D]`: a few new tokens scan the cache, longer chunks sort it."""
    if serves_decode(query, key, value, call.visibility.keys.records):
        return decode_attention(query, key, value, call.visibility, scoring)
    plan = make_plan(call.visibility)
    if call.host.density_recorder is not None:
        call.host.density_recorder(call, plan)
    return hard_attention(query, key, value, plan, scoring)


def _bridged(
    call: TopologyCall, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, plan: Plan | None
) -> tuple[Tensor, Tensor]:
    """The unmerged topology's attention, `[B, T, H, D]`, and far pairs `[H]`, see `bridged_attention`.

    plan: of the same depths, if there is one already.
    """
    out, far_pairs = bridged_attention(
        query,
        key,
        value,
        call.routes,
        call.visibility,
        scoring,
        homotopy=call.config.homotopy,
        bridge=call.config.gradient_bridge if call.training else "full",  # evaluation takes the hard choice
        plan=plan,
    )
    return out.transpose(1, 2).contiguous(), far_pairs


def _report_distillation(call: TopologyCall, query: Tensor, key: Tensor, scoring: Scoring) -> None:
    distillation = call.host.distillation
    assert distillation is not None and call.routes is not None  # prepare() keeps the routes when distilling
    learning = torch.is_grad_enabled()
    with torch.enable_grad():
        loss = distillation_loss(
            query,
            key,
            call.routes,
            call.visibility,
            scoring,
            num_queries=distillation.num_queries,
            density_weight=distillation.density_weight,
        )
    active = call.host.in_force()
    assert active is not None  # or there would be no call
    distillation.losses.append(gradient_at_once(loss, list(active[0].parameters())) if learning else loss.detach())


def _with_auxiliary_loss(out: Tensor, call: TopologyCall, far_pairs: Tensor) -> Tensor:
    host, config, routes = call.host, call.config, call.routes
    assert routes is not None
    if not far_pairs.requires_grad:  # all heads are dense: the router owes the others a gradient, which is 0
        far_pairs = far_pairs + 0.0 * sum(role.probs.sum() for role in routes)
    loss = config.density_weight * far_pairs.mean() / call.visibility.query.causal_count().clamp(min=1)
    if config.balance_weight:
        balance = balance_loss(routes, call.visibility.query.real)
        host.metrics["balance"] = balance.detach()
        loss = loss + config.balance_weight * balance
    host.metrics["auxiliary_loss"] = loss.detach()
    return attach_loss(out, host.auxiliary_ramp * loss, host) if loss.requires_grad else out


AttentionInterface.register(IMPLEMENTATION, topology_attention_forward)
# Nothing asks for this mask today: the model keeps its own implementation, only single modules carry ours. If
# a user sets it for a whole model, masks must not silently become None, which would lose padding.
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
