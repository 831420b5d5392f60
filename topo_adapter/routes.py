"""`record_routes`: the digits a model chooses for a text, so that anyone can rebuild its mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError
from .layer import RecordedRoutes, hosts


@torch.no_grad()
def record_routes(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
) -> dict[int, RecordedRoutes]:
    """Run one forward in evaluation mode and return the hard routes of every routed layer.

    Args:
        model: a PeftModel with a topology adapter, or a merged model.
        input_ids: int64 `[B, T]`. attention_mask: `[B, T]`, 0 marks padding.

    Returns:
        Layer index -> `RecordedRoutes`: `query_digits` and `key_digits` int64 `[B, H, T, L]` with `H` query
        heads (routes per KV head are repeated), `visible_depth` int64 `[H]`. Digits of padding tokens are
        arbitrary. With docs/method.md section 2 this determines what every query sees.

    Raises:
        UnsupportedModelError: no layer of the model has an active topology.
    """
    found = hosts(model)
    records: dict[int, RecordedRoutes] = {}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for host in found:
            host.recorder = records
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for host in found:
            host.recorder = None
        for module, mode in modes.items():
            module.training = mode
    if not records:
        raise UnsupportedModelError("model must have an active, enabled topology adapter or a merged topology")
    return records
