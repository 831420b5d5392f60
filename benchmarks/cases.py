"""What is measured: the shape of a layer, configurations of it, and random inputs of these."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from topo_adapter.core.layout import SequenceLayout, contiguous_layout
from topo_adapter.core.records import Records, pack_records
from topo_adapter.core.rule import Rule

MAX_LEAVES = 4096
DECODE_LEAVES = 256  # of the default depth, one byte per key and route


@dataclass(frozen=True)
class Layer:
    """The shape of one attention layer and of its topology; as it stands, of an 8B Llama on a GPU."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 4096
    router_dim: int = 32
    window: int = 128
    sinks: int = 4
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class Case:
    """One configuration. `skewed`: one ball holds half of the queries and half of the keys."""

    name: str
    length: int
    balls: int
    routes: int
    batch: int = 1
    skewed: bool = False
    layer: Layer = Layer()

    @property
    def implementation(self) -> str:
        return "topology per query head" if self.routes == self.layer.heads else "topology per KV head"

    @property
    def router_depth(self) -> int:
        """The default depth of an adapter, more where more balls are asked for."""
        return max(8, (self.balls - 1).bit_length())


@dataclass
class Inputs:
    """Random inputs of a prefill: q as a model's projection leaves it, k and v as its cache does."""

    case: Case
    hidden: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    query_address: Tensor
    key_address: Tensor
    layout: SequenceLayout
    rule: Rule


def random_addresses(
    batch: int,
    routes: int,
    length: int,
    balls: int,
    skewed: bool = False,
    device: str = "cpu",
    leaves: int = MAX_LEAVES,
) -> Tensor:
    """int32 `[batch, routes, length]` in `[0, leaves)`; balls (addresses modulo `balls`) are equally likely, or
    ball 0 holds half of all tokens if `skewed`."""
    shape = (batch, routes, length)
    ball = torch.randint(0, balls, shape, device=device)
    if skewed:
        others = torch.randint(min(1, balls - 1), balls, shape, device=device)
        ball = torch.where(torch.rand(shape, device=device) < 0.5, 0, others)
    finer = torch.randint(0, leaves // balls, shape, device=device)
    return (ball + balls * finer).int()


def prefill_inputs(case: Case) -> Inputs:
    layer = case.layer

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=layer.device, dtype=layer.dtype)

    def addresses() -> Tensor:
        return random_addresses(case.batch, case.routes, case.length, case.balls, case.skewed, layer.device)

    batch, length = case.batch, case.length
    return Inputs(
        case,
        hidden=normal(batch, length, layer.hidden),
        q=normal(batch, length, layer.heads, layer.head_dim).transpose(1, 2),
        k=normal(batch, layer.kv_heads, length, layer.head_dim),
        v=normal(batch, layer.kv_heads, length, layer.head_dim),
        query_address=addresses(),
        key_address=addresses(),
        rule=Rule(case.balls, 1, (1,) * layer.heads, case.routes, layer.window, layer.sinks),  # a tree of one level
        layout=contiguous_layout(batch, length, layer.device),
    )


def decode_records(case: Case) -> Records:
    """What a cache holds of as many tokens, one document in each row."""
    device = case.layer.device
    address = random_addresses(case.batch, case.routes, case.length, case.balls, device=device, leaves=DECODE_LEAVES)
    return pack_records(address, contiguous_layout(case.batch, case.length, device), DECODE_LEAVES)


def prefill_cases(layer: Layer = Layer()) -> list[Case]:
    """The rows of the table of targets."""
    sizes = ((8192, 64), (32768, 128), (131072, 256), (32768, 16))
    named = [
        Case(f"prefill {label(length)}, {balls} balls", length, balls, layer.heads, layer=layer)
        for length, balls in sizes
    ]
    named.append(Case("prefill 32k, one ball holds half", 32768, 128, layer.heads, skewed=True, layer=layer))
    named.append(Case("prefill 32k, all heads dense", 32768, 1, layer.heads, layer=layer))
    return both_routes(named)


def decode_cases(layer: Layer = Layer()) -> list[Case]:
    """Random balls, 20 and 10 of them: 5 % and 10 % of the keys."""
    named = (
        Case("decode 128k, batch 1, 5 %", 131072, 20, layer.heads, layer=layer),
        Case("decode 32k, batch 16, 10 %", 32768, 10, layer.heads, batch=16, layer=layer),
        Case("decode 32k, batch 1, 10 %", 32768, 10, layer.heads, layer=layer),
    )
    return both_routes(named)


def density_cases(length: int = 32768, layer: Layer = Layer()) -> list[Case]:
    cases = [
        Case(f"density {label(length)}, {2**depth} balls", length, 2**depth, layer.heads, layer=layer)
        for depth in range(10)
    ]
    return both_routes(cases)


def growth_cases(layer: Layer = Layer()) -> list[Case]:
    """One level more per doubling: balls of 512 tokens."""
    lengths = [8192 * 2**i for i in range(6)]
    cases = [Case(f"growth {label(n)}, {n // 512} balls", n, n // 512, layer.heads, layer=layer) for n in lengths]
    return both_routes(cases)


def label(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def both_routes(cases: Iterable[Case]) -> list[Case]:
    """Each with a route per query head and with one per KV head."""
    return [replace(case, routes=routes) for case in cases for routes in (case.layer.heads, case.layer.kv_heads)]
