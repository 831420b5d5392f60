"""Balance and kept mass against brute force; distillation; the loss that rides on an output."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import LAYOUTS, Problem, dense_probs, largest_error, make_problem, tree_probability
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import topo_kernels
from topo_adapter.core.layout import SequenceLayout
from topo_adapter.core.visibility import always_visible
from topo_adapter.ops.backend import forced
from topo_adapter.ops.objective import attach_loss, balance_loss, distillation_loss, gradient_at_once, kept_mass
from topo_adapter.ops.relaxation import leaf_distribution
from topo_adapter.ops.router import RoleDigits, Routes, TopologyRouter

# ---------------------------------------------------------------- balance


def role_of(digits: Tensor, arity: int) -> RoleDigits:
    return RoleDigits(torch.nn.functional.one_hot(digits, arity).float(), digits)


@pytest.mark.parametrize("arity", [2, 3])
def test_balance_is_1_when_balanced_and_p_when_collapsed(arity: int) -> None:
    shape = (2, 3, 6 * arity, 4)
    balanced = role_of((torch.arange(6 * arity) % arity)[:, None].expand(shape), arity)
    collapsed = role_of(torch.full(shape, arity - 1), arity)
    real = torch.ones(2, 6 * arity, dtype=torch.bool)
    assert largest_error(balance_loss(Routes(balanced, balanced), real), torch.tensor(1.0)) < 1e-6
    assert largest_error(balance_loss(Routes(collapsed, collapsed), real), torch.tensor(float(arity))) < 1e-6
    assert largest_error(balance_loss(Routes(collapsed, balanced), real), torch.tensor((1.0 + arity) / 2)) < 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_balance_is_the_switch_loss(tied: bool) -> None:
    problem = make_problem("middle_padding", arity=3, dtype=torch.float32)
    routes = Routes(problem.routes.query, problem.routes.query) if tied else problem.routes
    real, terms = problem.key.real, []
    for role in routes:
        for head in range(4):
            for level in range(4):
                digits = role.digits[:, head, :, level][real]
                probs = role.probs[:, head, :, level][real]
                terms.append(3 * sum((digits == c).double().mean() * probs[:, c].mean() for c in range(3)))
    assert largest_error(balance_loss(routes, real), torch.stack(terms).mean()) < 1e-6


def test_balance_ignores_padding() -> None:
    problem = make_problem("middle_padding", dtype=torch.float32)
    real, other = problem.key.real, make_problem(seed=5, dtype=torch.float32).routes.query
    loss = balance_loss(problem.routes, real)
    where = real[:, None, :, None]
    query = RoleDigits(
        torch.where(where[..., None], problem.routes.query.probs, other.probs),
        torch.where(where, problem.routes.query.digits, other.digits),
    )
    assert torch.equal(balance_loss(Routes(query, problem.routes.key), real), loss)
    everything = torch.ones_like(real)
    assert balance_loss(Routes(query, problem.routes.key), everything) != loss
    assert balance_loss(problem.routes, torch.zeros_like(real)) == 0


def test_balance_gradient_goes_to_probabilities_of_full_children() -> None:
    problem = make_problem(one_hot=True, arity=3, dtype=torch.float32)
    probs = problem.routes.query.probs.clone().requires_grad_()
    query = problem.routes.query._replace(probs=probs)
    (grad,) = torch.autograd.grad(balance_loss(Routes(query, query), problem.key.real), probs)
    share = torch.nn.functional.one_hot(query.digits, 3).double().mean((0, 2))  # [H, L, p]
    expected = 3 * share / (16 * 48)  # 16 levels of all heads, 48 tokens
    assert largest_error(grad, expected[None, :, None].expand_as(grad)) < 1e-8


# ---------------------------------------------------------------- gradients at once


def test_gradient_at_once_is_the_gradient() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True), torch.randn(1)]
    unused = torch.randn(4, requires_grad=True)

    def loss() -> Tensor:
        return (weights[0].exp().sum() * weights[1].prod()).square() + weights[2].sum()

    plain, at_once = loss(), gradient_at_once(loss(), [*weights, unused])
    right = torch.autograd.grad(2.5 * plain, weights[:2])
    assert torch.equal(plain, at_once)
    (2.5 * at_once).backward()
    for weight, gradient in zip(weights[:2], right, strict=True):
        assert weight.grad is not None and largest_error(weight.grad, gradient) < 1e-6 * float(gradient.abs().max())
    assert unused.grad is None and weights[2].grad is None


def test_gradient_at_once_keeps_no_graph() -> None:
    """What the loss was made of is freed before `backward`."""
    weight = torch.ones(2, requires_grad=True)
    large = torch.ones(1000, 2)
    alive = weakref.ref(large)
    loss = gradient_at_once((large * weight).square().sum(), [weight])
    del large
    assert alive() is None
    loss.backward()
    assert weight.grad is not None and weight.grad.tolist() == [2000.0, 2000.0]


# ---------------------------------------------------------------- kept mass


def kept_and_means(
    problem: Problem, rows: Tensor, depth: int = 4, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    query, key = (role.probs.float()[..., :depth, :] for role in problem.routes)
    kept, query_means, key_mean = kept_mass(
        problem.q,
        problem.k,
        query[:, :, rows],
        key,
        problem.visibility(),
        rows,
        problem.scoring(softcap),
    )
    assert [mean.shape[-1] for mean in query_means] == [problem.arity**d for d in range(1, depth + 1)]
    return kept, query_means[-1], key_mean


def kept(problem: Problem, rows: Tensor, depth: int = 4, softcap: float | None = None) -> Tensor:
    """At depths `1..depth`."""
    return kept_and_means(problem, rows, depth, softcap)[0]


def kept_by_definition(problem: Problem, depth: int, softcap: float | None = None) -> Tensor:
    """`sum_j A_ij m_ij` `[B, H, N]` for 0/1 or soft masks; padding counts as kept."""
    always = always_visible(problem.query, problem.key, problem.window, problem.sinks)[:, None]
    mask = torch.where(always, 1.0, tree_probability(replace(problem, depths=(depth,) * 4)))
    total = (dense_probs(problem, softcap) * mask).sum(-1)
    return torch.where(problem.key.real[:, None], total, 1.0)


@pytest.mark.parametrize("one_hot", [True, False], ids=["hard", "soft"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_kept_mass_at_every_depth(layout: str, one_hot: bool) -> None:
    problem = make_problem(layout, one_hot=one_hot)
    rows = torch.tensor([0, 3, 11, 17, 23])
    found = kept(problem, rows)
    assert found.dtype == torch.float32 and found.shape == (4, 2, 4, 5)
    for depth, at_depth in enumerate(found, start=1):
        exact = kept_by_definition(problem, depth)[:, :, rows]
        assert largest_error(at_depth, exact) < 1e-5
    assert found[-1].min() < 0.9
    wider = replace(problem, window=problem.window + 2)
    assert largest_error(kept(wider, rows), found) > 1e-3


def test_kept_mass_with_a_softcap() -> None:
    problem, rows = make_problem("packed"), torch.arange(24)
    found = kept(problem, rows, softcap=1.0)[-1]
    assert largest_error(found, kept_by_definition(problem, 4, softcap=1.0)) < 1e-5
    assert largest_error(found, kept_by_definition(problem, 4)) > 1e-3


@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_minus_log_kept_is_a_divergence(layout: str) -> None:
    """KL(masked attention || dense attention) of section 5, for a 0/1 mask."""
    problem = make_problem(layout, one_hot=True)
    dense = dense_probs(problem)
    masked = dense.masked_fill(~problem.visible(), 0.0)
    masked = masked / masked.sum(-1, keepdim=True)
    divergence = torch.where(masked > 0, masked * (masked / dense).log(), 0.0).sum(-1)
    found = kept(problem, torch.arange(24))
    for head, depth in enumerate(problem.depths):
        if depth == 0:  # nothing is masked
            assert largest_error(divergence[:, head] + 1, torch.ones(2, 24)) < 1e-6
            continue
        assert largest_error(-found[depth - 1, :, head].log(), divergence[:, head]) < 1e-5
    assert divergence[:, -1].max() > 0.1


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_mean_distributions_of_real_tokens(layout: str) -> None:
    problem = make_problem(layout, arity=3)
    rows = torch.tensor([0, 3, 11, 17, 23])
    _, query_mean, key_mean = kept_and_means(problem, rows)
    query, key = (leaf_distribution(role.probs, 4) for role in problem.routes)
    real = problem.key.real
    for head in range(4):
        assert largest_error(key_mean[head], key[:, head][real].mean(0)) < 1e-5
        assert largest_error(query_mean[head], query[:, head, rows][real[:, rows]].mean(0)) < 1e-5


def test_kept_mass_gives_no_gradient_to_queries_and_keys() -> None:
    problem = make_problem(dtype=torch.float32)
    q, k = problem.q.requires_grad_(), problem.k.requires_grad_()
    probs = problem.routes.key.probs.requires_grad_()
    kept(problem, torch.arange(24))[-1].sum().backward()
    assert q.grad is None and k.grad is None
    assert probs.grad is not None and probs.grad.isfinite().all() and probs.grad.any()


# ---------------------------------------------------------------- distillation


def distil(problem: Problem, softcap: float | None = None, **changes: object) -> Tensor:
    setting = {"num_queries": 1000, "density_weight": 0.0, **changes}
    return distillation_loss(
        problem.q,
        problem.k,
        problem.routes,
        problem.visibility(),
        problem.scoring(softcap),
        **setting,
    )


@pytest.mark.parametrize("layout", ["plain", "left_padding", "packed"])
def test_distillation_loss_without_a_price(layout: str) -> None:
    problem = make_problem(layout)
    exact = torch.stack([-kept_by_definition(problem, depth).log() for depth in range(1, 5)]).mean()
    problem = replace(problem, routes=Routes(*(RoleDigits(r.probs.float(), r.digits) for r in problem.routes)))
    assert largest_error(distil(problem), exact) < 1e-5
    assert exact > 0.1


def test_sampled_queries_are_unbiased() -> None:
    problem = make_problem("packed", dtype=torch.float32)
    torch.manual_seed(0)
    losses = torch.stack([distil(problem, num_queries=6) for _ in range(400)])
    assert losses.std() > 0.01
    assert abs(losses.mean() - distil(problem)) < 4 * losses.std() / 20


@pytest.mark.parametrize("layout", ["plain", "left_padding", "packed"])
def test_distillation_price(layout: str) -> None:
    """`p**d sum_b mean P_q(b) mean P_k(b)` over real tokens, averaged over depths and heads."""
    problem = make_problem(layout, arity=3, dtype=torch.float32)
    real, terms = problem.key.real, []
    for depth in range(1, 5):
        query, key = (leaf_distribution(role.probs.double(), depth) for role in problem.routes)
        for head in range(4):
            terms.append(3**depth * (query[:, head][real].mean(0) * key[:, head][real].mean(0)).sum())
    price = distil(problem, density_weight=1.0) - distil(problem)
    assert largest_error(price, torch.stack(terms).mean()) < 1e-5


@pytest.mark.parametrize("visits", [2, 8])
@pytest.mark.parametrize("layout", ["middle_padding", "packed"])
def test_distillation_with_several_visits(layout: str, visits: int) -> None:
    """Loss and gradient against section 5 in float64: kept mass, and a price in shares `m / p**d`."""
    problem = make_problem(layout, arity=3, depth=2, depths=(1, 2, 1, 2), visits=visits)

    def routed(logits: list[Tensor]) -> Problem:
        roles = zip(problem.routes, logits, strict=True)
        return replace(problem, routes=Routes(*(role._replace(probs=x.softmax(-1)) for role, x in roles)))

    logits = [role.probs.log().requires_grad_() for role in problem.routes]
    again = routed(logits)
    probs = [role.probs for role in again.routes]
    real, terms = problem.key.real, []
    for depth in (1, 2):
        query, key = (leaf_distribution(p, depth) for p in probs)
        query = 1 - (1 - query) ** visits
        for head in range(4):
            density = (query[:, head][real].mean(0) * key[:, head][real].mean(0)).sum()
            terms.append(density / (1 - (1 - 3**-depth) ** visits))
    minus_log = torch.stack([-kept_by_definition(again, depth).log() for depth in (1, 2)]).mean()
    exact = minus_log + 0.3 * torch.stack(terms).mean()
    right = torch.autograd.grad(exact, logits)

    narrow = [x.detach().float().requires_grad_() for x in logits]
    loss = distil(routed(narrow), density_weight=0.3)
    assert largest_error(loss, exact) < 1e-5
    for found, expected in zip(torch.autograd.grad(loss, narrow), right, strict=True):
        assert largest_error(found, expected) < 1e-5 * float(expected.abs().max())
    with torch.no_grad():
        assert abs(distil(replace(routed(narrow), more_visits=None), density_weight=0.3) - exact) > 1e-2


def test_the_price_prefers_spread_tokens_to_one_ball() -> None:
    """It is linear in its weight."""
    spread = make_problem(one_hot=True, dtype=torch.float32)
    collapsed = role_of(torch.zeros_like(spread.routes.query.digits), 2)
    prices = []
    for problem in (spread, replace(spread, routes=Routes(collapsed, collapsed))):
        free, tenth, whole = (distil(problem, density_weight=w) for w in (0.0, 0.1, 1.0))
        assert largest_error(tenth - free, 0.1 * (whole - free)) < 1e-5
        prices.append(whole - free)
    assert prices[0] < prices[1] - 0.1


def test_distillation_learns_planted_balls() -> None:
    """Attention stays within four kinds of token, and the hidden states say which kind each token is."""
    torch.manual_seed(0)
    kind = torch.randint(4, (1, 64))
    direction = 4 * torch.nn.functional.one_hot(kind, 8).float()[:, None].expand(1, 2, 64, 8)
    q, k = (direction.clone().requires_grad_() for _ in range(2))
    hidden_states = torch.randn(4, 12)[kind] + 0.1 * torch.randn(1, 64, 12)
    router = TopologyRouter(12, 2, arity=2, depth=2, router_dim=16)
    problem = make_problem(batch=1, length=64, heads=2, kv_heads=2, depths=(2, 2), window=2, sinks=1)
    problem = replace(problem, q=q, k=k)

    def loss_and_kept() -> tuple[Tensor, float]:
        now = replace(problem, routes=router.route(hidden_states))
        with torch.no_grad():
            mass = kept(now, torch.arange(64), depth=2)[-1].mean()
        return distil(now, density_weight=0.1), float(mass)

    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss, mass = loss_and_kept()
        losses.append((loss.item(), mass))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (first, kept_first), (last, kept_last) = losses[0], losses[-1]
    assert all(torch.tensor(losses).isfinite().flatten())
    assert last < first - 0.1
    assert kept_last > 0.9 > kept_first
    assert q.grad is None and k.grad is None


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("layout", "num_queries"),
    [("plain", 1000), ("plain", 9), ("middle_padding", 9), ("packed", 1000), ("interleaved", 9)],
)
def test_kernels_and_torch_agree(layout: str, num_queries: int) -> None:
    """The loss and its gradients."""
    problem = make_problem(layout, heads=2, depths=(0, 2), arity=3, depth=2, dim=16, dtype=torch.float32)
    tokens = SequenceLayout(problem.key.document.to(DEVICE), problem.key.position.to(DEVICE), problem.key.plain)
    q, k = problem.q.to(DEVICE), problem.k.to(DEVICE)

    def loss_and_gradients(kernels: bool) -> list[Tensor]:
        probs = [role.probs.to(DEVICE).requires_grad_() for role in problem.routes]
        moved = (RoleDigits(p, role.digits.to(DEVICE)) for p, role in zip(probs, problem.routes, strict=True))
        torch.manual_seed(3)
        with (
            forced(kernels, "distil"),
            mock.patch.object(topo_kernels, "far_mass", wraps=topo_kernels.far_mass) as far_mass,
        ):
            loss = distil(
                replace(problem, q=q, k=k, routes=Routes(*moved), query=tokens, key=tokens),
                num_queries=num_queries,
                density_weight=1.0,
                softcap=20.0,
            )
        assert far_mass.call_count == int(kernels)
        return [loss.detach(), *torch.autograd.grad(loss, probs)]

    for found, right in zip(*map(loss_and_gradients, (True, False)), strict=True):
        assert right.any() and largest_error(found / right.abs().max(), right / right.abs().max()) < 1e-5


# ---------------------------------------------------------------- a loss that rides on an output

CHECKPOINTS: dict[str, Callable[..., Tensor]] = {
    "none": lambda layer, x: layer(x),
    "reentrant": partial(checkpoint, use_reentrant=True),
    "non-reentrant": partial(checkpoint, use_reentrant=False),
}


@pytest.mark.parametrize("scale", [1.0, 0.25, torch.tensor(0.5)], ids=["1", "1/4", "tensor"])
@pytest.mark.parametrize("run", CHECKPOINTS.values(), ids=list(CHECKPOINTS))
def test_attached_loss_gets_its_gradient_once(run: Callable[..., Tensor], scale: float | Tensor) -> None:
    """Powers of two: the sums are exact."""
    weight = torch.tensor([1.0, 2.0, -4.0], requires_grad=True)
    x = torch.tensor([[8.0, 1.0, 2.0], [0.5, 4.0, 1.0]], requires_grad=True)
    host = SimpleNamespace(auxiliary_scale=123.0)

    def layer(x: Tensor) -> Tensor:
        return attach_loss(x * weight, (weight**2).sum(), host)

    out = run(layer, run(layer, x))  # two layers share the weight
    assert torch.equal(out, x * weight * weight)
    host.auxiliary_scale = scale  # read in backward
    out.sum().backward()
    with torch.no_grad():
        assert torch.equal(x.grad, (weight * weight).expand(2, 3))
        main, auxiliary = 2 * weight * x.sum(0), 2 * (2 * weight)
        assert torch.equal(weight.grad, main + scale * auxiliary)


def test_attached_loss_reaches_the_router_of_a_frozen_output() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    frozen = torch.randn(3, 2)
    out = attach_loss(frozen, (weight**2).sum(), SimpleNamespace(auxiliary_scale=2.0))
    assert torch.equal(out, frozen)
    out.sum().backward()
    assert torch.equal(weight.grad, torch.tensor([4.0, 8.0]))


def test_attached_loss_does_nothing_without_a_backward_pass_through_its_output() -> None:
    weight = torch.tensor([1.0], requires_grad=True)
    attach_loss(weight * 2, weight**2, SimpleNamespace(auxiliary_scale=1.0))
    (weight * 8).sum().backward()
    assert torch.equal(weight.grad, torch.tensor([8.0]))
