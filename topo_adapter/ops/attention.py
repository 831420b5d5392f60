"""Hard attention: executes a plan exactly, in Triton on CUDA and in plain torch elsewhere."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ..core.records import Keys, Records
from ..core.scoring import Scoring
from ..core.visibility import Visibility, per_head
from .backend import Operation, kernels_serve
from .plan import Plan
from .torch_attention import scanned_attention, torch_attention

_FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def _kernels_attend(operation: Operation, q: Tensor, k: Tensor, v: Tensor, visits: int) -> bool:
    same = q.dtype == k.dtype == v.dtype
    widths = q.shape[-1], v.shape[-1]
    return same and kernels_serve(operation, q, k, v, widths=widths, visits=visits)


def hard_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scoring: Scoring) -> Tensor:
    """Attention over exactly the visible pairs of `plan`, without an `N x N` tensor.

    Args:
        q: `[B, H, T, D]`; k, v: `[B, H_kv, S, D]`; `H` a multiple of `H_kv` and of the plan's route heads.

    Returns:
        `[B, H, T, D]` in q's dtype; rows of padding queries are 0. Differentiable. The torch path serves float64
        and machines without a GPU.
    """
    if plan.dense and scoring.softcap is None:
        with sdpa_kernel(_FASTEST_FIRST, set_priority=True):
            return scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scoring.scale, enable_gqa=q.shape[1] > k.shape[1]
            )
    if _kernels_attend("attend", q, k, v, plan.query_order.shape[2]):
        from topo_kernels import topology_attention

        return topology_attention(q, k, v, plan, scoring)
    return torch_attention(q, k, v, plan, scoring)


_DECODE_TOKENS = 16  # the cost of scanning the cache grows with the number of new tokens, that of sorting it hardly


def serves_decode(q: Tensor, k: Tensor, v: Tensor, records: Records | None) -> bool:
    """Whether `decode_attention` is the way to run this forward: a few new tokens over a cache, without gradients."""
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    few = records is not None and q.shape[2] <= _DECODE_TOKENS and q.shape[2] < k.shape[2]
    return few and not needs_grad


def decode_attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, scoring: Scoring) -> Tensor:
    """Attention of a few new tokens over a cache: scans the key records for what each token sees.

    Args:
        q: `[B, H, T, D]`; k, v: `[B, H_kv, S, D]`, every slot of the cache. visibility: its keys have records.

    Returns:
        `[B, H, T, D]` in q's dtype; rows of padding queries are 0. Not differentiable. The torch path serves float64
        and machines without a GPU: it scores every key, which for a few tokens is less than to sort them.
    """
    records, query = visibility.keys.records, visibility.query
    assert records is not None  # serves_decode has looked
    if not _kernels_attend("decode", q, k, v, visibility.rule.most_visits):
        # laid out by keys: in the records' order, by routes, each step below is slower
        address = records.address.transpose(1, 2).to(torch.int32, memory_format=torch.contiguous_format)
        seen = replace(visibility, keys=Keys(address, records.layout))
        return scanned_attention(q, k, v, seen.mask(), query.real, seen.keys.layout.real, scoring)
    from topo_kernels import decode_attention as kernel

    visits, rule = visibility.route_visits().int(), visibility.rule
    return kernel(
        q,
        k,
        v,
        visits,
        query.position,
        query.document,
        per_head(records.address, len(rule.route_depths), dim=2),
        records.position,
        records.document,
        rule.sizes_on(visits.device),
        scoring,
        local_window=rule.local_window,
        num_sink_tokens=rule.num_sink_tokens,
        dense_until=rule.dense_until,
    )
