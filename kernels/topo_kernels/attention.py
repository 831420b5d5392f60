"""Hard topology attention: a local pass and a tree pass (kernels/README.md).

Each query attends to three contiguous ranges of sorted keys: its window and its document's sinks (local pass, keys
sorted by position) and its ball (tree pass, keys sorted by ball). The ranges are disjoint. The local pass leaves a
normalised output and its log-sum-exp; the tree pass takes these as the state its online softmax starts from, which is
the log-sum-exp merge, and writes over them. A query that visits several balls has a tree pass for each, one after the
other. No `T x S` tensor, no atomics, fixed summation order.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backward import attention_backward
from .checks import check_device, check_plan, check_qkv, check_scoring
from .launch import INTERPRETED, Tile, attention_arguments
from .primitives import LOWEST, NEVER, TRUSTED, tanh
from .types import FLAT, LocalPlan, Plan, PlanTensors, Scores, Scoring, by_visit, flat


@triton.jit
def _attend_run(
    b_q,  # [BLOCK_M, BLOCK_D]
    b_acc,  # [BLOCK_M, BLOCK_D] fp32, unnormalised output
    b_max,  # [BLOCK_M] fp32, largest score so far, base 2, finite
    b_sum,  # [BLOCK_M] fp32
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
    WIDE: tl.constexpr,
    FIXED: tl.constexpr,
    EDGES: tl.constexpr,
):
    """Go on with the softmax over the keys of ranks `[lo, hi)`; rank `r` is key `order[r]`, or `r` itself.

    FIXED keeps the reference score `b_max` as it is, else it is the running maximum (online softmax).

    EDGES 2: each row takes `[b_start, b_end)` of them. 1: each row takes those before `b_end`. 0: every row takes
    all, and `hi - lo` is a multiple of BLOCK_N. With 1 and 0 every key may be read, so none holds NaN.
    """
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    for i_n in range(lo, hi, BLOCK_N):
        o_rank = i_n + o_n
        m_n = o_rank < hi
        if HAS_ORDER:
            o_key = tl.load(p_order + o_rank, mask=m_n, other=0) if EDGES > 0 else tl.load(p_order + o_rank)
        else:
            o_key = tl.minimum(o_rank, hi - 1) if EDGES == 1 else o_rank
        if WIDE:
            o_key = o_key.to(tl.int64)
        p_kt = p_k + o_key[None, :] * stride_ks + o_d[:, None]  # [BLOCK_D, BLOCK_N]
        p_vt = p_v + o_key[:, None] * stride_vs + o_d[None, :]  # [BLOCK_N, BLOCK_D]
        if EDGES == 2:
            b_kt = tl.load(p_kt, mask=m_d[:, None] & m_n[None, :], other=0.0)
        elif D == BLOCK_D:
            b_kt = tl.load(p_kt)
        else:
            b_kt = tl.load(p_kt, mask=m_d[:, None], other=0.0)
        b_s = tl.dot(b_q, b_kt, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if HAS_CAP:
            b_s = score_cap * tanh(b_s * score_scale)
        if EDGES == 2:
            # start <= rank < end in one comparison
            m_s = (o_rank[None, :] - b_start[:, None]).to(tl.uint32) < (b_end - b_start).to(tl.uint32)[:, None]
            b_s = tl.where(m_s, b_s, float("-inf"))
        elif EDGES == 1:
            b_s = tl.where(o_rank[None, :] < b_end[:, None], b_s, float("-inf"))
        # the scale is positive, so it can wait until after the maximum and become one fused multiply-add
        scale = 1.0 if HAS_CAP else score_scale
        if not FIXED:
            b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
            b_decay = tl.exp2(b_max - b_new)
            b_sum *= b_decay
            b_acc *= b_decay[:, None]
            b_max = b_new
        b_probs = tl.exp2(b_s * scale - b_max[:, None])
        b_sum += tl.sum(b_probs, 1)
        if EDGES == 2:
            b_v = tl.load(p_vt, mask=m_n[:, None] & m_d[None, :], other=0.0)
        elif D == BLOCK_D:
            b_v = tl.load(p_vt)
        else:
            b_v = tl.load(p_vt, mask=m_d[None, :], other=0.0)
        b_acc = tl.dot(b_probs.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
    return b_acc, b_max, b_sum


@triton.jit
def _attend(
    b_q,
    b_acc,
    b_max,
    b_sum,
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
    WIDE: tl.constexpr,
    FIXED: tl.constexpr,
):
    """Go on with the softmax over each row's own range `[b_start, b_end)`."""
    b_end = tl.maximum(b_start, b_end)
    b_first = tl.where(b_start < b_end, b_start, NEVER)
    lo = tl.min(b_first, 0)
    while lo < NEVER:
        # one run: grow it until the next row's range starts more than a tile away, so that a block which
        # straddles a ball nobody asks for jumps over that ball
        hi = lo
        reach = tl.max(tl.where(b_first <= lo, b_end, 0), 0)
        while reach > hi:
            hi = reach
            reach = tl.max(tl.where(b_first <= hi + BLOCK_N, b_end, 0), 0)
        b_acc, b_max, b_sum = _attend_run(
            *(b_q, b_acc, b_max, b_sum, b_start, b_end, lo, hi),
            *(p_order, p_k, p_v, stride_ks, stride_vs, score_scale, score_cap),
            *(D, BLOCK_D, BLOCK_N, HAS_ORDER, HAS_CAP, WIDE, FIXED, 2),
        )
        lo = tl.min(tl.where(b_first > hi, b_first, NEVER), 0)
    return b_acc, b_max, b_sum


