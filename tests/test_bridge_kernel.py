"""The bridge's kernels against fp64 autograd of the definition, `bridged_attention`; on a GPU or interpreted."""

import gc
import math
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any
from unittest import mock

import helpers
import hypothesis.strategies as st
import pytest
import torch
from helpers import bridged, bridged_and_far_pairs, make_problem, widened, without_repeats
from hypothesis import given, settings
from peft import get_peft_model
from test_kernels import DEVICE, GPU, HALF, LAYOUTS, guarded, nan_in_new_memory, poisoned, whole
from test_leaves_kernel import visited
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import topo_kernels
import topo_kernels.leaves
from topo_adapter import TopologyConfig, initialize_routers
from topo_adapter.core.layout import SequenceLayout, causal_pairs
from topo_adapter.core.records import Keys
from topo_adapter.core.rule import Rule
from topo_adapter.core.scoring import Scoring
from topo_adapter.core.tree import digits_to_address
from topo_adapter.core.visibility import Visibility, always_visible, visible_pairs
from topo_adapter.ops.backend import forced
from topo_adapter.ops.plan import build_plan
from topo_adapter.ops.relaxation import _MAX_GAP, bridged_attention, leaf_distribution
from topo_adapter.ops.router import RoleDigits, Routes
from topo_kernels import LocalTensors, backward, bridge, bridged_topology_attention, launch, topology_attention
from topo_kernels.attention import ForwardTiles
from topo_kernels.backward import BackwardTiles
from topo_kernels.bridge import BridgeTiles
from topo_kernels.launch import Tile
from topo_kernels.leaves import Rows

MAX_GAP = _MAX_GAP

# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    length: int = 100
    layout: str = "plain"
    heads: int = 2
    kv_heads: int = 1
    dim: int = 32
    leaves: int = 16
    window: int = 16
    sinks: int = 4
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    sharp: float = 1.0  # factor on the queries
    one_hot: bool = False
    batch: int = 2
    identity: bool = False  # no order is given
    masked: bool = False  # only visible pairs pass the attention's gradient
    visits: tuple[int, ...] | None = None  # of the heads

    @property
    def tree(self) -> tuple[int, int]:
        """Arity and levels."""
        arity = next(p for p in (2, 3, 5, 7) if self.leaves % p == 0)
        return arity, round(math.log(self.leaves, arity))

    def __str__(self) -> str:
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{name}={value}".replace("torch.", "") for name, value in changed) or "default"


@dataclass(frozen=True)
class Problem:
    """A case made concrete: every leaf is a ball."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dpairs: Tensor  # [H] fp32
    query_probs: Tensor  # [B, H, N, L, p] fp32
    key_probs: Tensor
    query_ball: Tensor  # [B, H, N]
    key_ball: Tensor
    layout: SequenceLayout
    more_balls: Tensor | None = None  # [B, H, most visits - 1, N], -1 where a head has no more

    @property
    def query_balls(self) -> Tensor:
        """`[B, H, most visits, N]`."""
        first = self.query_ball[:, :, None]
        return first if self.more_balls is None else without_repeats(torch.cat([first, self.more_balls], 2))

    @property
    def options(self) -> dict[str, Any]:
        return {"scale": self.case.dim**-0.5, "softcap": self.case.softcap}

    @property
    def visits(self) -> Tensor | None:
        visits = self.case.visits
        return None if visits is None else torch.tensor(visits, dtype=torch.int32, device=DEVICE)

    @property
    def balls(self) -> tuple[Tensor, Tensor] | None:
        if not self.case.masked:
            return None
        return (self.query_ball if self.more_balls is None else self.query_balls).int(), self.key_ball.int()

    def plan(self) -> dict[str, Any]:
        case = self.case
        made = build_plan(self.query_balls, self.key_ball, self.layout, self.layout, case.window, case.sinks)
        found = {f.name: getattr(made, f.name) for f in fields(made) if f.name != "dense"}
        return found | {"local_order": None} if case.identity else found


def make(case: Case, seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    arity, levels = case.tree
    layout = LAYOUTS[case.layout](case.batch, case.length)
    layout = SequenceLayout(layout.document.to(DEVICE), layout.position.to(DEVICE))

    def normal(heads: int, width: int) -> Tensor:
        return torch.randn(case.batch, heads, case.length, width).to(DEVICE)

    heads = [normal(h, case.dim) for h in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    heads[0] *= case.sharp
    probs = [(2 * normal(case.heads, levels * arity).unflatten(-1, (levels, arity))).softmax(-1) for _ in range(2)]
    balls = [digits_to_address(p.argmax(-1), arity) for p in probs]
    if case.one_hot:
        probs = [torch.nn.functional.one_hot(p.argmax(-1), arity).float() for p in probs]
    dpairs = torch.randn(case.heads).to(DEVICE) / case.length
    more = None
    if case.visits is not None and max(case.visits) > 1:
        more = torch.randint(case.leaves, (case.batch, case.heads, max(case.visits) - 1, case.length))
        visit = torch.arange(1, max(case.visits))[:, None]
        has = visit < torch.tensor(case.visits)[:, None, None]
        more = more.masked_fill(~has | (torch.rand(more.shape) < 0.2), -1).to(DEVICE)
    return Problem(case, *(t.to(case.dtype) for t in heads), dpairs, *probs, *balls, layout, more)


# ---------------------------------------------------------------- running and comparing


@contextmanager
def tile(size: int) -> Iterator[None]:
    """Tiles of the bridge, and large ones of the attention's kernels: the interpreter pays per tile."""
    square = Tile(64, 64, 4, 2)
    backwards = BackwardTiles(square, square, Tile(64, 16, 4, 2), 64)
    bridges = BridgeTiles(*[Tile(size, size, 4, 2)] * 2)
    with ExitStack() as stack:
        for module, name, tiles in (
            (topo_kernels.attention, "choose_forward_tiles", ForwardTiles(square, square)),
            (backward, "choose_backward_tiles", backwards),
            (bridge, "choose_bridge_tiles", bridges),
        ):
            stack.enter_context(mock.patch.object(module, name, lambda *_, tiles=tiles: tiles))
        if not GPU:
            stack.enter_context(mock.patch.object(topo_kernels.leaves, "choose_rows", lambda _: Rows(64, 2)))
        yield


