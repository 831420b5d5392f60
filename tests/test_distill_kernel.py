"""Distillation's far values and far mass against the definition in fp64, with autograd; on a GPU or interpreted."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from test_kernels import DEVICE, GPU, HALF, LAYOUTS, guarded, nan_in_new_memory, poisoned, whole
from test_leaves_kernel import coarsened, leaves_by_definition, rows, visited
from torch import Tensor

from topo_adapter.core.layout import SequenceLayout, causal_pairs
from topo_adapter.core.scoring import Scoring
from topo_adapter.core.visibility import always_visible
from topo_adapter.ops.plan import build_plan
from topo_adapter.ops.relaxation import scaled_scores
from topo_kernels import LocalTensors, distill, far_mass
from topo_kernels.distill import FarTiles, far_gradient, far_values
from topo_kernels.launch import Tile
from topo_kernels.leaves import gradient_dtype, leaf_dtype

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
        plan = build_plan(ball[1][:, :, None], ball[0], self.query, self.key, self.case.window, self.case.sinks)
        ranges: dict[str, Tensor | None] = {name: getattr(plan, name) for name in LocalTensors._fields[:-1]}
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
    square = Tile(size, size, 4, 2)
    with mock.patch.object(distill, "choose_far_tiles", lambda *_: FarTiles(square, square)):
        yield


def run(problem: Problem, tile_size: int | None = None, **tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Values, local mass and the leaves' gradient; the interpreter takes large tiles, because it pays per tile."""
    size = tile_size or (None if GPU else 64)
    case = problem.case
    x = {"q": problem.q, "k": problem.k, "leaves": problem.leaves, "grad": problem.grad, **problem.ranges(), **tensors}
    plan = LocalTensors(*(x[name] for name in LocalTensors._fields[:-1]), case.sinks)
    leaves, grad = x["leaves"].to(leaf_dtype(case.dtype)), x["grad"].to(gradient_dtype(case.dtype))
    scoring = Scoring(problem.scale, case.softcap)
    with nullcontext() if size is None else tile(size):
        values, local, lse = far_values(x["q"], x["k"], leaves.contiguous(), plan, scoring)
        return values, local, far_gradient(x["q"], x["k"], lse, grad.contiguous(), plan, scoring)


