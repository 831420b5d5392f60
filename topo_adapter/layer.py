"""The child module of an attention module: what a layer holds of its adapters, and which of them is in force."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from .config import TopologyConfig
from .core.passes import Passes
from .core.rule import Rule
from .errors import MergeError, UnsupportedModelError
from .hf.gates import Geometry, acting_arguments, eager_attention_of
from .hf.rotary import rotation_of
from .ops.head_router import HeadRouter
from .ops.router import Router, TopologyRouter

#: Name of the child module.
CHILD = "topo_adapter"


@dataclass
class Schedule:
    """Whether anything raises the homotopy of a model's adapters, or it was said that nothing does."""

    known: bool = False
    driver: Any = None  # the callback that does, while a trainer trains

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


class InForce(NamedTuple):
    """The router that a layer's forwards run, its adapter's configuration, and whether it is merged."""

    router: Router
    config: TopologyConfig
    merged: bool


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
        self.rotation = rotation_of(attention)
        # gradient of the auxiliary loss, set by the trainer, and factor on its weights, set by the callback
        self.auxiliary_scale: float | Tensor = 1.0
        self.auxiliary_ramp = 1.0
        self.metrics: dict[str, Tensor] = {}
        self.density_counts: Tensor | None = None  # of the last `recording_density`
        self.passes = Passes()
        self.schedule = Schedule()
        self.dense_until = 0  # of merged forwards
        self.unused: set[str] = set()  # adapters that were never loaded nor in force
        self._rules: dict[tuple[Any, ...], Rule] = {}

    def in_force(self) -> InForce | None:
        """None if the base is to run."""
        raise NotImplementedError

    def replaces_attention(self) -> bool:
        """Whether forwards run the topology in place of the base attention."""
        active = self.in_force()
        return active is not None and (active.merged or active.config.homotopy > 0)

    def depths(self, config: TopologyConfig) -> list[int]:
        """Visible depth of each query head."""
        return config.depths_of_layer(self.geometry.layer, self.geometry.num_heads, self.geometry.num_kv_heads)

    def always(self, config: TopologyConfig, merged: bool) -> tuple[int, int, int]:
        """Window, sinks, and the position below which queries see all before them: `Rule.always`."""
        return config.local_window, config.num_sink_tokens, self.dense_until if merged else 0

    def rule(self, config: TopologyConfig, routes: int, merged: bool) -> Rule:
        """What a configuration makes visible here.

        routes: of the router. merged: depths stay as they are for the forwards that follow, as in training they do not.
        """
        window, sinks, dense_until = self.always(config, merged)
        visits = tuple(config.visits_of_layer(self.geometry.layer, self.geometry.num_heads))
        tree = config.arity, config.depth, tuple(self.depths(config)), routes
        values = *tree, window, sinks, visits, dense_until
        known = self._rules.get(values)
        if known is None:
            known = Rule(*values)
            if merged:
                self._rules[values] = known
        return known


def _router_for(config: TopologyConfig, geometry: Geometry) -> Router:
    """A fresh router."""
    heads, kv_heads = geometry.num_heads, geometry.num_kv_heads
    if config.router_input == "heads":
        return HeadRouter(heads, kv_heads, geometry.head_dim, config.arity, config.depth, config.route_per)
    return TopologyRouter(
        geometry.hidden_size,
        heads if config.route_per == "query_head" else kv_heads,
        config.arity,
        config.depth,
        config.router_dim,
        config.tie_query_key,
        config.init_weights,
    )


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
        router = _router_for(config, self.geometry)
        # under PEFT's low_cpu_mem_usage the parameters are created on meta and stay there until loaded
        on_meta = next(router.parameters()).is_meta
        self.topo_routers[adapter_name] = router if on_meta else router.to(device)
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

    def in_force(self) -> InForce | None:
        names = self.merged_adapters or [name for name in self._active() if name in self.topo_routers]
        if self.disable_adapters or not names:
            return None
        if len(names) > 1:
            raise MergeError(f"one topology adapter can be active at a time, got {names}; call set_adapter with one")
        self.unused.discard(names[0])
        router = self.topo_routers[names[0]]
        assert isinstance(router, Router)  # narrows the type; a ModuleDict holds plain Modules
        return InForce(router, self.topo_configs[names[0]], bool(self.merged_adapters))

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
            assert isinstance(router, Router)  # narrows the type
            router.forget_packing()
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Back to the unmerged path. No weight was changed, so this is exact."""
        self.merged_adapters.clear()
        self.dense_until = 0


class MergedTopology(TopologyHost):
    """The hard topology of a model without PEFT wrapper; what `merge_and_unload` leaves behind."""

    def __init__(
        self, attention: nn.Module, geometry: Geometry, router: Router, config: TopologyConfig, dense_until: int
    ) -> None:
        super().__init__(attention, geometry)
        self.router = router.requires_grad_(False)
        self.topology_config = config
        self.dense_until = dense_until

    def in_force(self) -> InForce | None:
        return InForce(self.router, self.topology_config, True)


def hosts(model: nn.Module) -> list[TopologyHost]:
    """The topology children of a model, in layer order of its modules."""
    return [module for module in model.modules() if isinstance(module, TopologyHost)]


def active_layers(model: nn.Module) -> list[tuple[TopologyHost, TopologyConfig, bool]]:
    """The hosts whose adapter is in force, its config, and whether it is merged.

    Raises:
        UnsupportedModelError: there is none.
    """
    found = [(host, active.config, active.merged) for host in hosts(model) if (active := host.in_force()) is not None]
    if not found:
        raise UnsupportedModelError("model must have an active, enabled topology adapter; see get_peft_model")
    return found


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
