"""Prefill and decode of a whole model of Llama-3.1-8B's shape, dense and with a merged topology; appends to a file.

    python -m benchmarks.end_to_end --output results/h100.jsonl
    python -m benchmarks.end_to_end --dtype nf4 --lengths 8192 32768        # 4-bit weights, bitsandbytes

Random weights and random tokens: speed depends on shapes and, for the topology, on how evenly its balls are filled;
routers are initialised from data, and the density that came out is in each row. One level more per doubling of the
length: balls of 512 tokens. The dense model runs the fastest attention that SDPA has for each shape, without a mask.

Prefill: a DynamicCache, logits of the last token. Decode: `CUDA graph`, one token at a time from a StaticCache, 256 of
them, the dense attention reading every slot (what a perfect dense decode would read); `eager`, a DynamicCache, which
waits for Python. `compile` adds torch.compile(mode="reduce-overhead"). Larger batches repeat the prefilled row, which
stays in memory and so counts in the peak of every decode row.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import DynamicCache, HfArgumentParser

import topo_adapter.forward
from topo_adapter import TopologyConfig, initialize_routers

from .cases import label
from .dense import Fastest, choose_dense
from .generation import WARM_UP, compiled_decode, eager_decode, graph_decode, static_copy
from .harness import Table, Timing, summary
from .models import NAME, build, llama_config

BALL_TOKENS = 512


def visible_depth(length: int) -> int:
    """Levels that leave BALL_TOKENS to a ball."""
    return max(0, (length // BALL_TOKENS).bit_length() - 1)


def topology(model: Any, route_per: str, depth: int, tokens: Tensor) -> Any:
    """The model with a merged topology, routers initialised so that balls are about equally full."""
    config = TopologyConfig(route_per=route_per, depth=depth, visible_depth=depth, router_dim=32)  # type: ignore[arg-type]
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        initialize_routers(model, tokens)
    model.peft_config["default"].homotopy = 1.0
    model.merge_adapter()
    return model


def set_depth(model: Any, depth: int) -> None:
    model.unmerge_adapter()
    model.peft_config["default"].visible_depth = depth
    model.merge_adapter()


@torch.no_grad()
def prefill(model: Any, tokens: Tensor) -> tuple[DynamicCache, Tensor]:
    """The filled cache and the next token `[B, 1]`."""
    cache = DynamicCache()
    logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return cache, logits[:, -1:].argmax(-1)


def density_of(run: Callable[[], object]) -> float:
    """Mean density over the layers of a merged model's forward."""
    densities: list[Tensor] = []
    attention = topo_adapter.forward.hard_attention

    def counted(q: Tensor, k: Tensor, v: Tensor, plan: Any, *args: Any, **kwargs: Any) -> Tensor:
        densities.append((plan.visible_count() / plan.causal_count()).mean())
        return attention(q, k, v, plan, *args, **kwargs)

    with mock.patch.object(topo_adapter.forward, "hard_attention", counted):
        run()
    return torch.stack(densities).mean().item() if densities else float("nan")


def largest_batch(wanted: int, length: int, layers: int) -> int:
    """The largest power of two, at most `wanted`, whose cache fits beside the model and a prefilled row."""
    row = 2 * 2 * layers * 8 * 128 * length
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    batch = 1
    while 2 * batch <= wanted and 2 * batch * row + 4e9 < free:
        batch *= 2
    return batch


@dataclass
class Arguments:
    output: str = field(default="runs/benchmark.jsonl", metadata={"help": "JSON lines; rows are appended."})
    dtype: str = field(default="bf16", metadata={"help": "bf16, or nf4: 4-bit weights through bitsandbytes."})
    lengths: list[int] = field(default_factory=lambda: [8192, 32768, 65536, 131072])
    batches: list[int] = field(
        default_factory=lambda: [1, 16], metadata={"help": "Rows decoded together; lowered to what fits."}
    )
    route_per: list[str] = field(
        default_factory=lambda: ["query_head"], metadata={"help": "query_head, kv_head or both."}
    )
    dense: bool = field(default=True, metadata={"help": "Measure the dense model too."})
    tokens: int = field(default=256, metadata={"help": "Tokens decoded through a CUDA graph."})
    eager_tokens: int = field(default=64, metadata={"help": "Tokens decoded eagerly; 0 leaves that out."})
    compile: bool = field(default=False, metadata={"help": "Also decode through torch.compile: minutes of compiling."})
    layers: int = field(default=32, metadata={"help": "Fewer for a quick try."})
    commit: str = field(default="")
    seed: int = field(default=0)


