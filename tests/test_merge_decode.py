"""Every form of a topology gives what a stranger computes from `record_routes` and docs/method.md section 2.

float64 throughout. Transformers' norms and rotary tables are float32 whatever the model, so 1e-6 is exact here.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft_helpers import (
    FAMILIES,
    HEADS,
    LAYERS,
    ROUTED,
    Stranger,
    assert_same_weights,
    logits_of,
    randomise_routers,
    routed,
    tiny,
    tokens,
    weights_of,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import topo_adapter.forward
import topo_adapter.hf.cache
from topo_adapter import (
    CacheError,
    MergeError,
    RecordedRoutes,
    TopologyConfig,
    UnsupportedModelError,
    load_merged,
    measure_density,
    record_routes,
    save_merged,
)
from topo_adapter.ops.router import TopologyRouter

WINDOW, SINKS, LENGTH = 3, 2, 21
EXACT = 1e-6
ROTATED = 1e-5  # the same where positions are shifted, which rounds differently in the float32 rotary tables
FAR = 1e-2  # what a wrong mask moves: thousands of times more
DEPTHS: dict[int, Any] = {0: 2, 1: [0, 1, 2, 3], 2: [5, 0, 4, 1]}  # 5: no tree; layer 3 is left out: dense
IDS = tokens(2, LENGTH)

CASES = {
    f"{tie}-{per}-p{arity}": {
        "tie_query_key": tie == "tied",
        "route_per": per,
        "arity": arity,
        "depth": 4,
        "visible_depth": DEPTHS,
    }
    for tie in ("tied", "untied")
    for per in ("query_head", "kv_head")
    for arity in (2, 3)
}
#: Routers on heads.
ON_HEADS = {
    f"heads-{per}-p{arity}": {**CASES[f"untied-{per}-p{arity}"], "router_input": "heads", "router_dim": 90}
    for per, arity in (("query_head", 2), ("kv_head", 3))
}
CASES |= ON_HEADS
#: With more visits; 8 of 9 leaves at depth 2, where the map is deeper than most.
VISITING = {
    "visits-3": {**CASES["untied-query_head-p2"], "visits": 3},
    "visits-8-heads": {**ON_HEADS["heads-query_head-p2"], "visits": 8},
    "visits-8": {**CASES["tied-kv_head-p3"], "visits": 8, "visible_depth": {0: 3, 1: [4, 4, 3, 3], 2: [5, 5, 4, 4]}},
}
FORMS = ["adapter", "merged", "unloaded"]
SOFT_AND_HARD = ["adapter", "unloaded"]  # "merged" runs the same code as "unloaded" once it runs


@dataclass
class Scene:
    """A base, a routed model on a copy of it, and the stranger's answer."""

    base: PreTrainedModel
    model: PeftModel
    stranger: Stranger
    records: dict[int, RecordedRoutes]
    logits: Tensor

    def form(self, form: str) -> nn.Module:
        model = copy.deepcopy(self.model)
        if form == "merged":
            model.merge_adapter()
        return model.merge_and_unload() if form == "unloaded" else model


_scenes: dict[str, Scene] = {}


def scene(case: str) -> Scene:
    """Made once per case; tests get copies or leave it as it was."""
    if case not in _scenes:
        settings: dict[str, Any] = {**CASES, **VISITING}.get(case, {})
        base = tiny(case if case in FAMILIES else "llama", torch.float64)
        stranger = Stranger(base, WINDOW, SINKS, settings.get("arity", 2))
        model = routed(copy.deepcopy(base), **settings)
        records = record_routes(model, IDS)
        _scenes[case] = Scene(base, model, stranger, records, stranger.logits(IDS, records))
    return _scenes[case]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Scene:
    return scene(request.param)


@pytest.fixture(params=["tied-kv_head-p3", "untied-query_head-p2"])
def corner(request: pytest.FixtureRequest) -> Scene:
    """Two cases that hold every setting once, where all eight would cost more than they tell."""
    return scene(request.param)


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of finite float64 logits."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float64
    assert bool(torch.isfinite(ours).all()) and bool(torch.isfinite(theirs).all())
    return float((ours - theirs).abs().max())


def same(ours: Tensor, theirs: Tensor, tolerance: float = EXACT) -> None:
    largest = gap(ours, theirs)
    assert largest <= tolerance


def differ(ours: Tensor, theirs: Tensor) -> None:
    largest = gap(ours, theirs)
    assert largest > FAR


def generate(model: nn.Module, ids: Tensor = IDS, **kwargs: Any) -> Any:
    return model.generate(input_ids=ids, **{"max_new_tokens": 6, "do_sample": False, **kwargs})


