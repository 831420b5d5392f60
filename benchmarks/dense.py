"""What the topology is compared with: every dense attention that might be the fastest."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from .harness import time_call

BACKENDS = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FOLDED = ", heads as queries"
#: Attention implementation of whole dense models. No mask function is registered under this name, so models make none.
UNMASKED = "unmasked"


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


class Fastest(NamedTuple):
    """Names of the fastest dense attentions of a shape: causal prefill, one token."""

    prefill: str
    decode: str


def use_dense(fastest: Fastest) -> None:
    """Let models with the attention implementation `UNMASKED` run these: for unpadded rows, prefill from an empty cache
    or one token at a time."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if query.shape[2] > 1:
            out = dense_causal(fastest.prefill, query, key, value)
        else:
            out = dense_one(fastest.decode, query, key, value)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(UNMASKED, attention)


def choose_dense(
    length: int, batch: int, prefilled: int = 1, shape: tuple[int, int, int] = (32, 8, 128), device: str = "cuda"
) -> Fastest:
    """Find the fastest attention of a shape and `use_dense` it: prefill for `prefilled` rows, decode for `batch`.

    Args:
        shape: query heads, KV heads, head dimension.
    """
    query_heads, kv_heads, width = shape
    found: dict[str, str] = {}
    for phase, rows, queries in (("prefill", prefilled, length), ("decode", batch, 1)):
        q, k, v = (
            torch.randn(rows, n, heads, width, device=device, dtype=torch.bfloat16).transpose(1, 2)
            for n, heads in ((queries, query_heads), (length, kv_heads), (length, kv_heads))
        )
        times: dict[str, float] = {}
        for name, call in dense_calls(q, k.contiguous(), v.contiguous()).items():
            if name.startswith("sdpa"):
                try:
                    times[name] = time_call(call, 20.0).ms
                except Exception as problem:
                    print(f"{name}: {problem}")
        found[phase] = min(times, key=lambda name: times[name])
    fastest = Fastest(**found)
    use_dense(fastest)
    return fastest


use_dense(Fastest("sdpa cudnn", "sdpa flash"))
