"""Prefill of one layer: router, plan and attention beside dense attention, and each stage alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Inputs, label, prefill_inputs
from .dense import dense_calls
from .harness import Table, peak_mb, time_call, time_graph, time_in_turn
from .oracles import causal_count, sample_rows, sampled_error, visible_count
from .topology import attend, new_router, passes, plan_for, route, shared_plan


def dense_prefill(table: Table, inputs: Inputs) -> dict[str, float]:
    """Times dense attention at this length, once per run; `dense_ms` of the fastest, nothing if none ran."""
    case = inputs.case
    config = label(case.length)
    if not any(row["part"] == "dense" and row["config"] == config for row in table.rows):
        work = {
            "length": case.length,
            "batch": case.batch,
            "density": 1.0,
            "gflop": causal_count(case.batch, case.length) * case.layer.heads * 4 * case.layer.head_dim / 1e9,
            "megabytes": attention_megabytes(inputs),
        }
        for name, call in dense_calls(inputs.q, inputs.k, inputs.v).items():
            try:
                table.add("dense", config, name, time_call(call), work | {"peak_mb": peak_mb(call)})
            except Exception as problem:
                table.failed("dense", config, name, problem)
    return table.fastest("dense", config)


def attention_megabytes(inputs: Inputs) -> float:
    """Each of q, k, v read once, the output written once."""
    tensors = (inputs.q, inputs.q, inputs.k, inputs.v)
    return sum(x.numel() * x.element_size() for x in tensors) / 1e6


def prefill_work(inputs: Inputs, visible: float) -> dict[str, Any]:
    """The least work of router and attention: GFLOP and MB. Planning is not needed in principle and counts nothing."""
    case, layer = inputs.case, inputs.case.layer
    tokens = case.batch * case.length
    logits = 2 * case.routes * case.router_depth
    router = 2 * tokens * layer.router_dim * (layer.hidden + logits)
    addresses = 2 * 4 * case.routes * tokens
    return {
        "gflop": (visible * layer.heads / case.routes * 4 * layer.head_dim + router) / 1e9,
        "megabytes": attention_megabytes(inputs) + (inputs.hidden.numel() * 2 + addresses) / 1e6,
    }


@torch.no_grad()
def prefill(table: Table, part: str, case: Case, breakdown: bool = False) -> None:
    """The whole path of one configuration beside dense attention, and its stages if asked for."""
    shape = {"length": case.length, "batch": case.batch, "routes": case.routes, "balls": case.balls}
    try:
        inputs = prefill_inputs(case)
        against = dense_prefill(table, inputs)
        packed = new_router(case)
        query_ball, key_ball = inputs.query_address % case.balls, inputs.key_address % case.balls
        visible = visible_count(query_ball, key_ball, case.layer.window, case.layer.sinks).sum().item()
        density = visible / case.routes / causal_count(case.batch, case.length)

        def topology() -> Tensor:
            if case.balls > 1:  # a layer whose heads are all dense asks for no addresses
                route(inputs.hidden, packed)
            return attend(inputs, plan_for(inputs))

        if case.balls == 1:  # SDPA runs: its own time drifts more within a run than the two may differ
            dense = dense_calls(inputs.q, inputs.k, inputs.v)
            name = min(dense, key=lambda name: time_call(dense[name]).ms)
            timing, dense_timing = time_in_turn([topology, dense[name]], 600.0)
            config = f"{case.name}, {case.implementation}"
            table.add("beside", config, name, dense_timing, shape | {"routes": "", "density": 1.0})
            against = {"dense_ms": dense_timing.ms}
        else:
            timing = time_call(topology)
        rows = sample_rows(case.length).to(case.layer.device)
        error = sampled_error(topology(), inputs.q, inputs.k, inputs.v, query_ball, key_ball, rows, case.layer)
        values = shape | prefill_work(inputs, visible) | against | {"density": density, "error": error}
        values["peak_mb"] = peak_mb(topology)
        table.add(part, case.name, case.implementation, timing, values)
        if case.length <= 8192:  # launching takes longer than running; in a model the host is ahead, as in a graph
            table.add(part, f"{case.name}, CUDA graph", case.implementation, time_graph([topology]), values)
        if breakdown:
            plan = plan_for(inputs)
            stages: dict[str, Callable[[], object]] = {
                "router": lambda: route(inputs.hidden, packed),
                "plan": lambda: plan_for(inputs),
                "plan shared by all layers": lambda: shared_plan(inputs),
                **{name.replace("_", " "): call for name, call in passes(inputs, plan).items()},
            }
            for stage, stage_call in stages.items():
                table.add("breakdown", case.name, f"{stage}, {case.implementation}", time_call(stage_call), shape)
    except Exception as problem:
        table.failed(part, case.name, case.implementation, problem)
    torch.cuda.empty_cache()
