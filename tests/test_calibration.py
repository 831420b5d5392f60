"""The density dial: calibration table, Fisher loss, depth maps, merging at a density and the report."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import pickle
import random
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft_helpers import (
    HEADS,
    KV_HEADS,
    ROUTED,
    VOCAB,
    assert_same_weights,
    logits_of,
    routed,
    tiny,
    tokens,
    weights_of,
)
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

from topo_adapter import (
    Calibration,
    MergeError,
    TopologyConfig,
    TopologyConfigError,
    UnsupportedModelError,
    calibrate,
    choose_depths,
    density_report,
    load_merged,
    measure_density,
    record_routes,
    recording_density,
    save_merged,
    set_density,
)
from topo_adapter.core.dial import best_chain, choices_of, choose, covers, expected_loss
from topo_adapter.core.passes import ORDINARY
from topo_adapter.fingerprint import fingerprint, same_base
from topo_adapter.layer import hosts
from topo_adapter.measuring import calibration

DEPTH, WINDOW, SINKS = 4, 3, 2
LENGTH = 40
beside_dense = functools.partial(calibrate, around=())


def adapted(dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> PeftModel:
    return routed(tiny(dtype=dtype, num_hidden_layers=2), seed, **settings)


def visible_share(query: Tensor, key: Tensor, depth: int, window: int = WINDOW, sinks: int = SINKS) -> float:
    """Section 2, pair by pair, for the digits `[B, T, L]` of one head."""
    batch, length, levels = query.shape
    count = 0
    for b in range(batch):
        for i in range(length):
            for j in range(i + 1):
                tree = depth <= levels and query[b, i, :depth].tolist() == key[b, j, :depth].tolist()
                count += tree or i - j < window or j < sinks
    return count / (batch * length * (length + 1) / 2)


def visited_share(record: Any, head: int, depth: int) -> float:
    """The same for all visits of one head's queries at a depth."""
    keys = (record.key_digits[:, head] * 2 ** torch.arange(DEPTH)).sum(-1)
    count, (batch, length) = 0, keys.shape
    for b in range(batch):
        for i in range(length):
            visits = record.visits[b, head, :, i].tolist() if depth <= DEPTH else []
            balls = {address % 2**depth for address in visits if address >= 0}
            for j in range(i + 1):
                count += int(keys[b, j]) % 2**depth in balls or i - j < WINDOW or j < SINKS
    return count / (batch * length * (length + 1) / 2)


def digits_at(model: PeftModel, homotopy: float, ids: Tensor) -> dict[int, Any]:
    """Routes of the unmerged model; at homotopy 0 those of the dense model."""
    config = model.peft_config["default"]
    before, config.homotopy = config.homotopy, homotopy
    try:
        return record_routes(model, ids)
    finally:
        config.homotopy = before


# ---------------------------------------------------------------- the table


def test_density_of_the_table_is_section_2_counted_pair_by_pair() -> None:
    model, ids = adapted(), tokens(3, LENGTH)
    table = beside_dense(model, ids)
    records = digits_at(model, 0.0, ids)
    assert table["density"].keys() == records.keys() and len(records) == 2
    for layer, record in records.items():
        assert len(table["density"][layer]) == HEADS
        for head, values in enumerate(table["density"][layer]):
            expected = [
                visible_share(record.query_digits[:, head], record.key_digits[:, head], depth)
                for depth in range(DEPTH + 2)
            ]
            assert values == pytest.approx(expected, rel=1e-3), (layer, head)
            assert len(set(values)) == DEPTH + 2  # depths that all look alike would prove little


def test_density_of_the_table_counts_the_keys_of_all_visits() -> None:
    """Of every depth with every number of visits."""
    model, ids = adapted(visits=3), tokens(2, LENGTH)
    table, config = beside_dense(model, ids), model.peft_config["default"]
    assert table["choices"] == [[0, 1], [1, 1], *([d, m] for d in (2, 3, 4) for m in (3, 1)), [DEPTH + 1, 1]]
    for column, (depth, visits) in enumerate(table["choices"]):
        config.setting = depth, {layer: [visits] * HEADS for layer in table["density"]}
        for layer, record in digits_at(model, 0.0, ids).items():
            assert record.visits.shape[2] == visits
            for head in range(2):
                value = table["density"][layer][head][column]
                assert value == pytest.approx(visited_share(record, head, depth), rel=1e-3), (layer, head)
                assert visits == 1 or value > 1.05 * table["density"][layer][head][column + 1], "visits cost"


def test_table_is_well_formed_and_stored_in_the_config() -> None:
    model = adapted()
    table = beside_dense(model, tokens(2, LENGTH))
    assert model.peft_config["default"].calibration == table
    assert table["length"] == LENGTH and table["heads_per_route"] == 1
    for layer in table["density"]:
        for density, loss in zip(table["density"][layer], table["loss"][layer], strict=True):
            assert density[0] == 1.0 and loss[0] == 0.0
            assert density == sorted(density, reverse=True) and density[-1] > 0
            assert all(value > 0 for value in loss[1:])


def test_table_survives_saving_and_loading(tmp_path: Path) -> None:
    model = adapted()
    table = calibrate(model, tokens(2, LENGTH))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(num_hidden_layers=2), str(tmp_path))
    assert loaded.peft_config["default"].calibration == table
    assert all(isinstance(layer, int) for layer in loaded.peft_config["default"].calibration["density"])


# ---------------------------------------------------------------- the loss

_PROBE = "calibration_probe"
_probe: dict[str, Any] = {}


def _probe_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention, or that under the masks of a `map`; one head of one layer moves by `scale` towards what it puts
    out under `mask`."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * scaling
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    visible = _probe["map"][module.layer_idx] if "map" in _probe else causal
    out = scores.masked_fill(~visible, -math.inf).softmax(-1) @ value
    if _probe and module.layer_idx == _probe["layer"]:
        h = _probe["head"]
        sparse = scores[:, h].masked_fill(~_probe["mask"], -math.inf).softmax(-1) @ value[:, h]
        out = out.clone()
        out[:, h] += _probe["scale"][:, :, None] * (sparse - out[:, h])
    return out.transpose(1, 2), None


AttentionInterface.register(_PROBE, _probe_attention)


