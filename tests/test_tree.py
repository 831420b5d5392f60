"""Addresses, balls, and valuation against Python's own integers."""

from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from topo_adapter.core.tree import (
    address_to_digits,
    ball,
    digits_to_address,
    num_balls,
    valuation,
)

ARITIES = (2, 3, 5, 7, 10)
DEEPEST = {p: max(depth for depth in range(63) if p**depth <= 2**62) for p in ARITIES}

properties = settings(max_examples=60, deadline=None, derandomize=True)


class Tree(NamedTuple):
    arity: int
    depth: int
    digits: list[list[int]]  # one list per address, root first

    def addresses(self) -> list[Tensor]:
        return [torch.tensor(sum(a * self.arity**level for level, a in enumerate(x))) for x in self.digits]

    def shared(self, i: int, j: int) -> int:
        """Number of leading digits that two addresses share."""
        differ = [level for level in range(self.depth) if self.digits[i][level] != self.digits[j][level]]
        return differ[0] if differ else self.depth


@st.composite
def trees(draw: st.DrawFn, addresses: int) -> Tree:
    """Addresses that branch off the first at a level drawn for each, so that long prefixes are common."""
    arity = draw(st.sampled_from(ARITIES))
    depth = draw(st.integers(1, DEEPEST[arity]))
    anything = st.lists(st.integers(0, arity - 1), min_size=depth, max_size=depth)
    digits = [draw(anything)]
    for _ in range(addresses - 1):
        level = draw(st.integers(0, depth))
        digits.append(digits[0][:level] + draw(anything)[level:])
    return Tree(arity, depth, digits)


@properties
@given(trees(addresses=3))
def test_digits_and_address_round_trip(tree: Tree) -> None:
    address = digits_to_address(torch.tensor(tree.digits), tree.arity)
    assert address.dtype == torch.int64
    assert torch.equal(address, torch.stack(tree.addresses()))
    assert torch.equal(address_to_digits(address, tree.arity, tree.depth), torch.tensor(tree.digits))


@properties
@given(trees(addresses=2))
def test_balls_are_prefixes_and_nest(tree: Tree) -> None:
    x, y = tree.addresses()
    for depth in range(tree.depth + 1):
        prefix = digits_to_address(torch.tensor(tree.digits[0][:depth], dtype=torch.long), tree.arity)
        assert torch.equal(ball(x, tree.arity, depth), prefix)
        assert bool(ball(x, tree.arity, depth) == ball(y, tree.arity, depth)) == (tree.shared(0, 1) >= depth)
        deeper = ball(x, tree.arity, min(depth + 1, tree.depth))
        assert torch.equal(ball(deeper, tree.arity, depth), ball(x, tree.arity, depth))
    assert int(ball(x, tree.arity, 0)) == 0 and torch.equal(ball(x, tree.arity, tree.depth), x)


