"""Leaf distributions, kept mass and gradients against fp64 autograd of the definition; on a GPU or interpreted."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from unittest import mock

import pytest
import torch
from test_kernels import DEVICE, GPU, HALF, nan_in_new_memory, poisoned
from torch import Tensor

from topo_adapter.ops.relaxation import visit_probability
from topo_kernels import leaves as kernels
from topo_kernels.leaves import Rows, kept_gradient, kept_of_values, leaf_distributions, leaf_gradient

# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    arity: int = 2
    depth: int = 4
    length: int = 37
    heads: int = 2
    batch: int = 2
    one_hot: bool = False
    visits: tuple[int, ...] | None = None  # of the heads

    def __str__(self) -> str:
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{name}={value}" for name, value in changed) or "default"


@dataclass(frozen=True)
class Problem:
    """A case made concrete. All float32; the last tensors are gradients of what the kernels return."""

    case: Case
    probs: Tensor  # [B, H, N, L, p]
    weight: Tensor  # [B, N], 0 in padding
    values: Tensor  # [B, H, N, V]
    local: Tensor  # [B, H, N]
    dkept: Tensor  # [L, B, H, N]
    dmean: Tensor  # [H, V]
    dleaves: Tensor  # [B, H, N, V]
    dmeans: Tensor  # as dmean, or [L, H, V] for visits

    @property
    def visits(self) -> Tensor | None:
        visits = self.case.visits
        return None if visits is None else torch.tensor(visits, dtype=torch.int32, device=DEVICE)

    @property
    def real(self) -> Tensor:
        return self.weight[:, None] > 0


def make(case: Case, seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    B, H, N, V = case.batch, case.heads, case.length, case.arity**case.depth
    probs = torch.softmax(2 * torch.randn(B, N, H, case.depth, case.arity), -1).transpose(1, 2)  # as a router's
    if case.one_hot:
        probs = torch.nn.functional.one_hot(probs.argmax(-1), case.arity).float()
    weight = torch.where(torch.rand(B, N) < 0.2, 0.0, torch.rand(B, N) / N)
    values, dleaves = torch.randn(2, B, H, N, V)
    # gradients of means are spread over tokens: this large, they show beside the others
    tensors = probs, weight, values, torch.rand(B, H, N), torch.randn(case.depth, B, H, N)
    dmean = N * torch.randn(H, V)
    dmeans = dmean if case.visits is None else N * torch.randn(case.depth, H, V)
    tensors = *tensors, dmean, dleaves, dmeans
    return Problem(case, *(t.to(DEVICE) for t in tensors))


@contextmanager
def rows(block: int, steps: int) -> Iterator[None]:
    with mock.patch.object(kernels, "choose_rows", lambda _: Rows(block, steps)):
        yield


def leaves_by_definition(probs: Tensor) -> list[Tensor]:
    """`P^d` at the depths `1..L`: the product of the probabilities of a ball's digits."""
    depth, arity = probs.shape[-2:]
    found = []
    for d in range(1, depth + 1):
        ball = torch.arange(arity**d, device=probs.device)
        found.append(torch.stack([probs[..., level, ball // arity**level % arity] for level in range(d)]).prod(0))
    return found


def visited(leaves: Tensor, visits: tuple[int, ...] | None) -> Tensor:
    """`[B, H, N, balls]`, with the probability that a head's visits include a ball in the place of that of one draw."""
    return leaves if visits is None else visit_probability(leaves, visits)


def coarsened(values: Tensor, balls: int) -> Tensor:
    """The sums over the leaves of each ball."""
    index = torch.arange(values.shape[-1], device=values.device) % balls
    return values.new_zeros(*values.shape[:-1], balls).index_add(-1, index, values)


# ---------------------------------------------------------------- running and comparing

NAMES = ("leaves", "mean", "dprobs of the leaves", "kept", "mean again", "dprobs of the kept mass", "dvalues")


def run(
    problem: Problem, dtype: torch.dtype = torch.float32, block: int | None = None, **tensors: Tensor
) -> list[Tensor]:
    """In the order of NAMES; the interpreter takes large tiles, because it pays per tile."""
    x = replace(problem, **tensors)
    block = block or (None if GPU else 32)
    with nullcontext() if block is None else rows(block, 2):
        leaves, mean = leaf_distributions(x.probs, x.weight, dtype, x.visits)
        dleaf_probs = leaf_gradient(x.probs, x.weight, x.dleaves, x.dmean, x.visits)
        kept, again = kept_of_values(x.probs, x.weight, x.values, x.local, x.visits)
        dprobs, dvalues = kept_gradient(x.probs, x.weight, x.values, x.dkept, x.dmeans, dtype, x.visits)
    return [leaves, mean, dleaf_probs, kept, again, dprobs, dvalues]


def formula(problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    """The same from the definition, with autograd, in `dtype`."""
    names = ("probs", "weight", "values", "local", "dkept", "dmean", "dleaves", "dmeans")
    x = replace(problem, **{name: getattr(problem, name).to(dtype) for name in names})
    real = x.real[..., None]
    probs, values = x.probs.clone().requires_grad_(), x.values.clone().requires_grad_()
    leaves = [visited(p.masked_fill(~real, 0.0), x.case.visits) for p in leaves_by_definition(probs)]
    means = [torch.einsum("bhnv,bn->hv", p, x.weight) for p in leaves]
    mean = again = means[-1]
    if x.case.visits is not None:
        leaf = torch.arange(values.shape[-1], device=probs.device)
        again = torch.stack([each[:, leaf % each.shape[-1]] for each in means])
    kept = torch.stack([x.local + (p * coarsened(values, p.shape[-1])).sum(-1) for p in leaves])
    kept = kept.masked_fill(~x.real, 0.0)
    outputs = [leaves[-1], mean]
    (dleaf_probs,) = torch.autograd.grad(outputs, probs, [x.dleaves, x.dmean], retain_graph=True)
    dprobs, dvalues = torch.autograd.grad([kept, again], [probs, values], [x.dkept, x.dmeans])
    return [t.detach() for t in (*outputs, dleaf_probs, kept, again, dprobs, dvalues)]


def check(problem: Problem, found: list[Tensor]) -> None:
    """Within three times the error of the same formula in float32, plus the rounding of what is narrower."""
    exact, same = formula(problem, torch.float64), formula(problem, torch.float32)
    for name, got, right, plain in zip(NAMES, found, exact, same, strict=True):
        assert got.shape == right.shape and got.isfinite().all(), name
        size = float(right.abs().max())
        allowed = 3 * float((plain - right).abs().max()) + 8 * torch.finfo(torch.float32).eps * size
        if got.dtype != torch.float32:
            allowed += torch.finfo(got.dtype).eps * size
        error = float((got.double() - right).abs().max())
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


# fmt: off
DEPTHS = [(2, depth) for depth in range(1, 9)] + [(3, 1), (3, 3), (3, 5), (5, 1), (5, 3), (7, 2), (16, 2), (20, 1)]
# fmt: on


@pytest.mark.parametrize("one_hot", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize(("arity", "depth"), DEPTHS)
def test_matches_autograd(arity: int, depth: int, one_hot: bool) -> None:
    problem = make(Case(arity, depth, length=21 if arity**depth > 32 else 37, one_hot=one_hot))
    check(problem, run(problem))


VISITS = [
    Case(2, 3, length=19, batch=1, heads=4, visits=(2, 8, 1, 3)),
    Case(2, 2, length=9, batch=1, visits=(8, 3), one_hot=True),
    Case(3, 2, length=9, batch=1, visits=(3, 8)),
    Case(2, 1, length=9, visits=(2, 2)),
]


@pytest.mark.parametrize("case", VISITS, ids=str)
def test_visits(case: Case) -> None:
    problem = make(case)
    check(problem, run(problem))


def test_one_visit_changes_no_bit() -> None:
    problem = make(Case(3, 2, length=9, batch=1))
    of_depths = torch.stack([torch.zeros_like(problem.dmean), problem.dmean])
    found = run(replace(problem, case=replace(problem.case, visits=(1, 1))), dmeans=of_depths)
    found[4] = found[4][-1]
    for name, got, right in zip(NAMES, found, run(problem), strict=True):
        assert torch.equal(got, right), name


@pytest.mark.parametrize("probability", [1e-38, 1e-12, 1e-4, 0.3, 1 - 1e-6, 1.0])
def test_visits_lose_no_digits(probability: float) -> None:
    """Of 1 and 8 visits, where `1 - (1 - P)**8` in float32 would keep none of a small probability."""
    probs = torch.tensor([probability, 1 - probability], device=DEVICE).expand(1, 2, 1, 1, 2)
    visits = torch.tensor([1, 8], dtype=torch.int32, device=DEVICE)
    found = leaf_distributions(probs, torch.ones(1, 1, device=DEVICE), torch.float32, visits)[0].double()
    right = visited(probs[..., 0, :].double(), (1, 8))
    assert torch.equal(found[:, 0], right[:, 0])
    assert float((found / right - 1).nan_to_num().abs().max()) < 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 70])
@pytest.mark.parametrize("block", [2, 8])
def test_every_length(length: int, block: int) -> None:
    problem = make(Case(3, 2, length, heads=1, batch=1 if block == 2 else 2), seed=1)
    check(problem, run(problem, block=block))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000, 4097])
@pytest.mark.parametrize(("arity", "depth"), [*DEPTHS, (4, 4), (6, 3), (200, 1), (256, 1)])
def test_matches_autograd_on_gpu(arity: int, depth: int, length: int) -> None:
    problem = make(Case(arity, depth, length, heads=3))
    check(problem, run(problem))


@pytest.mark.parametrize("dtype", [HALF, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_half_precision_output(dtype: torch.dtype) -> None:
    problem = make(Case(depth=6))
    found = run(problem, dtype)
    assert found[0].dtype == found[-1].dtype == dtype and {t.dtype for t in found[1:-1]} == {torch.float32}
    check(problem, found)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (0, 2, 1, 3, 4), (4, 3, 2, 1, 0), (2, 4, 0, 3, 1)], ids=str)
def test_any_strides(order: tuple[int, ...]) -> None:
    """Probabilities as they lie in memory: `order` names their axes from the outermost."""
    problem = make(Case(3, 3))
    inverse = [order.index(axis) for axis in range(5)]
    probs = problem.probs.permute(order).contiguous().permute(inverse)
    assert torch.equal(probs, problem.probs) and probs.permute(order).is_contiguous()
    found = run(problem, probs=probs)
    for got, right in zip(found, run(problem, probs=problem.probs.contiguous()), strict=True):
        assert torch.equal(got, right)
    check(problem, found)


@pytest.mark.parametrize("name", ["probs", "weight", "values", "local", "dkept", "dmean", "dleaves", "dmeans"])
def test_wrong_input_is_noticed(name: str) -> None:
    problem = make(Case(3, 2, visits=(1, 3) if name == "dmeans" else None))
    tensor = getattr(problem, name).clone()
    index = (problem.weight[0] > 0).nonzero()[0, 0]  # a real token
    at = {"dkept": (1, 0, 1, index), "dmean": (1, 4), "dmeans": (0, 1, 4), "weight": (0, index)}
    tensor[at.get(name, (0, 1, index))] += 0.01 * problem.case.length if name.startswith("dmean") else 0.01
    with pytest.raises(AssertionError, match="error"):
        check(problem, run(problem, **{name: tensor}))


def test_wrong_visits_are_noticed() -> None:
    problem = make(Case(2, 2, length=9, batch=1, visits=(2, 3)))
    other = replace(problem, case=replace(problem.case, visits=(3, 2)))
    for name, got, right in zip(NAMES, run(problem), run(other), strict=True):
        assert float((got - right).abs().max()) > 1e-2 * float(right.abs().max()), name


def test_levels_are_not_interchangeable() -> None:
    problem = make(Case(3, 2))
    with pytest.raises(AssertionError, match="error"):
        check(problem, run(problem, probs=problem.probs.flip(3)))


@pytest.mark.parametrize(
    "case",
    [
        Case(3, 3),
        Case(2, 7, length=19),
        Case(2, 2, visits=(1, 3)),
        pytest.param(Case(2, 7, 5000), marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_nothing_outside_is_read(case: Case) -> None:
    """Nor is anything of padding; every entry of every output is written."""
    problem = make(case)
    clean = run(problem)
    real = problem.real[..., None]
    probs = poisoned(problem.probs.masked_fill(~real[..., None], float("nan")))
    tensors = {"values": problem.values, "dleaves": problem.dleaves}
    tensors = {name: tensor.masked_fill(~real, float("nan")) for name, tensor in tensors.items()}
    tensors |= {name: getattr(problem, name).masked_fill(~problem.real, float("nan")) for name in ("local", "dkept")}
    weight, dmean = guarded(problem.weight), guarded(problem.dmean)
    tensors = {name: guarded(tensor) for name, tensor in (tensors | {"dmeans": problem.dmeans}).items()}
    with nan_in_new_memory():
        found = run(problem, probs=probs, weight=weight, dmean=dmean, **tensors)
    for name, got, right in zip(NAMES, found, clean, strict=True):
        assert torch.equal(got, right), name


def guarded(tensor: Tensor) -> Tensor:
    """The same values, contiguous, with NaN before and after."""
    memory = tensor.new_full((tensor.numel() + 1024,), float("nan"))
    return memory[512:-512].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("length", [pytest.param(4099, marks=pytest.mark.gpu), 40])
def test_repeats_are_bitwise_equal(length: int) -> None:
    problem = make(Case(depth=7 if GPU else 3, length=length))
    first = run(problem, HALF)
    for _ in range(250 if GPU else 2):
        for got, right in zip(run(problem, HALF), first, strict=True):
            assert torch.equal(got, right)


@pytest.mark.parametrize("leaves", [2, 3, 49, 128, 243, 256])
def test_rows_of_a_program(leaves: int) -> None:
    """A warp holds a power of two of tokens, and at most eight values of a tile per thread where that is possible."""
    chosen = kernels.choose_rows(leaves)
    assert chosen.block & (chosen.block - 1) == 0 and chosen.block * chosen.steps == 16
    assert chosen.block * leaves <= 256 and (chosen.block == 16 or 2 * chosen.block * leaves > 128)
