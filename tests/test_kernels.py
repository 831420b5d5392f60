"""The Triton kernels against the fp64 reference, on a GPU or in Triton's interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from helpers import of_visit, without_repeats
from hypothesis import given, settings
from torch import Tensor

from topo_adapter.core.layout import SequenceLayout, contiguous_layout, layout_from_padding, layout_from_position_ids
from topo_adapter.core.reference import reference_attention
from topo_adapter.core.scoring import Scoring
from topo_adapter.core.visibility import visible_pairs
from topo_adapter.ops.plan import Plan, build_plan
from topo_kernels import LocalTensors, PlanTensors, attention, topology_attention
from topo_kernels.launch import Tile

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
QUERY_CHUNK = 2048  # bounds the T x S tensors of the reference

PLAN_TENSORS = [f.name for f in fields(Plan) if f.name not in ("num_sink_tokens", "dense")]

# ---------------------------------------------------------------- cases


def packed(batch: int, length: int) -> SequenceLayout:
    """Documents of 1 to a third of the row, other ones in each row."""
    rows = []
    for _ in range(batch):
        sizes: list[int] = []
        while sum(sizes) < length:
            sizes.append(int(torch.randint(1, max(2, length // 3), ())))
        rows.append(torch.cat([torch.arange(n) for n in sizes])[:length])
    return layout_from_position_ids(torch.stack(rows))


def relabelled(batch: int, length: int) -> SequenceLayout:
    """Packed, with labels that fall along the row: sorting by label reverses the documents."""
    layout = packed(batch, length)
    return replace(layout, document=layout.document.amax() - layout.document)


def interleaved(batch: int, length: int) -> SequenceLayout:
    """Three documents take turns."""
    index = torch.arange(length).expand(batch, length)
    return SequenceLayout(index % 3, index // 3)


def left_padding(batch: int, length: int) -> SequenceLayout:
    """Nothing in the first row, a third in the second, and so on up to whole rows."""
    padding = torch.arange(batch)[:, None] * length // 3
    return layout_from_padding(torch.arange(length) >= padding)


def middle_padding(batch: int, length: int) -> SequenceLayout:
    """Single tokens and one long stretch."""
    index = torch.arange(length)
    stretch = (index >= length // 3) & (index < 2 * length // 3)
    return layout_from_padding((torch.rand(batch, length) < 0.8) & ~stretch)


def unfilled(batch: int, length: int) -> SequenceLayout:
    """A static cache: the last quarter of the keys is not written yet."""
    return layout_from_padding((torch.arange(length) < length - length // 4).expand(batch, length))


LAYOUTS = {
    "plain": contiguous_layout,
    "left_padding": left_padding,
    "middle_padding": middle_padding,
    "packed": packed,
    "relabelled": relabelled,
    "interleaved": interleaved,
    "unfilled": unfilled,
}


def ball_pair(kind: str, batch: int, routes: int, length: int) -> tuple[Tensor, Tensor]:
    """Query and key balls `[B, R, N]`."""
    shape = (2, batch, routes, length)
    few, many, coin = torch.randint(4, shape), torch.randint(length, shape), torch.rand(shape)
    if kind == "random":
        return few[0], few[1]
    if kind == "depths":  # head r at depth r: the first sees everything
        return tuple((many % 2 ** torch.arange(routes)[:, None]).unbind(0))
    if kind == "giant":
        return tuple(torch.where(coin < 0.95, 0, 1 + few).unbind(0))
    if kind == "unvisited":  # most keys are in ball 3, where no query goes
        return torch.where(coin[0] < 0.5, 1, 6), torch.where(coin[1] < 0.7, 3, many[1] % 8)
    if kind == "disjoint":  # every tree range is empty
        return few[0], few[1] + 4
    if kind == "tiny":  # about one key in a ball
        return many[0], many[1]
    raise ValueError(f"kind must be a known pattern of balls, got {kind!r}")


BALLS = ("random", "depths", "giant", "unvisited", "disjoint", "tiny")


@dataclass(frozen=True)
class Case:
    length: int = 100
    queries: tuple[int, int | None] = (0, None)  # which tokens ask: first, last + 1
    layout: str = "plain"
    balls: str = "random"
    heads: int = 2
    kv_heads: int = 1
    routes: int = 2
    dim: int = 32
    window: int = 16
    sinks: int = 4
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    batch: int = 2
    visits: int = 1  # of a query
    dense_until: int = 0

    def __str__(self) -> str:
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{name}={value}".replace("torch.", "") for name, value in changed) or "default"


@dataclass(frozen=True)
class Problem:
    """A case made concrete."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    query_ball: Tensor
    key_ball: Tensor
    query: SequenceLayout
    key: SequenceLayout
    more_balls: Tensor | None = None  # [B, R, visits - 1, T]

    @property
    def query_balls(self) -> Tensor:
        """`[B, R, visits, T]`; some visits are nowhere."""
        first = self.query_ball[:, :, None]
        return first if self.more_balls is None else without_repeats(torch.cat([first, self.more_balls], 2))

    @property
    def scale(self) -> float:
        return self.case.dim**-0.5

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.scale, self.case.softcap)

    def plan(self, extra_window: int = 0, extra_sinks: int = 0) -> Plan:
        window, sinks = self.case.window + extra_window, self.case.sinks + extra_sinks
        dense_until = self.case.dense_until
        return build_plan(self.query_balls, self.key_ball, self.query, self.key, window, sinks, dense_until)


