"""Training objectives of the router (docs/method.md, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .backend import kernels_serve
from .layout import SequenceLayout, causal_pairs
from .plan import local_plan
from .relaxation import leaf_distribution, leaf_distributions, scaled_scores
from .router import RoleDigits, Routes
from .visibility import always_visible


def balance_loss(routes: Routes, real: Tensor) -> Tensor:
    """Switch Transformer load balance per level: `p * sum_c f_c P_c`, averaged over roles, heads and levels.

    `f_c` is the share of tokens whose hard digit is `c` (no gradient), `P_c` the mean probability of `c`.
    1 when balanced, `p` when every token takes one child.

    Args:
        routes: digits of `[B, H, T]` tokens. real: bool `[B, T]`, padding is left out.
    """
    weight = real.float() / real.sum().clamp(min=1)

    def of(role: RoleDigits) -> Tensor:
        arity = role.probs.shape[-1]
        hard = torch.nn.functional.one_hot(role.digits, arity).float()
        f = torch.einsum("bhtlc,bt->hlc", hard, weight)
        mean = torch.einsum("bhtlc,bt->hlc", role.probs, weight)
        return arity * (f * mean).sum(-1).mean()

    return of(routes.query) if routes.key is routes.query else 0.5 * (of(routes.query) + of(routes.key))


def expected_density(query_leaves: Tensor, key_leaves: Tensor, layout: SequenceLayout) -> Tensor:
    """Expected share of causal pairs that share a ball, per head: the tree's cost itself.

    `sum_i <P_q(i), sum_{j <= i} P_k(j)> / sum_i (i + 1)` within documents; `O(N p**D)` by a running sum.

    Args:
        query_leaves, key_leaves: `[B, H, N, p**D]`. layout: of the same tokens; documents are contiguous.

    Returns:
        `[H]`, in `[0, 1]`.
    """
    real = layout.real[:, None, :, None]
    running = (key_leaves * real).cumsum(2)
    index = torch.arange(layout.position.shape[1], device=real.device).expand_as(layout.position)
    starts = torch.where(layout.position == 0, index, 0).cummax(1).values
    before = torch.cat([torch.zeros_like(running[:, :, :1]), running], dim=2)
    before = before.gather(2, starts[:, None, :, None].expand_as(running))
    pairs = (query_leaves * (running - before) * real).sum((0, 2, 3))
    return pairs / (layout.position + 1).sum().clamp(min=1)


class AuxiliaryLossHost(Protocol):
    """What `attach_loss` reads at backward time."""

    auxiliary_scale: float | Tensor


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, host: AuxiliaryLossHost) -> Tensor:
        ctx.host = host
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.as_tensor(ctx.host.auxiliary_scale, dtype=torch.float32, device=grad.device), None


def attach_loss(output: Tensor, loss: Tensor, host: AuxiliaryLossHost) -> Tensor:
    """Return `output` unchanged and give `loss` the gradient `host.auxiliary_scale` when `output` gets its own.

    An identity in the graph, so it is right under both kinds of gradient checkpointing, where a tensor
    carried out of the layer would double or lose its gradient. The scale is read during backward: the
    trainer sets it to what the main loss is scaled by (gradient accumulation, fp16 loss scaling).
    """
    return _AttachLoss.apply(output, loss.float(), host)


def kept_mass(
    q: Tensor,
    k: Tensor,
    query_leaves: Sequence[Tensor],
    key_leaves: Tensor,
    layout: SequenceLayout,
    rows: Tensor,
    *,
    local_window: int,
    num_sink_tokens: int,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Share of each sampled query's dense attention that the soft mask keeps, at every depth.

    `kept_i(d) = local_i + <P_q^d(i), sum_{j far} A_ij P_k^d(j)>` with `A` the dense attention, `local` its
    mass on window and sinks and `far` the other causal keys. The leaf distributions ride through attention
    as values, so all depths come from one product; `-log kept` is KL(masked || dense) for a 0/1 mask.

    Args:
        q: `[B, H, N, D]`; k: `[B, H_kv, N, D]`; no gradient flows to them.
        query_leaves: for each depth `d` in question `[B, H, M, p**d]`, of the sampled queries.
        key_leaves: `[B, H, N, p**L]` at the deepest of them. rows: int64 `[M]`, indices of the sampled queries.

    Returns:
        float32 `[len(query_leaves), B, H, M]` in `(0, 1]`; memory is `O(N)` on a GPU and
        `O(M * N)` elsewhere, with `M` fixed by the caller. `rows` ascend.
    """
    sampled = q if rows.numel() == q.shape[2] else q[:, :, rows]
    options: dict[str, Any] = {"num_sink_tokens": num_sink_tokens, "scale": scale, "softcap": softcap}
    if 16 <= q.shape[-1] <= 256 and key_leaves.shape[-1] <= 256 and kernels_serve(q, k, key_leaves):
        from topo_kernels import far_values

        plan = local_plan(layout, layout, local_window, num_sink_tokens)
        ranges = (t[:, rows].contiguous() for t in (plan.document_start, plan.start, plan.end))
        values, local = far_values(sampled, k, key_leaves, plan.order, *ranges, **options)
    else:
        values, local = _torch_far_values(sampled, k, key_leaves, layout, rows, local_window=local_window, **options)
    kept = [local + (leaves * _coarsen_to(values, leaves.shape[-1])).sum(-1) for leaves in query_leaves]
    # rows of padding have no attention; they count as kept, that is as no loss
    return torch.where(layout.real[:, None, rows], torch.stack(kept), 1.0).clamp(1e-6, 1.0)