@torch.no_grad()
def feed(model: nn.Module, ids: Tensor, cache: Any, chunks: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of `ids`, sent in `chunks` through `cache`, which may hold earlier tokens."""
    assert sum(chunks) == ids.shape[1]
    start, out, past = 0, [], int(cache.get_seq_length())
    for size in chunks:
        stop = start + size
        part = None if mask is None else mask[:, : past + stop]
        output = model(input_ids=ids[:, start:stop], attention_mask=part, past_key_values=cache, use_cache=True)
        out.append(output.logits)
        start = stop
    assert int(cache.get_seq_length()) == past + ids.shape[1]
    return torch.cat(out, 1)


# ---------------------------------------------------------------- whole sequences


def test_eval_mode_is_the_strangers(case: Scene) -> None:
    same(logits_of(case.model, IDS), case.logits)
    differ(logits_of(case.base, IDS), case.logits)  # the mask bites
    digits = torch.cat([r.query_digits for r in case.records.values()], 1)
    balls = {tuple(d) for d in digits.transpose(0, 1).flatten(1, 2).flatten(0, 1).tolist()}
    assert len(balls) >= 8
    depths = [record.visible_depth.tolist() for record in case.records.values()]
    assert depths == [[2] * HEADS, [0, 1, 2, 3], [5, 0, 4, 1], [0] * HEADS]


def test_merged_is_the_strangers(case: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    hard = topo_adapter.forward.hard_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return hard(*args, **kwargs)

    monkeypatch.setattr(topo_adapter.forward, "hard_attention", spy)
    model = case.form("merged")
    same(logits_of(model, IDS), case.logits)
    assert calls == LAYERS  # the hard path ran, not the soft one
    model.train()
    same(logits_of(model, IDS), case.logits)  # and no noise in training mode
    model.unmerge_adapter()
    same(logits_of(model.eval(), IDS), case.logits)
    assert calls == 3 * LAYERS  # nor is there anything soft to run where nobody asks for gradients
    with torch.enable_grad():
        same(model(input_ids=IDS).logits.detach(), case.logits)
    assert calls == 3 * LAYERS
    model.peft_config["default"].homotopy = 0.5
    logits_of(model, IDS)
    assert calls == 3 * LAYERS


def test_reloaded_is_the_strangers(case: Scene, tmp_path: Path) -> None:
    case.model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(case.base), tmp_path).eval()
    same(logits_of(reloaded, IDS), case.logits)
    reloaded.merge_adapter()
    same(logits_of(reloaded, IDS), case.logits)


def test_unloaded_and_saved_is_the_strangers(case: Scene, tmp_path: Path) -> None:
    model = case.form("unloaded")
    assert isinstance(model, type(case.base)) and not isinstance(model, PeftModel)
    assert not hasattr(model, "peft_config")
    same(logits_of(model, IDS), case.logits)
    save_merged(model, tmp_path)
    again = load_merged(tmp_path)
    assert type(again) is type(model) and again.dtype == torch.float64
    same(logits_of(again, IDS), case.logits)
    plain = {key: value for key, value in again.state_dict().items() if ".topo_adapter." not in key}
    assert_same_weights(case.base, plain)
    same(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), IDS), case.logits)
    save_merged(again, tmp_path / "again")
    same(logits_of(load_merged(tmp_path / "again"), IDS), case.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    """Soft caps, head sizes that are not hidden / heads, fused projections, sliding layers left as they are."""
    it = scene(family)
    assert sorted(it.records) == ROUTED[family]
    differ(logits_of(it.base, IDS), it.logits)
    for form in ("adapter", "unloaded"):
        model = it.form(form)
        same(logits_of(model, IDS), it.logits)
        cache = DynamicCache(config=it.base.config)
        same(feed(model, IDS, cache, [13, *[1] * (LENGTH - 13)]), it.logits)
        short = {"max_new_tokens": 3}
        assert torch.equal(generate(model, **short), generate(model, use_cache=False, **short))
    save_merged(model, tmp_path)
    again = load_merged(tmp_path, attn_implementation=it.base.config._attn_implementation)
    same(logits_of(again, IDS), it.logits)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 21])
def test_short_prompts(corner: Scene, length: int) -> None:
    ids = IDS[:, :length]
    theirs = corner.stranger.logits(ids, record_routes(corner.model, ids))
    for form in FORMS:
        same(logits_of(corner.form(form), ids), theirs)


@pytest.mark.parametrize("route_per", ["query_head", "kv_head"])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_multi_query_and_multi_head_attention(kv_heads: int, route_per: str) -> None:
    base = tiny(dtype=torch.float64, num_key_value_heads=kv_heads)
    stranger = Stranger(base, WINDOW, SINKS)
    depths = {0: [1, 2, 5, 4], 1: [3] * (kv_heads if route_per == "kv_head" else 4), 2: 2}
    model = routed(base, visible_depth=depths, route_per=route_per)
    theirs = stranger.logits(IDS, record_routes(model, IDS))
    differ(logits_of(tiny(dtype=torch.float64, num_key_value_heads=kv_heads), IDS), theirs)
    same(logits_of(model, IDS), theirs)
    unloaded = model.merge_and_unload()
    same(logits_of(unloaded, IDS), theirs)
    same(feed(unloaded, IDS, DynamicCache(), [15, *[1] * 6]), theirs)


@pytest.mark.parametrize("bridge", ["full", "masked"])
def test_evaluation_takes_the_hard_choice_with_and_without_grad(bridge: str) -> None:
    """A bridge is for training; evaluation is one thing, whether or not somebody wants gradients."""
    base = tiny(dtype=torch.float64)
    stranger = Stranger(base, WINDOW, SINKS)
    model = routed(base, gradient_bridge=bridge, temperature=0.7)
    theirs = stranger.logits(IDS, record_routes(model, IDS))
    same(logits_of(model, IDS), theirs)
    same(model(input_ids=IDS).logits.detach(), theirs)
    with torch.inference_mode():
        same(model(input_ids=IDS).logits.clone(), theirs)


@pytest.mark.parametrize("settings", [{"local_window": 1, "num_sink_tokens": 0}, {"local_window": 64}], ids=str)
def test_extreme_windows(settings: dict[str, int]) -> None:
    base = tiny(dtype=torch.float64)
    stranger = Stranger(base, settings["local_window"], settings.get("num_sink_tokens", SINKS))
    model = routed(base, **settings)
    theirs = stranger.logits(IDS, record_routes(model, IDS))
    same(logits_of(model, IDS), theirs)
    same(logits_of(model.merge_and_unload(), IDS), theirs)


def test_depth_is_chosen_at_merge_time(corner: Scene) -> None:
    """Balls nest: the same adapter serves every depth, and a smaller one sees more."""
    answers, densities = [], []
    for depth in range(6):
        model = copy.deepcopy(corner.model)
        model.peft_config["default"].visible_depth = depth
        records = record_routes(model, IDS)
        assert {d for r in records.values() for d in r.visible_depth.tolist()} == {depth}
        answers.append(corner.stranger.logits(IDS, records))
        same(logits_of(model, IDS), answers[-1])
        densities.append(torch.stack(list(measure_density(model, IDS).values())).mean())
        same(logits_of(model.merge_and_unload(), IDS), answers[-1])
    same(answers[0], logits_of(corner.base, IDS))
    assert all(gap(one, two) > FAR for one, two in itertools.pairwise(answers))
    assert all(one > two for one, two in itertools.pairwise(densities)) and densities[0] == 1


@pytest.mark.parametrize(
    "change",
    [{"depth": 1}, {"depth": -1}, {"window": WINDOW + 1}, {"window": WINDOW - 1}, {"sinks": SINKS + 1}, {"sinks": 1}],
    ids=str,
)
def test_negative_control_a_mask_off_by_one_is_noticed(corner: Scene, change: dict[str, int]) -> None:
    wrong = corner.stranger.logits(IDS, corner.records, **change)
    for form in FORMS:
        differ(logits_of(corner.form(form), IDS), wrong)


def test_negative_control_swapped_roles_are_noticed() -> None:
    it = scene("untied-query_head-p2")
    swapped = {
        i: RecordedRoutes(r.key_digits, r.query_digits, r.visible_depth, r.visits) for i, r in it.records.items()
    }
    differ(it.stranger.logits(IDS, swapped), logits_of(it.model, IDS))
    tied = scene("tied-query_head-p2")
    assert all(torch.equal(r.query_digits, r.key_digits) for r in tied.records.values())


def test_negative_control_one_hidden_pair_is_noticed() -> None:
    """A single digit of a single token is enough to tell."""
    it = scene("untied-query_head-p2")
    digits = it.records[0].key_digits.clone()
    digits[0, 0, 7, 0] ^= 1
    records = {**it.records, 0: replace(it.records[0], key_digits=digits)}
    differ(it.stranger.logits(IDS, records), logits_of(it.model, IDS))


def test_recorded_digits_are_the_files_routers(case: Scene, tmp_path: Path) -> None:
    """Digits recomputed from the saved tensors and the hidden states that enter the stranger's own attention."""
    if case.model.peft_config["default"].router_input == "heads":
        pytest.skip("they do not read hidden states; tests/test_head_router.py has them")
    case.model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    config = case.model.peft_config["default"]
    heads = HEADS if config.route_per == "query_head" else HEADS // 2
    seen: dict[int, Tensor] = {}

    def remember(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen[module.layer_idx] = (args[0] if args else kwargs["hidden_states"]).detach()

    handles = [
        layer.self_attn.register_forward_pre_hook(remember, with_kwargs=True)
        for layer in case.stranger.model.model.layers
    ]
    case.stranger.logits(IDS, case.records)
    for handle in handles:
        handle.remove()
    for index, record in case.records.items():
        prefix = f"base_model.model.model.layers.{index}.self_attn.topo_adapter.topo_routers."
        narrow = F.gelu(seen[index].float() @ file[prefix + "down.weight"].T)
        for role, digits in (("query", record.query_digits), ("key", record.key_digits)):
            role = "query" if config.tie_query_key else role
            free = narrow @ file[f"{prefix}{role}.weight"].T + file[f"{prefix}{role}.bias"]
            free = free.reshape(*free.shape[:2], heads, config.depth, config.arity - 1)
            scores = torch.cat([torch.zeros_like(free[..., :1]), free], -1)
            wanted = scores.argmax(-1).permute(0, 2, 1, 3).repeat_interleave(HEADS // heads, 1)
            assert digits.dtype == torch.int64 and torch.equal(digits, wanted)


def test_record_routes_leaves_the_model_as_it_was(corner: Scene) -> None:
    for form in FORMS:
        model = corner.form(form).train()
        model.get_submodule("model" if form == "unloaded" else "base_model").eval()
        modes = [module.training for module in model.modules()]
        records = record_routes(model, IDS)
        assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
        for index, record in corner.records.items():
            assert torch.equal(records[index].query_digits, record.query_digits)
            assert torch.equal(records[index].key_digits, record.key_digits)
            assert torch.equal(records[index].visible_depth, record.visible_depth)
    with pytest.raises(UnsupportedModelError), corner.model.disable_adapter():
        record_routes(corner.model, IDS)
    with pytest.raises(UnsupportedModelError):
        record_routes(corner.base, IDS)


def test_density_is_that_of_the_strangers_mask(case: Scene) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    for padding in (None, mask):
        records = record_routes(case.model, IDS, padding)
        ours = measure_density(case.model, IDS, padding)
        assert ours.keys() == records.keys()
        with case.stranger.attending(records, padding):
            from peft_helpers import _in_use

            causal = _in_use["causal"][:, None].sum((0, 2, 3))
            for index, visible in _in_use["masks"].items():
                wanted = visible.sum((0, 2, 3)).double() / causal
                torch.testing.assert_close(ours[index], wanted, rtol=1e-12, atol=0)
        assert any(float(d.min()) < 0.9 for d in ours.values())


# ---------------------------------------------------------------- several visits


@pytest.fixture(params=VISITING)
def visiting(request: pytest.FixtureRequest) -> Scene:
    return scene(request.param)


def test_visits_are_distinct_balls(visiting: Scene) -> None:
    """As many as were asked for, where a depth has as many, and the first is that of the recorded digits."""
    config = visiting.model.peft_config["default"]
    for index, record in visiting.records.items():
        assert record.visits.shape == (2, HEADS, config.visits, LENGTH) and record.visits.dtype == torch.int64
        places = config.arity ** torch.arange(config.depth)
        own = (record.query_digits * places).sum(-1)
        for head, depth in enumerate(record.visible_depth.tolist()):
            if depth > config.depth:
                assert (record.visits[:, head] == -1).all()
                continue
            size = config.arity**depth
            count = min(config.visits, size)
            balls = record.visits[:, head, :count] % size
            assert torch.equal(balls[:, 0], own[:, head] % size) and (record.visits[:, head, count:] == -1).all()
            assert all(len(set(row)) == count for row in balls.transpose(1, 2).flatten(0, 1).tolist())
        merged = record_routes(visiting.form("unloaded"), IDS)[index]
        assert torch.equal(merged.visits, record.visits)


@pytest.mark.parametrize("form", FORMS)
def test_several_visits_are_the_strangers(visiting: Scene, form: str) -> None:
    """Whole, token by token, in chunks, in a static cache, padded, packed; and with gradients asked for."""
    model = visiting.form(form)
    same(logits_of(model, IDS), visiting.logits)
    alone = {index: replace(record, visits=record.visits[:, :, :1]) for index, record in visiting.records.items()}
    differ(visiting.stranger.logits(IDS, alone), visiting.logits)  # control: the other visits show something
    with torch.enable_grad():
        same(model(input_ids=IDS).logits.detach(), visiting.logits)
    for chunks in ([12, *[1] * (LENGTH - 12)], [4, 17]):
        same(feed(model, IDS, DynamicCache(), chunks), visiting.logits)
        static = StaticCache(config=visiting.base.config, max_cache_len=LENGTH + 2)
        same(feed(model, IDS, static, chunks), visiting.logits)
    ids, mask = padded()
    theirs = visiting.stranger.logits(ids, record_routes(visiting.model, ids, mask), padding=mask)[mask.bool()]
    same(logits_of(model, ids, attention_mask=mask)[mask.bool()], theirs)
    same(feed(model, ids, DynamicCache(), [14, *[1] * (LENGTH - 14)], mask)[mask.bool()], theirs)
    position_ids = torch.cat([torch.arange(n) for n in SIZES])[None].expand(2, -1)
    pieces = [visiting.stranger.logits(part, record_routes(visiting.model, part)) for part in IDS.split(SIZES, dim=1)]
    same(logits_of(model, IDS, position_ids=position_ids), torch.cat(pieces, 1))


def test_visits_are_saved_with_adapters_and_merged_models(visiting: Scene, tmp_path: Path) -> None:
    visiting.model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(copy.deepcopy(visiting.base), tmp_path / "adapter").eval()
    same(logits_of(reloaded, IDS), visiting.logits)
    save_merged(visiting.form("unloaded"), tmp_path / "merged")
    same(logits_of(load_merged(tmp_path / "merged"), IDS), visiting.logits)


def test_density_of_several_visits_is_that_of_the_strangers_mask(visiting: Scene) -> None:
    test_density_is_that_of_the_strangers_mask(visiting)


# ---------------------------------------------------------------- decode


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_token_by_token_is_the_strangers(case: Scene, form: str) -> None:
    ours = feed(case.form(form), IDS[:1], DynamicCache(config=case.base.config), [1] * LENGTH)
    same(ours, case.logits[:1])


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [4, 17], [7, 7, 7], [10, 1, 1, 9]], ids=str)
@pytest.mark.parametrize("form", SOFT_AND_HARD)
def test_chunked_prefill_is_the_strangers(corner: Scene, form: str, chunks: list[int]) -> None:
    same(feed(corner.form(form), IDS, DynamicCache(), chunks), corner.logits)  # one that grows layer by layer


@pytest.mark.parametrize("form", SOFT_AND_HARD)
def test_static_cache_is_the_strangers(corner: Scene, form: str) -> None:
    model = corner.form(form)
    for chunks in ([12, *[1] * (LENGTH - 12)], [6, 6, 9]):
        cache = StaticCache(config=corner.base.config, max_cache_len=LENGTH + 6)
        same(feed(model, IDS, cache, chunks), corner.logits)
    cache.reset()  # and again from the start
    same(feed(model, IDS, cache, [LENGTH]), corner.logits)
    dynamic = generate(model)
    assert torch.equal(generate(model, cache_implementation="static"), dynamic)


@pytest.mark.parametrize("homotopy", [0.0, 0.5, 1.0])
def test_decode_at_every_homotopy(homotopy: float) -> None:
    model = routed(tiny(dtype=torch.float64), homotopy=homotopy)
    whole = logits_of(model, IDS)
    same(feed(model, IDS, DynamicCache(), [12, *[1] * (LENGTH - 12)]), whole)
    padded_ids, mask = padded()
    whole = logits_of(model, padded_ids, attention_mask=mask)[mask.bool()]
    same(feed(model, padded_ids, DynamicCache(), [15, *[1] * (LENGTH - 15)], mask)[mask.bool()], whole)
    for other in {0.0, 0.5, 1.0} - {homotopy}:  # control: the coefficient is in force
        model.peft_config["default"].homotopy = other
        differ(logits_of(model, padded_ids, attention_mask=mask)[mask.bool()], whole)


@pytest.mark.parametrize("form", FORMS)
def test_inference_mode(corner: Scene, form: str) -> None:
    model = corner.form(form)
    ids, mask = padded()
    whole = logits_of(model, ids, attention_mask=mask)[mask.bool()]
    with torch.inference_mode():
        ours = feed(model, ids, DynamicCache(), [15, *[1] * (LENGTH - 15)], mask).clone()
    same(ours[mask.bool()], whole)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("form", FORMS)
def test_generated_tokens_are_the_strangers(form: str, task_type: str | None) -> None:
    base = tiny(dtype=torch.float64)
    stranger, dense = Stranger(base, WINDOW, SINKS), generate(base)
    model = routed(base, task_type=task_type)
    if form != "adapter":
        model.merge_adapter()
    if form == "unloaded":
        model = model.merge_and_unload()
    sequence = generate(model)
    theirs = stranger.logits(sequence, record_routes(model, sequence))
    assert torch.equal(sequence[:, LENGTH:], theirs[:, LENGTH - 1 : -1].argmax(-1))
    assert torch.equal(generate(model, use_cache=False), sequence)
    assert not torch.equal(dense, sequence)


def test_beam_search_is_the_same_in_every_form(corner: Scene) -> None:
    """Without a cache beam search runs whole sequences; with one it reorders, repeats and selects."""
    beams = {"num_beams": 4, "num_return_sequences": 4, "output_scores": True, "return_dict_in_generate": True}
    reference = generate(corner.model, use_cache=False, **beams)
    dense = generate(corner.base, **beams)
    assert not torch.equal(dense.sequences, reference.sequences)
    for form in FORMS:
        ours = generate(corner.form(form), **beams)
        assert torch.equal(ours.sequences, reference.sequences)
        assert torch.isfinite(ours.sequences_scores).all()
        torch.testing.assert_close(ours.sequences_scores, reference.sequences_scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", SOFT_AND_HARD)
def test_cropped_cache_continues_as_a_fresh_one(corner: Scene, form: str) -> None:
    """Assisted decoding rejects draft tokens by cropping the cache."""
    model = corner.form(form)
    cache = DynamicCache(config=corner.base.config)
    draft = torch.cat([IDS[:, :9], tokens(2, 5, seed=8)], 1)
    feed(model, draft, cache, [9, 1, 4])
    cache.crop(-5)
    assert cache.get_seq_length() == 9
    same(feed(model, IDS[:, 9:], cache, [2, *[1] * (LENGTH - 11)]), corner.logits[:, 9:])
    never = DynamicCache(config=corner.base.config)
    feed(model, draft, never, [14])
    differ(feed(model, IDS[:, 9:], never, [12]), corner.logits[:, 9:])  # control: uncropped differs


def test_assisted_generation(corner: Scene) -> None:
    model = corner.form("merged")
    ids = IDS[:1]
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), generate(model, ids))


