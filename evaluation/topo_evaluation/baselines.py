"""Sparse attention that needs no training, on the frozen base model: what an adapter has to beat.

Each baseline is docs/method.md section 2 with another rule in place of the tree: a query sees its local window, the
attention sinks, and the *far* keys (the other causal ones) that the rule picks. Density is counted as defined there:
visible pairs over causal pairs, window and sinks included.

For evaluation only: scores of a block of queries against all keys are formed, `O(block * S)` memory per head and
`O(N^2)` time, and the oracles look at the very attention weights that they prune. Rows are whole, unpadded documents
without a cache; sliding-window layers run as in the base model.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from topo_adapter import RecordedRoutes, TopologyConfigError, UnsupportedModelError
from topo_adapter.core.visibility import always_density
from topo_adapter.hf.gates import FULL, layer_kind, text_decoder
from topo_adapter.layer import hosts

#: Name of the attention implementation; transformers looks for "flash", "sdpa", "paged", "flex_attention" in names.
IMPLEMENTATION = "evaluation_baseline"
_QUERIES = 256  # rows of scores that are formed at a time

#: Decides over a block of queries: (scores `[B, H, Q, S]`, -inf at future keys; far bool `[Q, S]`; index of the first
#: query) -> bool `[B, H, Q, S]`, the far keys to see. What it says of other pairs is ignored.
FarRule = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class LayerCall:
    """One layer's attention: q, k `[B, H, T, D]` in at least fp32, keys repeated for query heads; scale of `q k`."""

    layer: int
    q: Tensor
    k: Tensor
    scale: float


class Baseline(ABC):
    """A rule for far keys.

    window, sinks: `local_window` and `num_sink_tokens` of section 2. length: of the rows it was made for; None: any.
    """

    name: str

    def __init__(self, window: int, sinks: int, length: int | None = None) -> None:
        self.window, self.sinks, self.length = window, sinks, length

    @abstractmethod
    def far_rule(self, call: LayerCall) -> FarRule:
        """The rule for one layer's forward."""


@dataclass
class Tally:
    """What attention under a baseline did, per layer and head.

    visible, kept: layer -> float64 `[H]`, summed over rows. kept is the share of a query's dense attention weight
    (softmax of the scores of this same forward) that falls on visible keys. pairs, queries: causal pairs and queries.
    """

    visible: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)
    pairs: dict[int, int] = field(default_factory=dict)
    queries: dict[int, int] = field(default_factory=dict)

    def density(self) -> Tensor:
        """Visible over causal pairs, float64 `[layers, H]`."""
        return torch.stack([self.visible[layer].cpu() / self.pairs[layer] for layer in sorted(self.visible)])

    def kept_mass(self) -> Tensor:
        """Mean kept attention weight, float64 `[layers, H]`, in [0, 1]."""
        return torch.stack([self.kept[layer].cpu() / self.queries[layer] for layer in sorted(self.kept)])

    def add(self, layer: int, visible: Tensor, kept: Tensor, pairs: int, queries: int) -> None:
        self.visible[layer] = self.visible.get(layer, 0.0) + visible
        self.kept[layer] = self.kept.get(layer, 0.0) + kept
        self.pairs[layer] = self.pairs.get(layer, 0) + pairs
        self.queries[layer] = self.queries.get(layer, 0) + queries


def always(rows: Tensor, length: int, window: int, sinks: int) -> Tensor:
    """bool `[Q, length]`: pairs that window and sinks make visible, for the queries `rows` of one document."""
    keys = torch.arange(length, device=rows.device)
    gap = rows[:, None] - keys
    return (gap >= 0) & ((gap < window) | (keys < sinks))


def always_pairs(length: int, window: int, sinks: int) -> Tensor:
    """int64 `[length]`: the number of keys each query sees through window and sinks."""
    position = torch.arange(length)
    return (position + 1).clamp(max=window) + (position + 1 - window).clamp(min=0, max=sinks)


def far_pairs_of(length: int, window: int, sinks: int, density: float) -> int:
    """Far pairs that one head may see to be at `density`.

    Raises:
        TopologyConfigError: window and sinks alone exceed the density, or it exceeds 1.
    """
    least = always_density(length, window, sinks)
    if not least <= density <= 1:
        raise TopologyConfigError(
            f"density must be in [{least:.4f}, 1] at {length} tokens with window {window} and {sinks} sinks, "
            f"got {density}"
        )
    return round(density * _causal_pairs(length)) - int(always_pairs(length, window, sinks).sum())


def far_counts(length: int, window: int, sinks: int, density: float) -> Tensor:
    """int64 `[length]`: far keys of each query, the same for all queries that have so many, at a density.

    The common number is real: query `i` gets `floor((i + 1) k) - floor(i k)`, so that the mean is met.
    """
    wanted = far_pairs_of(length, window, sinks, density)
    position = torch.arange(length)
    far = position + 1 - always_pairs(length, window, sinks)

    def counts(k: float) -> Tensor:
        return torch.minimum(_spread(k, position), far)

    return counts(_bisect(lambda k: int(counts(k).sum()), wanted, float(length)))