@triton.jit(do_not_specialize=["T", "S", "num_sink_tokens"])
def _local_kernel(
    q,
    k,
    v,
    local_order,  # [B, S]; not read if PLAIN
    document_start,  # [B, T]
    local_start,
    local_end,
    out,  # [B, T, H, D]
    lse,  # [B, H, T] fp32, base 2
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    T,
    S,
    H,
    num_sink_tokens,
    score_scale,
    score_cap,
    GROUP: tl.constexpr,  # query heads of one program: they share keys
    KV_GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SINK: tl.constexpr,
    PLAIN: tl.constexpr,  # one document per row, no padding
    HAS_CAP: tl.constexpr,
    WIDE: tl.constexpr,
):
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    n_m = tl.cdiv(T, TOKENS)
    i_m = tl.program_id(0) % n_m
    i_bg = tl.program_id(0) // n_m
    i_b = (i_bg // (H // GROUP)).to(tl.int64)
    i_first = i_bg % (H // GROUP) * GROUP
    i_kv = (i_first // KV_GROUP).to(tl.int64)

    o_row = tl.arange(0, BLOCK_M)
    o_t = i_m * TOKENS + o_row // GROUP
    o_h = (i_first + o_row % GROUP).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_row = (o_row < TOKENS * GROUP) & (o_t < T)
    b_start = tl.load(local_start + i_b * T + o_t, mask=m_row, other=0)
    b_end = tl.load(local_end + i_b * T + o_t, mask=m_row, other=0)
    m_some = b_start < b_end  # a real query sees itself; padding sees nothing, so its start bounds no loop
    m_md = m_some[:, None] & (o_d < D)[None, :]

    o_t = o_t.to(tl.int64)
    p_q = q + i_b * stride_qb + (o_h * stride_qh + o_t * stride_qt)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_md, other=0.0)
    p_k = k + i_b * stride_kb + i_kv * stride_kh
    p_v = v + i_b * stride_vb + i_kv * stride_vh
    p_order = local_order + i_b * S
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    if PLAIN:  # windows and sinks of neighbours overlap: one run each, with scalar bounds
        p_last = i_b * T + tl.minimum(i_m * TOKENS + TOKENS, T) - 1
        b_acc, b_max, b_sum = _attend_run(
            *(b_q, b_acc, b_max, b_sum, b_start, b_end),
            *(tl.load(local_start + i_b * T + i_m * TOKENS), tl.load(local_end + p_last)),
            *(p_order, p_k, p_v, stride_ks, stride_vs, score_scale, score_cap),
            *(D, BLOCK_D, BLOCK_N, False, HAS_CAP, WIDE, False, 2),
        )
        b_acc, b_max, b_sum = _attend_run(
            *(b_q, b_acc, b_max, b_sum, b_start, tl.minimum(num_sink_tokens, b_start)),
            *(0, tl.minimum(num_sink_tokens, tl.load(local_start + p_last))),
            *(p_order, p_k, p_v, stride_ks, stride_vs, score_scale, score_cap),
            *(D, BLOCK_D, BLOCK_SINK, False, HAS_CAP, WIDE, False, 1),
        )
    else:
        b_first = tl.load(document_start + i_b * T + o_t, mask=m_row, other=0)
        # sinks: the part of [first, first + num_sink_tokens) before the window
        b_last = tl.where(m_some, tl.minimum(b_first + num_sink_tokens, b_start), 0)
        b_acc, b_max, b_sum = _attend(
            *(b_q, b_acc, b_max, b_sum, b_start, b_end),
            *(p_order, p_k, p_v, stride_ks, stride_vs, score_scale, score_cap),
            *(D, BLOCK_D, BLOCK_N, True, HAS_CAP, WIDE, False),
        )
        b_acc, b_max, b_sum = _attend(
            *(b_q, b_acc, b_max, b_sum, b_first, b_last),
            *(p_order, p_k, p_v, stride_ks, stride_vs, score_scale, score_cap),
            *(D, BLOCK_D, BLOCK_SINK, True, HAS_CAP, WIDE, False),
        )
    b_sum = tl.where(m_some, b_sum, 1.0)
    b_lse = tl.where(m_some, b_max + tl.log2(b_sum), float("-inf"))
    tl.store(lse + (i_b * H + o_h) * T + o_t, b_lse, mask=m_row)
    p_out = out + ((i_b * T + o_t) * H + o_h)[:, None] * D + o_d[None, :]
    b_out = b_acc / b_sum[:, None]  # 0 in padding rows
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_row[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["T", "S"])
def _tree_kernel(
    q,
    k,
    v,
    query_order,  # [B, R, T]
    range_start,  # [B, R, T], sorted query order
    range_end,
    key_order,  # [B, R, S]
    out,  # [B, T, H, D], read and written
    lse,  # [B, H, T] fp32, base 2, read and written
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    T,
    S,
    H,
    score_scale,
    score_cap,
    GROUP: tl.constexpr,  # query heads of one program: they share the route and the keys
    KV_GROUP: tl.constexpr,
    ROUTE_GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PLAIN: tl.constexpr,  # one document per row, no padding: then ranges that start together end in order
    SEVERAL: tl.constexpr,  # visits: queries without this one come last, with empty ranges that start anywhere
    HAS_CAP: tl.constexpr,
    WIDE: tl.constexpr,
    FIXED: tl.constexpr,
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
    m_row = (o_row < TOKENS * GROUP) & (o_m < T)
    b_start = tl.load(range_start + i_br * T + o_m, mask=m_row, other=0)
    b_end = tl.load(range_end + i_br * T + o_m, mask=m_row, other=0)
    b_query = tl.load(query_order + i_br * T + o_m, mask=m_row, other=0).to(tl.int64)
    m_some = b_start < b_end
    p_first = i_br * T + i_m * TOKENS
    p_last = i_br * T + tl.minimum(i_m * TOKENS + TOKENS, T) - 1
    lo = tl.load(range_start + p_first)
    common = tl.load(range_end + p_first)  # seen by every row, if they start together
    hi = tl.load(range_end + p_last)
    together = lo == tl.load(range_start + p_last) if PLAIN else False
    if PLAIN and SEVERAL:
        together = tl.max(tl.where(m_row, tl.abs(b_start - lo), 0), 0) == 0
        common = tl.min(tl.where(m_row, b_end, NEVER), 0)
        hi = tl.max(b_end, 0)
    if (hi > lo) if together else (tl.max(b_end - b_start, 0) > 0):
        o_h = (i_first + o_row % GROUP).to(tl.int64)
        o_d = tl.arange(0, BLOCK_D)
        m_md = m_some[:, None] & (o_d < D)[None, :]
        p_q = q + i_b * stride_qb + (o_h * stride_qh + b_query * stride_qt)[:, None] + o_d[None, :]
        p_out = out + ((i_b * T + b_query) * H + o_h)[:, None] * D + o_d[None, :]
        p_lse = lse + (i_b * H + o_h) * T + b_query
        b_q = tl.load(p_q, mask=m_md, other=0.0)
        b_acc = tl.load(p_out, mask=m_md, other=0.0).to(tl.float32)
        b_max = tl.load(p_lse, mask=m_some, other=0.0)
        b_sum = tl.full([BLOCK_M], 1.0, dtype=tl.float32)  # relative to the local pass, so at least 1
        p_order = key_order + i_br * S
        p_k = k + i_b * stride_kb + i_kv * stride_kh
        p_v = v + i_b * stride_vb + i_kv * stride_vh
        if together:
            whole = lo + (common - lo) // BLOCK_N * BLOCK_N
            b_acc, b_max, b_sum = _attend_run(
                *(b_q, b_acc, b_max, b_sum, b_start, b_end, lo, whole),
                *(p_order, p_k, p_v, stride_ks, stride_vs, score_scale, score_cap),
                *(D, BLOCK_D, BLOCK_N, True, HAS_CAP, WIDE, FIXED, 0),
            )
            b_acc, b_max, b_sum = _attend_run(
                *(b_q, b_acc, b_max, b_sum, b_start, b_end, whole, hi),
                *(p_order, p_k, p_v, stride_ks, stride_vs, score_scale, score_cap),
                *(D, BLOCK_D, BLOCK_N, True, HAS_CAP, WIDE, FIXED, 1),
            )
        else:
            b_acc, b_max, b_sum = _attend(
                *(b_q, b_acc, b_max, b_sum, b_start, b_end),
                *(p_order, p_k, p_v, stride_ks, stride_vs, score_scale, score_cap),
                *(D, BLOCK_D, BLOCK_N, True, HAS_CAP, WIDE, FIXED),
            )
        if tl.max(b_sum, 0) >= TRUSTED if FIXED else False:
            b_acc = tl.load(p_out, mask=m_md, other=0.0).to(tl.float32)
            b_sum = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
            b_acc, b_max, b_sum = _attend(
                *(b_q, b_acc, b_max, b_sum, b_start, b_end),
                *(p_order, p_k, p_v, stride_ks, stride_vs, score_scale, score_cap),
                *(D, BLOCK_D, BLOCK_N, True, HAS_CAP, WIDE, False),
            )
        tl.store(p_lse, b_max + tl.log2(b_sum), mask=m_some)
        tl.store(p_out, (b_acc / b_sum[:, None]).to(out.dtype.element_ty), mask=m_md)


class ForwardTiles(NamedTuple):
    """Tiles of the two passes."""

    local: Tile
    tree: Tile


def choose_forward_tiles(head_dim: int, dtype: torch.dtype, hopper: bool) -> ForwardTiles:
    """Tiles that fit the 99 KB of shared memory every GPU from compute capability 8.0 on has."""
    if dtype == torch.float32:
        return ForwardTiles(Tile(32, 16, 8, 2), Tile(32, 16, 8, 2))
    if head_dim > 128:
        return ForwardTiles(Tile(64, 32, 8, 2), Tile(64, 32, 8, 3))
    # small tiles and, where operands come from shared memory, a cap on registers: four programs to a multiprocessor
    # hide each other's gathers
    cap = 128 if hopper else None
    return ForwardTiles(Tile(64, 32, 4, 2, cap), Tile(64, 32, 4, 3, cap))


def _fixed_reference(dtype: torch.dtype) -> bool:
    """Whether exponentials may be taken relative to a score fixed beforehand.

    That spares the running maximum and the rescaling of the output, a third of the instructions of a tile. Sums that
    outgrow `TRUSTED` are done again with the running maximum. float16 has too little range for it.
    """
    return dtype == torch.bfloat16


def _wide(k: Tensor, v: Tensor) -> bool:
    """Whether offsets within a head do not fit an int32."""
    return k.shape[2] * max(k.stride(2), v.stride(2)) >= 2**31


def _heads_per_program(shared: int, rows: int) -> int:
    """The largest divisor of `shared` heads that leaves at least 8 tokens to a block of `rows`."""
    return max(n for n in range(1, max(1, rows // 8) + 1) if shared % n == 0)


def local_pass(
    q: Tensor, k: Tensor, v: Tensor, plan: LocalPlan, scoring: Scoring, tile: Tile, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Windows and sinks: `out` `[B, T, H, D]` in `dtype`, None for q's, and `lse` `[B, H, T]` fp32 base 2.

    Rows of padding are 0 and -inf.
    """
    B, H, T, D = q.shape
    out = q.new_empty(B, T, H, D, dtype=dtype)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    group = _heads_per_program(H // k.shape[1], tile.m)
    grid = (B * (H // group) * triton.cdiv(T, tile.m // group),)
    with torch.cuda.device_of(q):
        _local_kernel[grid](
            *(q, k, v),
            plan.document_start if plan.local_order is None else plan.local_order,
            *(plan.document_start, plan.local_start, plan.local_end, out, lse),
            num_sink_tokens=plan.num_sink_tokens,
            GROUP=group,
            BLOCK_SINK=16,
            PLAIN=plan.local_order is None,
            WIDE=_wide(k, v),
            **attention_arguments(q, k, v, scoring, tile),
        )
    return out, lse


def tree_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PlanTensors,
    out: Tensor,
    lse: Tensor,
    scoring: Scoring,
    tile: Tile,
    several: bool = False,
) -> None:
    """Balls of one visit: merges them into `out` and `lse` of the passes before, in place.

    Args:
        plan: of `by_visit`. several: it is one of several visits.
    """
    B, H, T, _ = q.shape
    kv_group, route_group = H // k.shape[1], H // plan.query_order.shape[1]
    group = _heads_per_program(math.gcd(kv_group, route_group), tile.m)
    grid = (B * (H // group) * triton.cdiv(T, tile.m // group),)
    with torch.cuda.device_of(q):
        _tree_kernel[grid](
            *(q, k, v, plan.query_order, plan.range_start, plan.range_end, plan.key_order, out, lse),
            GROUP=group,
            PLAIN=plan.local_order is None,
            SEVERAL=several,
            FIXED=_fixed_reference(q.dtype),
            ROUTE_GROUP=route_group,
            WIDE=_wide(k, v),
            **attention_arguments(q, k, v, scoring, tile),
        )


@torch.library.custom_op(
    "topo_kernels::attention", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {FLAT}) -> (Tensor, Tensor)"
)
def attention_forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """All passes on checked arguments; `out` `[B, T, H, D]` and `lse` `[B, H, T]`."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    visits, scoring = by_visit(PlanTensors(*arguments[:-2])), Scores(*arguments[-2:])
    several = len(visits) > 1
    hopper = not INTERPRETED and torch.cuda.get_device_capability(q.device)[0] == 9
    tiles = choose_forward_tiles(q.shape[3], q.dtype, hopper)
    # between several tree passes the output is not rounded
    out, lse = local_pass(q, k, v, visits[0], scoring, tiles.local, torch.float32 if several else q.dtype)
    for plan in visits:
        tree_pass(q, k, v, plan, out, lse, scoring, tiles.tree, several)
    return out.to(q.dtype), lse


@attention_forward.register_fake
def _(q, *_rest):
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:-3])
    ctx.options = inputs[-3:]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dout: Tensor, _: Any) -> tuple[Any, ...]:
    out, lse, q, k, v, *plan = ctx.saved_tensors
    gradients = attention_backward(q, k, v, out.transpose(1, 2), lse, dout.transpose(1, 2), *plan, *ctx.options)
    return *gradients, *[None] * (len(plan) + len(ctx.options))


attention_forward.register_autograd(_gradients, setup_context=_save)


def topology_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scoring: Scoring) -> Tensor:
    """Attention over the visible pairs of docs/method.md, section 2, executed as section 6 says.

    Differentiable in q, k and v (`backward.py`).

    Args:
        q: `[B, H, T, D]`, float16, bfloat16 or float32; D from 16 to 256. Any strides.
        k, v: `[B, H_kv, S, D]`, q's dtype, H a multiple of H_kv.
        plan: its tensors are contiguous or made so. H a multiple of its R route heads: head `h` takes route
            `h // (H // R)`.

    Returns:
        `[B, H, T, D]` in q's dtype, the transposed view of a contiguous `[B, T, H, D]`. Rows of padding queries are 0.

    Raises:
        ValueError: a shape, dtype, device or option does not fit; the message names the argument.
        RuntimeError: the device cannot run the kernels.
    """
    check_qkv(q, k, v)
    check_plan(q, k, plan)
    check_scoring(scoring)
    check_device("topology_attention", q=q)
    if q.numel() == 0:
        return torch.empty_like(q)
    out, _ = attention_forward(q, k, v, *flat(plan, scoring))
    return out.transpose(1, 2)
