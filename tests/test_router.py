"""The router: logits, digits, initialisation, sampling, and float32 whatever surrounds it."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import largest_error
from torch import Tensor

from topo_adapter.core.tree import address_to_digits, digits_to_address
from topo_adapter.core.visits import likeliest_balls, likeliest_leaves
from topo_adapter.errors import TopologyConfigError
from topo_adapter.ops.router import TopologyRouter, relax

HIDDEN, HEADS, DEPTH = 12, 3, 4


def make_router(arity: int = 2, seed: int = 0, **kwargs: object) -> TopologyRouter:
    torch.manual_seed(seed)
    return TopologyRouter(HIDDEN, HEADS, arity, DEPTH, **{"router_dim": 8, **kwargs})


def hidden_states(batch: int = 2, length: int = 10, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- logits


@pytest.mark.parametrize("width", [8, None])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arity", [2, 3])
def test_shapes(arity: int, tied: bool, width: int | None) -> None:
    router = make_router(arity, router_dim=width, tie_query_key=tied)
    assert router.down.weight.shape == (width or HIDDEN, HIDDEN)
    assert router.query.weight.shape == (HEADS * DEPTH * (arity - 1), width or HIDDEN)
    for logits in router(hidden_states()):
        assert logits.shape == (2, HEADS, 10, DEPTH, arity) and logits.isfinite().all()
    for role in router.route(hidden_states()):
        assert role.probs.shape == (2, HEADS, 10, DEPTH, arity)
        assert role.digits.shape == (2, HEADS, 10, DEPTH) and role.digits.dtype == torch.int64
        assert torch.equal(role.address(arity), digits_to_address(role.digits, arity))


@pytest.mark.parametrize("arity", [2, 3])
def test_logits_are_those_of_the_definition(arity: int) -> None:
    """`GELU(W_down x)`, one projection per role; entry (head, level, child) of it, child 0 being 0."""
    router, x = make_router(arity), hidden_states()
    h = F.gelu(x.double() @ router.down.weight.double().T)
    for logits, projection in zip(router(x), (router.query, router.key), strict=True):
        free = h @ projection.weight.double().T + projection.bias.double()
        assert not logits[..., 0].any()
        for head in range(HEADS):
            for level in range(DEPTH):
                for child in range(1, arity):
                    expected = free[..., (head * DEPTH + level) * (arity - 1) + child - 1]
                    assert largest_error(logits[:, head, :, level, child], expected) < 1e-5
        assert logits.abs().max() > 0.1


def test_tied_roles_are_one_object() -> None:
    tied = make_router(tie_query_key=True)
    query_logits, key_logits = tied(hidden_states())
    assert query_logits is key_logits
    for sample in (False, True):
        routes = tied.route(hidden_states(), sample=sample)
        assert routes.query is routes.key
    routes = make_router().route(hidden_states())
    assert routes.query is not routes.key and not torch.equal(routes.query.digits, routes.key.digits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_float32_whatever_the_inputs_dtype(dtype: torch.dtype) -> None:
    router, x = make_router(), hidden_states().to(dtype)
    for logits, exact in zip(router(x), router(x.float()), strict=True):
        assert logits.dtype == torch.float32
        assert torch.equal(logits, exact)
    assert router.route(x).query.probs.dtype == torch.float32


def test_float32_under_autocast() -> None:
    router, x = make_router(), hidden_states()
    outside = router.route(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, router.down.weight).dtype == torch.bfloat16, "autocast is on"
        inside = router.route(x)
    for role, other in zip(outside, inside, strict=True):
        assert other.probs.dtype == torch.float32
        assert torch.equal(role.probs, other.probs) and torch.equal(role.digits, other.digits)


def test_rounded_weights_are_computed_in_float32() -> None:
    router = make_router().bfloat16()
    exact = make_router()
    exact.load_state_dict({name: value.float() for name, value in router.state_dict().items()})
    for logits, expected in zip(router(hidden_states()), exact(hidden_states()), strict=True):
        assert logits.dtype == torch.float32 and torch.equal(logits, expected)


# ---------------------------------------------------------------- digits and probabilities


def test_ties_go_to_the_lower_digit() -> None:
    router = make_router(3)
    for parameter in router.parameters():
        torch.nn.init.zeros_(parameter)
    routes = router.route(hidden_states())
    for role in routes:
        assert torch.equal(role.digits, torch.zeros_like(role.digits))
        assert largest_error(role.probs, torch.full_like(role.probs, 1 / 3)) < 1e-6
    digits = relax(torch.tensor([[0.0, 5, 5], [5, 0, 5], [0, 0, 5], [-1, 0, 0]]), 1.0, sample=False).digits
    assert torch.equal(digits, torch.tensor([1, 0, 2, 1]))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_temperature_sharpens_probabilities_and_leaves_digits(temperature: float) -> None:
    router = make_router(3)
    logits, _ = router(hidden_states())
    role = router.route(hidden_states(), temperature=temperature).query
    assert largest_error(role.probs, torch.softmax(logits.double() / temperature, -1)) < 1e-6
    assert torch.equal(role.digits, logits.argmax(-1))
    assert len(role.digits.unique()) == 3


# ---------------------------------------------------------------- visits


def all_leaves(logits: Tensor) -> Tensor:
    """Brute force: the leaves of logits `[..., L, p]`, likeliest first, equally likely ones by their number."""
    levels, arity = logits.shape[-2:]
    digits = address_to_digits(torch.arange(arity**levels), arity, levels)
    total = sum(logits.double().log_softmax(-1)[..., level, digits[:, level]] for level in range(levels))
    assert isinstance(total, Tensor)
    return total.sort(dim=-1, descending=True, stable=True).indices


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("arity", "levels"), [(2, 8), (2, 2), (3, 4), (3, 1), (5, 3), (7, 2)])
def test_likeliest_leaves_are_those_of_all_leaves(arity: int, levels: int, count: int) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 30, levels, arity)
    found, exact = likeliest_leaves(logits, count), all_leaves(logits)
    leaves = min(count, arity**levels)
    assert found.shape == (2, 30, count) and found.dtype == torch.int64
    assert torch.equal(found[..., :leaves], exact[..., :leaves])
    assert (found[..., leaves:] == -1).all()
    assert not torch.equal(found[..., :leaves], exact.sort(-1).values[..., :leaves]), "numbers alone would not do"


@pytest.mark.parametrize("arity", [2, 3, 5])
def test_equally_likely_leaves_come_by_their_number(arity: int) -> None:
    """Logits of a few whole numbers: sums are exact, and many are equal."""
    torch.manual_seed(0)
    logits = torch.randint(3, (200, 3, arity)).float()
    levels = address_to_digits(torch.arange(arity**3), arity, 3)
    total = sum(logits[:, level, levels[:, level]] for level in range(3))
    assert isinstance(total, Tensor)
    exact = total.sort(dim=-1, descending=True, stable=True).indices[:, :8]
    assert torch.equal(likeliest_leaves(logits, 8), exact)
    assert torch.equal(likeliest_leaves(torch.zeros(1, 3, arity), 8), torch.arange(8)[None])


def test_more_visits_begin_with_the_fewer_whatever_is_rounded() -> None:
    """Large gaps at the root drown small ones: whole families of leaves have one sum in float32."""
    torch.manual_seed(0)
    logits = torch.randn(500, 8, 2) * torch.tensor([1e-7, 1e-7, 1e-7, 1, 1, 1, 1e7, 1e7])[:, None]
    most = likeliest_leaves(logits, 8)
    assert torch.equal(most[:, 0], digits_to_address(logits.argmax(-1), 2))
    assert all(len(set(row)) == 8 for row in most.tolist())
    for count in range(1, 8):
        assert torch.equal(likeliest_leaves(logits, count), most[:, :count])


@pytest.mark.parametrize("arity", [2, 3])
def test_likeliest_balls_are_those_of_all_balls(arity: int) -> None:
    """Of every route at its own depth, as many as it has visits; nowhere below the leaves."""
    logits = torch.randn(2, 6, 10, 3, arity)
    depths, visits = (0, 1, 2, 3, 4, 3), (8, 2, 3, 8, 8, 1)
    found = likeliest_balls(logits, depths, visits)
    assert found.shape == (2, 6, 8, 10) and found.dtype == torch.int64
    for route, (depth, count) in enumerate(zip(depths, visits, strict=True)):
        there = min(count, arity**depth) if depth <= 3 else 0
        exact = all_leaves(logits[:, route, :, :depth])[..., :there] if depth else torch.zeros(2, 10, 1)
        if there:
            assert torch.equal(found[:, route, :there], exact.long().transpose(1, 2))
        assert (found[:, route, there:] == -1).all()


@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_a_router(tied: bool) -> None:
    """In training and without gradients the same, with the keys' addresses."""
    router, x = make_router(2, tie_query_key=tied), hidden_states()
    (one, key), (logits, same_key) = router.addresses(x), router.logits(x)
    assert key.dtype == same_key.dtype == torch.int32 and torch.equal(key, same_key)
    assert torch.equal(digits_to_address(logits.argmax(-1), 2), one.long())
    routes = router.route(x, keep_logits=True)
    assert (
        router.route(x).query.logits is None
        and routes.query.logits is not None
        and torch.equal(routes.query.logits, logits)
    )
    assert not routes.query.logits.requires_grad and torch.equal(routes.query.address(2), one.long())


