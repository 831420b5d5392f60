"""Training objectives of the router (docs/method.md, section 5)."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core.rule import Rule
from ..core.scoring import Scoring
from ..core.visibility import Visibility
from .backend import kernels_serve
from .plan import local_plan
from .relaxation import leaf_distribution, leaf_distributions, scaled_scores, visit_probability
from .router import RoleDigits, Routes


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


class _GradientAtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor | None, ...], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients  # not saved_tensors: gradient checkpointing would make them again, to no avail
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, ()
        return None, None, *(None if each is None else each * grad for each in gradients)


def gradient_at_once(loss: Tensor, parameters: list[Tensor], keep_graph: bool = False) -> Tensor:
    """The scalar `loss`, whose gradient in `parameters` is computed now; its graph is free to go, unless it is kept
    because another loss needs a part of it.

    For losses that have nothing but `parameters` in common: only one of their graphs is alive at a time, and what
    stays until `backward` is as large as the parameters. One `backward` is all that the result allows.
    """
    learning = [each for each in parameters if each.requires_grad]
    gradients = torch.autograd.grad(loss, learning, allow_unused=True, retain_graph=keep_graph)
    return _GradientAtOnce.apply(loss.detach(), gradients, *learning)


def kept_mass(
    q: Tensor,
    k: Tensor,
    query_probs: Tensor,
    key_probs: Tensor,
    visibility: Visibility,
    rows: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Share of each sampled query's dense attention that the soft mask keeps at every depth, and mean distributions.

    `kept_i(d) = local_i + <v_q^d(i), sum_{j far} A_ij P_k^d(j)>` with `A` the dense attention, `local` its
    mass on window and sinks, `far` the other causal keys, and `v_q` the probability that a query visits a ball
    (`visit_probability`), `P_q` itself with one visit. The leaf distributions ride through attention
    as values, so all depths come from one product; `-log kept` is KL(masked || dense) for a 0/1 mask.

    Args:
        q: `[B, H, N, D]`; k: `[B, H_kv, N, D]`; no gradient flows to them.
        query_probs: `[B, H, M, L, p]`, level probabilities of the sampled queries; key_probs: `[B, H, N, L, p]`.
        visibility: of the `N` tokens; its layouts and rule, not its addresses.
        rows: int64 `[M]`, ascending: the sampled queries' indices.

    Returns:
        kept: float32 `[L, B, H, M]` in `(0, 1]`, for the depths `1..L`; 1 in padding.
        query_means: `[H, p**d]` for the depths `1..L`, `v_q` averaged over real sampled queries.
        key_mean: `[H, p**L]`, leaf distributions averaged over real keys.
        Memory is `O(N)` on a GPU and `O(M * N)` elsewhere, with `M` fixed by the caller.
    """
    sampled = q if rows.numel() == q.shape[2] else q[:, :, rows]
    layout, real = visibility.query, visibility.query.real[:, rows]
    query_weight, key_weight = (some.float() / some.sum().clamp(min=1) for some in (real, layout.real))
    depth, arity = key_probs.shape[-2:]
    sizes = {
        "widths": (q.shape[-1], k.shape[-1]),
        "leaves": arity**depth,
        "visits": visibility.rule.most_visits,
    }
    served = kernels_serve("distil", q, k, query_probs, key_probs, **sizes)
    far_mass = _triton_far_mass if served else _torch_far_mass
    kept, query_means, key_mean = far_mass(
        sampled,
        k,
        query_probs,
        key_probs,
        visibility,
        rows,
        query_weight,
        key_weight,
        scoring,
    )
    # rows of padding have no attention; they count as kept, that is as no loss
    return torch.where(real[:, None], kept, 1.0).clamp(1e-6, 1.0), query_means, key_mean


