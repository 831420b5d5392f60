"""Decoding of one layer: router, record and attention of one token, in a CUDA graph over several caches in turn.

Several key-value caches, so that none of them stays in L2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from topo_adapter.core.layout import SequenceLayout
from topo_adapter.core.records import Records

from .cases import Case, decode_records, random_addresses
from .dense import dense_calls
from .harness import Table, peak_mb, time_graph
from .oracles import decode_visible, sampled_error
from .topology import decode, new_router, route


@torch.no_grad()
def decode_step(table: Table, case: Case) -> None:
    """One token: router, record and attention, in a CUDA graph over several caches in turn."""
    shape: dict[str, Any] = {"length": case.length, "batch": case.batch, "routes": case.routes, "balls": case.balls}
    name, layer = case.implementation, case.layer
    try:
        per_set = 2 * 2 * case.batch * layer.kv_heads * case.length * layer.head_dim
        sets = []
        for _ in range(max(2, min(8, 2**33 // per_set))):  # at most 8.6 GB, each visited once per round
            k, v = (
                torch.randn(
                    case.batch, layer.kv_heads, case.length, layer.head_dim, device=layer.device, dtype=layer.dtype
                )
                for _ in range(2)
            )
            q = torch.randn(
                case.batch, 1, layer.heads, layer.head_dim, device=layer.device, dtype=layer.dtype
            ).transpose(1, 2)
            address = random_addresses(case.batch, case.routes, 1, case.balls, device=layer.device)
            hidden = torch.randn(case.batch, 1, layer.hidden, device=layer.device, dtype=layer.dtype)
            records = decode_records(case)
            sets.append((hidden, q, k, v, address, records.layout.last(1), records))
        if not table.fastest("decode", case.name):
            arms: dict[str, list[Callable[[], Tensor]]] = {}
            for _, q, k, v, *_ in sets:
                for arm, call in dense_calls(q, k, v).items():
                    arms.setdefault(arm, []).append(call)
            pairs = case.batch * layer.heads * case.length
            work = {"density": 1.0, "megabytes": per_set / 1e6, "gflop": 4 * pairs * layer.head_dim / 1e9}
            for arm, calls in arms.items():
                try:
                    table.add("decode", case.name, arm, time_graph(calls), shape | work | {"routes": ""})
                except Exception as problem:
                    table.failed("decode", case.name, arm, problem)

        packed = new_router(case)
        balls = torch.full((case.routes,), case.balls, dtype=torch.int32, device=layer.device)

        def step(
            hidden: Tensor,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            address: Tensor,
            query: SequenceLayout,  # the same in all layers
            records: Records,
        ) -> Tensor:
            _, key_address = route(hidden, packed)
            records.address[:, -1] = key_address[..., 0]  # the newest key is in the window, whatever its ball
            return decode(q, k, v, address, query, records, balls, layer)

        _, q, k, v, address, _, records = sets[0]
        key_ball = records.address.transpose(1, 2) % case.balls
        rows = torch.zeros(1, dtype=torch.long, device=layer.device)
        out = step(*sets[0])
        error = sampled_error(out, q, k, v, address % case.balls, key_ball, rows, layer)
        seen, loaded = decode_visible(address, records.address, case.balls, layer)
        bytes_needed = loaded.sum().item() * (layer.kv_heads // loaded.shape[1]) * 2 * layer.head_dim * 2
        values = shape | {
            "density": seen.double().mean().item(),
            "gflop": seen.sum().item() * layer.heads / case.routes * 4 * layer.head_dim / 1e9,
            "megabytes": (bytes_needed + 2 * layer.router_dim * layer.hidden) / 1e6,
            "error": error,
            "peak_mb": peak_mb(lambda: step(*sets[0])),
        }
        del seen, loaded
        timing = time_graph([functools.partial(step, *x) for x in sets])
        table.add("decode", case.name, name, timing, values | table.fastest("decode", case.name))
        timing = time_graph([functools.partial(decode, *x[1:], balls, layer) for x in sets])
        table.add("breakdown", case.name, f"attention, {name}", timing, shape)
        timing = time_graph([functools.partial(route, x[0], packed) for x in sets])
        table.add("breakdown", case.name, f"router, {name}", timing, shape)
    except Exception as problem:
        table.failed("decode", case.name, name, problem)
    torch.cuda.empty_cache()
