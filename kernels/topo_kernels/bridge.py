"""Hard attention with a full-gradient straight-through bridge to the level probabilities (docs/method.md, section 4).

The forward is the hard topology attention, and nothing else. Its derivative by the soft mask `S_ij = <P_i, P_j>`, with
`P` the leaf distributions, of any far pair (causal, same document, neither window nor sink), visible or not, is

    dS_ij = exp(min(s_ij - lse_i, max_gap)) * (<dout_i, v_j> - <dout_i, out_i>)

with `s` the scores and `lse` their log-sum-exp over the visible keys. So `dP_i = sum_j dS_ij P_j` and
`dP_j = sum_i dS_ij P_i`: `dS` is recomputed tile by tile and meets the leaves of the other side in a matrix product.
Far keys of a query are a range of local ranks, and so are, seen from a key, the queries it is far from. One kernel
serves both: a program holds a block of rows, queries or keys, and walks over the columns, keys or queries. Leaves exist
in the backward pass alone. Memory is `O(N)`, sums run in a fixed order, there are no atomics.

With several visits of a query the mask is `S_ij = <v_i, P_j>`, `v_i = 1 - (1 - P_i)**m`: `v_i` stands for the query's
leaves, and the chain rule goes on from `dv_i` to its probabilities.

With the balls of queries and keys, only pairs of one ball, the visible ones, pass that derivative on (the paper's
masked bridge): of one of the balls, where a query visits several.

The number of far pairs that are visible is a second output. Its derivative by any `S_ij` is 1, so a price on it costs
nothing: its gradient is added to `dS_ij`.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import attention_forward
from .backward import attention_backward
from .checks import check_device, check_plan, check_qkv, check_scoring, check_visits
from .launch import Tile, derived, score_arguments, shared_memory, stride_arguments
from .leaves import MAX_TILE_LEAVES, gradient_dtype, leaf_distributions, leaf_gradient
from .primitives import NEVER, tanh
from .ranges import FarRanges, far_ranges
from .types import FLAT, FLAT_LOCAL, LocalPlan, LocalTensors, Plan, PlanTensors, Scores, Scoring, flat


@triton.jit
def _far_run(
    b_x,  # [BLOCK_R, BLOCK_D]
    b_y,  # [BLOCK_R, BLOCK_D]
    b_lse,  # [BLOCK_R] fp32, base 2; of the rows if BY_QUERY, else unused
    b_delta,  # [BLOCK_R] fp32
    b_acc,  # [BLOCK_R, BLOCK_V] fp32
    b_first,  # [BLOCK_R] int32, ranks of columns
    b_last,  # [BLOCK_R] int32
    p_row_ball,  # [BLOCK_R], of the first visit; unused without HAS_BALLS
    lo,
    hi,
    p_order,
    p_u,
    p_w,
    p_leaves,
    p_lse,
    p_delta,
    p_column_ball,
    row_visits,
    column_visits,
    R,
    C,
    stride_uc,
    stride_wc,
    price,
    score_scale,
    score_cap,
    max_gap,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BY_QUERY: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_BALLS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the columns of ranks `[lo, hi)`: without MASKED they are whole tiles, and far from every row."""
    o_c = tl.arange(0, BLOCK_C)
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    for i_c in range(lo, hi, BLOCK_C):
        o_rank = i_c + o_c
        m_c = o_rank < hi
        m_cd = m_c[:, None] & (o_d < D)[None, :] if MASKED else (o_d < D)[None, :]
        m_cv = m_c[:, None] & (o_v < V)[None, :] if MASKED else (o_v < V)[None, :]
        o_col = o_rank
        if HAS_ORDER:
            o_col = tl.load(p_order + o_rank, mask=m_c, other=0)
        o_col = o_col.to(tl.int64)
        b_u = tl.load(p_u + o_col[:, None] * stride_uc + o_d[None, :], mask=m_cd, other=0.0)
        b_w = tl.load(p_w + o_col[:, None] * stride_wc + o_d[None, :], mask=m_cd, other=0.0)
        b_leaves = tl.load(p_leaves + o_col[:, None] * V + o_v[None, :], mask=m_cv, other=0.0)
        b_s = tl.dot(b_x, tl.trans(b_u), input_precision="ieee") * score_scale  # [BLOCK_R, BLOCK_C]
        b_t = tl.dot(b_y, tl.trans(b_w), input_precision="ieee")
        if HAS_CAP:
            b_s = score_cap * tanh(b_s)
        if BY_QUERY:
            b_gap = b_s - b_lse[:, None]
            b_t -= b_delta[:, None]
        else:
            b_gap = b_s - tl.load(p_lse + o_col, mask=m_c, other=0.0)[None, :]
            b_t -= tl.load(p_delta + o_col, mask=m_c, other=0.0)[None, :]
        b_ds = tl.exp2(tl.minimum(b_gap, max_gap)) * b_t
        if HAS_BALLS:
            b_same = tl.zeros_like(b_ds)
            for i_visit in range(row_visits * column_visits):  # one of the two is 1
                b_row = tl.load(p_row_ball + i_visit % row_visits * R, mask=b_first < b_last, other=0)
                b_column = tl.load(p_column_ball + i_visit % column_visits * C + o_col, mask=m_c, other=0)
                b_same = tl.where(b_row[:, None] == b_column[None, :], 1.0, b_same)
            b_ds = tl.where(b_same > 0, b_ds, 0.0)
        b_ds += price
        if MASKED:
            m_far = (o_rank[None, :] >= b_first[:, None]) & (o_rank[None, :] < b_last[:, None])
            b_ds = tl.where(m_far, b_ds, 0.0)
        b_acc = tl.dot(b_ds.to(b_leaves.dtype), b_leaves, b_acc, input_precision="ieee")
    return b_acc


