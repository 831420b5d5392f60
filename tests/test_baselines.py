"""The sparse baselines against brute force, on tiny models and bare attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft_helpers import FAMILIES, HEADS, KV_HEADS, LAYERS, ROUTED, Stranger, logits_of, routed, tiny, tokens, twin
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from topo_adapter import TopologyConfigError, UnsupportedModelError, measure_density, record_routes
from topo_adapter.core.visibility import always_density
from topo_evaluation import baselines
from topo_evaluation.baselines import (
    Baseline,
    BlockTopK,
    LayerCall,
    LongerWindow,
    OracleThreshold,
    OracleTopK,
    RandomBalls,
    Tally,
    TreeRoutes,
    Window,
    attending,
    find_threshold,
)

WINDOW, SINKS, LENGTH, BLOCK = 5, 2, 48, 7
IDS = tokens(2, LENGTH)
PAIRS = LENGTH * (LENGTH + 1) // 2


@pytest.fixture(autouse=True)
def few_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of scores come in several blocks, the last of which is not full."""
    monkeypatch.setattr(baselines, "_QUERIES", 20)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny()


def run(model: PreTrainedModel, baseline: Baseline, ids: Tensor = IDS) -> tuple[Tensor, Tally]:
    with attending(model, baseline) as tally:
        logits = logits_of(model, ids)
    return logits, tally


# ---------------------------------------------------------------- a second account of attention and the mask


