"""Hard attention (torch path) and bridged attention against the fp64 reference, and what both must leave alone."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Any

import pytest
import torch
from helpers import (
    LAYOUTS,
    Problem,
    bridged,
    check_rounding,
    hard,
    largest_error,
    make_problem,
    tree_probability,
    weighted_attention,
    widened,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from topo_adapter.core.layout import contiguous_layout, layout_from_padding
from topo_adapter.core.records import Keys, pack_records
from topo_adapter.core.reference import reference_attention
from topo_adapter.ops import torch_attention
from topo_adapter.ops.attention import decode_attention, hard_attention
from topo_adapter.ops.plan import Plan, make_plan
from topo_adapter.ops.router import RoleDigits, Routes

TIGHT = 1e-12
NOTICED = 1e-3
BRIDGES = ("full", "masked")


def reference(problem: Problem) -> Tensor:
    return reference_attention(problem.q, problem.k, problem.v, problem.visible(), problem.scale)


def changed(problem: Problem, what: str) -> Problem:
    """A problem that differs in one setting or in the first digits of some keys."""
    if what == "window":
        return replace(problem, window=problem.window + 1)
    if what == "sinks":
        return replace(problem, sinks=problem.sinks - 1)
    if what == "depths":
        return replace(problem, depths=problem.depths[::-1])
    digits = problem.routes.key.digits.clone()
    digits[:, :, 4:8, 0] = 1 - digits[:, :, 4:8, 0]
    probs = torch.nn.functional.one_hot(digits, 2).to(problem.q.dtype)
    return replace(problem, routes=Routes(problem.routes.query, RoleDigits(probs, digits)))


CHANGES = ("window", "sinks", "depths", "digit")


def narrowed(problem: Problem) -> Problem:
    return replace(problem, v=problem.v[..., :3].contiguous())


# ---------------------------------------------------------------- the specification itself


def test_reference_by_hand() -> None:
    """Two visible keys with weights 1 : 3, one hidden, and a row that sees nothing."""
    q, v = torch.ones(1, 1, 2, 1), torch.tensor([4.0, 8.0, 1e6])[None, None, :, None]
    k = torch.tensor([0.0, 3.0, 50.0]).log1p()[None, None, :, None].where(torch.tensor([[0], [1], [1]]).bool(), 0.0)
    k[0, 0, 1] = torch.tensor(3.0).log()
    visible = torch.tensor([[True, True, False], [False, False, False]])[None, None]
    out = reference_attention(q, k, v, visible, 1.0)
    assert out.dtype == torch.float64
    assert largest_error(out, torch.tensor([7.0, 0.0], dtype=torch.float64)[None, None, :, None]) < 1e-6


# ---------------------------------------------------------------- hard attention

HARD_CASES: dict[str, Problem] = {
    **{layout: make_problem(layout) for layout in LAYOUTS},
    "whole rows of padding": make_problem("left_padding", batch=4, length=9),
    "one token": make_problem(length=1, batch=1),
    "no grouping": make_problem(kv_heads=4),
    "one key head": make_problem(kv_heads=1, arity=3),
    "one route for two heads": make_problem(depths=(3, 1)),
    "one route for all heads": make_problem(depths=(2,)),
    "only itself": make_problem(window=1, sinks=0, depths=(4, 4, 4, 4)),
    "below the leaves": make_problem("packed", depths=(5, 2, 5, 0)),
    "no sinks": make_problem("packed", sinks=0),
    "more sinks than tokens": make_problem("packed", sinks=40),
    "window of everything": make_problem("middle_padding", window=40),
    "several blocks": make_problem("packed", batch=1, length=300, heads=2, kv_heads=1, depths=(1, 3)),
    "last tokens ask": make_problem("left_padding").asking(slice(-5, None)),
    "one token asks": make_problem("packed").asking(slice(-1, None)),
    "unfilled keys": make_problem("right_padding").asking(slice(12, 18)),
    # MLA: values have another width than queries and keys
    "narrow values": narrowed(make_problem("packed")),
    "narrow values, whole rows of padding": narrowed(make_problem("left_padding", batch=4, length=9)),
}


@pytest.fixture(params=["masked", "masked, balls compared", "sorted", "both"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every route head attends this way, or in turns; fails where another way ran as well."""
    ran = set()
    chosen, _, compared = request.param.partition(", ")
    if compared:
        monkeypatch.setattr(torch_attention, "_TABLE_ENTRIES", 0)
    for name in ("masked", "sorted"):
        attend = getattr(torch_attention, f"{name}_attention")

        def spy(*args: Any, name: str = name, attend: Callable[..., Tensor] = attend) -> Tensor:
            ran.add(name)
            return attend(*args)

        monkeypatch.setattr(torch_attention, f"{name}_attention", spy)

    def choice(plan: Plan, b: int, dtype: torch.dtype) -> Tensor:
        turns = (torch.arange(plan.query_order.shape[1]) + b) % 2 == 1
        return {"masked": turns & False, "sorted": turns | True, "both": turns}[chosen]

    monkeypatch.setattr(torch_attention, "cheaper_sorted", choice)
    yield request.param
    if chosen == "both":
        assert ran
    else:
        assert ran == {chosen}