@torch.no_grad()
def kl_of(base: nn.Module, ids: Tensor, layer: int, head: int, mask: Tensor, scale: Tensor) -> Tensor:
    """KL(dense || one head moved), summed over tokens; `[N]` for the rows of `scale` `[N, T]`."""
    dense = base(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    _probe.update(layer=layer, head=head, mask=mask, scale=scale)
    try:
        moved = base(input_ids=ids.expand(len(scale), -1), use_cache=False).logits.log_softmax(-1)
    finally:
        _probe.clear()
    return (dense.exp() * (dense - moved)).sum((1, 2))


def mask_of(record: Any, head: int, depth: int) -> Tensor:
    length = record.query_digits.shape[2]
    gap = torch.arange(length)[:, None] - torch.arange(length)
    query, key = (digits[0, head, :, :depth] for digits in (record.query_digits, record.key_digits))
    same = (query[:, None] == key[None]).all(-1) & (depth <= DEPTH)
    return (gap >= 0) & (same | (gap < WINDOW) | (torch.arange(length) < SINKS))


def probed(dtype: torch.dtype = torch.float64) -> tuple[PeftModel, nn.Module]:
    model = adapted(dtype)
    base = tiny(dtype=dtype, num_hidden_layers=2)
    base.config._attn_implementation = _PROBE
    return model, base


def test_spans_share_what_their_positions_change_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that move one prediction alike count together: spans differ, and long texts have several."""
    model, ids = adapted(torch.float64), tokens(1, 130)
    found = {}
    for span in (1, 128, 130):
        monkeypatch.setattr(calibration, "_SPAN", span)
        found[span] = torch.tensor(beside_dense(model, ids)["loss"][0])
    assert not torch.allclose(found[1], found[128], rtol=0.02)
    assert not torch.equal(found[128], found[130])


@pytest.mark.parametrize("span", [1, 5, 128])
def test_loss_has_the_expectation_that_the_docstring_states(span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brute force in float64: each span of one head moves alone by 1e-3 of its change; KL there is second order.

    The mean over 2 x 150 draws may err by 25%: a draw's relative deviation is at most sqrt(2) for one Gaussian score,
    8% for 300 of them, and three times that is allowed.
    """
    draws, length, small = 150, 24, 1e-3
    monkeypatch.setattr(calibration, "_SPAN", span)
    model, base = probed()
    ids = tokens(2, length)
    table = beside_dense(model, ids, draws=draws, seed=3)
    records = [digits_at(model, 0.0, row) for row in ids.split(1)]
    position = torch.arange(length) // span
    each = small * (position == position.unique()[:, None]).double()  # 24, 5 and 1 spans
    ratios = []
    for layer in range(2):
        for head in range(HEADS):
            for depth in (1, DEPTH, DEPTH + 1):
                total = 0.0
                for row, record in zip(ids.split(1), records, strict=True):
                    mask = mask_of(record[layer], head, depth)
                    total += float(kl_of(base, row, layer, head, mask, each).sum()) / small**2
                ratios.append(table["loss"][layer][head][depth] / (total / ids.numel()))
    assert ratios == pytest.approx([1.0] * len(ratios), abs=0.25)
    assert sum(ratios) / len(ratios) == pytest.approx(1.0, abs=0.08)


def test_loss_ranks_heads_and_depths_as_single_head_ablation_does() -> None:
    """The whole change, all positions at once: no longer second order, so ranks and a factor of 3."""
    model, base = probed()
    ids = tokens(2, 24)
    table = beside_dense(model, ids, draws=50)
    records = [digits_at(model, 0.0, row) for row in ids.split(1)]
    whole = torch.ones(1, 24, dtype=torch.float64)
    estimated, true = [], []
    for layer in range(2):
        for head in range(HEADS):
            for depth in range(1, DEPTH + 2):
                kl = sum(
                    float(kl_of(base, row, layer, head, mask_of(record[layer], head, depth), whole))
                    for row, record in zip(ids.split(1), records, strict=True)
                )
                estimated.append(table["loss"][layer][head][depth])
                true.append(kl / ids.numel())
    ranks = torch.tensor([estimated, true]).argsort(1).argsort(1).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.9
    assert all(1 / 3 < a / b < 3 for a, b in zip(estimated, true, strict=True))


def test_loss_around_a_map_is_the_change_of_the_kl_from_there() -> None:
    """Brute force in float64: first order by a central difference, second order as beside the dense model.

    The first order is exact; of the second, 300 draws may miss a quarter, as above.
    """
    draws, length, small, share = 150, 24, 1e-3, 0.3
    model, base = probed()
    ids = tokens(2, length)
    dense_table = beside_dense(model, ids, draws=draws, seed=3)
    near = (WINDOW + SINKS) * length - WINDOW * (WINDOW - 1) / 2 - SINKS * (SINKS - 1) / 2 - WINDOW * SINKS
    near /= length * (length + 1) / 2
    depths = choose_depths(dense_table, near + (1 - near) * share)
    assert len({d for heads in depths.values() for d in heads}) > 2
    table = calibrate(model, ids, draws=draws, seed=3, around=(share,))
    config = model.peft_config["default"]
    config.visible_depth, config.homotopy = dict(depths), 1.0
    whole = torch.ones(1, length, dtype=torch.float64)
    seen, estimated = [], []
    for layer in range(2):
        for head in range(HEADS):
            first, second = torch.zeros(2, DEPTH + 2, dtype=torch.float64)
            for row in ids.split(1):
                records = record_routes(model, row)
                masks = {
                    k: torch.stack([mask_of(records[k], h, d) for h, d in enumerate(v)]) for k, v in depths.items()
                }

                def logits(mask: Tensor, scale: Tensor, map_: Any = masks, row: Tensor = row) -> Tensor:
                    _probe.update(map=map_, layer=layer, head=head, mask=mask, scale=scale)  # noqa: B023
                    try:
                        with torch.no_grad():
                            return base(input_ids=row.expand(len(scale), -1), use_cache=False).logits.log_softmax(-1)
                    finally:
                        _probe.clear()

                with torch.no_grad():
                    dense = base(input_ids=row, use_cache=False).logits.log_softmax(-1)
                for depth in range(DEPTH + 2):
                    mask = mask_of(records[layer], head, depth)
                    here, up, down = (logits(mask, scale * whole) for scale in (0.0, small, -small))
                    first[depth] += (dense.exp() * (down - up)).sum() / (2 * small)
                    second[depth] += (here.exp() * (here - up)).sum() / small**2
            first, second = first / ids.numel(), second / ids.numel()
            for depth in range(1, DEPTH + 2):
                # the mean of this table and the dense one
                found = 2 * table["loss"][layer][head][depth] - dense_table["loss"][layer][head][depth]
                expected = max(0.0, float(first[depth] + second[depth] - first[0] - second[0]))
                room = 0.25 * float(second[depth] + second[0]) + 1e-3 * expected + 1e-5
                assert abs(found - expected) < room, (layer, head, depth)
                seen.append(expected)
                estimated.append(dense_table["loss"][layer][head][depth])
    assert not torch.allclose(torch.tensor(seen), torch.tensor(estimated), rtol=0.5)


def test_maps_are_measured_around_by_default() -> None:
    model, ids = adapted(), tokens(1, LENGTH)
    table = calibrate(model, ids)
    assert table == calibrate(model, ids, around=calibration.AROUND) != beside_dense(model, ids)
    assert len(calibration.AROUND) == 3
    for heads in table["loss"].values():
        assert all(losses[0] == 0 and min(losses) >= 0 and max(losses) > 0 for losses in heads)


@pytest.mark.parametrize("around", [(0.0,), (0.5, 1.5), (-0.1,)])
def test_shares_to_measure_around_are_checked(around: tuple[float, ...]) -> None:
    with pytest.raises(TopologyConfigError, match="around must be shares of the far pairs in"):
        calibrate(adapted(), tokens(1, LENGTH), around=around)


def test_sparser_than_the_sparsest_map_is_that_map() -> None:
    model, ids = adapted(depth=2), tokens(1, LENGTH)
    tables = [calibrate(model, ids, around=(share,)) for share in (1e-9, 1e-12)]
    assert tables[0] == tables[1] != beside_dense(model, ids)


def test_loss_does_not_depend_on_how_many_logits_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = adapted(torch.float64), tokens(2, 24)
    whole = beside_dense(model, ids)
    monkeypatch.setattr(calibration, "_LOGITS_AT_ONCE", 5 * VOCAB)  # 5 chunks, the last of 4 tokens
    drawn = []
    multinomial = torch.multinomial

    def counted(probs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        drawn.append(len(probs))
        return multinomial(probs, *args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", counted)
    parts = beside_dense(model, ids)
    assert drawn == [5, 5, 5, 5, 4] * 2
    for layer in range(2):
        assert torch.allclose(torch.tensor(parts["loss"][layer]), torch.tensor(whole["loss"][layer]), rtol=2e-3)


def test_loss_averages_over_sequences_and_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = adapted(torch.float64), tokens(3, 24)
    monkeypatch.setattr(calibration, "_SPAN", 1)  # most samples per draw
    once = beside_dense(model, ids, draws=30)
    more = beside_dense(model, ids.repeat(2, 1), draws=15, seed=9)
    for layer in range(2):
        a, b = (torch.tensor(table["loss"][layer]) for table in (once, more))
        assert torch.allclose(a, b, rtol=0.4) and not torch.equal(a, b)
        assert once["density"][layer] == more["density"][layer]


def test_seed_decides_the_draws_and_the_global_generator_is_not_used() -> None:
    model, ids = adapted(), tokens(2, LENGTH)
    before = torch.get_rng_state()
    first = beside_dense(model, ids, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert beside_dense(model, ids, seed=5) == first
    assert beside_dense(model, ids, seed=6)["loss"] != first["loss"]


# ---------------------------------------------------------------- the model afterwards


def state_of(model: PeftModel) -> dict[str, Any]:
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "trainable": {name: weight.requires_grad for name, weight in model.named_parameters()},
        "grads": {name: weight.grad for name, weight in model.named_parameters()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in model.named_modules()
        },
        "own": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "passes": [host.passes.current() for host in hosts(model)],
        "homotopy": model.peft_config["default"].homotopy,
        "depth": model.peft_config["default"].visible_depth,
    }


@pytest.mark.parametrize("homotopy", [0.0, 0.5, 1.0])
def test_model_is_left_as_it_was(homotopy: float) -> None:
    model, ids = adapted(homotopy=homotopy), tokens(2, LENGTH)
    reference = calibrate(adapted(homotopy=1.0), ids)
    model.train()
    model.get_base_model().model.layers[0].mlp.eval()  # modes are restored one by one
    next(iter(model.get_base_model().model.layers[1].parameters())).requires_grad_()
    weights, before = weights_of(model), state_of(model)
    table = calibrate(model, ids)
    assert state_of(model) == before | {"depth": model.peft_config["default"].visible_depth}
    assert before["depth"] == 2  # its own density is the one change
    assert all(grad is None for grad in before["grads"].values())
    assert_same_weights(model, weights)
    assert table == reference  # of the dense model, whatever the homotopy


def test_gradients_of_before_are_kept() -> None:
    model, ids = adapted(), tokens(1, LENGTH)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    before = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    assert before
    calibrate(model, ids)
    after = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], grad) for name, grad in before.items())