class Window(Baseline):
    """Local window and sinks alone."""

    name = "window + sinks"

    def far_rule(self, call: LayerCall) -> FarRule:
        return lambda scores, far, first: torch.zeros_like(scores, dtype=torch.bool)


class LongerWindow(Window):
    """A window widened to a density, as near as a whole number of tokens comes to it."""

    name = "longer window"

    def __init__(self, window: int, sinks: int, length: int, density: float) -> None:
        far_pairs_of(length, window, sinks, density)  # refuses what cannot be reached
        low, high = window, length
        while low < high:
            middle = (low + high) // 2
            enough = always_density(length, middle, sinks) >= density
            low, high = (low, middle) if enough else (middle + 1, high)
        shorter = max(low - 1, window)
        best = min((low, shorter), key=lambda w: abs(always_density(length, w, sinks) - density))
        super().__init__(best, sinks, length)


class RandomBalls(Baseline):
    """Every token in a random ball, as a query and as a key, drawn anew per layer and head.

    The expected share of far pairs in one ball is met exactly by one ball smaller than the others; the realised one
    scatters around it.
    """

    name = "random balls"

    def __init__(self, window: int, sinks: int, length: int, density: float, seed: int = 0) -> None:
        super().__init__(window, sinks, length)
        self.seed = seed
        total = _causal_pairs(length) - int(always_pairs(length, window, sinks).sum())
        self.shares = _ball_shares(far_pairs_of(length, window, sinks, density) / total if total else 1.0)

    def far_rule(self, call: LayerCall) -> FarRule:
        if self.shares is None:
            return lambda scores, far, first: torch.zeros_like(scores, dtype=torch.bool)
        batch, heads, length, _ = call.q.shape
        generator = torch.Generator().manual_seed(self.seed * 100_003 + call.layer)
        drawn = torch.multinomial(self.shares, 2 * batch * heads * length, replacement=True, generator=generator)
        query, key = drawn.view(2, batch, heads, length).to(call.q.device)
        return lambda scores, far, first: query[:, :, first : first + len(far), None] == key[:, :, None]


class BlockTopK(Baseline):
    """Blocks of keys whose mean has the largest product with the query, per query head, as Quest and MoBA select.

    A query's own block is always seen. The number of blocks is the same for all queries of a layer (spread as in
    `far_counts`, for it is no whole number) and found for each layer and row so that the density is met: blocks that
    window or sinks overlap cost less than whole ones.
    """

    name = "block top-k"

    def __init__(self, window: int, sinks: int, density: float, block: int = 64) -> None:
        super().__init__(window, sinks)
        self.density, self.block = density, block

    def far_rule(self, call: LayerCall) -> FarRule:
        length, device = call.q.shape[2], call.q.device
        wanted = far_pairs_of(length, self.window, self.sinks, self.density)
        blocks = -(-length // self.block)
        position = torch.arange(length, device=device)
        own = position // self.block
        cost = torch.zeros(length, blocks, dtype=torch.long, device=device)  # far keys of each query in each block
        for first in range(0, length, _QUERIES):
            rows = position[first : first + _QUERIES]
            far = _far(rows, length, self.window, self.sinks)
            padded = nn.functional.pad(far, (0, blocks * self.block - length))
            cost[first : first + len(rows)] = padded.view(len(rows), blocks, self.block).sum(-1)
        far_pairs = wanted
        wanted -= int(cost.gather(1, own[:, None]).sum())
        if wanted < 0:
            raise TopologyConfigError(
                f"density {self.density} at {length} tokens leaves {far_pairs} far pairs, "
                f"a query's own block of {self.block} alone has {far_pairs - wanted}; choose smaller blocks"
            )
        candidate = (torch.arange(blocks, device=device) < own[:, None]) & (cost > 0)

        padded_keys = nn.functional.pad(call.k, (0, 0, 0, blocks * self.block - length))
        means = padded_keys.unflatten(2, (blocks, self.block)).mean(3)  # the last, partial block is no candidate
        scores = (call.q @ means.transpose(-1, -2)).masked_fill(~candidate, float("-inf"))
        ranked = scores.argsort(dim=-1, descending=True, stable=True)
        gained = (cost * candidate).expand_as(ranked).gather(-1, ranked).cumsum(-1)
        gained = nn.functional.pad(gained, (1, 0))  # [B, H, T, blocks + 1]: far keys that the first k blocks bring
        heads = gained.shape[0] * gained.shape[1]

        def pairs(k: float) -> int:
            taken = _spread(k, position).clamp(max=blocks)
            return int(gained.gather(-1, taken[:, None].expand(*gained.shape[:3], 1)).sum())

        taken = _spread(_bisect(pairs, wanted * heads, float(blocks)), position).clamp(max=blocks)

        def rule(scores: Tensor, far: Tensor, first: int) -> Tensor:
            rows = slice(first, first + len(far))
            take = torch.arange(blocks, device=device) < taken[rows, None]
            order = ranked[:, :, rows]
            chosen = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, take.expand_as(order))
            chosen &= candidate[rows]
            chosen |= torch.arange(blocks, device=device) == own[rows, None]
            return chosen.repeat_interleave(self.block, -1)[..., :length]

        return rule


