"""The density dial: the depth map of a budget, from the table that `calibrate` measured."""

from __future__ import annotations

import math
import numbers
from bisect import bisect
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from ..errors import TopologyConfigError
from .visibility import always_density

if TYPE_CHECKING:
    from ..config import Calibration

#: What a calibrated adapter runs at unless another density is asked for, at the calibrated length.
DEFAULT_DENSITY = 0.17

#: Densities that a table of the dial lists, where the adapter reaches them.
LISTED = (0.05, 0.1, 0.17, 0.3, 0.5, 1.0)

_Choice = tuple[float, float, int]  # density, loss, column of the table


class Setting(NamedTuple):
    """What the dial chose: layer index -> depth of each query head, and their visits; None: one each."""

    depths: dict[int, list[int]]
    visits: dict[int, list[int]] | None


def numbers_of_visits(most: int, arity: int) -> list[int]:
    """Those that the dial chooses from, falling: `most`, 1, and the powers of 2 that lie between the densities of two
    depths. Others cost calibration time, and at the same density there is a choice of another depth."""
    between = [2**n for n in range(arity.bit_length()) if 2 * 2**n <= arity and 2**n < most]
    return [most, *reversed(between)] if most > 1 else [1]


def choices_of(arity: int, levels: int, sparsest_depth: int, visits: int) -> list[tuple[int, int]]:
    """Depth and visits among which the dial chooses, the densest first and the sparsest last.

    At each depth the `numbers_of_visits` that leave a ball out.
    """
    inside = [(d, m) for d in range(1, levels + 1) for m in numbers_of_visits(visits, arity) if m < arity**d]
    return [(0, 1), *inside, *([(sparsest_depth, 1)] if sparsest_depth > levels else [])]


def covers(dense: tuple[int, int], sparse: tuple[int, int]) -> bool:
    """Whether depth and visits of `dense` show all that those of `sparse` show, whatever the router says."""
    return dense[0] == 0 or (dense[0] <= sparse[0] and dense[1] >= sparse[1])


def choose_depths(calibration: Calibration, target_density: float) -> dict[int, list[int]]:
    """The depth map of least estimated loss whose mean density over all routed heads is at most `target_density`.

    Losses of heads are taken as additive. Each head offers the lower convex hull of (density, loss) over its depths;
    starting from every head at its sparsest, the hull segments of all heads are taken in the order of loss saved per
    density, up to the first that exceeds the budget. The order does not depend on the target, so maps are nested:
    for `t1 <= t2` every head's depth under `t2` is at most its depth under `t1`, hence no pair that is visible at
    `t1` is hidden at `t2`, and the estimated loss at `t2` is at most that at `t1`. At the densities where a segment
    ends the map is optimal among all maps; between them it falls short of the budget by less than one segment.
    Heads that share a route (`heads_per_route` above 1) share a depth, so that the kernels can share the route, unless
    the config has `depth_per="query_head"`.

    Where queries visit several balls a head offers pairs of depth and visits (`choose` returns both), along the chain,
    of those on which neither depth rises nor visits fall as it grows denser, whose losses are least: nested as well.

    Args:
        calibration: of `calibrate`. target_density: in (0, 1], at the calibrated length.

    Returns:
        Layer index -> depth of each query head, a `visible_depth`.

    Raises:
        TopologyConfigError: `target_density` is out of range or below what the sparsest map reaches.
    """
    return choose(calibration, target_density).depths


def choose(calibration: Calibration, target_density: float) -> Setting:
    """`choose_depths`, with the visits."""
    return allot(calibration, target_density)[0]


def allot(calibration: Calibration, target_density: float) -> tuple[Setting, float]:
    """`choose`, and the loss that a little more density would save there: nats per token for each unit of the
    density of one head, 0 where nothing is left to save."""
    check_density(target_density)
    hulls, segments, shared = _segments(calibration)
    total = shared * len(hulls)
    density = sum(hull[0][0] for hull in hulls)
    budget = target_density * total + 1e-9 * total  # rounding must not refuse a density that a map reaches
    if density > budget:
        raise TopologyConfigError(
            f"target_density must be at least {math.ceil(1e4 * density / total) / 1e4:g} at {calibration['length']} "
            f"tokens, what this adapter's sparsest heads reach, got {target_density}; window and sinks are always "
            "visible: lower local_window."
        )
    columns = [hull[0][2] for hull in hulls]
    rate = 0.0
    for loss, route, cheap, dear in segments:
        density += dear[0] - cheap[0]
        if density > budget:
            rate = -loss
            break
        columns[route] = dear[2]
    per_head = iter([column for column in columns for _ in range(shared)])
    found = {layer: [next(per_head) for _ in heads] for layer, heads in sorted(calibration["density"].items())}
    choices = calibration.get("choices")
    if choices is None:  # a column is a depth
        return Setting(found, None), rate
    depths, visits = ({layer: [choices[c][part] for c in row] for layer, row in found.items()} for part in (0, 1))
    return Setting(depths, visits), rate


def dial_curve(calibration: Calibration) -> list[tuple[float, float]]:
    """Density and estimated loss (nats per token) of every map that `choose_depths` chooses, from the sparsest on."""
    hulls, segments, shared = _segments(calibration)
    density = math.fsum(hull[0][0] for hull in hulls)
    densities = [density]
    for _, _, cheap, dear in segments:
        density += dear[0] - cheap[0]
        densities.append(density)
    loss = math.fsum(hull[-1][1] for hull in hulls)
    losses = [loss]
    for _, _, cheap, dear in reversed(segments):  # small numbers first: a dense map's loss stays exactly 0
        loss += cheap[1] - dear[1]
        losses.append(loss)
    return [(density / (shared * len(hulls)), loss) for density, loss in zip(densities, reversed(losses), strict=True)]