def test_model_is_left_as_it_was_by_a_failure() -> None:
    model = adapted()
    model.train()
    model.get_base_model().lm_head.weight.data[3, 0] = math.nan
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match="logits must be finite"):
        calibrate(model, tokens(1, LENGTH))
    assert state_of(model) == before
    assert model.peft_config["default"].calibration is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_without_gradients_around_it(mode: Any) -> None:
    model, ids = adapted(), tokens(1, LENGTH)
    expected = calibrate(model, ids)
    with mode():
        assert calibrate(model, tokens(1, LENGTH)) == expected


def test_bfloat16() -> None:
    ids = tokens(4, LENGTH)
    exact = beside_dense(adapted(), ids, draws=15)
    table = beside_dense(adapted(torch.bfloat16), ids, draws=15)
    for layer in range(2):
        density = torch.tensor([t["density"][layer] for t in (table, exact)])
        loss = torch.tensor([t["loss"][layer] for t in (table, exact)])
        assert torch.allclose(density[0], density[1], atol=0.02)  # a near tie of digits may fall the other way
        assert torch.allclose(loss[0], loss[1], rtol=0.5)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen3", "phi3"])
def test_families(family: str) -> None:
    model = routed(tiny(family))
    table = beside_dense(model, tokens(1, LENGTH))
    assert list(table["density"]) == list(table["loss"]) == ROUTED[family]
    assert all(value > 0 for heads in table["loss"].values() for head in heads for value in head[1:])


def test_layers_without_a_router_are_left_out() -> None:
    model = adapted(layers_to_transform=[1])
    assert list(calibrate(model, tokens(1, LENGTH))["density"]) == [1]
    model.merge_adapter(target_density=0.5)
    assert list(model.peft_config["default"].visible_depth) == [1]
    logits_of(model, tokens(1, LENGTH))


def test_shared_routes_share_a_density() -> None:
    table = beside_dense(adapted(route_per="kv_head"), tokens(2, LENGTH))
    assert table["heads_per_route"] == HEADS // KV_HEADS
    for heads in table["density"].values():
        assert heads[0] == heads[1] and heads[2] == heads[3] and heads[0] != heads[2]
    for heads in table["loss"].values():
        assert heads[0] != heads[1]


