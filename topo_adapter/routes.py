"""`record_routes`: the digits a model chooses for a text, so that anyone can rebuild its mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError
from .layer import RecordedRoutes, active_layers, evaluating, hosts
from .layout import SequenceLayout, layout_from_padding
from .plan import make_plan


@torch.no_grad()
def record_routes(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
) -> dict[int, RecordedRoutes]:
    """Run one forward in evaluation mode and return the hard routes of every routed layer.

    Args:
        model: a PeftModel with a topology adapter, or a merged model.
        input_ids: int64 `[B, T]`. attention_mask: `[B, T]`, 0 marks padding.

    Returns:
        Layer index -> `RecordedRoutes`: `visits` int64 `[B, H, m, T]` with `H` query heads (routes per KV head are
        repeated), `query_digits` (of the first visit) and `key_digits` int64 `[B, H, T, L]`, `visible_depth` int64
        `[H]`. Those of padding tokens are arbitrary. With docs/method.md section 2 this determines what every query
        sees.

    Raises:
        UnsupportedModelError: no layer of the model has an active topology.
    """
    found = hosts(model)
    records: dict[int, RecordedRoutes] = {}
    try:
        for host in found:
            host.recorder = records
        with evaluating(model):
            model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for host in found:
            host.recorder = None
    if not records:
        raise UnsupportedModelError("model must have an active, enabled topology adapter or a merged topology")
    return records


@torch.no_grad()
def measure_density(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[int, Tensor]:
    """Realised density of every routed layer and head on a text: visible pairs over causal pairs.

    Counted exactly from the hard routes, window and sinks included, in `O(N log N)`.

    Args: as `record_routes`.

    Returns:
        Layer index -> float64 `[H]`, in `(0, 1]`.
    """
    records = record_routes(model, input_ids, attention_mask)
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    layout = layout_from_padding(real)
    densities = {}
    for host, config, _ in active_layers(model):
        record = records[host.geometry.layer]
        device = record.visits.device
        tokens = SequenceLayout(layout.document.to(device), layout.position.to(device))
        plan = make_plan(record.visibility(tokens, config))
        densities[host.geometry.layer] = (plan.visible_count() / plan.causal_count()).cpu()
    return densities