@pytest.mark.parametrize("name", list(HARD_CASES))
def test_hard_attention_is_exact(name: str, way: str) -> None:
    problem = HARD_CASES[name]
    out = hard(problem)
    assert out.dtype == torch.float64
    assert largest_error(out, reference(problem)) <= TIGHT
    assert not out[~problem.query.real[:, None].expand(out.shape[:3])].any(), "rows of padding must be exactly 0"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["plain", "middle_padding", "packed"])
def test_hard_attention_in_low_precision(layout: str, dtype: torch.dtype, way: str) -> None:
    problem = make_problem(layout, length=140, dtype=dtype)
    same_dtype = weighted_attention(problem, problem.visible().to(dtype))
    check_rounding(hard(problem), same_dtype, reference(problem))


@pytest.mark.parametrize("attend", [hard, lambda problem: bridged(problem, 1.0)], ids=["hard", "bridged"])
def test_scores_beyond_float16(attend: Callable[[Problem], Tensor]) -> None:
    """8 * 100^2 > 65504. All scores are equal, so the output is that of zero scores."""
    problem = make_problem("packed", dtype=torch.float16)
    zero = replace(problem, q=torch.zeros_like(problem.q))
    large = replace(problem, q=torch.full_like(problem.q, 100), k=torch.full_like(problem.k, 100))
    assert (large.q @ large.q.transpose(-1, -2)).isinf().all()
    check_rounding(attend(large), weighted_attention(zero, zero.visible().half()), reference(zero))


@pytest.mark.parametrize("layout", ["plain", "packed"])
@pytest.mark.parametrize("softcap", [0.5, 5.0])
def test_hard_attention_with_a_softcap(layout: str, softcap: float) -> None:
    problem = make_problem(layout)
    exact = weighted_attention(problem, problem.visible().double(), softcap)
    assert largest_error(hard(problem, softcap), exact) <= TIGHT
    assert largest_error(hard(problem), exact) > NOTICED


@pytest.mark.parametrize("what", CHANGES)
def test_a_wrong_plan_is_noticed(what: str, way: str) -> None:
    problem = make_problem("packed")
    assert largest_error(hard(changed(problem, what)), reference(problem)) > NOTICED


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("depths", [(0, 2, 1, 4), (3, 5)], ids=str)
def test_several_visits_are_exact(layout: str, depths: tuple[int, ...], way: str) -> None:
    """Each key counts once, and a visit to nowhere sees nothing."""
    problem = make_problem(layout, batch=3, length=40, depth=4, depths=depths, visits=3)
    balls = problem.balls()[0]
    assert (balls < 0).any() and (balls[:, :, 1:] >= 0).any()
    exact = reference(problem)
    assert largest_error(hard(problem), exact) <= TIGHT
    if way == "sorted":  # softcaps are
        capped = weighted_attention(problem, problem.visible().double(), 1.0)
        assert largest_error(hard(problem, 1.0), capped) <= TIGHT
    for bridge in BRIDGES:
        assert largest_error(bridged(problem, 1.0, bridge, routed=False), exact) <= TIGHT
    for count in (1, 4):
        assert largest_error(decode(problem, count), exact[:, :, -count:]) <= TIGHT
    assert largest_error(hard(replace(problem, more_visits=None)), exact) > NOTICED


