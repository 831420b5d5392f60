"""Gradients of the hard attention's kernels against fp64 autograd, on a GPU or in Triton's interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from helpers import of_visit
from hypothesis import given, settings
from test_kernels import (
    BALLS,
    DEVICE,
    GPU,
    HALF,
    LAYOUTS,
    PLAN_TENSORS,
    SWEEP,
    VISITS,
    Case,
    Problem,
    guarded,
    make,
    nan_in_new_memory,
    poisoned,
)
from torch import Tensor

from topo_adapter.core.layout import SequenceLayout
from topo_adapter.core.visibility import visible_pairs
from topo_adapter.ops.plan import Plan
from topo_kernels import backward
from topo_kernels.backward import BackwardTiles, attention_backward
from topo_kernels.launch import Tile
from topo_kernels.types import flat

# ---------------------------------------------------------------- running and comparing


@contextmanager
def tile(size: int, chunk: int) -> Iterator[None]:
    square = Tile(size, size, 4, 2)
    tiles = BackwardTiles(square, square, Tile(size, 16, 4, 2), chunk)
    with mock.patch.object(backward, "choose_backward_tiles", lambda *_: tiles):
        yield


def eager(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Plain masked attention in the dtype of its inputs and its log-sum-exp in base 2; empty rows 0 and -inf."""
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    empty = ~visible.any(-1, keepdim=True)
    probs = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return probs @ v, scores.logsumexp(-1) / torch.tensor(2.0, dtype=scores.dtype).log()