def run(problem: Problem, tile_size: int | None = None, **changed: Any) -> tuple[Tensor, ...]:
    """`out`, `far_pairs`, `dquery_probs`, `dkey_probs`; q, k and v are frozen, which skips their backward kernels."""
    size = tile_size or (None if GPU else 64)
    dout, dpairs = changed.pop("dout", problem.dout), changed.pop("dpairs", problem.dpairs)
    arguments = {name: getattr(problem, name) for name in ("q", "k", "v", "query_probs", "key_probs")}
    arguments |= problem.plan() | problem.options | {"max_gap": MAX_GAP, "balls": problem.balls}
    arguments |= {"visits": problem.visits} | changed
    probs = [arguments[name].detach().requires_grad_() for name in ("query_probs", "key_probs")]
    arguments |= dict(zip(("query_probs", "key_probs"), probs, strict=True))
    with ExitStack() as stack:
        if size is not None:
            stack.enter_context(tile(size))
        out, far_pairs = bridged_topology_attention(**whole(arguments))
        gradients = torch.autograd.grad((out, far_pairs), probs, (dout, dpairs))
    return out.detach(), far_pairs.detach(), *gradients


def definition(problem: Problem) -> dict[str, Tensor]:
    """Autograd of `bridged_attention` in fp64."""
    if len(set(problem.case.visits or (1,))) == 1:
        return definition_of_visits(problem, (problem.case.visits or (1,))[0])
    assert problem.case.visits is not None  # heads have nothing in common but k and v
    found = {m: definition_of_visits(problem, m) for m in set(problem.case.visits)}
    chosen = list(enumerate(problem.case.visits))
    names = {"out": 1, "far_pairs": 0, "query_probs": 1, "key_probs": 1}
    return {name: torch.stack([found[m][name].select(dim, h) for h, m in chosen], dim) for name, dim in names.items()}


def definition_of_visits(problem: Problem, visits: int) -> dict[str, Tensor]:
    """The same where all heads have as many visits."""
    case = problem.case
    names = ("q", "k", "v", "query_probs", "key_probs")
    q, k, v, query, key = inputs = [getattr(problem, name).detach().double().requires_grad_() for name in names]
    arity, levels = case.tree
    routes = Routes(*(RoleDigits(probs, probs.argmax(-1)) for probs in (query, key)))
    out, far_pairs = bridged_attention(
        q,
        k,
        v,
        routes,
        Visibility(
            problem.query_balls[:, :, :visits],
            problem.layout,
            Keys(problem.key_ball, problem.layout),
            Rule(
                arity,
                levels,
                (levels,) * case.heads,
                problem.query_ball.shape[1],
                case.window,
                case.sinks,
                (visits,) * case.heads,
            ),
        ),
        Scoring(**problem.options),
        homotopy=1.0,
        bridge="masked" if case.masked else "full",
    )
    upstream = problem.dout.double(), problem.dpairs.double()
    gradients = torch.autograd.grad((out, far_pairs), inputs, upstream)
    return {"out": out.detach(), "far_pairs": far_pairs.detach()} | dict(zip(names, gradients, strict=True))