def _torch_far_values(
    q: Tensor,
    k: Tensor,
    key_leaves: Tensor,
    layout: SequenceLayout,
    rows: Tensor,
    *,
    local_window: int,
    num_sink_tokens: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`sum_{j far} A_ij P_k(j)` `[B, H, M, V]` and the local mass `[B, H, M]` of sampled queries `[B, H, M, D]`."""
    part = SequenceLayout(layout.document[:, rows], layout.position[:, rows])
    with torch.no_grad():
        scores = scaled_scores(q, k, scale, softcap)
        causal = causal_pairs(part, layout)[:, None]
        always = always_visible(part, layout, local_window, num_sink_tokens)[:, None]
        attention = scores.masked_fill(~causal, torch.finfo(scores.dtype).min).softmax(-1).float()
        far = attention.masked_fill(always | ~causal, 0.0)
        local = attention.masked_fill(~always, 0.0).sum(-1)
    return far @ key_leaves, local


def distillation_loss(
    q: Tensor,
    k: Tensor,
    routes: Routes,
    layout: SequenceLayout,
    *,
    local_window: int,
    num_sink_tokens: int,
    scale: float,
    softcap: float | None = None,
    num_queries: int = 256,
    density_weight: float = 0.05,
) -> Tensor:
    """Layer-local distillation: keep the dense attention's mass at every depth, at a price on density.

    Mean over depths `d` in `1..L` and heads of `-log kept(d) + density_weight * p**d * density(d)`, with the
    leaf-level `density(d) = sum_b mean P_q(b) mean P_k(b)`. The price is linear in density and in units of the
    balanced share `p**-d`: a head opens balls for as long as a unit of density keeps enough mass. A logarithmic
    price makes heads all or nothing (docs/log.md).
    `num_queries` queries are sampled per call, which leaves the gradient unbiased.

    Args:
        q: `[B, H, N, D]`; k: `[B, H_kv, N, D]`. routes: `[B, H, N, L, p]` per role.

    Returns:
        float32 scalar.
    """
    length, depth = q.shape[2], routes.query.probs.shape[-2]
    rows = torch.randperm(length, device=q.device)[: min(num_queries, length)].sort().values
    query_leaves = leaf_distributions(routes.query.probs[:, :, rows], depth)[1:]
    key_leaves = leaf_distribution(routes.key.probs, depth)
    kept = kept_mass(
        q,
        k,
        query_leaves,
        key_leaves,
        layout,
        rows,
        local_window=local_window,
        num_sink_tokens=num_sink_tokens,
        scale=scale,
        softcap=softcap,
    )
    weight = layout.real.float() / layout.real.sum().clamp(min=1)
    key_mean = torch.einsum("bhnl,bn->hl", key_leaves, weight)
    weight = layout.real[:, rows].float() / layout.real[:, rows].sum().clamp(min=1)
    query_mean = torch.einsum("bhnl,bn->hl", query_leaves[-1], weight)
    price = torch.zeros_like(kept[0, 0, 0, 0])
    for leaves in query_leaves:
        balls = leaves.shape[-1]
        density = (_coarsen_to(query_mean, balls) * _coarsen_to(key_mean, balls)).sum(-1)
        price = price + (density * balls).mean() / depth
    return -kept.log().mean() + density_weight * price


def _coarsen_to(leaves: Tensor, balls: int) -> Tensor:
    """Sum `[..., p**L]` over the digits after the first `d`, where `balls = p**d`."""
    return leaves if leaves.shape[-1] == balls else leaves.unflatten(-1, (-1, balls)).sum(-2)