@pytest.mark.parametrize("form", SOFT_AND_HARD)
def test_reordered_and_repeated_cache(corner: Scene, form: str) -> None:
    model = corner.form(form)
    rest = LENGTH - 10
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ):
        cache = DynamicCache(config=corner.base.config)
        feed(model, IDS[:, :10], cache, [10])
        change(cache)
        same(feed(model, IDS[rows, 10:], cache, [1] * rest), corner.logits[rows, 10:])


# ---------------------------------------------------------------- padding and packing


PADDING = [5, 0, 13]


def padded(batch: int = 3) -> tuple[Tensor, Tensor]:
    mask = torch.ones(batch, LENGTH, dtype=torch.long)
    for row, count in enumerate(PADDING):
        mask[row, :count] = 0
    return tokens(batch, LENGTH, seed=3).masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("form", FORMS)
def test_left_padded_batch_is_the_strangers(case: Scene, form: str) -> None:
    ids, mask = padded()
    theirs = case.stranger.logits(ids, record_routes(case.model, ids, mask), padding=mask)
    model = case.form(form)
    ours = logits_of(model, ids, attention_mask=mask)
    same(ours[mask.bool()], theirs[mask.bool()])
    for row, count in enumerate(PADDING):
        same(logits_of(model, ids[row : row + 1, count:]), ours[row : row + 1, count:], ROTATED)
    unmasked = logits_of(model, ids)  # control: the padding matters
    differ(unmasked[mask.bool()], theirs[mask.bool()])


