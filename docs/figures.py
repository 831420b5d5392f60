"""The figures of docs/concepts: `python docs/figures.py` draws them anew, byte for byte with the pinned matplotlib.

What they show is computed by the library, or read from `results/` and the adapter in `examples/`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from topo_adapter import TopologyConfig
from topo_adapter.core.dial import choose, choose_depths, expected_loss
from topo_adapter.core.layout import contiguous_layout
from topo_adapter.core.records import Keys
from topo_adapter.core.rule import Rule
from topo_adapter.core.tree import address_to_digits, valuation
from topo_adapter.core.visibility import Visibility
from topo_evaluation.results import read

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "concepts"
ARITY, LEVELS = 2, 3
_BLUE, _ORANGE, _GREEN, _GREY = "#3949ab", "#ef6c00", "#2e7d32", "#9e9e9e"
_STYLE = {"svg.hashsalt": "topo", "svg.fonttype": "path", "font.size": 11, "axes.spines.top": False}


def tree() -> Figure:
    """Eight leaves, two of them with the ball of their common prefix."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    # leaves side by side in the order of their digits, so that each ball is one stretch
    leaves = sorted(range(ARITY**LEVELS), key=lambda x: address_to_digits(torch.tensor(x), ARITY, LEVELS).tolist())
    digits = [address_to_digits(torch.tensor(x), ARITY, LEVELS).tolist() for x in leaves]
    query, key, other = 4, 5, 1
    inside = [place for place, own in enumerate(digits) if own[:2] == digits[query][:2]]
    axis.axvspan(min(inside) - 0.45, max(inside) + 0.45, color=_BLUE, alpha=0.12)
    for level in range(LEVELS):
        for prefix in {tuple(own[:level]) for own in digits}:
            above = [place for place, own in enumerate(digits) if tuple(own[:level]) == prefix]
            for child in range(ARITY):
                below = [place for place in above if digits[place][level] == child]
                x, y = sum(above) / len(above), sum(below) / len(below)
                axis.plot([x, y], [LEVELS - level, LEVELS - level - 1], color=_GREY, linewidth=1.5, zorder=1)
                axis.annotate(
                    str(child),
                    ((x + y) / 2, LEVELS - level - 0.5),
                    ha="center",
                    va="center",
                    fontsize=10,
                    bbox={"boxstyle": "circle", "fc": "white", "ec": _GREY, "pad": 0.2},
                )
    names = {query: "query", key: "key it sees", other: "key it\ndoes not see"}
    for place, own in enumerate(digits):
        colour = {query: _BLUE, key: _BLUE, other: _ORANGE}.get(place, _GREY)
        axis.scatter([place], [0], s=90, color=colour, zorder=2)
        axis.text(place, -0.25, "".join(map(str, own)), ha="center", va="top", family="monospace", color=colour)
        axis.text(place, -0.62, names.get(place, ""), ha="center", va="top", color=colour, fontsize=10)
    near, far = (valuation(torch.tensor(leaves[query]), torch.tensor(leaves[x]), ARITY, LEVELS) for x in (key, other))
    below = sum(inside) / len(inside)
    axis.text(
        below, -1.1, f"{near} digits agree: one\nball at depth {near}", color=_BLUE, ha="center", va="top", fontsize=10
    )
    axis.text(other, -1.1, f"{far} digits agree", color=_ORANGE, ha="center", va="top", fontsize=10)
    axis.set(ylim=(-1.75, 3.2), xlim=(-0.6, 7.6))
    axis.axis("off")
    return figure