def gradients(problem: Problem, dout: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """`out`, `lse`, dq, dk, dv of eager attention, one (row, query head) at a time."""
    case = problem.case
    q, k, v = (t.detach().clone().to(dtype).requires_grad_() for t in (problem.q, problem.k, problem.v))
    outs, lses = [], []
    for b in range(case.batch):
        key = SequenceLayout(problem.key.document[b : b + 1], problem.key.position[b : b + 1])
        query = SequenceLayout(problem.query.document[b : b + 1], problem.query.position[b : b + 1])
        for h in range(case.heads):
            g, r = h * case.kv_heads // case.heads, h * case.routes // case.heads
            balls = problem.query_balls[b : b + 1, r : r + 1], problem.key_ball[b : b + 1, r : r + 1]
            visible = visible_pairs(*balls, query, key, case.window, case.sinks, case.dense_until)[0, 0]
            out, lse = eager(q[b, h], k[b, g], v[b, g], visible, problem.scale, case.softcap)
            out.backward(dout[b, h].to(dtype))
            outs.append(out.detach())
            lses.append(lse.detach())
    shape = (case.batch, case.heads)
    grads = (t.grad for t in (q, k, v))
    return torch.stack(outs).unflatten(0, shape), torch.stack(lses).unflatten(0, shape), *grads


def forward(problem: Problem, dout: Tensor) -> tuple[Tensor, Tensor]:
    """What the forward kernels would return."""
    out, lse, *_ = gradients(problem, dout, torch.float64)
    return out.to(problem.q), lse.float()


def cotangent(problem: Problem) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(problem.q.shape).to(problem.q)


def differentiate(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    plan: Plan | None = None,
    tile_size: int | None = None,
    chunk: int = 64,
    **tensors: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels; the interpreter takes large tiles, because it pays per tile."""
    plan = plan or problem.plan()
    size = tile_size or (None if GPU else 64)
    with nullcontext() if size is None else tile(size, chunk):
        return attention_backward(
            tensors.get("q", problem.q),
            tensors.get("k", problem.k),
            tensors.get("v", problem.v),
            out,
            lse,
            dout,
            *flat(plan, problem.scoring),
        )


def excess(problem: Problem, found: tuple[Tensor, ...], exact: tuple[Tensor, ...], dout: Tensor) -> dict[str, float]:
    """Error against fp64 over the largest allowed: three times same-dtype eager attention's, plus rounding.

    Rounding of the parts that dq, dk and dv are summed from, and of `out`, from which `<out, dout>` is taken: a row
    that sees one key has a gradient of exactly 0 in eager attention, here the difference of two equal numbers. And in
    float32 of `lse`, which eager attention does not round.
    """
    out, _, *exact_grads = exact
    eager_grads = gradients(problem, dout, problem.q.dtype)[2:]
    eps = torch.finfo(problem.q.dtype).eps
    rounding = 2 * eps * problem.scale * float((out * dout).abs().sum(-1).max())
    partner = {"dq": problem.k, "dk": problem.q, "dv": torch.zeros(1)}
    result = {}
    for name, got, right, same in zip(partner, found, exact_grads, eager_grads, strict=True):
        assert got.dtype == problem.q.dtype and got.shape == right.shape and got.isfinite().all()
        floor = (6 if eps < 1e-6 else 2) * eps * float(right.abs().max()) + rounding * float(partner[name].abs().max())
        result[name] = float((got - right).abs().max()) / (3 * float((same - right).abs().max()) + floor + 1e-12)
    return result


def check(problem: Problem, **options: int) -> None:
    dout = cotangent(problem)
    exact = gradients(problem, dout, torch.float64)
    found = differentiate(problem, exact[0].to(problem.q), exact[1].float(), dout, **options)
    errors = excess(problem, found, exact, dout)
    assert max(errors.values()) <= 1, errors


# ---------------------------------------------------------------- exactness

CASES = [
    *(Case(length=n) for n in (1, 7, 128, 129, 200)),
    *(Case(length=n, dtype=HALF) for n in (1, 129)),
    *(Case(balls=balls) for balls in BALLS[1:]),
    Case(balls="depths", heads=4, kv_heads=2, routes=4),
    *(Case(layout=layout) for layout in LAYOUTS if layout != "plain"),
    *(Case(layout=layout, dtype=HALF, length=90) for layout in ("middle_padding", "packed")),
    Case(layout="left_padding", batch=4, length=40),  # whole rows of padding
    *(Case(layout=layout, dense_until=n) for layout, n in (("plain", 70), ("left_padding", 30), ("packed", 9))),
    *(Case(layout=layout, balls="unvisited", length=170) for layout in ("packed", "relabelled")),
    *(
        Case(heads=6, kv_heads=kv_heads, routes=routes, length=70)
        for kv_heads, routes in ((6, 6), (2, 2), (1, 3), (3, 1), (1, 1))
    ),
    Case(heads=4, kv_heads=1, routes=2, length=70, dtype=HALF),
    Case(heads=16, kv_heads=1, routes=1, length=40),  # more heads than share a tile
    *(Case(dim=dim, length=70, dtype=dtype) for dim in (20, 64) for dtype in (torch.float32, HALF)),
    *(Case(window=window, sinks=sinks) for window in (1, 128) for sinks in (0, 4)),
    Case(window=1, sinks=0, balls="disjoint"),  # only itself: dq is 0
    Case(window=1, sinks=70),  # more sinks than a tile holds
    Case(window=500, sinks=500),  # more than there are tokens
    *(Case(queries=(-n, None), length=130) for n in (1, 7)),
    Case(queries=(-9, None), length=130, layout="left_padding", dtype=HALF),
    Case(queries=(-20, None), length=130, layout="packed"),
    Case(queries=(60, 68), length=100, layout="unfilled"),
    *(Case(softcap=cap, length=70, dtype=dtype) for cap in (0.5, 30.0) for dtype in (torch.float32, HALF)),
]

_MODEL = Case(heads=8, kv_heads=2, routes=8, dim=128, window=128, batch=1, dtype=torch.bfloat16)
GPU_CASES = [
    *(
        Case(dim=dim, length=n, dtype=dtype, window=128, heads=4, kv_heads=2, routes=4)
        for dim in (16, 20, 64, 80, 96, 128, 256)
        for dtype in (torch.bfloat16, HALF, torch.float32)
        for n in (129, 1025)
    ),
    *(
        Case(layout=layout, balls=balls, length=1500, dim=64, dtype=dtype, heads=4, kv_heads=2, routes=4)
        for layout in LAYOUTS
        for balls in BALLS
        for dtype in (torch.bfloat16, torch.float32)
    ),
    *(replace(_MODEL, window=window, sinks=sinks, length=2049) for window in (1, 128) for sinks in (0, 4, 70)),
    *(replace(_MODEL, kv_heads=n, routes=r, length=1025) for n in (1, 4, 8) for r in (1, 2, 8)),
    *(replace(_MODEL, queries=(-n, None), length=4097) for n in (1, 33, 512)),
    *(replace(_MODEL, softcap=cap, length=1025) for cap in (0.5, 30.0)),
    *(
        replace(_MODEL, length=1025, visits=m, balls=balls, dtype=dtype)
        for m in (2, 3, 8)
        for balls in ("random", "giant", "tiny")
        for dtype in (torch.bfloat16, HALF, torch.float32)
    ),
    *(replace(_MODEL, length=1025, visits=3, layout=layout, batch=2) for layout in LAYOUTS),
]


@pytest.mark.parametrize("case", [*CASES, *VISITS], ids=str)
def test_gradients(case: Case) -> None:
    check(make(case))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gradients_on_gpu(case: Case) -> None:
    check(make(case))


@pytest.mark.gpu
@pytest.mark.parametrize("length", SWEEP[:-6])
def test_gradients_at_every_length(length: int) -> None:
    layout = "packed" if length >= 3 else "plain"
    check(make(replace(_MODEL, length=length, layout=layout)))
    check(make(replace(_MODEL, length=length, dtype=HALF, balls="giant")))


@settings(max_examples=200 if GPU else 12, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 70),
    layout=st.sampled_from(list(LAYOUTS)),
    balls=st.sampled_from(BALLS),
    window=st.integers(1, 40),
    sinks=st.integers(0, 20),
    queries=st.integers(1, 70),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 999),
)
def test_small_tiles(
    length: int, layout: str, balls: str, window: int, sinks: int, queries: int, chunk: int, seed: int
) -> None:
    """Tiles of 16 and any chunks put many ranges, and gaps and jumps between them, into short sequences."""
    case = Case(length, (-queries, None), layout, balls, 2, 1, 2, 16, window, sinks, batch=1)
    check(make(case, seed), tile_size=16, chunk=chunk)


# ---------------------------------------------------------------- controls: a wrong plan is noticed


@pytest.mark.parametrize("wrong", ["window", "sinks", "ball", "lse", "visit"])
def test_wrong_input_is_noticed(wrong: str) -> None:
    case = Case(length=50, batch=1, visits=2) if wrong == "visit" else Case(length=130)
    problem, plan = make(case), None
    dout = cotangent(problem)
    exact = gradients(problem, dout, torch.float64)
    out, lse = exact[0].to(problem.q), exact[1].float()
    if wrong == "window":
        plan = problem.plan(extra_window=-1)
    elif wrong == "sinks":
        plan = problem.plan(extra_sinks=-1)
    elif wrong == "ball":
        key_ball = problem.key_ball.clone()
        key_ball[0, 1, 40] += 1
        plan = replace(problem, key_ball=key_ball).plan()
    elif wrong == "visit":
        plan = of_visit(problem.plan(), 0)
    else:
        lse[0, 1, 100] += 0.01
    errors = excess(problem, differentiate(problem, out, lse, dout, plan), exact, dout)
    assert min(errors.values()) > 3, errors


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "case",
    [
        Case(layout="left_padding", length=70),
        Case(layout="middle_padding", length=130, dtype=HALF, dim=40),
        Case(layout="unfilled", length=70, balls="unvisited", dim=20),
        Case(layout="packed", length=131, balls="tiny", queries=(-65, None)),
        Case(layout="middle_padding", length=50, visits=2, window=4, dtype=HALF, batch=1),
    ],
    ids=str,
)
def test_nothing_outside_is_read(case: Case) -> None:
    """Also with a plan whose orders leave out sinks and padding."""
    problem, plan = make(case), make(case).plan()
    dout = cotangent(problem)
    out, lse = forward(problem, dout)
    clean = differentiate(problem, out, lse, dout)
    real = problem.query.real[:, None, :, None]
    q, bad_out, bad_dout = (poisoned(t.masked_fill(~real, float("nan"))) for t in (problem.q, out, dout))
    k, v = (poisoned(t.masked_fill(~problem.key.real[:, None, :, None], float("nan"))) for t in (problem.k, problem.v))
    rank = torch.arange(case.length, device=DEVICE)
    in_tree = (problem.key.position >= case.sinks).sum(1)[:, None, None]
    padding = ~problem.query.real[:, None, None].expand_as(plan.query_order).gather(3, plan.query_order.long())
    plan = replace(
        plan,
        key_order=torch.where(rank < in_tree, plan.key_order, 0),
        query_order=torch.where(padding, -1, plan.query_order),
    )
    tensors = {name: guarded(getattr(plan, name)) for name in PLAN_TENSORS}
    plan = replace(plan, **tensors)
    with nan_in_new_memory():
        found = differentiate(problem, bad_out, lse, bad_dout, plan, q=q, k=k, v=v)
    for got, right in zip(found, clean, strict=True):
        assert torch.equal(got, right)


def test_identity_order() -> None:
    problem = make(Case(length=130))
    dout = cotangent(problem)
    out, lse = forward(problem, dout)
    plan = problem.plan()
    assert torch.equal(plan.local_order[0].long(), torch.arange(130, device=DEVICE))
    clean = differentiate(problem, out, lse, dout, plan)
    for got, right in zip(differentiate(problem, out, lse, dout, replace(plan, local_order=None)), clean, strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("length", [pytest.param(4099, marks=pytest.mark.gpu), 70])
def test_repeats_are_bitwise_equal(length: int) -> None:
    problem = make(Case(length=length, layout="packed", dim=64, dtype=HALF))
    plan, dout = problem.plan(), cotangent(problem)
    out, lse = forward(problem, dout)
    first = differentiate(problem, out, lse, dout, plan)
    for _ in range(250 if GPU else 2):
        for got, right in zip(differentiate(problem, out, lse, dout, plan), first, strict=True):
            assert torch.equal(got, right)


# ---------------------------------------------------------------- refusals, operator


@pytest.mark.parametrize("name", ["out", "dout", "lse"])
def test_refuses(name: str) -> None:
    problem = make(Case(length=20))
    tensors = {"out": problem.q, "dout": problem.q, "lse": problem.q[..., 0]}
    tensors[name] = tensors[name][:, :, 1:]
    with pytest.raises(ValueError, match=f"^{name} must have shape"):
        differentiate(problem, **tensors)


def test_no_queries() -> None:
    problem = make(Case(length=5))
    none = replace(problem, q=problem.q[:, :, :0], query=problem.key, query_ball=problem.query_ball)
    plan = none.plan()
    shorter = ("query_order", "range_start", "range_end", "document_start", "local_start", "local_end")
    plan = replace(plan, **{name: getattr(plan, name)[..., :0] for name in shorter})
    dq, dk, dv = differentiate(none, none.q, none.q[..., 0], none.q, plan)
    assert dq.shape == (2, 2, 0, 32) and not dk.any() and not dv.any()


def test_fake_implementation() -> None:
    problem = make(Case(length=20))
    plan, dout = problem.plan(), cotangent(problem)
    out, lse = forward(problem, dout)
    arguments = problem.q, problem.k, problem.v, out, lse, dout, *flat(plan, problem.scoring)
    with tile(64, 64):
        torch.library.opcheck(attention_backward, arguments, test_utils="test_faketensor")
