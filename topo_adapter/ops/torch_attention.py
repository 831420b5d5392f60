"""Hard attention in plain torch: on machines without a GPU, and in float64.

A plan is executed in one of two ways, whichever makes fewer scores, weighed by what a score costs there:

- masked: blocks of queries over all keys of their documents up to them, in torch's fused kernel under a mask. A score
  is cheap, but all causal pairs are scored: for texts that are short or see much.
- sorted: blocks of queries in the tree's order over the keys of their balls, then window and sinks, merged by
  log-sum-exp. Nearly only visible pairs are scored: for long texts. This way alone knows gradients and softcap.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad, scaled_dot_product_attention

from ..core.device import graph_is_recorded
from ..core.scoring import Scoring
from .plan import Plan

_BLOCK = 128  # queries that are scored at once when sorted
_SORTED_SCORE = 1.9  # cost of a score when sorted, in masked scores of the same 32 bits
_SORTED_SCORE_16_BITS = 6.0  # the same in masked scores of 16 bits: sorted ones are made in float32
_SORTED_BLOCK = 150_000  # cost of a block of one head beside its scores, in masked scores
_MASK_BYTES = 2**23  # of the mask of one block of queries, where that leaves at least `_FEWEST_ROWS` of them
_FEWEST_ROWS = 32
_TABLE_ENTRIES = 2**23  # of one row of the mask for each ball; where there are more balls, they are compared


def torch_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scoring: Scoring) -> Tensor:
    """`topo_adapter.ops.attention.hard_attention` in torch: O(N) memory without gradients."""
    learning = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    only_sorted = learning or scoring.softcap is not None
    rows = []
    for b in range(q.shape[0]):
        qb, kb, vb = q[b], k[b], v[b]
        in_order = (
            torch.ones(plan.query_order.shape[1], dtype=torch.bool) if only_sorted else cheaper_sorted(plan, b, q.dtype)
        )
        if in_order.all():
            rows.append(sorted_attention(qb, kb, vb, plan, b, scoring))
        elif not in_order.any():
            rows.append(masked_attention(qb, kb, vb, plan, b, scoring))
        else:
            out = qb.new_empty(*qb.shape[:-1], vb.shape[-1])
            for chosen, is_sorted in ((in_order, True), (~in_order, False)):
                routes = chosen.nonzero()[:, 0].to(q.device)
                part = _of_routes(plan, routes)
                heads = torch.arange(q.shape[1], device=q.device).view(plan.query_order.shape[1], -1)[routes].flatten()
                own = heads // (q.shape[1] // k.shape[1])
                tensors = qb[heads], kb[own], vb[own]
                out[heads] = (
                    sorted_attention(*tensors, part, b, scoring)
                    if is_sorted
                    else masked_attention(*tensors, part, b, scoring)
                )
            rows.append(out)
    return torch.stack(rows)


def _of_routes(plan: Plan, routes: Tensor) -> Plan:
    """The plan of some route heads."""
    names = ("query_order", "range_start", "range_end", "key_order")
    return replace(plan, **{name: getattr(plan, name)[:, routes] for name in names})


def cheaper_sorted(plan: Plan, b: int, dtype: torch.dtype) -> Tensor:
    """bool `[R]` on the host: the route heads of row `b` that are cheaper sorted than masked, in a dtype."""
    blocks = -(-plan.document_start.shape[1] // _BLOCK)
    causal = _scores_of(plan.document_start[b], plan.local_end[b])
    beside = _scores_of(plan.local_start[b], plan.local_end[b]) + _scores_of(*_sinks(plan, b))
    in_order = _scores_of(plan.range_start[b], plan.range_end[b]).sum(-1) + beside
    score = _SORTED_SCORE_16_BITS if dtype.itemsize == 2 else _SORTED_SCORE
    return (score * in_order + _SORTED_BLOCK * blocks * plan.query_order.shape[2] < causal).cpu()


# ---------------------------------------------------------------- ranges of a block


def _spans(start: Tensor, end: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """First and behind the last of the ranks that each block of rows touches, `[..., T]` to `[..., blocks]`.

    Rows that touch none may hold anything; a block of them is `0, 0`.
    """
    rest = -start.shape[-1] % block
    start, end = (pad(x, (0, rest)).unflatten(-1, (-1, block)) for x in (start, end))
    empty = end <= start
    high = end.masked_fill(empty, 0).amax(-1)
    return torch.minimum(start.masked_fill(empty, torch.iinfo(start.dtype).max).amin(-1), high), high


def _spans_on_host(start: Tensor, end: Tensor, block: int) -> list[tuple[int, int]]:
    low, high = torch.stack(_spans(start, end, block)).tolist()
    return list(zip(low, high, strict=True))


def _scores_of(start: Tensor, end: Tensor) -> Tensor:
    """Scores that all rows make in blocks of `_BLOCK`, `[..., T]` to float64 `[...]`."""
    low, high = _spans(start, end, _BLOCK)
    return _BLOCK * (high - low).sum(-1, dtype=torch.float64)


def _sinks(plan: Plan, b: int) -> tuple[Tensor, Tensor]:
    """Local ranks `[T]` of the first sink of each query of row `b` and of the first key behind its last."""
    first, start = plan.document_start[b], plan.local_start[b]
    # a config may ask for more sinks than an int32 rank can count on top of another
    most = min(plan.num_sink_tokens, plan.key_order.shape[-1])
    return first, torch.minimum(first + most, start)


def _in_local_order(x: Tensor, plan: Plan, b: int) -> Tensor:
    """Keys `[..., S, D]` by local rank."""
    return x if plan.local_order is None else x[..., plan.local_order[b].long(), :]


# ---------------------------------------------------------------- masked


def masked_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, b: int, scoring: Scoring) -> Tensor:
    """Row `b` in blocks of queries under a mask, without a softcap.

    q: `[H, T, D]`; k, v: `[H_kv, S, D]`; returns `[H, T, D]`.

    Only ranks of real keys are read: NaN in padding stays there, which a mask alone would not do.
    """
    heads, (kv_heads, keys, _) = len(q), k.shape
    routes, group = plan.query_order.shape[1], heads // kv_heads
    ks, vs = (_in_local_order(x.to(q.dtype), plan, b)[:, None].expand(-1, group, -1, -1) for x in (k, v))
    query_ball, key_ball, balls = _ball_numbers(plan, b)
    first, local_start, local_end = plan.document_start[b], plan.local_start[b], plan.local_end[b]
    sink_end = _sinks(plan, b)[1]
    block = max(_FEWEST_ROWS, _MASK_BYTES // (q.itemsize * routes * keys) // _FEWEST_ROWS * _FEWEST_ROWS)
    place = torch.arange(keys, dtype=first.dtype, device=q.device)
    seen, hidden = (torch.tensor(x, dtype=q.dtype, device=q.device) for x in (0.0, float("-inf")))
    table = None  # a row of the mask for each ball: copying rows is far cheaper than comparing and writing entries
    if balls * keys <= _TABLE_ENTRIES:
        table = q.new_full((balls, keys), float("-inf")).index_put_((key_ball, place.long().expand_as(key_ball)), seen)
    spans = (_spans_on_host(start, end, block) for start, end in ((first, local_end), (local_start, local_end)))
    sinks = _spans_on_host(first, sink_end, block)
    outs = []
    for i, (whole, near, far) in enumerate(zip(*spans, sinks, strict=True)):
        rows, columns = slice(i * block, (i + 1) * block), slice(*whole)
        grouped = q[:, rows].unflatten(0, (kv_heads, group))  # [H_kv, G, M, D]
        if whole[0] == whole[1]:
            outs.append(q.new_zeros(heads, grouped.shape[2], vs.shape[-1]))
            continue
        bias = hidden
        for visited in query_ball[..., rows].unbind(1):  # [R, M]
            if table is None:
                ball = torch.where(key_ball[:, None, columns] == visited[..., None], seen, hidden)
            else:
                ball = embedding(visited, table[:, columns])  # [R, M, S]
            bias = ball if bias is hidden else torch.maximum(bias, ball)
        for span, start, end in ((near, local_start, local_end), (far, first, sink_end)):
            at, part = place[slice(*span)], bias[..., span[0] - whole[0] : span[1] - whole[0]]
            later = at >= end[rows, None]
            least = torch.where((at >= start[rows, None]) & ~later, seen, hidden)
            if span is near:  # later keys of the ball are hidden
                part.clamp_(least, torch.where(later, hidden, seen))
            else:
                part.clamp_(least)
        bias = bias[:, None].expand(-1, heads // routes, -1, -1).reshape(kv_heads, group, *bias.shape[1:])
        out = scaled_dot_product_attention(grouped, ks[..., columns, :], vs[..., columns, :], bias, scale=scoring.scale)
        outs.append(out.flatten(0, 1))
    return torch.cat(outs, 1).masked_fill((local_end <= local_start)[:, None], 0.0)


def _ball_numbers(plan: Plan, b: int) -> tuple[Tensor, Tensor, int]:
    """The tree pass of row `b` as numbers of balls, in the local pass's orders.

    A query sees the keys before its window whose number is one of its own. The balls of different heads and documents
    have different numbers.

    Returns:
        int64 `[R, m, T]`, 0 for visits that see nothing; int64 `[R, S]`, 1 for keys that nobody sees by the tree; one
        more than the largest number.
    """
    order, starts, ends, key_order = (
        x[b] for x in (plan.query_order, plan.range_start, plan.range_end, plan.key_order)
    )
    length, keys = order.shape[-1], key_order.shape[-1]
    # a ball's keys begin at one rank for all its queries; what sees nothing goes to one more rank, that is cut off
    start = torch.where(ends > starts, starts, keys).long()
    reached = ends.new_zeros(len(ends), keys + 1)
    reached = reached.scatter_reduce_(1, start.flatten(1), ends.flatten(1), "amax")[:, :keys]
    number = (reached > 0).flatten().cumsum(0).view_as(reached) + 1
    rank = torch.arange(keys, dtype=ends.dtype, device=ends.device)
    in_ball = rank < reached.cummax(-1).values
    query = torch.where(order < 0, length, order).long()
    visited = pad(number, (0, 1)).gather(1, start.flatten(1)).view_as(start)
    query_ball = number.new_zeros(*order.shape[:2], length + 1).scatter_(2, query, visited)[..., :length]
    key = torch.where(in_ball, key_order, keys).long()
    key_ball = number.new_ones(len(key_order), keys + 1).scatter_(1, key, number)[:, :keys]
    if plan.local_order is not None:
        key_ball = key_ball[:, plan.local_order[b].long()]
    return query_ball, key_ball, int(number.amax()) + 1


# ---------------------------------------------------------------- a few new tokens


def scanned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    real_queries: Tensor,
    real_keys: Tensor,
    scoring: Scoring,
) -> Tensor:
    """Attention of a few queries under a mask, all keys scored.

    Args:
        q: `[B, H, T, D]`; k, v: `[B, H_kv, S, D]`. visible: bool `[B, R, T, S]`, of the heads' routes.
        real_queries, real_keys: bool `[B, T]`, `[B, S]`.
    """
    kv_heads, heads_per_route = k.shape[1], q.shape[1] // visible.shape[1]
    if graph_is_recorded() or not bool(real_keys.all()):  # NaN would come through any mask
        k, v = (torch.where(real_keys[:, None, :, None], x, 0.0) for x in (k, v))
    if heads_per_route > 1:
        visible = visible.repeat_interleave(heads_per_route, 1)
    # the queries of the heads of a KV head side by side: keys are read once, nothing is repeated
    rows = q.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # [B, H_kv, G T, D]
    seen = visible.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    if scoring.softcap is None:
        bias = torch.zeros((), dtype=q.dtype, device=q.device).where(seen, float("-inf"))
        out = scaled_dot_product_attention(rows, k.to(q.dtype), v.to(q.dtype), bias, scale=scoring.scale)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = masked_softmax(scores_of(rows.to(wide), k.to(wide), scoring), seen)[0] @ v.to(wide)
    return out.to(q.dtype).view(*q.shape[:-1], v.shape[-1]).masked_fill(~real_queries[:, None, :, None], 0.0)


# ---------------------------------------------------------------- sorted


def sorted_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, b: int, scoring: Scoring) -> Tensor:
    """Row `b` in the tree's order, in float32 at least. q: `[H, T, D]`; k, v: `[H_kv, S, D]`; returns `[H, T, D]`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide = q.to(dtype), k.to(dtype), v.to(dtype)
    out, lse = _local_pass(*wide, plan, b, scoring)
    for visit in range(plan.query_order.shape[2]):
        out, lse = _merge(*_tree_pass(*wide, plan, b, visit, scoring), out, lse)
    return out.to(q.dtype)