@triton.jit(do_not_specialize=["R", "C"])
def _far_kernel(
    x,  # rows: q [B, H, R, D] if BY_QUERY, else k [B, H_kv, R, D]
    y,  # dout or v
    u,  # columns: k or q [.., .., C, D]
    w,  # v or dout
    leaves,  # [B, H, C, V], of the columns
    lse,  # [B, H, R or C] fp32, base 2, of the queries
    delta,  # [B, H, R or C] fp32, <out, dout>
    prices,  # [H] fp32, gradient of the number of visible far pairs
    row_ball,  # [B, H, row visits, R] int32, unused without HAS_BALLS
    column_ball,  # [B, H, column visits, C]
    row_order,  # [B, R], unused without HAS_ORDER
    column_order,  # [B, C], unused without HAS_ORDER
    first,  # [B, R], by rank of the row, ranks of columns
    last,
    dleaves,  # [B, H, R, V] fp32
    stride_xb,
    stride_xh,
    stride_xr,
    stride_yb,
    stride_yh,
    stride_yr,
    stride_ub,
    stride_uh,
    stride_uc,
    stride_wb,
    stride_wh,
    stride_wc,
    R,
    C,
    H,
    row_visits,  # of a query, 1 for a key
    column_visits,
    score_scale,
    score_cap,
    max_gap,
    KV_GROUP: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BY_QUERY: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_BALLS: tl.constexpr,
):
    n_r = tl.cdiv(R, BLOCK_R)
    i_r = tl.program_id(0) % n_r
    if BY_QUERY:  # most work first: the last queries have most keys, the first keys most queries
        i_r = n_r - 1 - i_r
    i_bh = (tl.program_id(0) // n_r).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    i_row = i_h
    i_col = i_h // KV_GROUP
    if not BY_QUERY:
        i_row = i_h // KV_GROUP
        i_col = i_h

    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_V)
    m_r = o_r < R
    b_first = tl.load(first + i_b * R + o_r, mask=m_r, other=0)
    b_last = tl.load(last + i_b * R + o_r, mask=m_r, other=0)
    m_some = b_first < b_last
    o_row = o_r
    if HAS_ORDER:
        o_row = tl.load(row_order + i_b * R + o_r, mask=m_r, other=0)
    o_row = o_row.to(tl.int64)
    m_rd = m_some[:, None] & (o_d < D)[None, :]
    p_x = x + i_b * stride_xb + i_row * stride_xh + o_row[:, None] * stride_xr + o_d[None, :]
    p_y = y + i_b * stride_yb + i_row * stride_yh + o_row[:, None] * stride_yr + o_d[None, :]
    b_x = tl.load(p_x, mask=m_rd, other=0.0)
    b_y = tl.load(p_y, mask=m_rd, other=0.0)
    N = R if BY_QUERY else C
    p_lse = lse + i_bh * N
    p_delta = delta + i_bh * N
    b_lse = tl.zeros([BLOCK_R], dtype=tl.float32)
    b_delta = tl.zeros([BLOCK_R], dtype=tl.float32)
    if BY_QUERY:
        b_lse = tl.load(p_lse + o_row, mask=m_some, other=0.0)
        b_delta = tl.load(p_delta + o_row, mask=m_some, other=0.0)
    b_acc = tl.zeros([BLOCK_R, BLOCK_V], dtype=tl.float32)
    price = tl.load(prices + i_h)

    # whole tiles of columns that are far from every row, between two stretches that need masks. Rows that nothing is
    # far from bound no loop, take part in whole tiles, and are written as 0.
    lo = tl.min(tl.where(m_some, b_first, NEVER), 0)
    hi = tl.max(tl.where(m_some, b_last, 0), 0)
    lo = tl.minimum(lo, hi)
    full = tl.max(tl.where(m_some, b_first, 0), 0)
    full = tl.minimum(lo + tl.cdiv(full - lo, BLOCK_C) * BLOCK_C, hi)
    rest = tl.min(tl.where(m_some, b_last, NEVER), 0)
    rest = full + tl.maximum(tl.minimum(rest, hi) - full, 0) // BLOCK_C * BLOCK_C
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
        b_acc = _far_run(
            *(b_x, b_y, b_lse, b_delta, b_acc, b_first, b_last, row_ball + i_bh * row_visits * R + o_row, begin, stop),
            *(column_order + i_b * C, u + i_b * stride_ub + i_col * stride_uh, w + i_b * stride_wb + i_col * stride_wh),
            *(leaves + i_bh * C * V, p_lse, p_delta, column_ball + i_bh * column_visits * C),
            *(row_visits, column_visits, R, C),
            *(stride_uc, stride_wc, price, score_scale, score_cap, max_gap),
            *(D, V, BLOCK_D, BLOCK_V, BLOCK_C, BY_QUERY, HAS_ORDER, HAS_CAP, HAS_BALLS, i_part != 1),
        )
    b_acc = tl.where(m_some[:, None], b_acc, 0.0)
    p_out = dleaves + (i_bh * R + o_row)[:, None] * V + o_v[None, :]
    tl.store(p_out, b_acc, mask=m_r[:, None] & (o_v < V)[None, :])


