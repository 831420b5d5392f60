"""The routers that a trainer trains: their configurations, precision, first values and metrics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config import TopologyConfig
from ..core.passes import Pass, during
from ..errors import TopologyConfigError
from ..forward import Attention
from ..layer import active_layers, evaluating, hosts
from ..ops.router import Router


def active_configs(model: nn.Module) -> list[TopologyConfig]:
    """The configurations in force in a model, each once.

    Raises:
        UnsupportedModelError: the model has no active topology adapter.
    """
    return list({id(config): config for _, config, _ in active_layers(model)}.values())


def round_routers(model: nn.Module, dtype: torch.dtype, only_8_bit: bool = False) -> None:
    """`Router.round_to` for the routers in force, all of them or those with 8-bit weights."""
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
    """Temperature, homotopy and the layers' mean density, balance and auxiliary loss at the last step.

    Nothing where no topology is in force, as in an evaluation within `disable_adapter()`.
    """
    config = next((active.config for host in hosts(model) if (active := host.in_force()) is not None), None)
    if config is None:
        return {}
    values: dict[str, list[Tensor]] = {}
    for host in hosts(model):
        for name, value in host.metrics.items():
            values.setdefault(name, []).append(value.float().cpu())
    metrics = {f"topology/{name}": torch.stack(v).mean().item() for name, v in sorted(values.items())}
    return {"topology/temperature": config.temperature, "topology/homotopy": config.homotopy, **metrics}


@torch.no_grad()
def initialize_routers(model: nn.Module, input_ids: Tensor) -> None:
    """Data-dependent initialisation: spread the tokens of a text over the tree, in every routed layer.

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
    with during(model, _Initialise()), evaluating(model):
        model(input_ids=input_ids, use_cache=False)


class _Initialise(Pass):
    """Spreads what each router reads over its tree."""

    needs_addresses = True  # also at homotopy 0

    def entered(self, router: Router, seen: Callable[[], tuple[Tensor, ...]], scale: float) -> None:
        router.initialise(*seen(), scale=scale)

    def attend(self, attention: Attention) -> tuple[Tensor, Tensor | None]:
        return attention.base()
