"""What decides, beside addresses and layouts, what a query sees (docs/method.md, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .device import sent
from .tree import num_balls


@dataclass(frozen=True, eq=False)
class Rule:
    """Tree, depths, visits, window and sinks of one layer, and what follows from them alone.

    Attributes:
        arity, levels: `p`, `L`. depths: visible depth of each query head, in `0..L + 1`; 0 is one ball that holds all,
            at `L + 1` a query is in no key's ball.
        routes: `R`, as many as query heads, or each shared by as many query heads.
        local_window: >= 1. num_sink_tokens: >= 0.
        dense_until: >= 0; queries at positions below it see all keys before them.
        visits: `m >= 1`, the balls that a query of each query head visits; empty: one each.
        route_depths: visible depth of each route, or of each query head where depths or visits differ within a route.
        route_visits: visits of the same. most_visits: the most of them.
        ball_sizes: addresses modulo these, one for each of `route_depths`, are balls.
        below_the_leaves: whether any route sees nothing by the tree.
        always: `local_window, num_sink_tokens, dense_until`, what is visible whatever the addresses are.
    """

    arity: int
    levels: int
    depths: tuple[int, ...]
    routes: int
    local_window: int
    num_sink_tokens: int
    visits: tuple[int, ...] = ()
    dense_until: int = 0
    route_depths: tuple[int, ...] = field(init=False)
    route_visits: tuple[int, ...] = field(init=False)
    most_visits: int = field(init=False)
    ball_sizes: tuple[int, ...] = field(init=False)
    below_the_leaves: bool = field(init=False)
    always: tuple[int, int, int] = field(init=False)
    _sent: dict[tuple[torch.device, str], Tensor] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        shared = len(self.depths) // self.routes
        of_heads = list(zip(self.depths, self.visits or [1] * len(self.depths), strict=True))
        of_routes = of_heads[::shared]
        if shared > 1 and any(each != of_routes[head // shared] for head, each in enumerate(of_heads)):
            of_routes = of_heads
        depths, visits = zip(*of_routes, strict=True)
        object.__setattr__(self, "visits", tuple([each for _, each in of_heads]))
        object.__setattr__(self, "route_depths", depths)
        object.__setattr__(self, "route_visits", visits)
        object.__setattr__(self, "most_visits", max(visits))
        object.__setattr__(self, "ball_sizes", tuple([num_balls(self.arity, self.levels, depth) for depth in depths]))
        object.__setattr__(self, "below_the_leaves", max(depths) > self.levels)
        object.__setattr__(self, "always", (self.local_window, self.num_sink_tokens, self.dense_until))

    def at(self, depths: Sequence[int], visits: Sequence[int] = ()) -> Rule:
        """The same at other depths, with other visits; none: one each."""
        return replace(self, depths=tuple(depths), visits=tuple(visits))

    def by_head(self) -> Rule:
        """With one route for each query head."""
        return replace(self, routes=len(self.depths))

    def sizes_on(self, device: torch.device) -> Tensor:
        """`ball_sizes`, int32; the rule keeps it: a copy from the host may not be recorded in a graph."""
        return self._on(device, "sizes", self.ball_sizes)

    def several_on(self, device: torch.device) -> Tensor | None:
        """`visits` of the query heads, int32; None where all visit one ball."""
        return None if self.most_visits == 1 else self._on(device, "visits", self.visits)

    def choices_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`route_depths` and `route_visits`, int32."""
        return self._on(device, "depths", self.route_depths), self._on(device, "route visits", self.route_visits)

    def nowhere_on(self, device: torch.device) -> Tensor:
        """int32, for each of `route_depths`: below the leaves an address that no key has, else -1."""
        leaves = self.arity**self.levels
        values = [leaves if depth > self.levels else -1 for depth in self.route_depths]
        return self._on(device, "nowhere", tuple(values))

    def _on(self, device: torch.device, which: str, values: tuple[int, ...]) -> Tensor:
        known = self._sent.get((device, which))
        if known is None:
            known = self._sent[device, which] = sent(values, device)
        return known