def test_heads_of_a_route_may_have_depths_of_their_own() -> None:
    shared, own = (adapted(route_per="kv_head", depth_per=per) for per in ("route", "query_head"))
    tables = [beside_dense(model, tokens(2, LENGTH)) for model in (shared, own)]
    assert (tables[0]["density"], tables[0]["loss"]) == (tables[1]["density"], tables[1]["loss"])
    assert tables[1]["heads_per_route"] == 1
    losses = [expected_loss(table, choose(table, 0.6)) for table in tables]
    assert losses[1] < losses[0]  # more maps to choose from
    own.merge_adapter(target_density=0.6)
    depths = own.peft_config["default"].visible_depth
    assert any(heads[0] != heads[1] or heads[2] != heads[3] for heads in depths.values())
    found = measure_density(own, tokens(2, LENGTH))[0]  # what it was calibrated on; nothing is sparse below this layer
    expected = [values[d] for values, d in zip(tables[1]["density"][0], depths[0], strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------- refusals of calibrate


def test_merged_adapter_is_refused() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge_adapter"):
        calibrate(model, tokens(1, LENGTH))
    model.unmerge_adapter()
    calibrate(model, tokens(1, LENGTH))


def test_model_without_adapter_is_refused() -> None:
    model = adapted()
    with pytest.raises(UnsupportedModelError, match="active, enabled"), model.disable_adapter():
        calibrate(model, tokens(1, LENGTH))
    with pytest.raises(UnsupportedModelError, match="active, enabled"):
        calibrate(tiny(num_hidden_layers=2), tokens(1, LENGTH))


@pytest.mark.parametrize(
    ("sequences", "names"),
    [
        ([[1, 2, 3] * 10], "list"),
        (tokens(1, LENGTH).int(), "int32"),
        (tokens(1, LENGTH).double(), "float64"),
        (tokens(1, LENGTH)[0], r"\[40\]"),
        (tokens(1, LENGTH)[None], r"\[1, 1, 40\]"),
        (tokens(1, LENGTH)[:0], r"\[0, 40\]"),
        (tokens(1, WINDOW + SINKS), "longer than local_window [+] num_sink_tokens = 5.* got 5"),
        (torch.cat([torch.zeros(2, 4, dtype=torch.int64), tokens(2, LENGTH)], 1), r"token 0.*rows \[0, 1\]"),
        (torch.cat([tokens(2, LENGTH), torch.tensor([[5], [0]])], 1), r"token 0.*rows \[1\]"),
    ],
)
def test_bad_sequences_are_refused(sequences: Any, names: str) -> None:
    model = adapted()
    with pytest.raises(TopologyConfigError, match=f"^sequences must be .*{names}"):
        calibrate(model, sequences)
    assert model.peft_config["default"].calibration is None


def test_shortest_sequence_is_taken() -> None:
    table = calibrate(adapted(), tokens(1, WINDOW + SINKS + 1))
    assert table["length"] == WINDOW + SINKS + 1


@pytest.mark.parametrize("use", ["eos_token_id", "bos_token_id"])
def test_padding_token_with_another_use_may_stand_in_the_text(use: str) -> None:
    """One at an end or many inside are text; two at an end are padding."""
    model = adapted()
    setattr(model.get_base_model().config, use, 0)
    ids = tokens(2, LENGTH)
    ids[0, 0] = ids[1, -1] = 0
    ids[0, 10:14] = 0
    calibrate(model, ids)
    for end in (slice(0, 2), slice(-2, None)):
        padded = ids.clone()
        padded[1, end] = 0
        with pytest.raises(TopologyConfigError, match=r"rows \[1\]"):
            calibrate(model, padded)


@pytest.mark.parametrize("draws", [0, -1, 1.0, True, "2", None])
def test_bad_draws_are_refused(draws: Any) -> None:
    with pytest.raises(TopologyConfigError, match="draws must be an integer >= 1"):
        calibrate(adapted(), tokens(1, LENGTH), draws=draws)


# ---------------------------------------------------------------- choosing


def made_up(layers: int, heads: int, depth: int, seed: int, shared: int = 1) -> Calibration:
    """A table of random curves: densities fall, losses rise on the whole, hulls are anything."""
    draw = random.Random(seed)
    density: dict[int, list[list[float]]] = {}
    loss: dict[int, list[list[float]]] = {}
    for layer in range(layers):
        density[layer], loss[layer] = [], []
        for head in range(heads):
            falling = sorted((draw.uniform(0.05, 0.9) for _ in range(depth)), reverse=True)
            if head % shared:  # one route, one density
                falling = density[layer][-1][1:]
            density[layer].append([1.0, *falling])
            loss[layer].append([0.0, *(draw.uniform(0, 1) * level for level in range(1, depth + 1))])
    return Calibration(length=1000, heads_per_route=shared, density=density, loss=loss)


def sums(table: Calibration, depths: dict[int, list[int]]) -> tuple[float, float]:
    """Mean density and total loss of a map."""
    chosen = [(layer, head, depth) for layer, row in depths.items() for head, depth in enumerate(row)]
    density = sum(table["density"][layer][head][depth] for layer, head, depth in chosen)
    return density / len(chosen), sum(table["loss"][layer][head][depth] for layer, head, depth in chosen)


def all_maps(table: Calibration) -> Iterator[dict[int, list[int]]]:
    shared = table["heads_per_route"]
    routes = [(layer, row) for layer, heads in table["density"].items() for row in range(len(heads) // shared)]
    levels = len(next(iter(table["density"].values()))[0])
    for choice in itertools.product(range(levels), repeat=len(routes)):
        depths: dict[int, list[int]] = {layer: [] for layer in table["density"]}
        for (layer, _), depth in zip(routes, choice, strict=True):
            depths[layer] += [depth] * shared
        yield depths


def sparsest(table: Calibration) -> float:
    rows = [head for heads in table["density"].values() for head in heads]
    return sum(min(head) for head in rows) / len(rows)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shared", [1, 2])
def test_maps_keep_the_budget_and_are_nested(seed: int, shared: int) -> None:
    table = made_up(3, 4, 5, seed, shared)
    low = sparsest(table) + 1e-6
    targets = [min(1.0, low + (1 - low) * step / 60) for step in range(61)]
    maps = [choose_depths(table, target) for target in targets]
    assert all(list(depths) == [0, 1, 2] and all(len(row) == 4 for row in depths.values()) for depths in maps)
    for target, depths in zip(targets, maps, strict=True):
        assert sums(table, depths)[0] <= target + 1e-8
    flat = [[depth for row in depths.values() for depth in row] for depths in maps]
    for sparser, denser in itertools.pairwise(flat):
        assert all(b <= a for a, b in zip(sparser, denser, strict=True))
    losses = [sums(table, depths)[1] for depths in maps]
    assert losses == sorted(losses, reverse=True)
    assert flat[-1] == [0] * 12 and losses[-1] == 0
    assert len({tuple(depths) for depths in flat}) > 10  # a dial, not a switch
    for row in (row for depths in maps for row in depths.values()):
        assert all(len(set(row[first : first + shared])) == 1 for first in range(0, 4, shared))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("heads", "shared"), [(2, 1), (4, 2)])
def test_maps_are_optimal_where_a_segment_ends(seed: int, heads: int, shared: int) -> None:
    """Against all 4^4 maps: at the density of a chosen map none has less loss; between, at most one segment less."""
    table = made_up(2, heads, 3, seed, shared)
    every = [sums(table, depths) for depths in all_maps(table)]
    low = sparsest(table)
    hull = {sums(table, choose_depths(table, min(1.0, low + (1 - low) * step / 400))) for step in range(401)}
    assert len(hull) > 4
    for density, loss in hull:
        assert loss <= min(other for budget, other in every if budget <= density + 1e-12) + 1e-12
    for target in (min(1.0, low + (1 - low) * step / 17) for step in range(18)):
        density, loss = sums(table, choose_depths(table, target))
        best = min(other for budget, other in every if budget <= target + 1e-12)
        beyond = [(budget, other) for budget, other in sorted(hull) if budget > density + 1e-12]
        if beyond:  # the optimum lies on or above the chord to the next end of a segment
            (end, gain) = beyond[0]
            chord = loss + (gain - loss) * (target - density) / (end - density)
            assert chord - 1e-9 <= best <= loss + 1e-12


def visiting_table(layers: int, heads: int, depth: int, visits: int, seed: int) -> Calibration:
    """Densities that a covering choice never lowers, losses at random."""
    draw, choices = random.Random(seed), choices_of(2, depth, depth + 1, visits)
    density: dict[int, list[list[float]]] = {}
    loss: dict[int, list[list[float]]] = {}
    for layer in range(layers):
        density[layer], loss[layer] = [], []
        for _ in range(heads):
            row = [1.0 if d == 0 else min(0.9, m / 2**d) * draw.uniform(0.8, 1) + 0.01 for d, m in choices]
            row = [max(row[b] for b in range(len(row)) if covers(a, choices[b])) for a in choices]
            density[layer].append(row)
            loss[layer].append([0.0, *(draw.uniform(0, 1) / math.sqrt(share) for share in row[1:])])
    pairs = [list(pair) for pair in choices]
    return Calibration(length=1000, heads_per_route=1, choices=pairs, density=density, loss=loss)


@pytest.mark.parametrize("seed", range(4))
def test_maps_of_depths_and_visits_keep_the_budget_and_are_nested(seed: int) -> None:
    table = visiting_table(2, 4, 5, 6, seed)
    choices = table["choices"]
    low, before, seen = sparsest(table) + 1e-6, None, set()
    for step in range(41):
        target = min(1.0, low + (1 - low) * step / 40)
        depths, visits = choose(table, target)
        assert visits is not None and depths == choose_depths(table, target)
        chosen = [pair for layer in depths for pair in zip(depths[layer], visits[layer], strict=True)]
        rows = [heads for layer in depths for heads in table["density"][layer]]
        spent = sum(row[choices.index(list(pair))] for row, pair in zip(rows, chosen, strict=True))
        assert spent / len(rows) <= target + 1e-8
        assert before is None or all(map(covers, chosen, before))
        before = chosen
        seen.update(chosen)
    assert before == [(0, 1)] * 8 and len({m for _, m in seen}) > 1 and len({d for d, _ in seen}) > 3


@pytest.mark.parametrize("seed", range(4))
def test_the_chain_of_a_head_is_the_best_of_all(seed: int) -> None:
    """Against every chain from the sparsest to the densest, by the mean loss over log density."""
    table = visiting_table(1, 1, 4, 3, seed)
    pairs = [(d, m) for d, m in table["choices"]]
    offered = list(zip(table["density"][0][0], table["loss"][0][0], range(len(pairs)), strict=True))

    def area(chain: tuple[int, ...]) -> float:
        points = [offered[column] for column in chain]
        return sum(math.log(b[0] / a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))

    inside = range(1, len(pairs) - 1)
    chains = [
        (len(pairs) - 1, *reversed(some), 0)
        for count in range(len(inside) + 1)
        for some in itertools.combinations(inside, count)
        if all(covers(pairs[a], pairs[b]) for a, b in itertools.pairwise(some))
    ]
    assert len(chains) == 40
    found = tuple(column for *_, column in best_chain(offered, table["choices"]))
    assert found in chains and area(found) == pytest.approx(min(map(area, chains)))


def test_depth_and_visits_of_a_calibrated_adapter_come_back(tmp_path: Path) -> None:
    model, ids = adapted(visits=3), tokens(2, LENGTH)
    calibrate(model, ids, target_density=0.35)
    config = model.peft_config["default"]
    assert config.head_visits is not None and {m for row in config.head_visits.values() for m in row} > {1}
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["visible_depth"] is None and saved["head_visits"] is None
    loaded = TopologyConfig.from_pretrained(tmp_path)
    assert loaded.setting == config.setting and loaded.calibration == config.calibration
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved | {"visits": 2}))
    with pytest.raises(TopologyConfigError, match="with other visits call calibrate"):
        TopologyConfig.from_pretrained(tmp_path)


def test_a_depth_that_saves_nothing_is_not_paid_for() -> None:
    table = Calibration(
        length=100,
        heads_per_route=1,
        density={0: [[1.0, 0.6, 0.3], [1.0, 0.6, 0.3]]},
        loss={0: [[0.0, 0.0, 0.0], [0.0, 0.5, 0.4]]},  # depth 1 of the second is off the hull
    )
    assert choose_depths(table, 1.0) == {0: [2, 0]}
    assert choose_depths(table, 0.65) == {0: [2, 0]}
    assert choose_depths(table, 0.64) == {0: [2, 2]}


@pytest.mark.parametrize("target", [0, 0.0, -0.1, 1.0001, math.nan, math.inf, True, "0.5", None])
def test_targets_out_of_range_are_refused(target: Any) -> None:
    with pytest.raises(TopologyConfigError, match=r"target_density must be a number in \(0, 1\]"):
        choose_depths(made_up(1, 2, 3, 0), target)


@pytest.mark.parametrize("seed", range(8))
def test_target_below_reach_is_refused_and_the_named_density_is_reached(seed: int) -> None:
    table = made_up(2, 2, 3, seed)
    reach = sparsest(table)
    with pytest.raises(TopologyConfigError, match="target_density must be at least") as refusal:
        choose_depths(table, reach * 0.999)
    found = re.search(r"at least (\S+) at 1000 tokens", str(refusal.value))
    assert found is not None
    named = float(found[1])
    assert reach <= named <= reach + 1e-4
    assert choose_depths(table, named) == choose_depths(table, reach) == {0: [3, 3], 1: [3, 3]}


# ---------------------------------------------------------------- merging at a density


def calibrated(sequences: Tensor | None = None, **settings: Any) -> PeftModel:
    model = adapted(**settings)
    calibrate(model, tokens(4, LENGTH) if sequences is None else sequences)
    return model


def near_pairs(length: int) -> int:
    return sum(i - j < WINDOW or j < SINKS for i in range(length) for j in range(i + 1))


def realised(model: PeftModel, ids: Tensor) -> Tensor:
    return torch.stack(list(measure_density(model, ids).values()))


@pytest.mark.parametrize("target", [0.4, 0.6, 0.8])
def test_merged_model_has_the_target_density(target: float) -> None:
    """Layer 0 as the table says; the second routes what the sparse first layer gave it, so 5% are allowed."""
    ids = tokens(4, LENGTH)
    model = calibrated(ids)
    config = model.peft_config["default"]
    model.merge_adapter(target_density=target)
    depths = config.visible_depth
    assert depths == choose_depths(config.calibration, target)
    density = realised(model, ids)
    expected = [config.calibration["density"][0][head][depth] for head, depth in enumerate(depths[0])]
    assert density[0].tolist() == pytest.approx(expected, rel=1e-3)
    assert target - 0.1 < float(density.mean()) < target * 1.05


def test_target_of_one_is_the_dense_model() -> None:
    model, ids = calibrated(), tokens(2, LENGTH)
    model.merge_adapter(target_density=1)
    assert torch.allclose(logits_of(model, ids), logits_of(tiny(num_hidden_layers=2), ids), atol=1e-4)
    with recording_density(model):
        logits_of(model, ids)
    for values in density_report(model).values():
        assert values == {"density": 1.0, "calibrated": 1.0, "ratio": 1.0}


def test_merged_again_at_another_density() -> None:
    model, ids = calibrated(), tokens(4, LENGTH)
    found = []
    for target in (0.5, 0.8, 0.5):
        model.merge_adapter(target_density=target)
        found.append((float(realised(model, ids).mean()), logits_of(model, ids)))
        model.unmerge_adapter()
    assert found[0][0] + 0.15 < found[1][0]
    assert torch.equal(found[0][1], found[2][1]) and not torch.allclose(found[0][1], found[1][1], atol=1e-2)
    config = model.peft_config["default"]
    kept = config.visible_depth
    assert kept == choose_depths(config.calibration, 0.5)
    model.merge_adapter()  # without a target the map stays
    assert config.visible_depth == kept and torch.equal(logits_of(model, ids), found[0][1])


def test_map_is_saved_with_the_adapter(tmp_path: Path) -> None:
    model, ids = calibrated(), tokens(2, LENGTH)
    model.merge_adapter(target_density=0.6)
    expected = logits_of(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny(num_hidden_layers=2), str(tmp_path / "adapter")).eval()
    assert loaded.peft_config["default"].visible_depth == model.peft_config["default"].visible_depth
    loaded.merge_adapter()
    assert torch.equal(logits_of(loaded, ids), expected)
    loaded.unmerge_adapter()
    loaded.merge_adapter(target_density=0.8)  # from the loaded table
    assert loaded.peft_config["default"].visible_depth == choose_depths(
        calibrated().peft_config["default"].calibration, 0.8
    )
    save_merged(model.merge_and_unload(), tmp_path / "merged")
    whole = load_merged(tmp_path / "merged").eval()
    assert torch.equal(logits_of(whole, ids), expected)
    with recording_density(whole):
        logits_of(whole, ids)
    assert density_report(whole)[0]["ratio"] == pytest.approx(1.0, rel=0.2)


def test_target_without_calibration_is_refused() -> None:
    model = adapted()
    with pytest.raises(MergeError, match=r"target_density needs a calibrated adapter.*calibrate"):
        model.merge_adapter(target_density=0.5)
    assert not any(host.merged for host in hosts(model))
    assert model.peft_config["default"].visible_depth == 2
    model.merge_adapter()


def test_the_dial_turns_while_merged() -> None:
    model, ids = calibrated(), tokens(2, LENGTH, seed=4)
    model.merge_adapter(target_density=0.5)
    sparse = logits_of(model, ids)
    model.merge_adapter(target_density=0.8)
    assert all(host.merged for host in hosts(model))
    config = model.peft_config["default"]
    assert config.visible_depth == choose_depths(config.calibration, 0.8) and config.target_density == 0.8
    denser = logits_of(model, ids)
    assert not torch.equal(denser, sparse)
    model.unmerge_adapter()
    model.merge_adapter()
    assert torch.equal(logits_of(model, ids), denser)
    with pytest.raises(TopologyConfigError, match="target_density must be"):
        model.merge_adapter(target_density=0.05)
    assert config.target_density == 0.8 and torch.equal(logits_of(model, ids), denser)


def test_set_density_in_every_state(tmp_path: Path) -> None:
    """Unmerged, merged, unloaded, and as loaded again: one dial."""
    ids = tokens(2, LENGTH, seed=4)
    model = calibrated()
    expected = {}
    for target in (0.5, 0.9):
        set_density(model, target)
        expected[target] = logits_of(model, ids)
        assert model.peft_config["default"].target_density == target
    assert not torch.equal(expected[0.5], expected[0.9])
    merged, unloaded = copy.deepcopy(model), copy.deepcopy(model).merge_and_unload(target_density=0.5)
    merged.merge_adapter()
    save_merged(unloaded, tmp_path)
    loaded = load_merged(tmp_path)
    assert torch.equal(logits_of(unloaded, ids), expected[0.5])
    assert torch.equal(logits_of(loaded, ids), expected[0.5]), "the density is saved"
    for each in (merged, unloaded, loaded):
        for target in (0.9, 0.5, 0.9):
            set_density(each, target)
            assert torch.equal(logits_of(each, ids), expected[target])
    with pytest.raises(TopologyConfigError, match="adapter must hold a calibration"):
        set_density(adapted(), 0.5)
    with pytest.raises(UnsupportedModelError, match="active, enabled topology adapter"):
        set_density(tiny(), 0.5)


def test_density_at_another_length(caplog: pytest.LogCaptureFixture) -> None:
    model = calibrated()
    config = model.peft_config["default"]
    near, pairs = near_pairs(20), 20 * 21 / 2
    at_20 = (near + 0.3 * (pairs - near)) / pairs  # .3 of the far pairs
    near, pairs = near_pairs(LENGTH), LENGTH * (LENGTH + 1) / 2
    model.merge_adapter(target_density=at_20, length=20)
    assert config.target_density == pytest.approx((near + 0.3 * (pairs - near)) / pairs)
    assert config.visible_depth == choose_depths(config.calibration, config.target_density)
    said = (
        f"density {config.target_density:.3g} of texts of {LENGTH} tokens, the calibrated length, is about {at_20:.3g}"
    )
    assert [said in record.getMessage() for record in caplog.records].count(True) == 1
    model.merge_adapter(target_density=at_20, length=20)
    assert [said in record.getMessage() for record in caplog.records].count(True) == 1, "said once"
    for turn in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TopologyConfigError, match="length=20 without target_density"):
            turn(length=20)
        with pytest.raises(TopologyConfigError, match="length must be an integer >= 1"):
            turn(target_density=0.5, length=0)


