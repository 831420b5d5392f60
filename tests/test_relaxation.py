"""Leaf distributions, the bridge from soft to hard, and the paper's three fp16 traps."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from helpers import (
    LAYOUTS,
    Problem,
    bridged,
    bridged_and_far_pairs,
    dense_probs,
    largest_error,
    make_problem,
    random_role,
    tree_probability,
    weighted_attention,
)
from torch import Tensor

from topo_adapter.core.scoring import Scoring
from topo_adapter.core.tree import address_to_digits, ball
from topo_adapter.core.visibility import always_visible
from topo_adapter.ops import relaxation
from topo_adapter.ops.backend import forced
from topo_adapter.ops.relaxation import (
    above_the_leaves,
    leaf_distribution,
    leaf_distributions,
    levels_at_depths,
    scaled_scores,
    shared_prefix_probability,
    visit_probability,
)
from topo_adapter.ops.router import RoleDigits, Routes, relax

TIGHT = 1e-12
BRIDGES = ("full", "masked")

# ---------------------------------------------------------------- leaves


@pytest.mark.parametrize(("arity", "depth"), [(2, 1), (2, 5), (3, 3), (5, 2)])
def test_leaf_distribution(arity: int, depth: int) -> None:
    torch.manual_seed(0)
    probs = random_role((2, 3, 4, depth), arity, torch.float64, one_hot=False).probs
    leaves = leaf_distributions(probs, depth)
    assert [x.shape for x in leaves] == [(2, 3, 4, arity**d) for d in range(depth + 1)]
    for d, coarse in enumerate(leaves):
        assert largest_error(coarse.sum(-1), torch.ones(2, 3, 4, dtype=torch.float64)) <= TIGHT
        digits = address_to_digits(torch.arange(arity**d), arity, d)  # one row per ball
        product = probs.new_ones(2, 3, 4, arity**d)
        for level in range(d):
            product = product * probs[..., level, digits[:, level]]
        assert largest_error(coarse, product) <= TIGHT
        suffixes = leaves[-1].unflatten(-1, (-1, arity**d)).sum(-2)
        assert largest_error(coarse, suffixes) <= TIGHT
        assert torch.equal(leaf_distribution(probs, d), coarse)


@pytest.mark.parametrize("arity", [2, 3])
def test_one_hot_digits_give_the_ball(arity: int) -> None:
    torch.manual_seed(0)
    role = random_role((2, 3, 4, 4), arity, torch.float32, one_hot=True)
    for depth in range(5):
        here = ball(role.address(arity), arity, depth)
        expected = torch.nn.functional.one_hot(here, arity**depth).float()
        assert torch.equal(leaf_distribution(role.probs, depth), expected)


@pytest.mark.parametrize("depths", [(3, 3), (0, 4), (2, 1), (1, 0)])
def test_heads_of_several_depths_share_a_tensor(depths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    query, key = (random_role((2, 2, 5, 4), 3, torch.float64, one_hot=False).probs.requires_grad_() for _ in range(2))
    found = [levels_at_depths(x, depths) for x in (query, key)]
    assert found[0].shape == (2, 2, 5, max(depths), 3)
    found = [leaf_distribution(x, max(depths)) for x in found]
    for head, depth in enumerate(depths):
        own = [leaf_distribution(x[:, head], depth) for x in (query, key)]
        for wide, right in zip(found, own, strict=True):
            assert largest_error(wide[:, head, :, : 3**depth], right) <= TIGHT
            assert not wide[:, head, :, 3**depth :].any()
        shared = found[0][:, head] @ found[1][:, head].mT, own[0] @ own[1].mT
        assert largest_error(*shared) <= TIGHT
        if depth:
            upstream = torch.randn(2, 5, 5, dtype=torch.float64)
            wide, right = (torch.autograd.grad(x, [query, key], upstream, retain_graph=True) for x in shared)
            assert max(map(largest_error, wide, right)) <= TIGHT


@pytest.mark.parametrize("arity", [2, 3])
@pytest.mark.parametrize("depths", [(4, 4, 4, 4), (0, 2, 1, 4), (3, 0, 3, 1), (5, 2, 0, 5)])
def test_shared_prefix_probability(depths: tuple[int, ...], arity: int) -> None:
    problem = make_problem(arity=arity, depths=depths)
    shared = shared_prefix_probability(problem.routes.query.probs, problem.routes.key.probs, depths, [1] * len(depths))
    exact = tree_probability(problem)
    assert shared.shape == (2, 4, 24, 24)
    assert largest_error(shared, exact) <= TIGHT
    other = tree_probability(replace(problem, depths=tuple(max(d, 1) - 1 for d in depths)))
    assert largest_error(shared, other) > 1e-3


def test_shared_prefix_probability_of_hard_digits_is_the_tree_mask() -> None:
    problem = make_problem(one_hot=True)
    query, key = problem.balls()
    shared = shared_prefix_probability(
        *(role.probs for role in problem.routes), problem.depths, [1] * len(problem.depths)
    )
    assert torch.equal(shared.bool(), query[:, :, 0, :, None] == key[..., None, :])
    assert torch.equal(shared, shared.round())


@pytest.mark.parametrize("visits", [2, 8])
@pytest.mark.parametrize("depths", [(0, 2, 1, 4), (5, 2, 0, 5)])
def test_shared_prefix_probability_of_several_visits(depths: tuple[int, ...], visits: int) -> None:
    problem = make_problem(arity=3, depths=depths, visits=visits)
    probs = [role.probs for role in problem.routes]
    shared = shared_prefix_probability(*probs, depths, [visits] * 4)
    assert largest_error(shared, tree_probability(problem)) <= TIGHT
    mixed = shared_prefix_probability(*probs, depths, [visits, 1, visits, 1])  # each head has its own
    one = shared_prefix_probability(*probs, depths, [1] * 4)
    assert torch.equal(mixed[:, ::2], shared[:, ::2]) and torch.equal(mixed[:, 1::2], one[:, 1::2])
    more = shared - shared_prefix_probability(*probs, depths, [visits - 1] * 4)
    for head, depth in enumerate(depths):
        assert (more[:, head].min() > 0) == (0 < depth <= 4), "each visit shows more, where there is a tree"


@pytest.mark.parametrize("visits", [1, 2, 3, 8])
def test_visit_probability_is_accurate_everywhere(visits: int) -> None:
    """Against exact fractions: at 1e-30, where `1 - P` is 1, as at `1 - 6e-8`; and at 1 and a rounding beyond."""
    probs = torch.tensor([0.0, 1e-30, 1e-9, 1e-4, 0.3, 0.5, 0.97, 1 - 2**-24, 1.0, 1 + 2**-23], requires_grad=True)
    found = visit_probability(probs.view(1, 1, -1), [visits])
    (grad,) = torch.autograd.grad(found.sum(), probs)
    found = found.flatten()
    assert visits > 1 or torch.equal(found, probs)
    for p, v, slope in zip(probs.tolist(), found.tolist(), grad.tolist(), strict=True):
        exact = Fraction(min(p, 1.0)) if visits > 1 else Fraction(p)
        assert v == pytest.approx(float(1 - (1 - exact) ** visits), rel=1e-6, abs=0)
        assert slope == pytest.approx(float(visits * (1 - exact) ** (visits - 1)), rel=1e-6, abs=1e-30)
    inside = (0.98 * torch.rand(20, dtype=torch.float64) + 0.01).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: visit_probability(x[None, None], [visits]), inside)


def test_below_the_leaves_a_query_is_in_no_ball_and_costs_one_level() -> None:
    probs = make_problem().routes.query.probs
    found, depths = above_the_leaves(probs, (5, 2, 0, 5))
    assert depths == [1, 2, 0, 1]
    assert torch.equal(found[:, 1:3], probs[:, 1:3]) and not found[:, [0, 3]].any()
    assert above_the_leaves(probs, (4, 2, 0, 1))[0] is probs


@pytest.mark.parametrize(("arity", "depths", "served"), [(2, (2, 2), True), (300, (0, 2), False), (300, (0, 0), True)])
def test_the_bridge_kernel_is_asked_for_as_many_leaves_as_it_is_given(
    arity: int, depths: tuple[int, int], served: bool
) -> None:
    """A head without a tree costs one level, and 300 leaves are more than the kernel has."""
    problem = make_problem(arity=arity, depth=1, depths=depths, heads=2, kv_heads=2, dim=16, dtype=torch.float32)
    differentiable, _ = leaves_of(problem)
    q, k, v = differentiable.q, differentiable.k, differentiable.v
    with forced(True):
        reasons = relaxation._no_kernel(q, k, v, differentiable.routes, problem.visibility(), 1.0)
    with forced(False):
        assert relaxation._no_kernel(q, k, v, differentiable.routes, problem.visibility(), 1.0)
    assert reasons == ([] if served else ["arity ** depth must be at most 256, got 300"])


# ---------------------------------------------------------------- the bridge's gradient


def leaves_of(problem: Problem) -> tuple[Problem, list[Tensor]]:
    """The same problem on q, k, v and probabilities that require gradients."""
    inputs = [problem.q, problem.k, problem.v, problem.routes.query.probs, problem.routes.key.probs]
    q, k, v, query, key = inputs = [x.clone().requires_grad_() for x in inputs]
    routes = Routes(problem.routes.query._replace(probs=query), problem.routes.key._replace(probs=key))
    return replace(problem, q=q, k=k, v=v, routes=routes), inputs


def always(problem: Problem) -> Tensor:
    return always_visible(problem.query, problem.key, problem.window, problem.sinks)[:, None]


def row_scores(problem: Problem) -> Tensor:
    return problem.q @ problem.k.repeat_interleave(2, 1).mT * problem.scale


def weighted_scores(problem: Problem, weight: Tensor) -> Tensor:
    """Scores plus the logarithm of their weight, -inf at pairs that are not causal; 0 in rows without any."""
    causal = problem.causal()
    exponent = row_scores(problem) + torch.where(causal, weight, 0.0).log()
    return exponent.masked_fill(~causal.any(-1, keepdim=True), 0.0)


def expected_gradients(problem: Problem, homotopy: float, bridge: str, upstream: Tensor) -> list[Tensor]:
    """Dense softmax times a constant weight; the weight's gradient goes to `S` as it is, not scaled by `c`.

    With the full bridge a pair counts at most as if it had all the attention: its share of the row's sum is cut at 1.
    """
    problem, (q, k, v, query, key) = leaves_of(problem)
    shared, visible = tree_probability(problem), problem.visible()
    weight = (1 - homotopy + homotopy * visible.double()).requires_grad_()
    out = weighted_attention(problem, weight)
    *of_attention, of_weight = torch.autograd.grad((out * upstream).sum(), [q, k, v, weight])
    if bridge == "full":
        share = (row_scores(problem) - weighted_scores(problem, weight.detach()).logsumexp(-1, keepdim=True)).exp()
        of_weight = of_weight / share.clamp(min=1.0)
    reach = visible if bridge == "masked" else problem.causal()
    of_shared = torch.where(reach & ~always(problem), of_weight, 0.0)
    return [*of_attention, *torch.autograd.grad(shared, [query, key], of_shared)]


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize("homotopy", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layout", ["plain", "middle_padding", "packed"])
@pytest.mark.parametrize("depths", [(0, 2, 1, 4), (5, 2, 1, 0)])
def test_gradients_of_the_bridge(depths: tuple[int, ...], layout: str, homotopy: float, bridge: str) -> None:
    check_gradients(make_problem(layout, depths=depths), homotopy, bridge)


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_gradients_of_the_bridge_with_several_visits(layout: str, bridge: str) -> None:
    problem = make_problem(layout, length=16, depths=(5, 2, 1, 4), visits=3)
    router = check_gradients(problem, 1.0, bridge)
    fewer = replace(problem, more_visits=problem.more_visits[:, :, :1])  # type: ignore[index]
    alike = replace(fewer, more_visits=fewer.more_visits.expand(-1, -1, 2, -1))  # type: ignore[union-attr]
    for wrong in (fewer, alike):  # another number of draws, and other hard visits
        assert max(map(largest_error, router, check_gradients(wrong, 1.0, bridge))) > 1e-3


def check_gradients(problem: Problem, homotopy: float, bridge: str) -> list[Tensor]:
    """Those of the bridge against `expected_gradients`; returns the router's."""
    upstream = torch.randn(problem.q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    differentiable, inputs = leaves_of(problem)
    got = torch.autograd.grad((bridged(differentiable, homotopy, bridge, block=10) * upstream).sum(), inputs)
    exact = expected_gradients(problem, homotopy, bridge, upstream)
    for mine, theirs in zip(got, exact, strict=True):
        assert theirs.abs().max() > 1e-3
        assert largest_error(mine, theirs) <= TIGHT
    for other in BRIDGES:
        if other != bridge:
            router = zip(got[3:], expected_gradients(problem, homotopy, other, upstream)[3:], strict=True)
            differ = max(largest_error(mine, theirs) for mine, theirs in router) > 1e-3
            # with the base model's weights in force the two differ in nothing
            assert differ or (homotopy == 0 and "masked" not in (bridge, other))
    return list(got[3:])


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize("homotopy", [0.0, 1.0])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("depths", [(0, 2, 1, 4), (5, 2, 1, 0)])
def test_far_pairs_are_counted_hard_and_differentiated_soft(
    depths: tuple[int, ...], layout: str, homotopy: float, bridge: str
) -> None:
    check_far_pairs(make_problem(layout, depths=depths), homotopy, bridge)


@pytest.mark.parametrize("layout", ["middle_padding", "packed"])
def test_far_pairs_of_several_visits(layout: str) -> None:
    check_far_pairs(make_problem(layout, length=16, depths=(5, 2, 1, 0), visits=3), 1.0, "full")


def check_far_pairs(problem: Problem, homotopy: float, bridge: str) -> None:
    differentiable, inputs = leaves_of(problem)
    upstream = torch.randn(len(problem.depths), dtype=torch.float64)
    _, counted = bridged_and_far_pairs(differentiable, homotopy, bridge, block=10)
    got = torch.autograd.grad((counted * upstream).sum(), inputs[3:])

    far = problem.causal() & ~always(problem)
    assert torch.equal(counted, (problem.visible() & far).sum((0, 2, 3)).double())
    assert torch.equal(counted, problem.plan().far_count())
    assert counted.any() and not torch.equal(counted, problem.visible().sum((0, 2, 3)).double())
    again, (*_, query, key) = leaves_of(problem)
    soft = tree_probability(again).masked_fill(~far, 0.0).sum((0, 2, 3))
    exact = torch.autograd.grad((soft * upstream).sum(), [query, key])
    for mine, theirs in zip(got, exact, strict=True):
        assert theirs.abs().max() > 1e-3
        assert largest_error(mine, theirs) <= TIGHT * float(theirs.abs().max())


@pytest.mark.parametrize("homotopy", [1.0, 0.999999])
@pytest.mark.parametrize("layout", ["plain", "middle_padding"])
def test_the_gradient_of_a_hidden_pair_is_capped(layout: str, homotopy: float) -> None:
    """At the log-sum-exp of the weighted scores, not at the largest of them."""
    problem = make_problem(layout, window=6)
    problem = replace(problem, q=10 * problem.q)
    upstream = torch.randn(problem.q.shape, dtype=torch.float64)
    differentiable, inputs = leaves_of(problem)
    out = bridged(differentiable, homotopy, "full", block=10)
    got = torch.autograd.grad((out * upstream).sum(), inputs[3:])

    far, scores = problem.causal() & ~always(problem), row_scores(problem)
    exponent = weighted_scores(problem, 1 - homotopy + homotopy * problem.visible().double())
    difference = upstream @ problem.v.repeat_interleave(2, 1).mT - (upstream * out.detach()).sum(-1, keepdim=True)

    def gradients(reference: Tensor) -> tuple[Tensor, ...]:
        mass = (exponent.logsumexp(-1, keepdim=True) - reference).exp()
        of_shared = (scores - reference).clamp(max=0.0).exp() / mass * difference
        leaves, (*_, query, key) = leaves_of(problem)
        return torch.autograd.grad(tree_probability(leaves), [query, key], of_shared.masked_fill(~far, 0.0))

    exact = gradients(exponent.logsumexp(-1, keepdim=True))
    assert ((scores - exponent.logsumexp(-1, keepdim=True))[far] > 0).any(), "the cap must bind"
    for mine, theirs, other in zip(got, exact, gradients(exponent.amax(-1, keepdim=True)), strict=True):
        assert largest_error(mine, theirs) <= TIGHT * float(theirs.abs().max())
        assert largest_error(other, theirs) > 1e-2 * float(theirs.abs().max())


def hidden_pair(bridge: str, homotopy: float = 1.0) -> Tensor:
    """Gradient of the last output with respect to the digit logits of the first key, which no query sees."""
    problem = make_problem(batch=1, length=4, heads=1, kv_heads=1, depth=1, depths=(1,), window=1, sinks=0)
    logits = torch.tensor([[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    query = relax(logits.flip(0)[None, None, :, None], 1.0, False)
    leaf = logits.flip(1)[None, None, :, None].clone().requires_grad_()
    key = RoleDigits(torch.softmax(leaf, -1), leaf.argmax(-1))
    query = query._replace(probs=query.probs.double(), digits=1 - key.digits[:, :, :1].expand_as(query.digits))
    problem = replace(problem, routes=Routes(query, key))
    assert not problem.visible()[0, 0, 1:, 0].any(), "the key must be hidden from all but itself"
    bridged(problem, homotopy, bridge)[:, :, -1].sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    return leaf.grad[0, 0, 0, 0]


@pytest.mark.parametrize("homotopy", [0.0, 0.5, 1.0])
def test_a_hidden_pair_gets_a_gradient(homotopy: float) -> None:
    assert hidden_pair("full", homotopy).abs().min() > 1e-3
    assert not hidden_pair("masked", homotopy).any(), "the paper's form: exactly zero"


def test_the_masked_form_is_the_papers() -> None:
    """-inf on hidden pairs before the softmax, the soft mask straight through on what is left."""
    problem, inputs = leaves_of(make_problem())
    soft = torch.where(always(problem), 1.0, tree_probability(problem))
    scores = dense_probs(problem).log().masked_fill(~problem.visible(), float("-inf"))
    probs = torch.softmax(scores, -1) * (1 + soft - soft.detach())
    papers = probs / probs.sum(-1, keepdim=True) @ problem.v.repeat_interleave(2, 1)
    ours = bridged(problem, 1.0, "masked")
    assert largest_error(ours, papers) <= TIGHT
    upstream = torch.randn(ours.shape, dtype=torch.float64)
    for mine, theirs in zip(
        *(torch.autograd.grad((x * upstream).sum(), inputs[2:]) for x in (ours, papers)), strict=True
    ):
        assert theirs.abs().max() > 1e-3
        assert largest_error(mine, theirs) <= TIGHT


# ---------------------------------------------------------------- fp16 traps


def test_trap_gumbel_noise_in_half_precision() -> None:
    torch.manual_seed(0)
    uniform = torch.rand(1_000_000, dtype=torch.float16)
    assert (-(-uniform.log()).log()).isinf().any(), "the trap: a uniform variate of 0"
    role = relax(torch.zeros(500_000, 2, dtype=torch.float16), 0.1, sample=True)
    assert role.probs.dtype == torch.float32
    assert role.probs.isfinite().all()
    assert set(role.digits.unique().tolist()) == {0, 1}
    assert role.probs.gather(-1, role.digits[:, None]).min() >= 0.5


def test_trap_scores_in_half_precision() -> None:
    q, k = (torch.full((1, heads, 3, 64), 40.0, dtype=torch.float16) for heads in (2, 1))
    assert (q @ k.transpose(-1, -2)).isinf().all(), "the trap: 64 * 40^2 > 65504"
    scores = scaled_scores(q, k, Scoring(0.125))
    assert torch.equal(scores, torch.full((1, 2, 3, 3), 12800.0))
    assert torch.equal(scaled_scores(q, k, Scoring(0.125, 30.0)), torch.full((1, 2, 3, 3), 30.0))
    assert scaled_scores(q.double(), k.double(), Scoring(1.0)).dtype == torch.float64


def test_trap_gradient_of_running_products_at_zero() -> None:
    """The textbook gradient of a cumulative product divides by its input; so does exp of a sum of logs."""
    probs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    naive = torch.autograd.grad(probs[:, 0].log().cumsum(0).exp().sum(), probs)[0]
    assert not naive.isfinite().all(), "the trap"
    product = probs[:, 0].cumprod(0).detach()
    assert not (product.flip(0).cumsum(0).flip(0) / probs[:, 0]).isfinite().all(), "and by hand"
    upstream = torch.arange(8.0)
    (grad,) = torch.autograd.grad(leaf_distribution(probs, 3) @ upstream, probs)
    assert grad.isfinite().all()
    # ball 2 has digits 0, 1, 0: changing one digit moves to ball 2 + 1, 2 - 2 or 2 + 4
    assert torch.equal(grad, torch.tensor([[2.0, 3.0], [0.0, 2.0], [2.0, 6.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize("homotopy", [0.0, 0.5, 1.0])
def test_gradients_are_finite(homotopy: float, bridge: str, dtype: torch.dtype) -> None:
    """Scores of hundreds, saturated samples, padding."""
    problem = make_problem("middle_padding", dtype=dtype)
    logits = [(8 * torch.randn(2, 4, 24, 4, 2)).requires_grad_() for _ in range(2)]
    q, k, v = inputs = [(30 * x.detach()).requires_grad_() for x in (problem.q, problem.k, problem.v)]
    routes = Routes(*(relax(x, 0.1, sample=True) for x in logits))
    out = bridged(replace(problem, q=q, k=k, v=v, routes=routes), homotopy, bridge)
    assert out.dtype == dtype and out.isfinite().all()
    grads = torch.autograd.grad(out.float().sum(), [*inputs, *logits])
    for x, grad in zip([*inputs, *logits], grads, strict=True):
        assert grad.dtype == x.dtype and grad.isfinite().all()
    assert all(grad.any() for grad in (grads if bridge == "full" else grads[:3]))


def test_a_nearly_hidden_key_with_a_huge_score_has_a_finite_gradient() -> None:
    """Seven sharp levels multiply to a probability of e^-100, too small for a reciprocal in float32."""
    problem = make_problem(batch=1, length=2, heads=1, kv_heads=1, dim=1, depth=1, depths=(1,), window=1, sinks=0)
    logits = [
        torch.tensor(x)[None, None, :, None].requires_grad_() for x in ([[0.0, 0], [100, 0]], [[0.0, 100], [0, 0]])
    ]
    q, k = torch.ones(1, 1, 2, 1, requires_grad=True), torch.tensor([100.0, 0])[None, None, :, None].requires_grad_()
    routes = Routes(*(relax(x, 1.0, sample=False) for x in logits))
    out = bridged(replace(problem, q=q, k=k, v=problem.v.float(), routes=routes), 1.0)
    for grad in torch.autograd.grad(out.sum(), [q, k, *logits]):
        assert grad.isfinite().all()
