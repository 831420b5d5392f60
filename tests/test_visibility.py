"""`visible_pairs` against method.md section 2, written down as loops."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, Problem, make_problem
from torch import Tensor

from topo_adapter.core.layout import SequenceLayout, contiguous_layout
from topo_adapter.core.records import Keys
from topo_adapter.core.rule import Rule
from topo_adapter.core.visibility import Visibility, always_density, always_visible, per_head, visible_pairs
from topo_adapter.ops.router import Routes
from topo_adapter.ops.visits import at, visited


def digits(address: int, arity: int, levels: int) -> list[int]:
    return [address // arity**level % arity for level in range(levels)]


def by_definition(problem: Problem) -> list[list[list[list[bool]]]]:
    """Section 2 word by word, from documents, padding and digits; nothing is taken from positions or balls."""
    document = problem.key.document.tolist()
    real = problem.key.real.tolist()
    query_digits, key_digits = problem.routes.query.digits.tolist(), problem.routes.key.digits.tolist()
    length = problem.key.position.shape[1]
    levels = problem.routes.query.digits.shape[-1]
    more = [
        [
            [[digits(x, problem.arity, levels) for x in visits if x >= 0] for visits in zip(*head, strict=True)]
            for head in row
        ]
        for row in ([] if problem.more_visits is None else problem.more_visits.tolist())
    ]
    first = length - problem.query.position.shape[1]  # queries are the last tokens

    def sees(b: int, h: int, i: int, j: int) -> bool:
        if not (j <= i and real[b][i] and real[b][j] and document[b][i] == document[b][j]):
            return False
        mine = [t for t in range(length) if real[b][t] and document[b][t] == document[b][i]]  # its real tokens
        depth = problem.depths[h]
        visits = [query_digits[b][h][i - first], *(more[b][h][i - first] if more else [])]
        tree = any(visit[:depth] == key_digits[b][h][j][:depth] for visit in visits)
        near = mine.index(i) - mine.index(j) < problem.window or j in mine[: problem.sinks]
        return tree or near or i in mine[: problem.dense_until]

    return [
        [[[sees(b, h, i, j) for j in range(length)] for i in range(first, length)] for h in range(len(problem.depths))]
        for b in range(len(document))
    ]


def mask_of(problem: Problem) -> Tensor:
    return problem.visibility().mask()


@pytest.mark.parametrize("visits", [1, 3])
@pytest.mark.parametrize("arity", [2, 3])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_matches_the_definition(layout: str, arity: int, visits: int) -> None:
    settings: dict[str, Any] = {"depth": 3, "depths": (0, 1, 3), "heads": 3, "kv_heads": 1}
    problem = make_problem(layout, length=14, arity=arity, visits=visits, **settings)
    assert torch.equal(mask_of(problem), torch.tensor(by_definition(problem)))


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 3), (4, 0), (14, 0), (1, 14), (50, 50)])
def test_matches_the_definition_at_other_windows_and_sinks(window: int, sinks: int) -> None:
    problem = make_problem("packed", length=14, depths=(2, 4), window=window, sinks=sinks)
    assert torch.equal(mask_of(problem), torch.tensor(by_definition(problem)))


@pytest.mark.parametrize("dense_until", [1, 5, 13, 14, 99])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_first_tokens_may_see_all_before_them(layout: str, dense_until: int) -> None:
    problem = make_problem(layout, length=14, depths=(3, 4), window=2, sinks=1, dense_until=dense_until)
    assert torch.equal(mask_of(problem), torch.tensor(by_definition(problem)))


@pytest.mark.parametrize("dense_until", [0, 1, 3, 7, 20, 50])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (3, 2), (30, 0), (2, 30)])
def test_always_density_counts_pairs(window: int, sinks: int, dense_until: int) -> None:
    for length in (1, 2, 5, 20, 21):
        layout = contiguous_layout(1, length)
        seen = always_visible(layout, layout, window, sinks, dense_until)
        expected = seen.sum().item() / (length * (length + 1) / 2)
        assert always_density(length, window, sinks, dense_until) == pytest.approx(expected)


@pytest.mark.parametrize("layout", ["plain", "left_padding", "packed"])
def test_fewer_queries_than_keys(layout: str) -> None:
    problem = make_problem(layout, length=14)
    last = problem.asking(slice(9, None))
    assert torch.equal(mask_of(last), mask_of(problem)[:, :, 9:])
    assert torch.equal(mask_of(last), torch.tensor(by_definition(last)))


@pytest.mark.parametrize("wrong", ["window", "sinks", "depth", "document", "position"])
def test_the_definition_notices_a_change(wrong: str) -> None:
    problem = make_problem("packed", depths=(2, 4), window=2, sinks=1)
    expected = torch.tensor(by_definition(problem))
    window, sinks, layout, balls = problem.window, problem.sinks, problem.key, problem.balls()
    if wrong == "window":
        window += 1
    elif wrong == "sinks":
        sinks -= 1
    elif wrong == "depth":
        balls = tuple(b % 2 for b in balls)
    elif wrong == "document":
        layout = SequenceLayout(torch.zeros_like(layout.document), layout.position)
    else:
        layout = SequenceLayout(layout.document, torch.arange(24).expand_as(layout.position))
    assert not torch.equal(visible_pairs(*balls, layout, layout, window, sinks), expected)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_depth_zero_is_dense_and_deeper_is_sparser(layout: str) -> None:
    problem = make_problem(layout, length=30, heads=5, kv_heads=1, depths=(0, 1, 2, 3, 4), window=1, sinks=0)
    query, key = (role._replace(digits=role.digits[:, :1].expand(-1, 5, -1, -1)) for role in problem.routes)
    mask = mask_of(replace(problem, routes=Routes(query, key)))
    assert torch.equal(mask[:, 0], problem.causal()[:, 0])
    for depth in range(4):
        assert not (mask[:, depth + 1] & ~mask[:, depth]).any(), "a deeper ball holds no new key"
        assert mask[:, depth + 1].sum() < mask[:, depth].sum()


@pytest.mark.parametrize("layout", ["plain", "packed"])
@pytest.mark.parametrize(("arity", "levels"), [(2, 4), (3, 2)])
def test_more_visits_and_less_depth_hide_no_pair(arity: int, levels: int, layout: str) -> None:
    """Of one router's outputs."""
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 1, 40, levels, arity), LAYOUTS[layout](2, 40)
    keys = Keys(torch.randint(arity**levels, (2, 1, 40)), tokens)
    masks: dict[tuple[int, int], Tensor] = {}
    for count in range(1, 9):
        for depth in range(levels + 2):
            rule = Rule(arity, levels, (depth,), 1, 2, 1, (count,))
            masks[count, depth] = Visibility(visited(logits, rule), tokens, keys, rule).mask()
    for (count, depth), mask in masks.items():
        for more in ((count + 1, depth), (count, depth - 1)):
            assert more not in masks or not (mask & ~masks[more]).any(), (count, depth, more)
    assert masks[8, levels].sum() > masks[2, levels].sum() > masks[1, levels].sum() > masks[8, levels + 1].sum()