def test_queries_of_several_blocks_that_see_little(way: str) -> None:
    """Far keys are hidden in whole tiles of the kernel, which no maximum of scores may come from."""
    problem = make_problem(
        "packed", batch=1, length=1300, heads=2, kv_heads=1, dim=16, depths=(5, 4), window=2, sinks=0
    )
    long = replace(problem, query=contiguous_layout(1, 1300), key=contiguous_layout(1, 1300))
    for one in (problem, long):
        assert largest_error(hard(one), reference(one)) <= TIGHT


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_texts(length: int, way: str) -> None:
    problem = make_problem(length=length)
    assert largest_error(hard(problem), reference(problem)) <= TIGHT


def test_the_way_is_chosen_by_route() -> None:
    """Short texts and heads that see much go under a mask, heads that see little of a long text are sorted."""
    settings: dict[str, Any] = {"batch": 1, "heads": 2, "kv_heads": 1, "depth": 8, "depths": (0, 8), "window": 16}
    short, long = (make_problem(length=n, dtype=torch.float32, **settings).plan() for n in (200, 6000))
    assert torch_attention.cheaper_sorted(short, 0, torch.float32).tolist() == [False, False]
    assert torch_attention.cheaper_sorted(long, 0, torch.float32).tolist() == [False, True]
    costs_more = make_problem(length=4500, dtype=torch.float32, **settings).plan()  # of what bfloat16 halves
    choices = {
        dtype: torch_attention.cheaper_sorted(costs_more, 0, dtype)[1] for dtype in (torch.float32, torch.bfloat16)
    }
    assert choices[torch.float32] and not choices[torch.bfloat16]


def test_gradients_and_softcap_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's fused kernel has no softcap, and its gradient under a mask would keep a mask for every block."""
    monkeypatch.setattr(torch_attention, "masked_attention", None)
    problem = make_problem()
    assert hard(problem, softcap=1.0).isfinite().all()
    out = hard(replace(problem, q=problem.q.clone().requires_grad_()))
    assert out.requires_grad and largest_error(out, reference(problem)) <= TIGHT
    with pytest.raises(TypeError, match="NoneType"):
        hard(problem)


