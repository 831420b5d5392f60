"""Layouts, problems and slow oracles that several test files share."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from topo_adapter.core.layout import (
    SequenceLayout,
    causal_pairs,
    contiguous_layout,
    layout_from_padding,
    layout_from_position_ids,
)
from topo_adapter.core.records import Keys
from topo_adapter.core.rule import Rule
from topo_adapter.core.scoring import Scoring
from topo_adapter.core.tree import address_to_digits
from topo_adapter.core.visibility import Visibility, per_head
from topo_adapter.ops.attention import hard_attention
from topo_adapter.ops.plan import Plan, build_plan
from topo_adapter.ops.relaxation import bridged_attention
from topo_adapter.ops.router import RoleDigits, Routes

# ---------------------------------------------------------------- layouts


def packed(batch: int, length: int) -> SequenceLayout:
    """Documents of 1 token to two thirds of the row, other ones in each row."""
    rows = []
    for _ in range(batch):
        sizes: list[int] = []
        while sum(sizes) < length:
            sizes.append(int(torch.randint(1, max(2, 2 * length // 3), ())))
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


def right_padding(batch: int, length: int) -> SequenceLayout:
    """The last quarter; as keys, the slots of a static cache that are not written yet."""
    return layout_from_padding((torch.arange(length) < length - length // 4).expand(batch, length))


LAYOUTS = {
    "plain": contiguous_layout,
    "left_padding": left_padding,
    "middle_padding": middle_padding,
    "right_padding": right_padding,
    "packed": packed,
    "relabelled": relabelled,
    "interleaved": interleaved,
}

# ---------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """Queries, keys, values and routes of one attention layer, and everything that decides what is visible."""

    q: Tensor
    k: Tensor
    v: Tensor
    routes: Routes
    query: SequenceLayout
    key: SequenceLayout
    arity: int
    depths: tuple[int, ...]
    window: int
    sinks: int
    more_visits: Tensor | None = None  # `[B, R, m - 1, T]`, beside the query's own address; one of each ball counts
    dense_until: int = 0

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def scoring(self, softcap: float | None = None) -> Scoring:
        return Scoring(self.scale, softcap)

    def visibility(self) -> Visibility:
        query, key = (role.address(self.arity) for role in self.routes)
        depths = [depth for depth in self.depths for _ in range(self.q.shape[1] // len(self.depths))]
        visits = query[:, :, None]
        if self.more_visits is not None:
            visits = torch.cat([visits, self.more_visits], 2)
            sizes = torch.tensor([self.arity**depth for depth in self.depths], device=visits.device)
            visits = without_repeats(torch.where(visits < 0, -1, visits % sizes[:, None, None]), visits)
        return Visibility(
            visits,
            self.query,
            Keys(key, self.key),
            Rule(
                self.arity,
                self.routes.query.probs.shape[-2],
                tuple(depths),
                query.shape[1],
                self.window,
                self.sinks,
                (visits.shape[2],) * len(depths),
                self.dense_until,
            ),
        )

    def balls(self) -> tuple[Tensor, Tensor]:
        """Query and key balls `[B, R, m, T]`, `[B, R, S]` at the visible depth of each route."""
        return self.visibility().balls()

    def visible(self) -> Tensor:
        """Section 2's mask for each of the `H` query heads."""
        return per_head(self.visibility().mask(), self.q.shape[1])

    def causal(self) -> Tensor:
        return causal_pairs(self.query, self.key)[:, None].expand(-1, self.q.shape[1], -1, -1)

    def plan(self) -> Plan:
        return build_plan(*self.balls(), self.query, self.key, self.window, self.sinks, self.dense_until)

    def asking(self, rows: slice) -> "Problem":
        """Only some tokens ask; all stay keys."""
        query = RoleDigits(*(x[:, :, rows] for x in self.routes.query))
        layout = SequenceLayout(self.query.document[:, rows], self.query.position[:, rows])
        more = None if self.more_visits is None else self.more_visits[..., rows]
        routes = Routes(query, self.routes.key)
        return replace(self, q=self.q[:, :, rows], routes=routes, query=layout, more_visits=more)

    def alone(self, row: int, tokens: Tensor) -> "Problem":
        """Some tokens of one row as a batch of their own, one document without padding."""
        query, key = (RoleDigits(*(x[row : row + 1, :, tokens] for x in role)) for role in self.routes)
        q, k, v = (x[row : row + 1, :, tokens] for x in (self.q, self.k, self.v))
        layout = contiguous_layout(1, tokens.numel())
        more = None if self.more_visits is None else self.more_visits[row : row + 1, ..., tokens]
        return replace(self, q=q, k=k, v=v, routes=Routes(query, key), query=layout, key=layout, more_visits=more)


def without_repeats(balls: Tensor, visits: Tensor | None = None) -> Tensor:
    """Visits `[B, R, m, T]` (None: their balls), -1 where an earlier one of the query is to the same ball."""
    again = torch.zeros_like(balls, dtype=torch.bool)
    for visit in range(1, balls.shape[2]):
        again[:, :, visit] = (balls[:, :, :visit] == balls[:, :, visit, None]).any(2)
    return (balls if visits is None else visits).masked_fill(again, -1)


def random_role(shape: tuple[int, ...], arity: int, dtype: torch.dtype, one_hot: bool) -> RoleDigits:
    probs = torch.softmax(2 * torch.randn(*shape, arity, dtype=dtype), -1)
    digits = probs.argmax(-1)
    hard = torch.nn.functional.one_hot(digits, arity).to(dtype)
    return RoleDigits(hard if one_hot else probs, digits, probs.log())


