"""All that the benchmarks of one layer need of the library.

Kernels are imported late: a part whose kernel is missing fails alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from topo_adapter.core.layout import SequenceLayout, contiguous_layout
from topo_adapter.core.records import Keys, Records
from topo_adapter.core.rule import Rule
from topo_adapter.core.scoring import Scoring
from topo_adapter.core.visibility import Visibility
from topo_adapter.ops.attention import hard_attention
from topo_adapter.ops.objective import distillation_loss
from topo_adapter.ops.plan import local_plan, make_plan
from topo_adapter.ops.router import Routes, TopologyRouter, relax

from .cases import Case, Inputs, Layer


def pack(router: TopologyRouter, dtype: torch.dtype) -> Any:
    from topo_kernels.router import pack_router

    assert router.key is not None  # untied
    return pack_router(
        router.down.weight,
        router.query.weight,
        router.query.bias,
        router.key.weight,
        router.key.bias,
        num_routes=router.num_heads,
        depth=router.depth,
        arity=router.arity,
        dtype=dtype,
    )


def new_router(case: Case) -> Any:
    """A packed router with random weights."""
    layer = case.layer
    router = TopologyRouter(layer.hidden, case.routes, 2, case.router_depth, layer.router_dim)
    return pack(router.to(layer.device), layer.dtype)


def route(hidden: Tensor, packed: Any) -> tuple[Tensor, Tensor]:
    from topo_kernels.router import route_addresses

    return route_addresses(hidden, packed)


def plan_for(inputs: Inputs) -> Any:
    """The plan of one layer. Windows are the same in all layers of a forward, which share the layout: made once."""
    keys = Keys(inputs.key_address, inputs.layout)
    return make_plan(Visibility(inputs.query_address[:, :, None], inputs.layout, keys, inputs.rule))


def shared_plan(inputs: Inputs) -> Any:
    """What is made once per forward: the layout and its windows."""
    layer = inputs.case.layer
    layout = contiguous_layout(inputs.case.batch, inputs.case.length, inputs.q.device)
    return local_plan(layout, layout, layer.window, layer.sinks)


def attend(inputs: Inputs, plan: Any) -> Tensor:
    return hard_attention(inputs.q, inputs.k, inputs.v, plan, Scoring(inputs.case.layer.scale))


def passes(inputs: Inputs, plan: Any) -> dict[str, Callable[[], Any]]:
    """The two kernels of `attend`, each alone, on the arguments it gets there.

    `local_pass` returns `[B, T, H, D]` and log-sum-exp, of window and sinks; `tree_pass` merges the balls into these.
    """
    from topo_kernels import attention as kernels

    calls: dict[str, Callable[[], Any]] = {}
    for name in ("local_pass", "tree_pass"):
        kernel = getattr(kernels, name)
        with mock.patch.object(kernels, name, wraps=kernel) as recorder:
            attend(inputs, plan)
        calls[name] = functools.partial(kernel, *recorder.call_args.args, **recorder.call_args.kwargs)
    return calls


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_address: Tensor,
    query: SequenceLayout,
    records: Records,
    balls: Tensor,
    layer: Layer,
) -> Tensor:
    from topo_kernels.decode import decode_attention

    return decode_attention(
        *(q, k, v, query_address[:, :, None], query.position, query.document),
        *(records.address, records.position, records.document, balls, Scoring(layer.scale)),
        local_window=layer.window,
        num_sink_tokens=layer.sinks,
    )


def far_passes(
    q: Tensor, k: Tensor, layer: Layer
) -> tuple[Callable[[Tensor], Any], Callable[[Tensor, Tensor], Tensor]]:
    """The two attention kernels of the distillation alone, for all queries.

    The first takes the keys' leaf distributions, the second log-sum-exp and a gradient of the values.
    """
    from topo_kernels import distill as kernels

    layout = contiguous_layout(q.shape[0], q.shape[2], q.device)
    local = local_plan(layout, layout, layer.window, layer.sinks)
    plan = kernels.LocalTensors(local.order, local.document_start, local.start, local.end, layer.sinks)
    options = plan, Scoring(layer.scale)

    def forward(key_leaves: Tensor) -> Any:
        return kernels.far_values(q, k, key_leaves.to(kernels.leaf_dtype(q.dtype)), *options)

    def backward(lse: Tensor, dvalues: Tensor) -> Tensor:
        return kernels.far_gradient(q, k, lse, dvalues.to(kernels.gradient_dtype(q.dtype)), *options)

    return forward, backward


def distillation_step(q: Tensor, k: Tensor, query_logits: Tensor, key_logits: Tensor, layer: Layer) -> Tensor:
    """The loss of one layer on all its queries, from digit logits `[B, H, N, L, 2]` with a gradient."""
    routes = Routes(relax(query_logits, 1.0, False), relax(key_logits, 1.0, False))
    layout = contiguous_layout(q.shape[0], q.shape[2], q.device)
    nowhere = torch.zeros(q.shape[0], q.shape[1], 1, q.shape[2], device=q.device)  # the loss asks for no address
    rule = Rule(2, query_logits.shape[-2], (0,) * q.shape[1], q.shape[1], layer.window, layer.sinks)
    visibility = Visibility(nowhere, layout, Keys(nowhere[:, :, 0], layout), rule)
    return distillation_loss(q, k, routes, visibility, Scoring(layer.scale), num_queries=q.shape[2])
