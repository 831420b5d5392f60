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

        return topology_attention(
            q,
            k,
            v,
            plan.query_order,
            plan.range_start,
            plan.range_end,
            plan.key_order,
            plan.local_order,
            plan.document_start,
            plan.local_start,
            plan.local_end,
            num_sink_tokens=plan.num_sink_tokens,
            scale=scale,
            softcap=softcap,
        )
    return _torch_attention(q, k, v, plan, scale, softcap)


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
        query_ball, key_ball = query_address % balls[:, None], key_address.transpose(1, 2).int() % balls[:, None]
        visible = visible_pairs(query_ball, key_ball, query, key.layout, local_window, num_sink_tokens)
        return _masked_attention(q, k, v, visible, scale, softcap)
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
        local_window=local_window,
        num_sink_tokens=num_sink_tokens,
        scale=scale,
        softcap=softcap,
    )


def _torch_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, softcap: float | None, block: int = 128
) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = []
    for b in range(q.shape[0]):
        qb, kb, vb = (x[b].to(dtype) for x in (q, k, v))
        tree_out, tree_lse = _tree_pass(qb, kb, vb, plan, b, scale, softcap, block)
        local_out, local_lse = _local_pass(qb, kb, vb, plan, b, scale, softcap, block)
        rows.append(_merge(tree_out, tree_lse, local_out, local_lse))
    return torch.stack(rows).to(q.dtype)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _masked_softmax(scores: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over visible entries and its log-sum-exp; rows that see nothing give 0 and -inf.

    Empty rows are filled before the softmax: its gradient over nothing but -inf would be NaN.
    """
    empty = ~visible.any(-1)
    scores = scores.masked_fill(~visible, float("-inf")).masked_fill(empty[..., None], 0.0)
    lse = scores.logsumexp(-1)
    probs = (scores - lse[..., None]).exp().masked_fill(empty[..., None], 0.0)
    return probs, lse.masked_fill(empty, float("-inf"))


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None) -> Tensor:
    """visible: bool `[B, R, T, S]`, of the heads' routes."""
    dtype, kv_heads = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    grouped = q.to(dtype).unflatten(1, (kv_heads, -1))
    scores = _scores(grouped, k.to(dtype)[:, :, None], scale, softcap).flatten(1, 2)
    probs, _ = _masked_softmax(scores, visible.repeat_interleave(q.shape[1] // visible.shape[1], 1))
    return (probs.unflatten(1, (kv_heads, -1)) @ v.to(dtype)[:, :, None]).flatten(1, 2).to(q.dtype)


def _tree_pass(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, b: int, scale: float, softcap: float | None, block: int
) -> tuple[Tensor, Tensor]:
    """The ball, without sinks and window, of every query; `[H, T, D]` and log-sum-exp `[H, T]`."""
    heads, length, _ = q.shape
    per_route, per_kv = heads // plan.query_order.shape[1], heads // k.shape[0]
    outs, lses = [], []
    for h in range(heads):
        r = h // per_route
        order = _whole_order(plan.query_order[b, r].long())
        starts, ends = plan.range_start[b, r], plan.range_end[b, r]
        qs, key_order = q[h][order], plan.key_order[b, r].long()
        ks, vs = k[h // per_kv][key_order], v[h // per_kv][key_order]
        out, lse = [], []
        for i in range(0, length, block):
            start, end = starts[i : i + block, None], ends[i : i + block, None]
            low, high = _bounds(start, end)
            rank = torch.arange(low, high, device=q.device)
            scores = _scores(qs[i : i + block], ks[low:high], scale, softcap)
            probs, total = _masked_softmax(scores, (rank >= start) & (rank < end))
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


def _bounds(start: Tensor, end: Tensor) -> tuple[int, int]:
    """The range of ranks that non-empty rows of a block touch, on the host (this is the CPU path)."""
    filled = end > start
    if not bool(filled.any()):
        return 0, 0
    return int(start[filled].min()), int(end[filled].max())


def _local_pass(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, b: int, scale: float, softcap: float | None, block: int
) -> tuple[Tensor, Tensor]:
    """Window and sinks of every query; `[H, T, D]` and log-sum-exp `[H, T]`."""
    heads, length, _ = q.shape
    group, sinks = heads // k.shape[0], plan.num_sink_tokens
    ks, vs = (x if plan.local_order is None else x[:, plan.local_order[b].long()] for x in (k, v))  # [H_kv, S, D]
    outs, lses = [], []
    for i in range(0, length, block):
        rows = slice(i, i + block)
        first, start, end = (
            x[b, rows].long()[:, None] for x in (plan.document_start, plan.local_start, plan.local_end)
        )
        low, high = _bounds(start, end)
        rank = torch.arange(low, high, device=q.device)
        qg = q[:, rows].unflatten(0, (-1, group))  # [H_kv, G, M, D]
        scores = [_scores(qg, ks[:, None, low:high], scale, softcap)]
        visible = [(rank >= start) & (rank < end)]
        sink = first + torch.arange(sinks, device=q.device)  # [M, num_sinks], one set per query: packing
        present = sink < start
        visible.append(present)
        sink = sink.clamp(max=ks.shape[1] - 1)
        sink_values = vs[:, sink].masked_fill(~present[..., None], 0.0)  # absent sinks may point at padding
        scores.append(_scores(qg[..., None, :], ks[:, sink][:, None], scale, softcap)[..., 0, :])
        probs, lse = _masked_softmax(torch.cat(scores, -1), torch.cat(visible, -1))
        window, far = probs.split([high - low, sinks], -1)
        out = window @ vs[:, None, low:high] + (far[..., None, :] @ sink_values[:, None])[..., 0, :]
        outs.append(out.flatten(0, 1))
        lses.append(lse.flatten(0, 1))
    return torch.cat(outs, 1), torch.cat(lses, 1)


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Tensor:
    """Combine two disjoint attentions by log-sum-exp; 0 where both are empty."""
    top = torch.maximum(lse_a, lse_b)
    top = top.masked_fill(top.isinf(), 0.0).detach()
    weight_a, weight_b = (lse_a - top).exp()[..., None], (lse_b - top).exp()[..., None]
    total = weight_a + weight_b
    return (out_a * weight_a + out_b * weight_b) / total.masked_fill(total == 0, 1.0)