def measure(model: Any, name: str, table: Table, arguments: Arguments) -> None:
    """Every length and phase of one model."""
    for length in arguments.lengths:
        config = f"{label(length)} batch 1, {arguments.dtype}"
        try:
            if name != "dense":
                set_depth(model, visible_depth(length))
            measure_length(model, name, table, arguments, length)
        except Exception as problem:
            table.failed("end_to_end", f"prefill {config}", name, problem)
        torch.cuda.empty_cache()


def measure_length(model: Any, name: str, table: Table, arguments: Arguments, length: int) -> None:
    """Prefill, then decode at the largest batches that fit, then decode eagerly, which changes the prefilled cache."""
    tokens = torch.randint(0, model.config.vocab_size, (1, length), device="cuda")
    shape: dict[str, Any] = {"length": length}
    dense = choose_dense(length, 1) if name == "dense" else None
    if name != "dense":
        shape["balls"] = 2 ** visible_depth(length)
        shape["density"] = density_of(lambda: prefill(model, tokens))  # warms up as well
    elif length <= 32768:
        prefill(model, tokens)
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(3 if length <= 32768 else 2):
        cache = None  # free the last one before the next
        torch.cuda.synchronize()
        begin = time.perf_counter()
        cache, token = prefill(model, tokens)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    assert cache is not None
    values = shape | {
        "batch": 1,
        "tokens_per_s": length / statistics.median(times) * 1e3,
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6,
        "note": dense.prefill if dense else "",
    }
    table.add("end_to_end", f"prefill {label(length)} batch 1, {arguments.dtype}", name, summary(times), values)

    def decoded(mode: str, batch: int, dense: Fastest | None, run: Callable[[], Timing]) -> None:
        config = f"decode {label(length)} batch {batch}, {arguments.dtype}, {mode}"
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            timing = run()
            values = shape | {
                "batch": batch,
                "tokens_per_s": batch / timing.ms * 1e3,
                "peak_mb": torch.cuda.max_memory_allocated() / 1e6,
                "note": dense.decode if dense else "",
            }
            table.add("end_to_end", config, name, timing, values)
        except Exception as problem:
            table.failed("end_to_end", config, name, problem)

    slots = length + arguments.tokens + WARM_UP + 1
    batches = [largest_batch(wanted, slots, arguments.layers) for wanted in arguments.batches]
    for batch in dict.fromkeys(batches):
        dense = choose_dense(length, batch) if name == "dense" else None

        def static(decode: Callable[..., Timing], batch: int = batch) -> Timing:
            copied = static_copy(cache, model.config, batch, slots)
            return decode(model, copied, token, length, arguments.tokens)

        decoded("CUDA graph", batch, dense, functools.partial(static, graph_decode))
        if arguments.compile:
            decoded("torch.compile", batch, dense, functools.partial(static, compiled_decode))
    if arguments.eager_tokens:
        dense = choose_dense(length, 1) if name == "dense" else None
        decoded("eager", 1, dense, lambda: eager_decode(model, cache, token, length, arguments.eager_tokens))


def main(arguments: Arguments) -> None:
    if arguments.dtype not in ("bf16", "nf4"):
        raise ValueError(f"dtype must be bf16 or nf4, got {arguments.dtype!r}")
    if arguments.dtype == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        print("skipped: 4-bit weights need bitsandbytes, which is not installed")
        return
    torch.manual_seed(arguments.seed)
    settings = {"dtype": arguments.dtype, "layers": arguments.layers, "seed": arguments.seed}
    table = Table(Path(arguments.output), arguments.commit, NAME, settings)
    begin = time.perf_counter()
    model = build(llama_config(arguments.layers), arguments.dtype == "nf4")
    print(f"--- model built at {time.perf_counter() - begin:.0f} s", flush=True)
    if arguments.dense:
        measure(model, "dense", table, arguments)
        print(f"--- dense done at {time.perf_counter() - begin:.0f} s", flush=True)
    depth = max(visible_depth(length) for length in arguments.lengths)
    sample = torch.randint(0, model.config.vocab_size, (1, 2048), device="cuda")
    for route_per in arguments.route_per:
        routed = topology(model, route_per, max(8, depth), sample)
        name = {"query_head": "topology per query head", "kv_head": "topology per KV head"}[route_per]
        measure(routed, name, table, arguments)
        routed.unmerge_adapter()
        model = routed.unload()
        print(f"--- {name} done at {time.perf_counter() - begin:.0f} s", flush=True)
    print("\nsummary, milliseconds per prefill or per decoded token")
    for row in table.rows:
        if "ms" in row:
            speed, peak = f"{row['tokens_per_s']:10.1f} tokens/s", f"{row['peak_mb'] / 1e3:6.1f} GB"
            density = f"density {row['density']:.3f}" if "density" in row else ""
            print(f"{row['config']:42} {row['implementation']:24} {row['ms']:10.2f} ms {speed} {peak} {density}")
    if table.failures:
        sys.exit("\nfailed:\n" + "\n".join(table.failures))


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
