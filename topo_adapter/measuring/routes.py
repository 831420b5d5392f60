"""`record_routes`: the digits a model chooses for a text, so that anyone can rebuild its mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.layout import SequenceLayout, contiguous_layout, layout_from_padding
from ..core.passes import Pass, during
from ..core.records import Keys
from ..core.rule import Rule
from ..core.tree import address_to_digits, digits_to_address
from ..core.visibility import Visibility, per_head
from ..errors import TopologyConfigError, UnsupportedModelError
from ..forward import Attention
from ..layer import active_layers, evaluating
from ..ops.plan import make_plan


@dataclass(frozen=True)
class RecordedRoutes:
    """Digits of one layer, for anyone who wants to rebuild the mask of docs/method.md section 2.

    visits: int64 `[B, H, m, T]`, `H` query heads: addresses that lie in the balls which a query sees, no two in one,
    -1 for none. query_digits, key_digits: int64 `[B, H, T, L]`, the likeliest of the queries and those of the keys.
    visible_depth: int64 `[H]`.
    """

    query_digits: Tensor
    key_digits: Tensor
    visible_depth: Tensor
    visits: Tensor

    def visibility(
        self, layout: SequenceLayout, arity: int, local_window: int, num_sink_tokens: int, dense_until: int = 0
    ) -> Visibility:
        """Who sees whom of these tokens."""
        keys = Keys(digits_to_address(self.key_digits, arity), layout)
        depths = tuple(self.visible_depth.tolist())
        visits = (self.visits.shape[2],) * len(depths)  # at most: those that a head has not are -1
        levels = self.key_digits.shape[-1]
        rule = Rule(arity, levels, depths, len(depths), local_window, num_sink_tokens, visits, dense_until)
        return Visibility(self.visits, layout, keys, rule)

    def balls(self, arity: int) -> tuple[Tensor, Tensor]:
        """Balls at the visible depths, of the queries' visits int64 `[B, H, m, T]`, -1 for none, and of the keys
        `[B, H, T]`: the tree shows a query the keys of its balls."""
        batch, _, _, length = self.visits.shape
        return self.visibility(contiguous_layout(batch, length, self.visits.device), arity, 1, 0).balls()


class Record(Pass):
    """Keeps the hard routes of every layer."""

    needs_addresses = True

    def __init__(self) -> None:
        self.routes: dict[int, RecordedRoutes] = {}

    def attend(self, attention: Attention) -> tuple[Tensor, Tensor | None]:
        seen = attention.call.visibility
        rule, depths = seen.rule, torch.tensor(seen.rule.depths, device=seen.visits.device)
        visits = per_head(seen.visits.long(), len(depths))
        key = per_head(address_to_digits(seen.keys.address, rule.arity, rule.levels), len(depths))
        logits = seen.logits
        own = visits[:, :, 0] if logits is None else digits_to_address(logits.argmax(-1), rule.arity)
        query = per_head(address_to_digits(own, rule.arity, rule.levels), len(depths))
        self.routes[attention.call.host.geometry.layer] = RecordedRoutes(query, key, depths, visits)
        return attention.topology()


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
        repeated), `query_digits` and `key_digits` int64 `[B, H, T, L]`, `visible_depth` int64
        `[H]`. Those of padding tokens are arbitrary. With docs/method.md section 2 this determines what every query
        sees.

    Raises:
        UnsupportedModelError: no layer of the model has an active topology.
    """
    with during(model, Record()) as record, evaluating(model):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    if not record.routes:
        raise UnsupportedModelError("model must have an active, enabled topology adapter or a merged topology")
    return record.routes


@torch.no_grad()
def measure_density(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[int, Tensor]:
    """Realised density of every routed layer and head on a text: visible pairs over causal pairs.

    Counted exactly from the hard routes, window and sinks included, in `O(N log N)`.

    Args: as `record_routes`.

    Returns:
        Layer index -> float64 `[H]`, in `(0, 1]`.

    Raises:
        TopologyConfigError: every token is padding. UnsupportedModelError: as `record_routes`.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if not real.any():
        raise TopologyConfigError("attention_mask must leave a token to measure, got padding alone")
    records = record_routes(model, input_ids, attention_mask)
    layout = layout_from_padding(real)
    densities = {}
    for host, config, merged in active_layers(model):
        record = records[host.geometry.layer]
        device = record.visits.device
        tokens = SequenceLayout(layout.document.to(device), layout.position.to(device))
        plan = make_plan(record.visibility(tokens, config.arity, *host.always(config, merged)))
        densities[host.geometry.layer] = (plan.visible_count() / plan.causal_count()).cpu()
    return densities