@pytest.mark.parametrize("asked", [None, 0.6])
def test_a_calibrated_adapter_has_a_density_of_its_own(asked: float | None, tmp_path: Path) -> None:
    """However it is run: unmerged, by a plain merge, unloaded, or loaded by somebody who knows nothing of the dial."""
    model, ids = adapted(), tokens(2, LENGTH, seed=4)
    calibrate(model, tokens(4, LENGTH), target_density=asked)
    config = model.peft_config["default"]
    least = near_pairs(LENGTH) / (LENGTH * (LENGTH + 1) / 2)  # more than .17
    assert config.target_density == pytest.approx(asked or least, abs=1e-4)
    assert config.visible_depth == choose_depths(config.calibration, config.target_density)
    calibrate(model, tokens(4, LENGTH, seed=1))
    assert config.target_density >= (asked or 0.17), "the adapter's own stays"
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["visible_depth"] is None and written["target_density"] == config.target_density
    model.merge_adapter(target_density=config.target_density)
    expected = logits_of(model, ids)
    base = model.unload()
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert loaded.peft_config["default"].visible_depth == config.visible_depth
    same = functools.partial(torch.testing.assert_close, expected=expected, rtol=0, atol=1e-5)
    same(logits_of(loaded, ids))
    loaded.merge_adapter()
    same(logits_of(loaded, ids))
    same(logits_of(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).merge_and_unload(), ids))


