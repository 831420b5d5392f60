"""The layer-local distillation step of one layer on all its queries, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cases import Layer, label
from .dense import dense_causal
from .harness import Table, peak_mb, time_call
from .oracles import causal_count, far_error, sample_rows
from .topology import distillation_step, far_passes

LEAVES = 128  # all depths up to 7


def backward_of(kept: Callable[[], Tensor], leaves: Sequence[Tensor]) -> None:
    """Forward and backward of -log of the kept mass `[B, H, N]`."""
    for leaf in leaves:
        leaf.grad = None
    (-kept().clamp(min=1e-6).log().mean()).backward()


def distill(table: Table, length: int, layer: Layer) -> None:
    """Forward and backward of one layer's distillation on all queries.

    SDPA: on given leaf distributions, with the loss at one depth; it excludes nothing. `attention kernels`: what the
    topology runs in its place, without a loss. `topology`: the whole step, from digit logits, at all depths.
    """
    config = f"distillation {label(length)}"
    levels = LEAVES.bit_length() - 1
    q = torch.randn(1, layer.heads, length, layer.head_dim, device=layer.device, dtype=layer.dtype)
    k = torch.randn(1, layer.kv_heads, length, layer.head_dim, device=layer.device, dtype=layer.dtype)
    shape = {
        "length": length,
        "batch": 1,
        "routes": layer.heads,
        "balls": LEAVES,
        "gflop": distillation_gflop(length, layer),
    }

    def attempt(name: str, call: Callable[[], object], check: Callable[[], dict[str, float]]) -> None:
        try:
            values = shape | check()
            table.add("distill", config, name, time_call(call), values | {"peak_mb": peak_mb(call)})
        except Exception as problem:
            table.failed("distill", config, name, problem)
        torch.cuda.empty_cache()

    def given_leaves() -> None:
        leaves = [
            torch.randn(1, layer.heads, length, LEAVES, device=layer.device).softmax(-1).to(layer.dtype)
            for _ in range(2)
        ]
        query_leaves, key_leaves = (leaf.requires_grad_() for leaf in leaves)
        expanded = k.repeat_interleave(layer.heads // layer.kv_heads, 1)

        def through_sdpa(name: str) -> Tensor:
            return (dense_causal(name, q, expanded, key_leaves) * query_leaves).sum(-1, dtype=torch.float32)

        for name in ("sdpa cudnn", "sdpa flash"):
            kept = functools.partial(through_sdpa, name)
            attempt(f"{name}, nothing excluded", functools.partial(backward_of, kept, leaves), dict)

    def kernels_alone() -> None:
        forward, backward = far_passes(q, k, layer)
        key_leaves = torch.randn(1, layer.heads, length, LEAVES, device=layer.device).softmax(-1).half()
        dvalues = torch.randn(1, layer.heads, length, LEAVES, device=layer.device, dtype=layer.dtype)

        def check() -> dict[str, float]:
            return {
                "error": far_error(
                    forward(key_leaves)[0], q, k, key_leaves, sample_rows(length).to(layer.device), layer
                )
            }

        attempt("attention kernels", lambda: backward(forward(key_leaves)[2], dvalues), check)

    def whole_step() -> None:
        logits = [
            torch.randn(1, layer.heads, length, levels, 2, device=layer.device, requires_grad=True) for _ in range(2)
        ]

        def step() -> None:
            for x in logits:
                x.grad = None
            distillation_step(q, k, logits[0], logits[1], layer).backward()

        attempt("topology", step, dict)

    given_leaves()
    kernels_alone()
    whole_step()


def distillation_gflop(length: int, layer: Layer) -> float:
    """Scores and values forward; backward scores again and the gradient of the values, which is all that is needed:
    q and k are frozen."""
    return causal_count(1, length) * layer.heads * 2 * (2 * layer.head_dim + 2 * LEAVES) / 1e9