def seen(depth: int, length: int = 24, window: int = 3, sinks: int = 1) -> torch.Tensor:
    """int `[T, S]`, what a query sees a key by: 0 hidden, 1 ball alone, 2 window, 3 sink, -1 later keys."""
    drawn = torch.Generator().manual_seed(3)
    query, key = (torch.randint(ARITY**LEVELS, (1, 1, length), generator=drawn) for _ in range(2))
    layout = contiguous_layout(1, length)
    rule = Rule(ARITY, LEVELS, (depth,), 1, window, sinks)
    visible = Visibility(query[:, :, None], layout, Keys(key, layout), rule)
    kinds = visible.mask()[0, 0].long()
    for kind, (w, s) in ((3, (1, sinks)), (2, (window, 0))):
        alone = Visibility(query[:, :, None], layout, Keys(key, layout), Rule(ARITY, LEVELS, (depth,), 1, w, s))
        kinds[alone.always()[0]] = kind
    kinds[~visible.causal()[0]] = -1
    return kinds


def balls() -> Figure:
    """The mask of one head at three depths."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.6), layout="constrained")
    colours = ListedColormap(["white", "#e0e0e0", _BLUE, _GREEN, _ORANGE])
    for axis, depth in zip(axes, (1, 2, 3), strict=True):
        kinds = seen(depth)
        density = float((kinds > 0).sum() / (kinds >= 0).sum())
        axis.imshow(kinds.numpy(), cmap=colours, vmin=-1, vmax=3, interpolation="nearest")
        axis.set(title=f"depth {depth}: {density:.0%} visible", xlabel="key", xticks=[], yticks=[])
        axis.spines[["left", "bottom", "right"]].set_visible(False)
    axes[0].set_ylabel("query")
    names = {"hidden": "#e0e0e0", "its ball": _BLUE, "window": _GREEN, "sink": _ORANGE}
    marks = [plt.Line2D([], [], marker="s", linestyle="", markersize=9, color=colour) for colour in names.values()]
    figure.legend(marks, names, loc="outside lower center", ncols=4, frameon=False)
    return figure


def dial() -> Figure:
    """The shipped adapter's dial: expected loss over density, and the depths at two densities."""
    table: Any = TopologyConfig.from_pretrained(ROOT / "examples" / "smollm2-135m-topology").calibration
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    densities = [0.06, 0.07, 0.08, 0.1, 0.13, 0.17, 0.3, 0.5, 1.0]
    left.plot(densities, [expected_loss(table, choose(table, d)) for d in densities], marker="o", color=_BLUE)
    left.set(xlabel=f"density of {table['length']:,} tokens", ylabel="expected loss, nats per token", ylim=0)
    left.spines["right"].set_visible(False)
    depths = range(10)
    for shift, density, colour in ((-0.2, 0.1, _ORANGE), (0.2, 0.3, _BLUE)):
        chosen = [depth for heads in choose_depths(table, density).values() for depth in heads]
        right.bar(
            [d + shift for d in depths], [chosen.count(d) for d in depths], 0.4, color=colour, label=f"at {density:g}"
        )
    right.set(xlabel="depth (0 dense, 9 window and sinks alone)", ylabel="heads of 270", xticks=list(depths))
    right.spines["right"].set_visible(False)
    right.legend(frameon=False)
    return figure


def exact() -> Figure:
    """How often prefill and decoding choose the same key addresses, by dtype."""
    rows = {
        row["settings"]["dtype"].removeprefix("torch."): row
        for row in read(ROOT / "results/route_agreement_h100.jsonl")
    }
    names = ("float32", "float16", "bfloat16")
    shares = [rows[name]["metrics"]["key_addresses_prefill_equal_decode"] for name in names]
    figure, axis = plt.subplots(figsize=(7, 2.4), layout="constrained")
    drawn = axis.barh(names, shares, color=_BLUE, height=0.6)
    axis.bar_label(drawn, [f"{share:.1%}" for share in shares], padding=4)
    axis.set(xlim=(0, 1.1), xlabel="key addresses of 8 digits that prefill and decoding agree on")
    axis.invert_yaxis()
    axis.spines["right"].set_visible(False)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {"tree": tree, "balls": balls, "dial": dial, "exact": exact}


def draw(folder: Path) -> None:
    """Write every figure as SVG."""
    for name, make in FIGURES.items():
        with matplotlib.rc_context(_STYLE):
            figure = make()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    draw(FOLDER)
