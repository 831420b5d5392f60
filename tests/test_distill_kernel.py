"""Distillation's far values against fp64: `kept_mass` by its formula, and autograd; on a GPU or interpreted."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_kernels import DEVICE, GPU, HALF, LAYOUTS, guarded, nan_in_new_memory, poisoned
from torch import Tensor

from topo_adapter.layout import SequenceLayout, causal_pairs
from topo_adapter.objective import kept_mass
from topo_adapter.plan import build_plan
from topo_adapter.relaxation import leaf_distributions, scaled_scores
from topo_adapter.visibility import always_visible
from topo_kernels import distill
from topo_kernels.attention import Blocks
from topo_kernels.distill import FarTiles, far_values

# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    length: int = 100
    sample: int | None = None  # how many queries are asked for
    layout: str = "plain"
    heads: int = 2
    kv_heads: int = 1
    dim: int = 32
    leaves: int = 16
    window: int = 16
    sinks: int = 4
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    batch: int = 2
    identity: bool = False  # no order is given

    def __str__(self) -> str:
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{name}={value}".replace("torch.", "") for name, value in changed) or "default"


@dataclass(frozen=True)
class Problem:
    """A case made concrete; `rows` are the queries asked for, ascending."""

    case: Case
    q: Tensor  # [B, H, M, D], of these queries
    k: Tensor
    leaves: Tensor  # [B, H, N, V] fp32
    grad: Tensor  # [B, H, M, V] fp32, of the values
    query: SequenceLayout
    key: SequenceLayout

    @property
    def scale(self) -> float:
        return self.case.dim**-0.5

    def ranges(self) -> dict[str, Tensor | None]:
        """The plan's local part for these queries."""
        ball = torch.zeros_like(self.key.position)[:, None], torch.zeros_like(self.query.position)[:, None]
        plan = build_plan(ball[1], ball[0], self.query, self.key, self.case.window, self.case.sinks)
        names = ("local_order", "document_start", "local_start", "local_end")
        ranges: dict[str, Tensor | None] = {name: getattr(plan, name) for name in names}
        return ranges | {"local_order": None} if self.case.identity else ranges


