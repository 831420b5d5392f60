"""The decode kernels against the fp64 reference, on a GPU or in Triton's interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_kernels import DEVICE, GPU, LAYOUTS, Case, Problem, check, errors, make, nan_in_new_memory, poisoned
from torch import Tensor

from topo_adapter.core.layout import contiguous_layout
from topo_adapter.core.scoring import Scoring
from topo_adapter.hf.cache import Records, pack_records
from topo_kernels import decode
from topo_kernels.decode import decode_attention

HALF = torch.float16
ROUTING = ("mixed", "dense", "tiny", "disjoint", "run")

# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Step:
    """A decode step: a problem of test_kernels.py whose balls come from addresses, the keys' as cache records."""

    problem: Problem
    query_address: Tensor
    balls: Tensor
    records: Records

    @property
    def arguments(self) -> dict[str, Any]:
        case, problem = self.problem.case, self.problem
        return {
            "q": problem.q,
            "k": problem.k,
            "v": problem.v,
            "query_address": self.query_address,
            "query_position": problem.query.position,
            "query_document": problem.query.document,
            "key_address": self.records.address,
            "key_position": self.records.position,
            "key_document": self.records.document,
            "balls": self.balls,
            "local_window": case.window,
            "num_sink_tokens": case.sinks,
            "dense_until": case.dense_until,
            "scoring": problem.scoring,
        }