@pytest.mark.parametrize("depths", [(0, 0), (0, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_make_plan_without_kernels(depths: tuple[int, int], dtype: torch.dtype) -> None:
    """Plain rows need no order of keys; dense ones are torch's causal attention, gradients included."""
    problem = make_problem(depths=depths, dtype=dtype)
    plan = make_plan(problem.visibility())
    assert plan.local_order is None and plan.dense == (not any(depths))
    assert torch.equal(plan.visible_count(), problem.plan().visible_count())
    same_dtype = weighted_attention(problem, problem.visible().to(dtype))

    def attend(problem: Problem) -> Tensor:
        return hard_attention(problem.q, problem.k, problem.v, plan, problem.scoring())

    check_rounding(attend(problem), same_dtype, reference(problem))
    if dtype == torch.float64:
        for got, exact in zip(gradients(attend, problem), gradients(reference, problem), strict=True):
            assert largest_error(got, exact) <= TIGHT


def gradients(attend: Callable[[Problem], Tensor], problem: Problem) -> list[Tensor]:
    """Of a fixed random functional of the output, with respect to q, k and v."""
    inputs = [x.clone().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out = attend(replace(problem, q=inputs[0], k=inputs[1], v=inputs[2]))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(torch.autograd.grad((out * weights).sum(), inputs))


@pytest.mark.parametrize(
    "name", ["plain", "middle_padding", "packed", "only itself", "several blocks", "last tokens ask"]
)
def test_hard_attention_gradients(name: str) -> None:
    problem = HARD_CASES[name]
    expected = gradients(reference, problem)
    for got, exact in zip(gradients(hard, problem), expected, strict=True):
        assert largest_error(got, exact) <= TIGHT
    wrong = gradients(hard, replace(problem, depths=tuple(1 - min(d, 1) for d in problem.depths)))
    assert max(largest_error(got, exact) for got, exact in zip(wrong, expected, strict=True)) > NOTICED


# ---------------------------------------------------------------- a few new tokens over a cache


def decode(problem: Problem, count: int, softcap: float | None = None) -> Tensor:
    """The last tokens of a problem whose routes are the `R` query heads, the others cached."""
    last = problem.asking(slice(-count, None))
    visibility = last.visibility()
    records = pack_records(visibility.keys.address, problem.key, problem.arity**visibility.rule.levels)
    return decode_attention(
        last.q, last.k, last.v, replace(visibility, keys=Keys(records=records)), last.scoring(softcap)
    )


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("depths", [(0, 2, 1, 5), (3, 1), (2,)], ids=str)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_decoding_is_exact(layout: str, depths: tuple[int, ...], count: int) -> None:
    problem = make_problem(layout, batch=3, depths=depths)
    out, exact = decode(problem, count), reference(problem)[:, :, -count:]
    assert largest_error(out, exact) <= TIGHT
    assert not out[~problem.query.real[:, None, -count:].expand(out.shape[:3])].any(), "rows of padding are 0"
    capped = weighted_attention(problem, problem.visible().double(), 0.5)[:, :, -count:]
    assert largest_error(decode(problem, count, softcap=0.5), capped) <= TIGHT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["plain", "left_padding"])
def test_decoding_in_low_precision(layout: str, dtype: torch.dtype) -> None:
    problem = make_problem(layout, length=140, dtype=dtype)
    same_dtype, exact = weighted_attention(problem, problem.visible().to(dtype)), reference(problem)
    check_rounding(decode(problem, 4), same_dtype[:, :, -4:], exact[:, :, -4:])


@pytest.mark.parametrize("softcap", [None, 1.0])
@pytest.mark.parametrize("name", ["k", "v"])
def test_decoding_reads_no_padding(name: str, softcap: float | None) -> None:
    """NaN in padding and unfilled slots stays there: a mask alone lets `0 * NaN` through."""
    problem = make_problem("left_padding", batch=3, length=12)
    tensor = getattr(problem, name).clone()
    tensor[~problem.key.real[:, None].expand(tensor.shape[:3])] = float("nan")
    assert tensor.isnan().any()
    assert torch.equal(decode(replace(problem, **{name: tensor}), 2, softcap), decode(problem, 2, softcap))


# ---------------------------------------------------------------- bridged attention


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_polarised_routes_in_full_force_are_the_hard_topology(layout: str, bridge: str) -> None:
    problem = make_problem(layout, one_hot=True)
    exact = reference(problem)
    assert largest_error(bridged(problem, 1.0, bridge), exact) <= TIGHT
    assert largest_error(bridged(problem, 1.0, bridge, routed=False), exact) <= TIGHT
    assert largest_error(bridged(problem, 1.0, bridge, block=7), exact) <= TIGHT
    for what in CHANGES:
        assert largest_error(bridged(changed(problem, what), 1.0, bridge), exact) > NOTICED


@pytest.mark.parametrize("bridge", ["full", "masked"])
def test_the_forward_is_hard_for_soft_routes_too(bridge: str) -> None:
    problem = make_problem("packed")
    assert largest_error(bridged(problem, 1.0, bridge), reference(problem)) <= TIGHT


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_homotopy_0_is_dense(layout: str, bridge: str) -> None:
    problem = make_problem(layout)
    dense = reference_attention(problem.q, problem.k, problem.v, problem.causal(), problem.scale)
    assert largest_error(bridged(problem, 0.0, bridge), dense) <= TIGHT
    assert largest_error(bridged(problem, 0.1, bridge), dense) > NOTICED


def weights_by_definition(problem: Problem, homotopy: float) -> Tensor:
    """`1 - c + c m`, with `m` 1 for visible pairs and 0 for others."""
    return 1 - homotopy + homotopy * problem.visible().double()


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize("homotopy", [0.25, 0.9, 1.0])
@pytest.mark.parametrize("layout", ["plain", "middle_padding", "packed", "interleaved"])
def test_weights_are_multiplied_and_renormalised(layout: str, homotopy: float, bridge: str) -> None:
    problem = make_problem(layout)
    exact = weighted_attention(problem, weights_by_definition(problem, homotopy))
    assert largest_error(bridged(problem, homotopy, bridge), exact) <= TIGHT
    assert largest_error(bridged(problem, homotopy - 0.1, bridge), exact) > NOTICED


def test_bridged_attention_with_a_softcap() -> None:
    problem = make_problem("packed")
    exact = weighted_attention(problem, weights_by_definition(problem, 0.5), softcap=1.0)
    assert largest_error(bridged(problem, 0.5, softcap=1.0), exact) <= TIGHT
    assert largest_error(bridged(problem, 0.5), exact) > NOTICED


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bridged_attention_in_low_precision(dtype: torch.dtype, bridge: str) -> None:
    problem = make_problem("packed", length=60, dtype=dtype)
    wide = widened(problem)
    weight = weights_by_definition(wide, 0.7)
    check_rounding(
        bridged(problem, 0.7, bridge), weighted_attention(problem, weight.to(dtype)), weighted_attention(wide, weight)
    )


def test_a_huge_hidden_score_does_not_drown_the_visible_ones() -> None:
    """The softmax shift comes from keys that carry weight: e^300 over a hidden key would underflow all others."""
    problem = make_problem(dtype=torch.float32, one_hot=True, window=1, sinks=0)
    k = problem.k.clone()
    k[:, :, 0] *= 300
    problem = replace(problem, k=k)
    exact = reference(problem)
    naive = weighted_attention(problem, problem.visible().float())
    assert largest_error(naive.double(), exact) > NOTICED, "all dense mass of some rows is on the hidden key"
    for bridge in BRIDGES:
        check_rounding(bridged(problem, 1.0, bridge), hard(problem), exact)


# ---------------------------------------------------------------- properties of every path

PATHS: dict[str, Callable[[Problem], Tensor]] = {
    "hard": hard,
    "full force": lambda problem: bridged(problem, 1.0),
    "halfway": lambda problem: bridged(problem, 0.5, "masked"),
    "dense": lambda problem: bridged(problem, 0.0),
}
paths = pytest.mark.parametrize("attend", PATHS.values(), ids=list(PATHS))


def redrawn(problem: Problem, tokens: slice) -> Problem:
    """Other q, k, v, probabilities and digits at some tokens."""
    other = make_problem(seed=99)
    mixed = []
    for mine, new in zip(
        (problem.q, problem.k, problem.v, *problem.routes.query, *problem.routes.key),
        (other.q, other.k, other.v, *other.routes.query, *other.routes.key),
        strict=True,
    ):
        mixed.append(mine.clone())
        mixed[-1][:, :, tokens] = new[:, :, tokens]
    q, k, v, *roles = mixed
    return replace(problem, q=q, k=k, v=v, routes=Routes(RoleDigits(*roles[:3]), RoleDigits(*roles[3:])))


@paths
@pytest.mark.parametrize("layout", ["plain", "left_padding", "packed"])
def test_the_future_moves_nothing(layout: str, attend: Callable[[Problem], Tensor]) -> None:
    problem = make_problem(layout)
    before = attend(problem)
    after = attend(redrawn(problem, slice(15, None)))
    assert largest_error(after[:, :, :15], before[:, :, :15]) <= TIGHT
    assert largest_error(after[:, :, 15:], before[:, :, 15:]) > NOTICED
    past = attend(redrawn(problem, slice(0, 15)))
    assert largest_error(past[:, :, 15:], before[:, :, 15:]) > NOTICED


@paths
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "plain"])
def test_every_document_is_as_if_alone(layout: str, attend: Callable[[Problem], Tensor]) -> None:
    """Packed == separate, padded == unpadded."""
    problem = make_problem(layout)
    together = attend(problem)
    as_one = attend(replace(problem, query=contiguous_layout(2, 24), key=contiguous_layout(2, 24)))
    assert largest_error(as_one, together) > NOTICED
    seen = 0
    for row, (document, real) in enumerate(zip(problem.key.document, problem.key.real, strict=True)):
        for label in document[real].unique():
            tokens = ((document == label) & real).nonzero()[:, 0]
            alone = attend(problem.alone(row, tokens))
            assert largest_error(together[row : row + 1, :, tokens], alone) <= TIGHT
            seen += tokens.numel()
    assert seen == int(problem.key.real.sum()) > 0


@paths
def test_padding_is_zero_and_its_content_is_ignored(attend: Callable[[Problem], Tensor]) -> None:
    problem = make_problem("right_padding")
    out = attend(problem)
    assert not out[:, :, 18:].any() and out[:, :, :18].any()
    assert torch.equal(attend(redrawn(problem, slice(18, None))), out)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_hard_attention_reads_no_padding(name: str, way: str) -> None:
    """As the kernels: NaN in padding stays there, even if a document is shorter than the number of sinks."""
    problem = make_problem("right_padding", length=8, sinks=9, window=1)
    tensor = getattr(problem, name).clone()
    tensor[:, :, 6:] = float("nan")
    assert torch.equal(hard(replace(problem, **{name: tensor})), hard(problem))


def test_rows_without_any_token() -> None:
    nothing = layout_from_padding(torch.zeros(2, 24, dtype=torch.bool))
    problem = replace(make_problem(), query=nothing, key=nothing)
    for attend in PATHS.values():
        assert torch.equal(attend(problem), torch.zeros_like(problem.q))


# ---------------------------------------------------------------- memory


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns, backward included."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, value, trace)
        assert self.numel > 0, "nothing was recorded"


def test_hard_attention_makes_no_square_tensor(way: str) -> None:
    n = 4096
    problem = make_problem(
        batch=1, length=n, heads=1, kv_heads=1, depth=3, depths=(3,), window=16, sinks=4, dtype=torch.float32
    )
    with LargestTensor() as largest, torch.no_grad():
        out = hard(problem)
    assert out.isfinite().all()
    assert largest.numel < n * n / 4
    with LargestTensor() as square, torch.no_grad():
        problem.visible()
    assert square.numel >= n * n


@pytest.mark.parametrize("learning", [False, True])
def test_sinks_beyond_the_text_cost_nothing(learning: bool, way: str) -> None:
    few, many = (make_problem("packed", length=200, batch=1, sinks=n, dtype=torch.float32) for n in (200, 2**31 - 1))
    sizes = []
    for problem in (few, many):
        q = problem.q.clone().requires_grad_(learning and way == "sorted")
        with LargestTensor() as largest:
            out = hard(replace(problem, q=q))
        assert largest_error(out, reference(few)) < 1e-5
        sizes.append(largest.numel)
    assert sizes[0] == sizes[1] <= 4 * 200 * 200


@pytest.mark.parametrize("bridge", BRIDGES)
def test_bridged_attention_makes_no_tensor_per_pair_and_level(bridge: str) -> None:
    n, depth = 256, 6
    problem = make_problem(
        batch=1, length=n, heads=1, kv_heads=1, depth=depth, depths=(depth,), window=4, dtype=torch.float32
    )
    q = problem.q.clone().requires_grad_()
    probs = problem.routes.query.probs.clone().requires_grad_()
    query = problem.routes.query._replace(probs=probs)
    with LargestTensor() as largest:
        bridged(
            replace(problem, q=q, routes=problem.routes._replace(query=query)), 0.5, bridge, block=64
        ).sum().backward()
    assert q.grad.any() and probs.grad.any()
    assert largest.numel <= 64 * n, "one block of queries"
    with LargestTensor() as naive:
        tree_probability(problem)
    assert naive.numel >= n * n * depth