@pytest.mark.parametrize("arity", ARITIES)
def test_ball_takes_one_depth_per_head(arity: int) -> None:
    deepest = DEEPEST[arity]
    depths = torch.tensor([0, 1, deepest // 2, deepest])
    address = torch.randint(arity**deepest, (2, len(depths), 7), generator=torch.Generator().manual_seed(0))
    got = ball(address, arity, depths[:, None])
    assert got.dtype == torch.int64
    assert torch.equal(got, torch.stack([ball(address[:, h], arity, int(d)) for h, d in enumerate(depths)], 1))
    assert not torch.equal(got, ball(address, arity, depths.flip(0)[:, None]))


@properties
@given(trees(addresses=2))
def test_valuation(tree: Tree) -> None:
    x, y = tree.addresses()
    shared = tree.shared(0, 1)
    for a, b in ((x, y), (y, x)):
        assert int(valuation(a, b, tree.arity, tree.depth)) == shared
        assert torch.equal(ball(a, tree.arity, shared), ball(b, tree.arity, shared))
    assert int(valuation(x, x, tree.arity, tree.depth)) == tree.depth


@properties
@given(trees(addresses=3))
def test_distance_is_an_ultrametric(tree: Tree) -> None:
    x, y, z = tree.addresses()
    sides = [tree.depth - int(valuation(a, b, tree.arity, tree.depth)) for a, b in ((x, y), (y, z), (x, z))]
    assert max(sides) <= tree.depth
    assert sorted(sides)[1] == max(sides), "every triangle is isosceles with a short base"
    assert (sides[0] == 0) == torch.equal(x, y)


def test_absolute_difference_is_no_ultrametric() -> None:
    """The inequality can fail: the usual distance of 0, 1, 2 breaks it."""
    x, y, z = 0, 1, 2
    assert abs(x - z) > max(abs(x - y), abs(y - z))


def test_leading_digits_count_and_trailing_ones_do_not() -> None:
    digits = torch.tensor([[0, 1, 2], [0, 1, 0], [1, 1, 2]])
    x, same_start, same_end = digits_to_address(digits, 3)
    assert int(valuation(x, same_start, 3, 3)) == 2
    assert int(valuation(x, same_end, 3, 3)) == 0


def test_elementwise_and_broadcasting() -> None:
    x = torch.arange(27)
    pairs = valuation(x[:, None], x[None], 3, 3)
    assert pairs.shape == (27, 27)
    assert torch.equal(pairs.flatten().bincount(), pairs.new_tensor([486, 162, 54, 27]))


def test_depth_zero_is_one_point() -> None:
    none = torch.zeros(4, 0, dtype=torch.long)
    address = digits_to_address(none, 5)
    assert address.dtype == torch.int64  # torch.equal does not look at dtypes
    assert torch.equal(address, torch.zeros(4, dtype=torch.long))
    assert torch.equal(address_to_digits(address, 5, 0), none)
    assert torch.equal(valuation(address, address, 5, 0), torch.zeros(4, dtype=torch.long))


X = torch.arange(4)


@pytest.mark.parametrize("arity", [1, 0, -2, 2.0, True, "2", None])
def test_refuses_arity(arity: object) -> None:
    for call in (
        lambda: digits_to_address(X[:, None], arity),
        lambda: address_to_digits(X, arity, 2),
        lambda: ball(X, arity, 2),
        lambda: ball(X, arity, torch.tensor(2)),
        lambda: valuation(X, X, arity, 2),
    ):
        with pytest.raises(ValueError, match="arity must be an integer >= 2, got"):
            call()


@pytest.mark.parametrize("depth", [-1, 1.5, "2", None])
def test_refuses_depth(depth: object) -> None:
    for call in (
        lambda: address_to_digits(X, 2, depth),
        lambda: ball(X, 2, depth),
        lambda: valuation(X, X, 2, depth),
    ):
        with pytest.raises(ValueError, match="depth must be an integer >= 0, got"):
            call()


@pytest.mark.parametrize("arity", ARITIES)
def test_refuses_trees_beyond_int64(arity: int) -> None:
    deepest = DEEPEST[arity]
    assert torch.equal(address_to_digits(X, arity, deepest)[:, 0], X % arity)
    with pytest.raises(ValueError, match=rf"at most 2\*\*62 .* got {arity}\*\*{deepest + 1}"):
        address_to_digits(X, arity, deepest + 1)


@properties
@given(trees(addresses=2))
def test_a_pair_shares_a_ball_iff_it_shares_as_many_digits(tree: Tree) -> None:
    """So it is for addresses modulo `num_balls`, and one level below the leaves there is a ball more."""
    query, key = tree.addresses()
    for depth in range(tree.depth + 1):
        balls = num_balls(tree.arity, tree.depth, depth)
        assert (query % balls == key % balls).item() == (tree.shared(0, 1) >= depth)
    below = num_balls(tree.arity, tree.depth, tree.depth + 1)
    assert key % below == key < below - 1