def addresses(kind: str, batch: int, routes: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key addresses `[B, R, N]`, below `leaves_of(kind)`, and the number of balls `[R]`."""
    query, key = torch.randint(leaves_of(kind), (2, batch, routes, length))
    if kind == "mixed":  # depths differ between the heads, the first is dense
        return query, key, torch.tensor([1, 3, 2, 27, 16, 2187])[torch.arange(routes) % 6]
    if kind == "dense":
        return query, key, torch.ones(routes, dtype=torch.long)
    if kind == "tiny":  # about one key in a ball
        return query % length, key % length, torch.full((routes,), 4096)
    if kind == "disjoint":  # window and sinks alone
        return query // 2 * 2, key // 2 * 2 + 1, torch.full((routes,), 64)
    if kind == "run":  # all keys of the queries' ball lie together
        inside = (torch.arange(length) - length // 3).abs() < max(1, length // 8)
        query, key = query // 9 * 9 % 252, key // 9 * 9 % 252  # a byte holds the sum, too
        return query, torch.where(inside, key, key + 3), torch.full((routes,), 9)
    raise ValueError(f"kind must be a known pattern of addresses, got {kind!r}")


def leaves_of(kind: str) -> int:
    """Records hold addresses as bytes, or as int16."""
    return 4096 if kind in ("mixed", "tiny") else 256


def step(case: Case, routing: str = "mixed", seed: int = 0) -> Step:
    problem = make(case, seed)
    query, key, balls = (t.to(DEVICE) for t in addresses(routing, case.batch, case.routes, case.length))
    visits = query[:, :, None, slice(*case.queries)]
    if case.visits > 1:  # a third of them, the first among them, are nowhere
        more = [addresses(routing, case.batch, case.routes, case.length)[0] for _ in range(case.visits - 1)]
        visits = torch.cat([visits, torch.stack(more, 2).to(DEVICE)[..., slice(*case.queries)]], 2)
        visits = visits.masked_fill(torch.rand(visits.shape).to(DEVICE) < 0.3, -1)
    asked = torch.where(visits < 0, -1, visits % balls[:, None, None])
    problem = replace(problem, query_ball=asked[:, :, 0], more_balls=asked[:, :, 1:] if case.visits > 1 else None)
    problem = replace(problem, key_ball=key % balls[:, None])
    return Step(problem, visits.int(), balls.int(), pack_records(key, problem.key, leaves_of(routing)))


def attend(step: Step, **changes: Any) -> Tensor:
    return decode_attention(**(step.arguments | changes))


@contextmanager
def small_tiles(max_chunks: int = 16) -> Iterator[None]:
    """Many tiles, chunks and splits in short caches."""
    tiles = decode.DecodeTiles(16, 1, 1, 6, map_keys=32, scan_keys=32, scan_warps=1)
    with (
        mock.patch.object(decode, "choose_decode_tiles", lambda *_: tiles),
        mock.patch.object(decode, "_MAX_CHUNKS", max_chunks),
    ):
        yield


# ---------------------------------------------------------------- exactness

ONE = Case(queries=(-1, None), length=300)
CASES = [
    *(replace(ONE, length=n) for n in (1, 2, 63, 64, 65, 257, 700)),
    *(replace(ONE, queries=(-n, None), dtype=dtype) for n in (2, 5) for dtype in (torch.float32, HALF)),
    replace(ONE, queries=(-9, None), batch=1),
    *(
        replace(ONE, layout=layout, queries=(60, 63) if layout == "unfilled" else (-3, None), length=130)
        for layout in LAYOUTS
    ),
    replace(ONE, layout="left_padding", batch=4, length=40),  # whole rows of padding
    *(
        replace(ONE, heads=heads, kv_heads=kv_heads, routes=routes, length=100, batch=1)
        for heads, kv_heads, routes in (
            (1, 1, 1),
            (3, 3, 3),
            (3, 1, 3),
            (3, 1, 1),
            (8, 2, 8),  # a route per query head
            (8, 2, 2),  # per KV head
            (8, 2, 1),  # for all
            (8, 2, 4),  # two query heads share a route
            (8, 1, 8),
            (6, 2, 3),  # the middle route belongs to both KV heads
            (12, 2, 4),
            (20, 1, 20),  # more than a list holds
            (17, 1, 17),
            (34, 34, 34),  # more lists than a program scans
        )
    ),
    replace(ONE, heads=8, kv_heads=2, routes=8, dtype=HALF, queries=(-3, None)),
    *(replace(ONE, dim=dim, length=100, dtype=dtype) for dim in (16, 20, 80, 96) for dtype in (torch.float32, HALF)),
    replace(ONE, dim=256, length=70, dtype=HALF),
    replace(ONE, dim=256, length=70),
    *(replace(ONE, window=window, sinks=sinks) for window in (1, 128) for sinks in (0, 4)),
    replace(ONE, window=1, sinks=70),
    replace(ONE, window=500, sinks=0),
    *(replace(ONE, softcap=cap, length=70, dtype=dtype) for cap in (0.5, 30.0) for dtype in (torch.float32, HALF)),
    *(replace(ONE, visits=m, window=4, queries=(-2, None)) for m in (2, 3, 8)),
    *(
        replace(ONE, visits=3, heads=heads, kv_heads=kv_heads, routes=routes, length=100, window=4, dtype=HALF)
        for heads, kv_heads, routes in ((8, 2, 8), (8, 2, 2), (8, 2, 1), (6, 2, 3), (17, 1, 17))
    ),
    *(replace(ONE, dense_until=n, length=100, queries=(-4, None)) for n in (97, 98, 100, 2**31 - 1)),
    replace(ONE, dense_until=20, layout="left_padding", batch=4, length=40),
    replace(ONE, dense_until=30, layout="packed", length=100, queries=(-9, None), visits=2),
    replace(ONE, visits=5, layout="left_padding", batch=4, length=40),
    replace(ONE, visits=2, layout="unfilled", queries=(60, 63), length=130),
]

_MODEL = Case(heads=32, kv_heads=8, routes=32, dim=128, window=128, batch=1, queries=(-1, None), dtype=torch.bfloat16)
GPU_CASES = [
    *(
        replace(_MODEL, length=n, routes=routes, batch=batch)
        for n in (1, 129, 4097, 32768, 140_001)
        for routes in (32, 8, 1)
        for batch in (1, 3)
        if batch * n < 200_000
    ),
    *(replace(_MODEL, length=20_000, queries=(-n, None)) for n in (2, 7, 16)),
    *(replace(_MODEL, length=3000, layout=layout, batch=2, queries=(1200, 1205)) for layout in LAYOUTS),
    *(
        replace(_MODEL, heads=8, kv_heads=2, routes=8, length=2049, dim=dim, dtype=dtype, batch=2)
        for dim in (16, 20, 64, 80, 96, 128, 256)
        for dtype in (torch.bfloat16, HALF, torch.float32)
    ),
    *(
        replace(_MODEL, heads=heads, kv_heads=kv_heads, routes=routes, length=5000)
        for heads, kv_heads, routes in ((32, 32, 32), (64, 8, 64), (24, 8, 24), (71, 1, 71), (16, 1, 16), (6, 2, 3))
    ),
    *(replace(_MODEL, length=9000, softcap=cap) for cap in (0.5, 30.0)),
    *(replace(_MODEL, length=n, visits=m, batch=2) for n in (129, 32768) for m in (2, 3, 8)),
    *(replace(_MODEL, length=9000, visits=8, routes=routes, queries=(-7, None)) for routes in (32, 8, 1)),
    *(replace(_MODEL, length=3000, layout=layout, batch=2, queries=(1200, 1205), visits=4) for layout in LAYOUTS),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_reference(case: Case) -> None:
    problem = step(case)
    check(problem.problem, attend(problem))


@pytest.mark.parametrize("routing", ROUTING[1:])
@pytest.mark.parametrize("length", [100, 400])
def test_matches_reference_however_keys_are_routed(length: int, routing: str) -> None:
    problem = step(replace(ONE, length=length, heads=4, kv_heads=2, routes=4, queries=(-2, None)), routing)
    check(problem.problem, attend(problem))


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ROUTING)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_matches_reference_on_gpu(case: Case, routing: str) -> None:
    problem = step(case, routing)
    check(problem.problem, attend(problem))


@settings(max_examples=200 if GPU else 8, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 150),
    layout=st.sampled_from(list(LAYOUTS)),
    routing=st.sampled_from(ROUTING),
    heads=st.sampled_from([(2, 1, 2), (2, 1, 1), (2, 2, 2), (3, 1, 3)]),
    window=st.integers(1, 40),
    sinks=st.integers(0, 5),
    queries=st.integers(1, 9 if GPU else 3),
    max_chunks=st.sampled_from([2, 4, 16]),
    visits=st.sampled_from([1, 1, 2, 5]),
    seed=st.integers(0, 999),
)
def test_small_tiles(
    length: int,
    layout: str,
    routing: str,
    heads: tuple[int, int, int],
    window: int,
    sinks: int,
    queries: int,
    max_chunks: int,
    visits: int,
    seed: int,
) -> None:
    """Many chunks or several tiles in a chunk, several splits, lists that end within a tile."""
    case = Case(length, (-queries, None), layout, "random", *heads, 16, window, sinks, batch=1, visits=visits)
    problem = step(case, routing, seed)
    with small_tiles(max_chunks):
        check(problem.problem, attend(problem))


@pytest.mark.parametrize("balls", [1, 2, 3, 5, 7, 243, 2187, 3125, 4096, 32749, 32768])
def test_every_ball(balls: int) -> None:
    """Division by the number of balls is exact: a window of one token leaves only the tree to see keys."""
    length, dim = 300, 16
    low = torch.tensor([0, 1, 2, balls - 1, balls, balls + 1, 2**15 - balls, 2**15 - 1]).clamp(0, 2**15 - 1)
    key = torch.cat([low, torch.randint(2**15, (length - len(low),))])
    query = torch.cat([low, torch.randint(2**15, (4,))])
    key[-4:] = (query[-4:] + balls).clamp(max=2**15 - 1)  # near misses and hits
    count = len(query)
    position = torch.full((1, count), length)  # after all keys
    records = pack_records(key[None, None], contiguous_layout(1, length), 2**15)
    q = torch.zeros(1, 1, count, dim)  # equal weights: the output is the mean of what is seen
    k = torch.zeros(1, 1, length, dim)
    v = torch.randn(1, 1, length, dim)
    out = decode_attention(
        *(t.to(DEVICE) for t in (q, k, v, query[None, None, None].int(), position, torch.zeros_like(position))),
        *(t.to(DEVICE) for t in (records.address, records.position, records.document)),
        torch.tensor([balls], dtype=torch.int32, device=DEVICE),
        Scoring(1.0),
        local_window=1,
        num_sink_tokens=0,
    )
    seen = (query[:, None] % balls == key % balls).double()
    expected = seen @ v[0, 0].double() / seen.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(out[0, 0].double().cpu(), expected, atol=1e-6, rtol=1e-5)


def test_absent_and_repeated_visits_change_no_bit() -> None:
    given = step(replace(ONE, heads=4, kv_heads=2, routes=4, length=100, queries=(-2, None)))
    more = torch.cat([torch.full_like(given.query_address, -1), given.query_address, given.query_address], 2)
    assert torch.equal(attend(given), attend(given, query_address=more))


def test_queries_that_visit_nothing_see_window_and_sinks() -> None:
    given = step(replace(ONE, length=100), "disjoint")
    found = [attend(given, query_address=torch.full_like(given.query_address, -1).repeat(1, 1, m, 1)) for m in (1, 3)]
    assert all(torch.equal(out, attend(given)) for out in found)


# ---------------------------------------------------------------- controls: a wrong step is noticed


@pytest.mark.parametrize(
    "wrong",
    ["window", "sinks", "dense_until", "address", "visit", "nowhere", "balls", "position", "document", "record"],
)
def test_wrong_step_is_noticed(wrong: str) -> None:
    case = replace(ONE, length=100, batch=1, visits=3 if wrong in ("visit", "nowhere") else 1, queries=(-5, None))
    given = step(case, "disjoint" if wrong in ("window", "sinks", "dense_until") else "mixed")
    place = given.records.position.clone()
    place[:, 1] = 0  # a sink is gone
    changes: dict[str, Any] = {
        "window": {"local_window": given.problem.case.window - 1},
        "sinks": {"num_sink_tokens": given.problem.case.sinks - 1},
        "dense_until": {"dense_until": 98},  # the first three of the five queries
        "address": {"query_address": given.query_address + 1},
        "visit": {"query_address": given.query_address[:, :, :1]},
        "nowhere": {"query_address": given.query_address.clamp(min=0)},
        "balls": {"balls": given.balls + 1},
        "position": {"query_position": given.arguments["query_position"] - 1},
        "document": {"query_document": given.arguments["query_document"] + 1},
        "record": {"key_position": place},
    }[wrong]
    found, allowed = errors(given.problem, attend(given, **changes))
    assert found > 3 * allowed


# ---------------------------------------------------------------- memory


def scattered(tensor: Tensor) -> Tensor:
    """The same integers as a strided view into memory full of invalid ones."""
    memory = tensor.new_full([n + 3 for n in tensor.shape], torch.iinfo(tensor.dtype).max)
    view = memory[tuple(slice(1, 1 + n) for n in tensor.shape)]
    return view.copy_(tensor)


@pytest.mark.parametrize(
    "case",
    [
        Case(layout="left_padding", length=70, queries=(-2, None)),
        Case(layout="middle_padding", length=130, dtype=HALF, dim=40, queries=(-2, None)),
        Case(layout="unfilled", length=300, queries=(100, 103), heads=4, kv_heads=2, routes=4, dim=20, visits=3),
    ],
    ids=str,
)
def test_nothing_outside_is_read(case: Case) -> None:
    """Padding and unfilled slots hold NaN and garbage, as does all memory around the arguments and all new memory."""
    given = step(case)
    clean = attend(given)
    problem, padding = given.problem, ~given.problem.key.real
    q = problem.q.masked_fill(~problem.query.real[:, None, :, None], float("nan"))
    k, v = (t.masked_fill(padding[:, None, :, None], float("nan")) for t in (problem.k, problem.v))
    given.records.address.masked_fill_(padding[..., None], 255)
    given.records.document.masked_fill_(padding, 2**30)
    integers = {
        name: scattered(given.arguments[name])
        for name in (
            *("query_address", "query_position", "query_document"),
            *("key_address", "key_position", "key_document", "balls"),
        )
    }
    with nan_in_new_memory():
        out = attend(given, q=poisoned(q), k=poisoned(k), v=poisoned(v), **integers)
    assert torch.equal(out, clean)
    check(problem, out)


def test_unseen_keys_are_not_read() -> None:
    given = step(replace(ONE, heads=4, kv_heads=2, routes=4, length=200, batch=1), "run")
    problem = given.problem
    near = problem.query.position[:, :, None] - problem.key.position[:, None] < problem.case.window
    sink = problem.key.position[:, None] < problem.case.sinks
    seen = (problem.query_ball[..., None] == problem.key_ball[:, :, None]) | (near | sink)[:, None]  # [B, R, T, S]
    seen = seen.unflatten(1, (2, 2)).any(2)[:, :, 0, :, None]
    k, v = (t.masked_fill(~seen, float("nan")) for t in (problem.k, problem.v))
    assert k.isnan().any()
    assert torch.equal(attend(given, k=k, v=v), attend(given))


def test_strides_and_integer_types() -> None:
    given = step(replace(ONE, length=70, queries=(-3, None)))
    clean = attend(given)
    for dims in ((1, 2), (2, 3), (0, 3)):
        views = {name: given.arguments[name].transpose(*dims).contiguous().transpose(*dims) for name in "qkv"}
        assert torch.equal(attend(given, **views), clean)
    flipped = given.records.address.transpose(1, 2).contiguous().transpose(1, 2)
    position, document = (given.arguments[name].int() for name in ("query_position", "query_document"))
    assert torch.equal(attend(given, key_address=flipped, query_position=position, query_document=document), clean)
    assert torch.equal(attend(given, key_address=given.records.address.int()), clean)
    assert clean.transpose(1, 2).is_contiguous()


def test_padding_query_is_zero() -> None:
    given = step(replace(ONE, length=70, queries=(-3, None)))
    position = given.arguments["query_position"].clone()
    position[:, 1] = -1
    out = attend(given, query_position=position)
    assert not out[:, :, 1].any()
    assert torch.equal(out[:, :, ::2], attend(given)[:, :, ::2])


@pytest.mark.parametrize("length", [pytest.param(20_000, marks=pytest.mark.gpu), 300])
def test_repeats_are_bitwise_equal(length: int) -> None:
    given = step(replace(ONE, length=length, heads=8, kv_heads=2, routes=8, dtype=HALF))
    first = attend(given)
    for _ in range(250 if GPU else 2):
        assert torch.equal(attend(given), first)


def test_no_dependence_on_unfilled_slots() -> None:
    """A static cache gives what the same tokens give without it."""
    case = replace(ONE, length=100)
    given = step(case)
    problem = given.problem

    def longer(tensor: Tensor, dim: int, value: float) -> Tensor:
        shape = list(tensor.shape)
        shape[dim] = 333
        return torch.cat([tensor, tensor.new_full(shape, value)], dim)

    k, v = (longer(t, 2, float("nan")) for t in (problem.k, problem.v))
    records = Records(longer(given.records.words, 1, 0), case.routes, 4096)
    keys = {"key_address": records.address, "key_position": records.position, "key_document": records.document}
    check(problem, attend(given, k=k, v=v, **keys))


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    given = step(Case(length=33_000, queries=(-2, None), heads=1, kv_heads=1, routes=1, dim=16, batch=1, dtype=HALF))
    rows = torch.empty(33_000, 2**16, dtype=HALF, device=DEVICE)  # 2^31 elements and more
    k, v = (rows[None, None, :, i : i + 16].copy_(t) for i, t in ((0, given.problem.k), (16, given.problem.v)))
    check(given.problem, attend(given, k=k, v=v))


# ---------------------------------------------------------------- graphs


@pytest.mark.parametrize("visits", [1, 3])
def test_custom_op(visits: int) -> None:
    given = step(replace(ONE, length=40, queries=(-2, None), visits=visits))
    *arguments, scoring = given.arguments.values()
    arguments += [scoring.scale, scoring.softcap]
    torch.library.opcheck(decode._decode, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("dense_until", [0, 2001])
@pytest.mark.parametrize("visits", [1, 8])
def test_cuda_graph(visits: int, dense_until: int) -> None:
    """The replay follows what the graph's tensors hold: the cache has grown by a token."""
    case = replace(_MODEL, length=5000, layout="unfilled", visits=visits, dense_until=dense_until)
    given, later = (step(replace(case, queries=(at, at + 1))) for at in (2000, 2001))
    attend(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(given)
    graph.replay()
    check(given.problem, out)
    for name in ("q", "query_address", "query_position", "query_document"):
        given.arguments[name].copy_(later.arguments[name])
    graph.replay()
    assert torch.equal(out, attend(given))
    check(replace(later.problem, q=given.problem.q), out)


@pytest.mark.parametrize("visits", [1, 3])
def test_compiles_without_a_break(visits: int) -> None:
    given = step(replace(ONE, length=40, visits=visits))
    compiled = torch.compile(decode_attention, fullgraph=True, backend="inductor" if GPU else "eager")
    assert torch.equal(compiled(**given.arguments), attend(given))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("q", lambda t: t[0], r"q must have shape \[B, heads, length, D\], got \(2, 1, 32\)"),
        ("q", lambda t: t.double(), "q must be float16, bfloat16 or float32, got torch.float64"),
        ("k", lambda t: t.repeat(1, 3, 1, 1), "multiple of k's heads, got 2 query heads and 3 key heads"),
        ("k", lambda t: t.half(), "k must have q's dtype torch.float32, got torch.float16"),
        ("k", lambda t: t[..., :16], r"k must have shape \[B=2, H_kv, S, D=32\]"),
        ("k", lambda t: t[:, :, :1].expand(-1, -1, 2**25, -1), "v must have the shape of k"),
        ("v", lambda t: t[:, :, 1:], "v must have the shape of k"),
        ("v", lambda t: t.to("meta"), "v must be on q's device"),
        ("query_address", lambda t: t[:, :1], r"query_address must have shape \[2, 2, 1, 1\], got \[2, 1, 1, 1\]"),
        (
            "query_address",
            lambda t: t[:, :, 0],
            r"query_address must have shape \[B, R, m, T\] with m from 1 to 8, got",
        ),
        ("query_address", lambda t: t.long(), "query_address must be int32, got torch.int64"),
        ("query_position", lambda t: t[:1], r"query_position must have shape \[2, 1\]"),
        ("query_position", lambda t: t.float(), "query_position must be int32 or int64, got torch.float32"),
        ("key_address", lambda t: t[:, 1:], r"key_address must have shape \[2, 20, 2\], got \[2, 19, 2\]"),
        ("key_address", lambda t: t.long(), "key_address must be uint8 or int16 or int32, got torch.int64"),
        ("key_position", lambda t: t[:, 1:], r"key_position must have shape \[2, 20\], got \[2, 19\]"),
        ("key_document", lambda t: t.long(), "key_document must be int32, got torch.int64"),
        ("balls", lambda t: t.repeat(3), r"balls must have shape \[R\] with R a divisor of q's 2 heads, got \(6,\)"),
        ("local_window", lambda n: 0, "local_window must be >= 1, got 0"),
        ("dense_until", lambda n: -1, "dense_until must be >= 0 and < 2"),
        ("num_sink_tokens", lambda n: -1, "num_sink_tokens must be >= 0, got -1"),
        ("scoring", lambda _: Scoring(1.0, 0.0), "softcap must be None or > 0, got 0.0"),
        ("scoring", lambda _: Scoring(0.0, None), "scale must be > 0, got 0.0"),
    ],
)
def test_refuses(argument: str, change: Any, message: str) -> None:
    given = step(replace(ONE, length=20))
    with pytest.raises(ValueError, match=message):
        attend(given, **{argument: change(given.arguments[argument])})