def make(case: Case, seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    key = LAYOUTS[case.layout](case.batch, case.length)
    key = SequenceLayout(key.document.to(DEVICE), key.position.to(DEVICE))
    asking = slice(*case.queries)
    query = SequenceLayout(key.document[:, asking], key.position[:, asking])
    query_ball, key_ball = ball_pair(case.balls, case.batch, case.routes, case.length)

    def normal(heads: int, length: int) -> Tensor:
        return torch.randn(case.batch, heads, length, case.dim).to(DEVICE, case.dtype)

    problem = Problem(
        case,
        normal(case.heads, query.position.shape[1]),
        normal(case.kv_heads, case.length),
        normal(case.kv_heads, case.length),
        query_ball[..., asking].to(DEVICE),
        key_ball.to(DEVICE),
        query,
        key,
    )
    if case.visits == 1:
        return problem
    more = [ball_pair(case.balls, case.batch, case.routes, case.length)[0] for _ in range(case.visits - 1)]
    balls = torch.stack(more, 2)[..., asking]
    nowhere = torch.rand(balls.shape) < 0.3
    return replace(problem, more_balls=balls.masked_fill(nowhere, -1).to(DEVICE))


# ---------------------------------------------------------------- running and comparing


@contextmanager
def tile(size: int) -> Iterator[None]:
    square = Tile(size, size, 4, 2)
    with mock.patch.object(attention, "choose_forward_tiles", lambda *_: attention.ForwardTiles(square, square)):
        yield


def attend(problem: Problem, plan: Plan | None = None, tile_size: int | None = None, **tensors: Tensor) -> Tensor:
    """The kernels; the interpreter takes large tiles, because it pays per tile."""
    plan = plan or problem.plan()
    size = tile_size or (None if GPU else 64)
    with nullcontext() if size is None else tile(size):
        return topology_attention(
            tensors.get("q", problem.q),
            tensors.get("k", problem.k),
            tensors.get("v", problem.v),
            plan,
            problem.scoring,
        )


def whole(arguments: dict[str, Any], kind: type[PlanTensors] | type[LocalTensors] = PlanTensors) -> dict[str, Any]:
    """Arguments with the parts of a plan and of a scoring among them, as public functions take them."""
    parts = {name: arguments[name] for name in kind._fields}
    rest = {name: value for name, value in arguments.items() if name not in (*parts, "scale", "softcap")}
    return rest | {"plan": kind(**parts), "scoring": Scoring(arguments["scale"], arguments["softcap"])}


def eager(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Plain masked attention in the dtype of its inputs."""
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.softmax(scores.masked_fill(~visible, float("-inf")), -1).nan_to_num(0.0) @ v


def errors(problem: Problem, out: Tensor) -> tuple[float, float]:
    """Largest error against fp64, and the largest allowed: twice same-dtype eager attention's, plus rounding.

    Three times in float32, where the GPU's approximate exp2 (2 ulp, like the rounding it competes with) counts.
    """
    assert out.dtype == problem.q.dtype and out.shape == problem.q.shape
    assert out.isfinite().all()
    case = problem.case
    found = eager_error = floor = 0.0
    for b in range(case.batch):
        for h in range(case.heads):
            g, r = h * case.kv_heads // case.heads, h * case.routes // case.heads
            k, v = problem.k[b : b + 1, g : g + 1], problem.v[b : b + 1, g : g + 1]
            key = SequenceLayout(problem.key.document[b : b + 1], problem.key.position[b : b + 1])
            for first in range(0, out.shape[2], QUERY_CHUNK):
                rows = slice(first, first + QUERY_CHUNK)
                q = problem.q[b : b + 1, h : h + 1, rows]
                query = SequenceLayout(problem.query.document[b : b + 1, rows], problem.query.position[b : b + 1, rows])
                query_balls, key_ball = (
                    problem.query_balls[b : b + 1, r : r + 1, :, rows],
                    problem.key_ball[b : b + 1, r : r + 1],
                )
                always = case.window, case.sinks, case.dense_until
                visible = visible_pairs(query_balls, key_ball, query, key, *always)
                if case.softcap is None:
                    exact = reference_attention(q, k, v, visible, problem.scale)
                else:
                    exact = eager(q.double(), k.double(), v.double(), visible, problem.scale, case.softcap)
                got = out[b : b + 1, h : h + 1, rows]
                assert not got[~query.real[:, None]].any(), "rows of padding must be exactly 0"
                same_dtype = eager(q, k, v, visible, problem.scale, case.softcap)
                rounded = exact.to(case.dtype)
                found = max(found, float((got - exact).abs().max()))
                eager_error = max(eager_error, float((same_dtype - exact).abs().max()))
                floor = max(floor, 2 * float((rounded + 0.3 - 0.3 - rounded).abs().max()))
                if case.dtype == torch.float32:  # the GPU's exp2 is good to 2 ulp, and partial outputs are rounded
                    floor = max(floor, 8 * torch.finfo(case.dtype).eps * float(exact.abs().max()))
    return found, (3 if case.dtype == torch.float32 else 2) * eager_error + floor


def check(problem: Problem, out: Tensor) -> None:
    found, allowed = errors(problem, out)
    assert found <= allowed, f"error {found:.3e}, allowed {allowed:.3e}"


# ---------------------------------------------------------------- exactness

HALF = torch.float16
CASES = [
    *(Case(length=n) for n in (1, 7, 127, 128, 129, 200)),
    *(Case(length=n, dtype=HALF) for n in (1, 128, 129)),
    *(Case(balls=balls) for balls in BALLS[1:]),
    Case(balls="depths", heads=4, kv_heads=2, routes=4),
    *(Case(layout=layout) for layout in LAYOUTS if layout != "plain"),
    *(Case(layout=layout, dtype=HALF, length=90) for layout in ("middle_padding", "packed")),
    Case(layout="left_padding", batch=4, length=40),  # whole rows of padding
    *(Case(layout=layout, dense_until=n) for layout in ("plain", "left_padding", "packed") for n in (1, 40, 130)),
    Case(dense_until=70, dtype=HALF, visits=2),
    *(Case(layout=layout, balls="unvisited", length=170) for layout in ("packed", "relabelled")),
    *(
        Case(heads=6, kv_heads=kv_heads, routes=routes, length=70)
        for kv_heads, routes in ((6, 6), (2, 2), (1, 3), (1, 1))
    ),
    Case(heads=4, kv_heads=2, routes=2, length=70, dtype=HALF),
    *(Case(dim=dim, length=70, dtype=dtype) for dim in (16, 20, 40, 64) for dtype in (torch.float32, HALF)),
    *(Case(window=window, sinks=sinks) for window in (1, 16, 128) for sinks in (0, 4)),
    Case(window=1, sinks=0, balls="disjoint"),  # only itself: the output is v
    Case(window=1, sinks=70),  # more sinks than a tile holds
    Case(window=500, sinks=500),  # more than there are tokens
    *(Case(queries=(-n, None), length=130) for n in (1, 7)),
    Case(queries=(-9, None), length=130, layout="left_padding", dtype=HALF),
    Case(queries=(-20, None), length=130, layout="packed"),
    Case(queries=(60, 68), length=100, layout="unfilled"),
    *(Case(softcap=cap, length=70, dtype=dtype) for cap in (0.5, 30.0) for dtype in (torch.float32, HALF)),
]

VISITS = [
    *(Case(length=n, visits=2, window=4, batch=1, dtype=dtype) for n, dtype in ((50, torch.float32), (130, HALF))),
    Case(length=60, visits=3, window=4, layout="packed", dtype=HALF),
    Case(length=60, visits=3, window=4, layout="left_padding", heads=4, kv_heads=2, queries=(-50, None)),
    Case(length=50, visits=3, window=4, balls="depths", heads=4, kv_heads=2, routes=4, batch=1),
    Case(length=50, visits=8, window=1, sinks=0, balls="tiny", batch=1),
]

_MODEL = Case(heads=32, kv_heads=8, routes=32, dim=128, window=128, batch=1)
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
    *(
        replace(_MODEL, window=window, sinks=sinks, length=2049, dtype=torch.bfloat16)
        for window in (1, 16, 128)
        for sinks in (0, 4)
    ),
    *(replace(_MODEL, kv_heads=n, routes=n, length=1025, dtype=torch.bfloat16) for n in (1, 4, 8, 32)),
    *(replace(_MODEL, queries=(-n, None), length=4097, dtype=torch.bfloat16) for n in (1, 33, 512)),
    *(replace(_MODEL, softcap=cap, length=1025, dtype=torch.bfloat16) for cap in (0.5, 30.0)),
    replace(_MODEL, length=8193, dtype=torch.float32, heads=4, kv_heads=1, routes=4),
    *(
        replace(_MODEL, length=1025, visits=m, balls=balls, dtype=dtype)
        for m in (2, 3, 8)
        for balls in ("random", "giant", "tiny")
        for dtype in (torch.bfloat16, HALF, torch.float32)
    ),
    *(replace(_MODEL, length=1025, visits=3, layout=layout, dtype=torch.bfloat16, batch=2) for layout in LAYOUTS),
]
# fmt: off
SWEEP = (1, 2, 3, 5, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 191, 255, 257, 383, 511, 513, 777, 1000, 1023,
         1025, 1537, 2047, 2049, 3001, 4095, 4096, 4097, 6001, 8191, 8192, 8193)
# fmt: on


@pytest.mark.parametrize("case", [*CASES, *VISITS], ids=str)
def test_matches_reference(case: Case) -> None:
    problem = make(case)
    check(problem, attend(problem))


def plain(plan: Plan) -> Plan:
    """The same plan for the path of unpadded single documents."""
    return replace(plan, local_order=None)


@contextmanager
def fixed_reference() -> Iterator[None]:
    with mock.patch.object(attention, "_fixed_reference", lambda _: True):
        yield


@pytest.mark.parametrize("fixed", [False, True], ids=["running_max", "fixed_reference"])
@pytest.mark.parametrize(
    "case", [case for case in CASES + VISITS if case.layout == "plain" and case.dtype == torch.float32], ids=str
)
def test_plain_path(case: Case, fixed: bool) -> None:
    problem = make(case)
    with fixed_reference() if fixed else nullcontext():
        check(problem, attend(problem, plain(problem.plan())))


@pytest.mark.parametrize("path", ["plain", "general"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_scores_too_far_from_the_fixed_reference_are_done_again(path: str, dtype: torch.dtype) -> None:
    problem = make(Case(length=100, dtype=dtype))
    problem = replace(problem, q=problem.q * 60)  # scores of several hundred
    plan = problem.plan()
    with fixed_reference():
        check(problem, attend(problem, plain(plan) if path == "plain" else plan))


def several_gpu_cases_on_the_plain_path() -> list[Case]:
    return [case for case in GPU_CASES if case.visits > 1 and case.layout == "plain"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", several_gpu_cases_on_the_plain_path(), ids=str)
def test_plain_path_of_visits_on_gpu(case: Case) -> None:
    problem = make(case)
    check(problem, attend(problem, plain(problem.plan())))


@pytest.mark.parametrize("path", ["plain", "general"])
def test_one_visit_may_lack_its_axis(path: str) -> None:
    problem = make(Case(length=50, batch=1))
    plan = plain(problem.plan()) if path == "plain" else problem.plan()
    assert torch.equal(attend(problem, of_visit(plan, 0)), attend(problem, plan))


def test_absent_visits_change_no_bit() -> None:
    """They are passes that see nothing; in float32, because half precision is rounded once, not after each pass."""
    problem = make(Case(length=50, batch=1))
    nowhere = torch.full_like(problem.query_ball, -1)[:, :, None].expand(-1, -1, 2, -1)
    absent = replace(problem, more_balls=nowhere)
    for path in (plain, lambda plan: plan):
        assert torch.equal(attend(problem, path(absent.plan())), attend(problem, path(problem.plan())))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_matches_reference_on_gpu(case: Case) -> None:
    problem = make(case)
    check(problem, attend(problem))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", SWEEP)
def test_model_shape_at_every_length(length: int, dtype: torch.dtype) -> None:
    i = SWEEP.index(length)
    layouts = [name for name in LAYOUTS if length >= 3 or name != "packed"]
    case = replace(_MODEL, length=length, dtype=dtype, layout=layouts[i % len(layouts)], balls=BALLS[i % len(BALLS)])
    for problem in (make(case), make(replace(case, layout="plain", balls="random"))):
        check(problem, attend(problem))


@settings(max_examples=200 if GPU else 12, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 70),
    layout=st.sampled_from(list(LAYOUTS)),
    balls=st.sampled_from(BALLS),
    window=st.integers(1, 40),
    sinks=st.integers(0, 5),
    queries=st.integers(1, 70),
    seed=st.integers(0, 999),
)
def test_small_tiles(length: int, layout: str, balls: str, window: int, sinks: int, queries: int, seed: int) -> None:
    """Tiles of 16 put many ranges, gaps and jumps between them into short sequences."""
    case = Case(length, (-queries, None), layout, balls, 2, 1, 2, 16, window, sinks, batch=1)
    problem = make(case, seed)
    check(problem, attend(problem, tile_size=16))


# ---------------------------------------------------------------- controls: a wrong plan is noticed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("wrong", ["window", "sinks", "ball", "range", "visit"])
def test_wrong_plan_is_noticed(wrong: str, dtype: torch.dtype) -> None:
    problem = make(Case(dtype=dtype, visits=2 if wrong == "visit" else 1))
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
        right = problem.plan()
        plan = replace(right, range_end=(right.range_end - 1).clamp(min=right.range_start))
    found, allowed = errors(problem, attend(problem, plan))
    assert found > 3 * allowed


# ---------------------------------------------------------------- memory


def poisoned(tensor: Tensor) -> Tensor:
    """The same values as a strided view into memory full of NaN."""
    memory = tensor.new_full([n + 3 for n in tensor.shape], float("nan"))
    view = memory[tuple(slice(1, 1 + n) for n in tensor.shape)]
    return view.copy_(tensor)


def guarded(tensor: Tensor) -> Tensor:
    """The same integers, contiguous, with invalid ones before and after."""
    memory = tensor.new_full((tensor.numel() + 256,), 2**30)
    view = memory[128 : 128 + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


@contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """`torch.empty` returns NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "case",
    [
        Case(layout="left_padding", length=70),
        Case(layout="middle_padding", length=130, dtype=torch.float16, dim=40),
        Case(layout="unfilled", length=70, balls="unvisited", dim=20),
        Case(layout="packed", length=131, balls="tiny", queries=(-65, None)),
        Case(layout="middle_padding", length=50, visits=2, window=4, dtype=torch.float16, batch=1),
    ],
    ids=str,
)
def test_nothing_outside_is_read(case: Case) -> None:
    problem = make(case)
    clean = attend(problem)
    q = problem.q.masked_fill(~problem.query.real[:, None, :, None], float("nan"))
    k, v = (t.masked_fill(~problem.key.real[:, None, :, None], float("nan")) for t in (problem.k, problem.v))
    plan = problem.plan()
    tensors = {name: guarded(getattr(plan, name)) for name in PLAN_TENSORS}
    with nan_in_new_memory():
        out = attend(problem, replace(plan, **tensors), q=poisoned(q), k=poisoned(k), v=poisoned(v))
    assert torch.equal(out, clean)
    check(problem, out)


def test_strides() -> None:
    problem = make(Case(length=70))
    clean = attend(problem)
    for dims in ((1, 2), (2, 3), (0, 3)):  # the first as in transformers, the others with a strided last dimension
        views = {name: getattr(problem, name).transpose(*dims).contiguous().transpose(*dims) for name in "qkv"}
        assert torch.equal(attend(problem, **views), clean)
    assert clean.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("length", [pytest.param(4099, marks=pytest.mark.gpu), 70])
def test_repeats_are_bitwise_equal(length: int) -> None:
    problem = make(Case(length=length, layout="packed", dim=64, dtype=torch.float16))
    plan, first = problem.plan(), attend(problem)
    for _ in range(250 if GPU else 2):
        assert torch.equal(attend(problem, plan), first)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    problem = make(Case(length=33_000, queries=(-64, None), heads=1, kv_heads=1, routes=1, dim=16, batch=1))
    rows = torch.empty(33_000, 2**16, dtype=torch.float16, device=DEVICE)  # 2^31 elements and more
    k, v = rows[None, None, :, :16].copy_(problem.k), rows[None, None, :, 16:32].copy_(problem.v)
    problem = replace(problem, q=problem.q.half(), k=k, v=v, case=replace(problem.case, dtype=torch.float16))
    check(problem, attend(problem))


@pytest.mark.gpu
def test_more_heads_than_a_grid_axis_holds() -> None:
    problem = make(Case(length=1, heads=70_000, kv_heads=70_000, routes=1, dim=16, batch=1))
    assert torch.equal(attend(problem), problem.v)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("q", lambda t: t[0], r"q must have shape \[B, heads, length, D\], got \(2, 20, 32\)"),
        ("q", lambda t: t.double(), "q must be float16, bfloat16 or float32, got torch.float64"),
        ("k", lambda t: t.repeat(1, 3, 1, 1), "multiple of k's heads, got 2 query heads and 3 key heads"),
        ("k", lambda t: t.half(), "k must have q's dtype torch.float32, got torch.float16"),
        ("k", lambda t: t[..., :16], r"k must have shape \[B=2, H_kv, S, D=32\]"),
        ("v", lambda t: t[:, :, 1:], "v must have the shape of k"),
        ("v", lambda t: t.to("meta"), "v must be on q's device"),
        ("query_order", lambda t: t.repeat(1, 2, 1, 1), "R a divisor of q's 2 heads"),
        ("query_order", lambda t: t[:, :, :0], r"m >= 1, got \(2, 2, 0, 20\)"),
        ("query_order", lambda t: t[:, :, 0], r"range_start must have shape \[2, 2, 20\], got \[2, 2, 1, 20\]"),
        ("range_start", lambda t: t[..., 1:], r"range_start must have shape \[2, 2, 1, 20\], got \[2, 2, 1, 19\]"),
        ("key_order", lambda t: t.long(), "key_order must be int32, got torch.int64"),
        ("local_end", lambda t: t[:1], r"local_end must have shape \[2, 20\]"),
        ("num_sink_tokens", lambda n: -1, "num_sink_tokens must be >= 0, got -1"),
        ("scale", lambda _: 0.0, "scale must be > 0, got 0.0"),
        ("scale", lambda _: -1.0, "scale must be > 0, got -1.0"),
        ("softcap", lambda _: 0.0, "softcap must be None or > 0, got 0.0"),
    ],
)
def test_refuses(argument: str, change, message: str) -> None:
    problem = make(Case(length=20))
    plan = problem.plan()
    arguments = {name: getattr(plan, name) for name in (*PLAN_TENSORS, "num_sink_tokens")}
    arguments |= {"q": problem.q, "k": problem.k, "v": problem.v, "scale": 1.0, "softcap": None}
    with pytest.raises(ValueError, match=message):
        topology_attention(**whole(arguments | {argument: change(arguments[argument])}))


