"""`balls_html`: the balls along a text as a page; point at a token to see what it sees."""

from __future__ import annotations

import json
from collections.abc import Collection
from importlib import resources
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..errors import TopologyConfigError
from ..layer import active_layers
from .look import Look, check_layers, check_text, looking
from .shown import Page, token_ids, words_of

#: Most balls that a page holds, two for each token, head and layer: about 10 MB.
MAX_BALLS = 2_500_000


def balls_html(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Tensor,
    layers: Collection[int] | int | None = None,
) -> Page:
    """The balls along a text as a page that loads nothing: which earlier tokens each token sees, in which head.

    Point at a token, or click to keep it, and choose layer and head. `page.html#layer=23&head=1&token=40` opens with
    that choice. Tokens enter the page as text, so that a text cannot run anything in it.

    Args:
        model: a PeftModel with an active topology adapter, merged or not, or a merged model.
        text: a string, or token ids int64 `[1, T]`; at most 4,096 tokens.
        layers: indices of routed layers; None: the one whose density is nearest to the mean.

    Raises:
        UnsupportedModelError: no layer of the model has an active topology.
        TopologyConfigError: the text is empty or too long, a layer is not routed, or the page would hold more than 2.5
            million balls (tokens x heads x layers x 2).
    """
    ids = token_ids(tokenizer, text)
    check_text(ids)
    geometries = {host.geometry.layer: host.geometry for host, _, _ in active_layers(model)}
    chosen = {layers} if isinstance(layers, int) else None if layers is None else set(layers)
    if chosen is not None:
        check_layers(model, chosen)
        balls = 2 * ids.shape[1] * sum(geometries[layer].num_heads for layer in chosen)
        if balls > MAX_BALLS:
            raise TopologyConfigError(
                f"layers must make a page of at most {MAX_BALLS:,} balls (tokens x heads x layers x 2), got "
                f"{len(chosen)} layers of {ids.shape[1]:,} tokens, {balls:,} balls; show fewer layers or less text"
            )
    found: dict[int, dict[str, Any]] = {}
    shared: dict[str, Any] = {}

    def see(look: Look) -> None:
        rule = look.visibility.rule
        window, sinks, dense_until = rule.always
        shared.update(window=window, sinks=sinks, dense=dense_until, levels=rule.levels)
        found[look.layer] = {"layer": look.layer, "heads": _heads(look)}

    looking(model, ids, see, chosen)
    if chosen is None:
        means = {layer: sum(head["density"] for head in of["heads"]) / len(of["heads"]) for layer, of in found.items()}
        mean = sum(means.values()) / len(means)
        typical = min(means, key=lambda layer: abs(means[layer] - mean))
        found = {typical: found[typical]}
    data = {"tokens": words_of(tokenizer, ids), **shared, "layers": [found[layer] for layer in sorted(found)]}
    template = resources.files(__package__).joinpath("balls.html").read_text(encoding="utf-8")
    return Page(template.replace("$data", _inside_a_script(data)))


def _heads(look: Look) -> list[dict[str, Any]]:
    query, key = look.visibility.balls()
    rows = zip(look.visibility.rule.depths, look.density(), query[0].tolist(), key[0].tolist(), strict=True)
    return [
        {"depth": depth, "density": round(share, 4), "query": visits, "key": balls}
        for depth, share, visits, balls in rows
    ]


def _inside_a_script(data: Any) -> str:
    """JSON that no HTML parser takes for the end of the script, a comment or markup."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