def _triton_far_mass(
    q: Tensor,
    k: Tensor,
    query_probs: Tensor,
    key_probs: Tensor,
    visibility: Visibility,
    rows: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """As `_torch_far_mass`."""
    from topo_kernels import LocalTensors, far_mass

    plan = local_plan(visibility.query, visibility.query, *visibility.rule.always)
    sampled = plan.document_start[:, rows], plan.start[:, rows], plan.end[:, rows]
    kept, query_mean, key_mean = far_mass(
        q,
        k,
        query_probs,
        key_probs,
        LocalTensors(plan.order, *sampled, visibility.rule.num_sink_tokens),
        query_weight,
        key_weight,
        scoring,
        visits=visibility.rule.several_on(q.device),
    )
    depth, arity = key_probs.shape[-2:]
    if query_mean.ndim == 2:
        return kept, _at_every_depth(query_mean, depth, arity), key_mean
    # of leaves, each with the value of its ball: the first of them, or any, have those of all balls
    return kept, [query_mean[d - 1, :, : arity**d] for d in range(1, depth + 1)], key_mean


def _at_every_depth(leaves: Tensor, depth: int, arity: int) -> list[Tensor]:
    """A distribution over leaves `[..., p**L]` as those over the balls of depths `1..L`."""
    return [_coarsen_to(leaves, arity**d) for d in range(1, depth + 1)]


def _torch_far_mass(
    q: Tensor,
    k: Tensor,
    query_probs: Tensor,
    key_probs: Tensor,
    visibility: Visibility,
    rows: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Kept mass `[L, B, H, M]` of real sampled queries, and weighted sums of `v_q` at every depth, `[H, p**d]`, and of
    the keys' leaf distributions, `[H, p**L]`.

    Args:
        q: `[B, H, M, D]`, of the sampled queries. query_weight, key_weight: `[B, M]`, `[B, N]`, 0 in padding.
        The others as in `kept_mass`.
    """
    part = visibility.of_rows(rows)
    with torch.no_grad():
        scores = scaled_scores(q, k, scoring)
        causal, always = part.causal()[:, None], part.always()[:, None]
        attention = scores.masked_fill(~causal, torch.finfo(scores.dtype).min).softmax(-1).float()
        far = attention.masked_fill(always | ~causal, 0.0)
        local = attention.masked_fill(~always, 0.0).sum(-1)
    depth, arity = key_probs.shape[-2:]
    visits, distributions = visibility.rule.visits, leaf_distributions(query_probs, depth)[1:]
    visited = [visit_probability(leaves, visits) for leaves in distributions]
    key_leaves = leaf_distribution(key_probs, depth)
    values = far @ key_leaves
    kept = [local + (balls * _coarsen_to(values, balls.shape[-1])).sum(-1) for balls in visited]
    if max(visits) == 1:  # the distributions of all depths are sums over leaves
        query_means = _at_every_depth(torch.einsum("bhnl,bn->hl", visited[-1], query_weight), depth, arity)
    else:
        query_means = [torch.einsum("bhnl,bn->hl", balls, query_weight) for balls in visited]
    return torch.stack(kept), query_means, torch.einsum("bhnl,bn->hl", key_leaves, key_weight)


def distillation_loss(
    q: Tensor,
    k: Tensor,
    routes: Routes,
    visibility: Visibility,
    scoring: Scoring,
    *,
    num_queries: int = 256,
    density_weight: float = 0.05,
) -> Tensor:
    """Layer-local distillation: keep the dense attention's mass at every depth, at a price on density.

    Mean over depths `d` in `1..L` and heads of `-log kept(d) + density_weight * density(d) / even(d)`, with the
    leaf-level `density(d) = sum_b mean v_q(b) mean P_k(b)`, and `even(d) = 1 - (1 - p**-d)**m` what it is where queries
    of `m` visits and keys fill all balls evenly. The price is linear in density and in units of that share: a head
    opens balls for as long as a unit of density keeps enough mass. A logarithmic
    price makes heads all or nothing (docs/notebook/2026-11-23-price-linear-or-logarithmic.md).
    `num_queries` queries are sampled per call, which leaves the gradient unbiased.

    Args:
        q: `[B, H, N, D]`; k: `[B, H_kv, N, D]`. routes: `[B, R, N, L, p]` per role. visibility: of the `N` tokens; its
            layouts and rule, not its addresses.

    Returns:
        float32 scalar.
    """
    length = q.shape[2]
    routes = routes.per_head(q.shape[1])
    rows = torch.randperm(length, device=q.device)[: min(num_queries, length)].sort().values
    kept, query_means, key_mean = kept_mass(
        q,
        k,
        routes.query.probs if num_queries >= length else routes.query.probs[:, :, rows],
        routes.key.probs,
        visibility,
        rows,
        scoring,
    )
    price = torch.zeros_like(kept[0, 0, 0, 0])
    units = _units_of_density(visibility.rule, q.device)
    for d, query_mean in enumerate(query_means):
        balls = query_mean.shape[-1]
        density = (query_mean * _coarsen_to(key_mean, balls)).sum(-1)
        price = price + (density * units[d]).mean() / len(query_means)
    return -kept.log().mean() + density_weight * price


def _units_of_density(rule: Rule, device: torch.device) -> Tensor:
    """float32 `[L, H]`: one over the density of evenly filled balls, for the depths `1..L`."""
    sizes = [rule.arity**d for d in range(1, rule.levels + 1)]
    of_heads = {m: [n if m == 1 else 1 / -math.expm1(m * math.log1p(-1 / n)) for n in sizes] for m in set(rule.visits)}
    return torch.tensor([of_heads[m] for m in rule.visits], dtype=torch.float32, device=device).T


def _coarsen_to(leaves: Tensor, balls: int) -> Tensor:
    """Sum `[..., p**L]` over the digits after the first `d`, where `balls = p**d`."""
    return leaves if leaves.shape[-1] == balls else leaves.unflatten(-1, (-1, balls)).sum(-2)
