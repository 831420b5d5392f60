"""Decoding of whole models: one greedy token after the other, in a CUDA graph, compiled or eagerly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.cache_utils import StaticIndexedLayer

from .harness import Timing

WARM_UP = 3  # decode steps before the graph is captured


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