def listed_densities(
    calibration: Calibration, local_window: int, num_sink_tokens: int, own: float | None = None
) -> list[tuple[float, float]]:
    """Density and estimated loss (nats per token) at `LISTED` and at the adapter's own density, rising.

    Left out are densities that it does not reach.
    """
    curve = dial_curve(calibration)
    least = max(curve[0][0], always_density(calibration["length"], local_window, num_sink_tokens))
    wanted = sorted({density for density in LISTED if density >= least} | ({own} if own is not None else set()))
    return [(density, curve[max(0, bisect(curve, (density + 1e-9, math.inf)) - 1)][1]) for density in wanted]


def check_density(target_density: float) -> None:
    """Raises TopologyConfigError unless it is a number in (0, 1]."""
    number = isinstance(target_density, numbers.Real) and not isinstance(target_density, bool)
    if not number or not 0 < target_density <= 1:
        raise TopologyConfigError(f"target_density must be a number in (0, 1], got {target_density!r}")


def reachable(calibration: Calibration, density: float) -> float:
    """`density`, or that of the sparsest map where it is more."""
    sparsest = [head[-1] for heads in calibration["density"].values() for head in heads]
    return max(density, math.fsum(sparsest) / len(sparsest))


def at_length(density: float, length: int, other_length: int, local_window: int, num_sink_tokens: int) -> float:
    """The density in texts of `other_length` tokens of a map that has `density` in texts of `length` tokens.

    A map reveals about the same share of the far pairs (beyond window and sinks) at any length; window and sinks alone
    are a larger share of the pairs the shorter a text is.

    Raises:
        TopologyConfigError: window and sinks alone exceed `density` at `length`.
    """
    near, other_near = (always_density(n, local_window, num_sink_tokens) for n in (length, other_length))
    if density < near:
        raise TopologyConfigError(
            f"target_density must be at least {math.ceil(1e4 * near) / 1e4:g} at {length} tokens, where a window of "
            f"{local_window} and {num_sink_tokens} sinks show that much, got {density:g}"
        )
    share = (density - near) / (1 - near) if near < 1 else 1.0
    return min(1.0, other_near + (1 - other_near) * share)


def expected_loss(calibration: Calibration, setting: Setting) -> float:
    """The estimated loss of a map of the dial, nats per token: the sum over its heads."""
    losses = []
    for layer, depths in setting.depths.items():
        visits = [1] * len(depths) if setting.visits is None else setting.visits[layer]
        for head, chosen in enumerate(zip(depths, visits, strict=True)):
            losses.append(calibration["loss"][layer][head][column_of(calibration, *chosen)])
    return math.fsum(losses)


def column_of(calibration: Calibration, depth: int, visits: int) -> int:
    """The column of a depth and visits; of a pair that the dial does not choose, the sparsest one that covers it."""
    choices = calibration.get("choices")
    if choices is None:
        return depth
    return max(n for n, (d, m) in enumerate(choices) if covers((d, m), (depth, visits)))


_Segment = tuple[float, int, _Choice, _Choice]  # minus the loss saved per density, route, from, to


def _segments(calibration: Calibration) -> tuple[list[list[_Choice]], list[_Segment], int]:
    """The hull of each route, all of their segments in the order in which density is spent on them, and the number of
    heads that share a route."""
    shared = calibration["heads_per_route"]
    hulls: list[list[_Choice]] = []
    for layer, heads in sorted(calibration["density"].items()):
        for first in range(0, len(heads), shared):
            members = slice(first, first + shared)
            densities = [sum(values) for values in zip(*heads[members], strict=True)]
            losses = [sum(values) for values in zip(*calibration["loss"][layer][members], strict=True)]
            offered = list(zip(densities, losses, range(len(losses)), strict=True))
            hulls.append(_lower_hull(best_chain(offered, calibration.get("choices"))))
    # a hull's slopes fall strictly, so a route's own segments keep their order
    segments = [(-_gain(a, b), route, a, b) for route, hull in enumerate(hulls) for a, b in pairwise(hull)]
    return hulls, sorted(segments), shared


def best_chain(offered: list[_Choice], choices: list[list[int]] | None) -> list[_Choice]:
    """Of the chains from the sparsest choice to the densest, each step of which covers the last, the one of least loss:
    its mean over the logarithm of the density, as the densities that training draws are spread."""
    if choices is None:  # depths alone are one chain
        return offered
    pairs = [(depth, visits) for depth, visits in choices]
    best: dict[int, tuple[float, list[_Choice]]] = {len(pairs) - 1: (0.0, [offered[-1]])}
    for to in reversed(range(len(pairs) - 1)):  # what a choice covers comes after it
        ways = []
        for at, (area, chain) in best.items():
            if covers(pairs[to], pairs[at]):
                step = math.log(offered[to][0] / offered[at][0])
                ways.append((area + step * (offered[to][1] + offered[at][1]) / 2, [*chain, offered[to]]))
        best[to] = min(ways, key=lambda way: way[0])
    return best[0][1]


def _gain(cheap: _Choice, dear: _Choice) -> float:
    """Loss saved per density."""
    return (cheap[1] - dear[1]) / (dear[0] - cheap[0])


def _lower_hull(choices: list[_Choice]) -> list[_Choice]:
    """The choices on the lower convex hull, densities rising, losses falling, gains strictly falling."""
    hull: list[_Choice] = []
    for choice in sorted(choices):
        if hull and choice[1] >= hull[-1][1]:
            continue  # costs density and saves nothing
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull
