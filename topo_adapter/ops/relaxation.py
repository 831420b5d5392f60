"""Differentiable relaxations of the tree mask and the bridge to the hard one (docs/method.md, section 4)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core.device import sent
from ..core.scoring import Scoring
from ..core.visibility import Visibility, per_head
from .attention import hard_attention
from .backend import device_misfits, device_serves, misfits, warn_of_slow_training
from .plan import Plan, make_plan
from .router import Routes

#: A hidden key's logit may exceed the visible ones without limit: the derivative of the output in its mask, at 0, is
#: `w (v_j - out)` with `w` its weight over the sum of theirs, but revealing it changes the output by `w / (1 + w)` of
#: that, never by more than all. So `w` enters the router's gradient as `min(w, exp(_MAX_GAP)) = min(w, 1)`.
_MAX_GAP = 0.0


def leaf_distributions(probs: Tensor, depth: int) -> list[Tensor]:
    """Distributions over the balls at depths `0..depth`: outer products of the first level distributions.

    Args:
        probs: `[..., L, p]`, `L >= depth`.

    Returns:
        One tensor `[..., p**d]` for each `d`; entry `b` belongs to ball `b` of `topo_adapter.core.tree.ball`. Products
        only, so the gradient is finite at one-hot input, where the gradient of `cumprod` divides by zero.
    """
    leaves = [probs.new_ones((*probs.shape[:-2], 1))]
    for level in range(depth):
        leaves.append((probs[..., level, :, None] * leaves[-1][..., None, :]).flatten(-2))
    return leaves


def leaf_distribution(probs: Tensor, depth: int) -> Tensor:
    """The last of `leaf_distributions`: `[..., p**depth]`."""
    return leaf_distributions(probs, depth)[-1]


class _AtLeastOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probs: Tensor, draws: Tensor) -> Tensor:
        ctx.save_for_backward(probs, draws)
        # small probabilities drown in a 1, and those that sum to a rounding more than 1 have no logarithm
        several = -torch.expm1(draws * torch.log1p(-probs.clamp(max=1.0)))
        return torch.where(draws == 1, probs, several)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        probs, draws = ctx.saved_tensors
        return grad * draws * (1 - probs).clamp(min=0.0) ** (draws - 1), None


def visit_probability(probs: Tensor, visits: Sequence[int]) -> Tensor:
    """`v = 1 - (1 - P)**m`: that at least one of `m` independent draws is a ball of probability `P` in `[0, 1]`.

    Args:
        probs: `P`, `[B, H, ...]`. visits: `m >= 1` of each head; with one `P` itself is returned.

    Returns:
        `v` in `[0, 1]`, relative error a few roundings; its gradient `m (1 - P)**(m - 1)` is finite everywhere.
    """
    if max(visits) == 1:
        return probs
    return _AtLeastOne.apply(probs, sent(visits, probs.device).view(-1, *[1] * (probs.ndim - 2)))


def levels_at_depths(probs: Tensor, depths: Sequence[int]) -> Tensor:
    """Level probabilities of heads that have different depths, cut at the deepest.

    A head of less depth goes on as if all its tokens took child 0, so that inner products of two roles are those at
    the head's own depth. Depth 0 is one ball.

    Args:
        probs: `[B, H, T, L, p]`; depths: one for each of the `H` heads, `0 <= depth <= L`, the deepest >= 1.

    Returns:
        `[B, H, T, max(depths), p]`, differentiable.
    """
    levels, arity = max(depths), probs.shape[-1]
    if min(depths) == levels:
        return probs[..., :levels, :]
    taken, child_0 = _levels_taken(tuple(depths), arity, probs.device)
    return torch.where(taken, probs[..., :levels, :], child_0)


@functools.lru_cache(maxsize=256)  # forward and backward pass ask for the same
def _levels_taken(depths: tuple[int, ...], arity: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """bool `[H, 1, levels, 1]`: the levels that a head's depth reaches; float32 `[p]`: certainty of child 0."""
    levels = torch.arange(max(depths), device=device)
    taken = levels < sent(depths, device)[:, None]
    return taken[:, None, :, None], (torch.arange(arity, device=device) == 0).float()