@pytest.mark.parametrize("form", SOFT_AND_HARD)
def test_left_padded_batch_on_an_eager_base(corner: Scene, form: str) -> None:
    """Its mask is additive floats, not booleans."""
    ids, mask = padded()
    model = corner.form(form)
    wanted = logits_of(model, ids, attention_mask=mask)[mask.bool()]
    (model if form == "unloaded" else model.get_base_model()).set_attn_implementation("eager")
    same(logits_of(model, ids, attention_mask=mask)[mask.bool()], wanted)


@pytest.mark.parametrize("form", SOFT_AND_HARD)
def test_right_padded_batch(corner: Scene, form: str) -> None:
    ids, mask = (x.flip(1) for x in padded())
    theirs = corner.stranger.logits(ids, record_routes(corner.model, ids, mask), padding=mask)
    ours = logits_of(corner.form(form), ids, attention_mask=mask)
    same(ours[mask.bool()], theirs[mask.bool()])


@pytest.mark.parametrize("chunks", [[6, 11, 4], [14, *[1] * (LENGTH - 14)]], ids=str)
@pytest.mark.parametrize("form", SOFT_AND_HARD)
def test_left_padded_decode_is_the_strangers(corner: Scene, form: str, chunks: list[int]) -> None:
    ids, mask = padded()
    theirs = corner.stranger.logits(ids, record_routes(corner.model, ids, mask), padding=mask)
    model = corner.form(form)
    for cache in (DynamicCache(), StaticCache(config=corner.base.config, max_cache_len=LENGTH + 3)):
        ours = feed(model, ids, cache, chunks, mask)
        same(ours[mask.bool()], theirs[mask.bool()])


