"""From balls to a plan: sorted orders and contiguous key ranges (docs/method.md, section 6).

Keys are sorted by (document, ball, position). A query's tree keys - same document, same ball, at
least `local_window` tokens back, no sinks - are then one contiguous range. The local pass covers
exactly the rest: a contiguous range of the keys sorted by (document, position), plus the sinks of the
query's document that lie before that range. The two are disjoint, so merging them by log-sum-exp
counts no key twice. O(N log N) time, O(N) memory, no host synchronisation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import SequenceLayout

_EXCLUDED = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Plan:
    """What the hard attention executes. All tensors are int32; `R` is the number of route heads.

    Tree pass, in sorted query order:
        query_order: `[B, R, T]`; sorted rank -> query index. Padding queries come last.
        range_start, range_end: `[B, R, T]`; the sorted query's keys are `key_order[start:end]`.
        key_order: `[B, R, S]`; sorted rank -> key index. Sinks and padding come last, in no range.
    Local pass, in original query order, shared by all heads:
        local_order: `[B, S]`; real keys by (document, position), padding last.
        document_start, local_start, local_end: `[B, T]`; ranks in `local_order`. A query sees
            `[local_start, local_end)` (window) and `[document_start, min(document_start + sinks, local_start))`.
    """

    query_order: Tensor
    range_start: Tensor
    range_end: Tensor
    key_order: Tensor
    local_order: Tensor
    document_start: Tensor
    local_start: Tensor
    local_end: Tensor
    num_sink_tokens: int

    def visible_count(self) -> Tensor:
        """float64 `[R]`: visible pairs of each route head, summed over the batch."""
        tree = (self.range_end - self.range_start).sum((0, 2), dtype=torch.float64)
        window = self.local_end - self.local_start
        sinks = (self.local_start - self.document_start).clamp(max=self.num_sink_tokens)
        return tree + (window + sinks).sum(dtype=torch.float64)

    def causal_count(self) -> Tensor:
        """float64 scalar: causal pairs of the batch, the denominator of density."""
        return (self.local_end - self.document_start).sum(dtype=torch.float64)


def build_plan(
    query_ball: Tensor,
    key_ball: Tensor,
    query: SequenceLayout,
    key: SequenceLayout,
    local_window: int,
    num_sink_tokens: int,
) -> Plan:
    """Build the plan of a forward.

    Args:
        query_ball, key_ball: integer `[B, R, T]`, `[B, R, S]`; balls at each head's visible depth.
        query, key: layouts; within a document positions must be distinct.
        local_window: >= 1. num_sink_tokens: >= 0.
    """
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

    place = (key.document * span + key.position).masked_fill(~key.real, _EXCLUDED)
    sorted_place, local_order = place.sort(-1)
    document = query.document * span
    document_start = torch.searchsorted(sorted_place, document)
    local_end = torch.searchsorted(sorted_place, document + query.position, right=True)
    local_end = torch.where(query.real, local_end, document_start)
    local_start = torch.maximum(document_start, local_end - local_window)

    return Plan(
        query_order=query_order.int(),
        range_start=start.gather(-1, query_order).int(),
        range_end=end.gather(-1, query_order).int(),
        key_order=key_order.int(),
        local_order=local_order.int(),
        document_start=document_start.int(),
        local_start=local_start.int(),
        local_end=local_end.int(),
        num_sink_tokens=num_sink_tokens,
    )