def make_problem(
    layout: str = "plain",
    *,
    batch: int = 2,
    length: int = 24,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    arity: int = 2,
    depth: int = 4,
    depths: tuple[int, ...] = (0, 2, 1, 4),
    window: int = 3,
    sinks: int = 2,
    dtype: torch.dtype = torch.float64,
    one_hot: bool = False,
    visits: int = 1,
    dense_until: int = 0,
    seed: int = 0,
) -> Problem:
    """One route per entry of `depths`; q, k and v are normal in `dtype`, probabilities at least float32."""
    torch.manual_seed(seed)
    tokens = LAYOUTS[layout](batch, length)
    wide = torch.promote_types(dtype, torch.float32)
    query, key = (random_role((batch, len(depths), length, depth), arity, wide, one_hot) for _ in range(2))
    q, k, v = (torch.randn(batch, h, length, dim, dtype=wide).to(dtype) for h in (heads, kv_heads, kv_heads))
    more = None
    if visits > 1:  # some of them nowhere
        shape = batch, len(depths), visits - 1, length
        more = torch.randint(arity**depth, shape).masked_fill(torch.rand(shape) < 0.2, -1)
    return Problem(q, k, v, Routes(query, key), tokens, tokens, arity, depths, window, sinks, more, dense_until)


def of_visit(plan: Plan, visit: int) -> Plan:
    """The tree pass of one visit alone, its tensors `[B, R, T]`."""
    names = ("query_order", "range_start", "range_end")
    return replace(plan, **{name: getattr(plan, name)[:, :, visit] for name in names})


# ---------------------------------------------------------------- the attention under test


def hard(problem: Problem, softcap: float | None = None) -> Tensor:
    return hard_attention(problem.q, problem.k, problem.v, problem.plan(), problem.scoring(softcap))


def bridged(*arguments: Any, **settings: Any) -> Tensor:
    """The output of `bridged_and_far_pairs` alone."""
    return bridged_and_far_pairs(*arguments, **settings)[0]


def bridged_and_far_pairs(
    problem: Problem,
    homotopy: float,
    bridge: Literal["full", "masked"] = "full",
    softcap: float | None = None,
    routed: bool = True,
    block: int = 256,
) -> tuple[Tensor, Tensor]:
    return bridged_attention(
        problem.q,
        problem.k,
        problem.v,
        problem.routes if routed else None,
        problem.visibility(),
        problem.scoring(softcap),
        homotopy=homotopy,
        bridge=bridge,
        block=block,
    )


# ---------------------------------------------------------------- oracles


def dense_probs(problem: Problem, softcap: float | None = None) -> Tensor:
    """Causal softmax `[B, H, T, S]` in the dtype of q; rows of padding are 0."""
    group = problem.q.shape[1] // problem.k.shape[1]
    scores = problem.q @ problem.k.repeat_interleave(group, 1).transpose(-1, -2) * problem.scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = ~problem.causal()
    # padding rows are all hidden: a finite fill keeps their gradient finite too
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden, 0.0)


def weighted_attention(problem: Problem, weight: Tensor, softcap: float | None = None) -> Tensor:
    """The dense probabilities times `weight` `[B, H, T, S]`, renormalised (method.md, section 3)."""
    probs = dense_probs(problem, softcap) * weight
    total = probs.sum(-1, keepdim=True)
    values = problem.v.repeat_interleave(problem.q.shape[1] // problem.v.shape[1], 1)
    return probs / total.masked_fill(total == 0, 1.0) @ values


def tree_probability(problem: Problem) -> Tensor:
    """`S_ij` `[B, H, T, S]` as the product over levels of inner products: section 4's definition.

    With several visits as the sum over balls, one by one, of the probability that a visit and the key are in it.
    """
    query, key = (role.probs for role in problem.routes)
    if problem.more_visits is not None:
        visits, shared = 1 + problem.more_visits.shape[2], []
        for h, depth in enumerate(problem.depths):
            inside = depth <= query.shape[-2]
            total = query.new_zeros(*query.shape[:1], query.shape[2], key.shape[2])
            for digits in address_to_digits(torch.arange(problem.arity**depth), problem.arity, depth) if inside else ():
                levels = torch.arange(depth)
                in_query, in_key = (x[:, h, :, levels, digits].prod(-1) for x in (query, key))
                total = total + (1 - (1 - in_query) ** visits)[:, :, None] * in_key[:, None]
            shared.append(total)
        return torch.stack(shared, 1)
    same = torch.einsum("bhtlc,bhslc->bhtsl", query, key)
    levels = same.shape[-1]
    shared = [same[:, h, ..., :depth].prod(-1) * (depth <= levels) for h, depth in enumerate(problem.depths)]
    return torch.stack(shared, 1)


def widened(problem: Problem) -> Problem:
    """The same numbers in float64."""
    q, k, v = (x.double() for x in (problem.q, problem.k, problem.v))
    query, key = (RoleDigits(role.probs.double(), role.digits) for role in problem.routes)
    return replace(problem, q=q, k=k, v=v, routes=Routes(query, key))


def largest_error(out: Tensor, exact: Tensor) -> float:
    """NaN compares with nothing, so both must be finite."""
    assert out.shape == exact.shape and out.isfinite().all() and exact.isfinite().all()
    return float((out - exact).detach().abs().max())


def check_rounding(out: Tensor, same_dtype: Tensor, exact: Tensor) -> None:
    """`out` errs at most twice as much as plain attention in the same dtype, plus a rounding floor."""
    assert out.dtype == same_dtype.dtype and exact.dtype == torch.float64
    rounded = exact.to(out.dtype)
    floor = 2 * largest_error(rounded + 0.3 - 0.3, rounded)
    found, allowed = largest_error(out, exact), 2 * largest_error(same_dtype, exact) + floor
    assert found <= allowed, f"error {found:.3e}, allowed {allowed:.3e}"
