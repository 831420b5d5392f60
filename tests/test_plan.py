"""The plan's ranges, expanded to a mask, against `visible_pairs`."""

import itertools
from dataclasses import fields, replace

import hypothesis.strategies as st
import pytest
import torch
from helpers import LAYOUTS, Problem, make_problem
from hypothesis import given, settings
from torch import Tensor

from topo_adapter.ops.plan import Plan
from topo_adapter.ops.router import RoleDigits


def expand(plan: Plan) -> tuple[Tensor, Tensor]:
    """How often the tree passes `[B, R, T, S]` and the local pass `[B, 1, T, S]` visit each pair."""
    batch, routes, visits, length = plan.query_order.shape
    tree = torch.zeros(batch, routes, length, plan.key_order.shape[-1], dtype=torch.long)
    local = torch.zeros(batch, 1, length, plan.key_order.shape[-1], dtype=torch.long)
    for b in range(batch):
        for r, m in itertools.product(range(routes), range(visits)):
            for rank, i in enumerate(plan.query_order[b, r, m].tolist()):
                keys = plan.key_order[b, r, plan.range_start[b, r, m, rank] : plan.range_end[b, r, m, rank]]
                tree[b, r, i].index_add_(0, keys, torch.ones_like(keys, dtype=torch.long))
        for i in range(length):
            first, start, end = (int(x[b, i]) for x in (plan.document_start, plan.local_start, plan.local_end))
            sinks = range(first, min(first + plan.num_sink_tokens, start))
            for rank in (*sinks, *range(start, end)):
                local[b, 0, i, plan.local_order[b, rank]] += 1
    return tree, local


def check(problem: Problem) -> None:
    """Every visible pair is visited exactly once, by the tree pass or by the local one, and no other pair."""
    plan, visible = problem.plan(), problem.visible()
    tree, local = expand(plan)
    assert torch.equal(tree + local, visible.long())
    assert torch.equal(plan.visible_count(), visible.sum((0, 2, 3), dtype=torch.float64))
    assert torch.equal(plan.causal_count(), problem.causal()[:, 0].sum(dtype=torch.float64))


@pytest.mark.parametrize("visits", [1, 3])
@pytest.mark.parametrize("arity", [2, 3])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_expands_to_the_mask(layout: str, arity: int, visits: int) -> None:
    check(make_problem(layout, arity=arity, visits=visits))


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 5), (7, 0), (24, 24), (100, 100)])
@pytest.mark.parametrize("layout", ["plain", "middle_padding", "packed"])
def test_windows_and_sinks(layout: str, window: int, sinks: int) -> None:
    check(make_problem(layout, window=window, sinks=sinks))


@pytest.mark.parametrize("dense_until", [1, 9, 23, 24, 99])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_first_tokens_that_see_all_before_them(layout: str, dense_until: int) -> None:
    check(make_problem(layout, dense_until=dense_until, visits=2))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    layout=st.sampled_from(list(LAYOUTS)),
    length=st.integers(1, 22),
    queries=st.integers(1, 22),
    arity=st.integers(2, 4),
    depths=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    window=st.integers(1, 9),
    sinks=st.integers(0, 4),
    seed=st.integers(0, 999),
)
def test_any_size_and_chunk(
    layout: str, length: int, queries: int, arity: int, depths: tuple[int, int], window: int, sinks: int, seed: int
) -> None:
    problem = make_problem(
        layout,
        length=length,
        heads=2,
        kv_heads=1,
        arity=arity,
        depth=3,
        depths=depths,
        window=window,
        sinks=sinks,
        seed=seed,
    )
    check(problem.asking(slice(-queries, None)))


def test_queries_before_unfilled_keys() -> None:
    """A chunk in the middle of a static cache."""
    check(make_problem("right_padding").asking(slice(12, 18)))


def test_orders_are_permutations_in_int32() -> None:
    plan = make_problem("middle_padding").asking(slice(5, None)).plan()
    for order in (plan.query_order, plan.key_order, plan.local_order):
        assert torch.equal(order.sort(-1).values, torch.arange(order.shape[-1]).expand_as(order))
    tensors = [getattr(plan, f.name) for f in fields(plan) if f.name not in ("num_sink_tokens", "dense")]
    assert {t.dtype for t in tensors} == {torch.int32}


def test_depth_zero_is_dense() -> None:
    plan = make_problem("packed", depths=(0, 0)).plan()
    assert torch.equal(plan.visible_count(), plan.causal_count().expand(2))


def with_digit(problem: Problem, route: int, token: int, level: int) -> Problem:
    """One digit of one key is another one."""
    digits = problem.routes.key.digits.clone()
    digits[0, route, token, level] = (digits[0, route, token, level] + 1) % problem.arity
    key = RoleDigits(problem.routes.key.probs, digits)
    return replace(problem, routes=problem.routes._replace(key=key))


def test_a_changed_digit_changes_the_mask() -> None:
    problem = make_problem(window=1, sinks=0)
    tree, local = expand(problem.plan())
    for route, depth in enumerate(problem.depths):
        token = int(tree[0, route].sum(0).argmax())  # the key that most queries reach through the tree
        reached = tree[0, route, :, token].bool()
        assert reached.any()
        for level in range(4):
            changed, unchanged = expand(with_digit(problem, route, token, level).plan())
            assert torch.equal(local, unchanged)
            if level >= depth:
                assert torch.equal(changed, tree), "digits below the visible depth do not matter"
            else:
                assert not changed[0, route, reached, token].any()
                others = torch.arange(24) != token
                assert torch.equal(changed[..., others], tree[..., others])


@pytest.mark.parametrize("name", ["range_start", "range_end", "local_start", "local_end", "document_start"])
def test_expansion_notices_a_wrong_range(name: str) -> None:
    problem = make_problem(window=2, sinks=2)
    plan = problem.plan()
    wrong = getattr(plan, name).clone()
    wrong[..., -1] += -1 if name.endswith("end") else 1
    tree, local = expand(replace(plan, **{name: wrong}))
    assert not torch.equal(tree + local, problem.visible().long())