def pairs(length: int = LENGTH, window: int = WINDOW, sinks: int = SINKS) -> tuple[Tensor, Tensor]:
    """Causal pairs, and those that window or sinks make visible, pair by pair."""
    causal, near = torch.zeros(2, length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(i + 1):
            causal[i, j] = True
            near[i, j] = i - j < window or j < sinks
    return causal, near


CAUSAL, NEAR = pairs()
FAR = CAUSAL & ~NEAR
LEAST = int(NEAR.sum()) / PAIRS


class Bare:
    """One call of the attention function whose values are the identity, so that what comes out is its weights.

    weights: `[B, H, T, T]` under the baseline; dense: the textbook's without one.
    """

    def __init__(self, model: PreTrainedModel, baseline: Baseline, seed: int = 0, batch: int = 2) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (LENGTH, LENGTH)  # heads as wide as the row is long
        q = torch.randn(batch, HEADS, *shape, generator=generator, dtype=torch.float64)
        k = torch.randn(batch, KV_HEADS, *shape, generator=generator, dtype=torch.float64)
        scale, module = 0.3, model.get_decoder().layers[0].self_attn
        with attending(model, baseline) as self.tally:
            values = torch.eye(LENGTH, dtype=torch.float64).expand(batch, KV_HEADS, *shape)
            out, _ = baselines.baseline_attention(module, q, k, values, None, scaling=scale)
        self.q, self.k = q, k.repeat_interleave(HEADS // KV_HEADS, 1)
        scores = torch.einsum("bhid,bhjd->bhij", self.q, self.k) * scale
        self.dense = scores.masked_fill(~CAUSAL, float("-inf")).softmax(-1)
        self.weights = out.transpose(1, 2)
        self.visible = self.weights > 0


# ---------------------------------------------------------------- what holds for every baseline

#: Every rule near density 0.5; how far from it a head may be, and the mean of all heads.
AT_HALF: dict[str, tuple[Callable[[], Baseline], float, float]] = {
    "longer window": (lambda: LongerWindow(WINDOW, SINKS, LENGTH, 0.5), LENGTH / PAIRS / 2, LENGTH / PAIRS / 2),
    "random balls": (lambda: RandomBalls(WINDOW, SINKS, LENGTH, 0.5), 0.1, 0.04),
    "block top-k": (lambda: BlockTopK(WINDOW, SINKS, 0.5, block=BLOCK), 0.03, 0.002),
    "oracle top-k": (lambda: OracleTopK(WINDOW, SINKS, LENGTH, 0.5), 0.002, 0.002),
}
DENSE: dict[str, Callable[[], Baseline]] = {
    "longer window": lambda: LongerWindow(WINDOW, SINKS, LENGTH, 1.0),
    "window": lambda: Window(LENGTH, SINKS),
    "random balls": lambda: RandomBalls(WINDOW, SINKS, LENGTH, 1.0),
    "block top-k": lambda: BlockTopK(WINDOW, SINKS, 1.0, block=BLOCK),
    "oracle top-k": lambda: OracleTopK(WINDOW, SINKS, LENGTH, 1.0),
    "oracle threshold": lambda: OracleThreshold(WINDOW, SINKS, 0.0),
    "no routes": lambda: TreeRoutes(WINDOW, SINKS, 2, {}),
}


@pytest.mark.parametrize("name", DENSE)
def test_dense_limit_is_the_base(model: PreTrainedModel, name: str) -> None:
    logits, tally = run(model, DENSE[name]())
    torch.testing.assert_close(logits, logits_of(model, IDS), atol=3e-5, rtol=0)
    assert (tally.density() == 1).all()
    torch.testing.assert_close(tally.kept_mass(), torch.ones(LAYERS, HEADS, dtype=torch.float64))


@pytest.mark.parametrize("name", AT_HALF)
def test_density_is_met_and_makes_a_difference(model: PreTrainedModel, name: str) -> None:
    make, of_head, of_mean = AT_HALF[name]
    logits, tally = run(model, make())
    density = tally.density()
    assert density.shape == (LAYERS, HEADS)
    assert (density - 0.5).abs().max() <= of_head
    assert abs(density.mean() - 0.5) <= of_mean
    assert (logits - logits_of(model, IDS)).abs().max() > 0.1


@pytest.mark.parametrize("name", [*AT_HALF, "window", "oracle threshold"])
def test_attention_is_the_dense_one_renormalised_over_the_visible(model: PreTrainedModel, name: str) -> None:
    """Window and sinks are seen, the future is not; the tally counts what was seen and the weight it had."""
    others: dict[str, Callable[[], Baseline]] = {
        "window": lambda: Window(WINDOW, SINKS),
        "oracle threshold": lambda: OracleThreshold(WINDOW, SINKS, 0.02),
    }
    baseline = AT_HALF[name][0]() if name in AT_HALF else others[name]()
    bare = Bare(model, baseline)
    assert bare.visible[..., NEAR].all()
    assert not bare.visible[..., ~CAUSAL].any()
    assert name == "window" or bare.visible[..., FAR].any()
    assert not bare.visible[..., FAR].all()
    kept = bare.dense * bare.visible
    torch.testing.assert_close(bare.weights, kept / kept.sum(-1, keepdim=True))
    counts = bare.visible.double().sum((0, 2, 3))
    torch.testing.assert_close(bare.tally.density()[0], counts / (2 * PAIRS))
    torch.testing.assert_close(bare.tally.kept_mass()[0], kept.sum(-1).mean((0, 2)))


def test_the_tally_adds_up_over_forwards(model: PreTrainedModel) -> None:
    baseline = OracleThreshold(WINDOW, SINKS, 0.02)
    _, together = run(model, baseline)
    with attending(model, baseline) as tally:
        for row in IDS:
            logits_of(model, row[None])
    torch.testing.assert_close(tally.density(), together.density(), atol=2e-3, rtol=0)  # ties of rounding
    torch.testing.assert_close(tally.kept_mass(), together.kept_mass(), atol=1e-4, rtol=0)
    _, first = run(model, baseline, IDS[:1])
    assert not torch.equal(first.density(), tally.density())


# ---------------------------------------------------------------- one rule after another


def test_window_and_sinks_alone(model: PreTrainedModel) -> None:
    bare = Bare(model, Window(WINDOW, SINKS))
    assert (bare.visible == NEAR).all()
    for length, window, sinks in ((48, 5, 2), (48, 1, 0), (10, 3, 8), (4, 9, 2), (10, 1, 20)):
        causal, near = pairs(length, window, sinks)
        assert baselines.always_pairs(length, window, sinks).tolist() == near.sum(1).tolist()
        assert always_density(length, window, sinks) == int(near.sum()) / int(causal.sum())


@pytest.mark.parametrize("density", [LEAST, 0.4, 0.5, 0.73, 0.99, 1.0])
def test_longer_window_is_the_nearest_of_all(density: float) -> None:
    found = LongerWindow(WINDOW, SINKS, LENGTH, density)
    errors = {w: abs(int(pairs(window=w)[1].sum()) / PAIRS - density) for w in range(WINDOW, LENGTH + 1)}
    assert errors[found.window] == min(errors.values())
    assert found.sinks == SINKS


@pytest.mark.parametrize("density", [LEAST, 0.4, 0.5, 0.8, 1.0])
def test_oracle_top_k_takes_the_largest_weights(model: PreTrainedModel, density: float) -> None:
    bare = Bare(model, OracleTopK(WINDOW, SINKS, LENGTH, density))
    seen = bare.visible & FAR
    counts = seen.sum(-1)
    assert (counts == counts[:1, :1]).all()  # rows and heads alike
    wanted = counts[0, 0]
    for b in range(2):
        for h in range(HEADS):
            for i in range(LENGTH):
                far = [j for j in range(LENGTH) if FAR[i, j]]
                best = sorted(far, key=lambda j: -float(bare.dense[b, h, i, j]))[: int(wanted[i])]
                assert set(seen[b, h, i].nonzero().flatten().tolist()) == set(best)
    unlimited = wanted[wanted < FAR.sum(-1)]
    assert density == 1 or int(unlimited.max() - unlimited.min()) <= 1  # equally many for all that have so many
    assert abs(int(wanted.sum()) + int(NEAR.sum()) - density * PAIRS) <= 2


@pytest.mark.parametrize("density", [0.45, 0.6, 0.8])
def test_block_top_k_takes_the_best_blocks(model: PreTrainedModel, density: float) -> None:
    bare = Bare(model, BlockTopK(WINDOW, SINKS, density, block=BLOCK))
    blocks = [list(range(first, min(first + BLOCK, LENGTH))) for first in range(0, LENGTH, BLOCK)]
    taken: dict[int, set[int]] = {i: set() for i in range(LENGTH)}  # numbers of blocks, over rows and heads
    candidates = {i: [n for n in range(i // BLOCK) if any(FAR[i, j] for j in blocks[n])] for i in range(LENGTH)}
    for b in range(2):
        for h in range(HEADS):
            for i in range(LENGTH):
                products = {n: float(bare.q[b, h, i] @ bare.k[b, h, blocks[n]].mean(0)) for n in candidates[i]}
                seen = {n for n in candidates[i] if bare.visible[b, h, i, [j for j in blocks[n] if FAR[i, j]]].any()}
                taken[i].add(len(seen))
                assert seen == set(sorted(products, key=lambda n: -products[n])[: len(seen)])
                expected = [j for n in seen | {i // BLOCK} for j in blocks[n] if FAR[i, j]]
                assert (bare.visible[b, h, i] & FAR[i]).nonzero().flatten().tolist() == sorted(expected)
    assert all(len(numbers) == 1 for numbers in taken.values())
    unlimited = [n for i, numbers in taken.items() for n in numbers if n < len(candidates[i])]
    assert max(unlimited) - min(unlimited) <= 1
    assert abs(bare.tally.density().mean() - density) < 0.005


def test_block_top_k_refuses_blocks_that_alone_exceed_the_density(model: PreTrainedModel) -> None:
    with pytest.raises(TopologyConfigError, match="own block of 16 alone"):
        run(model, BlockTopK(WINDOW, SINKS, LEAST + 0.01, block=16))


@pytest.mark.parametrize("threshold", [0.003, 0.02, 0.1, 1.1])
def test_oracle_threshold_compares_weights(model: PreTrainedModel, threshold: float) -> None:
    bare = Bare(model, OracleThreshold(WINDOW, SINKS, threshold))
    assert torch.equal(bare.visible, NEAR | (FAR & (bare.dense >= threshold)))


@pytest.mark.parametrize("density", [LEAST + 0.02, 0.5, 0.9])
def test_find_threshold_reaches_the_density(model: PreTrainedModel, density: float) -> None:
    graphs: list[bool] = []
    hook = model.lm_head.register_forward_hook(lambda *_: pytest.fail("logits are not needed"))
    watch = model.get_decoder().register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    try:
        threshold = find_threshold(model, IDS, WINDOW, SINKS, density, tolerance=0.01)
    finally:
        hook.remove()
        watch.remove()
    assert graphs and not any(graphs)
    _, tally = run(model, OracleThreshold(WINDOW, SINKS, threshold))
    assert abs(tally.density().mean() / density - 1) <= 0.012
    assert tally.density().std() > 1e-3  # one threshold for all: heads differ


def test_random_balls_expect_the_density() -> None:
    density, heads, layers = 0.5, 4, 150
    baseline = RandomBalls(WINDOW, SINKS, LENGTH, density)
    share = (density * PAIRS - int(NEAR.sum())) / int(FAR.sum())
    q = torch.zeros(1, heads, LENGTH, 2)
    found, masks = [], set()
    for layer in range(layers):
        rule = baseline.far_rule(LayerCall(layer, q, q, 1.0))
        chosen = rule(torch.zeros(1, heads, LENGTH, LENGTH), FAR, 0)
        part = rule(torch.zeros(1, heads, 8, LENGTH), FAR[20:28], 20)
        assert torch.equal(part, chosen[:, :, 20:28])  # a block of queries sees what the whole would
        found.append(chosen[..., FAR].double().mean(-1).flatten())
        masks |= {head.numpy().tobytes() for head in chosen[0]}
    realised = torch.stack(found)
    assert len(masks) == layers * heads  # drawn anew per layer and head
    error = realised.std() / realised.numel() ** 0.5
    assert abs(realised.mean() - share) < 4 * error < 0.02
    again = RandomBalls(WINDOW, SINKS, LENGTH, density).far_rule(LayerCall(0, q, q, 1.0))
    other = RandomBalls(WINDOW, SINKS, LENGTH, density, seed=1).far_rule(LayerCall(0, q, q, 1.0))
    first, same, different = (
        r(torch.zeros(1, heads, LENGTH, LENGTH), FAR, 0)
        for r in (baseline.far_rule(LayerCall(0, q, q, 1.0)), again, other)
    )
    assert torch.equal(first, same) and not torch.equal(first, different)


@pytest.mark.parametrize("same", [1.0, 0.99, 0.6, 0.5, 1 / 3, 0.26, 0.1, 0.001])
def test_random_balls_are_the_fewest(same: float) -> None:
    shares = baselines._ball_shares(same)
    assert shares is not None
    shares = shares.double()
    assert (shares >= 0).all()
    assert float(shares.sum()) == pytest.approx(1)
    assert float((shares**2).sum()) == pytest.approx(same)
    used = int((shares > 1e-9).sum())
    assert used == 1 or 1 / (used - 1) > same - 1e-9  # equal shares meet least often, and one ball less is too often
    assert baselines._ball_shares(0.0) is None


def test_random_balls_at_the_least_density_are_the_window(model: PreTrainedModel) -> None:
    bare = Bare(model, RandomBalls(WINDOW, SINKS, LENGTH, LEAST))
    assert (bare.visible == NEAR).all()


# ---------------------------------------------------------------- what an adapter's own mask keeps

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "one depth": ("llama", {"visible_depth": 2}),
    "depth per head, a dense head": ("llama", {"visible_depth": {0: [0, 1, 2, 4], 1: 3, 2: 0, 3: [1, 5, 2, 3]}}),
    "arity 3 per KV head": (
        "llama",
        {"arity": 3, "route_per": "kv_head", "visible_depth": {layer: [1, 2] for layer in range(LAYERS)}},
    ),
    "tied": ("qwen3", {"tie_query_key": True}),
    "sliding layers, soft cap": ("gemma2", {}),
    "sliding layers": ("gemma3", {}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_tree_routes_are_the_adapter(name: str) -> None:
    family, settings = ADAPTERS[name]
    base = tiny(family, dtype=torch.float64)
    merged = routed(twin(base), local_window=WINDOW, num_sink_tokens=SINKS, **settings)
    merged.merge_adapter()
    records = record_routes(merged, IDS)
    logits, tally = run(base, TreeRoutes(WINDOW, SINKS, settings.get("arity", 2), records))

    torch.testing.assert_close(logits, logits_of(merged, IDS), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, Stranger(base, WINDOW, SINKS).logits(IDS, records), atol=1e-4, rtol=0)
    assert (logits - logits_of(base, IDS)).abs().max() > 0.1

    assert sorted(tally.visible) == ROUTED[family] == sorted(records)
    counted = measure_density(merged, IDS)
    for row, layer in enumerate(ROUTED[family]):
        brute = torch.stack([section_2(records[layer], head) for head in range(HEADS)])
        assert torch.equal(tally.density()[row], brute)
        torch.testing.assert_close(tally.density()[row], counted[layer])
    assert tally.density().min() < 0.9


def section_2(record: Any, head: int) -> Tensor:
    """The density of one head, counted pair by pair."""
    depth, levels, count = int(record.visible_depth[head]), record.query_digits.shape[-1], 0
    for b in range(len(IDS)):
        query, key = (x[b, head, :, :depth].tolist() for x in (record.query_digits, record.key_digits))
        for i in range(LENGTH):
            tree = [query[i] == key[j] and depth <= levels for j in range(i + 1)]
            count += sum(tree[j] or i - j < WINDOW or j < SINKS for j in range(i + 1))
    return torch.tensor(count / (len(IDS) * PAIRS), dtype=torch.float64)


def test_tree_routes_at_depth_0_are_dense(model: PreTrainedModel) -> None:
    records = record_routes(routed(twin(model), visible_depth=0), IDS)
    assert len(records) == LAYERS
    logits, tally = run(model, TreeRoutes(1, 0, 2, records))
    torch.testing.assert_close(logits, logits_of(model, IDS), atol=3e-5, rtol=0)
    assert (tally.density() == 1).all()


def test_kept_mass_of_an_adapter_is_the_share_of_dense_attention(model: PreTrainedModel) -> None:
    """In the first layer both see the same hidden states, so the base's own weights say it."""
    eager = twin(model)
    eager.set_attn_implementation("eager")
    records = record_routes(routed(twin(model), local_window=WINDOW, num_sink_tokens=SINKS), IDS)
    _, tally = run(model, TreeRoutes(WINDOW, SINKS, 2, records))
    with torch.no_grad():
        weights = eager(IDS, output_attentions=True, use_cache=False).attentions[0].double()
    record = records[0]
    same = (record.query_digits[:, :, :, None, :2] == record.key_digits[:, :, None, :, :2]).all(-1)
    expected = (weights * ((same & CAUSAL) | NEAR)).sum(-1).mean((0, 2))
    torch.testing.assert_close(tally.kept_mass()[0], expected, atol=1e-5, rtol=0)
    assert float(expected.min()) > 0.1 and float(expected.max()) < 0.999


def test_records_of_other_rows_are_refused(model: PreTrainedModel) -> None:
    records = record_routes(routed(twin(model)), IDS[:1])
    for ids in (IDS, IDS[:1, :-1]):
        with pytest.raises(TopologyConfigError, match="records must be of the rows that run"):
            run(model, TreeRoutes(WINDOW, SINKS, 2, records), ids)


# ---------------------------------------------------------------- layers that are left alone


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize("length", [4, LENGTH])  # shorter than the window of 6: transformers makes no mask
def test_sliding_window_layers_run_as_in_the_base(family: str, length: int) -> None:
    base, ids = tiny(family), tokens(2, length)
    logits, tally = run(base, OracleThreshold(1, 0, 0.0), ids)
    torch.testing.assert_close(logits, logits_of(base, ids), atol=3e-5, rtol=0)
    assert sorted(tally.visible) == ROUTED[family]
    assert tally.density().shape == (len(ROUTED[family]), HEADS)


def test_a_model_of_sliding_windows_alone_is_the_base() -> None:
    base = tiny("mistral", sliding_window=6)
    logits, tally = run(base, Window(1, 0))
    torch.testing.assert_close(logits, logits_of(base, IDS), atol=3e-5, rtol=0)
    assert not tally.visible


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_sparse_and_in_half_precision(family: str) -> None:
    base = tiny(family, dtype=torch.bfloat16)
    logits, tally = run(base, Window(WINDOW, SINKS))
    assert logits.dtype == torch.bfloat16
    assert torch.equal(tally.density(), torch.full((len(ROUTED[family]), HEADS), LEAST, dtype=torch.float64))


# ---------------------------------------------------------------- refusals


def test_padding_is_refused(model: PreTrainedModel) -> None:
    for padded in (slice(0, 3), slice(LENGTH - 3, LENGTH)):
        mask = torch.ones_like(IDS)
        mask[0, padded] = 0
        with (
            attending(model, Window(WINDOW, SINKS)),
            pytest.raises(UnsupportedModelError, match="layer 0 got a mask or cached keys"),
        ):
            logits_of(model, IDS, attention_mask=mask)
    with attending(model, Window(WINDOW, SINKS)):
        logits_of(model, IDS, attention_mask=torch.ones_like(IDS))  # hides nothing


def test_packed_rows_are_refused(model: PreTrainedModel) -> None:
    positions = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])[None]
    with attending(model, Window(WINDOW, SINKS)), pytest.raises(UnsupportedModelError, match="unpadded"):
        logits_of(model, IDS[:1], position_ids=positions)


@pytest.mark.parametrize("fresh", [1, 5])
def test_cached_keys_are_refused(model: PreTrainedModel, fresh: int) -> None:
    cache = DynamicCache(config=model.config)
    with attending(model, Window(WINDOW, SINKS)):
        logits_of(model, IDS, use_cache=True, past_key_values=cache)  # the first forward is whole rows
        with pytest.raises(UnsupportedModelError, match="without a cache"):
            logits_of(model, IDS[:, :fresh], use_cache=True, past_key_values=cache)


def test_attention_that_is_not_a_plain_softmax_is_refused(model: PreTrainedModel) -> None:
    module = model.get_decoder().layers[0].self_attn
    x = torch.zeros(1, HEADS, LENGTH, 8)
    for extra in ({"s_aux": torch.zeros(HEADS)}, {"position_bias": torch.zeros(HEADS, 1, 1)}, {"dropout": 0.1}):
        with attending(model, Window(WINDOW, SINKS)), pytest.raises(UnsupportedModelError, match=next(iter(extra))):
            baselines.baseline_attention(module, x, x, x, None, **extra)


def test_dropout_of_a_model_in_training_is_refused() -> None:
    base = tiny(attention_dropout=0.1)
    run(base, Window(WINDOW, SINKS))
    with pytest.raises(UnsupportedModelError, match="dropout"):
        run(base.train(), Window(WINDOW, SINKS))


def test_one_baseline_at_a_time(model: PreTrainedModel) -> None:
    with attending(model, Window(WINDOW, SINKS)) as tally:
        with (
            pytest.raises(UnsupportedModelError, match="'window \\+ sinks' is active"),
            attending(tiny(), OracleThreshold(WINDOW, SINKS, 0.1)),
        ):
            pass
        logits_of(model, IDS)  # the first one is still in force
    assert torch.equal(tally.density(), torch.full((LAYERS, HEADS), LEAST, dtype=torch.float64))


@pytest.mark.parametrize("density", [LEAST - 0.001, 0.0, 1.001])
@pytest.mark.parametrize("name", [*AT_HALF, "find threshold"])
def test_a_density_out_of_reach_is_refused(model: PreTrainedModel, name: str, density: float) -> None:
    make: dict[str, Callable[[], Any]] = {
        "longer window": lambda: LongerWindow(WINDOW, SINKS, LENGTH, density),
        "random balls": lambda: RandomBalls(WINDOW, SINKS, LENGTH, density),
        "block top-k": lambda: run(model, BlockTopK(WINDOW, SINKS, density, BLOCK)),
        "oracle top-k": lambda: OracleTopK(WINDOW, SINKS, LENGTH, density),
        "find threshold": lambda: find_threshold(model, IDS, WINDOW, SINKS, density),
    }
    with pytest.raises(TopologyConfigError, match=rf"density must be in \[{LEAST:.4f}, 1\] at {LENGTH} tokens"):
        make[name]()


@pytest.mark.parametrize("name", ["longer window", "random balls", "oracle top-k"])
def test_rows_of_another_length_are_refused(model: PreTrainedModel, name: str) -> None:
    for ids in (IDS[:, :-1], tokens(2, LENGTH + 1)):
        with pytest.raises(TopologyConfigError, match=f"made for rows of {LENGTH} tokens, got {ids.shape[1]}"):
            run(model, AT_HALF[name][0](), ids)


def test_an_adapter_in_force_is_refused(model: PreTrainedModel) -> None:
    adapter = routed(twin(model))
    plain = adapter.get_base_model()
    with pytest.raises(UnsupportedModelError, match="active topology adapter"):
        run(plain, Window(WINDOW, SINKS))
    expected, _ = run(model, Window(WINDOW, SINKS))
    with adapter.disable_adapter():
        logits, tally = run(plain, Window(WINDOW, SINKS))
    torch.testing.assert_close(logits, expected)
    assert len(tally.visible) == LAYERS
    adapter.merge_adapter()
    with pytest.raises(UnsupportedModelError, match="active topology adapter"):
        run(plain, Window(WINDOW, SINKS))
    dense, _ = run(routed(twin(model), homotopy=0.0).get_base_model(), Window(WINDOW, SINKS))
    torch.testing.assert_close(dense, expected)  # the base itself runs at homotopy 0


# ---------------------------------------------------------------- leaving


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # sdpa and eager
def test_state_is_restored_after_an_exception(family: str) -> None:
    base = tiny(family)
    before, implementation = logits_of(base, IDS), base.config._attn_implementation
    assert implementation == ("eager" if family == "gemma2" else "sdpa")
    with pytest.raises(RuntimeError, match="inside"), attending(base, Window(1, 0)):
        assert base.config._attn_implementation == baselines.IMPLEMENTATION
        raise RuntimeError("inside")
    with pytest.raises(TopologyConfigError):  # in a forward
        run(base, BlockTopK(WINDOW, SINKS, 0.0))
    assert base.config._attn_implementation == implementation
    assert torch.equal(logits_of(base, IDS), before)
    logits, tally = run(base, Window(WINDOW, SINKS))  # and another one may run
    assert (logits - before).abs().max() > 0.1
    assert len(tally.visible) == len(ROUTED[family])
    assert torch.equal(logits_of(base, IDS), before)