def test_the_same_tokens_at_other_depths_and_visits() -> None:
    """As if they had been routed so; where heads of a route differ each has its own, and one visit needs no logits."""
    torch.manual_seed(0)
    logits, tokens = torch.randn(2, 2, 20, 4, 2), LAYOUTS["plain"](2, 20)
    keys = Keys(torch.randint(16, (2, 2, 20)), tokens)

    def routed(depths: tuple[int, ...], visits: tuple[int, ...], known: Tensor | None = logits) -> Visibility:
        rule = Rule(2, 4, depths, 2, 2, 1, visits)
        return Visibility(visited(logits, rule), tokens, keys, rule, known)

    settings = [
        ((2,) * 4, (1,) * 4),
        ((3, 3, 2, 2), (4, 4, 2, 2)),
        ((3, 3, 1, 2), (4, 2, 1, 8)),
        ((5, 0, 4, 5), (1,) * 4),
    ]
    for (depths, visits), (others, their_visits) in itertools.product(settings, settings):
        found, wanted = at(routed(depths, visits), others, their_visits), routed(others, their_visits)
        assert torch.equal(per_head(found.mask(), 4), per_head(wanted.mask(), 4)), (depths, others)
    one = at(routed((2,) * 4, (1,) * 4, None), (3,) * 4)
    assert torch.equal(one.mask(), routed((3,) * 4, (1,) * 4).mask())


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_real_tokens_see_themselves_and_padding_sees_nothing(layout: str) -> None:
    problem = make_problem(layout, window=1, sinks=0)
    mask = mask_of(problem)
    itself = mask.diagonal(dim1=2, dim2=3)
    assert torch.equal(itself, problem.query.real[:, None].expand_as(itself))
    assert torch.equal(mask.any(-1), problem.query.real[:, None].expand_as(itself))
    assert not (mask & ~problem.key.real[:, None, None]).any()


def test_always_visible_is_what_no_address_can_hide() -> None:
    problem = make_problem("packed")
    always = always_visible(problem.query, problem.key, problem.window, problem.sinks)
    nowhere = torch.zeros_like(problem.balls()[0])
    apart = visible_pairs(nowhere, nowhere[:, :, 0] + 1, problem.query, problem.key, problem.window, problem.sinks)
    assert torch.equal(apart, always[:, None].expand_as(apart))
    assert not torch.equal(always, problem.causal()[:, 0])
