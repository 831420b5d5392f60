"""Times the topology's kernels beside dense attention on the GPU at hand; appends to a CSV row by row.

    python kernels/benchmarks/measure.py --output kernels/benchmarks/results/h100.csv
    python kernels/benchmarks/measure.py --only prefill decode --lengths 8192 32768

Shapes are one layer of an 8B Llama: 32 query and 8 KV heads of 128, hidden size 4096, bf16. `topology` rows hold the
whole path of a layer: router, plan, attention (what all layers of a forward share is timed apart). The router runs on
random hidden states; the plan then takes addresses drawn with the balance asked for (a router's work does not depend on
what it chooses), so that density is what the row says. Query and key addresses are drawn independently. Every
configuration is checked in the same run against float64 on sampled queries (column `error`, relative; the run fails
above 1e-2).

Device time by CUDA events, median of many repeats, L2 flushed before each; a short sleep on the device before each lets
the host queue everything first, as in a model whose queue is full. `host_ms` is what the queueing itself takes. Decode
is timed in a CUDA graph over several key-value caches in turn, so that none of them stays in L2.

`floor_ms` is the larger of two times: the bytes that must move (each input once, output once; for decode only visible
keys, not the addresses) over the copy bandwidth, and the FLOPs of visible pairs and of the router over the bf16 matrix
rate, both ceilings measured in the same run. `gap` is time over floor. `speedup` is against the fastest dense
attention of the same run and shape. Draw plots and the README's table with plot.py.
"""

from __future__ import annotations

import csv
import datetime
import functools
import importlib
import importlib.util
import math
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import HfArgumentParser

from topo_adapter.cache import Records, pack_records
from topo_adapter.layout import SequenceLayout, contiguous_layout
from topo_adapter.router import TopologyRouter
from topo_adapter.scoring import Scoring

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 32, 8, 128, 4096
ROUTER_DIM = 32
WINDOW, SINKS = 128, 4
SCALE = HEAD_DIM**-0.5
DTYPE, DEVICE = torch.bfloat16, "cuda"
MAX_LEAVES = 4096
FLEX_BLOCK = 128
DECODE_LEAVES = 256  # of the default depth, one byte per key and route
LEAVES = 128  # of the distillation step: all depths up to 7
MAX_ERROR = 1e-2

COLUMNS = (
    *("part", "config", "implementation", "length", "batch", "routes", "balls", "density"),
    *("ms", "ms_p20", "ms_p80", "repeats", "host_ms", "speedup", "floor_ms", "gap", "gflop", "megabytes"),
    *("peak_mb", "error", "tokens_per_s", "note", "gpu", "torch", "triton", "commit", "date"),
)
PARTS = ("prefill", "decode", "distill", "breakdown", "density", "growth", "window", "flex")


# ------------------------------------------------------------------------------------------------ what is measured
# All that the benchmarks need of the kernels. Imported late: a part whose kernel is missing fails alone.


def pack(router: TopologyRouter, dtype: torch.dtype = DTYPE) -> Any:
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


def route(hidden: Tensor, packed: Any) -> tuple[Tensor, Tensor]:
    from topo_kernels.router import route_addresses

    return route_addresses(hidden, packed)


def plan_for(inputs: Inputs) -> Any:
    """The plan of one layer. Windows are the same in all layers of a forward, which share the layout: made once."""
    from topo_adapter.plan import make_plan

    layout = inputs.layout
    addresses = inputs.query_address, inputs.key_address
    return make_plan(*addresses, inputs.balls, inputs.case.balls, layout, layout, WINDOW, SINKS)


def shared_plan(inputs: Inputs) -> Any:
    """What is made once per forward: the layout and its windows."""
    from topo_adapter.plan import local_plan

    layout = contiguous_layout(inputs.case.batch, inputs.case.length, inputs.q.device)
    return local_plan(layout, layout, WINDOW, SINKS)


def attend(inputs: Inputs, plan: Any) -> Tensor:
    from topo_adapter.attention import hard_attention

    return hard_attention(inputs.q, inputs.k, inputs.v, plan, SCALE)


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
    q: Tensor, k: Tensor, v: Tensor, query_address: Tensor, query: SequenceLayout, records: Records, balls: Tensor
) -> Tensor:
    from topo_kernels.decode import decode_attention

    return decode_attention(
        *(q, k, v, query_address, query.position, query.document),
        *(records.address, records.position, records.document, balls, Scoring(SCALE)),
        local_window=WINDOW,
        num_sink_tokens=SINKS,
    )