class BridgeTiles(NamedTuple):
    """Tiles (queries x keys) of the two launches: a block of queries per program, a block of keys per program."""

    query: Tile
    key: Tile


def choose_bridge_tiles(head_dim: int, leaves: int, dtype: torch.dtype, shared_memory: int) -> BridgeTiles:
    """The largest tiles that fit `shared_memory` bytes per program; the last fit in 99 KB at any width."""
    width, values = triton.next_power_of_2(head_dim), max(16, triton.next_power_of_2(leaves))
    few = 8 if max(width, values) > 128 else 4  # warps that hold the sums of 64 rows in registers
    item, tiles = 2, [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, few, 2), (64, 32, few, 2), (32, 16, 4, 2)]
    if dtype == torch.float32:
        item, tiles = 4, [(32, 16, 8, 2), (16, 16, 8, 1)]

    def size(rows: int, columns: int, _: int, stages: int) -> int:
        """Operands, and room for the statistics of columns."""
        return item * (2 * rows * width + stages * columns * (2 * width + values)) + 2048

    rows, columns, num_warps, num_stages = next((t for t in tiles if size(*t) <= shared_memory), tiles[-1])
    return BridgeTiles(Tile(rows, columns, num_warps, num_stages), Tile(columns, rows, num_warps, num_stages))