def test_depths_set_by_hand_are_what_is_saved(tmp_path: Path) -> None:
    model = calibrated()
    config = model.peft_config["default"]
    config.visible_depth = {0: 2, 1: [1, 2, 3, 4]}
    model.save_pretrained(tmp_path)
    again = TopologyConfig.from_pretrained(tmp_path)
    assert again.target_density is None and again.visible_depth == config.visible_depth
    table, tree = config.calibration, {"depth": DEPTH, "local_window": WINDOW, "num_sink_tokens": SINKS}
    map_of_a_file = {str(layer): depths for layer, depths in choose_depths(table, 0.5).items()}  # type: ignore[arg-type]
    same = TopologyConfig(**tree, calibration=table, target_density=0.5, visible_depth=map_of_a_file)  # type: ignore
    assert same.on_the_dial()
    with pytest.raises(TopologyConfigError, match="visible_depth and head_visits must be None, or the maps of"):
        TopologyConfig(**tree, calibration=table, target_density=0.5, visible_depth=1)
    with pytest.raises(TopologyConfigError, match="target_density must be None without a calibration"):
        TopologyConfig(target_density=0.5)
    whole = TopologyConfig(**tree, calibration=table, target_density=0.5)
    for copied in (TopologyConfig(**whole.to_dict()), copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert copied.visible_depth == whole.visible_depth == choose_depths(table, 0.5)
    explicit = {**whole.to_dict(), "visible_depth": whole.visible_depth}
    assert TopologyConfig(**explicit).visible_depth == whole.visible_depth


def test_a_density_out_of_reach_is_refused_before_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    monkeypatch.setattr(calibration, "_measured", lambda *args: pytest.fail("measured first"))
    for target, message in ((0.1, "what window and sinks show"), (1.5, "a number in"), ("0.5", "a number in")):
        with pytest.raises(TopologyConfigError, match=message):
            calibrate(model, tokens(2, LENGTH), target_density=target)


def test_the_model_card_runs_the_dial(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("# Mine\n\nA word of my own.\n\n<!-- topo_adapter -->\nold\n<!-- /topo_adapter -->\n\nAnd after.\n")
    model = calibrated()
    for target in (0.5, 0.75):
        set_density(model, target)
        for _ in range(2):
            model.save_pretrained(tmp_path)
        text = card.read_text()
        assert text.count("## How to load") == text.count("import topo_adapter") == 1 and "old" not in text
        assert "A word of my own." in text and "And after." in text
        assert f"attends to {target:.0%} of the causal pairs of texts of {LENGTH} tokens" in text
    plain = tmp_path / "plain"
    adapted().save_pretrained(plain)
    assert "causal pairs" not in (plain / "README.md").read_text()


@pytest.mark.parametrize("target", [0.0, 1.5, math.nan, 0.05])
def test_refused_targets_leave_the_adapter_unmerged(target: float) -> None:
    model = calibrated()
    before = model.peft_config["default"].visible_depth
    with pytest.raises(TopologyConfigError, match="target_density must be"):
        model.merge_adapter(target_density=target)
    assert not any(host.merged for host in hosts(model))
    assert model.peft_config["default"].visible_depth == before


# ---------------------------------------------------------------- the table in the config


def broken(change: Any) -> Any:
    table: Any = made_up(1, 2, 4, 0)  # depths 0..4 of a tree of 3 levels
    return change(table) or table


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda t: [t], "table with the keys"),
        (lambda t: t.pop("loss") and None, "table with the keys"),
        (lambda t: t.update(more=1), "table with the keys"),
        (lambda t: t.update(length=0), r"\['length'\]"),
        (lambda t: t.update(length=132), "more than local_window [+] num_sink_tokens = 132, got 132"),
        (lambda t: t.update(heads_per_route=0), r"\['heads_per_route'\]"),
        (lambda t: t.update(heads_per_route=3), "multiple of heads_per_route"),
        (lambda t: t.update(density={}), "dict from layer index"),
        (lambda t: t["density"].update({"0": t["density"][0]}), "twice"),
        (lambda t: t["density"].update(x=t["density"][0]), "keys"),
        (lambda t: t["loss"].update({1: t["loss"][0]}), "layers and heads"),
        (lambda t: t["loss"][0][1].pop() and None, "lists of 5 numbers"),
        (lambda t: t["loss"][0][1].append(9.0), "lists of 5 numbers"),
        (lambda t: [row.pop() for part in (t["density"], t["loss"]) for row in part[0]] and None, "lists of 5 numbers"),
        (lambda t: t["loss"][0][1].__setitem__(2, math.nan), "finite"),
        (lambda t: t["loss"][0][1].__setitem__(2, -1.0), "finite"),
        (lambda t: t["density"][0][1].__setitem__(0, 0.9), "must be 1 at depth 0"),
        (lambda t: t["density"][0][1].__setitem__(3, 0.0), "> 0"),
        (lambda t: t["density"][0][1].__setitem__(1, 0.01), "not rising"),
    ],
)
def test_broken_tables_are_refused(change: Any, names: str) -> None:
    TopologyConfig(depth=3, visible_depth=2, calibration=broken(lambda t: None))
    with pytest.raises(TopologyConfigError, match=f"calibration.*{names}"):
        TopologyConfig(depth=3, visible_depth=2, calibration=broken(change))