class OracleTopK(Baseline):
    """The far keys of largest attention weight, equally many for each query and head (see `far_counts`)."""

    name = "oracle top-k"

    def __init__(self, window: int, sinks: int, length: int, density: float) -> None:
        super().__init__(window, sinks, length)
        self.counts = far_counts(length, window, sinks, density)

    def far_rule(self, call: LayerCall) -> FarRule:
        counts = self.counts.to(call.q.device)

        def rule(scores: Tensor, far: Tensor, first: int) -> Tensor:
            wanted = counts[first : first + len(far)]
            most = int(wanted.max())
            best = scores.masked_fill(~far, float("-inf")).topk(most, dim=-1).indices
            take = torch.arange(most, device=scores.device) < wanted[:, None]
            return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, take.expand_as(best))

        return rule


class OracleThreshold(Baseline):
    """The far keys whose attention weight reaches one threshold, the same for all layers, heads and queries."""

    name = "oracle threshold"

    def __init__(self, window: int, sinks: int, threshold: float) -> None:
        super().__init__(window, sinks)
        self.threshold = threshold

    def far_rule(self, call: LayerCall) -> FarRule:
        return lambda scores, far, first: scores.softmax(-1) >= self.threshold


class TreeRoutes(Baseline):
    """The balls of recorded routes: what an adapter's own mask keeps, counted from section 2's definition.

    records: of `record_routes`, on the same rows.
    """

    name = "adapter"

    def __init__(self, window: int, sinks: int, arity: int, records: dict[int, RecordedRoutes]) -> None:
        super().__init__(window, sinks)
        self.arity, self.records = arity, records

    def far_rule(self, call: LayerCall) -> FarRule:
        record = self.records.get(call.layer)
        if record is None:  # a layer without a route is dense
            return lambda scores, far, first: torch.ones_like(scores, dtype=torch.bool)
        if record.query_digits.shape[:3] != call.q.shape[:3]:
            raise TopologyConfigError(
                f"records must be of the rows that run: layer {call.layer} has batch, heads and length "
                f"{tuple(call.q.shape[:3])}, its record {tuple(record.query_digits.shape[:3])}"
            )
        query, key = record.balls(self.arity)
        return lambda scores, far, first: (query[..., first : first + len(far), None] == key[:, :, None, None]).any(2)


@torch.no_grad()
def find_threshold(
    model: PreTrainedModel,
    input_ids: Tensor,
    window: int,
    sinks: int,
    density: float,
    tolerance: float = 0.005,
) -> float:
    """The attention weight at which `OracleThreshold` has a density on these rows, by bisection of its logarithm.

    Args:
        input_ids: int64 `[K, T]`. tolerance: relative, of the density. About ten forwards per row are run.

    Raises:
        TopologyConfigError: window and sinks alone exceed the density.
    """
    far_pairs_of(input_ids.shape[1], window, sinks, density)
    low, high = -30.0, 0.0  # log2: nearly all weights are above the one, none above the other
    for _ in range(24):
        middle = (low + high) / 2
        with attending(model, OracleThreshold(window, sinks, 2.0**middle)) as tally:
            for row in input_ids:
                text_decoder(model)(input_ids=row[None].to(model.device), use_cache=False)
        found = tally.density().mean().item()
        if abs(found - density) <= tolerance * density:
            break
        low, high = (middle, high) if found > density else (low, middle)
    return 2.0**middle


# ------------------------------------------------------------------------------------------------------------
# Running it

_in_force: list[tuple[Baseline, Tally]] = []


@contextlib.contextmanager
def attending(model: PreTrainedModel, baseline: Baseline) -> Iterator[Tally]:
    """While active, the full-attention layers of `model` run `baseline`; yields the tally of all forwards.

    Args:
        model: a transformers model without an adapter, or with a topology adapter that is disabled.

    Raises:
        UnsupportedModelError: another baseline or an adapter is active, or (in a forward) a layer does what baselines
            do not model. TopologyConfigError (in a forward): the rows are not of the length the baseline was made for.
    """
    if _in_force:
        raise UnsupportedModelError(f"one baseline can run at a time, {_in_force[0][0].name!r} is active")
    active = [host.in_force() for host in hosts(model)]
    if any(found is not None and (found.merged or found.config.homotopy > 0) for found in active):
        raise UnsupportedModelError("model has an active topology adapter, disable it first: baselines need the base")
    config = model.config.get_text_config()
    before, tally = config._attn_implementation, Tally()
    _in_force.append((baseline, tally))
    config._attn_implementation = IMPLEMENTATION
    try:
        yield tally
    finally:
        config._attn_implementation = before
        _in_force.clear()