def test_refuses_wide_heads_and_long_caches() -> None:
    with pytest.raises(ValueError, match="from 16 to 256, got 257"):
        attend(step(replace(ONE, length=2, dim=257)))
    given = step(replace(ONE, length=1))
    length = decode._MAX_KEYS + 1
    k = given.problem.k.expand(-1, -1, length, -1)
    with pytest.raises(ValueError, match=f"at most {decode._MAX_KEYS} keys, got {length}"):
        attend(given, k=k, v=k)


def test_refuses_gradients() -> None:
    given = step(replace(ONE, length=5))
    q = given.problem.q.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="forward only"):
        attend(given, q=q)
    with torch.no_grad():
        attend(given, q=q)


@pytest.mark.skipif(GPU, reason="the interpreter's limit")
def test_interpreter_refuses_bfloat16() -> None:
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"):
        attend(step(replace(ONE, length=5, dtype=torch.bfloat16)))


def test_no_queries_and_no_keys() -> None:
    given = step(replace(ONE, length=5))
    none = {"q": given.problem.q[:, :, :0], "query_address": given.query_address[..., :0]}
    none |= {name: given.arguments[name][:, :0] for name in ("query_position", "query_document")}
    assert attend(given, **none).shape == (2, 2, 0, 32)
    empty = {"k": given.problem.k[:, :, :0], "v": given.problem.v[:, :, :0]}
    empty |= {name: given.arguments[name][:, :0] for name in ("key_address", "key_position", "key_document")}
    assert not attend(given, **empty).any()