class _FarPairs(NamedTuple):
    """The far pairs, and which tokens have any: float32 `[B, T]` and `[B, S]`, by index, 1 or 0."""

    ranges: FarRanges
    some_key: Tensor
    some_query: Tensor


def _far_pairs(plan: LocalPlan, num_keys: int) -> _FarPairs:
    ranges = far_ranges(plan, num_keys)

    def by_index(some: Tensor, order: Tensor | None) -> Tensor:
        some = some.float()
        return some if order is None else torch.zeros_like(some).scatter_(1, order.long(), some)

    some_key = by_index(ranges.start < ranges.end, ranges.query_order)
    return _FarPairs(ranges, some_key, by_index((ranges.first < ranges.last)[:, 0], plan.local_order))


@torch.library.custom_op(
    "topo_kernels::bridge_gradients",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor dout, Tensor dpairs, Tensor query_probs, "
    "Tensor key_probs, Tensor? query_ball, Tensor? key_ball, Tensor? visits, float max_gap, "
    f"{FLAT_LOCAL}) -> (Tensor, Tensor)",
)
def _bridge_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dpairs: Tensor,
    query_probs: Tensor,
    key_probs: Tensor,
    query_ball: Tensor | None,
    key_ball: Tensor | None,
    visits: Tensor | None,
    max_gap: float,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Gradients of the query and key probabilities, float32 and in their shapes, of checked arguments."""
    plan, scoring = LocalTensors(*arguments[:-2]), Scores(*arguments[-2:])
    B, H, T, D = q.shape
    S, V = k.shape[2], query_probs.shape[4] ** query_probs.shape[3]
    q, k, v, dout = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, dout))
    delta = (out.float() * dout.float()).sum(-1).contiguous()
    dpairs = dpairs.float().contiguous()  # an expanded scalar, as a rule
    far = derived(_far_pairs, plan, S)
    query_order, start, end, first, last = far.ranges
    with torch.cuda.device_of(q):
        query_leaves, key_leaves = (
            leaf_distributions(probs, some, gradient_dtype(q.dtype), many)[0]  # they meet dS
            for probs, some, many in ((query_probs, far.some_key, visits), (key_probs, far.some_query, None))
        )
    key_order = None if plan.local_order is None else plan.local_order.contiguous()
    dquery = torch.empty(B, H, T, V, dtype=torch.float32, device=q.device)
    dkey = torch.empty(B, H, S, V, dtype=torch.float32, device=q.device)
    tiles = choose_bridge_tiles(D, V, q.dtype, shared_memory(q.device))
    queries, keys = (q, dout, query_order, query_ball), (k, v, key_order, key_ball)
    num_visits = 1 if query_ball is None else query_ball.shape[2]
    for by_query, rows, columns, leaves, ranges, gradient, tile in (
        (True, queries, keys, key_leaves, (start, end), dquery, tiles.query),
        (False, keys, queries, query_leaves, (first, last), dkey, tiles.key),
    ):
        x, y, row_order, row_ball = rows
        u, w, column_order, column_ball = columns
        block_r, block_c = (tile.m, tile.n) if by_query else (tile.n, tile.m)
        with torch.cuda.device_of(q):
            _far_kernel[(B * H * triton.cdiv(x.shape[2], block_r),)](
                *(x, y, u, w, leaves, lse, delta, dpairs),
                *(ranges[0] if t is None else t for t in (row_ball, column_ball, row_order, column_order)),
                *(*ranges, gradient),
                R=x.shape[2],
                C=u.shape[2],
                H=H,
                row_visits=num_visits if by_query else 1,
                column_visits=1 if by_query else num_visits,
                max_gap=max_gap / math.log(2),
                KV_GROUP=H // k.shape[1],
                V=V,
                BLOCK_V=max(16, triton.next_power_of_2(V)),
                BLOCK_R=block_r,
                BLOCK_C=block_c,
                BY_QUERY=by_query,
                HAS_ORDER=plan.local_order is not None,
                HAS_BALLS=query_ball is not None,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                **stride_arguments(x=(x, "bhr"), y=(y, "bhr"), u=(u, "bhc"), w=(w, "bhc")),
                **score_arguments(D, scoring),
            )
    nothing = dquery.new_zeros(H, V)
    with torch.cuda.device_of(q):
        return (
            leaf_gradient(query_probs, far.some_key, dquery, nothing, visits),
            leaf_gradient(key_probs, far.some_query, dkey, nothing),
        )


@_bridge_gradients.register_fake
def _(q, k, v, out, lse, dout, dpairs, query_probs, key_probs, *_rest):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query_probs, key_probs))


@torch.library.custom_op(
    "topo_kernels::bridged_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor query_probs, Tensor key_probs, Tensor? query_ball, Tensor? key_ball, "
    f"Tensor? visits, float max_gap, {FLAT}) -> (Tensor, Tensor, Tensor)",
)
def _bridged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_probs: Tensor,
    key_probs: Tensor,
    query_ball: Tensor | None,
    key_ball: Tensor | None,
    visits: Tensor | None,
    max_gap: float,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The hard attention, which no probability enters: `out` `[B, T, H, D]`, `lse` `[B, H, T]`, far pairs `[H]`."""
    out, lse = attention_forward(q, k, v, *arguments)
    plan = PlanTensors(*arguments[:-2])
    pairs = (plan.range_end - plan.range_start).flatten(2).sum((0, 2)).float()
    return out, lse, pairs.repeat_interleave(q.shape[1] // pairs.shape[0])


@_bridged_attention.register_fake
def _(q, *_rest):
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32), q.new_empty(H, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, ctx.max_gap, plan, ctx.options = inputs[:8], inputs[8], inputs[9:-3], inputs[-3:]
    ctx.save_for_backward(*output[:2], *tensors, *plan)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dout: Tensor, _: Any, dpairs: Tensor) -> tuple[Any, ...]:
    out, lse, q, k, v, query_probs, key_probs, query_ball, key_ball, visits, *plan = ctx.saved_tensors
    out, dout = out.transpose(1, 2), dout.transpose(1, 2)
    of_attention: tuple[Tensor | None, ...] = (None, None, None)
    of_probs: tuple[Tensor | None, ...] = (None, None)
    if any(ctx.needs_input_grad[:3]):
        of_attention = attention_backward(q, k, v, out, lse, dout, *plan, *ctx.options)
    if any(ctx.needs_input_grad[3:5]):
        tree = query_probs, key_probs, query_ball, key_ball, visits
        of_probs = _bridge_gradients(q, k, v, out, lse, dout, dpairs, *tree, ctx.max_gap, *plan[4:], *ctx.options)
    return *of_attention, *of_probs, *[None] * (len(plan) + 7)