def rounded(problem: Problem) -> dict[str, Tensor]:
    """The gradients by the formula, rounding in q's dtype the weights and `out`, then `dS` and the leaves."""
    case, layout = problem.case, problem.layout
    probs = [p.detach().requires_grad_() for p in (problem.query_probs, problem.key_probs)]
    leaves = [leaf_distribution(p, case.tree[1]) for p in probs]
    leaves[0] = visited(leaves[0], case.visits)
    bfloat = torch.bfloat16 if GPU and case.dtype != torch.float32 else torch.float32
    far = (causal_pairs(layout, layout) & ~always_visible(layout, layout, case.window, case.sinks))[:, None]
    found: dict[str, list[Tensor]] = {"query_probs": [], "key_probs": []}
    for h in range(case.heads):
        g = h * case.kv_heads // case.heads
        q, k, v, dout = (
            t[:, i].float() for t, i in ((problem.q, h), (problem.k, g), (problem.v, g), (problem.dout, h))
        )
        balls = problem.query_balls[:, h : h + 1], problem.key_ball[:, h : h + 1]
        visible = visible_pairs(*balls, layout, layout, case.window, case.sinks)[:, 0]
        scores = q @ k.transpose(1, 2) * problem.options["scale"]
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        seen = scores.masked_fill(~visible, float("-inf"))
        lse = seen.logsumexp(-1, keepdim=True).masked_fill(~visible.any(-1, keepdim=True), 0.0)
        out = ((seen - lse).exp().to(case.dtype).float() @ v).to(case.dtype).float()
        gap = (scores - lse).clamp(max=MAX_GAP)
        ds = gap.exp() * (dout @ v.transpose(1, 2) - (out * dout).sum(-1, keepdim=True))
        ds = (ds.masked_fill(~visible, 0.0) if case.masked else ds) + problem.dpairs[h]
        ds = ds.masked_fill(~far[:, 0], 0.0).to(bfloat).float()
        query, key = (t[:, h].detach().to(bfloat).float() for t in leaves)
        found["query_probs"].append(ds @ key)
        found["key_probs"].append(ds.transpose(1, 2) @ query)
    gradients = torch.autograd.grad(leaves, probs, [torch.stack(heads, 1) for heads in found.values()])
    return dict(zip(found, gradients, strict=True))


def check(problem: Problem, found: tuple[Tensor, ...]) -> None:
    """Within three times the error of the formula with the same roundings, plus rounding in float32.

    Five times in half precision, where the kernels round partial outputs too. In float32 they round scores once more,
    to base 2, and a GPU's exp2 is good to 2 ulp.
    """
    exact, same = definition(problem), rounded(problem)
    real = problem.layout.real[:, None, :, None, None]
    for name, got in zip(("query_probs", "key_probs"), found[2:], strict=True):
        right = exact[name]
        assert got.dtype == torch.float32 and got.shape == right.shape and got.isfinite().all()
        assert not got.masked_fill(real, 0.0).any(), "padding must get exactly 0"
        floor = 16 * torch.finfo(torch.float32).eps * float(right.abs().max())
        factor = 3 if problem.case.dtype == torch.float32 else 5
        allowed = factor * float((same[name] - right).abs().max()) + floor
        error = float((got - right).abs().max())
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
    assert torch.equal(found[1].double(), exact["far_pairs"]), "error in far_pairs"