@torch.no_grad()
def baseline_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' interface; `[B, H, T, D]` and `[B, H_kv, T, D]` in, `[B, T, H, D]` out."""
    sliding = layer_kind(module) != FULL
    layer: int = module.layer_idx
    # "is not": an attention sink is a tensor, which compares element by element
    unmodelled = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    unmodelled += ["dropout"] * bool(kwargs.get("dropout"))
    masked = attention_mask is not None and not sliding  # a sliding window comes as a mask
    if unmodelled or masked or query.shape[2] != key.shape[2]:
        raise UnsupportedModelError(
            f"baselines need whole, unpadded rows without a cache and plain softmax attention; layer {layer} got "
            f"{unmodelled or 'a mask or cached keys'}"
        )
    if sliding and softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    dtype = torch.promote_types(query.dtype, torch.float32)
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (x.to(dtype).repeat_interleave(r, 1) for x, r in ((query, 1), (key, repeats), (value, repeats)))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    batch, heads, length, _ = q.shape
    out = torch.empty_like(q)

    def scores_of(rows: Tensor) -> Tensor:
        scores = q[:, :, rows] @ k.transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        return scores.masked_fill(rows[:, None] < torch.arange(length, device=q.device), float("-inf"))

    blocks = torch.arange(length, device=q.device).split(_QUERIES)
    if sliding:  # what the base does; sdpa has no soft cap
        for rows in blocks:
            scores = scores_of(rows)
            if attention_mask is not None:
                scores = scores.masked_fill(~attention_mask[:, :, rows], float("-inf"))
            out[:, :, rows] = scores.softmax(-1) @ v
        return out.transpose(1, 2).to(query.dtype), None

    baseline, tally = _in_force[0]
    if baseline.length not in (None, length):
        raise TopologyConfigError(f"{baseline.name!r} was made for rows of {baseline.length} tokens, got {length}")
    rule = baseline.far_rule(LayerCall(layer, q, k, scale))
    visible_count, kept = (torch.zeros(heads, dtype=torch.float64, device=q.device) for _ in range(2))
    for rows, first in zip(blocks, range(0, length, _QUERIES), strict=True):
        scores = scores_of(rows)
        far = _far(rows, length, baseline.window, baseline.sinks)
        near = always(rows, length, baseline.window, baseline.sinks)
        visible = (rule(scores, far, first) & far) | near
        visible_count += visible.sum((0, 2, 3))
        kept += (scores.softmax(-1) * visible).sum((0, 2, 3), dtype=torch.float64)
        out[:, :, rows] = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v
    tally.add(layer, visible_count, kept, batch * _causal_pairs(length), batch * length)
    return out.transpose(1, 2).to(query.dtype), None


AttentionInterface.register(IMPLEMENTATION, baseline_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def _far(rows: Tensor, length: int, window: int, sinks: int) -> Tensor:
    """bool `[Q, length]`: causal pairs that neither window nor sinks make visible."""
    return (rows[:, None] >= torch.arange(length, device=rows.device)) & ~always(rows, length, window, sinks)


def _causal_pairs(length: int) -> int:
    return length * (length + 1) // 2


def _spread(k: float, position: Tensor) -> Tensor:
    """Whole numbers with mean `k` over any run of positions."""
    position = position.double()
    return (((position + 1) * k).floor() - (position * k).floor()).long()


def _bisect(count: Callable[[float], int], wanted: int, high: float) -> float:
    """The argument in `[0, high]` at which a count that does not fall comes closest to `wanted`."""
    low, end = 0.0, high
    for _ in range(50):
        middle = (low + end) / 2
        low, end = (middle, end) if count(middle) < wanted else (low, middle)
    return min((low, end), key=lambda k: abs(count(k) - wanted))


def _ball_shares(same: float) -> Tensor | None:
    """Probabilities of the fewest balls in which two tokens meet with probability `same`; None for 0."""
    if same <= 0:
        return None
    count = max(1, int(-(-1 // same)))  # ceil(1 / same)
    if count == 1:
        return torch.ones(1)
    # x^2 + (1 - x)^2 / (count - 1) = same, the smaller root
    n = count - 1
    x = (1 - (max(0.0, 1 - count * (1 - n * same))) ** 0.5) / count
    return torch.tensor([x] + [(1 - x) / n] * n, dtype=torch.float64)