def formula(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the definition, with tensors of `dtype`; scores in float32 at least, as `kept_mass` has them."""
    case = problem.case
    scores = scaled_scores(problem.q.to(dtype), problem.k.to(dtype), Scoring(problem.scale, case.softcap))
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


@settings(max_examples=200 if GPU else 12, deadline=None, derandomize=True)
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
def test_far_mass_beside_a_local_mass_near_1(layout: str) -> None:
    """Nothing is subtracted: the small rest is exact."""
    problem = make(Case(layout=layout, leaves=16, length=60, sinks=2, window=4))
    ones = torch.ones_like(problem.leaves)
    problem = replace(problem, q=problem.q * 6, leaves=ones)  # sharp
    found, far = run(problem)[0][..., 0], formula(problem, torch.float64)[0][..., 0]
    tiny = (far > 1e-30) & (far < 1e-6)
    assert tiny.any() and float((found / far - 1)[tiny].abs().max()) < 1e-4


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
        check(problem, run(problem, **(ranges | {"leaves": leaves})))


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
        found = run(problem, q=q, k=k, leaves=leaves, grad=grad, **ranges)
    for got, right in zip(found, clean, strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("length", [pytest.param(4099, marks=pytest.mark.gpu), 70])
def test_repeats_are_bitwise_equal(length: int) -> None:
    problem = make(Case(length=length, layout="packed", dim=64, dtype=HALF))
    first = run(problem)
    for _ in range(250 if GPU else 2):
        for got, right in zip(run(problem), first, strict=True):
            assert torch.equal(got, right)


# ---------------------------------------------------------------- far mass: from probabilities to kept mass


@dataclass(frozen=True)
class Mass:
    """A problem with level probabilities; the gradients are of `far_mass`'s three outputs."""

    problem: Problem
    query_probs: Tensor  # [B, H, M, L, p]
    key_probs: Tensor  # [B, H, N, L, p]
    query_weight: Tensor  # [B, M], 0 in padding
    key_weight: Tensor  # [B, N]
    grads: tuple[Tensor, Tensor, Tensor]
    visits: tuple[int, ...] | None = None  # of the heads

    def arguments(self) -> dict:
        """Of `far_mass`, its options included."""
        case, problem = self.problem.case, self.problem
        names = ("query_probs", "key_probs", "query_weight", "key_weight")
        tensors = {name: getattr(self, name) for name in names} | {"q": problem.q, "k": problem.k} | problem.ranges()
        tensors |= {"num_sink_tokens": case.sinks, "scale": problem.scale, "softcap": case.softcap}
        if self.visits is not None:
            tensors["visits"] = torch.tensor(self.visits, dtype=torch.int32, device=DEVICE)
        return tensors


def make_mass(
    case: Case, arity: int = 2, depth: int = 4, one_hot: bool = False, visits: tuple[int, ...] | None = None
) -> Mass:
    problem = make(case)
    B, H, M, N, V = case.batch, case.heads, problem.q.shape[2], case.length, arity**depth

    def random_probs(length: int) -> Tensor:
        probs = torch.softmax(2 * torch.randn(B, length, H, depth, arity), -1).transpose(1, 2)  # as a router's
        return torch.nn.functional.one_hot(probs.argmax(-1), arity).float() if one_hot else probs

    # gradients of means are spread over tokens: this large, they show beside those of the kept mass
    query_mean = (H, V) if visits is None else (depth, H, V)
    grads = torch.randn(depth, B, H, M), M * torch.randn(query_mean), N * torch.randn(H, V)
    weights = (layout.real / layout.real.sum().clamp(min=1) for layout in (problem.query, problem.key))
    tensors = *(random_probs(length).to(DEVICE) for length in (M, N)), *weights
    return Mass(problem, *tensors, tuple(grad.to(DEVICE) for grad in grads), visits)


MASS_NAMES = ("kept", "query_mean", "key_mean", "dquery_probs", "dkey_probs")


def run_mass(mass: Mass, **changes: Tensor | tuple[Tensor, ...] | None) -> list[Tensor]:
    """In the order of MASS_NAMES; the interpreter takes large tiles, because it pays per tile."""
    grads = changes.pop("grads", mass.grads)
    arguments = mass.arguments() | changes
    for name in ("query_probs", "key_probs"):
        arguments[name] = arguments[name].detach().requires_grad_()
    with nullcontext() if GPU else tile(64), nullcontext() if GPU else rows(32, 2):
        outputs = far_mass(**whole(arguments, LocalTensors))
        dprobs = torch.autograd.grad(outputs, [arguments["query_probs"], arguments["key_probs"]], grads)
    return [t.detach() for t in (*outputs, *dprobs)]


def mass_formula(mass: Mass, dtype: torch.dtype) -> list[Tensor]:
    """The same from the definition, with autograd; attention and values in `dtype`, the rest in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    problem, case = mass.problem, mass.problem.case
    query_probs, key_probs = (p.to(wide).requires_grad_() for p in (mass.query_probs, mass.key_probs))
    query_leaves, key_leaves = (leaves_by_definition(p) for p in (query_probs, key_probs))
    scores = scaled_scores(problem.q.to(dtype), problem.k.to(dtype), Scoring(problem.scale, case.softcap))
    causal = causal_pairs(problem.query, problem.key)[:, None]
    near = always_visible(problem.query, problem.key, case.window, case.sinks)[:, None]
    attention = scores.masked_fill(~causal, torch.finfo(scores.dtype).min).softmax(-1)
    local = attention.masked_fill(~near, 0.0).sum(-1).to(wide)
    values = (attention.masked_fill(near | ~causal, 0.0).to(dtype) @ key_leaves[-1].to(dtype)).to(wide)
    query_leaves = [visited(p, mass.visits) for p in query_leaves]
    kept = torch.stack([local + (p * coarsened(values, p.shape[-1])).sum(-1) for p in query_leaves])
    kept = kept.masked_fill(~problem.query.real[:, None], 0.0)
    query_means = [torch.einsum("bhnv,bn->hv", p, mass.query_weight.to(wide)) for p in query_leaves]
    query_mean = query_means[-1]
    if mass.visits is not None:
        leaf = torch.arange(values.shape[-1], device=values.device)
        query_mean = torch.stack([mean[:, leaf % mean.shape[-1]] for mean in query_means])
    key_mean = torch.einsum("bhnv,bn->hv", key_leaves[-1], mass.key_weight.to(wide))
    outputs = kept, query_mean, key_mean
    dprobs = torch.autograd.grad(outputs, [query_probs, key_probs], [g.to(wide) for g in mass.grads])
    return [t.detach() for t in (*outputs, *dprobs)]


def check_mass(mass: Mass, found: list[Tensor]) -> None:
    """Each within three times the error of the same formula in q's dtype, as in `check`."""
    exact = mass_formula(mass, torch.float64)
    dtype = mass.problem.case.dtype
    same = mass_formula(mass, torch.bfloat16 if dtype == HALF and GPU else dtype)  # gradients, at least
    for name, got, right, plain in zip(MASS_NAMES, found, exact, same, strict=True):
        assert got.dtype == torch.float32 and got.shape == right.shape and got.isfinite().all(), name
        floor = 8 * torch.finfo(torch.float32).eps * float(right.abs().max())
        allowed = 3 * float((plain - right).abs().max()) + floor
        error = float((got - right).abs().max())
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


MASS_CASES: list[tuple[Case, int, int]] = [
    *((Case(length=60, identity=True), *tree) for tree in ((2, 1), (2, 7), (3, 3), (5, 2), (7, 2))),
    *((Case(length=60, layout=layout, sample=23), 3, 2) for layout in LAYOUTS),
    (Case(length=60, layout="packed", dtype=HALF), 2, 6),
    (Case(length=70, layout="left_padding", heads=4, kv_heads=2, softcap=5.0), 2, 3),
]
MASS_GPU_CASES: list[tuple[Case, int, int]] = [
    *((replace(_MODEL, length=n), 2, 7) for n in (1, 63, 129, 1000, 2049)),
    *((replace(_MODEL, length=700, dtype=dtype), 2, 7) for dtype in (HALF, torch.float32)),
    *((replace(_MODEL, length=700), *tree) for tree in ((2, 1), (2, 8), (3, 5), (5, 3), (7, 2), (16, 2))),
    *(
        (replace(_MODEL, length=900, layout=layout, sample=sample, identity=False, batch=2, dtype=dtype), 2, 6)
        for layout in LAYOUTS
        for sample in (None, 256)
        for dtype in (torch.bfloat16, torch.float32)
    ),
]


@pytest.mark.parametrize(("case", "arity", "depth"), MASS_CASES, ids=str)
def test_far_mass(case: Case, arity: int, depth: int) -> None:
    mass = make_mass(case, arity, depth)
    check_mass(mass, run_mass(mass))


VISITS: list[tuple[Case, int, int, tuple[int, ...]]] = [
    (Case(length=40, window=4, identity=True, batch=1), 2, 3, (2, 1)),
    (Case(length=40, window=4, layout="packed", sample=23, dtype=HALF), 3, 2, (8, 3)),
    (Case(length=40, window=4, layout="left_padding", heads=4, kv_heads=2, batch=1), 2, 2, (1, 2, 3, 8)),
]
VISITS_ON_GPU: list[tuple[Case, int, int, tuple[int, ...]]] = [
    *((replace(_MODEL, length=700, dtype=dtype), 2, 7, (1, 2, 3, 8) * 2) for dtype in (HALF, torch.float32)),
    *((replace(_MODEL, length=900), *tree, (1, 2, 3, 8) * 2) for tree in ((2, 1), (2, 8), (3, 5), (5, 3), (16, 2))),
    (replace(_MODEL, length=900, layout="packed", sample=256, identity=False, batch=2), 2, 6, (2,) * 8),
]


@pytest.mark.parametrize(
    ("case", "arity", "depth", "visits"),
    [*VISITS, *(pytest.param(*each, marks=pytest.mark.gpu) for each in VISITS_ON_GPU)],
    ids=str,
)
def test_far_mass_of_several_visits(case: Case, arity: int, depth: int, visits: tuple[int, ...]) -> None:
    mass = make_mass(case, arity, depth, visits=visits)
    check_mass(mass, run_mass(mass))


def test_density_from_the_means_of_visits() -> None:
    """As the documentation of `far_mass` has it: the sum over balls."""
    mass = make_mass(Case(length=30, batch=1), 2, 2, visits=(1, 3))
    _, query_mean, key_mean, _, _ = run_mass(mass)
    for d, mean in enumerate(query_mean, 1):
        right = (mean[:, : 2**d] * coarsened(key_mean, 2**d)).sum(-1)
        torch.testing.assert_close((mean * key_mean).sum(-1), right)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "arity", "depth"), MASS_GPU_CASES, ids=str)
