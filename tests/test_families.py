"""What works in which family of models: each cell of docs/families.md is a test here, on a tiny model in float64."""

from __future__ import annotations

import copy
import functools
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from peft_helpers import (
    DOCUMENT,
    Stranger,
    documented,
    logits_of,
    loss_of,
    randomise_routers,
    routed,
    router_gradients,
    tokens,
)
from test_gates import GEMMA3N, GEMMA4, MIXED, MLA, REFUSED, family
from test_merge_decode import EXACT, ROTATED, differ, feed, same
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel, StaticCache

import topo_kernels
from topo_adapter import (
    TopologyConfig,
    TopologyError,
    UnsupportedModelError,
    calibrate,
    load_merged,
    measure_density,
    record_routes,
    save_merged,
)
from topo_adapter.layer import hosts
from topo_adapter.measuring.routes import RecordedRoutes
from topo_adapter.ops.backend import forced
from topo_adapter.ops.head_router import HeadRouter

FAMILY_DOCUMENT = DOCUMENT.with_name("families.md")
WINDOW, SINKS, LENGTH = 3, 2, 21
IDS = tokens(2, LENGTH)
CHUNKS = [18, 1, 1, 1]
TWO = {"num_hidden_layers": 2, "layer_types": MIXED[:2]}
SLIDES: dict[str, Any] = {**TWO, "sliding_window": 6}
MOE: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = ["linear_attention", "full_attention"]
DELTA: dict[str, Any] = {
    **{"layer_types": LINEAR, "linear_num_value_heads": 4, "linear_num_key_heads": 2},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16},
}
GPT: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}