CASES = [
    *(Case(length=n) for n in (1, 7, 64, 129)),
    Case(length=200, batch=1),
    Case(length=129, dtype=HALF),
    *(Case(length=n, dtype=dtype, identity=True) for n in (21, 129) for dtype in (torch.float32, HALF)),
    *(Case(layout=layout) for layout in LAYOUTS if layout != "plain"),
    *(Case(layout=layout, dtype=HALF, length=90) for layout in ("middle_padding", "packed")),
    Case(layout="left_padding", batch=4, length=40),  # whole rows of padding
    *(Case(heads=heads, kv_heads=kv_heads, length=70, batch=1) for heads, kv_heads in ((3, 3), (6, 2))),
    *(Case(dim=dim, leaves=leaves, length=70, batch=1) for dim, leaves in ((20, 2), (64, 27), (32, 81), (16, 256))),
    Case(dim=40, leaves=81, length=70, dtype=HALF, layout="packed"),
    *(Case(window=window, sinks=sinks, identity=True, batch=1) for window in (1, 128) for sinks in (0, 4, 70)),
    *(Case(softcap=cap, length=70, dtype=dtype, batch=1) for cap in (0.5, 30.0) for dtype in (torch.float32, HALF)),
    *(Case(length=70, one_hot=True, layout=layout) for layout in ("plain", "packed")),
    *(Case(length=70, sharp=12.0, dtype=dtype, window=4, sinks=1, batch=1) for dtype in (torch.float32, HALF)),
    *(Case(length=n, masked=True, identity=True, leaves=4, batch=1) for n in (1, 70, 129)),
    *(Case(length=90, masked=True, layout=layout, heads=4, kv_heads=2, leaves=3) for layout in LAYOUTS),
    *(Case(length=70, masked=True, sharp=12.0, dtype=HALF, leaves=81, window=4, layout=x) for x in ("plain", "packed")),
]
VISITS = [
    Case(length=60, window=4, leaves=8, batch=1, identity=True, visits=(1, 2)),
    Case(length=60, window=4, leaves=9, layout="packed", dtype=HALF, batch=1, visits=(3, 8)),
    Case(length=60, window=4, leaves=4, layout="left_padding", visits=(2, 2), one_hot=True),
    Case(length=60, window=4, leaves=8, layout="packed", masked=True, batch=1, visits=(3, 1)),
]
_DTYPES = (torch.bfloat16, HALF, torch.float32)
_MODEL = Case(heads=9, kv_heads=3, dim=64, leaves=64, window=128, batch=1, dtype=torch.bfloat16, identity=True)
GPU_CASES = [
    *(replace(_MODEL, length=n) for n in (1, 63, 129, 1000, 1025, 2049, 4096, 4097)),
    *(replace(_MODEL, length=1025, dtype=dtype) for dtype in (HALF, torch.float32)),
    *(
        replace(_MODEL, length=1500, layout=layout, identity=False, batch=3, heads=3, dtype=dtype)
        for layout in LAYOUTS
        for dtype in (torch.bfloat16, torch.float32)
    ),
    *(replace(_MODEL, length=700, leaves=n, dim=d) for n in (2, 81, 128, 256) for d in (16, 64, 80, 128, 256)),
    *(replace(_MODEL, length=300, leaves=256, dim=d, dtype=t) for d in (64, 256) for t in (HALF, torch.float32)),
    *(replace(_MODEL, length=1025, window=window, sinks=sinks) for window in (1, 64) for sinks in (0, 300)),
    *(replace(_MODEL, length=1025, softcap=cap) for cap in (0.5, 30.0)),
    *(replace(_MODEL, length=1025, sharp=12.0, window=4, dtype=t) for t in (torch.bfloat16, HALF, torch.float32)),
    *(replace(_MODEL, length=1025, one_hot=True, dtype=t) for t in (torch.bfloat16, torch.float32)),
    *(replace(_MODEL, length=1025, heads=8, kv_heads=n) for n in (1, 8)),
    *(replace(_MODEL, length=n, masked=True, leaves=m) for n in (129, 1025, 4097) for m in (4, 64, 256)),
    *(
        replace(_MODEL, length=1025, leaves=m, dtype=t, visits=(1, 2, 8) * 3, masked=masked)
        for m in (9, 64, 256)
        for t in _DTYPES
        for masked in (False, True)
    ),
    *(
        replace(_MODEL, length=1500, layout=layout, identity=False, batch=3, heads=3, dtype=dtype, masked=True)
        for layout in LAYOUTS
        for dtype in (torch.bfloat16, HALF, torch.float32)
    ),
]


@pytest.mark.parametrize("case", [*CASES, *VISITS], ids=str)
def test_gradients_of_leaves(case: Case) -> None:
    problem = make(case)
    check(problem, run(problem))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gradients_of_leaves_on_gpu(case: Case) -> None:
    problem = make(case)
    check(problem, run(problem))


@settings(max_examples=200 if GPU else 10, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 70),
    layout=st.sampled_from(list(LAYOUTS)),
    window=st.integers(1, 40),
    sinks=st.integers(0, 20),
    seed=st.integers(0, 999),
)
def test_small_tiles(length: int, layout: str, window: int, sinks: int, seed: int) -> None:
    """Tiles of 16 put masked and whole tiles in many arrangements into short sequences."""
    case = Case(length, layout, 2, 1, 16, 8, window, sinks, batch=1, identity=layout == "plain")
    problem = make(case, seed)
    check(problem, run(problem, tile_size=16))


