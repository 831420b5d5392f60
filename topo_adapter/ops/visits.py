"""Which balls queries visit, chosen in Triton on CUDA and in plain torch elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..core.rule import Rule
from ..core.tree import digits_to_address
from ..core.visibility import Visibility, per_head
from ..core.visits import likeliest_balls
from .backend import kernels_serve


def visited(logits: Tensor, rule: Rule) -> Tensor:
    """The visits of a `Visibility` under a rule.

    Args:
        logits: of the queries' digits, `[B, R, T, L, p]`.

    Returns:
        integer `[B, R, 1, T]`, leaves, where every query visits one ball; else `likeliest_balls` of the rule's routes.
    """
    if rule.most_visits == 1:
        return digits_to_address(logits.argmax(-1), rule.arity)[:, :, None]
    logits = per_head(logits, len(rule.route_depths))
    if not kernels_serve("visits", logits, visits=rule.most_visits, arity=rule.arity):
        return likeliest_balls(logits, rule.route_depths, rule.route_visits)
    from topo_kernels import likeliest_balls as kernel

    return kernel(logits, *rule.choices_on(logits.device), rule.most_visits)


def at(visibility: Visibility, depths: Sequence[int], visits: Sequence[int] = ()) -> Visibility:
    """The same tokens at other depths of the query heads and with other visits; none: one each.

    Where there are several, before or after, the visibility has the queries' logits.
    """
    rule = visibility.rule.at(depths, visits)
    if rule.most_visits == visibility.rule.most_visits == 1:
        return replace(visibility, rule=rule)
    assert visibility.logits is not None
    return replace(visibility, visits=visited(visibility.logits, rule), rule=rule)