def far_passes(q: Tensor, k: Tensor) -> tuple[Callable[[Tensor], Any], Callable[[Tensor, Tensor], Tensor]]:
    """The two attention kernels of the distillation alone, for all queries.

    The first takes the keys' leaf distributions, the second log-sum-exp and a gradient of the values.
    """
    from topo_adapter.plan import local_plan
    from topo_kernels import distill as kernels

    layout = contiguous_layout(q.shape[0], q.shape[2], q.device)
    local = local_plan(layout, layout, WINDOW, SINKS)
    plan = kernels.LocalTensors(local.order, local.document_start, local.start, local.end, SINKS)
    options = plan, Scoring(SCALE)

    def forward(key_leaves: Tensor) -> Any:
        return kernels.far_values(q, k, key_leaves.to(kernels.leaf_dtype(q.dtype)), *options)

    def backward(lse: Tensor, dvalues: Tensor) -> Tensor:
        return kernels.far_gradient(q, k, lse, dvalues.to(kernels.gradient_dtype(q.dtype)), *options)

    return forward, backward


def distillation_step(q: Tensor, k: Tensor, query_logits: Tensor, key_logits: Tensor) -> Tensor:
    """The loss of one layer on all its queries, from digit logits `[B, H, N, L, 2]` with a gradient."""
    from topo_adapter.objective import distillation_loss
    from topo_adapter.router import Routes, relax

    routes = Routes(relax(query_logits, 1.0, False), relax(key_logits, 1.0, False))
    layout = contiguous_layout(q.shape[0], q.shape[2], q.device)
    length = q.shape[2]
    return distillation_loss(
        q, k, routes, layout, local_window=WINDOW, num_sink_tokens=SINKS, scale=SCALE, num_queries=length
    )


# ------------------------------------------------------------------------------------------------ inputs and oracles


@dataclass(frozen=True)
class Case:
    """One configuration. `skewed`: one ball holds half of the queries and half of the keys."""

    name: str
    length: int
    balls: int
    routes: int = HEADS
    batch: int = 1
    skewed: bool = False


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
    balls: Tensor
    layout: SequenceLayout


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


def prefill_inputs(case: Case, device: str = DEVICE, dtype: torch.dtype = DTYPE) -> Inputs:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def addresses() -> Tensor:
        return random_addresses(case.batch, case.routes, case.length, case.balls, case.skewed, device)

    batch, length = case.batch, case.length
    return Inputs(
        case,
        hidden=normal(batch, length, HIDDEN),
        q=normal(batch, length, HEADS, HEAD_DIM).transpose(1, 2),
        k=normal(batch, KV_HEADS, length, HEAD_DIM),
        v=normal(batch, KV_HEADS, length, HEAD_DIM),
        query_address=addresses(),
        key_address=addresses(),
        balls=torch.full((case.routes,), case.balls, dtype=torch.int32, device=device),
        layout=contiguous_layout(batch, length, device),
    )


def visible_count(query_ball: Tensor, key_ball: Tensor, window: int, sinks: int) -> Tensor:
    """Visible pairs (docs/method.md, section 2) of unpadded rows `[B, R, N]`: float64 `[R]`; counted without a plan."""
    length = query_ball.shape[-1]
    position = torch.arange(length, device=query_ball.device)
    rank = key_ball.long() * length + position
    rank[..., :sinks] = torch.iinfo(torch.int64).max
    rank = rank.sort(-1).values
    first = query_ball.long() * length
    reach = first + (position - window + 1).clamp(min=0)
    tree = torch.searchsorted(rank, reach) - torch.searchsorted(rank, first)
    always = (position + 1).clamp(max=window) + (position + 1 - window).clamp(0, sinks)
    return tree.clamp(min=0).sum((0, 2), dtype=torch.float64) + query_ball.shape[0] * always.sum().double()


def causal_count(batch: int, length: int) -> float:
    return batch * length * (length + 1) / 2