def test_drawn_logits_are_what_the_digits_are_of() -> None:
    router, x = make_router(), hidden_states()
    routes = router.route(x, temperature=0.7, sample=True, keep_logits=True)
    assert routes.query.logits is not None
    assert torch.equal(routes.query.logits.argmax(-1), routes.query.digits)
    torch.testing.assert_close(torch.softmax(routes.query.logits / 0.7, -1), routes.query.probs)
    assert not torch.equal(routes.query.logits, router.logits(x)[0])


def test_router_gets_a_gradient_through_the_probabilities() -> None:
    router = make_router()
    routes = router.route(hidden_states(), temperature=0.5, sample=True)
    (routes.query.probs[..., 0].sum() + routes.key.probs[..., 0].sum()).backward()
    for parameter in router.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()


def test_a_token_is_routed_by_itself() -> None:
    """Neither its batch nor its position matters."""
    router, x = make_router(3), hidden_states()
    together = router.route(x)
    for b in range(2):
        for t in range(10):
            for role, alone in zip(together, router.route(x[b : b + 1, t : t + 1]), strict=True):
                assert torch.equal(alone.digits[0, :, 0], role.digits[b, :, t])
                assert largest_error(alone.probs[0, :, 0], role.probs[b, :, t]) < 1e-5
    assert not torch.equal(together.query.digits[:, :, 0], together.query.digits[:, :, 1])


