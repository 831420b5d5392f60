"""Figures of density, dial, tree and mask, drawn by matplotlib without any of its global state."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..config import TopologyConfig
from ..errors import MissingPackageError, TopologyConfigError
from ..layer import active_layers
from ..measuring.routes import measure_density
from ..picture import draw_curve
from .look import Look, check_head, check_text, looking
from .shown import Picture, one_line, token_ids, words_of

BLUE, GREEN, ORANGE, GREY = "#1b6ca8", "#0b9e8a", "#c4772b", "#bbbbbb"
#: Most tokens of a picture of all pairs, and most leaves of a picture of a tree.
MAX_PICTURED, MAX_LEAVES_DRAWN = 2048, 64


def new_figure(width: float, height: float) -> Any:
    """A `matplotlib.figure.Figure` of so many inches.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "matplotlib must be installed to draw pictures, got none: pip install 'topo-adapter[viz]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def density_map(model: nn.Module, input_ids: Tensor) -> Picture:
    """Density of every routed layer and query head on a text: visible over causal pairs.

    Args:
        model: a PeftModel with an active topology adapter, or a merged model. input_ids: int64 `[B, T]`, unpadded.

    Raises:
        UnsupportedModelError: no layer has an active topology. MissingPackageError: no matplotlib.
    """
    figure = new_figure(5.2, 6)
    device = next(model.parameters()).device
    densities = measure_density(model, input_ids.to(device))
    grid = torch.full((len(densities), max(map(len, densities.values()))), float("nan"), dtype=torch.float64)
    for row, values in zip(grid, densities.values(), strict=True):
        row[: len(values)] = values
    mean = torch.cat(list(densities.values())).mean().item()
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set(title=f"{input_ids.shape[1]:,} tokens, mean density {mean:.3f}", xlabel="query head", ylabel="layer")
    axes.set_xticks(range(grid.shape[1]))
    axes.set_yticks(range(len(densities)), list(densities), fontsize=7)
    figure.colorbar(image, ax=axes, label="visible pairs / causal pairs")
    return Picture(figure, f"Density of each layer and query head on {input_ids.shape[1]:,} tokens.")


def dial_curve(source: TopologyConfig | nn.Module) -> Picture:
    """What the density dial offers: estimated loss over density, from the table that `calibrate` measured.

    Args:
        source: a calibrated config, or a model that carries one.

    Raises:
        TopologyConfigError: not calibrated. UnsupportedModelError: a model without an active topology.
        MissingPackageError: no matplotlib.
    """
    config = source if isinstance(source, TopologyConfig) else active_layers(source)[0][1]
    if config.calibration is None:
        raise TopologyConfigError("calibration must be there for a dial to draw, got None; call calibrate")
    figure = new_figure(6.4, 4)
    axes = figure.subplots()
    draw_curve(axes, config)
    axes.grid(alpha=0.3)
    return Picture(figure, "Estimated KL to the dense model over the density that the dial is turned to.")


