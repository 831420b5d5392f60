"""Logits and addresses of routers on heads from the kernel against their definition in fp64, on a GPU or in Triton's
interpreter."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

from topo_adapter.core.tree import digits_to_address
from topo_adapter.hf.rotary import Rotation, _pairs_of
from topo_adapter.ops.head_router import HeadRouter
from topo_kernels import pack_head_router, route_heads
from topo_kernels.heads import PackedHeadRouter, Pairs

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF, BF16 = torch.float16, torch.bfloat16
# Logits here have deviation 2 or so. Digits whose two largest logits are closer than this may come out either way.
NEAR_TIE = 2e-4


@dataclass(frozen=True)
class Case:
    length: int = 70
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    depth: int = 4
    arity: int = 2
    per: str = "query_head"
    turned: int = 32  # channels; 0: none
    last: bool = False
    pairs: Pairs = "halves"
    angle_rows: int | None = None
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{name}={value}".replace("torch.", "") for name, value in changed) or "default"


@dataclass(frozen=True)
class Problem:
    case: Case
    router: HeadRouter
    query: Tensor
    key: Tensor
    cos: Tensor | None
    sin: Tensor | None

    @property
    def first(self) -> int:
        return self.case.dim - self.case.turned if self.case.last else 0


def make(case: Case, seed: int = 0) -> Problem:
    """A router that has weights, biases, centers and gains of all sizes."""
    torch.manual_seed(seed)
    router = HeadRouter(case.heads, case.kv_heads, case.dim, case.arity, case.depth, case.per)  # type: ignore[arg-type]
    with torch.no_grad():
        for linear in (router.query, router.key):
            linear.center.normal_(std=3)
            linear.gain.uniform_(0.3, 1)
            linear.bias.normal_(std=0.01)
    query, key = (torch.randn(case.batch, n, case.length, case.dim) * 2 for n in (case.heads, case.kv_heads))
    cos = sin = None
    if case.turned:
        rows = case.batch if case.angle_rows is None else case.angle_rows
        angle = torch.randn(rows, case.length, case.turned // 2)
        if case.pairs == "neighbours":
            angle = angle.repeat_interleave(2, -1)
        else:  # what is given once stands beside what is not to be read
            angle = torch.cat([angle, angle if case.pairs == "halves" else torch.randn_like(angle)], -1)
        cos, sin = (x.to(DEVICE, case.dtype) for x in (angle.cos(), angle.sin()))
    return Problem(case, router.to(DEVICE), query.to(DEVICE, case.dtype), key.to(DEVICE, case.dtype), cos, sin)


def pack(router: HeadRouter) -> PackedHeadRouter:
    return pack_head_router(*router.query.folded(), *router.key.folded(), depth=router.depth, arity=router.arity)


def run(problem: Problem, **changes: Any) -> tuple[Tensor | None, Tensor, Tensor]:
    given = {"query": problem.query, "key": problem.key, "cos": problem.cos, "sin": problem.sin}
    options = {"packed": pack(problem.router), "first": problem.first, "pairs": problem.case.pairs}
    return route_heads(**(given | options | {"keep_logits": True} | changes))


def definition(problem: Problem) -> tuple[Tensor, Tensor]:
    """Logits `[B, R, T, L, p]` of queries and `[B, H_kv, T, L, p]` of keys, in float64."""
    case, router, found = problem.case, problem.router, []
    for x, linear in ((problem.query, router.query), (problem.key, router.key)):
        x = x.double()
        if problem.cos is not None and problem.sin is not None:
            cos, sin = (each.double()[:, None] for each in (problem.cos, problem.sin))
            pair = torch.arange(case.turned // 2)
            one, other = (pair, pair + len(pair)) if case.pairs == "halves" else (2 * pair, 2 * pair + 1)
            angle = pair if case.pairs == "neighbours_once" else one
            cos, sin, one, other = cos[..., angle], sin[..., angle], one + problem.first, other + problem.first
            turned = x.clone()
            turned[..., one] = x[..., one] * cos + x[..., other] * sin
            turned[..., other] = x[..., other] * cos - x[..., one] * sin
            x = turned
        routes = linear.weight.shape[0]
        x = x.unflatten(1, (routes, -1)).transpose(2, 3).flatten(3)
        x = (x - linear.center.double()[:, None]) * linear.gain.double()[:, None, None]
        free = 3 * torch.einsum("brtd,rnd->brtn", x, linear.weight.double()) + 90 * linear.bias.double()[:, None]
        free = free.unflatten(-1, (case.depth, case.arity - 1))
        found.append(torch.cat([torch.zeros_like(free[..., :1]), free], -1))
    return found[0], found[1]


def check(problem: Problem, found: tuple[Tensor | None, Tensor, Tensor]) -> None:
    logits, query_address, key_address = found
    query, key = definition(problem)
    assert logits is not None
    torch.testing.assert_close(logits.double(), query, atol=1e-4, rtol=1e-5)
    arity = problem.case.arity
    assert torch.equal(query_address.long(), digits_to_address(logits.argmax(-1), arity))
    for address, scores in ((query_address, query), (key_address, key)):
        top = scores.topk(2).values
        sure = (top[..., 0] - top[..., 1] > NEAR_TIE).all(-1)
        assert sure.float().mean() > 0.9
        assert torch.equal(address[sure].long(), digits_to_address(scores.argmax(-1), arity)[sure])


CASES = [
    Case(),
    Case(length=1),
    Case(length=1, batch=5, angle_rows=1),
    Case(length=17, turned=0),
    Case(turned=16),
    Case(turned=16, last=True),
    Case(angle_rows=1),
    Case(per="kv_head"),
    Case(heads=6, kv_heads=2, per="kv_head", dim=20, turned=20),
    Case(heads=3, kv_heads=1, dim=64, turned=64, depth=8),
    Case(heads=3, kv_heads=3, dim=24, turned=8, arity=3, depth=5),
    Case(arity=16, depth=2),
    Case(arity=5, depth=3, batch=1),
    Case(arity=256, depth=1, length=20, batch=1),
    Case(depth=1),
    Case(dim=256, turned=64, length=40, batch=1, dtype=HALF),
    *(Case(dtype=HALF, heads=heads, dim=64, turned=64, depth=8) for heads in (2, 8)),
    Case(dim=21, turned=6, last=True, length=33),  # from an odd channel on, an odd number of pairs
    *(
        Case(pairs=pairs, **changes)
        for pairs in ("neighbours", "neighbours_once")
        for changes in (
            {},
            {"length": 1, "batch": 5, "angle_rows": 1},
            {"turned": 16},
            {"turned": 16, "last": True},
            {"dim": 22, "turned": 6, "last": True, "length": 33},  # an odd number of pairs
            {"dim": 21, "turned": 6, "length": 33},
            {"heads": 6, "per": "kv_head", "dim": 20, "turned": 20},
            {"heads": 3, "kv_heads": 1, "dim": 128, "turned": 128, "depth": 8, "dtype": HALF},
        )
    ),
]
GPU_CASES = [
    replace(case, batch=2, length=1030, dtype=dtype) for case in CASES for dtype in (torch.float32, HALF, BF16)
] + [
    Case(length=length, batch=batch, heads=32, kv_heads=8, dim=128, turned=128, depth=8, dtype=BF16, per=per)
    for length, batch in ((1, 1), (1, 16), (15, 2), (4096, 1))
    for per in ("query_head", "kv_head")
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_definition(case: Case) -> None:
    problem = make(case)
    check(problem, run(problem))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_against_the_definition_on_gpu(case: Case) -> None:
    problem = make(case)
    first = run(problem)
    check(problem, first)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(problem), strict=True))  # type: ignore[arg-type]


def test_logits_are_made_where_they_are_wanted() -> None:
    problem = make(Case())
    wanted, without = run(problem), run(problem, keep_logits=False)
    assert without[0] is None
    assert torch.equal(wanted[1], without[1]) and torch.equal(wanted[2], without[2])


def test_strides_do_not_matter() -> None:
    problem = make(Case(length=20))
    expected = run(problem)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (problem.query, problem.key)]
    wide = [torch.stack([x, x + 1], -1)[..., 0] for x in (problem.query, problem.key, problem.cos, problem.sin)]
    for found in (
        run(problem, query=turned[0], key=turned[1]),
        run(problem, **dict(zip(("query", "key", "cos", "sin"), wide, strict=True))),
    ):
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["sin", "first", "center", "bias", "head"])
def test_it_would_notice(wrong: str) -> None:
    """Negative controls: what is changed shows."""
    problem = make(Case(turned=16))
    packed, changes = pack(problem.router), {}
    if wrong == "sin":
        assert problem.sin is not None
        changes["sin"] = -problem.sin
    elif wrong == "first":
        changes["first"] = 16
    elif wrong == "head":
        changes["query"] = problem.query.roll(1, 1)
    elif wrong == "center":
        changes["packed"] = packed._replace(center=torch.zeros_like(packed.center))
    else:
        changes["packed"] = packed._replace(bias=packed.bias.roll(1, 0))
    with pytest.raises(AssertionError):
        check(problem, run(problem, **changes))


@pytest.mark.parametrize("pairs", get_args(Pairs))
@pytest.mark.parametrize("turned", [16, 32])
def test_other_pairs_show(pairs: Pairs, turned: int) -> None:
    """Negative control: each way to pair the channels gives other digits than the others."""
    problem = make(Case(pairs=pairs, turned=turned))
    right = run(problem)
    for other in set(get_args(Pairs)) - {pairs}:
        wrong = run(problem, pairs=other)
        assert all((a != b).float().mean() > 0.1 for a, b in zip(right[1:], wrong[1:], strict=True))
        with pytest.raises(AssertionError):
            check(problem, wrong)


@pytest.mark.parametrize("turned", [8, 24])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("turn", [llama, cohere, glm], ids=["llama", "cohere", "glm"])
def test_it_turns_back_as_the_models_own_function_does(turn: Any, last: bool, turned: int) -> None:
    """Cosines and sines are any numbers here, so that it shows which of them are read."""
    problem = make(Case(dim=24, turned=turned, last=last))
    angles = (torch.randn_like(problem.cos), torch.randn_like(problem.sin))  # type: ignore[arg-type]
    rotation = Rotation(turn, last, _pairs_of(turn))
    query, key = problem.router(*rotation.undo(problem.query, problem.key, angles))
    found = run(problem, cos=angles[0], sin=angles[1], pairs=rotation.pairs)
    torch.testing.assert_close(found[0], query, atol=1e-4, rtol=1e-5)
    same = found[2] == digits_to_address(key.argmax(-1), problem.case.arity)
    assert same.float().mean() > 0.999


def test_pairs_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="first must be even where neighbours were turned with each other, got 3"):
        run(make(Case(turned=16)), pairs="neighbours", first=3)
    with pytest.raises(ValueError, match="pairs must be one of 'halves', 'neighbours', 'neighbours_once', got 'both'"):
        run(make(Case()), pairs="both")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda t: t[:, :2], r"query must have shape \[B, H=4, T, D=32\], got \[2, 2, 70, 32\]"),
        ("key", lambda t: t[:, :, 1:], r"key must have shape \[2, 2, 70, 32\], got \[2, 2, 69, 32\]"),
        ("query", lambda t: t.double(), r"query must be float16, bfloat16 or float32 .* got torch.float64"),
        ("cos", lambda t: None, "cos and sin must both be given, or neither, got one"),
        ("cos", lambda t: t[:, 1:], r"cos must have shape \[2 or 1, T=70, channels\], got \[2, 69, 32\]"),
        ("sin", lambda t: t[..., :30], "sin must have an even number of channels, as many as the other"),
    ],
)
def test_what_does_not_fit_is_named(name: str, change: Any, message: str) -> None:
    problem = make(Case())
    with pytest.raises(ValueError, match=message):
        run(problem, **{name: change(getattr(problem, name))})


def test_weights_that_do_not_fit_are_named() -> None:
    router = make(Case()).router
    folded = [*router.query.folded(), *router.key.folded()]
    with pytest.raises(ValueError, match="must multiply to at most 256, got 4 and 128"):
        pack_head_router(*folded, depth=3, arity=100)
    with pytest.raises(ValueError, match=r"query_bias must be float32 of shape \[4, 4\]"):
        pack_head_router(folded[0], folded[1][:2], *folded[2:], depth=4, arity=2)
    with pytest.raises(ValueError, match=r"query_weight must be float32 of shape \[4, 6, 32\]"):
        pack_head_router(folded[0], folded[1], folded[2], *folded[3:], depth=6, arity=2)


def test_it_compiles_to_one_graph() -> None:
    problem = make(Case(length=20))
    compiled = torch.compile(route_heads, fullgraph=True, backend="inductor" if GPU else "eager")
    given = (problem.query, problem.key, problem.cos, problem.sin, pack(problem.router))
    expected = route_heads(*given, keep_logits=True)
    found = compiled(*given, keep_logits=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))  # type: ignore[arg-type]