@pytest.mark.parametrize("form", SOFT_AND_HARD)
def test_left_padded_generation_is_each_row_alone(corner: Scene, form: str) -> None:
    ids, mask = padded()
    model = corner.form(form)
    batch = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, use_cache=False), batch)
    assert torch.equal(generate(model, ids, attention_mask=mask, cache_implementation="static"), batch)
    for row, count in enumerate(PADDING):
        assert torch.equal(generate(model, ids[row : row + 1, count:]), batch[row : row + 1, count:])


SIZES = [9, 1, 11]


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("form", SOFT_AND_HARD)
def test_packed_documents_are_separate_ones(case: Scene, form: str, use_cache: bool) -> None:
    """With a cache transformers itself builds no packing mask: only position_ids tell."""
    model = case.form(form)
    position_ids = torch.cat([torch.arange(n) for n in SIZES])[None].expand(2, -1)
    packed = logits_of(model, IDS, position_ids=position_ids, use_cache=use_cache)
    pieces = [case.stranger.logits(part, record_routes(case.model, part)) for part in IDS.split(SIZES, dim=1)]
    same(packed, torch.cat(pieces, 1))
    differ(logits_of(model, IDS, use_cache=use_cache), packed)  # control: unpacked differs


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("family", [name for name in FAMILIES if len(ROUTED[name]) == LAYERS])
def test_packed_documents_in_every_family(family: str, use_cache: bool) -> None:
    """Gemma's sliding layers are transformers' own and leak between documents when there is a cache."""
    it = scene(family)
    position_ids = torch.cat([torch.arange(n) for n in SIZES])[None].expand(2, -1)
    separate = torch.cat([logits_of(it.model, part) for part in IDS.split(SIZES, dim=1)], 1)
    for form in FORMS:
        packed = logits_of(it.form(form), IDS, position_ids=position_ids, use_cache=use_cache)
        same(packed, separate)