#: Row of the table: its model type in transformers, and what makes it build tiny or shows what is special in it.
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2, 3": ("llama", {}),
    "Mistral 7B v0.2, Nemo": ("mistral", {"sliding_window": None}),
    "Mixtral": ("mixtral", {"sliding_window": None, **MOE}),
    "Qwen2, Qwen2.5": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", MOE),
    "Qwen3.5": ("qwen3_5_text", DELTA),
    "Gemma 2": ("gemma2", {**SLIDES, "attn_logit_softcapping": 2.0, "attn_implementation": "eager"}),
    "Gemma 3": ("gemma3_text", SLIDES),
    "Gemma 3n": ("gemma3n_text", {**GEMMA3N, "num_hidden_layers": 4, "num_kv_shared_layers": 2}),
    "Gemma 4": ("gemma4_text", {**GEMMA4, **TWO}),
    "Phi-3, Phi-4": ("phi3", {"sliding_window": None}),
    "OLMo 2": ("olmo2", {}),
    "Granite 3": ("granite", {"attention_multiplier": 0.4}),
    "Granite 4 hybrid": (
        "granitemoehybrid",
        {
            **{"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
            **{"mamba_chunk_size": 8, **MOE},
        },
    ),
    "Command R": ("cohere", {"use_qk_norm": True, "logit_scale": 1.0}),
    "Command R7B, A": ("cohere2", {**SLIDES, "logit_scale": 1.0}),
    "GLM-4": ("glm4", {}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "DeepSeek-V3": ("deepseek_v3", MLA),
    "Llama 4": ("llama4_text", {"attention_chunk_size": 64, "no_rope_layers": [1, 0], "num_local_experts": 2}),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "Jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, **MOE}),
    "GPT-2": ("gpt2", GPT),
    "GPT-NeoX, Pythia": ("gpt_neox", {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "StarCoder2": ("starcoder2", {"sliding_window": None, "residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "Seed-OSS": ("seed_oss", {}),
}
#: Refused when an adapter is attached: how a tiny one is made, and what the error says.
NOT_SERVED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "GPT-OSS": (REFUSED["sink logits"][0], "its softmax has learned sink logits"),
    "Mistral 7B v0.1": (lambda: family("mistral", {"sliding_window": 8}), "it has a sliding window"),
    "Falcon-H1": (lambda: family("falcon_h1", {"num_hidden_layers": 1}), "it is of the layer type 'hybrid'"),
    "Falcon": (
        lambda: transformers.FalconForCausalLM(
            transformers.FalconConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        ),
        "its forward must pass **kwargs to transformers' attention interface",
    ),
    "Bloom": (REFUSED["attention outside the interface"][0], "it needs the attributes `config` and `layer_idx`"),
    "MPT": (
        lambda: transformers.MptForCausalLM(transformers.MptConfig(vocab_size=61, d_model=32, n_heads=2, n_layers=1)),
        "it needs the attributes `config` and `layer_idx`",
    ),
    "Mamba": (lambda: family("mamba", {"num_hidden_layers": 1}), "It has no attention module"),
    "T5": (REFUSED["T5"][0], "encoder-decoder T5ForConditionalGeneration"),
    "BART": (REFUSED["encoder-decoder"][0], "encoder-decoder BartForConditionalGeneration"),
}

#: Linear attention and state spaces decode in another order than they read, in float32.
SCANS = ("Qwen3.5", "Granite 4 hybrid", "Jamba")
SCANNED = 1e-4
#: Cells that are no, with what the typed error says; or "base", where the model breaks it without an adapter too.
NO = {
    ("Seed-OSS", "trains"): "attention dropout must be 0",  # its own default is 0.1
    ("Seed-OSS", "gradient checkpointing"): "attention dropout must be 0",
    **{(name, "packed rows"): "base" for name in (*SCANS, "LFM2")},  # their states run on into the next text
}
FEATURES: list[str] = []
#: One family for each way that kernels know to turn channels with each other, and another than its own.
OTHER_PAIRS: dict[str, Any] = {"Llama 2, 3": "neighbours", "Command R": "halves", "GLM-4": "neighbours"}


@dataclass
class Scene:
    """A base, an adapter in force on a copy of it, the logits of both."""

    base: PreTrainedModel
    model: nn.Module
    dense: Tensor
    logits: Tensor
    tolerance: float

    def forms(self) -> Iterator[nn.Module]:
        """The model before and after merging."""
        yield self.model
        if not isinstance(self.model, PeftModel):
            return
        self.model.merge_adapter()
        try:
            yield self.model
        finally:
            self.model.unmerge_adapter()


@functools.cache
def scene(name: str) -> Scene:
    kind, settings = SERVED[name]
    base = family(kind, {"num_hidden_layers": 2, **settings})
    base.config._experts_implementation = "eager"  # grouped products have no float64
    model = routed(copy.deepcopy(base))
    return Scene(base, model, logits_of(base, IDS), logits_of(model, IDS), SCANNED if name in SCANS else EXACT)


def wide_softmax(scores: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Transformers' eager attention asks for float32, where float64's masked value is -inf and a row of padding NaN."""
    return scores.softmax(dim, dtype=None if scores.dtype == torch.float64 else dtype)


def feature(column: str) -> Callable[[Callable[[Scene], None]], Any]:
    """A column of the table: the test, once per family, or what must come in its place."""
    FEATURES.append(column)

    def register(check: Callable[[Scene], None]) -> Any:
        def test(name: str) -> None:
            it, no = scene(name), NO.get((name, column))
            if no is None:
                check(it)
            elif no == "base":
                with pytest.raises(AssertionError):
                    check(replace(it, model=it.base, logits=it.dense))
            else:
                with pytest.raises(TopologyError, match=re.escape(no)):
                    check(it)

        test.__name__ = check.__name__
        return pytest.mark.parametrize("name", SERVED)(test)

    return register


@feature("fresh and disabled: the base, bitwise")
def test_fresh_and_disabled_are_the_base(it: Scene) -> None:
    fresh = get_peft_model(copy.deepcopy(it.base), TopologyConfig(depth=4, visible_depth=2, router_dim=8)).eval()
    assert torch.equal(logits_of(fresh, IDS), it.dense)
    for model in it.forms():
        with model.disable_adapter():
            assert torch.equal(logits_of(model, IDS), it.dense)
    differ(it.logits, it.dense)  # the mask bites


@feature("trains")
def test_trains(it: Scene) -> None:
    model = copy.deepcopy(it.model).train()
    for homotopy in (0.0, 1.0):
        model.peft_config["default"].homotopy = homotopy
        model.zero_grad()
        loss_of(model, IDS).backward()
        gradients = router_gradients(model)
        assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
        assert all(name in gradients or weight.grad is None for name, weight in model.named_parameters())


@feature("gradient checkpointing")
def test_gradient_checkpointing(it: Scene) -> None:
    found = []
    for checkpointing in (False, True):
        model = copy.deepcopy(it.model).train()
        if checkpointing:
            base = model.get_base_model()
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert base.is_gradient_checkpointing
        torch.manual_seed(0)
        loss_of(model, IDS, use_cache=False).backward()
        found.append(router_gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-8)


@feature("merged = unmerged = the definition's mask")
def test_merged_is_unmerged_is_the_strangers(it: Scene) -> None:
    theirs = Stranger(it.base, WINDOW, SINKS).logits(IDS, record_routes(it.model, IDS))
    for model in it.forms():
        same(logits_of(model, IDS), theirs)


@feature("decode = prefill")
def test_decode_is_prefill(it: Scene) -> None:
    for model in it.forms():
        same(feed(model, IDS, DynamicCache(config=it.base.config), CHUNKS), it.logits, it.tolerance)


@feature("static cache")
def test_static_cache(it: Scene) -> None:
    cache = StaticCache(config=it.base.config, max_cache_len=LENGTH + 6)
    same(feed(it.model, IDS, cache, CHUNKS), it.logits, it.tolerance)


@feature("beam search")
def test_a_reordered_cache(it: Scene) -> None:
    """What beam search does to a cache between its steps."""
    cache = DynamicCache(config=it.base.config)
    feed(it.model, IDS[:, :18], cache, CHUNKS[:1])
    cache.reorder_cache(torch.tensor([1, 0]))
    same(feed(it.model, IDS[[1, 0], 18:], cache, CHUNKS[1:]), it.logits[[1, 0], 18:], it.tolerance)


@feature("left padding")
def test_left_padding_is_no_padding(it: Scene) -> None:
    mask = torch.ones(2, LENGTH + 5, dtype=torch.long)
    mask[0, :5] = 0
    ids = torch.cat([torch.zeros(1, 5, dtype=torch.long), IDS[:1]], 1)
    padded = torch.cat([ids, tokens(1, LENGTH + 5, seed=1)])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for model in it.forms():
        with mock.patch.object(functional, "softmax", wide_softmax):
            ours = logits_of(model, padded, attention_mask=mask, position_ids=positions)
        same(ours[:1, 5:], it.logits[:1], max(ROTATED, it.tolerance))


@feature("packed rows")
def test_packed_rows_are_separate_ones(it: Scene) -> None:
    positions = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None].expand(2, -1)
    separate = torch.cat([it.logits[:, :9], logits_of(it.model, IDS[:, 9:])], 1)
    for model in it.forms():
        same(logits_of(model, IDS, position_ids=positions), separate, it.tolerance)


@feature("adapter saved and loaded")
def test_a_saved_adapter_is_the_same(it: Scene) -> None:
    with tempfile.TemporaryDirectory() as folder:
        it.model.save_pretrained(folder)
        again = PeftModel.from_pretrained(copy.deepcopy(it.base), folder).eval()
    assert torch.equal(logits_of(again, IDS), it.logits)
    randomise_routers(again, seed=6)  # the file was read
    differ(logits_of(again, IDS), it.logits)


@feature("merged model saved and loaded")
def test_a_saved_merged_model_is_the_same(it: Scene) -> None:
    experts = {"experts_implementation": "eager"} if it.base._can_set_experts_implementation() else {}
    settings = {"dtype": torch.float64, "attn_implementation": it.base.config._attn_implementation, **experts}
    with tempfile.TemporaryDirectory() as folder:
        save_merged(copy.deepcopy(it.model).merge_and_unload(), folder)
        again = load_merged(folder, **settings).eval()
    same(logits_of(again, IDS), it.logits)


@feature("density dial")
def test_density_dial(it: Scene) -> None:
    model, ids = copy.deepcopy(it.model), tokens(2, 40)
    dense = logits_of(it.base, ids)
    calibrate(model, ids, around=(), target_density=0.35)
    shares = torch.stack([share.mean() for share in measure_density(model, ids).values()])
    assert abs(float(shares.mean()) - 0.35) < 0.1  # the steps of four heads, and digits that change with the map
    theirs = Stranger(it.base, WINDOW, SINKS).logits(ids, record_routes(model, ids))
    same(logits_of(model, ids), theirs)
    differ(theirs, dense)
    model.merge_adapter(target_density=1.0)
    same(logits_of(model, ids), dense)


@feature("routers on heads")
def test_routers_on_heads(it: Scene) -> None:
    model = routed(copy.deepcopy(it.base), router_input="heads", router_dim=90)
    out = logits_of(model, IDS)
    same(out, Stranger(it.base, WINDOW, SINKS).logits(IDS, record_routes(model, IDS)), it.tolerance)
    differ(out, it.dense)
    same(feed(model, IDS, DynamicCache(config=it.base.config), CHUNKS), out, it.tolerance)
    model.merge_adapter()
    same(logits_of(model, IDS), out, it.tolerance)


@pytest.mark.parametrize("name", SERVED)
def test_kernels_route_on_heads_as_torch_does(name: str) -> None:
    model = routed(copy.deepcopy(scene(name).base).float(), router_input="heads", router_dim=90)
    expected = record_routes(model, IDS)
    kernel = mock.Mock(wraps=topo_kernels.route_heads)
    with forced(True, "route"), mock.patch.object(topo_kernels, "route_heads", kernel):
        found = record_routes(model, IDS)
    assert kernel.call_count == len(expected)
    for layer in expected:  # digits whose logits are equal to rounding may differ
        assert alike(found[layer], expected[layer]) > 0.999
    if name not in OTHER_PAIRS:
        return
    for host in hosts(model):  # negative control
        assert host.rotation is not None
        host.rotation = replace(host.rotation, pairs=OTHER_PAIRS[name])
    with forced(True, "route"):
        wrong = record_routes(model, IDS)
    assert all(alike(wrong[layer], expected[layer]) < 0.999 for layer in expected)


def alike(one: RecordedRoutes, other: RecordedRoutes) -> float:
    """The share of equal digits, of queries or of keys, whichever is less."""
    pairs = ((one.query_digits, other.query_digits), (one.key_digits, other.key_digits))
    return min(float((a == b).double().mean()) for a, b in pairs)


@pytest.mark.parametrize("name", SERVED)
def test_routers_on_heads_do_not_see_positions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of one word: but for its positions all tokens are alike, in every layer that only mixes them."""
    base = copy.deepcopy(scene(name).base)
    model = routed(base, router_input="heads", router_dim=90)
    seen: list[Tensor] = []
    forward = HeadRouter.forward

    def watched(self: HeadRouter, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        seen.extend((query, key))
        return forward(self, query, key)

    monkeypatch.setattr(HeadRouter, "forward", watched)
    logits_of(model, torch.full((1, 9), 7))
    if name in (*SCANS, "LFM2", "GPT-2"):  # states that run on, embeddings of positions
        return
    assert seen
    for x in seen:
        assert float((x - x[:, :, :1]).abs().max() / x.abs().max()) < 1e-5


@pytest.mark.parametrize("name", NOT_SERVED)
def test_not_served(name: str) -> None:
    make, reason = NOT_SERVED[name]
    with pytest.raises(UnsupportedModelError, match=re.escape(reason)):
        get_peft_model(make(), TopologyConfig())


def cell(name: str, column: str) -> str:
    no = NO.get((name, column), "yes")
    return no if no in ("yes", "base") else f"no: {no}"


def table() -> str:
    """The rows of docs/families.md."""
    rows = [["Served", *FEATURES], ["---"] * (1 + len(FEATURES))]
    rows += [[name, *(cell(name, column) for column in FEATURES)] for name in SERVED]
    refused = [["Refused", "The error says"], ["---", "---"], *([name, says] for name, (_, says) in NOT_SERVED.items())]
    return "\n\n".join("\n".join(f"| {' | '.join(row)} |" for row in part) for part in (rows, refused))


def test_the_documented_table_is_this_one() -> None:
    text = FAMILY_DOCUMENT.read_text(encoding="utf-8")
    assert documented(text, "families", table()) == text, "run `python tests/test_families.py`"


if __name__ == "__main__":
    FAMILY_DOCUMENT.write_text(
        documented(FAMILY_DOCUMENT.read_text(encoding="utf-8"), "families", table()), encoding="utf-8"
    )
