"""From balls to a plan: sorted orders and contiguous key ranges (docs/method.md, section 6).

Keys are sorted by (document, ball, position) or (ball, document, position). A query's tree keys - same document, same
ball, at least `local_window` tokens back, no sinks - are then one contiguous range, empty for queries at positions
below `dense_until`. The local pass covers exactly the rest: a contiguous range of the keys sorted by (document,
position), plus the sinks of the query's document that lie before that range. The two are disjoint, so merging them by
log-sum-exp counts no key twice. O(N log N) time, O(N) memory, no host synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..core.layout import SequenceLayout
from ..core.visibility import Visibility, per_head
from .backend import kernels_serve

_EXCLUDED = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class LocalPlan:
    """What windows and sinks need: nothing of the routes, so all layers of a forward share it. int32 tensors.

    Attributes:
        order: `[B, S]`; local rank -> key index: real keys by (document, position), padding last. None where the rows
            are known to be plain (one document, no padding): then it is the identity.
        document_start, start, end: `[B, T]`; local ranks. A query sees `[start, end)` (its window, or all) and
            `[document_start, min(document_start + sinks, start))`.
        tree_queries: `[B, T]`; the real queries by local rank, then -1 for each padding query; None if plain.
        tree_keys: `[B, S]`; local rank -> key index, -1 for sinks and padding; None if plain.
    """

    order: Tensor | None
    document_start: Tensor
    start: Tensor
    end: Tensor
    tree_queries: Tensor | None
    tree_keys: Tensor | None


@dataclass(frozen=True)
class Plan:
    """What the hard attention executes. All tensors are int32; `R` is the number of route heads, `m` of visits.

    Tree pass, in sorted query order of each visit; no two visits of a query are to one ball:
        query_order: `[B, R, m, T]`; sorted rank -> query index. Padding queries come last, as their index or -1.
        range_start, range_end: `[B, R, m, T]`; the sorted query's keys are `key_order[start:end]`.
        key_order: `[B, R, S]`; sorted rank -> key index. What follows the keys of the tree is in no range.
    Local pass, in original query order, shared by all heads: see `LocalPlan`.

    dense: known on the host that every query sees every key up to its own, as in plain causal attention.
    """

    query_order: Tensor
    range_start: Tensor
    range_end: Tensor
    key_order: Tensor
    local_order: Tensor | None
    document_start: Tensor
    local_start: Tensor
    local_end: Tensor
    num_sink_tokens: int
    dense: bool = False

    def far_count(self) -> Tensor:
        """float64 `[R]`: pairs that the tree alone makes visible, of each route head, summed over the batch."""
        return (self.range_end - self.range_start).sum((0, 2, 3), dtype=torch.float64)

    def visible_count(self) -> Tensor:
        """float64 `[R]`: visible pairs of each route head, summed over the batch."""
        window = self.local_end - self.local_start
        sinks = (self.local_start - self.document_start).clamp(max=self.num_sink_tokens)
        return self.far_count() + (window + sinks).sum(dtype=torch.float64)

    def causal_count(self) -> Tensor:
        """float64 scalar: causal pairs of the batch, the denominator of density."""
        return (self.local_end - self.document_start).sum(dtype=torch.float64)


def make_plan(visibility: Visibility) -> Plan:
    """The plan of a forward, by counting sort in Triton on a GPU and by sorting in torch elsewhere.

    Within a document positions must be distinct.
    """
    query, key = visibility.query, visibility.keys.layout
    rule = visibility.rule
    local, sizes = local_plan(query, key, *rule.always), rule.ball_sizes
    if max(sizes) == 1 and local.order is None:
        return _dense_plan(visibility.visits, len(sizes), local, rule.num_sink_tokens)
    if not kernels_serve("plan", visibility.visits, visits=rule.most_visits):
        tree = _sorted_tree(*visibility.balls(), query, key, *rule.always)
        return _joined(tree, local, rule.num_sink_tokens)
    return _joined(_kernels_tree(visibility, local), local, rule.num_sink_tokens)


def _kernels_tree(visibility: Visibility, local: LocalPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_sorted_tree`, in Triton: each visit of a route is sorted as a route of its own."""
    from topo_kernels import tree_plan

    rule, visits, sizes = visibility.rule, visibility.route_visits().int(), visibility.rule.ball_sizes
    address, modulo = per_head(visibility.keys.address, len(sizes)).int(), rule.sizes_on(visits.device)
    many = visits.shape[2]
    if many > 1:
        address = address[:, :, None].expand(-1, -1, many, -1).flatten(1, 2)
        modulo = modulo.repeat_interleave(many)
    *first, key_order = tree_plan(
        visits.flatten(1, 2),
        address,
        modulo,
        local.start,
        None if local.order is None else local.document_start,
        local.tree_queries,
        local.tree_keys,
        max_balls=max(sizes),
        num_sink_tokens=rule.num_sink_tokens,
    )
    query_order, start, end = (x.unflatten(1, (-1, many)) for x in first)
    return query_order, start, end, key_order[:, ::many]


def _joined(
    tree: tuple[Tensor, Tensor, Tensor, Tensor], local: LocalPlan, num_sink_tokens: int, dense: bool = False
) -> Plan:
    """A plan from `query_order`, `range_start`, `range_end`, `key_order` and what all layers share."""
    return Plan(*tree, local.order, local.document_start, local.start, local.end, num_sink_tokens, dense)


