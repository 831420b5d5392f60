"""From balls to a plan: sorted orders and contiguous key ranges (docs/method.md, section 6).

Keys are sorted by (document, ball, position) or (ball, document, position). A query's tree keys - same document, same
ball, at least `local_window` tokens back, no sinks - are then one contiguous range. The local pass covers exactly the
rest: a contiguous range of the keys sorted by (document, position), plus the sinks of the query's document that lie
before that range. The two are disjoint, so merging them by log-sum-exp counts no key twice. O(N log N) time, O(N)
memory, no host synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .backend import kernels_serve
from .layout import SequenceLayout

_EXCLUDED = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class LocalPlan:
    """What windows and sinks need: nothing of the routes, so all layers of a forward share it. int32 tensors.

    Attributes:
        order: `[B, S]`; local rank -> key index: real keys by (document, position), padding last. None where the rows
            are known to be plain (one document, no padding): then it is the identity.
        document_start, start, end: `[B, T]`; local ranks. A query sees `[start, end)` (window) and
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
    """What the hard attention executes. All tensors are int32; `R` is the number of route heads.

    Tree pass, in sorted query order:
        query_order: `[B, R, T]`; sorted rank -> query index. Padding queries come last, as their index or -1.
        range_start, range_end: `[B, R, T]`; the sorted query's keys are `key_order[start:end]`.
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
        return (self.range_end - self.range_start).sum((0, 2), dtype=torch.float64)

    def visible_count(self) -> Tensor:
        """float64 `[R]`: visible pairs of each route head, summed over the batch."""
        window = self.local_end - self.local_start
        sinks = (self.local_start - self.document_start).clamp(max=self.num_sink_tokens)
        return self.far_count() + (window + sinks).sum(dtype=torch.float64)

    def causal_count(self) -> Tensor:
        """float64 scalar: causal pairs of the batch, the denominator of density."""
        return (self.local_end - self.document_start).sum(dtype=torch.float64)


def make_plan(
    query_address: Tensor,
    key_address: Tensor,
    balls: Tensor,
    max_balls: int,
    query: SequenceLayout,
    key: SequenceLayout,
    local_window: int,
    num_sink_tokens: int,
) -> Plan:
    """The plan of a forward, by counting sort in Triton on a GPU and by sorting in torch elsewhere.

    Args:
        query_address, key_address: integer `[B, R, T]`, `[B, R, S]`.
        balls: int32 `[R]`, `arity**depth` of each route head: its balls are the addresses modulo that.
        max_balls: the largest of `balls` or more, known on the host.
        query, key: layouts; within a document positions must be distinct.
        local_window: >= 1. num_sink_tokens: >= 0.
    """
    local = local_plan(query, key, local_window, num_sink_tokens)
    if max_balls == 1 and local.order is None:
        return _dense_plan(query_address, local, num_sink_tokens)
    if not kernels_serve(query_address):
        query_ball, key_ball = (x % balls[:, None] for x in (query_address, key_address))
        tree = _sorted_tree(query_ball, key_ball, query, key, local_window, num_sink_tokens)
        return Plan(*tree, local.order, local.document_start, local.start, local.end, num_sink_tokens)
    from topo_kernels import tree_plan

    tree = tree_plan(
        query_address.int(),
        key_address.int(),
        balls,
        local.start,
        None if local.order is None else local.document_start,
        local.tree_queries,
        local.tree_keys,
        max_balls=max_balls,
        num_sink_tokens=num_sink_tokens,
    )
    return Plan(*tree, local.order, local.document_start, local.start, local.end, num_sink_tokens)


def _dense_plan(query_address: Tensor, local: LocalPlan, num_sink_tokens: int) -> Plan:
    """What sorting plain rows of one ball would give, without sorting."""
    order = torch.arange(query_address.shape[2], dtype=torch.int32, device=query_address.device)
    end = (local.start - num_sink_tokens).clamp(min=0)[:, None].expand(query_address.shape)
    key_order = torch.where(order + num_sink_tokens < order.numel(), order + num_sink_tokens, 0)
    tree = order.expand(end.shape), torch.zeros_like(end), end, key_order.expand(end.shape)
    return Plan(*tree, local.order, local.document_start, local.start, local.end, num_sink_tokens, dense=True)


def build_plan(
    query_ball: Tensor,
    key_ball: Tensor,
    query: SequenceLayout,
    key: SequenceLayout,
    local_window: int,
    num_sink_tokens: int,
) -> Plan:
    """The plan of a forward from balls, in torch.

    Args:
        query_ball, key_ball: integer `[B, R, T]`, `[B, R, S]`; balls at each head's visible depth.
        query, key: layouts; within a document positions must be distinct.
        local_window: >= 1. num_sink_tokens: >= 0.
    """
    tree = _sorted_tree(query_ball, key_ball, query, key, local_window, num_sink_tokens)
    local = _general_local_plan(query, key, local_window, num_sink_tokens)
    return Plan(*tree, local.order, local.document_start, local.start, local.end, num_sink_tokens)


def _sorted_tree(
    query_ball: Tensor,
    key_ball: Tensor,
    query: SequenceLayout,
    key: SequenceLayout,
    local_window: int,
    num_sink_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`query_order`, `range_start`, `range_end` and `key_order` of a `Plan`."""
    span = key.position.shape[1] + 1  # larger than any position
    balls = torch.maximum(query_ball.amax(), key_ball.amax()).long() + 1  # a tensor: no host synchronisation

    def rank(position: Tensor, ball: Tensor, layout: SequenceLayout) -> Tensor:
        """(document, ball, position) as one integer, ordered lexicographically."""
        return (layout.document[:, None] * balls + ball.long()) * span + position[:, None]

    in_tree = key.position >= num_sink_tokens  # also drops padding
    key_rank = rank(key.position, key_ball, key).masked_fill(~in_tree[:, None], _EXCLUDED)
    sorted_rank, key_order = key_rank.sort(-1)
    query_rank = rank(query.position, query_ball, query).masked_fill(~query.real[:, None], _EXCLUDED)
    query_order = query_rank.argsort(-1)
    first = rank(torch.zeros_like(query.position), query_ball, query)
    # keys below this position are out of the window; 0 for padding, whose range is empty then
    reach = (query.position - local_window + 1).clamp(min=0)
    start = torch.searchsorted(sorted_rank, first)
    end = torch.searchsorted(sorted_rank, rank(reach, query_ball, query))
    return query_order.int(), start.gather(-1, query_order).int(), end.gather(-1, query_order).int(), key_order.int()