def test_far_mass_on_gpu(case: Case, arity: int, depth: int) -> None:
    mass = make_mass(case, arity, depth)
    check_mass(mass, run_mass(mass))


@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_far_mass_of_hard_digits(layout: str) -> None:
    mass = make_mass(Case(length=60, layout=layout), 3, 3, one_hot=True)
    check_mass(mass, run_mass(mass))


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_far_mass_without_the_gradient_of_one_output(missing: int) -> None:
    mass = make_mass(Case(length=40), 2, 3, visits=(2, 1) if missing == 1 else None)
    grads = tuple(torch.zeros_like(g) if i == missing else g for i, g in enumerate(mass.grads))
    arguments = mass.arguments()
    probs = [arguments[name].requires_grad_() for name in ("query_probs", "key_probs")]
    with tile(64), rows(32, 2):
        outputs = far_mass(**whole(arguments, LocalTensors))
        used = [i for i in range(3) if i != missing]
        found = torch.autograd.grad([outputs[i] for i in used], probs, [grads[i] for i in used])
    for got, right in zip(found, run_mass(mass, grads=grads)[3:], strict=True):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)  # other tiles


def test_far_mass_of_tied_probabilities() -> None:
    mass = make_mass(Case(length=40), 2, 3)
    mass = replace(mass, query_probs=mass.key_probs)
    shared = mass.key_probs.clone().requires_grad_()
    with tile(64), rows(32, 2):
        outputs = far_mass(**whole(mass.arguments() | {"query_probs": shared, "key_probs": shared}, LocalTensors))
        (found,) = torch.autograd.grad(outputs, shared, mass.grads)
    *_, query, key = run_mass(mass)
    torch.testing.assert_close(found, query + key, rtol=1e-5, atol=1e-6)  # other tiles