@pytest.mark.parametrize("form", SOFT_AND_HARD)
def test_decode_after_packed_prefill_continues_the_last_document(corner: Scene, form: str) -> None:
    model = corner.form(form)
    last = IDS[:, sum(SIZES[:2]) :]
    more = tokens(2, 4, seed=11)
    cache = DynamicCache(config=corner.base.config)
    positions = torch.cat([torch.arange(n) for n in SIZES])[None].expand(2, -1)
    out = []
    with torch.no_grad():
        model(input_ids=IDS, position_ids=positions, past_key_values=cache)
        for t in range(4):
            position = torch.full((2, 1), SIZES[2] + t)
            out.append(model(input_ids=more[:, t : t + 1], position_ids=position, past_key_values=cache).logits)
    whole = torch.cat([last, more], 1)
    theirs = corner.stranger.logits(whole, record_routes(corner.model, whole))
    same(torch.cat(out, 1), theirs[:, -4:])


# ---------------------------------------------------------------- caches that do not fit


def test_cache_filled_by_the_base_is_refused() -> None:
    model = copy.deepcopy(scene("untied-query_head-p2").model)
    cache = DynamicCache()
    with model.disable_adapter():
        feed(model, IDS[:, :10], cache, [10])
    with pytest.raises(CacheError, match=r"10 keys.*disabled or at homotopy 0"):
        feed(model, IDS[:, 10:], cache, [1] * 11)

    cache = DynamicCache()
    feed(model, IDS[:, :6], cache, [6])
    with model.disable_adapter():
        feed(model, IDS[:, 6:10], cache, [4])
    with pytest.raises(CacheError, match=r"10 keys.*addresses of 6 tokens: the others were put in by hand, or"):
        feed(model, IDS[:, 10:], cache, [11])

    cache = DynamicCache()
    model.peft_config["default"].homotopy = 0.0
    feed(model, IDS[:, :10], cache, [10])
    model.peft_config["default"].homotopy = 1.0
    with pytest.raises(CacheError):
        feed(model, IDS[:, 10:], cache, [11])


def test_a_cache_whose_keys_were_changed_by_hand_is_refused() -> None:
    """Pruned after the prompt, as key-value compression does, or made from saved tensors: each is named."""
    model = scene("untied-query_head-p2").model
    cache = DynamicCache()
    feed(model, IDS[:, :10], cache, [10])
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]
    with pytest.raises(CacheError, match=r"5 keys.*addresses of 10 tokens: keys were taken out.*pruned.*crop\(\)"):
        feed(model, IDS[:, 10:], cache, [11])
    with pytest.raises(CacheError, match=r"10 keys.*addresses of 0 tokens: it was made from saved key"):
        feed(model, IDS[:, 10:], DynamicCache(pairs), [11])


def test_cache_filled_by_another_adapter_is_refused() -> None:
    """Its addresses were drawn on another tree; mixing the two is silently wrong."""
    model = copy.deepcopy(scene("untied-query_head-p2").model)
    config = {"depth": 4, "visible_depth": 2, "router_dim": 8, "local_window": 3, "num_sink_tokens": 2}
    model.add_adapter("b", TopologyConfig(**config, homotopy=1.0))
    randomise_routers(model, 5, "b")
    cache = DynamicCache()
    feed(model, IDS[:, :10], cache, [10])
    model.set_adapter("b")
    with pytest.raises(CacheError):
        feed(model.eval(), IDS[:, 10:], cache, [11])