_bridged_attention.register_autograd(_gradients, setup_context=_save)


def bridged_topology_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_probs: Tensor,
    key_probs: Tensor,
    plan: Plan,
    scoring: Scoring,
    *,
    max_gap: float,
    balls: tuple[Tensor, Tensor] | None = None,
    visits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`topology_attention` with gradients for level probabilities too, from hidden pairs as from visible ones.

    The value, dq, dk and dv are those of `topology_attention`: q, k and v get no gradient through hidden pairs. The
    probabilities get that of the soft mask `prod_l <query_probs_il, key_probs_jl>` of every far pair: key `j` is one of
    `local_order[document_start + num_sink_tokens:local_start]` of query `i`. A head of fewer levels than L takes one
    child for certain in the others.

    Args:
        q: `[B, H, T, D]`, float16, bfloat16 or float32; D from 16 to 256. Any strides.
        k, v: `[B, H_kv, S, D]`, q's dtype, H a multiple of H_kv.
        query_probs, key_probs: float32 `[B, H, T, L, p]` and `[B, H, S, L, p]`, `p**L` from 1 to 256; any strides.
        plan, scoring: as in `topology_attention`. A `local_order` of None also says that there is no padding and that
            `local_end` rises along the queries.
        max_gap: a far key's score counts in the gradient as at most the log-sum-exp of the query's visible scores plus
            `max_gap`: a hidden key that the dense model attends to would otherwise have an unbounded weight.
        balls: None, or int32 `[B, H, m, T]` of the queries' visits, -1 for none, and `[B, H, S]` of the keys: the
            gradient of `out` then reaches the probabilities of pairs only where the key's ball is one of the query's.
            That of `far_pairs` stays. `[B, H, T]` is one visit.
        visits: None, or int32 `[H]`, from 1 to 8: of each query of a head. The soft mask is `<v_i, P_j>` then, with `P`
            the leaf distributions that level probabilities imply and `v = 1 - (1 - P)**visits` in the place of the
            query's. Values are trusted: checking them would wait for the GPU.

    Returns:
        out: `[B, H, T, D]` in q's dtype, the transposed view of a contiguous `[B, T, H, D]`. Rows of padding queries
            (`local_start == local_end`) are 0, and so are the gradients of their probabilities and of padding keys'.
        far_pairs: float32 `[H]`, the visible far pairs of the batch; differentiable in the probabilities as the sum of
            the soft mask over all far pairs.

    Raises:
        ValueError: a shape, dtype, device or option does not fit; the message names the argument.
        RuntimeError: the device cannot run the kernels.
    """
    check_qkv(q, k, v)
    check_plan(q, k, plan)
    _check_probs(q, k, query_probs, key_probs)
    check_scoring(scoring)
    if not 0 <= max_gap <= 60:
        raise ValueError(f"max_gap must be from 0 to 60, so that sums of its exponential are finite, got {max_gap}.")
    check_visits(visits, q)
    query_ball, key_ball = _checked_balls(q, k, balls)
    check_device("bridged_topology_attention", q=q)
    if q.numel() == 0:
        return torch.empty_like(q), torch.zeros(q.shape[1], device=q.device)
    tree = query_probs, key_probs, query_ball, key_ball, visits
    out, _, pairs = _bridged_attention(q, k, v, *tree, max_gap, *flat(plan, scoring))
    return out.transpose(1, 2), pairs


def _checked_balls(q: Tensor, k: Tensor, balls: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """Contiguous balls `[B, H, m, T]` and `[B, H, S]`."""
    if balls is None:
        return None, None
    query_ball, key_ball = balls
    if query_ball.ndim == 3:
        query_ball = query_ball[:, :, None]
    B, H, T, _ = q.shape
    visits = query_ball.shape[2:3]
    for name, ball, shape in (("queries", query_ball, (B, H, *visits, T)), ("keys", key_ball, (B, H, k.shape[2]))):
        if ball.shape != shape or ball.dtype != torch.int32 or ball.device != q.device:
            raise ValueError(
                f"balls of {name} must be int32 {list(shape)} on {q.device}, got {ball.dtype} {list(ball.shape)} on "
                f"{ball.device}."
            )
    return query_ball.contiguous(), key_ball.contiguous()


def _check_probs(q: Tensor, k: Tensor, query_probs: Tensor, key_probs: Tensor) -> None:
    levels = query_probs.shape[3:]
    for name, tensor, length in (("query_probs", query_probs, q.shape[2]), ("key_probs", key_probs, k.shape[2])):
        expected = (*q.shape[:2], length, *levels)
        if tensor.ndim != 5 or tensor.shape != expected or not 1 <= levels[1] ** levels[0] <= MAX_TILE_LEAVES:
            raise ValueError(
                f"{name} must have shape {[*expected[:3], 'L', 'p']} with p**L from 1 to {MAX_TILE_LEAVES}, the same "
                f"for queries and keys, got {list(tensor.shape)}."
            )
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {tensor.dtype}.")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}.")