def above_the_leaves(query_probs: Tensor, depths: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Queries and depths in `0..L` with the inner products of `depths` in `0..L + 1`: below the leaves a query is in no
    ball, so its probabilities `[B, H, T, L, p]` become 0."""
    levels = query_probs.shape[-2]
    if max(depths) > levels:
        inside = sent([depth <= levels for depth in depths], query_probs.device).bool()
        query_probs = torch.where(inside[:, None, None, None], query_probs, 0.0)
    return query_probs, _depths_in_the_tree(depths, levels)


def _depths_in_the_tree(depths: Sequence[int], levels: int) -> list[int]:
    """The same, but for heads below the leaves: where queries are 0 any level will do, and one is the cheapest."""
    return [depth if depth <= levels else 1 for depth in depths]


def shared_prefix_probability(
    query_probs: Tensor, key_probs: Tensor, depths: Sequence[int], visits: Sequence[int]
) -> Tensor:
    """`S_ij(D_h) = <v_q(i), P_k(j)>`: the probability that one of the query's visits and the key share their first
    `D_h` digits. `v_q` is `P_q` with one visit, see `visit_probability`.

    Args:
        query_probs: `[B, H, T, L, p]`; key_probs: `[B, H, S, L, p]`; depths: `D_h` for each of the `H` heads, in
            `0..L + 1`. visits: of a query of each head, >= 1.

    Returns:
        `[B, H, T, S]`, differentiable. One matrix product per distinct depth and visits; no `T x S x L` tensor.
    """
    query_probs, depths = above_the_leaves(query_probs, depths)
    rows: list[Tensor | None] = [None] * len(depths)
    of_heads = list(zip(depths, visits, strict=True))
    for depth, count in sorted(set(of_heads)):
        heads = [h for h, each in enumerate(of_heads) if each == (depth, count)]
        query, key = leaf_distribution(query_probs[:, heads], depth), leaf_distribution(key_probs[:, heads], depth)
        query = visit_probability(query, [count] * len(heads))
        for h, shared in zip(heads, (query @ key.transpose(-1, -2)).unbind(1), strict=True):
            rows[h] = shared
    return torch.stack([row for row in rows if row is not None], dim=1)


def scaled_scores(q: Tensor, k: Tensor, scoring: Scoring) -> Tensor:
    """Attention logits `[B, H, T, S]` from `q` `[B, H, T, D]` and `k` `[B, H_kv, S, D]`.

    At least float32: in float16 a dot product overflows at 65504 (one of the paper's fp16 traps).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(dtype).unflatten(1, (k.shape[1], -1))
    return scoring.capped((grouped @ k.to(dtype).transpose(-1, -2)[:, :, None] * scoring.scale).flatten(1, 2))


def bridged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Routes | None,
    visibility: Visibility,
    scoring: Scoring,
    *,
    homotopy: float,
    bridge: Literal["full", "masked"],
    plan: Plan | None = None,
    block: int = 256,
) -> tuple[Tensor, Tensor]:
    """Attention whose weights are multiplied by `1 - c + c m` and renormalised (docs/method.md, section 3).

    `m` is 1 for visible pairs and 0 for the others. Its gradient is that of the shared-prefix probability, unscaled by
    `c`, for every causal pair ('full') or for visible ones only ('masked', the paper's form).

    Args:
        q: `[B, H, T, D]`; k, v: `[B, H_kv, S, D]`.
        routes: probabilities of the same `T = S` tokens, `[B, R, T, L, p]` per role; None = no gradient to the router.
        homotopy: `c` in `[0, 1]`.
        plan: of `visibility`; None makes it where it is needed.
        block: queries per block; memory is `O(block * S)` per head, in backward too (blocks are recomputed). On a GPU
            the kernels take over where `homotopy` is 1, in `O(S)`.

    Returns:
        out: `[B, H, T, D]` in q's dtype; rows of padding queries are 0.
        far_pairs: at least float32 `[H]`, how many pairs the tree alone makes visible, neither in a window nor with a
            sink: what a head costs. The value is that of the hard mask, the router's gradient that of the soft one.
    """
    depths = visibility.rule.depths
    if routes is not None:
        routes = routes.per_head(len(depths))
    if not (reasons := _no_kernel(q, k, v, routes, visibility, homotopy)):
        plan = make_plan(visibility) if plan is None else plan
        return _bridged_by_kernels(q, k, v, routes, visibility, plan, scoring, bridge)
    if q.is_cuda and _router_learns(routes):
        warn_of_slow_training("; ".join(reasons))

    def attend(
        q: Tensor, k: Tensor, v: Tensor, probs: Tensor | None, key_probs: Tensor | None, rows: slice
    ) -> tuple[Tensor, Tensor]:
        part = visibility.of_rows(rows)
        causal, always = part.causal()[:, None], part.always()[:, None]
        hard = per_head(part.mask(), len(depths))
        scores = scaled_scores(q, k, scoring)
        far_pairs = (hard & ~always).sum((0, 2, 3)).to(scores.dtype)
        soft = None
        if probs is not None and key_probs is not None:
            soft = shared_prefix_probability(probs, key_probs, depths, visibility.rule.visits).to(scores.dtype)
            soft = torch.where(always, 1.0, soft)
            far_pairs = far_pairs + torch.where(causal & ~always, soft - soft.detach(), 0.0).sum((0, 2, 3))
        # weights in the exponent, and shifted by the largest term: neither a hidden maximum nor a tiny weight can
        # underflow the rest
        weight = torch.where(causal, 1 - homotopy + homotopy * hard.to(scores.dtype), 0.0)
        exponent = scores + weight.log()
        top = exponent.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
        weighted = (exponent - top).exp()
        if soft is not None:  # zero in the forward pass, the router's gradient in the backward pass
            reach = hard if bridge == "masked" else causal
            # capped relative to the row's log-sum-exp, which a kernel's backward pass knows and `top` it does not
            mass = weighted.detach().sum(-1, keepdim=True)
            gap = (scores.detach() - top - mass.log()).clamp(max=_MAX_GAP)
            weighted = weighted + torch.where(reach, soft - soft.detach(), 0.0) * gap.exp() * mass
        total = weighted.sum(-1, keepdim=True)
        values = v.to(scores.dtype)
        out = (weighted.unflatten(1, (v.shape[1], -1)) @ values[:, :, None]).flatten(1, 2)
        return out / torch.where(total == 0, 1.0, total), far_pairs

    needs_grad = torch.is_grad_enabled()
    out = []
    with torch.autocast(q.device.type, enabled=False):
        for start in range(0, q.shape[2], block):
            rows = slice(start, min(start + block, q.shape[2]))
            probs = None if routes is None else routes.query.probs[:, :, rows]
            key_probs = None if routes is None else routes.key.probs
            arguments = (q[:, :, rows], k, v, probs, key_probs, rows)
            if needs_grad:
                out.append(checkpoint(attend, *arguments, use_reentrant=False, preserve_rng_state=False))
            else:
                out.append(attend(*arguments))
    blocks, far_pairs = zip(*out, strict=True)
    return torch.cat(blocks, dim=2).to(q.dtype), torch.stack(far_pairs).sum(0)


def _router_learns(routes: Routes | None) -> bool:
    return routes is not None and torch.is_grad_enabled() and any(role.probs.requires_grad for role in routes)


def _no_kernel(
    q: Tensor, k: Tensor, v: Tensor, routes: Routes | None, visibility: Visibility, homotopy: float
) -> list[str]:
    """Why the bridge does not run on kernels; empty if it does. A router that learns needs more of them."""
    learns, deepest = _router_learns(routes), max(_depths_in_the_tree(visibility.rule.depths, visibility.rule.levels))
    found = misfits(
        "bridge",
        widths=(q.shape[-1], v.shape[-1]),
        leaves=visibility.rule.arity**deepest if learns else 1,
        visits=visibility.rule.most_visits,
        homotopy=homotopy,
    )
    if not q.dtype == k.dtype == v.dtype:
        found.append(f"queries, keys and values must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if learns and routes is not None and routes.query.probs.dtype != torch.float32:
        found.append(f"the router's probabilities must be float32, got {routes.query.probs.dtype}")
    if not device_serves("bridge", q, k, v):
        found += device_misfits(q.device, q.dtype, k.dtype, v.dtype) or ["kernels are switched off"]
    return found


def _bridged_by_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Routes | None,
    visibility: Visibility,
    plan: Plan,
    scoring: Scoring,
    bridge: Literal["full", "masked"],
) -> tuple[Tensor, Tensor]:
    """`bridged_attention` at homotopy 1: the hard attention, and its router's gradient."""
    depths = visibility.rule.depths
    if routes is None or not _router_learns(routes) or max(depths) == 0:
        return hard_attention(q, k, v, plan, scoring), per_head(plan.far_count().float(), len(depths), dim=0)
    from topo_kernels import bridged_topology_attention

    balls = None
    if bridge == "masked":  # only pairs of one ball pass the gradient on
        query_balls, key_ball = visibility.by_head().balls()
        balls = query_balls.int(), key_ball.int()
    with torch.autocast(q.device.type, enabled=False):
        query_probs, reached = above_the_leaves(routes.query.probs, depths)
        return bridged_topology_attention(
            q,
            k,
            v,
            levels_at_depths(query_probs, reached),
            levels_at_depths(routes.key.probs, reached),
            plan,
            scoring,
            max_gap=_MAX_GAP,
            balls=balls,
            visits=visibility.rule.several_on(q.device),
        )