def test_refuses_wide_heads() -> None:
    problem = make(Case(length=2, dim=257))
    with pytest.raises(ValueError, match="from 16 to 256, got 257"):
        attend(problem)


def test_gradients_reach_the_inputs() -> None:
    """`test_backward_kernel.py` checks their values; here, that autograd and `torch.no_grad` find them."""
    problem = make(Case(length=40))
    q, k, v = (t.clone().requires_grad_() for t in (problem.q, problem.k, problem.v))
    loss = attend(problem, q=q, k=k, v=v).square().sum()
    got = torch.autograd.grad(loss, (q, k, v))
    expected = torch.autograd.grad(hard_attention_in_torch(problem, q, k, v).square().sum(), (q, k, v))
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    with torch.no_grad():
        assert not attend(problem, q=q, k=k, v=v).requires_grad


def hard_attention_in_torch(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    case = problem.case
    query, key = (t.repeat_interleave(case.heads // case.routes, 1) for t in (problem.query_balls, problem.key_ball))
    visible = visible_pairs(query, key, problem.query, problem.key, case.window, case.sinks)
    k, v = (t.repeat_interleave(case.heads // case.kv_heads, 1) for t in (k, v))
    return eager(q, k, v, visible, problem.scale, case.softcap)


@pytest.mark.skipif(GPU, reason="the interpreter's limit")
def test_interpreter_refuses_bfloat16() -> None:
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"):
        attend(make(Case(length=5, dtype=torch.bfloat16)))


def test_no_queries() -> None:
    problem = make(Case(length=5))
    plan = problem.plan()
    asking = {
        name: getattr(plan, name)[..., :0] for name in PLAN_TENSORS if name.startswith(("q", "r", "d", "local_s"))
    }
    none = replace(plan, **asking, local_end=plan.local_end[:, :0])
    assert attend(problem, none, q=problem.q[:, :, :0]).shape == (2, 2, 0, 32)