_LOCAL_PLANS: WeakKeyDictionary[SequenceLayout, dict[tuple[int, int], LocalPlan]] = WeakKeyDictionary()


def local_plan(query: SequenceLayout, key: SequenceLayout, local_window: int, num_sink_tokens: int) -> LocalPlan:
    """The part of a plan that depends on layouts alone, computed once for all layers that share a layout object."""
    if query is not key:
        return _general_local_plan(query, key, local_window, num_sink_tokens)
    known = _LOCAL_PLANS.setdefault(query, {})
    options = (local_window, num_sink_tokens)
    if options not in known:
        make = _plain_local_plan if query.plain else _general_local_plan
        known[options] = make(query, key, local_window, num_sink_tokens)
    return known[options]


def _plain_local_plan(query: SequenceLayout, key: SequenceLayout, local_window: int, num_sink_tokens: int) -> LocalPlan:
    end = torch.arange(1, query.position.shape[1] + 1, dtype=torch.int32, device=query.position.device)
    end = end.expand(query.position.shape).contiguous()
    return LocalPlan(None, torch.zeros_like(end), (end - local_window).clamp(min=0), end, None, None)


def _general_local_plan(
    query: SequenceLayout, key: SequenceLayout, local_window: int, num_sink_tokens: int
) -> LocalPlan:
    span = key.position.shape[1] + 1  # larger than any position
    place = (key.document * span + key.position).masked_fill(~key.real, _EXCLUDED)
    sorted_place, order = place.sort(-1)
    document = query.document * span
    document_start = torch.searchsorted(sorted_place, document)
    end = torch.searchsorted(sorted_place, document + query.position, right=True)
    end = torch.where(query.real, end, document_start)
    start = torch.maximum(document_start, end - local_window)
    tree_queries = torch.where(query.real, end, _EXCLUDED).argsort(stable=True, dim=-1)
    tree_queries = torch.where(query.real.gather(1, tree_queries), tree_queries, -1)
    tree_keys = torch.where((key.position >= num_sink_tokens).gather(1, order), order, -1)
    return LocalPlan(*(t.int() for t in (order, document_start, start, end, tree_queries, tree_keys)))