def sampled_error(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, query_ball: Tensor, key_ball: Tensor, rows: Tensor
) -> float:
    """`‖out - ref‖ / ‖ref‖` over the sampled queries, with a float64 reference of these rows alone.

    Args:
        out, q: `[B, H, T, D]`; k, v: `[B, H_kv, S, D]`. Query `i` has position `S - T + i`.
        query_ball, key_ball: `[B, R, T]`, `[B, R, S]`. rows: int64 `[M]`, indices of queries.
    """
    heads, length = q.shape[1], k.shape[2]
    per_route, per_kv = heads // query_ball.shape[1], heads // k.shape[1]
    gap = (rows + length - q.shape[2])[:, None] - torch.arange(length, device=q.device)
    always = (gap < WINDOW) | (torch.arange(length, device=q.device) < SINKS)
    difference, norm = 0.0, 0.0
    for b in range(q.shape[0]):
        for h in range(heads):
            ball = query_ball[b, h // per_route, rows, None] == key_ball[b, h // per_route]
            scores = q[b, h, rows].double() @ k[b, h // per_kv].double().T * SCALE
            probs = scores.masked_fill(~((ball | always) & (gap >= 0)), -math.inf).softmax(-1)
            ref = probs @ v[b, h // per_kv].double()
            difference += (out[b, h, rows].double() - ref).square().sum().item()
            norm += ref.square().sum().item()
    return math.sqrt(difference / norm)


def far_error(values: Tensor, q: Tensor, k: Tensor, key_leaves: Tensor, rows: Tensor) -> float:
    """`sampled_error` of the distillation's values: dense causal attention without the values of window and sinks."""
    heads, length = q.shape[1], q.shape[2]
    position = torch.arange(length, device=q.device)
    gap = rows[:, None] - position
    difference, norm = 0.0, 0.0
    for h in range(heads):
        scores = q[0, h, rows].double() @ k[0, h // (heads // k.shape[1])].double().T * SCALE
        probs = scores.masked_fill(gap < 0, -math.inf).softmax(-1)
        ref = probs.masked_fill((gap < WINDOW) | (position < SINKS), 0.0) @ key_leaves[0, h].double()
        difference += (values[0, h, rows].double() - ref).square().sum().item()
        norm += ref.square().sum().item()
    return math.sqrt(difference / norm)


def sample_rows(length: int, count: int = 32) -> Tensor:
    """The first and the last query and some between."""
    return torch.cat([torch.tensor([0, length - 1]), torch.randint(0, length, (count,))])


# ------------------------------------------------------------------------------------------------ timing


class Timing(NamedTuple):
    ms: float
    p20: float
    p80: float
    repeats: int
    host_ms: float = math.nan


def summary(times: Sequence[float], host: Sequence[float] = ()) -> Timing:
    ordered = sorted(times)
    last = len(ordered) - 1
    p20, p80 = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    return Timing(statistics.median(times), p20, p80, len(times), statistics.median(host) if host else math.nan)


def time_call(call: Callable[[], object], budget_ms: float = 150.0) -> Timing:
    """Device time of a call; the first call (compilation) is not counted."""
    return time_in_turn([call], budget_ms)[0]


def time_in_turn(calls: Sequence[Callable[[], object]], budget_ms: float = 150.0) -> list[Timing]:
    """Device time of each call, one after the other and again, so that a drift of the clock meets all alike."""
    estimate = 0.0
    for call in calls:
        call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        estimate = max(estimate, (time.perf_counter() - begin) * 1e3)
    repeats = int(min(100, max(3, budget_ms / estimate)))
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=DEVICE)
    events = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)] for _ in calls]
    host: list[list[float]] = [[] for _ in calls]
    for i in range(repeats):
        for call, pairs, spent in zip(calls, events, host, strict=True):
            start, end = pairs[i]
            flush.zero_()
            torch.cuda._sleep(1_000_000)  # about 0.6 ms in which the host gets ahead
            begin = time.perf_counter()
            start.record()
            call()
            end.record()
            spent.append((time.perf_counter() - begin) * 1e3)
            if estimate > 5:
                torch.cuda.synchronize()
    torch.cuda.synchronize()
    return [
        summary([start.elapsed_time(end) for start, end in pairs], spent)
        for pairs, spent in zip(events, host, strict=True)
    ]


def time_graph(calls: Sequence[Callable[[], object]], repeats: int = 20) -> Timing:
    """Time of one call in a CUDA graph that makes all of them, in turn and several times."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    rounds = max(1, 32 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / (rounds * len(calls)))
    return summary(times[1:])


def peak_mb(call: Callable[[], object]) -> float:
    """Device memory a call needs beyond its inputs, output included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


# ------------------------------------------------------------------------------------------------ the table


def environment(commit: str = "") -> dict[str, str]:
    """What a row must say about where it comes from."""
    if not commit and shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": version("triton") if importlib.util.find_spec("triton") else "none",
        "commit": commit or "unknown",
        "date": datetime.date.today().isoformat(),
    }


class Table:
    """Rows go to the CSV and to the screen at once, so that a run cut short loses nothing."""

    def __init__(self, path: Path, commit: str = "") -> None:
        self.path, self.environment = path, environment(commit)
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.bandwidth, self.rate = math.nan, math.nan  # bytes/s, FLOP/s
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.stat().st_size == 0:
            path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")

    def add(self, part: str, config: str, implementation: str, timing: Timing | None, values: dict[str, Any]) -> None:
        """Add a row of more `values`: columns, and `dense_ms`, which speedup is computed against.

        `gflop` and `megabytes`, the least possible work, give floor and gap.
        """
        dense_ms = values.get("dense_ms")
        row: dict[str, Any] = {"part": part, "config": config, "implementation": implementation}
        if timing is not None:
            row |= {"ms": timing.ms, "ms_p20": timing.p20, "ms_p80": timing.p80, "repeats": timing.repeats}
            if not math.isnan(timing.host_ms):
                row["host_ms"] = timing.host_ms
            floor = 1e3 * max(
                values.get("megabytes", 0) * 1e6 / self.bandwidth, values.get("gflop", 0) * 1e9 / self.rate
            )
            if floor > 0:
                row |= {"floor_ms": floor, "gap": timing.ms / floor}
            if dense_ms is not None:
                row["speedup"] = dense_ms / timing.ms
        row |= {name: value for name, value in values.items() if name != "dense_ms"} | self.environment
        if not row.get("error", 0.0) <= MAX_ERROR:  # NaN fails too
            self.failures.append(f"{part} {config} {implementation}: error {row['error']}")
        self.rows.append(row)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerow({key: compact(value) for key, value in row.items()})
        print(line(row), flush=True)

    def failed(self, part: str, config: str, implementation: str, error: Exception) -> None:
        message = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
        self.failures.append(f"{part} {config} {implementation}: {message}")
        self.add(part, config, implementation, None, {"note": f"failed: {message}"})
        traceback.print_exc(limit=4)

    def measured(self, part: str, config: str) -> list[dict[str, Any]]:
        return [r for r in self.rows if r["part"] == part and r["config"] == config and "ms" in r]

    def fastest(self, part: str, config: str) -> dict[str, float]:
        """`dense_ms` of the fastest dense implementation of a configuration; empty if none ran."""
        times = [row["ms"] for row in self.measured(part, config) if "topology" not in row["implementation"]]
        return {"dense_ms": min(times)} if times else {}


