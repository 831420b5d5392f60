"""Hard attention: executes a plan exactly, in Triton on CUDA and in plain torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .backend import kernels_serve
from .cache import Records
from .layout import SequenceLayout
from .plan import Plan
from .scoring import Scoring
from .torch_attention import scanned_attention, torch_attention
from .visibility import visible_pairs

_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def _kernels_attend(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return 16 <= q.shape[-1] <= 256 and kernels_serve(q, k, v)


def hard_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, softcap: float | None = None) -> Tensor:
    """Attention over exactly the visible pairs of `plan`, without an `N x N` tensor.

    Args:
        q: `[B, H, T, D]`; k, v: `[B, H_kv, S, D]`; `H` a multiple of `H_kv` and of the plan's route heads.

    Returns:
        `[B, H, T, D]` in q's dtype; rows of padding queries are 0. Differentiable. The torch path serves float64
        and machines without a GPU.
    """
    if plan.dense and softcap is None:
        with sdpa_kernel(_FASTEST_FIRST, set_priority=True):
            return scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] > k.shape[1]
            )
    if _kernels_attend(q, k, v):
        from topo_kernels import topology_attention

        return topology_attention(q, k, v, plan, Scoring(scale, softcap))
    return torch_attention(q, k, v, plan, scale, softcap)


_DECODE_TOKENS = 16  # the cost of scanning the cache grows with the number of new tokens, that of sorting it hardly


def serves_decode(q: Tensor, k: Tensor, v: Tensor, records: Records | None) -> bool:
    """Whether `decode_attention` is the way to run this forward: a few new tokens over a cache, without gradients."""
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    few = records is not None and q.shape[2] <= _DECODE_TOKENS and q.shape[2] < k.shape[2]
    return few and not needs_grad


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_address: Tensor,
    query: SequenceLayout,
    key_address: Tensor,
    key: Records,
    balls: Tensor,
    *,
    local_window: int,
    num_sink_tokens: int,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of a few new tokens over a cache: scans the key records for what each token sees.

    Args:
        q: `[B, H, T, D]`; k, v: `[B, H_kv, S, D]`, every slot of the cache. query: layout of the new tokens.
        query_address: int32 `[B, R, T]`. key_address: uint8 or int16 `[B, S, R]`. key: positions and documents.
        balls: int32 `[R]`.

    Returns:
        `[B, H, T, D]` in q's dtype; rows of padding queries are 0. Not differentiable. The torch path serves float64
        and machines without a GPU: it scores every key, which for a few tokens is less than to sort them.
    """
    if not _kernels_attend(q, k, v):
        # laid out by keys: in the records' order, by routes, each step below is slower
        by_key = key_address.transpose(1, 2).to(torch.int32, memory_format=torch.contiguous_format)
        query_ball, key_ball, keys = query_address % balls[:, None], by_key % balls[:, None], key.layout
        visible = visible_pairs(query_ball, key_ball, query, keys, local_window, num_sink_tokens)
        return scanned_attention(q, k, v, visible, query.real, keys.real, scale, softcap)
    from topo_kernels import decode_attention as kernel

    return kernel(
        q,
        k,
        v,
        query_address,
        query.position,
        query.document,
        key_address,
        key.position,
        key.document,
        balls,
        Scoring(scale, softcap),
        local_window=local_window,
        num_sink_tokens=num_sink_tokens,
    )