def test_the_cap_binds() -> None:
    """What the sharp cases are for."""
    problem = make(next(case for case in CASES if case.sharp > 1))
    for uncapped, capped in zip(run(problem, max_gap=60.0)[2:], run(problem)[2:], strict=True):
        assert float(uncapped.abs().max()) > 10 * float(capped.abs().max())


@pytest.mark.parametrize("case", [Case(length=70, softcap=2.0), Case(length=70, layout="packed", dtype=HALF)], ids=str)
def test_attention_is_the_hard_one(case: Case) -> None:
    """`out`, dq, dk and dv have the bits of `topology_attention`, and are those of the definition."""
    problem = make(case)
    given = whole(problem.plan() | problem.options)
    probs = [t.requires_grad_() for t in (problem.query_probs, problem.key_probs)]
    results = []
    for attend, extra in ((topology_attention, {}), (bridged_topology_attention, {"max_gap": MAX_GAP})):
        q, k, v = inputs = [t.detach().clone().requires_grad_() for t in (problem.q, problem.k, problem.v)]
        with tile(64):
            out = attend(q, k, v, *(probs if extra else ()), **given, **extra)
            out = out[0] if extra else out
            results.append([out.detach(), *torch.autograd.grad(out, inputs, problem.dout)])
    exact = definition(problem)
    for name, hard, found in zip(("out", "q", "k", "v"), *results, strict=True):
        assert torch.equal(hard, found)
        tolerance = 1e-5 if case.dtype == torch.float32 else 5e-3
        assert float((found - exact[name]).abs().max()) < tolerance * float(exact[name].abs().max())


@pytest.mark.parametrize(
    "wrong", ["window", "sinks", "order", "query probs", "key probs", "ball", "gap", "price", "balls", "visits"]
)
def test_wrong_input_is_noticed(wrong: str) -> None:
    visits = (2, 3) if wrong == "visits" else None
    length = 60 if wrong == "visits" else 130
    problem = make(Case(length=length, batch=1, sharp=12.0 if wrong == "gap" else 1.0, visits=visits))
    changed: dict[str, Any] = {}
    if wrong == "window":
        changed["local_start"] = problem.plan()["local_start"] + 1
    elif wrong == "sinks":
        changed["document_start"] = (problem.plan()["document_start"] + 1).minimum(problem.plan()["local_start"])
    elif wrong == "order":
        changed["local_order"] = problem.plan()["local_order"].roll(1, 1)
    elif wrong == "ball":
        key_ball = problem.key_ball.clone()
        key_ball[0, 1, 40] = problem.query_ball[0, 1, 100]
        changed = {k: v for k, v in replace(problem, key_ball=key_ball).plan().items() if k != "local_order"}
    elif wrong == "balls":
        changed["balls"] = problem.query_ball.int(), problem.key_ball.int()
    elif wrong == "price":
        changed["dpairs"] = problem.dpairs + 0.01
    elif wrong == "visits":
        changed["visits"] = problem.visits.flip(0)
    elif wrong == "gap":
        changed["max_gap"] = 9.0
    else:
        name = wrong.replace(" ", "_")
        changed[name] = getattr(problem, name).clone()
        changed[name][0, 1, 60] = changed[name][0, 1, 60].flip(-1)
    with pytest.raises(AssertionError, match="error"):
        check(problem, run(problem, **changed))


# ---------------------------------------------------------------- memory, repeats


