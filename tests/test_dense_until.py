"""Models whose first tokens see all before them are a stranger's with section 2's mask, and run dense up to there."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft_helpers import FAMILIES, Stranger, logits_of, routed, tiny
from test_merge_decode import FAR, IDS, LENGTH, ROTATED, SINKS, WINDOW, feed, gap
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import topo_adapter.forward
from topo_adapter import AdapterFileError, TopologyConfigError, load_merged, measure_density, record_routes, save_merged
from topo_adapter.core.layout import contiguous_layout

SETTINGS: dict[str, dict[str, Any]] = {
    "hidden states": {"router_input": "hidden_states", "visits": 1},
    "heads, 8 visits": {"router_input": "heads", "router_dim": 90, "visits": 8, "visible_depth": 4},
}


@pytest.fixture(params=SETTINGS)
def model(request: pytest.FixtureRequest) -> PeftModel:
    return routed(tiny(dtype=torch.float64), **{"depth": 4, "visible_depth": 2, **SETTINGS[request.param]})


def merged(model: PeftModel, form: str, **settings: Any) -> nn.Module:
    model = copy.deepcopy(model)
    if form == "unloaded":
        return model.merge_and_unload(**settings)
    model.merge_adapter(**settings)
    return model


def strangers(model: PeftModel, dense_until: int, mask: Tensor | None = None, seen: int | None = None) -> Tensor:
    """What a stranger computes from the routes of the merged model; seen: what it takes for `dense_until`."""
    records = record_routes(merged(model, "merged", dense_until=dense_until), IDS, mask)
    stranger = Stranger(tiny(dtype=torch.float64), WINDOW, SINKS)
    return stranger.logits(IDS, records, mask, dense_until=dense_until if seen is None else seen)


@pytest.mark.parametrize("form", ["merged", "unloaded"])
@pytest.mark.parametrize("dense_until", [1, 9, LENGTH - 1, LENGTH, 1000])
def test_whole_texts_are_the_strangers(model: PeftModel, dense_until: int, form: str) -> None:
    theirs = strangers(model, dense_until)
    assert gap(logits_of(merged(model, form, dense_until=dense_until), IDS), theirs) < ROTATED
    plain = logits_of(merged(model, form), IDS)
    assert (gap(plain, theirs) > FAR) == (dense_until > WINDOW)  # within the window all is seen anyway


def test_negative_control_one_token_more_is_noticed(model: PeftModel) -> None:
    theirs = strangers(model, 9, seen=10)
    assert gap(logits_of(merged(model, "unloaded", dense_until=9), IDS), theirs) > FAR


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [4, 17], [12, *[1] * 9]], ids=str)
@pytest.mark.parametrize("dense_until", [5, 12])
def test_decoding_is_prefill(model: PeftModel, dense_until: int, chunks: list[int]) -> None:
    """Addresses are recorded while the model runs dense: what follows finds them."""
    theirs = strangers(model, dense_until)
    ours = merged(model, "unloaded", dense_until=dense_until)
    assert gap(feed(ours, IDS, DynamicCache(), chunks), theirs) < ROTATED
    static = StaticCache(config=ours.config, max_cache_len=LENGTH + 3)
    assert gap(feed(ours, IDS, static, chunks), theirs) < ROTATED


def test_padded_and_packed_rows_count_from_their_own_beginning(model: PeftModel) -> None:
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    ours, dense_until = merged(model, "unloaded", dense_until=9), 9
    theirs = strangers(model, dense_until, mask)
    alone = logits_of(ours, IDS[1:, 6:])
    with torch.no_grad():
        padded = ours(input_ids=IDS, attention_mask=mask).logits
    assert gap(padded[1:, 6:], alone) < ROTATED and gap(padded[0], theirs[0]) < ROTATED
    assert gap(feed(ours, IDS, DynamicCache(), [10, *[1] * 11], mask)[1:, 6:], alone) < ROTATED
    positions = torch.cat([torch.arange(8), torch.arange(LENGTH - 8)])[None]
    packed = logits_of(ours, IDS[:1], position_ids=positions)
    assert gap(packed[:, 8:], logits_of(ours, IDS[:1, 8:])) < ROTATED


def test_up_to_there_the_models_own_attention_runs(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = merged(model, "unloaded", dense_until=LENGTH)
    expected = logits_of(tiny(dtype=torch.float64), IDS)
    for name in ("hard_attention", "decode_attention"):
        monkeypatch.setattr(topo_adapter.forward, name, lambda *_, **__: pytest.fail("a topology ran"))
    assert torch.equal(logits_of(ours, IDS), expected)
    cache = DynamicCache()
    feed(ours, IDS, cache, [LENGTH - 1, 1])
    with pytest.raises(pytest.fail.Exception, match="a topology ran"):
        feed(ours, IDS[:, :1], cache, [1])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_every_family(family: str) -> None:
    base = tiny(family, torch.float64)
    stranger = Stranger(base, WINDOW, SINKS)
    model = routed(copy.deepcopy(base))
    ours = model.merge_and_unload(dense_until=9)
    theirs = stranger.logits(IDS, record_routes(ours, IDS), dense_until=9)
    assert gap(logits_of(ours, IDS), theirs) < ROTATED
    cache = DynamicCache(config=base.config)
    assert gap(feed(ours, IDS, cache, [6, *[1] * (LENGTH - 6)]), theirs) < ROTATED


def test_density_counts_their_pairs(model: PeftModel) -> None:
    ours = merged(model, "merged", dense_until=9)
    records = record_routes(ours, IDS)
    layout = contiguous_layout(2, LENGTH)
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    for layer, density in measure_density(ours, IDS).items():
        seen = records[layer].visibility(layout, 2, WINDOW, SINKS).mask() | (torch.arange(LENGTH) < 9)[:, None]
        assert torch.allclose(density, (seen & causal).double().sum((0, 2, 3)) / (2 * causal.sum()))


def test_it_lasts_until_the_adapter_is_unmerged(model: PeftModel) -> None:
    """It belongs to the merge, not to the adapter."""
    plain, dense = (logits_of(merged(model, "merged", dense_until=n), IDS) for n in (0, 9))
    model.merge_adapter(dense_until=9)
    assert torch.equal(logits_of(model, IDS), dense)
    model.merge_adapter(dense_until=0)  # while it is merged
    assert torch.equal(logits_of(model, IDS), plain)
    model.merge_adapter(dense_until=9)
    model.unmerge_adapter()
    model.merge_adapter()
    assert torch.equal(logits_of(model, IDS), plain)
    assert "dense_until" not in model.peft_config["default"].to_dict()
    model.merge_adapter(dense_until=9)
    assert torch.equal(logits_of(model.merge_and_unload(), IDS), dense)


def test_it_is_saved_with_merged_models(model: PeftModel, tmp_path: Path) -> None:
    ours = merged(model, "unloaded", dense_until=9)
    save_merged(ours, tmp_path)
    assert "The first\n9 tokens of a text see all tokens before them" in (tmp_path / "README.md").read_text()
    again = load_merged(tmp_path)
    assert torch.equal(logits_of(again, IDS), logits_of(ours, IDS))
    save_merged(again, tmp_path / "again")
    assert torch.equal(logits_of(load_merged(tmp_path / "again"), IDS), logits_of(ours, IDS))
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    assert fields["dense_until"] == 9
    for bad in (-1, "9", 1.5, True, 2**40):
        file.write_text(json.dumps({**fields, "dense_until": bad}))
        with pytest.raises(AdapterFileError, match="dense_until must be an integer"):
            load_merged(tmp_path)
    del fields["dense_until"]  # a file of before
    file.write_text(json.dumps(fields))
    assert torch.equal(logits_of(load_merged(tmp_path), IDS), logits_of(merged(model, "unloaded"), IDS))


@pytest.mark.parametrize("bad", [-1, 1.5, "9", True, 2**31])
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_what_is_no_number_of_tokens_is_refused(model: PeftModel, call: str, bad: Any) -> None:
    before = logits_of(model, IDS)
    with pytest.raises(TopologyConfigError, match="dense_until must be an integer >= 0"):
        getattr(model, call)(dense_until=bad)
    assert torch.equal(logits_of(model, IDS), before)
    model.merge_adapter()  # was not half merged
