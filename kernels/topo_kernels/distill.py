"""Dense causal attention whose values are leaf distributions, without window and sinks (docs/method.md, section 5.2).

A query's causal keys are its document's keys up to itself, a range of local ranks in three parts: sinks, far keys,
window. One online softmax runs over all of them. Every key adds to its sum, sinks and window also add to a second sum,
the local mass, and only far keys add their values. So nothing is subtracted, and nothing cancels where the local mass
is near 1. Gradients flow to the values alone: `d values_j = sum_i A_ij g_i` over the queries for which key `j` is far,
with `A` recomputed from the log-sum-exp. Memory is `O(N)`; no atomics.

`far_mass` puts leaves.py around it, from level probabilities to leaf distributions and from what attention collects of
them to the kept mass. It owns the gradient of the whole chain, so that few tensors have an entry per token and leaf:
forward the keys' distributions and the values, backward the gradients of both.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_device, check_scoring, check_sinks, check_visits
from .launch import Tile, score_arguments, shared_memory, stride_arguments, tile_arguments
from .leaves import (
    MAX_TILE_LEAVES,
    gradient_dtype,
    kept_gradient,
    kept_of_values,
    leaf_distributions,
    leaf_dtype,
    leaf_gradient,
)
from .primitives import LOWEST, NEVER, tanh
from .ranges import far_ranges
from .types import FLAT_LOCAL, LocalPlan, LocalTensors, Scores, Scoring, contiguous, flat_local


@triton.jit
def _far_run(
    b_q,  # [BLOCK_M, BLOCK_D]
    b_acc,  # [BLOCK_M, BLOCK_V] fp32, unnormalised values
    b_max,  # [BLOCK_M] fp32, base 2
    b_sum,  # [BLOCK_M] fp32, of all causal keys
    b_local,  # [BLOCK_M] fp32, of window and sinks
    b_first,  # [BLOCK_M] int32, ranks: causal keys are [first, end), far ones [far, start)
    b_far,
    b_start,
    b_end,
    lo,
    hi,
    p_order,
    p_k,
    p_leaves,
    stride_ks,
    score_scale,
    score_cap,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Go on over the ranks `[lo, hi)`: without MASKED they are whole tiles of keys that are far from every row."""
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    for i_n in range(lo, hi, BLOCK_N):
        o_rank = i_n + o_n
        m_n = o_rank < hi
        o_key = o_rank
        if HAS_ORDER:
            o_key = tl.load(p_order + o_rank, mask=m_n, other=0)
        o_key = o_key.to(tl.int64)
        p_kt = p_k + o_key[None, :] * stride_ks + o_d[:, None]  # [BLOCK_D, BLOCK_N]
        p_value = p_leaves + o_key[:, None] * V + o_v[None, :]  # [BLOCK_N, BLOCK_V]
        if MASKED:
            b_kt = tl.load(p_kt, mask=(o_d < D)[:, None] & m_n[None, :], other=0.0)
        elif D == BLOCK_D:
            b_kt = tl.load(p_kt)
        else:
            b_kt = tl.load(p_kt, mask=(o_d < D)[:, None], other=0.0)
        b_s = tl.dot(b_q, b_kt, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        scale = score_scale
        if HAS_CAP:
            b_s = tanh(b_s * score_scale)
            scale = score_cap
        if MASKED:
            m_causal = (o_rank[None, :] >= b_first[:, None]) & (o_rank[None, :] < b_end[:, None])
            b_s = tl.where(m_causal, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_decay = tl.exp2(b_max - b_new)
        b_probs = tl.exp2(b_s * scale - b_new[:, None])
        b_sum = b_sum * b_decay + tl.sum(b_probs, 1)
        b_local = b_local * b_decay
        if MASKED:
            m_far = (o_rank[None, :] >= b_far[:, None]) & (o_rank[None, :] < b_start[:, None])
            b_local += tl.sum(tl.where(m_far, 0.0, b_probs), 1)
            b_probs = tl.where(m_far, b_probs, 0.0)
            b_value = tl.load(p_value, mask=m_n[:, None] & (o_v < V)[None, :], other=0.0)
        elif V == BLOCK_V:
            b_value = tl.load(p_value)
        else:
            b_value = tl.load(p_value, mask=(o_v < V)[None, :], other=0.0)
        b_acc = tl.dot(b_probs.to(b_value.dtype), b_value, b_acc * b_decay[:, None], input_precision="ieee")
        b_max = b_new
    return b_acc, b_max, b_sum, b_local


@triton.jit(do_not_specialize=["M", "S", "num_sink_tokens"])
def _far_kernel(
    q,
    k,
    leaves,  # [B, H, S, V]
    local_order,  # [B, S], unused without HAS_ORDER
    document_start,  # [B, M]
    local_start,
    local_end,
    values,  # [B, H, M, V] fp32
    local,  # [B, H, M] fp32
    lse,  # [B, H, M] fp32, base 2
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    M,
    S,
    H,
    num_sink_tokens,
    score_scale,
    score_cap,
    KV_GROUP: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    n_m = tl.cdiv(M, BLOCK_M)
    i_m = n_m - 1 - tl.program_id(0) % n_m  # the last queries have most keys: start them first
    i_bh = (tl.program_id(0) // n_m).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    m_m = o_m < M
    b_first = tl.load(document_start + i_b * M + o_m, mask=m_m, other=0)
    b_start = tl.load(local_start + i_b * M + o_m, mask=m_m, other=0)
    b_end = tl.load(local_end + i_b * M + o_m, mask=m_m, other=0)
    m_some = b_start < b_end  # rows of padding bound no loop
    b_far = tl.minimum(b_first + num_sink_tokens, b_start)
    p_q = q + i_b * stride_qb + i_h * stride_qh + o_m.to(tl.int64)[:, None] * stride_qt + o_d[None, :]
    b_q = tl.load(p_q, mask=m_some[:, None] & (o_d < D)[None, :], other=0.0)
    b_acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_local = tl.zeros([BLOCK_M], dtype=tl.float32)

    # whole tiles of keys that are far from every row, between two stretches that need masks
    lo = tl.min(tl.where(m_some, b_first, NEVER), 0)
    hi = tl.max(tl.where(m_some, b_end, 0), 0)
    lo = tl.minimum(lo, hi)
    near = tl.max(tl.where(m_some, b_far, 0), 0)
    near = tl.minimum(lo + tl.cdiv(tl.maximum(near - lo, 0), BLOCK_N) * BLOCK_N, hi)
    far = tl.min(tl.where(m_some, b_start, NEVER), 0)
    far = near + tl.maximum(tl.minimum(far, hi) - near, 0) // BLOCK_N * BLOCK_N
    p_order = local_order + i_b * S
    p_k = k + i_b * stride_kb + (i_h // KV_GROUP) * stride_kh
    p_leaves = leaves + i_bh * S * V
    for i_part in tl.static_range(3):
        if i_part == 0:
            begin = lo
            stop = near
        elif i_part == 1:
            begin = near
            stop = far
        else:
            begin = far
            stop = hi
        b_acc, b_max, b_sum, b_local = _far_run(
            *(b_q, b_acc, b_max, b_sum, b_local, b_first, b_far, b_start, b_end, begin, stop),
            *(p_order, p_k, p_leaves, stride_ks, score_scale, score_cap),
            *(D, V, BLOCK_D, BLOCK_V, BLOCK_N, HAS_ORDER, HAS_CAP, i_part != 1),
        )
    b_scale = tl.where(m_some, 1 / tl.where(m_some, b_sum, 1.0), 0.0)  # 0 in rows of padding
    o_row = i_bh * M + o_m
    tl.store(local + o_row, b_local * b_scale, mask=m_m)
    tl.store(lse + o_row, tl.where(m_some, b_max + tl.log2(tl.where(m_some, b_sum, 1.0)), float("-inf")), mask=m_m)
    p_values = values + o_row[:, None] * V + o_v[None, :]
    tl.store(p_values, b_acc * b_scale[:, None], mask=m_m[:, None] & (o_v < V)[None, :])


@triton.jit
def _far_gradient_run(
    b_k,  # [BLOCK_N, BLOCK_D]
    b_acc,  # [BLOCK_N, BLOCK_V] fp32
    b_first,  # [BLOCK_N] int32, ranks of queries
    b_last,
    lo,
    hi,
    p_order,
    p_q,
    p_lse,
    p_grad,
    stride_qt,
    score_scale,
    score_cap,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Go on over the queries of ranks `[lo, hi)`: without MASKED they are whole tiles, and every key is far."""
    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    for i_m in range(lo, hi, BLOCK_M):
        o_rank = i_m + o_m
        m_m = o_rank < hi
        o_row = o_rank
        if HAS_ORDER:
            o_row = tl.load(p_order + o_rank, mask=m_m, other=0)
        o_row = o_row.to(tl.int64)
        p_qt = p_q + o_row[None, :] * stride_qt + o_d[:, None]  # [BLOCK_D, BLOCK_M]
        p_g = p_grad + o_row[:, None] * V + o_v[None, :]  # [BLOCK_M, BLOCK_V]
        if MASKED:
            b_qt = tl.load(p_qt, mask=(o_d < D)[:, None] & m_m[None, :], other=0.0)
            b_lse = tl.load(p_lse + o_row, mask=m_m, other=0.0)
            b_g = tl.load(p_g, mask=m_m[:, None] & (o_v < V)[None, :], other=0.0)
        else:
            b_qt = tl.load(p_qt, mask=(o_d < D)[:, None], other=0.0)
            b_lse = tl.load(p_lse + o_row)
            b_g = tl.load(p_g, mask=(o_v < V)[None, :], other=0.0)
        b_s = tl.dot(b_k, b_qt, input_precision="ieee") * score_scale  # [BLOCK_N, BLOCK_M]
        if HAS_CAP:
            b_s = score_cap * tanh(b_s)
        b_probs = tl.exp2(b_s - b_lse[None, :])
        if MASKED:
            m_far = (o_rank[None, :] >= b_first[:, None]) & (o_rank[None, :] < b_last[:, None])
            b_probs = tl.where(m_far, b_probs, 0.0)
        b_acc = tl.dot(b_probs.to(b_g.dtype), b_g, b_acc, input_precision="ieee")
    return b_acc


@triton.jit(do_not_specialize=["M", "S"])
def _far_gradient_kernel(
    q,
    k,
    lse,  # [B, H, M] fp32, base 2
    grad,  # [B, H, M, V]
    query_order,  # [B, M], unused without HAS_ORDER
    local_order,  # [B, S], unused without HAS_ORDER
    first,  # [B, S], by local rank of the key, ranks in query_order
    last,
    dleaves,  # [B, H, S, V] fp32
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    M,
    S,
    H,
    score_scale,
    score_cap,
    KV_GROUP: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    n_n = tl.cdiv(S, BLOCK_N)
    i_n = tl.program_id(0) % n_n  # the first keys have most queries: they start first
    i_bh = (tl.program_id(0) // n_n).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H

    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    m_n = o_n < S
    b_first = tl.load(first + i_b * S + o_n, mask=m_n, other=0)
    b_last = tl.load(last + i_b * S + o_n, mask=m_n, other=0)
    m_some = b_first < b_last
    o_key = o_n
    if HAS_ORDER:
        o_key = tl.load(local_order + i_b * S + o_n, mask=m_n, other=0)
    o_key = o_key.to(tl.int64)
    p_k = k + i_b * stride_kb + (i_h // KV_GROUP) * stride_kh + o_key[:, None] * stride_ks + o_d[None, :]
    b_k = tl.load(p_k, mask=m_some[:, None] & (o_d < D)[None, :], other=0.0)
    b_acc = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)

    # whole tiles of queries from which all keys are far, between two stretches that need masks. Keys that are far from
    # no query count as keys here, and are written as 0.
    lo = tl.min(tl.where(m_some, b_first, NEVER), 0)
    hi = tl.max(tl.where(m_some, b_last, 0), 0)
    lo = tl.minimum(lo, hi)
    full = tl.max(tl.where(m_some, b_first, 0), 0)
    full = tl.minimum(lo + tl.cdiv(full - lo, BLOCK_M) * BLOCK_M, hi)
    rest = tl.min(tl.where(m_some, b_last, NEVER), 0)
    rest = full + tl.maximum(tl.minimum(rest, hi) - full, 0) // BLOCK_M * BLOCK_M
    for i_part in tl.static_range(3):
        if i_part == 0:
            begin = lo
            stop = full
        elif i_part == 1:
            begin = full
            stop = rest
        else:
            begin = rest
            stop = hi
        b_acc = _far_gradient_run(
            *(b_k, b_acc, b_first, b_last, begin, stop),
            *(query_order + i_b * M, q + i_b * stride_qb + i_h * stride_qh, lse + i_bh * M, grad + i_bh * M * V),
            *(stride_qt, score_scale, score_cap),
            *(D, V, BLOCK_D, BLOCK_V, BLOCK_M, HAS_ORDER, HAS_CAP, i_part != 1),
        )
    b_acc = tl.where(m_some[:, None], b_acc, 0.0)
    p_out = dleaves + (i_bh * S + o_key)[:, None] * V + o_v[None, :]
    tl.store(p_out, b_acc, mask=m_n[:, None] & (o_v < V)[None, :])


class FarTiles(NamedTuple):
    """Tiles (queries x keys) of the forward and of the gradient."""

    forward: Tile
    gradient: Tile


def choose_far_tiles(head_dim: int, leaves: int, dtype: torch.dtype, shared_memory: int) -> FarTiles:
    """Tiles that fit `shared_memory` bytes per program; every GPU from compute capability 8.0 on has 99 KB."""
    if dtype == torch.float32:
        return FarTiles(Tile(32, 16, 8, 2), Tile(16, 32, 8, 2))
    if max(head_dim, leaves) > 128:
        return FarTiles(Tile(64, 32, 8, 2), Tile(32, 64, 8, 2))
    if shared_memory < 160 * 1024:
        return FarTiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2))
    return FarTiles(Tile(128, 64, 8, 3), Tile(64, 128, 8, 3))


def _arguments(q: Tensor, k: Tensor, leaves: int, scoring: Scoring, tile: Tile) -> dict:
    """What both kernels are launched with."""
    return {
        **stride_arguments(q=(q, "bht"), k=(k, "bhs")),
        **score_arguments(q.shape[3], scoring),
        **tile_arguments(tile),
        "M": q.shape[2],
        "S": k.shape[2],
        "H": q.shape[1],
        "KV_GROUP": q.shape[1] // k.shape[1],
        "V": leaves,
        "BLOCK_V": max(16, triton.next_power_of_2(leaves)),
    }


def far_values(
    q: Tensor, k: Tensor, key_leaves: Tensor, plan: LocalTensors, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """What queries collect from the leaf distributions of far keys, and the mass they leave on local ones.

    Args:
        q, k: as in `far_mass`. key_leaves: contiguous `[B, H, S, V]`, of `leaf_dtype(q.dtype)`.

    Returns:
        values: float32 `[B, H, M, V]`. local: float32 `[B, H, M]`. Both 0 in rows of padding. lse: float32 `[B, H, M]`.
    """
    B, H, M, D = q.shape
    V = key_leaves.shape[3]
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    values = torch.empty(B, H, M, V, dtype=torch.float32, device=q.device)
    local = torch.empty(B, H, M, dtype=torch.float32, device=q.device)
    lse = torch.empty_like(local)
    tile = choose_far_tiles(D, V, q.dtype, shared_memory(q.device)).forward
    plan = contiguous(plan)
    _far_kernel[(B * H * triton.cdiv(M, tile.m),)](
        *(q, k, key_leaves),
        plan.document_start if plan.local_order is None else plan.local_order,
        *(plan.document_start, plan.local_start, plan.local_end, values, local, lse),
        num_sink_tokens=plan.num_sink_tokens,
        HAS_ORDER=plan.local_order is not None,
        **_arguments(q, k, V, scoring, tile),
    )
    return values, local, lse


def far_gradient(q: Tensor, k: Tensor, lse: Tensor, dvalues: Tensor, plan: LocalPlan, scoring: Scoring) -> Tensor:
    """float32 `[B, H, S, V]`: the gradient of `far_values` in its leaves.

    Args:
        lse: of `far_values`. dvalues: contiguous `[B, H, M, V]`, of `gradient_dtype(q.dtype)`.
    """
    B, H, _, D = q.shape
    S, V = k.shape[2], dvalues.shape[3]
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    order = plan.local_order
    far = far_ranges(plan, S)
    dleaves = torch.empty(B, H, S, V, dtype=torch.float32, device=q.device)
    tile = choose_far_tiles(D, V, q.dtype, shared_memory(q.device)).gradient
    _far_gradient_kernel[(B * H * triton.cdiv(S, tile.n),)](
        *(q, k, lse, dvalues),
        far.first if far.query_order is None else far.query_order,
        far.first if order is None else order.contiguous(),
        *(far.first, far.last, dleaves),
        HAS_ORDER=order is not None,
        **_arguments(q, k, V, scoring, tile),
    )
    return dleaves


@torch.library.custom_op(
    "topo_kernels::far_mass",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor query_probs, Tensor key_probs, Tensor query_weight, Tensor key_weight, "
    f"Tensor? visits, {FLAT_LOCAL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _far_mass(
    q: Tensor,
    k: Tensor,
    query_probs: Tensor,
    key_probs: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    visits: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`far_mass` of checked arguments, and what its gradient needs: values and log-sum-exp."""
    plan, scoring = LocalTensors(*arguments[:-2]), Scores(*arguments[-2:])
    with torch.cuda.device_of(q):
        leaves, key_mean = leaf_distributions(key_probs, key_weight, leaf_dtype(q.dtype))
        values, local, lse = far_values(q, k, leaves, plan, scoring)
        kept, query_mean = kept_of_values(query_probs, query_weight, values, local, visits)
    return kept, query_mean, key_mean, values, lse


@_far_mass.register_fake
def _(q, k, query_probs, key_probs, query_weight, key_weight, visits, *_rest):
    B, H, M, depth, arity = query_probs.shape
    V = arity**depth
    query_mean = (H, V) if visits is None else (depth, H, V)
    shapes = (depth, B, H, M), query_mean, (H, V), (B, H, M, V), (B, H, M)
    return tuple(query_probs.new_empty(shape) for shape in shapes)


@torch.library.custom_op(
    "topo_kernels::far_mass_gradient",
    mutates_args=(),
    schema="(Tensor dkept, Tensor dquery_mean, Tensor dkey_mean, Tensor values, Tensor lse, Tensor q, Tensor k, "
    "Tensor query_probs, Tensor key_probs, Tensor query_weight, Tensor key_weight, Tensor? visits, "
    f"{FLAT_LOCAL}) -> (Tensor, Tensor)",
)
def _far_mass_gradient(
    dkept: Tensor,
    dquery_mean: Tensor,
    dkey_mean: Tensor,
    values: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    query_probs: Tensor,
    key_probs: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    visits: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Gradients of `query_probs` and `key_probs`: float32, contiguous."""
    plan, scoring = LocalTensors(*arguments[:-2]), Scores(*arguments[-2:])
    with torch.cuda.device_of(q):
        dquery_probs, dvalues = kept_gradient(
            query_probs, query_weight, values, dkept, dquery_mean, gradient_dtype(q.dtype), visits
        )
        dleaves = far_gradient(q, k, lse, dvalues, plan, scoring)
        del dvalues  # memory peaks here
        return dquery_probs, leaf_gradient(key_probs, key_weight, dleaves, dkey_mean)


@_far_mass_gradient.register_fake
def _(dkept, dquery_mean, dkey_mean, values, lse, q, k, query_probs, key_probs, *_rest):
    return query_probs.new_empty(query_probs.shape), key_probs.new_empty(key_probs.shape)


def _setup_context(ctx, inputs, output) -> None:
    values, lse = output[3:]
    ctx.save_for_backward(values, lse, *inputs[:-3])
    ctx.options = inputs[-3:]
    ctx.mark_non_differentiable(values, lse)
    ctx.set_materialize_grads(False)  # zeros for the values would take as much memory as they do


def _backward(ctx, dkept, dquery_mean, dkey_mean, *_rest):
    values, lse, *tensors = ctx.saved_tensors
    query_probs, visits = tensors[2], tensors[6]
    B, H, M, depth, _ = query_probs.shape
    zeros, mean = query_probs.new_zeros, (H, values.shape[3])
    query_mean = mean if visits is None else (depth, *mean)
    missing = (depth, B, H, M), query_mean, mean
    dprobs = _far_mass_gradient(
        *(zeros(shape) if d is None else d for d, shape in zip((dkept, dquery_mean, dkey_mean), missing, strict=True)),
        values,
        lse,
        *tensors,
        *ctx.options,
    )
    return None, None, *dprobs, *[None] * 10


_far_mass.register_autograd(_backward, setup_context=_setup_context)


def far_mass(
    q: Tensor,
    k: Tensor,
    query_probs: Tensor,
    key_probs: Tensor,
    plan: LocalPlan,
    query_weight: Tensor,
    key_weight: Tensor,
    scoring: Scoring,
    visits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mass that dense causal attention keeps at every depth of the tree, and the mean leaf distributions.

    Query `i` attends to the keys `local_order[document_start:local_end]`; of these
    `local_order[document_start + num_sink_tokens:local_start]` are far and the others, window and sinks, local. With
    `A` the softmax over all of them and `P^d` the distributions over balls at depth `d` that level probabilities imply
    (docs/method.md, section 4): `kept_i(d) = sum_{j local} A_ij + <P_query^d(i), sum_{j far} A_ij P_key^d(j)>`.
    Differentiable in the probabilities only: q and k are those of a frozen model.

    Args:
        q: `[B, H, M, D]`, float16, bfloat16 or float32, D from 16 to 256: the queries that are asked for, all or a
            sample.
        k: `[B, H_kv, S, D]`, q's dtype, H a multiple of H_kv. Half-precision q and k multiply leaf distributions as
            float16, and their gradients as bfloat16.
        query_probs, key_probs: float32 `[B, H, M, L, p]`, `[B, H, S, L, p]`, `p**L` from 2 to 256. Any strides here and
            above.
        plan: of these M queries. A `local_order` of None also says that there is no padding and that `local_end` rises
            along the queries.
        query_weight, key_weight: float32 `[B, M]`, `[B, S]`, >= 0, of tokens in the means. Weight 0 is padding: no
            probability of these tokens is read, and they get a gradient of 0.
        visits: None, or int32 `[H]`, from 1 to 8: of each query of a head. In the place of `P_query^d` stands at every
            depth `1 - (1 - P_query^d)**visits`, the probability of a ball to be among so many draws. Values are
            trusted: checking them would wait for the GPU.

    Returns:
        kept: float32 `[L, B, H, M]`, for the depths `1..L`; 0 in rows of padding (`local_start == local_end`).
        query_mean, key_mean: float32 `[H, p**L]`: `sum_n weight_n P^L(n)`, over rows and tokens. With `visits`
            query_mean is `[L, H, p**L]`: at the depths `1..L` what stands in the place of `P_query^d(n)`. It is no sum
            over finer balls; the entry of leaf `v` at depth `d` is that of its ball `v % p**d`, so that the first
            `p**d` entries are those of all balls, and `(query_mean[d - 1] * key_mean).sum(-1)` is the density at `d`.

    Raises:
        ValueError: a shape, dtype, device or option does not fit; the message names the argument.
        RuntimeError: the device cannot run the kernels.
    """
    probs = {"query_probs": query_probs, "key_probs": key_probs}
    weights = {"query_weight": query_weight, "key_weight": key_weight}
    _check_scores(q, k)
    check_sinks(plan.num_sink_tokens)
    check_scoring(scoring)
    check_visits(visits, q)
    _check_tokens(q, k, probs, weights, plan)
    check_device("far_mass", q=q)
    arguments = *probs.values(), *weights.values(), visits, *flat_local(plan, scoring)
    kept, query_mean, key_mean, _, _ = _far_mass(q.detach(), k.detach(), *arguments)
    return kept, query_mean, key_mean


def _check_scores(q: Tensor, k: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k)):
        if tensor.ndim != 4 or tensor.numel() == 0:
            raise ValueError(f"{name} must have four dimensions, none of them 0, got {tuple(tensor.shape)}.")
    B, H, _, D = q.shape
    kv_heads, S = k.shape[1], k.shape[2]
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q must be float16, bfloat16 or float32, got {q.dtype}.")
    if not 16 <= D <= 256:
        raise ValueError(f"q must have a head dimension D from 16 to 256, got {D}.")
    if k.shape != (B, kv_heads, S, D) or H % kv_heads:
        raise ValueError(
            f"k must have shape [B={B}, H_kv, S, D={D}] with H_kv a divisor of q's {H} heads, got {tuple(k.shape)}."
        )
    if k.dtype != q.dtype:
        raise ValueError(f"k must have q's dtype {q.dtype}, got {k.dtype}.")


def _check_tokens(q: Tensor, k: Tensor, probs: dict[str, Tensor], weights: dict[str, Tensor], plan: LocalPlan) -> None:
    """Refuse what does not fit the checked q and k."""
    B, H, M = q.shape[:3]
    S = k.shape[2]
    depth, arity = probs["query_probs"].shape[-2:] if probs["query_probs"].ndim == 5 else (0, 0)
    if depth < 1 or arity < 2 or arity**depth > MAX_TILE_LEAVES:
        raise ValueError(
            f"query_probs must have shape [B, H, M, L, p] with L >= 1, p >= 2 and p**L up to {MAX_TILE_LEAVES}, got "
            f"{tuple(probs['query_probs'].shape)}."
        )
    needs: list[tuple[str, Tensor, torch.dtype, tuple[int, ...]]] = [
        ("k", k, q.dtype, tuple(k.shape)),
        *((name, probs[name], torch.float32, (B, H, n, depth, arity)) for name, n in zip(probs, (M, S), strict=True)),
        *((name, weights[name], torch.float32, (B, n)) for name, n in zip(weights, (M, S), strict=True)),
        *((name, getattr(plan, name), torch.int32, (B, M)) for name in ("document_start", "local_start", "local_end")),
    ]
    if plan.local_order is not None:
        needs.append(("local_order", plan.local_order, torch.int32, (B, S)))
    for name, tensor, dtype, shape in needs:
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} of shape {list(shape)}, got {tensor.dtype} {list(tensor.shape)}.")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}.")
