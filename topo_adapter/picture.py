"""The picture of a density dial in a model card, where matplotlib is installed.

A PNG: pages of the hub do not show SVG files of a repository reliably.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core.dial import LISTED, dial_curve
from .files import replace_bytes

if TYPE_CHECKING:
    from .config import TopologyConfig


def draw_curve(axes: Any, config: TopologyConfig) -> None:
    """The estimated loss over the density, and the adapter's own density, on axes of matplotlib's.

    Args:
        config: calibrated.
    """
    table, own = config.calibration, config.target_density
    assert table is not None  # of the callers
    axes.plot(*zip(*dial_curve(table), strict=True))
    if own is not None:
        axes.axvline(own, color="black", linestyle=":", label=f"its own, {own:.3g}")
        axes.legend(frameon=False)
    axes.set_xscale("log")
    axes.set_xticks(LISTED, [f"{density:g}" for density in LISTED])
    axes.set_xticks([], minor=True)
    axes.set(xlabel=f"density at {table['length']:,} tokens", title="expected loss, nats per token")


def draw_dial(config: TopologyConfig, path: Path) -> bool:
    """Draw the loss over the density, and the depth of every head at the adapter's own density; less than 30 kB.

    Args:
        config: calibrated, on its dial.

    Returns:
        Whether it was drawn: not without matplotlib.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, and no state that others share
        from PIL import Image  # matplotlib's own
    except ImportError:
        return False
    depths = config.visible_depth
    assert isinstance(depths, dict)
    figure = Figure(figsize=(7, 2.8), dpi=80)
    figure.subplots_adjust(left=0.1, right=0.97, bottom=0.18, top=0.89, wspace=0.25)
    curve, heads = figure.subplots(1, 2)
    draw_curve(curve, config)
    rows = [row for _, row in sorted(depths.items()) if isinstance(row, list)]
    widest = max(map(len, rows))
    shown = [[*row, *([math.nan] * (widest - len(row)))] for row in rows]
    image = heads.imshow(shown, aspect="auto", cmap="viridis", vmin=0, vmax=config.sparsest_depth)
    heads.set(xlabel="query head", ylabel="sparse layer", title="visible depth: deeper is sparser")
    figure.colorbar(image, ax=heads)
    drawn, made = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(64).save(made, format="png")  # a quarter of the size
    replace_bytes(path, made.getvalue())
    return True