# ---------------------------------------------------------------- initialisation


@pytest.mark.parametrize("arity", [2, 3])
def test_collapsed_start(arity: int) -> None:
    """Every token in ball 0; the paper's +5 for child 0 and -5 for the others."""
    paper = torch.softmax(torch.tensor([5.0] + [-5.0] * (arity - 1), dtype=torch.float64), 0)
    for role in make_router(arity, init_weights="collapse").route(hidden_states()):
        assert torch.equal(role.address(arity), torch.zeros_like(role.address(arity)))
        assert largest_error(role.probs, paper.expand(role.probs.shape)) < 1e-7
        if arity == 2:
            assert largest_error(role.probs[..., 0], torch.tensor(10.0).sigmoid().expand(2, HEADS, 10, DEPTH)) < 1e-7


def test_collapsed_start_flips_a_digit_in_22_000() -> None:
    """Why the start under Gumbel noise is not exact, and homotopy exists (method.md, section 3)."""
    router = make_router(init_weights="collapse")
    torch.manual_seed(0)
    role = router.route(torch.zeros(100, 800, HIDDEN), sample=True).query
    draws, flips = role.digits.numel(), int(role.digits.sum())
    expected = 4.54e-5 * draws
    assert draws > 900_000 and abs(flips - expected) < 4 * math.sqrt(expected)