@pytest.mark.parametrize(
    "case",
    [
        Case(layout="left_padding", length=70),
        Case(layout="middle_padding", length=130, dtype=HALF, dim=40),
        Case(layout="packed", length=131, leaves=9),
        Case(length=131, leaves=9, identity=True),
        Case(layout="middle_padding", length=70, leaves=4, masked=True),
    ],
    ids=str,
)
def test_nothing_outside_is_read(case: Case) -> None:
    problem = make(case)
    clean = run(problem)
    real = problem.layout.real[:, None, :, None]
    names = ("q", "k", "v", "dout")
    dirty = {name: poisoned(getattr(problem, name).masked_fill(~real, float("nan"))) for name in names}
    names = ("query_probs", "key_probs")
    dirty |= {name: poisoned(getattr(problem, name).masked_fill(~real[..., None], float("nan"))) for name in names}
    plan = problem.plan()
    for name in ("local_start", "local_end"):  # padding: any range, if it is empty
        plan[name] = plan[name].masked_fill(~problem.layout.real, case.length)
    dirty |= {name: guarded(t) if isinstance(t, Tensor) else t for name, t in plan.items()}
    if problem.balls is not None:
        dirty["balls"] = tuple(guarded(ball) for ball in problem.balls)
    with nan_in_new_memory():
        found = run(problem, **dirty)
    for got, right in zip(found, clean, strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("length", [pytest.param(4099, marks=pytest.mark.gpu), 70])
def test_repeats_are_bitwise_equal(length: int) -> None:
    problem = make(Case(length=length, layout="packed", dim=64, dtype=HALF))
    first = run(problem)
    for _ in range(250 if GPU else 2):
        for got, right in zip(run(problem), first, strict=True):
            assert torch.equal(got, right)


@pytest.mark.gpu
def test_memory_is_linear() -> None:
    """16,384 tokens: one head's pairs in half precision would take 512 MiB."""
    problem = make(replace(_MODEL, length=16384, heads=3, kv_heads=1, leaves=32))
    run(problem)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(problem)
    assert torch.cuda.max_memory_allocated() - before < 200 * 2**20


# ---------------------------------------------------------------- refusals, operators


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("q", lambda t: t.double(), "q must be float16, bfloat16 or float32, got torch.float64"),
        ("k", lambda t: t.half(), "k must have q's dtype"),
        ("query_probs", lambda t: t[:, :, 1:], r"query_probs must have shape \[2, 2, 20, 'L', 'p'\]"),
        ("query_probs", lambda t: t[..., 0], r"query_probs must have shape \[2, 2, 20, 'L', 'p'\]"),
        ("query_probs", lambda t: t.repeat(1, 1, 1, 3, 1), r"p\*\*L from 1 to 256"),
        ("key_probs", lambda t: t[..., 1:, :], "key_probs must have shape .* the same for queries and keys"),
        ("key_probs", lambda t: t.double(), "key_probs must be float32, got torch.float64"),
        ("local_order", lambda t: t.long(), "local_order must be int32"),
        ("num_sink_tokens", lambda _: -1, "num_sink_tokens must be >= 0, got -1"),
        ("scale", lambda _: 0.0, "scale must be > 0, got 0.0"),
        ("softcap", lambda _: 0.0, "softcap must be None or > 0, got 0.0"),
        ("max_gap", lambda _: 61.0, "max_gap must be from 0 to 60"),
        ("max_gap", lambda _: -1.0, "max_gap must be from 0 to 60"),
        ("balls", lambda both: (both[0].long(), both[1]), r"balls of queries must be int32 \[2, 2, 2, 20\]"),
        ("balls", lambda both: (both[0], both[1][:, :1]), r"balls of keys must be int32 \[2, 2, 20\].*2, 1, 20"),
        ("visits", lambda t: t[:1], r"visits must be None or torch.int32 of shape \[2\], got torch.int32 \[1\]"),
    ],
)
def test_refuses(argument: str, change, message: str) -> None:
    problem = make(Case(length=20, masked=True, visits=(1, 2)))
    arguments = {name: getattr(problem, name) for name in ("q", "k", "v", "query_probs", "key_probs", "visits")}
    arguments |= problem.plan() | problem.options | {"max_gap": MAX_GAP, "balls": problem.balls}
    with pytest.raises(ValueError, match=message):
        bridged_topology_attention(**whole(arguments | {argument: change(arguments[argument])}))