def _dense_plan(visits: Tensor, routes: int, local: LocalPlan, num_sink_tokens: int) -> Plan:
    """What sorting plain rows of one ball would give, without sorting."""
    shape = visits.shape[0], routes, 1, visits.shape[3]  # further visits are to the same ball
    order = torch.arange(shape[3], dtype=torch.int32, device=visits.device)
    end = (local.start - num_sink_tokens).clamp(min=0)[:, None, None].expand(shape)
    key_order = torch.where(order + num_sink_tokens < order.numel(), order + num_sink_tokens, 0)
    tree = order.expand(shape), torch.zeros_like(end), end, key_order.expand(*shape[:2], -1)
    return _joined(tree, local, num_sink_tokens, dense=True)


def build_plan(
    query_balls: Tensor,
    key_ball: Tensor,
    query: SequenceLayout,
    key: SequenceLayout,
    local_window: int,
    num_sink_tokens: int,
    dense_until: int = 0,
) -> Plan:
    """The plan of a forward from balls, in torch; arguments as `topo_adapter.core.visibility.visible_pairs`."""
    tree = _sorted_tree(query_balls, key_ball, query, key, local_window, num_sink_tokens, dense_until)
    local = _general_local_plan(query, key, local_window, num_sink_tokens, dense_until)
    return _joined(tree, local, num_sink_tokens)


def _sorted_tree(
    query_balls: Tensor,
    key_ball: Tensor,
    query: SequenceLayout,
    key: SequenceLayout,
    local_window: int,
    num_sink_tokens: int,
    dense_until: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`query_order`, `range_start`, `range_end` and `key_order` of a `Plan`."""
    span = key.position.shape[1] + 1  # larger than any position
    balls = torch.maximum(query_balls.amax(), key_ball.amax()).long() + 1  # a tensor: no host synchronisation
    visiting = query.real[:, None, None] & (query_balls >= 0)

    def rank(position: Tensor, ball: Tensor, layout: SequenceLayout) -> Tensor:
        """(document, ball, position) as one integer, ordered lexicographically; `position` `[B, N]`."""
        one = (slice(None), *[None] * (ball.ndim - 2))
        return (layout.document[one] * balls + ball.long()) * span + position[one]

    in_tree = key.position >= num_sink_tokens  # also drops padding
    key_rank = rank(key.position, key_ball, key).masked_fill(~in_tree[:, None], _EXCLUDED)
    sorted_rank, key_order = key_rank.sort(-1)
    query_rank = rank(query.position, query_balls, query).masked_fill(~visiting, _EXCLUDED)
    query_order = query_rank.argsort(-1)
    first = rank(torch.zeros_like(query.position), query_balls, query)
    # keys below this position are left to the tree; 0 for padding, whose range is empty then
    reach = (query.position - local_window + 1).clamp(min=0).masked_fill(query.position < dense_until, 0)
    keys = sorted_rank[:, :, None].expand(-1, -1, query_balls.shape[2], -1).contiguous()
    start = torch.searchsorted(keys, first)
    end = torch.where(visiting, torch.searchsorted(keys, rank(reach, query_balls, query)), start)
    return query_order.int(), start.gather(-1, query_order).int(), end.gather(-1, query_order).int(), key_order.int()


_LOCAL_PLANS: WeakKeyDictionary[SequenceLayout, dict[tuple[int, int, int], LocalPlan]] = WeakKeyDictionary()


def local_plan(
    query: SequenceLayout, key: SequenceLayout, local_window: int, num_sink_tokens: int, dense_until: int = 0
) -> LocalPlan:
    """The part of a plan that depends on layouts alone, computed once for all layers that share a layout object."""
    if query is not key:
        return _general_local_plan(query, key, local_window, num_sink_tokens, dense_until)
    known = _LOCAL_PLANS.setdefault(query, {})
    options = local_window, num_sink_tokens, dense_until
    if options not in known:
        make = _plain_local_plan if query.plain else _general_local_plan
        known[options] = make(query, key, *options)
    return known[options]


def _plain_local_plan(
    query: SequenceLayout, key: SequenceLayout, local_window: int, num_sink_tokens: int, dense_until: int
) -> LocalPlan:
    end = torch.arange(1, query.position.shape[1] + 1, dtype=torch.int32, device=query.position.device)
    end = end.expand(query.position.shape).contiguous()
    start = (end - local_window).clamp(min=0).masked_fill(end <= dense_until, 0)
    return LocalPlan(None, torch.zeros_like(end), start, end, None, None)


def _general_local_plan(
    query: SequenceLayout, key: SequenceLayout, local_window: int, num_sink_tokens: int, dense_until: int
) -> LocalPlan:
    span = key.position.shape[1] + 1  # larger than any position
    place = (key.document * span + key.position).masked_fill(~key.real, _EXCLUDED)
    sorted_place, order = place.sort(-1)
    document = query.document * span
    document_start = torch.searchsorted(sorted_place, document)
    end = torch.searchsorted(sorted_place, document + query.position, right=True)
    end = torch.where(query.real, end, document_start)
    start = torch.maximum(document_start, end - local_window)
    start = torch.where(query.position < dense_until, document_start, start)
    tree_queries = torch.where(query.real, end, _EXCLUDED).argsort(stable=True, dim=-1)
    tree_queries = torch.where(query.real.gather(1, tree_queries), tree_queries, -1)
    tree_keys = torch.where((key.position >= num_sink_tokens).gather(1, order), order, -1)
    return LocalPlan(*(t.int() for t in (order, document_start, start, end, tree_queries, tree_keys)))
