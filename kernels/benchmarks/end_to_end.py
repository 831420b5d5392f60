"""Prefill and decode of a whole model of Llama-3.1-8B's shape, dense and with a merged topology; appends to a CSV.

    python kernels/benchmarks/end_to_end.py --output kernels/benchmarks/results/h100.csv
    python kernels/benchmarks/end_to_end.py --dtype nf4 --lengths 8192 32768        # 4-bit weights, bitsandbytes

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
from measure import DEVICE, Table, Timing, dense_calls, dense_causal, dense_one, label, summary, time_call
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    HfArgumentParser,
    LlamaConfig,
    StaticCache,
)
from transformers.cache_utils import StaticIndexedLayer

import topo_adapter.layer
from topo_adapter import TopologyConfig, initialize_routers

BALL_TOKENS = 512
WARM_UP = 3  # decode steps before the graph is captured
#: The dense attention in use, chosen anew for each shape: causal prefill, one token.
FASTEST = {"prefill": "sdpa cudnn", "decode": "sdpa flash"}


def llama_config(layers: int = 32) -> LlamaConfig:
    """Llama-3.1-8B, with as many layers as asked for."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )


def dense_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The fastest dense attention for unpadded rows: causal prefill from an empty cache, or one token."""
    if query.shape[2] > 1:
        out = dense_causal(FASTEST["prefill"], query, key, value)
    else:
        out = dense_one(FASTEST["decode"], query, key, value)
    return out.transpose(1, 2).contiguous(), None


# no mask function is registered under this name, so models make no mask
AttentionInterface.register("unmasked", dense_attention)


def build(config: LlamaConfig, quantised: bool, device: str = DEVICE) -> Any:
    """A model with random weights; `quantised`: linear layers but the head in 4-bit NF4."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    model.requires_grad_(False)
    model.config._attn_implementation = "unmasked"
    if quantised:
        quantise(model)
    return model


def quantise(model: nn.Module) -> None:
    """Replace the decoder's linear layers by bitsandbytes' NF4, one at a time."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                size = child.in_features, child.out_features
                packed = Linear4bit(*size, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
                weight = Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                packed.weight = weight.to(child.weight.device)  # quantises
                setattr(parent, name, packed)


def visible_depth(length: int) -> int:
    """Levels that leave BALL_TOKENS to a ball."""
    return max(0, (length // BALL_TOKENS).bit_length() - 1)


def topology(model: Any, route_per: str, depth: int, tokens: Tensor) -> Any:
    """The model with a merged topology, routers initialised so that balls are about equally full."""
    config = TopologyConfig(route_per=route_per, depth=depth, visible_depth=depth)  # type: ignore[arg-type]
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
    attention = topo_adapter.layer.hard_attention

    def counted(q: Tensor, k: Tensor, v: Tensor, plan: Any, *args: Any, **kwargs: Any) -> Tensor:
        densities.append((plan.visible_count() / plan.causal_count()).mean())
        return attention(q, k, v, plan, *args, **kwargs)

    with mock.patch.object(topo_adapter.layer, "hard_attention", counted):
        run()
    return torch.stack(densities).mean().item() if densities else float("nan")


def static_copy(cache: DynamicCache, config: LlamaConfig, batch: int, slots: int) -> StaticCache:
    """A StaticCache of `slots` that holds what a DynamicCache of one row holds, `batch` times."""
    static = StaticCache(config=config, max_cache_len=slots)
    for index, source in enumerate(cache.layers):
        records = getattr(source, "indexer_keys", None)
        target = static.layers[index] if records is None else StaticIndexedLayer(max_cache_len=slots)
        target.update(source.keys.expand(batch, -1, -1, -1), source.values.expand(batch, -1, -1, -1))
        if records is not None:
            target.update_indexer(records.expand(batch, -1, -1))
        for name, value in vars(source).items():
            if name not in vars(target):  # whose addresses these are
                setattr(target, name, value)
        static.layers[index] = target
    return static


def decode_step(model: Any, cache: Any, token: Tensor, position: Tensor) -> None:
    """One greedy step in place: `token` `[B, 1]` becomes the next one, `position` `[B, 1]` moves on."""
    logits = model(
        input_ids=token, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits
    token.copy_(logits[:, -1:].argmax(-1))
    position.add_(1)


def start(token: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    return token.repeat(batch, 1), torch.full((batch, 1), length, device=token.device)


def time_steps(step: Callable[[], object], count: int) -> Timing:
    """Time per step, over all of them together."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(count):
        step()
    end.record()
    torch.cuda.synchronize()
    ms = begin.elapsed_time(end) / count
    return Timing(ms, ms, ms, count)


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """One for all measurements: cuBLAS keeps 32 MiB for every stream it ever saw, which would count in later peaks."""
    return torch.cuda.Stream()


@torch.no_grad()
def graph_decode(model: Any, cache: StaticCache, token: Tensor, length: int, count: int) -> Timing:
    """A CUDA graph of one step, replayed."""
    token, position = start(token, cache.layers[0].keys.shape[0], length)
    step = functools.partial(decode_step, model, cache, token, position)
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    timing = time_steps(graph.replay, count)
    filled = int(cache.get_seq_length())
    if filled != length + WARM_UP + count:
        raise RuntimeError(f"the cache must hold {length + WARM_UP + count} tokens after decoding, got {filled}")
    return timing