@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_operators(masked: bool) -> None:
    """Fake implementations and autograd registration."""
    problem = make(Case(length=20, masked=masked, visits=None if masked else (1, 2)))
    balls = None, None
    if problem.balls is not None:
        balls = problem.balls[0][:, :, None].contiguous(), problem.balls[1]
    flat = *problem.plan().values(), 1.0, None
    qkv = [t.detach().clone().requires_grad_() for t in (problem.q, problem.k, problem.v)]
    probs = [t.detach().clone().requires_grad_() for t in (problem.query_probs, problem.key_probs)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    with tile(64):
        arguments = (*qkv, *probs, *balls, problem.visits, 10.0, *flat)
        torch.library.opcheck(bridge._bridged_attention, arguments, test_utils=tests)
        statistics = problem.q, problem.q[..., 0].float().contiguous(), problem.dout, problem.dpairs
        fixed = [t.detach() for t in probs]
        arguments = (*(t.detach() for t in qkv), *statistics, *fixed, *balls, problem.visits, 10.0, *flat[4:])
        torch.library.opcheck(bridge._bridge_gradients, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("leaves", [2, 32, 81, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tiles_fit(dim: int, leaves: int, dtype: torch.dtype) -> None:
    """On the smallest GPU that is served, and larger ones are used where there is room."""
    item, wide = dtype.itemsize, max(16, leaves)
    for memory in (99, 163, 227):
        tiles = bridge.choose_bridge_tiles(dim, leaves, dtype, memory * 1024)
        assert (tiles.query.m, tiles.query.n) == (tiles.key.n, tiles.key.m)
        rows, columns, _, stages, _ = tiles.query
        assert item * (2 * rows * dim + stages * columns * (2 * dim + wide)) <= memory * 1024
        if memory == 227 and dim <= 128 and item == 2:
            assert rows == 128


def test_what_layers_share_is_derived_once() -> None:
    """Layers of one local plan turn its ranges around once; another plan, or one written to, has its own."""
    problem, made = make(Case(length=20, layout="packed")), []
    plan = LocalTensors(*(problem.plan()[name] for name in LocalTensors._fields))

    def ranges(*arguments: Any) -> object:
        made.append(arguments)
        return object()

    first = launch.derived(ranges, plan, 20)
    assert launch.derived(ranges, plan, 20) is first and len(made) == 1
    assert launch.derived(ranges, plan._replace(num_sink_tokens=5), 20) is not first
    assert launch.derived(ranges, plan._replace(local_start=plan.local_start.clone()), 20) is not first
    first = launch.derived(ranges, plan, 20)
    plan.document_start.add_(1)
    assert launch.derived(ranges, plan, 20) is not first and len(made) == 5


@pytest.mark.parametrize("identity", [True, False])
def test_what_layers_share_dies_with_their_plan(identity: bool) -> None:
    problem = make(Case(length=40, identity=identity))
    plan = problem.plan()
    run(problem, **plan)
    alive = weakref.ref(plan["local_end"])
    assert plan["local_end"] in launch._DERIVED
    del plan
    gc.collect()
    assert alive() is None


# ---------------------------------------------------------------- the library on these kernels


@contextmanager
def kernels(planning: bool = GPU) -> Iterator[mock.Mock]:
    """`bridged_attention` takes the kernels, here the interpreted ones too; counts the calls of the bridged one."""
    with ExitStack() as stack:
        stack.enter_context(forced(True, "bridge", "attend", *(["plan"] if planning else [])))
        if not GPU:
            stack.enter_context(tile(64))
            choose = topo_kernels.plan.choose_plan_tiles
            small = {"chunk": 64, "sort_warps": 1, "place": 64}
            patch = mock.patch.object(topo_kernels.plan, "choose_plan_tiles", lambda n: choose(n)._replace(**small))
            stack.enter_context(patch)
        spy = mock.Mock(wraps=bridged_topology_attention)
        stack.enter_context(mock.patch.object(topo_kernels, "bridged_topology_attention", spy))
        yield spy


def on_device(problem: helpers.Problem) -> helpers.Problem:
    query, key = (RoleDigits(*(t.to(DEVICE) for t in role)) for role in problem.routes)
    tied = problem.routes.key is problem.routes.query
    layout = replace(
        problem.query, document=problem.query.document.to(DEVICE), position=problem.query.position.to(DEVICE)
    )
    q, k, v = (t.to(DEVICE) for t in (problem.q, problem.k, problem.v))
    more = None if problem.more_visits is None else problem.more_visits.to(DEVICE)
    problem = replace(problem, q=q, k=k, v=v, query=layout, key=layout, more_visits=more)
    return replace(problem, routes=Routes(query, query if tied else key))


def differentiated(problem: helpers.Problem, softcap: float | None = None, bridge: str = "full") -> list[Tensor]:
    """`out`, far pairs and the gradients of q, k, v and the probabilities, in float32 or float64."""
    tied = problem.routes.key is problem.routes.query
    roles = problem.routes[:1] if tied else problem.routes
    inputs = [problem.q, problem.k, problem.v, *(role.probs for role in roles)]
    q, k, v, *probs = inputs = [t.detach().clone().requires_grad_() for t in inputs]
    roles = [role._replace(probs=p) for role, p in zip(roles, probs, strict=True)]
    problem = replace(problem, q=q, k=k, v=v, routes=Routes(roles[0], roles[-1]))
    out, far_pairs = bridged_and_far_pairs(problem, 1.0, bridge, softcap)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in (out, far_pairs)]
    return [out.detach(), far_pairs.detach(), *torch.autograd.grad((out, far_pairs), inputs, upstream)]


LIBRARY: list[dict[str, Any]] = [
    {},
    {"layout": "middle_padding", "arity": 3, "depth": 3, "depths": (2, 2, 2, 2)},
    {"layout": "packed", "depths": (3, 0, 3, 1), "one_hot": True},
    {"layout": "left_padding", "depths": (0, 2, 1, 4), "softcap": 1.5, "kv_heads": 4},
    {"layout": "interleaved", "arity": 3, "depth": 2, "depths": (0, 2, 1, 1), "tied": True, "kv_heads": 1},
    {"layout": "packed", "depths": (3, 2, 3, 5), "visits": 3},
]


@pytest.mark.parametrize("reach", ["full", "masked"])
@pytest.mark.parametrize("settings", LIBRARY, ids=str)
def test_bridged_attention_on_kernels(settings: dict[str, Any], reach: str) -> None:
    settings = {"dtype": torch.float32, "dim": 16, "length": 33, **settings}
    softcap, tied = settings.pop("softcap", None), settings.pop("tied", False)
    problem = make_problem(settings.pop("layout", "plain"), **settings)
    if tied:
        problem = replace(problem, routes=Routes(problem.routes.query, problem.routes.query))
    problem = on_device(problem)
    with kernels(planning=GPU or problem.query.plain) as bridge:
        found = differentiated(problem, softcap, reach)
    assert bridge.call_count == 1
    wide = widened_tied(problem) if tied else widened(problem)
    exact, other = (differentiated(wide, softcap, b) for b in (reach, "masked" if reach == "full" else "full"))
    for got, right in zip(found, exact, strict=True):
        assert float((got - right).abs().max()) < 1e-5 * float(right.abs().max())
    assert float((other[-1] - exact[-1]).abs().max()) > 1e-2 * float(exact[-1].abs().max()), "another bridge must show"


def widened_tied(problem: helpers.Problem) -> helpers.Problem:
    wide = widened(problem)
    return replace(wide, routes=Routes(wide.routes.query, wide.routes.query))


def test_without_a_router_to_teach_it_is_the_hard_attention() -> None:
    problem = on_device(make_problem("packed", dtype=torch.float32, dim=16))
    right = helpers.hard(problem_on_cpu(problem)).to(DEVICE)
    with kernels() as bridge, mock.patch.object(topo_kernels, "topology_attention", wraps=topology_attention) as hard:
        found = [bridged(problem, 1.0, routed=False), bridged(problem, 1.0)]
        with torch.no_grad():
            found.append(bridged(problem, 1.0))
    assert bridge.call_count == 0 and hard.call_count == 3
    for out in found:
        assert float((out - right).abs().max()) < 1e-5


def problem_on_cpu(problem: helpers.Problem) -> helpers.Problem:
    query, key = (RoleDigits(*(t.cpu() for t in role)) for role in problem.routes)
    layout = replace(problem.query, document=problem.query.document.cpu(), position=problem.query.position.cpu())
    q, k, v = (t.cpu() for t in (problem.q, problem.k, problem.v))
    return replace(problem, q=q, k=k, v=v, routes=Routes(query, key), query=layout, key=layout)


@pytest.mark.parametrize(
    ("homotopy", "bridge", "settings"),
    [
        (0.5, "full", {}),
        (1.0, "full", {"visits": 9}),
        (1.0, "full", {"dim": 8}),
        (1.0, "full", {"depth": 9, "depths": (1, 9, 2, 0)}),  # more leaves than a tile holds
    ],
    ids=str,
)
def test_the_torch_path_serves_the_rest(homotopy: float, bridge: str, settings: dict[str, Any]) -> None:
    problem = on_device(make_problem(**{"dtype": torch.float32, "dim": 16, "length": 12, **settings}))
    query = problem.routes.query.probs.requires_grad_()
    with kernels() as kernel:
        bridged(problem, homotopy, bridge).sum().backward()  # type: ignore[arg-type]
    assert kernel.call_count == 0 and query.grad is not None and query.grad.any()


@pytest.mark.parametrize("reach", ["full", "masked"])
def test_a_model_trains_on_kernels(reach: str) -> None:
    """The router has the gradient of the torch path."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2 if GPU else 1,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    topology = TopologyConfig(
        depth=3, visible_depth=2, local_window=4, num_sink_tokens=2, gumbel_noise=False, density_weight=0.3,
        balance_weight=0.0, route_per="kv_head", gradient_bridge=reach,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config).to(DEVICE), topology)
    ids = torch.randint(97, (2, 28), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    initialize_routers(model, ids)
    model.peft_config["default"].homotopy = 1.0
    model.train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with forced(False, "bridge"):
        right = gradients()
    with kernels() as bridge:
        found = gradients()
    assert bridge.call_count == config.num_hidden_layers and found.keys() == right.keys()
    for name, gradient in found.items():
        assert right[name].any()
        assert float((gradient - right[name]).abs().max()) < 1e-3 * float(right[name].abs().max()), name
