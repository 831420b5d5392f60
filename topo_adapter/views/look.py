"""What each head sees of a text, beside what its dense attention would look at: in numbers, pair by pair."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..core.passes import Pass, during
from ..core.scoring import Scoring
from ..core.visibility import Visibility, per_head
from ..errors import TopologyConfigError
from ..forward import Attention
from ..hf.gates import text_decoder
from ..layer import active_layers, evaluating
from ..ops.plan import make_plan

#: Most tokens of a text whose pairs are looked at one by one, in `O(T^2)` time.
MAX_TOKENS = 4096
_QUERIES = 256  # rows of weights that are formed at a time


def check_text(input_ids: Tensor, most: int = MAX_TOKENS) -> None:
    """Raises TopologyConfigError unless it is one text, int64 `[1, T]`, of 1 to `most` tokens."""
    if not isinstance(input_ids, Tensor) or input_ids.dtype != torch.int64 or input_ids.ndim != 2:
        got = f"{input_ids.dtype} {list(input_ids.shape)}" if isinstance(input_ids, Tensor) else type(input_ids)
        raise TopologyConfigError(f"input_ids must be an int64 tensor [1, T] of token ids, got {got}")
    batch, length = input_ids.shape
    if batch != 1 or not 1 <= length <= most:
        raise TopologyConfigError(
            f"input_ids must be one text of 1 to {most:,} tokens, got {batch:,} of {length:,}; cut it, and show its "
            "parts one by one"
        )


def check_layers(model: nn.Module, layers: Collection[int]) -> None:
    """Raises TopologyConfigError unless all are routed."""
    routed = sorted(host.geometry.layer for host, _, _ in active_layers(model))
    if not layers or not set(layers) <= set(routed):
        raise TopologyConfigError(f"layers must be one or more of the routed ones, {routed}, got {sorted(layers)}")


def check_head(model: nn.Module, layer: int, head: int) -> None:
    """Raises TopologyConfigError unless the layer is routed and has that query head."""
    check_layers(model, {layer})
    heads = next(host.geometry.num_heads for host, _, _ in active_layers(model) if host.geometry.layer == layer)
    if not 0 <= head < heads:
        raise TopologyConfigError(f"head must be in 0..{heads - 1}, the query heads of layer {layer}, got {head}")


@dataclass(frozen=True)
class Look:
    """One layer's `H` query heads on one text of `T` tokens.

    visibility: who sees whom, with a route for each query head.
    query: `[1, H, T, D]`. key, value: `[1, H_kv, T, D]`.
    """

    layer: int
    visibility: Visibility
    query: Tensor
    key: Tensor
    value: Tensor
    scoring: Scoring

    def blocks(self) -> Iterator[slice]:
        """The queries, some at a time."""
        length = self.query.shape[2]
        for start in range(0, length, _QUERIES):
            yield slice(start, min(start + _QUERIES, length))

    def scores(self, rows: slice) -> Tensor:
        """float32 `[H, t, T]`; -inf at later tokens."""
        key = per_head(self.key, self.query.shape[1])[0].float()
        scores = self.scoring.capped(self.query[0, :, rows].float() @ key.transpose(-1, -2) * self.scoring.scale)
        return scores.masked_fill(~self.visibility.of_rows(rows).causal(), float("-inf"))

    def weights(self, rows: slice) -> Tensor:
        """Dense attention weights, float32 `[H, t, T]`: over all earlier tokens, seen or not."""
        return self.scores(rows).softmax(-1)

    def mask(self, rows: slice) -> Tensor:
        """bool `[H, t, T]`: what the queries see (docs/method.md, section 2)."""
        return self.visibility.of_rows(rows).mask()[0]

    def far(self, rows: slice) -> Tensor:
        """bool `[t, T]`: earlier tokens that neither window nor sinks show."""
        some = self.visibility.of_rows(rows)
        return (some.causal() & ~some.always())[0]

    def density(self) -> list[float]:
        """Of each head: visible over causal pairs."""
        plan = make_plan(self.visibility)
        return (plan.visible_count() / plan.causal_count()).tolist()

    def near_alone(self) -> Tensor:
        """What the layer would return if window and sinks were all it saw, `[1, T, H, D]`."""
        value = per_head(self.value, self.query.shape[1])[0].float()
        parts = [
            self.scores(rows).masked_fill(~self.visibility.of_rows(rows).always(), float("-inf")).softmax(-1) @ value
            for rows in self.blocks()
        ]
        return torch.cat(parts, 1).transpose(0, 1)[None].to(self.query.dtype)


def _look(attention: Attention) -> Look:
    call, tensors = attention.call, (attention.query, attention.key, attention.value)
    return Look(call.host.geometry.layer, call.visibility.by_head(), *tensors, attention.scoring)


class _Looking(Pass):
    """Shows every layer to `see`, and runs as always."""

    needs_addresses = True

    def __init__(self, see: Callable[[Look], None], layers: Collection[int] | None) -> None:
        self.see, self.layers = see, layers

    def attend(self, attention: Attention) -> tuple[Tensor, Tensor | None]:
        if self.layers is None or attention.call.host.geometry.layer in self.layers:
            self.see(_look(attention))
        return attention.topology()


class Dense(Pass):
    """The base model's own attention."""

    def attend(self, attention: Attention) -> tuple[Tensor, Tensor | None]:
        return attention.base()


class NearAlone(Pass):
    """Window and sinks, no tree."""

    needs_addresses = True

    def attend(self, attention: Attention) -> tuple[Tensor, Tensor | None]:
        return _look(attention).near_alone(), None