def scores_of(q: Tensor, k: Tensor, scoring: Scoring) -> Tensor:
    """`[..., T, D]`, `[..., S, D]` to `[..., T, S]`."""
    return scoring.capped(q @ k.transpose(-1, -2) * scoring.scale)


def masked_softmax(scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over visible entries and its log-sum-exp; rows that see nothing give 0 and -inf.

    Empty rows are filled before the softmax: its gradient over nothing but -inf would be NaN.
    """
    empty = ~visible.any(-1)
    scores = scores.masked_fill(~visible, float("-inf")).masked_fill(empty[..., None], 0.0)
    lse = scores.logsumexp(-1)
    probs = (scores - lse[..., None]).exp().masked_fill(empty[..., None], 0.0)
    return probs, lse.masked_fill(empty, float("-inf"))


def _tree_pass(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, b: int, visit: int, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """The ball, without sinks and window, of one visit of every query; `[H, T, D]` and log-sum-exp `[H, T]`."""
    heads, length, _ = q.shape
    per_route, per_kv = heads // plan.query_order.shape[1], heads // k.shape[0]
    outs, lses = [], []
    for h in range(heads):
        r = h // per_route
        order = _whole_order(plan.query_order[b, r, visit].long())
        starts, ends = plan.range_start[b, r, visit], plan.range_end[b, r, visit]
        qs, key_order = q[h][order], plan.key_order[b, r].long()
        ks, vs = k[h // per_kv][key_order], v[h // per_kv][key_order]
        out, lse = [], []
        for i, (low, high) in enumerate(_spans_on_host(starts, ends, _BLOCK)):
            rows = slice(i * _BLOCK, (i + 1) * _BLOCK)
            rank = torch.arange(low, high, device=q.device)
            scores = scores_of(qs[rows], ks[low:high], scoring)
            probs, total = masked_softmax(scores, (rank >= starts[rows, None]) & (rank < ends[rows, None]))
            out.append(probs @ vs[low:high])
            lse.append(total)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(length, device=q.device))
        outs.append(torch.cat(out)[inverse])
        lses.append(torch.cat(lse)[inverse])
    return torch.stack(outs), torch.stack(lses)


def _whole_order(order: Tensor) -> Tensor:
    """A permutation: padding queries may be -1 in a plan."""
    left_out = torch.ones_like(order, dtype=torch.bool)
    left_out[order[order >= 0]] = False
    return torch.cat([order[order >= 0], left_out.nonzero()[:, 0]])


def _local_pass(q: Tensor, k: Tensor, v: Tensor, plan: Plan, b: int, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Window and sinks of every query; `[H, T, D]` and log-sum-exp `[H, T]`."""
    group = q.shape[0] // k.shape[0]
    ks, vs = (_in_local_order(x, plan, b)[:, None] for x in (k, v))  # [H_kv, 1, S, D]
    window, sinks = (plan.local_start[b], plan.local_end[b]), _sinks(plan, b)
    spans = zip(_spans_on_host(*window, _BLOCK), _spans_on_host(*sinks, _BLOCK), strict=True)
    outs, lses = [], []
    for i, touched in enumerate(spans):
        rows = slice(i * _BLOCK, (i + 1) * _BLOCK)
        qg = q[:, rows].unflatten(0, (-1, group))  # [H_kv, G, M, D]
        scores, visible = [], []
        for (low, high), (start, end) in zip(touched, (window, sinks), strict=True):
            rank = torch.arange(low, high, device=q.device)
            scores.append(scores_of(qg, ks[..., low:high, :], scoring))
            visible.append((rank >= start[rows, None]) & (rank < end[rows, None]))
        probs, lse = masked_softmax(torch.cat(scores, -1), torch.cat(visible, -1))
        near, far = probs.split([high - low for low, high in touched], -1)
        near_values, far_values = (vs[..., low:high, :] for low, high in touched)
        outs.append((near @ near_values + far @ far_values).flatten(0, 1))
        lses.append(lse.flatten(0, 1))
    return torch.cat(outs, 1), torch.cat(lses, 1)


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine two disjoint attentions by log-sum-exp, and that of both; 0 and -inf where both are empty."""
    top = torch.maximum(lse_a, lse_b)
    top = top.masked_fill(top.isinf(), 0.0).detach()
    weight_a, weight_b = (lse_a - top).exp()[..., None], (lse_b - top).exp()[..., None]
    total = weight_a + weight_b
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (top + total[..., 0].log()).masked_fill(empty[..., 0], float("-inf"))
    return (out_a * weight_a + out_b * weight_b) / total, lse