def make(case: Case, seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    key = LAYOUTS[case.layout](case.batch, case.length)
    key = SequenceLayout(key.document.to(DEVICE), key.position.to(DEVICE))
    rows = torch.randperm(case.length)[: case.sample].sort().values.to(DEVICE)
    query = SequenceLayout(key.document[:, rows], key.position[:, rows])

    def normal(heads: int, length: int, width: int) -> Tensor:
        return 2 * torch.randn(case.batch, heads, length, width).to(DEVICE)

    return Problem(
        case,
        normal(case.heads, rows.numel(), case.dim).to(case.dtype),
        normal(case.kv_heads, case.length, case.dim).to(case.dtype),
        normal(case.heads, case.length, case.leaves).softmax(-1),
        normal(case.heads, rows.numel(), case.leaves),
        query,
        key,
    )


# ---------------------------------------------------------------- running and comparing


@contextmanager
def tile(size: int) -> Iterator[None]:
    blocks = Blocks(size, size, 4, 2)
    with mock.patch.object(distill, "choose_far_tiles", lambda *_: FarTiles(blocks, blocks)):
        yield


def run(problem: Problem, tile_size: int | None = None, **tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Values, local mass and the leaves' gradient; the interpreter takes large tiles, because it pays per tile."""
    size = tile_size or (None if GPU else 64)
    grad = tensors.pop("grad", problem.grad)
    arguments: dict = {"q": problem.q, "k": problem.k, "key_leaves": problem.leaves} | problem.ranges() | tensors
    arguments["key_leaves"] = arguments["key_leaves"].detach().requires_grad_()
    with nullcontext() if size is None else tile(size):
        values, local = far_values(
            **arguments, num_sink_tokens=problem.case.sinks, scale=problem.scale, softcap=problem.case.softcap
        )
        (dleaves,) = torch.autograd.grad(values, arguments["key_leaves"], grad)
    assert not local.requires_grad
    return values.detach(), local, dleaves


def formula(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the definition, with tensors of `dtype`; scores in float32 at least, as `kept_mass` has them."""
    case = problem.case
    scores = scaled_scores(problem.q.to(dtype), problem.k.to(dtype), problem.scale, case.softcap)
    causal = causal_pairs(problem.query, problem.key)[:, None]
    near = always_visible(problem.query, problem.key, case.window, case.sinks)[:, None]
    empty = ~causal.any(-1, keepdim=True)
    attention = scores.masked_fill(~causal, float("-inf")).masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    local = attention.masked_fill(~near, 0.0).sum(-1)
    far = attention.masked_fill(near, 0.0).to(dtype)
    leaves = problem.leaves.to(dtype).requires_grad_()
    values = far @ leaves
    values.backward(problem.grad.to(dtype))
    return values.detach(), local, leaves.grad


def check(problem: Problem, found: tuple[Tensor, ...]) -> None:
    """Values and local mass within twice, gradients within three times the error of the same formula in q's dtype.

    bfloat16 on the way back also where q is float16: `excess` is taken over that formula then.
    """
    exact = formula(problem, torch.float64)
    names = ("values", "local", "dleaves")
    for name, got, right in zip(names, found, exact, strict=True):
        dtype = problem.case.dtype
        if name == "dleaves" and dtype == HALF and GPU:
            dtype = torch.bfloat16
        same = dict(zip(names, formula(problem, dtype), strict=True))[name]
        assert got.dtype == torch.float32 and got.shape == right.shape and got.isfinite().all()
        floor = 8 * torch.finfo(torch.float32).eps * float(right.abs().max())
        factor = 3 if name == "dleaves" or dtype == torch.float32 else 2
        allowed = factor * float((same - right).abs().max()) + floor
        error = float((got - right).abs().max())
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


CASES = [
    *(Case(length=n) for n in (1, 7, 128, 129, 200)),
    *(Case(length=n, dtype=HALF) for n in (1, 129)),
    *(Case(length=n, dtype=dtype, identity=True) for n in (1, 129, 200) for dtype in (torch.float32, HALF)),
    *(Case(layout=layout, sample=sample) for layout in LAYOUTS if layout != "plain" for sample in (None, 13)),
    *(Case(layout=layout, dtype=HALF, length=90) for layout in ("middle_padding", "packed")),
    *(Case(sample=n, length=150, identity=identity) for n in (1, 40) for identity in (False, True)),
    Case(layout="left_padding", batch=4, length=40),  # whole rows of padding
    *(Case(heads=heads, kv_heads=kv_heads, length=70) for heads, kv_heads in ((6, 6), (6, 2), (4, 1))),
    *(Case(dim=dim, leaves=leaves, length=70) for dim, leaves in ((20, 2), (64, 27), (32, 81), (16, 128))),
    Case(dim=40, leaves=81, length=70, dtype=HALF, layout="packed"),
    *(Case(window=window, sinks=sinks, identity=True) for window in (1, 128) for sinks in (0, 4, 70)),
    *(Case(softcap=cap, length=70, dtype=dtype) for cap in (0.5, 30.0) for dtype in (torch.float32, HALF)),
]
_MODEL = Case(heads=8, kv_heads=2, dim=128, leaves=128, window=128, batch=1, dtype=torch.bfloat16, identity=True)
GPU_CASES = [
    *(replace(_MODEL, length=n) for n in (1, 63, 129, 1000, 1025, 2049, 4096, 4097)),
    *(replace(_MODEL, length=3001, sample=n) for n in (1, 100, 256)),
    *(replace(_MODEL, length=1025, dtype=dtype) for dtype in (HALF, torch.float32)),
    *(
        replace(_MODEL, length=1500, layout=layout, sample=sample, identity=False, batch=3, dtype=dtype)
        for layout in LAYOUTS
        for sample in (None, 200)
        for dtype in (torch.bfloat16, torch.float32)
    ),
    *(replace(_MODEL, length=700, leaves=n, dim=d) for n in (2, 81, 128, 256) for d in (16, 64, 80, 128, 256)),
    *(replace(_MODEL, length=300, leaves=256, dim=256, dtype=dtype) for dtype in (HALF, torch.float32)),
    *(replace(_MODEL, length=1025, window=window, sinks=sinks) for window in (1, 64) for sinks in (0, 300)),
    *(replace(_MODEL, length=1025, softcap=cap) for cap in (0.5, 30.0)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_far_values(case: Case) -> None:
    problem = make(case)
    check(problem, run(problem))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_far_values_on_gpu(case: Case) -> None:
    problem = make(case)
    check(problem, run(problem))


@settings(max_examples=200 if GPU else 25, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 70),
    sample=st.integers(1, 70),
    layout=st.sampled_from(list(LAYOUTS)),
    window=st.integers(1, 40),
    sinks=st.integers(0, 20),
    seed=st.integers(0, 999),
)
def test_small_tiles(length: int, sample: int, layout: str, window: int, sinks: int, seed: int) -> None:
    """Tiles of 16 put masked and whole tiles in many arrangements into short sequences."""
    case = Case(length, sample, layout, 2, 1, 16, 8, window, sinks, batch=1, identity=layout == "plain")
    problem = make(case, seed)
    check(problem, run(problem, tile_size=16))


@pytest.mark.parametrize("layout", ["plain", "packed", "left_padding"])
def test_kept_mass_at_every_depth(layout: str) -> None:
    """One call serves all depths, and a local mass near 1 leaves the small rest exact."""
    problem = make(Case(layout=layout, leaves=16, length=60, sinks=2, window=4))
    case = problem.case
    q = problem.q * 6  # sharp
    torch.manual_seed(1)
    probs = torch.softmax(torch.randn(2, case.batch, case.heads, case.length, 4, 2), -1).to(DEVICE)
    query_leaves, key_leaves = (leaf_distributions(p, 4)[1:] for p in probs)
    values, local, _ = run(problem, q=q, key_leaves=key_leaves[-1])
    kept = torch.stack([local + (p * values.unflatten(-1, (-1, p.shape[-1])).sum(-2)).sum(-1) for p in query_leaves])
    rows = torch.arange(case.length, device=DEVICE)
    options = {"local_window": case.window, "num_sink_tokens": case.sinks, "scale": problem.scale}
    exact = kept_mass(q.double(), problem.k.double(), query_leaves, key_leaves[-1], problem.key, rows, **options)
    real = problem.key.real[:, None].expand_as(local)
    assert float((kept - exact)[:, real].abs().max()) < 1e-5
    relative = run(problem, q=q, key_leaves=torch.ones_like(key_leaves[-1]))[0][..., 0]
    far = formula(replace(problem, q=q, leaves=torch.ones_like(problem.leaves)), torch.float64)[0][..., 0]
    tiny = (far > 1e-30) & (far < 1e-6)
    assert tiny.any() and float((relative / far - 1)[tiny].abs().max()) < 1e-4


@pytest.mark.parametrize("wrong", ["window", "sinks", "order", "leaves"])
def test_wrong_input_is_noticed(wrong: str) -> None:
    problem = make(Case(length=130))
    ranges, leaves = problem.ranges(), problem.leaves.clone()
    if wrong == "window":
        ranges["local_start"] = ranges["local_start"] + 1
    elif wrong == "sinks":
        ranges["document_start"] = (ranges["document_start"] + 1).minimum(ranges["local_start"])
    elif wrong == "order":
        ranges["local_order"] = ranges["local_order"].roll(1, 1)
    else:
        leaves[0, 1, 40] = 1 - leaves[0, 1, 40]
    with pytest.raises(AssertionError, match="error"):
        check(problem, run(problem, **(ranges | {"key_leaves": leaves})))


@pytest.mark.parametrize(
    "case",
    [
        Case(layout="left_padding", length=70),
        Case(layout="middle_padding", length=130, dtype=HALF, dim=40, sample=60),
        Case(layout="packed", length=131, leaves=9),
        Case(length=131, leaves=9, identity=True, sample=30),
    ],
    ids=str,
)
def test_nothing_outside_is_read(case: Case) -> None:
    problem = make(case)
    clean = run(problem)
    real, real_key = problem.query.real[:, None, :, None], problem.key.real[:, None, :, None]
    q = poisoned(problem.q.masked_fill(~real, float("nan")))
    k = poisoned(problem.k.masked_fill(~real_key, float("nan")))
    leaves = problem.leaves.masked_fill(~real_key, float("nan"))
    grad = problem.grad.masked_fill(~real, float("nan"))
    ranges = {name: None if t is None else guarded(t) for name, t in problem.ranges().items()}
    with nan_in_new_memory():
        found = run(problem, q=q, k=k, key_leaves=leaves, grad=grad, **ranges)
    for got, right in zip(found, clean, strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("length", [pytest.param(4099, marks=pytest.mark.gpu), 70])
def test_repeats_are_bitwise_equal(length: int) -> None:
    problem = make(Case(length=length, layout="packed", dim=64, dtype=HALF))
    first = run(problem)
    for _ in range(250 if GPU else 2):
        for got, right in zip(run(problem), first, strict=True):
            assert torch.equal(got, right)


def test_no_gradient_to_queries_and_keys() -> None:
    problem = make(Case(length=20))
    q, k, leaves = (t.clone().requires_grad_() for t in (problem.q, problem.k, problem.leaves))
    with tile(64):
        values, _ = far_values(q, k, leaves, **problem.ranges(), num_sink_tokens=4, scale=1.0)
    values.sum().backward()
    assert q.grad is None and k.grad is None and leaves.grad is not None


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("q", lambda t: t[0], "q must have four dimensions"),
        ("q", lambda t: t.double(), "q must be float16, bfloat16 or float32, got torch.float64"),
        ("k", lambda t: t.half(), "k must have q's dtype"),
        ("k", lambda t: t.repeat(1, 3, 1, 1), "divisor of q's 2 heads"),
        ("key_leaves", lambda t: t[:, :, 1:], "key_leaves must have shape"),
        ("key_leaves", lambda t: t.repeat(1, 1, 1, 17), "V up to 256"),
        ("key_leaves", lambda t: t.long(), "key_leaves must be floating point"),
        ("local_order", lambda t: t.long(), "local_order must be int32"),
        ("local_end", lambda t: t[:, 1:], r"local_end must be int32 of shape \[2, 20\]"),
        ("num_sink_tokens", lambda n: -1, "num_sink_tokens must be >= 0, got -1"),
        ("scale", lambda _: 0.0, "scale must be > 0, got 0.0"),
        ("softcap", lambda _: 0.0, "softcap must be None or > 0, got 0.0"),
    ],
)
def test_refuses(argument: str, change, message: str) -> None:
    problem = make(Case(length=20))
    arguments: dict = {"q": problem.q, "k": problem.k, "key_leaves": problem.leaves} | problem.ranges()
    arguments |= {"num_sink_tokens": 4, "scale": 1.0, "softcap": None}
    with pytest.raises(ValueError, match=message):
        far_values(**(arguments | {argument: change(arguments[argument])}))


def test_operator() -> None:
    """Fake implementation and autograd registration."""
    problem = make(Case(length=20))
    leaves = problem.leaves.clone().requires_grad_()
    arguments = (problem.q, problem.k, leaves, *problem.ranges().values(), 4, 1.0, None)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    with tile(64):
        torch.library.opcheck(distill._far_values, arguments, test_utils=tests)
