"""The one definition of what a query sees (docs/method.md, section 2).

Query `i` sees key `j` iff `j <= i`, both are real tokens of one document, and one of the visits of `i` lies in the ball
of `j`, or `i - j < local_window`, or `j` is one of the first `num_sink_tokens` of the document, or `i` is one of its
first `dense_until`. Below the leaves (docs/method.md) no key has the ball of a query. Everything else in this library -
soft masks, the sorted plan, the kernels - is tested against this.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .layout import SequenceLayout, causal_pairs
from .records import Keys
from .rule import Rule


def always_visible(
    query: SequenceLayout, key: SequenceLayout, local_window: int, num_sink_tokens: int, dense_until: int = 0
) -> Tensor:
    """bool `[B, T, S]`: pairs visible whatever the addresses are (local window, attention sinks, early queries)."""
    return causal_pairs(query, key) & _without_tree(query, key, local_window, num_sink_tokens, dense_until)


def _without_tree(
    query: SequenceLayout, key: SequenceLayout, local_window: int, num_sink_tokens: int, dense_until: int
) -> Tensor:
    """bool `[B, T, S]`: of causal pairs, those that are visible whatever the addresses are."""
    at, of = query.position[:, :, None], key.position[:, None, :]
    seen = (at - of < local_window) | (of < num_sink_tokens)
    return seen | (at < dense_until) if dense_until else seen


def visible_pairs(
    query_balls: Tensor,
    key_ball: Tensor,
    query: SequenceLayout,
    key: SequenceLayout,
    local_window: int,
    num_sink_tokens: int,
    dense_until: int = 0,
) -> Tensor:
    """Section 2's mask.

    Args:
        query_balls: integer `[B, R, m, T]`, the balls that queries visit, -1 for none. key_ball: integer `[B, R, S]`.
            Both at each head's visible depth.
        query, key: layouts of the `T` queries and the `S` keys.

    Returns:
        bool `[B, R, T, S]`. Rows of padding queries are empty; every other row holds at least its own token.
    """
    tree = query_balls[:, :, 0, :, None] == key_ball[..., None, :]
    for visit in range(1, query_balls.shape[2]):
        tree |= query_balls[:, :, visit, :, None] == key_ball[..., None, :]
    tree |= _without_tree(query, key, local_window, num_sink_tokens, dense_until)[:, None]
    tree &= causal_pairs(query, key)[:, None]
    return tree


def always_density(length: int, local_window: int, num_sink_tokens: int, dense_until: int = 0) -> float:
    """Share in (0, 1] of the causal pairs of a document of `length` tokens that no address can hide."""
    dense = min(length, dense_until)
    pairs = _pairs_without_tree(length, local_window, num_sink_tokens)
    pairs += dense * (dense + 1) // 2 - _pairs_without_tree(dense, local_window, num_sink_tokens)
    return pairs / (length * (length + 1) // 2)


def _pairs_without_tree(length: int, local_window: int, num_sink_tokens: int) -> int:
    """Pairs of one document of `length` tokens that window and sinks make visible."""
    reached = min(length, local_window)  # queries whose window reaches the first token
    far = length - reached
    some = min(far, num_sink_tokens)  # queries that have fewer sinks than all beyond their window
    in_window = reached * (reached + 1) // 2 + far * local_window
    return in_window + some * (some + 1) // 2 + (far - some) * num_sink_tokens


@dataclass(frozen=True, eq=False)
class Visibility:
    """Who sees whom in one attention: the queries' visits, the keys' addresses, their layouts and the rule.

    Attributes:
        visits: integer `[B, R, m, T]`, addresses that lie in the balls which a query visits, -1 for none.
            With one visit it is the query's own address, of `R` routes: the query heads' or, each shared by as many
            query heads, the KV heads'. Several are for the rule's `route_depths`, no two of a query in one ball.
        query: layout of the `T` queries. keys: addresses `[B, R, S]` and layout of the `S` keys.
        rule: tree, depths, visits, window and sinks; for `R` routes.
        logits: float `[B, R, T, L, p]` of the queries' digits, where the balls at other depths may be asked for.
    """

    visits: Tensor
    query: SequenceLayout
    keys: Keys
    rule: Rule
    logits: Tensor | None = None

    def of_rows(self, rows: slice | Tensor) -> Visibility:
        """Some queries, all keys."""
        layout = SequenceLayout(self.query.document[:, rows], self.query.position[:, rows])
        logits = None if self.logits is None else self.logits[:, :, rows]
        return replace(self, visits=self.visits[..., rows], query=layout, logits=logits)

    def by_head(self) -> Visibility:
        """With one route for each query head."""
        heads = len(self.rule.depths)
        if self.rule.routes == heads:
            return self
        keys = Keys(per_head(self.keys.address, heads), self.keys.layout)
        logits = None if self.logits is None else per_head(self.logits, heads)
        return replace(self, visits=per_head(self.visits, heads), keys=keys, rule=self.rule.by_head(), logits=logits)

    def route_visits(self) -> Tensor:
        """Visits `[B, r, m, T]` for each of the rule's `route_depths`; below the leaves an address that no key has."""
        visits = per_head(self.visits, len(self.rule.route_depths))
        if not self.rule.below_the_leaves:
            return visits
        return torch.maximum(visits, self.rule.nowhere_on(visits.device)[:, None, None])

    def balls(self) -> tuple[Tensor, Tensor]:
        """Balls of queries `[B, r, m, T]`, -1 for none, and of keys `[B, r, S]`, for each of the `route_depths`."""
        sizes = self.rule.sizes_on(self.visits.device)[:, None]
        visits, address = self.route_visits(), per_head(self.keys.address, len(sizes))
        return torch.where(visits < 0, -1, visits % sizes[:, None]), address % sizes

    def causal(self) -> Tensor:
        """bool `[B, T, S]`."""
        return causal_pairs(self.query, self.keys.layout)

    def always(self) -> Tensor:
        """bool `[B, T, S]`: visible whatever the addresses are."""
        return always_visible(self.query, self.keys.layout, *self.rule.always)

    def mask(self) -> Tensor:
        """bool `[B, r, T, S]`, for each of the `route_depths`: `visible_pairs`."""
        return visible_pairs(*self.balls(), self.query, self.keys.layout, *self.rule.always)


def per_head(x: Tensor, heads: int, dim: int = 1) -> Tensor:
    """Repeat routes `[B, R, ...]` to `[B, heads, ...]`: the heads of a KV head share its route."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim)
