"""What the public functions take whole, and how custom operators, which know tensors and numbers only, take it."""

from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor


class LocalPlan(Protocol):
    """Windows and sinks of T queries over S keys. Tensors are int32 and their values trusted: checking would wait.

    local_order: `[B, S]`; local rank -> key, by document and position, padding last. None: the identity, faster.
    document_start, local_start, local_end: `[B, T]`, local ranks. Query `i` sees `local_order[local_start:local_end]`,
        its window, and `local_order[document_start:min(document_start + num_sink_tokens, local_start)]`, its sinks. The
        ranks from there to `local_start` are far. `local_start == local_end` says that the query is padding.
    num_sink_tokens: >= 0.
    """

    @property
    def local_order(self) -> Tensor | None: ...
    @property
    def document_start(self) -> Tensor: ...
    @property
    def local_start(self) -> Tensor: ...
    @property
    def local_end(self) -> Tensor: ...
    @property
    def num_sink_tokens(self) -> int: ...


class Plan(LocalPlan, Protocol):
    """A `LocalPlan` and, for R route heads, the balls: `topo_adapter.ops.plan.Plan` is one.

    query_order, range_start, range_end: int32 `[B, R, m, T]` for m visits, or `[B, R, T]` for one. Of a visit's
        sorted queries the one of rank `i` is `query_order[i]` and sees `key_order[range_start[i]:range_end[i]]`. No
        key is in the ranges of two visits of a query. Queries without such a visit come last, with an empty range.
    key_order: int32 `[B, R, S]`, of all visits.
    """

    @property
    def query_order(self) -> Tensor: ...
    @property
    def range_start(self) -> Tensor: ...
    @property
    def range_end(self) -> Tensor: ...
    @property
    def key_order(self) -> Tensor: ...


class Scoring(Protocol):
    """Scores are `scale * <q, k>`, or `softcap * tanh(scale * <q, k> / softcap)`. Both are > 0, softcap may be None."""

    @property
    def scale(self) -> float: ...
    @property
    def softcap(self) -> float | None: ...


class LocalTensors(NamedTuple):
    """A `LocalPlan` made of its parts."""

    local_order: Tensor | None
    document_start: Tensor
    local_start: Tensor
    local_end: Tensor
    num_sink_tokens: int


class PlanTensors(NamedTuple):
    """A `Plan` made of its parts, those of a `LocalPlan` last."""

    query_order: Tensor
    range_start: Tensor
    range_end: Tensor
    key_order: Tensor
    local_order: Tensor | None
    document_start: Tensor
    local_start: Tensor
    local_end: Tensor
    num_sink_tokens: int


class Scores(NamedTuple):
    """A `Scoring` made of its parts."""

    scale: float
    softcap: float | None


_Parts = TypeVar("_Parts", LocalTensors, PlanTensors)

#: A local plan and a scoring, and a plan and a scoring, in the schema of a custom operator.
FLAT_LOCAL = (
    "Tensor? local_order, Tensor document_start, Tensor local_start, Tensor local_end, SymInt num_sink_tokens, "
    "float scale, float? softcap"
)
FLAT = f"Tensor query_order, Tensor range_start, Tensor range_end, Tensor key_order, {FLAT_LOCAL}"


def flat_local(plan: LocalPlan, scoring: Scoring) -> tuple[Any, ...]:
    """The arguments of `FLAT_LOCAL`."""
    return *(getattr(plan, name) for name in LocalTensors._fields), scoring.scale, scoring.softcap


def flat(plan: Plan, scoring: Scoring) -> tuple[Any, ...]:
    """The arguments of `FLAT`."""
    return *(getattr(plan, name) for name in PlanTensors._fields), scoring.scale, scoring.softcap


def by_visit(plan: PlanTensors) -> list[PlanTensors]:
    """A plan for each visit, whose tree's tensors are `[B, R, T]`; all tensors are contiguous."""
    plan = contiguous(plan)
    if plan.query_order.ndim == 3:
        return [plan]
    parts = plan.query_order, plan.range_start, plan.range_end
    visits = zip(*(part.permute(2, 0, 1, 3).contiguous() for part in parts), strict=True)
    return [plan._replace(query_order=order, range_start=start, range_end=end) for order, start, end in visits]


def contiguous(plan: _Parts) -> _Parts:
    """The plan with contiguous tensors, those that are so already as they are."""
    parts: Any = (part.contiguous() if isinstance(part, Tensor) else part for part in plan)
    return type(plan)(*parts)