def tree(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Tensor,
    layer: int,
    head: int,
    depth: int | None = None,
) -> Picture:
    """The first levels of one head's tree with the tokens of a text, as keys, in its balls.

    Args:
        text: a string, or token ids int64 `[1, T]`; at most 4,096 tokens. layer, head: a routed layer and one of its
            query heads.
        depth: levels to draw, from 1 to the tree's own; None: the head's visible depth, or the deepest of 64 balls.

    Raises:
        UnsupportedModelError: no layer has an active topology. MissingPackageError: no matplotlib.
        TopologyConfigError: the text is empty or too long; layer, head or depth are out of range; more than 64 leaves.
    """
    check_head(model, layer, head)
    ids = token_ids(tokenizer, text)
    kept: list[tuple[int, int, int, list[int]]] = []

    def see(look: Look) -> None:
        rule = look.visibility.rule
        kept.append((rule.arity, rule.levels, rule.depths[head], look.visibility.keys.address[0, head].tolist()))

    looking(model, ids, see, {layer})
    ((arity, levels, visible, addresses),) = kept
    shown = _fitting(arity, levels, visible) if depth is None else depth
    if isinstance(shown, bool) or not isinstance(shown, int) or not 1 <= shown <= levels:
        raise TopologyConfigError(f"depth must be an integer in 1..{levels}, the levels of the tree, got {depth!r}")
    if arity**shown > MAX_LEAVES_DRAWN:
        raise TopologyConfigError(
            f"depth must leave at most {MAX_LEAVES_DRAWN} balls to draw, got {arity} ** {shown}; draw fewer levels"
        )
    words = words_of(tokenizer, ids)
    leaves: dict[tuple[int, ...], Counter[str]] = {}
    for word, address in zip(words, addresses, strict=True):
        digits = tuple(address // arity**level % arity for level in range(shown))
        leaves.setdefault(digits, Counter())[word] += 1
    figure = new_figure(9, 1 + 0.26 * len(leaves))
    _draw_tree(figure.subplots(), leaves, shown, len(words))
    sees = "everything" if visible == 0 else "no ball" if visible > levels else f"balls of depth {visible}"
    figure.suptitle(f"layer {layer}, head {head}: {len(words):,} tokens as keys; its queries see {sees}", fontsize=11)
    return Picture(figure, f"The first {shown} of {levels} levels; lines are as wide as the number of tokens.")


def _fitting(arity: int, levels: int, visible: int) -> int:
    """The visible depth, where that is a level of the tree, or the deepest above it that is not too much to draw."""
    deepest = visible if 1 <= visible <= levels else levels
    return max([1, *(depth for depth in range(1, deepest + 1) if arity**depth <= MAX_LEAVES_DRAWN)])


def _draw_tree(axes: Any, leaves: dict[tuple[int, ...], Counter[str]], levels: int, total: int) -> None:
    """The root at the left; at each leaf its number of tokens and the most frequent of them."""
    order = sorted(leaves)
    height = {digits: float(place) for place, digits in enumerate(order)}
    size = {digits: words.total() for digits, words in leaves.items()}
    below = order
    for level in range(levels, 0, -1):
        above: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
        for digits in below:
            above.setdefault(digits[:-1], []).append(digits)
        for parent, children in above.items():
            height[parent] = sum(height[child] for child in children) / len(children)
            size[parent] = sum(size[child] for child in children)
            for child in children:
                ends = [level - 1, level - 0.5, level], [height[parent], height[child], height[child]]
                wide = 0.6 + 9 * size[child] / total
                axes.plot(*ends, color=BLUE, linewidth=wide, solid_capstyle="round", alpha=0.75)
        below = list(above)
    for digits in order:
        words, room, names = leaves[digits], 72, []
        for word, count in words.most_common():
            name = f"“{one_line(word)}”" + (f" x{count}" if count > 1 else "")
            room -= len(name) + 2
            if room < 0:
                break
            names.append(name)
        label = f"{size[digits]:>4}  {'  '.join(names)}"
        axes.text(levels + 0.1, height[digits], label, va="center", fontsize=8.5, parse_math=False)
    axes.set(xlim=(-0.1, levels * 3.2), ylim=(len(order) - 0.4, -0.6))
    axes.axis("off")


def head_mask(model: nn.Module, input_ids: Tensor, layer: int, head: int) -> Picture:
    """One head's mask over its dense attention weights: blue where the query sees the key, orange where it does not.

    The weights are the softmax over all earlier tokens of the scores of this forward; a row's strongest is darkest.

    Args:
        input_ids: int64 `[1, T]`, at most 2,048 tokens: the picture holds `T * T` points.
        layer, head: a routed layer and one of its query heads.

    Raises:
        UnsupportedModelError: no layer has an active topology. MissingPackageError: no matplotlib.
        TopologyConfigError: not one text of at most 2,048 tokens; layer or head are out of range.
    """
    check_text(input_ids, MAX_PICTURED)
    check_head(model, layer, head)
    length = input_ids.shape[1]
    image, kept, visible = torch.ones(length, length, 3), 0.0, 0

    def see(look: Look) -> None:
        nonlocal kept, visible
        for rows in look.blocks():
            weights, mask = look.weights(rows)[head].cpu(), look.mask(rows)[head].cpu()
            kept += (weights * mask).sum().item()
            visible += int(mask.sum())
            image[rows] = _tinted(weights, mask, look.visibility.of_rows(rows).causal()[0].cpu())

    looking(model, input_ids, see, {layer}, MAX_PICTURED)
    figure = new_figure(6.4, 6.6)
    axes = figure.subplots()
    axes.imshow(image, interpolation="nearest" if length <= 600 else "antialiased")
    density = visible / (length * (length + 1) / 2)
    axes.set(
        title=f"layer {layer}, head {head}: {density:.1%} of the pairs, {kept / length:.1%} of the attention weight",
        xlabel="key, token",
        ylabel="query, token",
    )
    axes.title.set_fontsize(10)
    return Picture(figure, "Blue: seen, orange: hidden; the darker, the larger the dense attention weight.")


def _tinted(weights: Tensor, mask: Tensor, causal: Tensor) -> Tensor:
    """Colours `[t, T, 3]` in [0, 1]; small weights are lifted, or a picture of a long text is blank."""
    strength = (weights / weights.amax(-1, keepdim=True)).pow(0.4)[..., None]
    seen, hidden = (torch.tensor(rgb) for rgb in ((0.05, 0.25, 0.5), (0.85, 0.35, 0.05)))
    full = torch.where(mask[..., None], seen, hidden)
    faint = torch.where(mask[..., None], torch.tensor((0.88, 0.93, 0.98)), torch.tensor((1.0, 1.0, 1.0)))
    return torch.where(causal[..., None], faint + (full - faint) * strength, torch.tensor((0.94, 0.94, 0.94)))