@pytest.mark.parametrize("treeless", [0, 5, {0: [0, 5, 5, 0], 1: 5}], ids=str)
def test_layers_without_a_tree_do_not_route(treeless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their addresses are not made, and a cache filled meanwhile cannot be routed later."""
    model = copy.deepcopy(scene("untied-query_head-p2").model)
    config = model.peft_config["default"]
    routed = config.visible_depth
    right = logits_of(model, IDS)
    config.visible_depth = treeless
    # as if all tokens were in one ball: what the routers choose does not matter
    base = tiny(dtype=torch.float64)
    expected = Stranger(base, WINDOW, SINKS).logits(IDS, record_routes(model, IDS))
    with monkeypatch.context() as patch:
        patch.setattr(TopologyRouter, "addresses", mock.Mock(side_effect=AssertionError("no address is asked for")))
        cache = DynamicCache()
        same(
            torch.cat([feed(model, IDS[:, :10], cache, [10]), feed(model, IDS[:, 10:12], cache, [1, 1])], 1),
            expected[:, :12],
        )
        differ(expected, right)
    config.visible_depth = routed
    with pytest.raises(CacheError, match="no head of the layer had a tree"):
        feed(model, IDS[:, 12:13], cache, [1])

    cache = DynamicCache()  # the other way round is fine: nobody asks for the addresses that are there
    feed(model, IDS[:, :10], cache, [10])
    config.visible_depth = treeless
    feed(model, IDS[:, 10:], cache, [LENGTH - 10])


def test_a_cache_holds_whole_addresses_whatever_the_map() -> None:
    """Also of heads that have no tree meanwhile: it serves any map. Deeper layers read states that the map changes."""
    model, found = copy.deepcopy(scene("untied-query_head-p2").model), []
    for depths in ([5, 5, 1, 5], [5, 2, 5, 0], 4):
        model.peft_config["default"].visible_depth = {0: depths}
        cache = DynamicCache()
        feed(model, IDS[:, :10], cache, [9, 1])
        found.append(cache.layers[0].indexer_keys)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert found[0][..., :-2].unique().numel() > 4


@pytest.mark.parametrize("form", SOFT_AND_HARD)
def test_layers_share_the_layout_of_new_tokens(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = scene("untied-query_head-p2").form(form), DynamicCache()
    feed(model, IDS[:, :10], cache, [10])
    made = mock.Mock(wraps=topo_adapter.hf.cache.continued_layout)
    monkeypatch.setattr(topo_adapter.hf.cache, "continued_layout", made)
    for step in range(1, 4):
        feed(model, IDS[:, 9 + step : 10 + step], cache, [1])
        assert made.call_count == step


@pytest.mark.parametrize("form", SOFT_AND_HARD)
def test_unsuitable_caches_are_refused(form: str) -> None:
    model = scene("untied-query_head-p2").form(form)
    cache = DynamicCache(config=model.config)
    cache.layers[2] = DynamicSlidingWindowLayer(sliding_window=8)
    with pytest.raises(CacheError, match="cache's layer 2"):
        feed(model, IDS, cache, [LENGTH])


def test_unmerging_keeps_the_cache() -> None:
    """The same router before and after merging: its addresses stay good."""
    it = scene("untied-query_head-p2")
    model = copy.deepcopy(it.model)
    cache = DynamicCache()
    start = feed(model, IDS[:, :8], cache, [8])
    model.merge_adapter()
    middle = feed(model, IDS[:, 8:14], cache, [6])
    model.unmerge_adapter()
    end = feed(model, IDS[:, 14:], cache, [7])
    same(torch.cat([start, middle, end], 1), it.logits)


def test_the_base_may_use_a_cache_that_carries_addresses() -> None:
    model = copy.deepcopy(scene("untied-query_head-p2").model)
    cache = DynamicCache()
    feed(model, IDS[:, :3], cache, [3])  # within window and sinks: the same keys and values as the base's
    with model.disable_adapter():
        ours = feed(model, IDS[:, 3:], cache, [18])
        same(ours, logits_of(model, IDS)[:, 3:])


# ---------------------------------------------------------------- merging


def merged_layers(model: nn.Module) -> list[bool]:
    return [bool(m.merged_adapters) for m in model.modules() if isinstance(m, topo_adapter.TopologyLayer)]


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("homotopy", [0.0, 0.5, 0.999])
def test_merging_below_homotopy_1_is_refused(homotopy: float, call: str) -> None:
    model = routed(tiny(dtype=torch.float64), homotopy=homotopy)
    before, state = logits_of(model, IDS), weights_of(model)
    with pytest.raises(MergeError, match="homotopy"):
        getattr(model, call)()
    assert merged_layers(model) == [False] * LAYERS
    assert_same_weights(model, state)
    same(logits_of(model, IDS), before, 0)
    model.peft_config["default"].homotopy = 1.0  # control: this is all that was in the way
    getattr(model, call)()


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_two_adapters_is_refused(call: str) -> None:
    model = routed(tiny(dtype=torch.float64))
    before = logits_of(model, IDS)
    model.add_adapter("b", TopologyConfig(depth=4, visible_depth=2, homotopy=1.0))
    model.base_model.set_adapter(["default", "b"])
    state = weights_of(model)
    with pytest.raises(MergeError, match="one"):
        getattr(model, call)()
    with pytest.raises(MergeError, match="one"):
        getattr(model, call)(adapter_names=["default", "b"])
    assert merged_layers(model) == [False] * LAYERS
    assert_same_weights(model, state)
    model.set_adapter("default")
    same(logits_of(model, IDS), before, 0)
    model.merge_adapter()
    same(logits_of(model, IDS), before)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_a_named_adapter_looks_at_that_one(call: str) -> None:
    """The active adapter is still training; the other one is finished and may be merged."""
    wanted = logits_of(routed(tiny(dtype=torch.float64), seed=4), IDS)
    model = routed(tiny(dtype=torch.float64), homotopy=0.5)
    model.add_adapter("b", copy.deepcopy(model.peft_config["default"]))
    model.peft_config["b"].homotopy = 1.0
    randomise_routers(model, 4, "b")
    with pytest.raises(MergeError, match="default"):
        getattr(model, call)(adapter_names=["default"])
    merged = getattr(model, call)(adapter_names=["b"]) or model
    same(logits_of(merged, IDS), wanted)


def test_a_refused_merge_leaves_lora_unmerged_too() -> None:
    base = tiny(dtype=torch.float64)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    inject_adapter_in_model(lora, base, adapter_name="lora")
    model = get_peft_model(base, TopologyConfig(depth=4, visible_depth=2), adapter_name="topology").eval()
    state, before = weights_of(model), logits_of(model, IDS)
    for call in (model.merge_adapter, model.merge_and_unload):
        for arguments in ({}, {"adapter_names": ["topology"]}):
            with pytest.raises(MergeError):
                call(**arguments)
            assert_same_weights(model, state)
            same(logits_of(model, IDS), before, 0)


def test_merging_is_pure_and_unmerging_exact(case: Scene) -> None:
    model = copy.deepcopy(case.model)
    state, before = weights_of(model), logits_of(model, IDS)
    for _ in range(2):
        model.merge_adapter()
        assert merged_layers(model) == [True] * LAYERS
        assert_same_weights(model, state)
        logits_of(model, IDS)
        model.unmerge_adapter()
        assert merged_layers(model) == [False] * LAYERS
        assert_same_weights(model, state)
        same(logits_of(model, IDS), before, 0)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
        model.merge_adapter()
    same(logits_of(model, IDS), case.logits)


def test_safe_merge_refuses_broken_routers() -> None:
    model = routed(tiny(dtype=torch.float64))
    before = logits_of(model, IDS)
    model.merge_adapter(safe_merge=True)
    same(logits_of(model, IDS), before)
    model.unmerge_adapter()
    last = [m for m in model.modules() if isinstance(m, topo_adapter.TopologyLayer)][-1]
    with torch.no_grad():
        last.topo_routers["default"].down.weight[0, 0] = float("nan")
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="finite"):
            call(safe_merge=True)
        assert merged_layers(model) == [False] * LAYERS
        assert sum(isinstance(m, topo_adapter.TopologyLayer) for m in model.modules()) == LAYERS
    assert model.unload() is not None


def test_merged_adapter_is_not_deleted() -> None:
    model = routed(tiny(dtype=torch.float64))
    model.add_adapter("b", TopologyConfig(depth=4, visible_depth=2, homotopy=1.0))
    model.merge_adapter()
    before = logits_of(model, IDS)
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")
    same(logits_of(model, IDS), before, 0)
    model.delete_adapter("b")
    same(logits_of(model, IDS), before, 0)
    model.unmerge_adapter()
    model.delete_adapter("default")


def test_merged_then_unloaded_is_merged() -> None:
    it = scene("untied-query_head-p2")
    model = it.form("merged")
    merged = model.merge_and_unload()
    same(logits_of(merged, IDS), it.logits)
    assert not any(weight.requires_grad for name, weight in merged.named_parameters() if ".topo_adapter." in name)


def test_save_merged_wants_a_merged_model(tmp_path: Path) -> None:
    it = scene("untied-query_head-p2")
    for model in (it.base, it.model, it.form("merged")):
        with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
            save_merged(model, tmp_path)
    it.base.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="save_merged"):
        load_merged(tmp_path)


def test_generation_settings_survive_merging(tmp_path: Path) -> None:
    model = routed(tiny(dtype=torch.float64)).merge_and_unload()
    model.generation_config.max_new_tokens = 5
    save_merged(model, tmp_path)
    again = load_merged(tmp_path)
    assert again.generation_config.max_new_tokens == 5
    assert torch.equal(again.generate(IDS, do_sample=False), model.generate(IDS, do_sample=False))
    assert again.generate(IDS, do_sample=False).shape == (2, LENGTH + 5)


def test_tied_embeddings_survive_merging(tmp_path: Path) -> None:
    model = routed(tiny("qwen3", torch.float64, tie_word_embeddings=True))
    before = logits_of(model, IDS)
    merged = model.merge_and_unload()
    save_merged(merged, tmp_path)
    again = load_merged(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    same(logits_of(again, IDS), before)


@pytest.mark.parametrize("form", ["merged", "unloaded"])
def test_gradients_through_the_merged_path_are_the_strangers(form: str) -> None:
    """LoRA learns on top of a merged topology exactly as under the stranger's mask."""
    lora = LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], r=4, init_lora_weights=False)
    it = scene("untied-query_head-p2")

    def gradients(model: PreTrainedModel, run: Callable[[PreTrainedModel], Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        wrapped = get_peft_model(model, lora, adapter_name="mine")
        wrapped.double()
        run(wrapped).square().mean().backward()
        found = {n: p.grad for n, p in wrapped.named_parameters() if ".lora_" in n}
        assert len(found) == 6 * LAYERS and all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in found.values())
        return found

    if form == "merged":
        model = it.form("merged")
        plain = model.get_base_model()
    else:
        plain = it.form("unloaded")
    records: dict[int, RecordedRoutes] = {}

    def ours(wrapped: nn.Module) -> Tensor:
        records.update(record_routes(wrapped, IDS))
        return wrapped(input_ids=IDS).logits

    mine = gradients(plain, ours)
    stranger = Stranger(it.base, WINDOW, SINKS)
    with stranger.attending(records) as strange:
        theirs = gradients(strange, lambda wrapped: wrapped(input_ids=IDS).logits)
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-5, atol=1e-8)
    with stranger.attending(records, window=WINDOW + 1):  # control
        wrong = wrong_gradients(strange)
    assert any(not torch.allclose(mine[name], gradient, rtol=1e-3) for name, gradient in wrong.items())


def wrong_gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS).logits.square().mean().backward()
    return {f"base_model.model.{name}": w.grad for name, w in model.named_parameters() if ".lora_" in name}