def test_random_start_uses_many_balls_in_both_roles() -> None:
    routes = make_router().route(hidden_states(4, 50))
    for role in routes:
        for head in range(HEADS):
            assert len(role.address(2)[:, head].unique()) > 4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arity", [2, 3])
def test_standardised_start_spreads_tokens_that_share_a_component(arity: int, tied: bool) -> None:
    router, x = make_router(arity, tie_query_key=tied), hidden_states(4, 50) + 5 * torch.randn(HIDDEN)
    before = router.route(x)
    router.initialise(x)
    for logits in router(x):
        free = logits[..., 1:].transpose(1, 2).flatten(0, 1)  # [tokens, H, L, p - 1]
        assert largest_error(free.mean(0), torch.zeros(HEADS, DEPTH, arity - 1)) < 1e-5
        assert largest_error(free.std(0), torch.ones(HEADS, DEPTH, arity - 1)) < 1e-4
    for role, crowded in zip(router.route(x), before, strict=True):
        shares = (
            F.one_hot(role.digits, arity).double().mean((0, 2)),
            F.one_hot(crowded.digits, arity).double().mean((0, 2)),
        )
        assert shares[0].max() < 0.75 and shares[1].max() > 0.95


def test_a_collapsed_router_cannot_be_standardised() -> None:
    """Its logits are constant: rescaling them would silently undo the collapse."""
    router = make_router(2, init_weights="collapse")
    before = {name: value.clone() for name, value in router.state_dict().items()}
    with pytest.raises(TopologyConfigError, match="init_weights"):
        router.initialise(hidden_states(4, 50))
    assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())


# ---------------------------------------------------------------- sampling


def chi_square(digits: Tensor, probs: Tensor) -> float:
    expected = probs * digits.numel()
    return float(((digits.flatten().bincount(minlength=len(probs)) - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_samples_have_the_softmax_frequencies(temperature: float) -> None:
    """Gumbel-max: the digit's distribution is the softmax of the logits, at every temperature."""
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -0.5])
    role = relax(logits.expand(20_000, 3), temperature, sample=True)
    assert chi_square(role.digits, logits.softmax(-1)) < 13.8  # 99.9 % of chi-square with 2 degrees of freedom
    assert chi_square(role.digits, (logits / 0.9).softmax(-1)) > 13.8
    assert torch.equal(role.digits, role.probs.argmax(-1))
    assert role.probs.std(0).min() > 0.1, "every token has its own noise"


def test_levels_heads_and_roles_are_sampled_independently() -> None:
    router = make_router()
    for parameter in router.parameters():
        torch.nn.init.zeros_(parameter)
    torch.manual_seed(0)
    routes = router.route(torch.zeros(40, 100, HIDDEN), sample=True)
    columns = torch.stack(
        [role.digits[:, h, :, level] for role in routes for h in range(HEADS) for level in range(DEPTH)]
    )
    correlation = torch.corrcoef(columns.flatten(1).double())
    assert columns.double().mean().sub(0.5).abs() < 0.01
    assert (correlation - torch.eye(len(columns))).abs().max() < 0.08  # 5 deviations of 4,000 tokens


def test_rounding_to_8_bits_spares_biases_and_what_does_not_fit() -> None:
    router = make_router(2)
    with torch.no_grad():
        router.key.weight[0, 0] = 449.0  # type: ignore[union-attr]
        router.query.weight[0, 0] = -448.0
    exact = {name: weight.detach().clone() for name, weight in router.named_parameters()}
    router.round_to(torch.float8_e4m3fn)
    found = {name: weight.dtype for name, weight in router.named_parameters()}
    small, large = torch.float8_e4m3fn, torch.bfloat16
    assert found == {
        "down.weight": small,
        "query.weight": small,
        "query.bias": large,
        "key.weight": large,
        "key.bias": large,
    }
    for name, weight in router.named_parameters():
        assert weight.requires_grad
        assert torch.allclose(weight.detach().float(), exact[name], rtol=2**-4, atol=2**-10), name
    assert [logits.dtype for logits in router(torch.randn(1, 3, HIDDEN))] == [torch.float32] * 2
    router.round_to(torch.float32)
    assert {weight.dtype for weight in router.parameters()} == {torch.float32}
