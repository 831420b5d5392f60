"""`why_not`: what keeps each layer of a model off the Triton kernels, in words."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import UnsupportedModelError
from .hf.gates import execution_device
from .layer import CHILD, TopologyHost
from .ops.backend import LIMITS, Operation, device_misfits, digit_logits, misfits


def why_not(model: nn.Module) -> dict[int, dict[Operation, list[str]]]:
    """Why the layers of a model would not run on kernels, for the settings that are in force now.

    An operation that would not run on them runs in torch, with the same result. `bridge` (training in force) is then in
    time `O(N^2)` in the length, on kernels too but far faster there.

    Args:
        model: a PeftModel with an active topology adapter, or a merged model.

    Returns:
        Layer index -> operation ('route', 'visits', 'plan', 'attend', 'decode', 'bridge', 'distil') -> reasons.
        Operations that would run on kernels are left out, and so are layers where all would: `{}` is the best answer.

    Raises:
        UnsupportedModelError: no layer of the model has an active topology.
    """
    found: dict[int, dict[Operation, list[str]]] = {}
    active = False
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1][:1]
    for module in model.modules():
        host: Any = getattr(module, CHILD, None)
        if not isinstance(host, TopologyHost) or (in_force := host.in_force()) is None:
            continue
        active = True
        config = in_force.config
        depths = [depth if depth <= config.depth else 1 for depth in host.depths(config)]
        leaves = {"bridge": config.arity ** max(depths), "distil": config.arity**config.depth}
        everywhere = device_misfits(execution_device(module), *dtypes)
        visits = max(config.visits_of_layer(host.geometry.layer, host.geometry.num_heads))
        on_heads = in_force.router.reads_heads
        of_heads: dict[str, Any] = {}
        if on_heads:
            of_heads = {
                "digit_logits": digit_logits(config.depth, config.arity),
                "channels": host.geometry.head_dim,
                "turns_pairs": host.rotation is None or host.rotation.pairs is not None,
            }
        for operation in LIMITS:
            if (in_force.merged and operation in leaves) or (operation == "visits" and visits == 1):
                continue  # nothing trains; nothing is chosen but addresses
            reasons = everywhere + misfits(
                operation,
                widths=(width := host.geometry.head_dim, getattr(module, "v_head_dim", None) or width),
                leaves=leaves.get(operation, 1),
                router_dim=getattr(in_force.router, "router_dim", 1),
                arity=config.arity,
                # routers on heads make the logits that several visits are chosen by
                visits=1 if operation == "route" and on_heads else visits,
                **of_heads,
                homotopy=config.homotopy,
            )
            if reasons:
                found.setdefault(host.geometry.layer, {})[operation] = reasons
    if not active:
        raise UnsupportedModelError("model must have an active, enabled topology adapter or a merged topology")
    return found
