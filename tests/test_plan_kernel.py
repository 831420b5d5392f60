"""The planning kernels against `build_plan`, on a GPU or in Triton's interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from helpers import LAYOUTS, of_visit
from hypothesis import given, settings
from torch import Tensor

from topo_adapter.core.layout import SequenceLayout
from topo_adapter.ops.plan import Plan, build_plan
from topo_kernels import checks
from topo_kernels import plan as kernels

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    length: int = 100
    queries: tuple[int, int | None] = (0, None)  # which tokens ask: first, last + 1
    layout: str = "plain"
    pattern: str = "random"
    balls: tuple[int, ...] = (8,)
    window: int = 9
    sinks: int = 3
    batch: int = 2
    absent: float = 0.0  # share of the queries that are in no ball
    dense_until: int = 0

    def __str__(self) -> str:
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{name}={value}" for name, value in changed) or "default"


def addresses(case: Case) -> tuple[Tensor, Tensor]:
    """Query and key addresses `[B, R, N]`, below 4096."""
    shape = (2, case.batch, len(case.balls), case.length)
    many, coin = torch.randint(4096, shape), torch.rand(shape)
    if case.pattern == "random":
        query, key = many
    elif case.pattern == "giant":
        query, key = torch.where(coin < 0.95, 0, many)
    elif case.pattern == "unvisited":  # most keys are in ball 3, where no query goes
        query, key = torch.where(coin[0] < 0.5, 1, 2), torch.where(coin[1] < 0.7, 3, many[1])
    elif case.pattern == "disjoint":  # every tree range is empty
        query, key = many[0] * 2 % 4096, (many[1] * 2 + 1) % 4096
    else:
        raise ValueError(f"pattern must be a known pattern of balls, got {case.pattern!r}")
    if case.absent > 0:
        query = torch.where(torch.rand(query.shape) < case.absent, -1, query)
    return query.int().to(DEVICE), key.int().to(DEVICE)


PATTERNS = ("random", "giant", "unvisited", "disjoint")


@dataclass(frozen=True)
class Problem:
    """A case made concrete."""

    case: Case
    query_address: Tensor
    key_address: Tensor
    balls: Tensor
    query: SequenceLayout
    key: SequenceLayout

    def reference(self) -> Plan:
        addresses = self.query_address, self.key_address
        query_ball, key_ball = (torch.where(a < 0, -1, a % self.balls[:, None]) for a in addresses)
        always = self.case.window, self.case.sinks, self.case.dense_until
        return of_visit(build_plan(query_ball[:, :, None], key_ball, self.query, self.key, *always), 0)

    def arguments(self) -> dict[str, Tensor]:
        """The tensors that `tree_plan` takes."""
        local = self.reference()
        tensors = {
            "query_address": self.query_address,
            "key_address": self.key_address,
            "balls": self.balls,
            "local_start": local.local_start,
        }
        if self.case.layout == "plain":
            return tensors
        rank = torch.where(self.query.real, local.local_end, self.key.position.shape[1] + 1)
        order = rank.argsort(-1)
        tensors["document_start"] = local.document_start
        tensors["tree_queries"] = torch.where(self.query.real.gather(1, order), order, -1).int()
        in_tree = (self.key.position >= self.case.sinks).gather(1, local.local_order.long())
        tensors["tree_keys"] = torch.where(in_tree, local.local_order, -1)
        return tensors


def make(case: Case, seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    key = LAYOUTS[case.layout](case.batch, case.length)
    key = SequenceLayout(key.document.to(DEVICE), key.position.to(DEVICE))
    asking = slice(*case.queries)
    query = SequenceLayout(key.document[:, asking], key.position[:, asking])
    query_address, key_address = addresses(case)
    balls = torch.tensor(case.balls, dtype=torch.int32, device=DEVICE)
    return Problem(case, query_address[..., asking], key_address, balls, query, key)


# ---------------------------------------------------------------- running and comparing

Tensors = tuple[Tensor, ...]  # query_order, range_start, range_end, key_order


@contextmanager
def chunks(size: int) -> Iterator[None]:
    """Chunks of so many tokens, so that a short sequence has several."""
    with mock.patch.object(
        kernels, "choose_plan_tiles", lambda _: kernels.PlanTiles(size, 1, 2, 16, 4, min(size, 32), min(size, 32) // 16)
    ):
        yield


def run(problem: Problem, chunk: int | None = 64, **changes: Tensor) -> Tensors:
    tensors = problem.arguments() | changes
    options = {"max_balls": max(problem.case.balls), "num_sink_tokens": problem.case.sinks}
    if chunk is None:
        return kernels.tree_plan(**tensors, **options)
    with chunks(chunk):
        return kernels.tree_plan(**tensors, **options)


def seen(order: Tensor, start: Tensor, end: Tensor, key_order: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """How many keys each query of one head sees, and which, one query after the other."""
    real = order >= 0
    first, count = torch.zeros(2, length, dtype=torch.long, device=order.device)
    first[order[real].long()] = start[real].long()
    count[order[real].long()] = (end - start)[real].long()
    skipped = torch.cat([count.new_zeros(1), count.cumsum(0)[:-1]])
    slots = torch.arange(int(count.sum()), device=order.device) + (first - skipped).repeat_interleave(count)
    return count, key_order[slots]


def check(problem: Problem, plan: Tensors) -> None:
    reference = problem.reference()
    query_order, range_start, range_end, key_order = plan
    length = query_order.shape[2]
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in plan)
    for b in range(query_order.shape[0]):
        document, position = problem.query.document[b], problem.query.position[b]
        in_tree = problem.key.position[b] >= problem.case.sinks
        for r, balls in enumerate(problem.case.balls):
            # a permutation of the real queries in a ball, by ball, document and position, then -1
            real = problem.query.real[b] & (problem.query_address[b, r] >= 0)
            order, start, end = (t[b, r] for t in (query_order, range_start, range_end))
            count = int(real.sum())
            head = order[:count].long()
            assert torch.equal(head.sort().values, real.nonzero()[:, 0])
            ball = problem.query_address[b, r] % balls
            rank = ((ball * 8192 + document) * 2**20 + position)[head]
            assert (rank.diff() > 0).all()
            assert (order[count:] == -1).all() and not start[count:].any() and not end[count:].any()
            # a permutation of the tree's keys, by ball, document and position, then 0
            keys = key_order[b, r]
            count = int(in_tree.sum())
            head = keys[:count].long()
            assert torch.equal(head.sort().values, in_tree.nonzero()[:, 0])
            ball = problem.key_address[b, r] % balls
            rank = ((ball * 8192 + problem.key.document[b]) * 2**20 + problem.key.position[b])[head]
            assert (rank.diff() > 0).all()
            assert not keys[count:].any()
            # the queries see what they should, in the same order
            assert (start <= end).all() and (end <= count).all()
            count = int(real.sum())
            assert (start[:count].diff() >= 0).all() and (end[:count].diff() >= 0).all()
            expected = (t[b, r] for t in (reference.query_order, reference.range_start, reference.range_end))
            want = seen(*expected, reference.key_order[b, r], length)
            found = seen(order, start, end, keys, length)
            assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))


# ---------------------------------------------------------------- exactness

CASES = [
    Case(),
    *(Case(layout=layout) for layout in LAYOUTS if layout != "plain"),
    *(Case(pattern=pattern, layout=layout) for pattern in PATTERNS[1:] for layout in ("plain", "packed")),
    Case(layout="left_padding", batch=3, length=40),  # whole rows of padding
    Case(balls=(1, 2, 128), batch=1),  # another depth for each head
    Case(balls=(3, 27), layout="middle_padding"),
    Case(balls=(1,), layout="interleaved"),
    *(Case(length=n, layout=layout) for n in (1, 65) for layout in ("plain", "left_padding")),
    *(Case(queries=(-n, None), layout=layout) for n in (1, 70) for layout in ("plain", "left_padding", "relabelled")),
    Case(queries=(60, 68), layout="right_padding"),
    Case(sinks=0, window=1),
    *(Case(layout=layout, dense_until=n) for layout in ("plain", "left_padding", "packed") for n in (9, 60)),
    Case(sinks=70),  # more sinks than a chunk holds
    Case(sinks=500, window=500),  # more than there are tokens
    *(Case(absent=0.7, length=70, batch=1, layout=layout) for layout in ("plain", "middle_padding")),
    Case(absent=1.0, length=20, batch=1),
]
FULL_CASES = [
    *(Case(length=n, batch=1, balls=(1, 27)) for n in (1, 7, 1023, 1025)),
    Case(length=1025, batch=1, balls=(16, 256), layout="relabelled"),
    Case(length=1300, batch=1, balls=(4096,), queries=(-7, None)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sees_what_build_plan_says(case: Case) -> None:
    problem = make(case)
    check(problem, run(problem))


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_with_the_chunks_of_a_gpu(case: Case) -> None:
    problem = make(case)
    check(problem, run(problem, None))


@settings(max_examples=200 if GPU else 10, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 70),
    layout=st.sampled_from(list(LAYOUTS)),
    pattern=st.sampled_from(PATTERNS),
    window=st.integers(1, 40),
    sinks=st.integers(0, 5),
    queries=st.integers(1, 70),
    seed=st.integers(0, 999),
)
def test_small_chunks(length: int, layout: str, pattern: str, window: int, sinks: int, queries: int, seed: int) -> None:
    problem = make(Case(length, (-queries, None), layout, pattern, (9,), window, sinks, 1), seed)
    check(problem, run(problem, 16))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [129, 1025, 3000])
def test_every_layout_on_gpu(layout: str, pattern: str, length: int) -> None:
    problem = make(Case(length, layout=layout, pattern=pattern, balls=(1, 3, 64, 4096)))
    check(problem, run(problem, None))


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("length", [8192, 8193, 131_072])
def test_against_a_stable_sort(length: int, pattern: str) -> None:
    balls = tuple(2 ** (r % 9) for r in range(32))  # depths 0 to 8
    problem = make(Case(length, pattern=pattern, balls=balls, batch=1, window=128, sinks=4))
    query_order, start, end, key_order = run(problem, None)
    reference = problem.reference()
    query_ball, key_ball = (a % problem.balls[:, None] for a in (problem.query_address, problem.key_address))
    assert torch.equal(query_order.long(), query_ball.sort(stable=True, dim=-1).indices)
    assert torch.equal(key_order[..., : length - 4].long(), key_ball[..., 4:].sort(stable=True, dim=-1).indices + 4)
    assert torch.equal(start, reference.range_start) and torch.equal(end, reference.range_end)


@pytest.mark.gpu
def test_million_tokens() -> None:
    problem = make(Case(2**20 + 1, balls=(4096, 1), batch=1, window=128, sinks=4))
    query_order, start, end, _ = run(problem, None)
    reference = problem.reference()
    assert torch.equal(query_order, reference.query_order)
    assert torch.equal(start, reference.range_start) and torch.equal(end, reference.range_end)


@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_bound_after_the_last_key(layout: str) -> None:
    problem = make(Case(length=64, layout=layout, batch=1, sinks=0))
    query_order, _, end, key_order = run(problem, local_start=torch.full_like(problem.query_address[:, 0], 64))
    query_ball = problem.query_address[0, 0][query_order[0, 0].long()] % 8
    key_ball = problem.key_address[0, 0][key_order[0, 0].long()] % 8
    assert torch.equal(end[0, 0].long(), torch.searchsorted(key_ball, query_ball, right=True))


# ---------------------------------------------------------------- controls: a wrong plan is noticed


@pytest.mark.parametrize("wrong", ["end", "keys", "queries", "window", "ball"])
def test_wrong_plan_is_noticed(wrong: str) -> None:
    problem = make(Case(batch=1))
    query_order, start, end, key_order = (t.clone() for t in run(problem))
    if wrong == "end":
        end[0, 0, 50] -= 1
    elif wrong == "keys":
        key_order[0, 0, [8, 9]] = key_order[0, 0, [9, 8]]
    elif wrong == "queries":
        query_order[0, 0, [8, 9]] = query_order[0, 0, [9, 8]]
    elif wrong == "window":
        query_order, start, end, key_order = run(problem, local_start=problem.reference().local_start + 1)
    else:
        key_address = problem.key_address.clone()
        key_address[0, 0, 40] += 1
        query_order, start, end, key_order = run(problem, key_address=key_address)
    with pytest.raises(AssertionError):
        check(problem, (query_order, start, end, key_order))


# ---------------------------------------------------------------- memory

INVALID = 2**30


def guarded(tensor: Tensor) -> Tensor:
    """The same integers as a strided view into memory full of invalid ones."""
    memory = tensor.new_full([n + 3 for n in tensor.shape], INVALID)
    view = memory[tuple(slice(1, 1 + n) for n in tensor.shape)]
    return view.copy_(tensor)


@contextmanager
def invalid_new_memory() -> Iterator[None]:
    """`torch.empty` returns invalid values."""
    torch.use_deterministic_algorithms(True)
    try:
        assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1),
        Case(layout="middle_padding"),
        Case(layout="right_padding", pattern="unvisited", batch=1),
        Case(layout="packed", queries=(-65, None), batch=1),
    ],
    ids=str,
)
def test_nothing_outside_is_read(case: Case) -> None:
    problem = make(case)
    clean = run(problem)
    tensors = problem.arguments()
    for name, layout in (("query_address", problem.query), ("key_address", problem.key)):
        tensors[name] = tensors[name].masked_fill(~layout.real[:, None], INVALID)
    tensors = {name: guarded(tensor) for name, tensor in tensors.items()}
    with invalid_new_memory():
        out = run(problem, **tensors)
    assert all(torch.equal(x, y) for x, y in zip(out, clean, strict=True))


def test_strides() -> None:
    problem = make(Case(layout="packed", length=60))
    clean = run(problem)
    for dims in ((1, 2), (0, 2)):  # the first as in records [B, T, R]
        views = {
            name: getattr(problem, name).transpose(*dims).contiguous().transpose(*dims)
            for name in ("query_address", "key_address")
        }
        assert all(torch.equal(x, y) for x, y in zip(run(problem, **views), clean, strict=True))


@pytest.mark.parametrize("length", [pytest.param(4099, marks=pytest.mark.gpu), 70])
def test_repeats_are_bitwise_equal(length: int) -> None:
    problem = make(Case(length=length, layout="packed"))
    chunk = None if GPU else 64
    arguments, first = problem.arguments(), run(problem, chunk)
    for _ in range(250 if GPU else 1):
        again = run(problem, chunk, **arguments)
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    problem = make(Case(length=33_000, balls=(64,), batch=1))
    records = torch.empty(33_000, 2**16 + 1, dtype=torch.int32, device=DEVICE)  # 2^31 elements and more
    key_address = records[:, :1].T[None].copy_(problem.key_address)
    query_address = records[:, 1:2].T[None].copy_(problem.query_address)
    out = run(problem, None, query_address=query_address, key_address=key_address)
    assert all(torch.equal(x, y) for x, y in zip(out, run(problem, None), strict=True))


# ---------------------------------------------------------------- torch.compile and CUDA graphs


def test_custom_op() -> None:
    for layout in ("packed", "plain"):
        tensors = make(Case(length=9, layout=layout, batch=1)).arguments()
        order = [tensors.get(name) for name in ("document_start", "tree_queries", "tree_keys")]
        arguments = [tensors[name] for name in ("query_address", "key_address", "balls", "local_start")]
        tests = ("test_schema", "test_faketensor")
        with chunks(16):
            torch.library.opcheck(kernels._tree_plan, (*arguments, *order, 8, 3), test_utils=tests)


@pytest.mark.gpu
def test_cuda_graph() -> None:
    problem, other = make(Case(length=3000)), make(Case(length=3000), seed=1)
    tensors = {name: tensor.clone() for name, tensor in problem.arguments().items()}
    run(problem, None, **tensors)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.tree_plan(**tensors, max_balls=8, num_sink_tokens=3)
    for name, tensor in other.arguments().items():
        tensors[name].copy_(tensor)
    graph.replay()
    check(other, out)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("query_address", lambda t: t[0], r"query_address must have shape \[B, R, length\], got \[2, 20\]"),
        ("query_address", lambda t: t.long(), "query_address must be int32, got torch.int64"),
        ("key_address", lambda t: t[:1], r"key_address must have shape \[2, 2, 20\], got \[1, 2, 20\]"),
        ("key_address", lambda t: t[..., :0], "key_address must hold the queries' own keys at least, got S = 0"),
        ("balls", lambda t: t[:1], r"balls must have shape \[2\], got \[1\]"),
        ("balls", lambda t: t.to("meta"), "balls must be on query_address's device"),
        ("local_start", lambda t: t[:, 1:], r"local_start must have shape \[2, 20\], got \[2, 19\]"),
        ("document_start", lambda t: t.float(), "document_start must be int32, got torch.float32"),
        ("tree_queries", lambda t: t[:1], r"tree_queries must have shape \[2, 20\], got \[1, 20\]"),
        ("tree_keys", lambda t: t[:1], r"tree_keys must have shape \[2, 20\], got \[1, 20\]"),
        ("tree_keys", lambda t: None, "must be given together or not at all, got document_start, tree_queries alone"),
        ("max_balls", lambda _: 4097, "max_balls must be from 1 to 4096, got 4097"),
        ("max_balls", lambda _: 0, "max_balls must be from 1 to 4096, got 0"),
        ("num_sink_tokens", lambda _: -1, "num_sink_tokens must be >= 0, got -1"),
    ],
)
def test_refuses(argument: str, change, message: str) -> None:
    arguments = make(Case(length=20, layout="packed", balls=(4, 8))).arguments() | {
        "max_balls": 8,
        "num_sink_tokens": 3,
    }
    with pytest.raises(ValueError, match=message):
        kernels.tree_plan(**(arguments | {argument: change(arguments[argument])}))


def test_refuses_the_cpu() -> None:
    arguments = {name: tensor.cpu() for name, tensor in make(Case(length=5)).arguments().items()}
    with (
        mock.patch.object(checks, "INTERPRETED", False),
        pytest.raises(RuntimeError, match="tree_plan needs CUDA tensors"),
    ):
        kernels.tree_plan(**arguments, max_balls=8, num_sink_tokens=3)


def test_no_queries() -> None:
    problem = make(Case(length=20))
    none = problem.query_address[..., :0]
    out = run(problem, query_address=none, local_start=problem.reference().local_start[:, :0])
    assert [list(t.shape) for t in out] == [[2, 1, 0]] * 3 + [[2, 1, 20]]
    assert torch.equal(out[3], run(problem)[3])
