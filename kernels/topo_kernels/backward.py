"""Gradients of the hard topology attention: dq, dk and dv, recomputed from `out` and `lse`, in `O(N)` memory.

The visible pairs are three disjoint sets, the tree, the windows and the sinks (see attention.py). Seen from a query
each set is a range of sorted keys; seen from a key it is a range of sorted queries, because both sides are sorted
alike. So there are two kernels: `_dq_kernel` gives a block of queries to a program and walks over keys, `_dkdv_kernel`
gives a block of keys to a program and walks over queries. Each sums in a fixed order; there are no atomics.

Keys of the tree are sorted by route and heads of a group may route differently, so the tree's dk and dv are written
per route and added up by the local pass, which runs per key head. A sink is seen by its whole document: its queries
are cut into chunks, each summed by a program of its own (`sink_ranges`), and the local pass adds the chunks.

Where queries visit several balls, each visit is a tree of its own over the same sorted keys: dq, and the tree's dk and
dv, go on from what the visits before have left.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_device, check_plan, check_qkv
from .launch import Tile, attention_arguments, derived, stride_arguments
from .primitives import NEVER, tanh
from .ranges import QueryRanges, SinkChunks, local_ranges, tree_ranges
from .types import FLAT, PlanTensors, Scores, Scoring, by_visit


@triton.jit
def _dq_run(
    b_q,  # [BLOCK_M, BLOCK_D]
    b_dout,  # [BLOCK_M, BLOCK_D]
    b_lse,  # [BLOCK_M] fp32, base 2
    b_delta,  # [BLOCK_M] fp32, <out, dout>
    b_dq,  # [BLOCK_M, BLOCK_D] fp32
    b_start,  # [BLOCK_M] int32, ranks
    b_end,  # [BLOCK_M] int32
    lo,
    hi,
    p_order,
    p_k,
    p_v,
    stride_ks,
    stride_vs,
    score_scale,
    score_cap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the ranks `[lo, hi)`: each row's own part of them if MASKED, else all, in whole tiles."""
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    for i_n in range(lo, hi, BLOCK_N):
        o_rank = i_n + o_n
        m_n = o_rank < hi
        m_nd = m_n[:, None] & (o_d < D)[None, :] if MASKED else (o_d < D)[None, :]
        o_key = o_rank
        if HAS_ORDER:
            o_key = tl.load(p_order + o_rank, mask=m_n, other=0)
        o_key = o_key.to(tl.int64)
        b_k = tl.load(p_k + o_key[:, None] * stride_ks + o_d[None, :], mask=m_nd, other=0.0)
        b_v = tl.load(p_v + o_key[:, None] * stride_vs + o_d[None, :], mask=m_nd, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * score_scale  # [BLOCK_M, BLOCK_N]
        b_t = b_s
        if HAS_CAP:
            b_t = tanh(b_s)
            b_s = score_cap * b_t
        b_probs = tl.exp2(b_s - b_lse[:, None])
        if MASKED:
            m_s = (o_rank[None, :] >= b_start[:, None]) & (o_rank[None, :] < b_end[:, None])
            b_probs = tl.where(m_s, b_probs, 0.0)
        b_dprobs = tl.dot(b_dout, tl.trans(b_v), input_precision="ieee")
        b_ds = b_probs * (b_dprobs - b_delta[:, None])
        if HAS_CAP:
            b_ds *= 1 - b_t * b_t
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq


@triton.jit
def _dq_ranges(
    b_q,
    b_dout,
    b_lse,
    b_delta,
    b_dq,
    b_start,
    b_end,
    p_order,
    p_k,
    p_v,
    stride_ks,
    stride_vs,
    score_scale,
    score_cap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """Add each row's own range `[b_start, b_end)`, in runs as `_attend` does."""
    b_start = tl.where(b_start < b_end, b_start, NEVER)
    lo = tl.min(b_start, 0)
    while lo < NEVER:
        hi = lo
        reach = tl.max(tl.where(b_start <= lo, b_end, 0), 0)
        while reach > hi:
            hi = reach
            reach = tl.max(tl.where(b_start <= hi + BLOCK_N, b_end, 0), 0)
        b_dq = _dq_run(
            *(b_q, b_dout, b_lse, b_delta, b_dq, b_start, b_end, lo, hi),
            *(p_order, p_k, p_v, stride_ks, stride_vs, score_scale, score_cap),
            *(D, BLOCK_D, BLOCK_N, HAS_ORDER, HAS_CAP, True),
        )
        lo = tl.min(tl.where(b_start > hi, b_start, NEVER), 0)
    return b_dq


@triton.jit(do_not_specialize=["T", "S", "num_sink_tokens"])
def _dq_kernel(
    q,
    k,
    v,
    out,  # [B, H, T, D], read by the local pass
    dout,  # [B, H, T, D]
    lse,  # [B, H, T] fp32, base 2
    delta,  # [B, H, T] fp32, written by the local pass
    dq,  # [B, T, H, D], written by the local pass, added to by the tree pass
    query_order,  # [B, R, T], tree pass
    key_order,  # [B, R, S] in the tree pass, [B, S] in the local pass, unused without HAS_ORDER
    document_start,  # [B, T], local pass
    range_start,  # [B, R, T] in sorted query order, or [B, T]
    range_end,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_gb,
    stride_gh,
    stride_gt,
    T,
    S,
    H,
    num_sink_tokens,
    scale,
    score_scale,
    score_cap,
    GROUP: tl.constexpr,  # query heads of one program: they share the keys and their order
    KV_GROUP: tl.constexpr,
    ROUTE_GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SINK: tl.constexpr,
    TREE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    n_m = tl.cdiv(T, TOKENS)
    i_m = n_m - 1 - tl.program_id(0) % n_m  # within a ball the last queries have most keys: start them first
    i_bg = tl.program_id(0) // n_m
    i_b = (i_bg // (H // GROUP)).to(tl.int64)
    i_first = i_bg % (H // GROUP) * GROUP
    i_kv = (i_first // KV_GROUP).to(tl.int64)
    i_br = i_b * (H // ROUTE_GROUP) + i_first // ROUTE_GROUP

    o_row = tl.arange(0, BLOCK_M)
    o_m = i_m * TOKENS + o_row // GROUP
    o_h = (i_first + o_row % GROUP).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_row = o_m < T
    b_start = tl.load(range_start + i_br * T + o_m, mask=m_row, other=0)
    b_end = tl.load(range_end + i_br * T + o_m, mask=m_row, other=0)
    m_some = b_start < b_end
    if tl.max(b_end - b_start, 0) > 0 or not TREE:
        o_t = o_m
        if TREE:
            o_t = tl.load(query_order + i_br * T + o_m, mask=m_some, other=0)
        o_t = o_t.to(tl.int64)
        m_md = m_some[:, None] & (o_d < D)[None, :]
        p_q = q + i_b * stride_qb + (o_h * stride_qh + o_t * stride_qt)[:, None] + o_d[None, :]
        p_dout = dout + i_b * stride_gb + (o_h * stride_gh + o_t * stride_gt)[:, None] + o_d[None, :]
        p_dq = dq + ((i_b * T + o_t) * H + o_h)[:, None] * D + o_d[None, :]
        o_stat = (i_b * H + o_h) * T + o_t
        p_order = key_order + i_br * S
        p_k = k + i_b * stride_kb + i_kv * stride_kh
        p_v = v + i_b * stride_vb + i_kv * stride_vh
        b_q = tl.load(p_q, mask=m_md, other=0.0)
        b_dout = tl.load(p_dout, mask=m_md, other=0.0)
        b_lse = tl.load(lse + o_stat, mask=m_some, other=0.0)
        b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        lo = 0
        common = 0
        if TREE:
            b_delta = tl.load(delta + o_stat, mask=m_some, other=0.0)
            # whole tiles that every row sees, then what is left, as in the forward
            lo = tl.min(tl.where(m_some, b_start, NEVER), 0)
            common = tl.minimum(tl.min(tl.where(m_row, b_end, NEVER), 0), tl.max(b_end, 0))
            common = tl.where(tl.max(b_start, 0) == lo, tl.maximum(common - lo, 0) // BLOCK_N * BLOCK_N, 0)
            b_dq = _dq_run(
                *(b_q, b_dout, b_lse, b_delta, b_dq, b_start, b_end, lo, lo + common),
                *(p_order, p_k, p_v, stride_ks, stride_vs, score_scale, score_cap),
                *(D, BLOCK_D, BLOCK_N, HAS_ORDER, HAS_CAP, False),
            )
        else:
            p_out = out + i_b * stride_ob + (o_h * stride_oh + o_t * stride_ot)[:, None] + o_d[None, :]
            b_out = tl.load(p_out, mask=m_md, other=0.0)
            b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
            tl.store(delta + o_stat, b_delta, mask=m_row)
        b_dq = _dq_ranges(
            *(b_q, b_dout, b_lse, b_delta, b_dq, tl.maximum(b_start, lo + common), b_end),
            *(p_order, p_k, p_v, stride_ks, stride_vs, score_scale, score_cap),
            *(D, BLOCK_D, BLOCK_N, HAS_ORDER, HAS_CAP),
        )
        if TREE:
            b_dq = b_dq * scale + tl.load(p_dq, mask=m_md, other=0.0).to(tl.float32)
            tl.store(p_dq, b_dq.to(dq.dtype.element_ty), mask=m_md)
        else:
            b_first = tl.load(document_start + i_b * T + o_m, mask=m_row, other=0)
            b_dq = _dq_ranges(
                *(b_q, b_dout, b_lse, b_delta, b_dq),
                *(b_first, tl.where(m_some, tl.minimum(b_first + num_sink_tokens, b_start), 0)),
                *(p_order, p_k, p_v, stride_ks, stride_vs, score_scale, score_cap),
                *(D, BLOCK_D, BLOCK_SINK, HAS_ORDER, HAS_CAP),
            )  # 0 in padding rows
            tl.store(p_dq, (b_dq * scale).to(dq.dtype.element_ty), mask=m_row[:, None] & (o_d < D)[None, :])


@triton.jit
def _dkdv_run(
    b_k,  # [BLOCK_N, BLOCK_D]
    b_v,  # [BLOCK_N, BLOCK_D]
    b_dk,  # [BLOCK_N, BLOCK_D] fp32
    b_dv,  # [BLOCK_N, BLOCK_D] fp32
    b_first,  # [BLOCK_N] int32, ranks of queries
    b_last,  # [BLOCK_N] int32
    lo,
    hi,
    p_order,
    p_q,  # all four at the first head of the group
    p_dout,
    p_lse,
    p_delta,
    stride_qh,
    stride_qt,
    stride_gh,
    stride_gt,
    T,
    score_scale,
    score_cap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the queries of ranks `[lo, hi)`: each key's own part of them if MASKED, else all, in whole tiles."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    o_row = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_h = (o_row % GROUP).to(tl.int64)
    for i_m in range(lo, hi, TOKENS):
        o_rank = i_m + o_row // GROUP
        m_m = o_rank < hi
        m_md = m_m[:, None] & (o_d < D)[None, :] if MASKED else (o_d < D)[None, :]
        o_t = tl.load(p_order + o_rank, mask=m_m, other=0).to(tl.int64)
        b_q = tl.load(p_q + (o_h * stride_qh + o_t * stride_qt)[:, None] + o_d[None, :], mask=m_md, other=0.0)
        b_dout = tl.load(p_dout + (o_h * stride_gh + o_t * stride_gt)[:, None] + o_d[None, :], mask=m_md, other=0.0)
        b_lse = tl.load(p_lse + o_h * T + o_t, mask=m_m, other=0.0)
        b_delta = tl.load(p_delta + o_h * T + o_t, mask=m_m, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * score_scale  # [BLOCK_N, BLOCK_M]
        b_t = b_s
        if HAS_CAP:
            b_t = tanh(b_s)
            b_s = score_cap * b_t
        b_probs = tl.exp2(b_s - b_lse[None, :])
        if MASKED:
            m_s = (o_rank[None, :] >= b_first[:, None]) & (o_rank[None, :] < b_last[:, None])
            b_probs = tl.where(m_s, b_probs, 0.0)
        b_dv = tl.dot(b_probs.to(b_dout.dtype), b_dout, b_dv, input_precision="ieee")
        b_dprobs = tl.dot(b_v, tl.trans(b_dout), input_precision="ieee")
        b_ds = b_probs * (b_dprobs - b_delta[None, :])
        if HAS_CAP:
            b_ds *= 1 - b_t * b_t
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit(do_not_specialize=["T", "S", "N", "num_chunks", "num_slots"])
def _dkdv_kernel(
    q,
    k,
    v,
    dout,  # [B, H, T, D]
    lse,  # [B, H, T] fp32, base 2
    delta,  # [B, H, T] fp32
    query_order,  # [B, R, T]; only ranks in some range are read
    key_order,  # [B, R, N], unused without HAS_ORDER
    first,  # [B, R, N], ranks of queries
    last,
    dk,  # row n of head group g is row n, in the local pass row key_order[n], of dk[b, g]
    dv,
    tree_slot,  # [B, tree routes, S]; key -> its row in tree_dk, -1 for none
    tree_dk,  # [B, H // TREE_HEADS, S, D]
    tree_dv,
    chunk_first,  # [B, S]; by local rank, the chunks that hold gradients of this sink
    chunk_last,
    sink_index,  # [B, S]; by local rank, which sink of its document
    sink_dk,  # [B, H_kv, num_chunks * num_slots, D] fp32
    sink_dv,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_db,
    stride_dh,
    stride_ds,
    T,
    S,
    N,
    H,
    num_chunks,
    num_slots,
    scale,
    score_scale,
    score_cap,
    HEADS: tl.constexpr,  # query heads of one program: they share the keys and the order of queries
    GROUP: tl.constexpr,  # of these, how many share a tile of queries
    KV_GROUP: tl.constexpr,
    ROUTE_GROUP: tl.constexpr,
    TREE_HEADS: tl.constexpr,
    TREE_ROUTE_GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ADD: tl.constexpr,  # a further visit: to what dk and dv hold already
    MERGE: tl.constexpr,  # the local pass: adds the tree's and the sink chunks' gradients
):
    n_n = tl.cdiv(N, BLOCK_N)
    i_n = tl.program_id(0) % n_n  # within a ball the first keys have most queries: they start first
    i_bg = tl.program_id(0) // n_n
    i_b = (i_bg // (H // HEADS)).to(tl.int64)
    i_g = i_bg % (H // HEADS)
    i_kv = (i_g * HEADS // KV_GROUP).to(tl.int64)
    i_br = i_b * (H // ROUTE_GROUP) + i_g * HEADS // ROUTE_GROUP

    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < N
    m_d = o_d < D
    b_first = tl.load(first + i_br * N + o_n, mask=m_n, other=0)
    b_last = tl.load(last + i_br * N + o_n, mask=m_n, other=0)
    m_some = b_first < b_last
    o_key = o_n
    if HAS_ORDER:
        o_key = tl.load(key_order + i_br * N + o_n, mask=m_n, other=0)
    o_key = o_key.to(tl.int64)
    m_nd = m_some[:, None] & m_d[None, :]
    p_k = k + i_b * stride_kb + i_kv * stride_kh + o_key[:, None] * stride_ks + o_d[None, :]
    p_v = v + i_b * stride_vb + i_kv * stride_vh + o_key[:, None] * stride_vs + o_d[None, :]
    b_k = tl.load(p_k, mask=m_nd, other=0.0)
    b_v = tl.load(p_v, mask=m_nd, other=0.0)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    p_order = query_order + i_br * T

    # whole tiles of queries that see every key of the block: keys of one ball are seen up to its last query
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    top = tl.max(tl.where(m_some, b_last, 0), 0)
    common = 0
    if not MERGE:  # windows are too short
        same = tl.min(tl.where(m_some, b_last, top), 0) == top
        latest = tl.max(tl.where(m_some, b_first, 0), 0)
        common = tl.where(same, tl.maximum(top - latest, 0) // TOKENS * TOKENS, 0)
    b_rest = tl.minimum(b_last, top - common)
    b_from = tl.where(b_first < b_rest, b_first, NEVER)

    for i_h in range(0, HEADS, GROUP):
        o_h = (i_g * HEADS + i_h).to(tl.int64)
        p_q = q + i_b * stride_qb + o_h * stride_qh
        p_dout = dout + i_b * stride_gb + o_h * stride_gh
        p_lse = lse + (i_b * H + o_h) * T
        p_delta = delta + (i_b * H + o_h) * T
        lo = tl.min(b_from, 0)
        while lo < NEVER:
            # one run, as in `_attend`: the union of the keys' ranges has gaps where keys are sorted by ball
            hi = lo
            reach = tl.max(tl.where(b_from <= lo, b_rest, 0), 0)
            while reach > hi:
                hi = reach
                reach = tl.max(tl.where(b_from <= hi + TOKENS, b_rest, 0), 0)
            b_dk, b_dv = _dkdv_run(
                *(b_k, b_v, b_dk, b_dv, b_from, b_rest, lo, hi),
                *(p_order, p_q, p_dout, p_lse, p_delta),
                *(stride_qh, stride_qt, stride_gh, stride_gt, T, score_scale, score_cap),
                *(GROUP, D, BLOCK_D, BLOCK_M, HAS_CAP, True),
            )
            lo = tl.min(tl.where(b_from > hi, b_from, NEVER), 0)
        if not MERGE:
            b_dk, b_dv = _dkdv_run(
                *(b_k, b_v, b_dk, b_dv, b_first, b_last, top - common, top),
                *(p_order, p_q, p_dout, p_lse, p_delta),
                *(stride_qh, stride_qt, stride_gh, stride_gt, T, score_scale, score_cap),
                *(GROUP, D, BLOCK_D, BLOCK_M, HAS_CAP, False),
            )
    b_dk *= scale

    if MERGE:
        for i_h in range(0, HEADS, TREE_HEADS):
            o_h = i_g * HEADS + i_h
            i_route = i_b * (H // TREE_ROUTE_GROUP) + o_h // TREE_ROUTE_GROUP
            o_slot = tl.load(tree_slot + i_route * S + o_key, mask=m_n, other=-1).to(tl.int64)
            m_slot = (o_slot >= 0)[:, None] & m_d[None, :]
            o_tree = ((i_b * (H // TREE_HEADS) + o_h // TREE_HEADS) * S + o_slot)[:, None] * D + o_d[None, :]
            b_dk += tl.load(tree_dk + o_tree, mask=m_slot, other=0.0).to(tl.float32)
            b_dv += tl.load(tree_dv + o_tree, mask=m_slot, other=0.0).to(tl.float32)
        b_low = tl.load(chunk_first + i_b * S + o_n, mask=m_n, other=0)
        b_high = tl.load(chunk_last + i_b * S + o_n, mask=m_n, other=0)
        o_sink = tl.load(sink_index + i_b * S + o_n, mask=m_n, other=0)
        for i_c in range(tl.min(tl.where(b_low < b_high, b_low, NEVER), 0), tl.max(b_high, 0)):
            m_chunk = ((b_low <= i_c) & (i_c < b_high))[:, None] & m_d[None, :]
            o_chunk = (((i_b * (H // KV_GROUP) + i_kv) * num_chunks + i_c) * num_slots + o_sink)[:, None] * D
            b_dk += tl.load(sink_dk + o_chunk + o_d[None, :], mask=m_chunk, other=0.0)
            b_dv += tl.load(sink_dv + o_chunk + o_d[None, :], mask=m_chunk, other=0.0)
    o_out = o_n.to(tl.int64)
    if MERGE:
        o_out = o_key
    else:  # whole tiles went to keys that nobody sees, too
        b_dk = tl.where(m_some[:, None], b_dk, 0.0)
        b_dv = tl.where(m_some[:, None], b_dv, 0.0)
    o_out = (i_b * stride_db + i_g.to(tl.int64) * stride_dh + o_out * stride_ds)[:, None] + o_d[None, :]
    m_out = m_n[:, None] & m_d[None, :]
    if ADD:
        m_out = m_nd  # of the other keys nothing changes
        b_dk += tl.load(dk + o_out, mask=m_out, other=0.0)
        b_dv += tl.load(dv + o_out, mask=m_out, other=0.0)
    tl.store(dk + o_out, b_dk.to(dk.dtype.element_ty), mask=m_out)
    tl.store(dv + o_out, b_dv.to(dv.dtype.element_ty), mask=m_out)


class BackwardTiles(NamedTuple):
    """Tiles (queries x keys) of the three launches, and how many queries share a partial sum of the sinks."""

    dq: Tile
    dkdv: Tile
    sink: Tile
    chunk: int


def choose_backward_tiles(head_dim: int, dtype: torch.dtype) -> BackwardTiles:
    """Tiles that fit the 99 KB of shared memory every GPU from compute capability 8.0 on has."""
    if dtype == torch.float32:
        small = Tile(16, 16, 4, 2) if head_dim > 128 else Tile(32, 32, 8, 2)
        return BackwardTiles(small, small, Tile(16, 16, 4, 2), 512)
    if head_dim > 128:
        return BackwardTiles(Tile(64, 16, 8, 2), Tile(32, 32, 8, 2), Tile(32, 16, 4, 2), 512)
    # as in the forward: several small programs to a multiprocessor hide each other's gathers
    return BackwardTiles(Tile(64, 32, 4, 3), Tile(32, 64, 4, 3), Tile(64, 16, 4, 2), 512)


def _shared_heads(heads: int, rows: int) -> int:
    """How many of `heads` heads share a block of `rows`: a power of two that leaves at least 8 tokens to the block."""
    return math.gcd(heads, max(1, rows // 8))


class _Inputs(NamedTuple):
    """What all launches read; see `attention_backward`. The last dimensions have stride 1, `lse` is contiguous."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    dout: Tensor
    lse: Tensor
    scoring: Scoring


class _Sums(NamedTuple):
    """What the local pass of dk and dv adds: the tree's gradients and those of the sinks, chunk by chunk."""

    tree_slot: Tensor
    tree_dk: Tensor
    tree_dv: Tensor
    chunks: SinkChunks
    sink_dk: Tensor
    sink_dv: Tensor
    num_chunks: int
    num_slots: int


@torch.library.custom_op(
    "topo_kernels::attention_backward",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor dout, {FLAT}) -> (Tensor, Tensor, Tensor)",
)
def attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `topology_attention`.

    Among a visit's sorted queries whose tree range is not empty, both ends of the ranges must rise. Entries of
    `query_order` with an empty range, and of `key_order` in no range, may be anything.

    Args:
        q: `[B, H, T, D]`, float16, bfloat16 or float32; D from 16 to 256. k, v: `[B, H_kv, S, D]`.
        out: `[B, H, T, D]`, q's dtype; lse: float32 `[B, H, T]`, base 2, of all visible keys: the forward's.
        dout: `[B, H, T, D]`, q's dtype: the gradient of `out`. Any strides here and above.
        arguments: `flat(plan, scoring)` of `topology_attention`'s.

    Returns:
        dq `[B, H, T, D]`, dk and dv `[B, H_kv, S, D]` in q's dtype, the transposed views of contiguous
        `[B, length, heads, D]`. 0 for padding queries and for keys that no query sees.

    Raises:
        ValueError: a shape, dtype, device or option does not fit; the message names the argument.
        RuntimeError: the device cannot run the kernels.
    """
    plan, scoring = PlanTensors(*arguments[:-2]), Scores(*arguments[-2:])
    check_qkv(q, k, v)
    check_plan(q, k, plan)
    for name, tensor, shape, dtype in (
        ("out", out, q.shape, q.dtype),
        ("dout", dout, q.shape, q.dtype),
        ("lse", lse, q.shape[:3], torch.float32),
    ):
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} must have shape {list(shape)}, dtype {dtype} and q's device {q.device}, got "
                f"{list(tensor.shape)}, {tensor.dtype} and {tensor.device}."
            )
    check_device("attention_backward", q=q)
    B, H, T, D = q.shape
    kv_heads, S = k.shape[1], k.shape[2]
    visits = by_visit(plan)
    # nothing is rounded between several tree passes
    of_sums = q.dtype if len(visits) == 1 else torch.float32
    dq = q.new_empty(B, T, H, D, dtype=of_sums)
    dk, dv = k.new_empty(B, S, kv_heads, D), k.new_empty(B, S, kv_heads, D)
    if q.numel() == 0:
        return dq.to(q.dtype).transpose(1, 2), dk.zero_().transpose(1, 2), dv.zero_().transpose(1, 2)
    q, k, v, out, dout = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, out, dout))
    inputs, plan = _Inputs(q, k, v, out, dout, lse.contiguous(), scoring), visits[0]
    tiles = choose_backward_tiles(D, q.dtype)
    kv_group, route_group = H // kv_heads, H // plan.query_order.shape[1]
    shared = math.gcd(kv_group, route_group)  # heads that share route and keys
    with torch.cuda.device_of(q):
        delta = _launch_dq(inputs, visits, dq, tiles.dq)
        by_key, tree_slot = tree_ranges(plan)
        tree_dk, tree_dv = (q.new_empty(B, H // shared, S, D, dtype=of_sums) for _ in range(2))
        _launch_dkdv(inputs, delta, by_key, tree_dk, tree_dv, shared, tiles.dkdv)
        for visit in visits[1:]:
            by_key, slot = tree_ranges(visit)
            _launch_dkdv(inputs, delta, by_key, tree_dk, tree_dv, shared, tiles.dkdv, add=True)
            tree_slot = torch.maximum(tree_slot, slot)  # a key's rank is the same in all visits that see it
        by_rank, by_chunk, chunks = derived(local_ranges, plan, S, tiles.chunk, tiles.sink.n)
        sink_dk, sink_dv, num_chunks, num_slots = tree_dk, tree_dv, triton.cdiv(T, tiles.chunk), 0
        if by_chunk is not None:
            slots = by_chunk.first.shape[2]
            num_slots = slots // num_chunks
            sink_dk, sink_dv = torch.empty(2, B, kv_heads, slots, D, dtype=torch.float32, device=q.device)
            _launch_dkdv(inputs, delta, by_chunk, sink_dk, sink_dv, kv_group, tiles.sink)
        sums = _Sums(tree_slot, tree_dk, tree_dv, chunks, sink_dk, sink_dv, num_chunks, num_slots)
        _launch_dkdv(inputs, delta, by_rank, dk.transpose(1, 2), dv.transpose(1, 2), kv_group, tiles.dkdv, sums)
    return dq.to(q.dtype).transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


@attention_backward.register_fake
def _(q, k, v, *_rest):
    def like(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)

    return like(q), like(k), like(v)


def _launch_dq(inputs: _Inputs, visits: list[PlanTensors], dq: Tensor, tile: Tile) -> Tensor:
    """Write dq, the local pass and then the tree's visits, and return `delta` float32 `[B, H, T]`."""
    q, k, v, out, dout, lse, scoring = inputs
    plan = visits[0]
    B, H, T, _ = q.shape
    delta = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    kv_group, route_group = H // k.shape[1], H // plan.query_order.shape[1]
    tensors = q, k, v, out, dout, lse, delta, dq
    arguments = {
        **attention_arguments(q, k, v, scoring, tile),
        **stride_arguments(o=(out, "bht"), g=(dout, "bht")),
        "num_sink_tokens": plan.num_sink_tokens,
        "scale": scoring.scale,
        "BLOCK_SINK": 16,
    }
    group = _shared_heads(kv_group, tile.m)
    _dq_kernel[(B * (H // group) * triton.cdiv(T, tile.m // group),)](
        *(*tensors, plan.query_order),
        plan.document_start if plan.local_order is None else plan.local_order,
        *(plan.document_start, plan.local_start, plan.local_end),
        GROUP=group,
        ROUTE_GROUP=H,
        TREE=False,
        HAS_ORDER=plan.local_order is not None,
        **arguments,
    )
    group = _shared_heads(math.gcd(kv_group, route_group), tile.m)
    for plan in visits:
        _dq_kernel[(B * (H // group) * triton.cdiv(T, tile.m // group),)](
            *(*tensors, plan.query_order, plan.key_order, plan.document_start, plan.range_start, plan.range_end),
            GROUP=group,
            ROUTE_GROUP=route_group,
            TREE=True,
            HAS_ORDER=True,
            **arguments,
        )
    return delta


def _launch_dkdv(
    inputs: _Inputs,
    delta: Tensor,
    ranges: QueryRanges,
    dk: Tensor,
    dv: Tensor,
    heads: int,
    tile: Tile,
    sums: _Sums | None = None,
    add: bool = False,
) -> None:
    """Write dk and dv `[B, H // heads, rows, D]` of N keys, or add to them; with `sums` it is the local pass."""
    q, k, v, _, dout, lse, scoring = inputs
    B, H = q.shape[:2]
    N, routes = ranges.first.shape[2], ranges.query_order.shape[1]
    unused = SinkChunks(ranges.first, ranges.first, ranges.first)
    tree_slot, tree_dk, tree_dv, chunks, *sinks = sums or _Sums(ranges.first, dk, dv, unused, dk, dv, 0, 0)
    sink_dk, sink_dv, num_chunks, num_slots = sinks
    _dkdv_kernel[(B * (H // heads) * triton.cdiv(N, tile.n),)](
        *(q, k, v, dout, lse, delta, ranges.query_order),
        ranges.first if ranges.key_order is None else ranges.key_order,
        *(ranges.first, ranges.last, dk, dv),
        *(tree_slot, tree_dk, tree_dv, *chunks, sink_dk, sink_dv),
        N=N,
        num_chunks=num_chunks,
        num_slots=num_slots,
        scale=scoring.scale,
        HEADS=heads,
        GROUP=_shared_heads(heads, tile.m),
        ROUTE_GROUP=H // routes,
        TREE_HEADS=heads if sums is None else H // tree_dk.shape[1],
        TREE_ROUTE_GROUP=H // tree_slot.shape[1],
        HAS_ORDER=ranges.key_order is not None,
        ADD=add,
        MERGE=sums is not None,
        **stride_arguments(g=(dout, "bht"), d=(dk, "bhs")),
        **attention_arguments(q, k, v, scoring, tile),
    )