@torch.no_grad()
def compiled_decode(model: Any, cache: StaticCache, token: Tensor, length: int, count: int) -> Timing:
    """torch.compile's own CUDA graphs."""
    token, position = start(token, cache.layers[0].keys.shape[0], length)
    compiled = torch.compile(model, mode="reduce-overhead", dynamic=False)
    step = functools.partial(decode_step, compiled, cache, token, position)
    for _ in range(WARM_UP):
        step()
    timing = time_steps(step, count)
    torch.compiler.reset()
    return timing


@torch.no_grad()
def eager_decode(model: Any, cache: DynamicCache, token: Tensor, length: int, count: int) -> Timing:
    token, position = start(token, 1, length)
    step = functools.partial(decode_step, model, cache, token, position)
    step()
    return time_steps(step, count)


def choose_dense(length: int, batch: int, prefilled: int = 1, shape: tuple[int, int, int] = (32, 8, 128)) -> None:
    """Set FASTEST to the fastest attention of a shape: prefill for `prefilled` rows, decode for `batch`.

    Args:
        shape: query heads, KV heads, head dimension.
    """
    query_heads, kv_heads, width = shape
    for phase, rows, queries in (("prefill", prefilled, length), ("decode", batch, 1)):
        q, k, v = (
            torch.randn(rows, n, heads, width, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
            for n, heads in ((queries, query_heads), (length, kv_heads), (length, kv_heads))
        )
        times: dict[str, float] = {}
        for name, call in dense_calls(q, k.contiguous(), v.contiguous()).items():
            if name.startswith("sdpa"):
                try:
                    times[name] = time_call(call, 20.0).ms
                except Exception as problem:
                    print(f"{name}: {problem}")
        FASTEST[phase] = min(times, key=lambda name: times[name])


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
    output: str = field(default="kernels/benchmarks/results/measure.csv", metadata={"help": "CSV; rows are appended."})
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
            if name == "dense":
                choose_dense(length, 1)
            else:
                set_depth(model, visible_depth(length))
            measure_length(model, name, table, arguments, length)
        except Exception as problem:
            table.failed("end_to_end", f"prefill {config}", name, problem)
        torch.cuda.empty_cache()


def measure_length(model: Any, name: str, table: Table, arguments: Arguments, length: int) -> None:
    """Prefill, then decode at the largest batches that fit, then decode eagerly, which changes the prefilled cache."""
    tokens = torch.randint(0, model.config.vocab_size, (1, length), device=DEVICE)
    shape: dict[str, Any] = {"length": length}
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
        "note": FASTEST["prefill"] if name == "dense" else "",
    }
    table.add("end_to_end", f"prefill {label(length)} batch 1, {arguments.dtype}", name, summary(times), values)

    def decoded(mode: str, batch: int, run: Callable[[], Timing]) -> None:
        config = f"decode {label(length)} batch {batch}, {arguments.dtype}, {mode}"
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            timing = run()
            values = shape | {
                "batch": batch,
                "tokens_per_s": batch / timing.ms * 1e3,
                "peak_mb": torch.cuda.max_memory_allocated() / 1e6,
                "note": FASTEST["decode"] if name == "dense" else "",
            }
            table.add("end_to_end", config, name, timing, values)
        except Exception as problem:
            table.failed("end_to_end", config, name, problem)

    slots = length + arguments.tokens + WARM_UP + 1
    batches = [largest_batch(wanted, slots, arguments.layers) for wanted in arguments.batches]
    for batch in dict.fromkeys(batches):
        if name == "dense":
            choose_dense(length, batch)

        def static(decode: Callable[..., Timing], batch: int = batch) -> Timing:
            copied = static_copy(cache, model.config, batch, slots)
            return decode(model, copied, token, length, arguments.tokens)

        decoded("CUDA graph", batch, functools.partial(static, graph_decode))
        if arguments.compile:
            decoded("torch.compile", batch, functools.partial(static, compiled_decode))
    if arguments.eager_tokens:
        if name == "dense":
            choose_dense(length, 1)
        decoded("eager", 1, lambda: eager_decode(model, cache, token, length, arguments.eager_tokens))


def main(arguments: Arguments) -> None:
    if arguments.dtype not in ("bf16", "nf4"):
        raise ValueError(f"dtype must be bf16 or nf4, got {arguments.dtype!r}")
    if arguments.dtype == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        print("skipped: 4-bit weights need bitsandbytes, which is not installed")
        return
    torch.manual_seed(arguments.seed)
    table = Table(Path(arguments.output), arguments.commit)
    begin = time.perf_counter()
    model = build(llama_config(arguments.layers), arguments.dtype == "nf4")
    print(f"--- model built at {time.perf_counter() - begin:.0f} s", flush=True)
    if arguments.dense:
        measure(model, "dense", table, arguments)
        print(f"--- dense done at {time.perf_counter() - begin:.0f} s", flush=True)
    depth = max(visible_depth(length) for length in arguments.lengths)
    sample = torch.randint(0, model.config.vocab_size, (1, 2048), device=DEVICE)
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