@pytest.mark.parametrize("wrong", ["weight", "probs", "levels", "window", "visits"])
def test_wrong_far_mass_is_noticed(wrong: str) -> None:
    mass = make_mass(Case(length=60), 2, 3, visits=(2, 3) if wrong == "visits" else None)
    change: dict = {}
    if wrong == "weight":
        change["key_weight"] = mass.key_weight * (1 + 1e-3)
    elif wrong == "probs":
        change["query_probs"] = mass.query_probs.clone()
        change["query_probs"][0, 1, 40] = mass.query_probs[0, 1, 39]
    elif wrong == "levels":
        change["key_probs"] = mass.key_probs.flip(3)
    elif wrong == "visits":
        change["visits"] = mass.arguments()["visits"].flip(0)
    else:
        change["local_start"] = mass.problem.ranges()["local_start"] + 1
    with pytest.raises(AssertionError, match="error"):
        check_mass(mass, run_mass(mass, **change))


@pytest.mark.parametrize(
    "case",
    [
        Case(layout="middle_padding", length=70, sample=40),
        Case(layout="packed", length=70, dtype=HALF),
        pytest.param(replace(_MODEL, length=1500, layout="middle_padding", identity=False), marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_far_mass_reads_nothing_outside(case: Case) -> None:
    mass = make_mass(case, 2, 7 if GPU else 3)
    problem, clean = mass.problem, run_mass(mass)
    real, real_key = problem.query.real[:, None, :, None], problem.key.real[:, None, :, None]
    changes = {
        "q": poisoned(problem.q.masked_fill(~real, float("nan"))),
        "k": poisoned(problem.k.masked_fill(~real_key, float("nan"))),
        "query_probs": poisoned(mass.query_probs.masked_fill(~real[..., None], float("nan"))),
        "key_probs": poisoned(mass.key_probs.masked_fill(~real_key[..., None], float("nan"))),
        "query_weight": poisoned(mass.query_weight),
        "key_weight": poisoned(mass.key_weight),
        **{name: None if t is None else guarded(t) for name, t in problem.ranges().items()},
    }
    grads = poisoned(mass.grads[0].masked_fill(~real[..., 0], float("nan"))), *(poisoned(g) for g in mass.grads[1:])
    with nan_in_new_memory():
        found = run_mass(mass, grads=grads, **changes)
    for name, got, right in zip(MASS_NAMES, found, clean, strict=True):
        assert torch.equal(got, right), name


@pytest.mark.gpu
def test_far_mass_repeats_are_bitwise_equal() -> None:
    mass = make_mass(replace(_MODEL, length=4099, layout="packed", identity=False), 2, 7)
    first = run_mass(mass)
    for _ in range(250):
        for got, right in zip(run_mass(mass), first, strict=True):
            assert torch.equal(got, right)


@pytest.mark.gpu
def test_memory_per_leaf() -> None:
    """Forward and backward of all queries: the values, and at the peak both roles' gradients beside them."""
    mass = make_mass(replace(_MODEL, length=8192), 2, 7)
    run_mass(mass)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_mass(mass)
    per_leaf = (torch.cuda.max_memory_allocated() - before) / (8 * 8192 * 128)
    assert per_leaf < 4 + 4 + 2 + 2  # bytes: float32 values and gradient, bfloat16 gradient, all else


def test_no_gradient_to_queries_and_keys() -> None:
    mass = make_mass(Case(length=20), 2, 2)
    arguments = mass.arguments()
    tensors = {name: arguments[name].clone().requires_grad_() for name in ("q", "k", "query_probs", "key_probs")}
    with tile(64), rows(32, 2):
        kept, query_mean, key_mean = far_mass(**whole(arguments | tensors, LocalTensors))
        (kept.sum() + query_mean.sum() + key_mean.sum()).backward()
    assert [t.grad is None for t in tensors.values()] == [True, True, False, False]


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("q", lambda t: t[0], "q must have four dimensions"),
        ("q", lambda t: t.double(), "q must be float16, bfloat16 or float32, got torch.float64"),
        ("q", lambda t: t[..., :8], "q must have a head dimension D from 16 to 256, got 8"),
        ("k", lambda t: t.half(), "k must have q's dtype"),
        ("k", lambda t: t.repeat(1, 3, 1, 1), "divisor of q's 2 heads"),
        ("query_probs", lambda t: t[0], r"query_probs must have shape \[B, H, M, L, p\]"),
        ("query_probs", lambda t: t.repeat(1, 1, 1, 3, 1), r"p\*\*L up to 256, got \(2, 2, 20, 12, 2\)"),
        ("query_probs", lambda t: t[..., :1], "p >= 2"),
        ("query_probs", lambda t: t[:, :, 1:], r"query_probs must be torch.float32 of shape \[2, 2, 20, 4, 2\]"),
        ("query_probs", lambda t: t.half(), "query_probs must be torch.float32"),
        ("key_probs", lambda t: t[..., 1:, :], r"key_probs must be torch.float32 of shape \[2, 2, 20, 4, 2\]"),
        ("query_weight", lambda t: t.double(), "query_weight must be torch.float32"),
        ("key_weight", lambda t: t[:, 1:], r"key_weight must be torch.float32 of shape \[2, 20\]"),
        ("local_order", lambda t: t.long(), "local_order must be torch.int32"),
        ("local_end", lambda t: t[:, 1:], r"local_end must be torch.int32 of shape \[2, 20\]"),
        ("num_sink_tokens", lambda n: -1, "num_sink_tokens must be >= 0, got -1"),
        ("scale", lambda _: 0.0, "scale must be > 0, got 0.0"),
        ("softcap", lambda _: 0.0, "softcap must be None or > 0, got 0.0"),
        ("visits", lambda t: t.long(), r"visits must be None or torch.int32 of shape \[2\], got torch.int64 \[2\]"),
        ("visits", lambda t: t[:1], r"visits must be None or torch.int32 of shape \[2\], got torch.int32 \[1\]"),
    ],
)
def test_refuses(argument: str, change, message: str) -> None:
    arguments = make_mass(Case(length=20), visits=(1, 2)).arguments()
    with pytest.raises(ValueError, match=message):
        far_mass(**whole(arguments | {argument: change(arguments[argument])}, LocalTensors))


@pytest.mark.parametrize("visits", [None, (1, 2)])
def test_operators(visits: tuple[int, ...] | None) -> None:
    """Fake implementations and autograd registration."""
    mass = make_mass(Case(length=20, batch=1), 2, 2, visits=visits)
    arguments = {"visits": None, **mass.arguments()}
    probs = {name: arguments[name].contiguous().requires_grad_() for name in ("query_probs", "key_probs")}
    names = ("q", "k", "query_probs", "key_probs", "query_weight", "key_weight", "visits", *LocalTensors._fields[:-1])
    inputs = [(arguments | probs)[name] for name in names]
    options = arguments["num_sink_tokens"], arguments["scale"], arguments["softcap"]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    with tile(64), rows(32, 2):
        torch.library.opcheck(distill._far_mass, (*inputs, *options), test_utils=tests)
        inputs = [None if t is None else t.detach() for t in inputs]
        *_, values, lse = distill._far_mass(*inputs, *options)
        inputs = [*mass.grads, values, lse, *inputs]
        torch.library.opcheck(distill._far_mass_gradient, (*inputs, *options), test_utils=tests)