def test_table_of_another_model_is_refused() -> None:
    table = calibrated().peft_config["default"].calibration
    with pytest.raises(
        TopologyConfigError,
        match=r"calibrated for another model .*of 2 layers .0 to 1. of 4 heads, this Llama.*routes 3 layers",
    ):
        routed(tiny(num_hidden_layers=3), calibration=table)
    assert routed(tiny(num_hidden_layers=2), calibration=table).peft_config["default"].calibration == table


def test_another_base_of_the_same_shape_warns(tmp_path: Path) -> None:
    """Nothing else tells it from the adapter's own: names of local folders say nothing, and all shapes agree."""
    calibrated().save_pretrained(tmp_path)
    own, tuned, other = (tiny(num_hidden_layers=2) for _ in range(3))
    with torch.no_grad():
        embedding = tuned.get_input_embeddings().weight
        embedding += 0.2 * embedding.std() * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))
        other.get_input_embeddings().weight.normal_(generator=torch.Generator().manual_seed(2))
    bfloat16 = tiny(dtype=torch.bfloat16, num_hidden_layers=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the adapter was trained on another base")
        for same in (own, tuned, bfloat16):
            PeftModel.from_pretrained(same, tmp_path)
    with pytest.warns(UserWarning, match="trained on another base .*than this Llama.*input embedding"):
        PeftModel.from_pretrained(other, tmp_path)


def test_a_calibration_that_window_and_sinks_cover_expects_nothing_of_other_texts(tmp_path: Path) -> None:
    model = routed(tiny(num_hidden_layers=1))
    calibrate(model, tokens(2, 24))
    model.peft_config["default"].local_window = 24
    model.merge_adapter()
    with pytest.raises(MergeError, match="do not cover, got one on texts of 24 tokens"), recording_density(model):
        pass
    with pytest.raises(TopologyConfigError, match=r"num_sink_tokens = 26, got 24.*calibrate\(\) again"):
        model.save_pretrained(tmp_path)  # no loader would take it
    with pytest.raises(TopologyConfigError, match="num_sink_tokens = 26, got 24"):
        model.merge_and_unload().save_pretrained(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors"]


def test_padding_alone_has_no_density() -> None:
    model, ids = routed(tiny(num_hidden_layers=1)), tokens(1, 8)
    with pytest.raises(TopologyConfigError, match="got padding alone"):
        measure_density(model, ids, torch.zeros_like(ids))


@pytest.mark.parametrize("kind", ["meta", "integers", "zeros", "infinite", "none"])
def test_a_base_that_cannot_be_read_has_no_fingerprint(kind: str) -> None:
    model = tiny(num_hidden_layers=1)
    weight = model.get_input_embeddings().weight
    if kind == "none":
        assert fingerprint(nn.Linear(2, 2)) is None
        return
    assert same_base(fingerprint(model), fingerprint(model))
    changed = {
        "meta": weight.to("meta"),
        "integers": weight.detach().to(torch.int8),
        "zeros": torch.zeros_like(weight),
        "infinite": torch.full_like(weight, math.inf),
    }[kind]
    model.get_input_embeddings().weight = nn.Parameter(changed, requires_grad=False)
    assert fingerprint(model) is None


# ---------------------------------------------------------------- the report


def dialled(ids: Tensor, target: float = 0.35, **settings: Any) -> PeftModel:
    model = calibrated(ids, **settings)
    model.merge_adapter(target_density=target)
    return model


def counted(model: PeftModel, ids: Tensor) -> dict[int, float]:
    """Density of each layer, a mean over heads, pair by pair from the routes."""
    return {
        layer: sum(
            visible_share(record.query_digits[:, head], record.key_digits[:, head], int(depth))
            for head, depth in enumerate(record.visible_depth)
        )
        / HEADS
        for layer, record in record_routes(model, ids).items()
    }


@pytest.mark.filterwarnings("error:density is")
@pytest.mark.parametrize("route_per", ["query_head", "kv_head"])
def test_report_on_the_calibration_text(route_per: str) -> None:
    ids = tokens(4, LENGTH)
    model = dialled(ids, route_per=route_per)
    with recording_density(model):
        logits_of(model, ids)
    report = density_report(model)
    config = model.peft_config["default"]
    for layer, density in counted(model, ids).items():
        assert report[layer]["density"] == pytest.approx(density, abs=1e-9)
        pairs = zip(config.calibration["density"][layer], config.visible_depth[layer], strict=True)
        assert report[layer]["calibrated"] == pytest.approx(sum(row[depth] for row, depth in pairs) / HEADS, rel=1e-3)
        assert report[layer]["ratio"] == pytest.approx(report[layer]["density"] / report[layer]["calibrated"])
    assert report[0]["ratio"] == pytest.approx(1.0, rel=1e-3)
    assert report[1]["ratio"] == pytest.approx(1.0, rel=0.1)  # its input has changed


@pytest.mark.filterwarnings("error:density is")
def test_report_of_several_visits() -> None:
    ids = tokens(2, LENGTH)
    model = dialled(ids, target=0.5, visits=3)
    with recording_density(model):
        logits_of(model, ids)
    report = density_report(model)
    depths = model.peft_config["default"].visible_depth
    for layer, record in record_routes(model, ids).items():
        seen = [visited_share(record, head, depth) for head, depth in enumerate(depths[layer])]
        assert report[layer]["density"] == pytest.approx(sum(seen) / HEADS, abs=1e-9)
        assert measure_density(model, ids)[layer].tolist() == pytest.approx(seen, abs=1e-9)
    assert report[0]["ratio"] == pytest.approx(1.0, rel=1e-3)


def test_report_of_heads_without_a_tree() -> None:
    model, ids = calibrated(tokens(4, LENGTH)), tokens(4, LENGTH)
    config = model.peft_config["default"]
    config.visible_depth = {0: [DEPTH + 1, 1, DEPTH + 1, DEPTH], 1: DEPTH + 1}
    model.merge_adapter()
    with recording_density(model):
        logits_of(model, ids)
    report = density_report(model)
    assert [values["ratio"] for values in report.values()] == pytest.approx([1.0, 1.0], rel=1e-3)
    assert report[1]["density"] == pytest.approx(counted(model, ids)[1], abs=1e-9)


@pytest.mark.parametrize("length", [20, 100])
def test_report_compares_texts_of_another_length(length: int) -> None:
    """Same source of tokens: the share of far pairs stays, the density does not."""
    model, ids = dialled(tokens(24, LENGTH)), tokens(24, length, seed=5)
    with recording_density(model):
        logits_of(model, ids)
    values = density_report(model)[0]
    assert values["ratio"] == pytest.approx(1.0, rel=0.05)
    at_40 = sum(
        row[depth]
        for row, depth in zip(
            model.peft_config["default"].calibration["density"][0],
            model.peft_config["default"].visible_depth[0],
            strict=True,
        )
    )
    assert abs(values["density"] / (at_40 / HEADS) - 1) > 0.06  # so the naive comparison would be off


def test_recording_adds_up_over_forwards_chunks_and_padding() -> None:
    model, ids = dialled(tokens(4, LENGTH)), tokens(1, 30, seed=7)
    kv = DynamicCache(config=model.config)
    with recording_density(model):
        logits_of(model, ids[:, :11], past_key_values=kv, use_cache=True)
        logits_of(model, ids[:, 11:], past_key_values=kv, use_cache=True)
    in_chunks = density_report(model)
    with recording_density(model):
        logits_of(model, ids)
    whole = density_report(model)
    with recording_density(model):
        padded = torch.cat([torch.zeros(1, 6, dtype=torch.int64), ids], 1)
        logits_of(model, padded, attention_mask=(torch.arange(36) >= 6)[None].long())
        logits_of(model, ids)
    for report in (in_chunks, density_report(model)):
        for layer, values in report.items():
            assert values == pytest.approx(whole[layer], rel=1e-6)


def test_collapsed_routes_are_warned_of() -> None:
    model = calibrated(tokens(4, LENGTH), tie_query_key=True)
    model.peft_config["default"].visible_depth = 4  # the dial would leave some heads without a tree, which stay sparse
    model.merge_adapter()
    collapsed = torch.full((1, LENGTH), 7)  # one token and one address for both roles: one ball
    with recording_density(model):
        logits_of(model, collapsed)
    with pytest.warns(UserWarning, match="density is more than 1.5 times .*layers .*0: .*1: ") as caught:
        report = density_report(model)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert all(values["density"] == 1.0 and values["ratio"] > 2 for values in report.values())


def test_recording_starts_afresh_and_ends() -> None:
    model, ids = dialled(tokens(4, LENGTH)), tokens(1, LENGTH, seed=3)
    with recording_density(model):
        logits_of(model, tokens(2, 60, seed=8))
    with recording_density(model):
        logits_of(model, ids)
    report = density_report(model)
    assert report[0]["density"] == pytest.approx(counted(model, ids)[0], abs=1e-9)
    logits_of(model, torch.full((1, LENGTH), 7))
    assert density_report(model) == report
    assert all(host.passes.current() is ORDINARY for host in hosts(model))
    with pytest.raises(ValueError, match="stop"), recording_density(model):
        raise ValueError("stop")
    assert all(host.passes.current() is ORDINARY for host in hosts(model))
    with pytest.raises(UnsupportedModelError, match="needs a recorded forward"):
        density_report(model)  # the last recording saw nothing


def test_recording_does_not_change_the_output() -> None:
    model, ids = dialled(tokens(4, LENGTH)), tokens(2, LENGTH)
    expected = logits_of(model, ids)
    with recording_density(model):
        assert torch.equal(logits_of(model, ids), expected)


def test_report_and_recording_are_refused() -> None:
    model = adapted()
    with pytest.raises(UnsupportedModelError, match="needs a recorded forward"):
        density_report(model)
    with pytest.raises(MergeError, match="unmerged"), recording_density(model):
        pass
    model.merge_adapter()
    with pytest.raises(MergeError, match="without calibration"), recording_density(model):
        pass
    with (
        pytest.raises(UnsupportedModelError, match="active, enabled"),
        model.disable_adapter(),
        recording_density(model),
    ):
        pass
    model.unmerge_adapter()
    calibrate(model, tokens(1, LENGTH))
    with pytest.raises(MergeError, match="unmerged"), recording_density(model):
        pass
    assert all(host.passes.current() is ORDINARY for host in hosts(model))