def looking(
    model: nn.Module,
    input_ids: Tensor,
    see: Callable[[Look], None],
    layers: Collection[int] | None = None,
    most: int = MAX_TOKENS,
) -> None:
    """Run one forward in evaluation mode and hand every routed layer, or those of `layers`, to `see`.

    Raises:
        UnsupportedModelError: no layer of the model has an active topology.
        TopologyConfigError: `input_ids` is not one text of at most `most` tokens; a layer is not routed.
    """
    check_text(input_ids, most)
    if layers is not None:
        check_layers(model, layers)
    active_layers(model)
    final_states(model, input_ids, _Looking(see, layers))


@torch.no_grad()
def final_states(model: nn.Module, input_ids: Tensor, purpose: Pass) -> Tensor:
    """The last hidden states `[1, T, hidden_size]` of a forward for `purpose`, in evaluation mode; no logits."""
    base = base_of(model)
    ids = input_ids.to(next(base.parameters()).device)
    with during(model, purpose), evaluating(model):
        return text_decoder(base)(input_ids=ids, use_cache=False, return_dict=True).last_hidden_state


def base_of(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel, or itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@dataclass(frozen=True)
class FarLink:
    """A query's strongest dense attention beyond window and sinks, in one head.

    query, key: indices of the tokens. weight: of the dense attention, in [0, 1]. kept: whether the tree shows the key.
    shown: share of the query's far tokens that the tree shows, in [0, 1].
    """

    layer: int
    head: int
    query: int
    key: int
    weight: float
    kept: bool
    shown: float


def strongest_links(
    model: nn.Module, input_ids: Tensor, min_weight: float = 0.1, queries: Collection[int] | None = None
) -> list[FarLink]:
    """For each head and query the far key of the largest dense attention weight, strongest first.

    Far keys are those beyond window and sinks. The weights are the softmax over all earlier tokens of the scores of
    this same forward, in which the adapter is as the model has it (off, in force, merged). Of equal ones the first.

    Args:
        input_ids: int64 `[1, T]`, at most 4,096 tokens. min_weight: leave weaker links out, in [0, 1].
        queries: indices of the queries to look at; None: all.

    Raises:
        UnsupportedModelError, TopologyConfigError: as `looking`; min_weight out of range.
    """
    if not 0 <= min_weight <= 1:
        raise TopologyConfigError(f"min_weight must be an attention weight in [0, 1], got {min_weight}")
    found: list[FarLink] = []
    looking(model, input_ids, lambda look: found.extend(links_of(look, min_weight, queries)))
    return sorted(found, key=lambda link: (-link.weight, link.layer, link.head, link.query))


def links_of(look: Look, min_weight: float, queries: Collection[int] | None) -> Iterator[FarLink]:
    """`strongest_links` of one layer, in the order of its queries."""
    for rows in look.blocks():
        if queries is not None and not any(rows.start <= query < rows.stop for query in queries):
            continue
        far = look.far(rows)
        seen = look.mask(rows) & far
        weight, key = (look.weights(rows) * far).max(-1)
        kept = seen.gather(-1, key[..., None])[..., 0]
        shown = seen.sum(-1) / far.sum(-1).clamp(min=1)
        strong = (weight >= min_weight) & far.any(-1)
        for head, row in strong.nonzero().tolist():
            query = rows.start + row
            if queries is None or query in queries:
                values = (each[head, row].item() for each in (key, weight, kept, shown))
                yield _link(look.layer, head, query, *values)


def _link(layer: int, head: int, query: int, key: float, weight: float, kept: float, shown: float) -> FarLink:
    return FarLink(layer, head, query, int(key), weight, bool(kept), shown)


@dataclass(frozen=True)
class Sharing:
    """Of a head's far pairs (beyond window and sinks), the shares in [0, 1] that the tree shows.

    same: of pairs of two equal tokens. any: of all. pairs: number of the former.
    """

    layer: int
    head: int
    same: float
    any: float
    pairs: int

    @property
    def lift(self) -> float:
        """How many times as often equal tokens share a ball; 1 is chance, which a head without far pairs is given."""
        return self.same / self.any if self.any else 1.0


def same_token_sharing(model: nn.Module, input_ids: Tensor) -> list[Sharing]:
    """Whether heads sort tokens by what they are: how often a query's ball holds the earlier, equal tokens.

    Args:
        input_ids: int64 `[1, T]`, at most 4,096 tokens, with at least one token that comes again beyond the window.

    Returns:
        One entry for each routed layer and query head, in order.

    Raises:
        UnsupportedModelError, TopologyConfigError: as `looking`; no token comes again beyond the window.
    """
    found: list[Sharing] = []

    def see(look: Look) -> None:
        ids = input_ids[0].to(look.query.device)
        counts = torch.zeros(look.query.shape[1], 2, dtype=torch.int64, device=ids.device)
        pairs = torch.zeros(2, dtype=torch.int64, device=ids.device)
        for rows in look.blocks():
            far, mask = look.far(rows), look.mask(rows)
            for which, some in enumerate((far & (ids[rows, None] == ids), far)):
                counts[:, which] += (mask & some).sum((1, 2))
                pairs[which] += some.sum()
        equal, all_pairs = pairs.tolist()
        if not equal:
            raise TopologyConfigError(
                f"input_ids must hold a token that comes again beyond the local window of "
                f"{look.visibility.rule.local_window} tokens, got {len(ids)} tokens without one; take a longer text"
            )
        for head, (same, shown) in enumerate(counts.tolist()):
            found.append(Sharing(look.layer, head, same / equal, shown / all_pairs, equal))

    looking(model, input_ids, see)
    return found