def compact(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def line(row: dict[str, Any]) -> str:
    """One row on the screen."""
    cells = [f"{row['part']:9} {row['config']:30} {row['implementation']:24}"]
    for name, unit in (("ms", " ms"), ("speedup", "x"), ("gap", " of floor"), ("density", " dense"), ("error", " err")):
        cells.append(f"{row[name]:8.3g}{unit}" if name in row else " " * (8 + len(unit)))
    return " ".join(cells) + f" {row.get('note', '')}"


# ------------------------------------------------------------------------------------------------ parts


def ceilings(table: Table) -> None:
    """The two rates that floors are computed from, on random data."""
    source = torch.randn(2**30, device=DEVICE).to(DTYPE)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    timing = time_call(lambda: target.copy_(source))
    table.bandwidth = moved / timing.ms * 1e3
    note = f"{table.bandwidth / 1e12:.2f} TB/s"
    table.add("ceiling", "device copy", "torch", timing, {"megabytes": moved / 1e6, "note": note})
    a, b = (torch.randn(8192, 8192, device=DEVICE).to(DTYPE) for _ in range(2))
    timing = time_call(lambda: a @ b, 300.0)
    flop = 2 * 8192**3
    table.rate = flop / timing.ms * 1e3
    note = f"{table.rate / 1e12:.0f} TFLOP/s"
    table.add("ceiling", "bf16 matmul 8192", "torch", timing, {"gflop": flop / 1e9, "note": note})


BACKENDS = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FOLDED = ", heads as queries"


def dense_one(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one query to all keys; `name` is a backend, with FOLDED appended the heads of a KV head stand in for
    queries, which is the same since nothing is masked."""
    with sdpa_kernel(BACKENDS[name.removesuffix(FOLDED)]):
        if not name.endswith(FOLDED):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        folded = q[:, :, 0].unflatten(1, (k.shape[1], -1))
        return F.scaled_dot_product_attention(folded, k, v).flatten(1, 2).unsqueeze(2)


def dense_causal(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(BACKENDS[name]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def dense_calls(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Every dense attention that might be the fastest: causal for many queries, of all keys for one."""
    names, one = ["sdpa cudnn", "sdpa flash"], dense_causal
    if q.shape[2] == 1:
        names, one = [name + suffix for name in BACKENDS for suffix in ("", FOLDED)], dense_one
    calls: dict[str, Callable[[], Tensor]] = {name: functools.partial(one, name, q, k, v) for name in names}
    qkv = [x.transpose(1, 2) for x in (q, k, v)]
    for name, package, module in (("3", "flash_attn_interface", ""), ("4", "flash_attn", ".cute")):
        if importlib.util.find_spec(package) and importlib.util.find_spec(package + module):
            function = importlib.import_module(package + module).flash_attn_func
            calls[f"flash-attention {name}"] = functools.partial(function, *qkv, causal=True)
    return calls


def dense_prefill(table: Table, inputs: Inputs) -> dict[str, float]:
    """Times dense attention at this length, once per run; `dense_ms` of the fastest, nothing if none ran."""
    case = inputs.case
    config = label(case.length)
    if not any(row["part"] == "dense" and row["config"] == config for row in table.rows):
        work = {
            "length": case.length,
            "batch": case.batch,
            "density": 1.0,
            "gflop": causal_count(case.batch, case.length) * HEADS * 4 * HEAD_DIM / 1e9,
            "megabytes": attention_megabytes(inputs),
        }
        for name, call in dense_calls(inputs.q, inputs.k, inputs.v).items():
            try:
                table.add("dense", config, name, time_call(call), work | {"peak_mb": peak_mb(call)})
            except Exception as problem:
                table.failed("dense", config, name, problem)
    return table.fastest("dense", config)


def label(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def attention_megabytes(inputs: Inputs) -> float:
    """Each of q, k, v read once, the output written once."""
    tensors = (inputs.q, inputs.q, inputs.k, inputs.v)
    return sum(x.numel() * x.element_size() for x in tensors) / 1e6


def prefill_work(inputs: Inputs, visible: float) -> dict[str, Any]:
    """The least work of router and attention: GFLOP and MB. Planning is not needed in principle and counts nothing."""
    case = inputs.case
    tokens = case.batch * case.length
    logits = 2 * case.routes * router_depth(case.balls)
    router = 2 * tokens * ROUTER_DIM * (HIDDEN + logits)
    addresses = 2 * 4 * case.routes * tokens
    return {
        "gflop": (visible * HEADS / case.routes * 4 * HEAD_DIM + router) / 1e9,
        "megabytes": attention_megabytes(inputs) + (inputs.hidden.numel() * 2 + addresses) / 1e6,
    }


def router_depth(balls: int) -> int:
    """The default depth of an adapter, more where more balls are asked for."""
    return max(8, (balls - 1).bit_length())


def new_router(case: Case) -> Any:
    return pack(TopologyRouter(HIDDEN, case.routes, 2, router_depth(case.balls), ROUTER_DIM).to(DEVICE))


@torch.no_grad()
def prefill(table: Table, part: str, case: Case, breakdown: bool = False) -> None:
    """The whole path of one configuration beside dense attention, and its stages if asked for."""
    shape = {"length": case.length, "batch": case.batch, "routes": case.routes, "balls": case.balls}
    try:
        inputs = prefill_inputs(case)
        against = dense_prefill(table, inputs)
        packed = new_router(case)
        query_ball, key_ball = inputs.query_address % case.balls, inputs.key_address % case.balls
        visible = visible_count(query_ball, key_ball, WINDOW, SINKS).sum().item()
        density = visible / case.routes / causal_count(case.batch, case.length)

        def topology() -> Tensor:
            if case.balls > 1:  # a layer whose heads are all dense asks for no addresses
                route(inputs.hidden, packed)
            return attend(inputs, plan_for(inputs))

        if case.balls == 1:  # SDPA runs: its own time drifts more within a run than the two may differ
            dense = dense_calls(inputs.q, inputs.k, inputs.v)
            name = min(dense, key=lambda name: time_call(dense[name]).ms)
            timing, dense_timing = time_in_turn([topology, dense[name]], 600.0)
            config = f"{case.name}, {implementation(case)}"
            table.add("beside", config, name, dense_timing, shape | {"routes": "", "density": 1.0})
            against = {"dense_ms": dense_timing.ms}
        else:
            timing = time_call(topology)
        rows = sample_rows(case.length).to(DEVICE)
        error = sampled_error(topology(), inputs.q, inputs.k, inputs.v, query_ball, key_ball, rows)
        values = shape | prefill_work(inputs, visible) | against | {"density": density, "error": error}
        values["peak_mb"] = peak_mb(topology)
        table.add(part, case.name, implementation(case), timing, values)
        if case.length <= 8192:  # launching takes longer than running; in a model the host is ahead, as in a graph
            table.add(part, f"{case.name}, CUDA graph", implementation(case), time_graph([topology]), values)
        if breakdown:
            plan = plan_for(inputs)
            stages: dict[str, Callable[[], object]] = {
                "router": lambda: route(inputs.hidden, packed),
                "plan": lambda: plan_for(inputs),
                "plan shared by all layers": lambda: shared_plan(inputs),
                **{name.replace("_", " "): call for name, call in passes(inputs, plan).items()},
            }
            for stage, stage_call in stages.items():
                table.add("breakdown", case.name, f"{stage}, {implementation(case)}", time_call(stage_call), shape)
    except Exception as problem:
        table.failed(part, case.name, implementation(case), problem)
    torch.cuda.empty_cache()


def implementation(case: Case) -> str:
    return "topology per query head" if case.routes == HEADS else "topology per KV head"


def prefill_cases() -> list[Case]:
    """The rows of the table of targets."""
    sizes = ((8192, 64), (32768, 128), (131072, 256), (32768, 16))
    named = [Case(f"prefill {label(length)}, {balls} balls", length, balls) for length, balls in sizes]
    named.append(Case("prefill 32k, one ball holds half", 32768, 128, skewed=True))
    named.append(Case("prefill 32k, all heads dense", 32768, 1))
    return [replace(case, routes=routes) for case in named for routes in (HEADS, KV_HEADS)]


def density_cases(length: int = 32768) -> list[Case]:
    cases = [Case(f"density {label(length)}, {2**depth} balls", length, 2**depth) for depth in range(10)]
    return [replace(case, routes=routes) for case in cases for routes in (HEADS, KV_HEADS)]


def growth_cases() -> list[Case]:
    """One level more per doubling: balls of 512 tokens."""
    lengths = [8192 * 2**i for i in range(6)]
    cases = [Case(f"growth {label(n)}, {n // 512} balls", n, n // 512) for n in lengths]
    return [replace(case, routes=routes) for case in cases for routes in (HEADS, KV_HEADS)]


@torch.no_grad()
def window_only(table: Table, length: int, flex: bool) -> None:
    """Window and sinks without a tree: our local pass, and FlexAttention."""
    config = f"window {label(length)}"
    try:
        inputs = prefill_inputs(Case(config, length, 64, routes=1))
        plan = plan_for(inputs)
        unseen = torch.full_like(inputs.query_address, 1), torch.zeros_like(inputs.key_address)
        visible = visible_count(*unseen, WINDOW, SINKS).item()
        shape = {
            "length": length,
            "batch": 1,
            "density": visible / causal_count(1, length),
            "gflop": visible * HEADS * 4 * HEAD_DIM / 1e9,
            "megabytes": attention_megabytes(inputs),
        }
        check = (inputs.q, inputs.k, inputs.v, *unseen, sample_rows(length).to(DEVICE))
        call = passes(inputs, plan)["local_pass"]
        error = sampled_error(call()[0].transpose(1, 2), *check)
        table.add("window", config, "our local pass", time_call(call), shape | {"error": error})
        if flex:
            blocks = -(-length // FLEX_BLOCK)
            call, _ = flex_call(inputs, *(torch.full((1, blocks), i, device=DEVICE) for i in (0, 1)))
            error = sampled_error(call(), *check)
            table.add("window", config, "FlexAttention", time_call(call), shape | {"error": error})
    except Exception as problem:
        table.failed("window", config, "all", problem)
    torch.compiler.reset()
    torch.cuda.empty_cache()


def block_mask_of(query_ball: Tensor, key_ball: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks that need a mask and blocks seen whole, bool `[R, blocks, blocks]`, of 128-token blocks with a ball each.

    Args: query_ball, key_ball: `[R, blocks]`. Needs WINDOW <= FLEX_BLOCK and SINKS <= FLEX_BLOCK.
    """
    index = torch.arange(query_ball.shape[1], device=query_ball.device)
    gap = index[:, None] - index
    same = query_ball[:, :, None] == key_ball[:, None, :]
    full = same & (gap > 0)
    partial = ~full & (gap >= 0) & ((gap <= 1) | (index == 0))
    return partial, full


def flex_call(inputs: Inputs, query_ball: Tensor, key_ball: Tensor) -> tuple[Callable[[], Tensor], float]:
    """FlexAttention where the 128 tokens of a block share a ball `[R, blocks]`, and the share of causal blocks visited.

    Token-level balls in their original order would leave hardly a block empty, so this is the mask that FlexAttention
    can use: the paper's.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    partial, full = block_mask_of(query_ball, key_ball)
    per_route = HEADS // query_ball.shape[0] if query_ball.shape[0] > 1 else HEADS

    def visible(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        r = h // per_route
        same = query_ball[r, q_idx // FLEX_BLOCK] == key_ball[r, kv_idx // FLEX_BLOCK]
        return (q_idx >= kv_idx) & (same | (q_idx - kv_idx < WINDOW) | (kv_idx < SINKS))

    def ordered(mask: Tensor) -> tuple[Tensor, Tensor]:
        count = mask.sum(-1, dtype=torch.int32)
        return count[None], mask.int().argsort(dim=-1, descending=True, stable=True).int()[None]

    length = inputs.case.length
    mask = BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(full), BLOCK_SIZE=FLEX_BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    causal = partial.shape[0] * partial.shape[1] * (partial.shape[1] + 1) / 2
    visited = (partial | full).sum().item() / causal
    return lambda: compiled(inputs.q, inputs.k, inputs.v, block_mask=mask, enable_gqa=True), visited


@torch.no_grad()
def flex(table: Table, length: int, balls: int) -> None:
    """FlexAttention on a block-level mask of as many balls; density is the share of blocks visited."""
    config = f"prefill {label(length)}, {balls} balls"
    try:
        inputs = prefill_inputs(Case(config, length, balls))
        against = dense_prefill(table, inputs)
        query_ball, key_ball = torch.randint(0, balls, (2, HEADS, length // FLEX_BLOCK), device=DEVICE)
        call, visited = flex_call(inputs, query_ball, key_ball)
        query_ball, key_ball = (x.repeat_interleave(FLEX_BLOCK, -1)[None] for x in (query_ball, key_ball))
        rows = sample_rows(length).to(DEVICE)
        error = sampled_error(call(), inputs.q, inputs.k, inputs.v, query_ball, key_ball, rows)
        values = {
            "length": length,
            "batch": 1,
            "routes": HEADS,
            "balls": balls,
            "density": visited,
            "error": error,
            "peak_mb": peak_mb(call),
            "note": "another mask: 128 tokens share a ball; no router, no plan",
        }
        table.add("flex", config, "FlexAttention, 128-token blocks", time_call(call), values | against)
    except Exception as problem:
        table.failed("flex", config, "FlexAttention, 128-token blocks", problem)
    torch.compiler.reset()
    torch.cuda.empty_cache()


def decode_records(case: Case, device: str = DEVICE) -> Records:
    """What a cache holds of as many tokens, one document in each row."""
    address = random_addresses(case.batch, case.routes, case.length, case.balls, device=device, leaves=DECODE_LEAVES)
    return pack_records(address, contiguous_layout(case.batch, case.length, device), DECODE_LEAVES)


def decode_cases() -> list[Case]:
    """Random balls, 20 and 10 of them: 5 % and 10 % of the keys."""
    named = (
        Case("decode 128k, batch 1, 5 %", 131072, 20),
        Case("decode 32k, batch 16, 10 %", 32768, 10, batch=16),
        Case("decode 32k, batch 1, 10 %", 32768, 10),
    )
    return [replace(case, routes=routes) for case in named for routes in (HEADS, KV_HEADS)]


def decode_visible(
    query_address: Tensor, key_address: Tensor, balls: int, kv_heads: int = KV_HEADS
) -> tuple[Tensor, Tensor]:
    """Keys seen by each route head, and by any head of each KV head: bool `[B, R, S]` and `[B, H_kv, S]`.

    Args: query_address: `[B, R, 1]`, of the newest token. key_address: `[B, S, R]`, unpadded.
    """
    seen = query_address % balls == key_address.transpose(1, 2) % balls
    position = torch.arange(key_address.shape[1], device=key_address.device)
    seen = seen | (position >= key_address.shape[1] - WINDOW) | (position < SINKS)
    routes = seen.shape[1]
    return seen, seen.unflatten(1, (min(KV_HEADS, routes), -1)).any(2)


@torch.no_grad()
def decode_step(table: Table, case: Case) -> None:
    """One token: router, record and attention, in a CUDA graph over several caches in turn."""
    shape: dict[str, Any] = {"length": case.length, "batch": case.batch, "routes": case.routes, "balls": case.balls}
    name = implementation(case)
    try:
        per_set = 2 * 2 * case.batch * KV_HEADS * case.length * HEAD_DIM
        sets = []
        for _ in range(max(2, min(8, 2**33 // per_set))):  # at most 8.6 GB, each visited once per round
            k, v = (
                torch.randn(case.batch, KV_HEADS, case.length, HEAD_DIM, device=DEVICE, dtype=DTYPE) for _ in range(2)
            )
            q = torch.randn(case.batch, 1, HEADS, HEAD_DIM, device=DEVICE, dtype=DTYPE).transpose(1, 2)
            address = random_addresses(case.batch, case.routes, 1, case.balls, device=DEVICE)
            hidden = torch.randn(case.batch, 1, HIDDEN, device=DEVICE, dtype=DTYPE)
            records = decode_records(case)
            sets.append((hidden, q, k, v, address, records.layout.last(1), records))
        if not table.fastest("decode", case.name):
            arms: dict[str, list[Callable[[], Tensor]]] = {}
            for _, q, k, v, *_ in sets:
                for arm, call in dense_calls(q, k, v).items():
                    arms.setdefault(arm, []).append(call)
            pairs = case.batch * HEADS * case.length
            work = {"density": 1.0, "megabytes": per_set / 1e6, "gflop": 4 * pairs * HEAD_DIM / 1e9}
            for arm, calls in arms.items():
                try:
                    table.add("decode", case.name, arm, time_graph(calls), shape | work | {"routes": ""})
                except Exception as problem:
                    table.failed("decode", case.name, arm, problem)

        packed = new_router(case)
        balls = torch.full((case.routes,), case.balls, dtype=torch.int32, device=DEVICE)

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
            return decode(q, k, v, address, query, records, balls)

        _, q, k, v, address, _, records = sets[0]
        key_ball = records.address.transpose(1, 2) % case.balls
        rows = torch.zeros(1, dtype=torch.long, device=DEVICE)
        out = step(*sets[0])
        error = sampled_error(out, q, k, v, address % case.balls, key_ball, rows)
        seen, loaded = decode_visible(address, records.address, case.balls)
        bytes_needed = loaded.sum().item() * (KV_HEADS // loaded.shape[1]) * 2 * HEAD_DIM * 2
        values = shape | {
            "density": seen.double().mean().item(),
            "gflop": seen.sum().item() * HEADS / case.routes * 4 * HEAD_DIM / 1e9,
            "megabytes": (bytes_needed + 2 * ROUTER_DIM * HIDDEN) / 1e6,
            "error": error,
            "peak_mb": peak_mb(lambda: step(*sets[0])),
        }
        del seen, loaded
        timing = time_graph([functools.partial(step, *x) for x in sets])
        table.add("decode", case.name, name, timing, values | table.fastest("decode", case.name))
        timing = time_graph([functools.partial(decode, *x[1:], balls) for x in sets])
        table.add("breakdown", case.name, f"attention, {name}", timing, shape)
        timing = time_graph([functools.partial(route, x[0], packed) for x in sets])
        table.add("breakdown", case.name, f"router, {name}", timing, shape)
    except Exception as problem:
        table.failed("decode", case.name, name, problem)
    torch.cuda.empty_cache()


def backward_of(kept: Callable[[], Tensor], leaves: Sequence[Tensor]) -> None:
    """Forward and backward of -log of the kept mass `[B, H, N]`."""
    for leaf in leaves:
        leaf.grad = None
    (-kept().clamp(min=1e-6).log().mean()).backward()


def distill(table: Table, length: int) -> None:
    """Forward and backward of one layer's distillation on all queries.

    SDPA: on given leaf distributions, with the loss at one depth; it excludes nothing. `attention kernels`: what the
    topology runs in its place, without a loss. `topology`: the whole step, from digit logits, at all depths.
    """
    config = f"distillation {label(length)}"
    levels = LEAVES.bit_length() - 1
    q = torch.randn(1, HEADS, length, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    k = torch.randn(1, KV_HEADS, length, HEAD_DIM, device=DEVICE, dtype=DTYPE)
    shape = {"length": length, "batch": 1, "routes": HEADS, "balls": LEAVES, "gflop": distillation_gflop(length)}

    def attempt(name: str, call: Callable[[], object], check: Callable[[], dict[str, float]]) -> None:
        try:
            values = shape | check()
            table.add("distill", config, name, time_call(call), values | {"peak_mb": peak_mb(call)})
        except Exception as problem:
            table.failed("distill", config, name, problem)
        torch.cuda.empty_cache()

    def given_leaves() -> None:
        leaves = [torch.randn(1, HEADS, length, LEAVES, device=DEVICE).softmax(-1).to(DTYPE) for _ in range(2)]
        query_leaves, key_leaves = (leaf.requires_grad_() for leaf in leaves)
        expanded = k.repeat_interleave(HEADS // KV_HEADS, 1)

        def through_sdpa(name: str) -> Tensor:
            return (dense_causal(name, q, expanded, key_leaves) * query_leaves).sum(-1, dtype=torch.float32)

        for name in ("sdpa cudnn", "sdpa flash"):
            kept = functools.partial(through_sdpa, name)
            attempt(f"{name}, nothing excluded", functools.partial(backward_of, kept, leaves), dict)

    def kernels_alone() -> None:
        forward, backward = far_passes(q, k)
        key_leaves = torch.randn(1, HEADS, length, LEAVES, device=DEVICE).softmax(-1).half()
        dvalues = torch.randn(1, HEADS, length, LEAVES, device=DEVICE, dtype=DTYPE)

        def check() -> dict[str, float]:
            return {"error": far_error(forward(key_leaves)[0], q, k, key_leaves, sample_rows(length).to(DEVICE))}

        attempt("attention kernels", lambda: backward(forward(key_leaves)[2], dvalues), check)

    def whole_step() -> None:
        logits = [torch.randn(1, HEADS, length, levels, 2, device=DEVICE, requires_grad=True) for _ in range(2)]

        def step() -> None:
            for x in logits:
                x.grad = None
            distillation_step(q, k, *logits).backward()

        attempt("topology", step, dict)

    given_leaves()
    kernels_alone()
    whole_step()


def distillation_gflop(length: int) -> float:
    """Scores and values forward; backward scores again and the gradient of the values, which is all that is needed:
    q and k are frozen."""
    return causal_count(1, length) * HEADS * 2 * (2 * HEAD_DIM + 2 * LEAVES) / 1e9


# ------------------------------------------------------------------------------------------------ command line


@dataclass
class Arguments:
    output: str = field(default="kernels/benchmarks/results/measure.csv", metadata={"help": "CSV; rows are appended."})
    only: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": f"Parts: {' '.join(PARTS)}."})
    lengths: list[int] = field(
        default_factory=list, metadata={"help": "Only configurations of these lengths; all if none is given."}
    )
    commit: str = field(default="", metadata={"help": "Recorded in each row; asked of git if not given."})
    seed: int = field(default=0)


def run(arguments: Arguments) -> Table:
    unknown = set(arguments.only) - set(PARTS)
    if unknown:
        raise ValueError(f"only must name parts among {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    torch.manual_seed(arguments.seed)
    table = Table(Path(arguments.output), arguments.commit)

    def wanted(part: str, length: int) -> bool:
        return part in arguments.only and (not arguments.lengths or length in arguments.lengths)

    begin = time.perf_counter()

    def done(part: str) -> None:
        print(f"--- {part} done at {time.perf_counter() - begin:.0f} s", flush=True)

    ceilings(table)
    breakdown = "breakdown" in arguments.only
    for case in prefill_cases():
        if wanted("prefill", case.length):
            prefill(table, "prefill", case, breakdown and case.balls > 1)
    done("prefill")
    for case in decode_cases():
        if wanted("decode", case.length):
            decode_step(table, case)
    done("decode")
    if wanted("distill", 32768):
        distill(table, 32768)
    done("distill")
    for part, cases in (("density", density_cases()), ("growth", growth_cases())):
        for case in cases:
            if wanted(part, case.length):
                prefill(table, part, case)
        done(part)
    for length, balls in ((8192, 64), (32768, 128), (131072, 256)):
        if wanted("window", length):
            window_only(table, length, "flex" in arguments.only)
        if wanted("flex", length):
            flex(table, length, balls)
    done("window and flex")
    return table


def main(arguments: Arguments) -> None:
    table = run(arguments)
    print("\nsummary")
    for row in table.rows:
        if row["part"] in ("ceiling", "dense", "prefill", "decode", "distill"):
            print(line(row))
    if table.failures:
        sys.exit("\nfailed:\n" + "\n".join(table.failures))


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
