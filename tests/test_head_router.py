"""Routers on heads: what they read, how they start, what is saved of them."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_helpers import HEADS, KV_HEADS, LAYERS, logits_of, loss_of, routed, router_gradients, tiny, tokens
from safetensors.torch import load_file, save_file
from test_gates import MLA, family
from torch import Tensor

import topo_adapter
from topo_adapter import (
    AdapterFileError,
    TopologyConfig,
    TopologyConfigError,
    UnsupportedModelError,
    initialize_routers,
    kernel_report,
    load_merged,
    record_routes,
    save_merged,
    why_not,
)
from topo_adapter.hf import rotary
from topo_adapter.layer import hosts
from topo_adapter.ops.head_router import HeadLinear, HeadRouter

IDS = tokens(2, 21)
ON_HEADS: dict[str, Any] = {"router_input": "heads", "router_dim": 90}


def make(arity: int = 2, depth: int = 3, per: Any = "query_head", heads: int = 4, width: int = 16) -> HeadRouter:
    torch.manual_seed(0)
    return HeadRouter(heads, 2, width, arity, depth, per)


def clustered(count: int, width: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[1, 4, N, D]` and keys `[1, 2, N, D]` in eight far clusters, around a mean far from 0, and their
    clusters `[N]`."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.linspace(8, 12, 8)[:, None] * torch.linalg.qr(torch.randn(width, 8, generator=generator))[0].T
    label = torch.arange(count) % 8
    noise = [0.1 * torch.randn(1, heads, count, width, generator=generator) for heads in (4, 2)]
    return means[label] + noise[0], means[label] + noise[1] + 50.0, label


# ---------------------------------------------------------------- what a router reads


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("per", ["query_head", "kv_head"])
def test_recorded_digits_are_those_of_the_projections(family: str, per: str, tmp_path: Path) -> None:
    """Recomputed from the saved tensors and what the base's own projections make, which nothing has rotated yet."""
    base = tiny(family, torch.float64)
    model = routed(base, arity=3, depth=3, visible_depth=1, route_per=per, **ON_HEADS)
    model.base_model.model.model.layers[0].self_attn.topo_adapter.topo_routers["default"].key.center.fill_(0.25)
    seen: dict[str, Tensor] = {}
    attention = model.base_model.model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj"):
        hook = lambda _, __, out, name=name: seen.__setitem__(name, out.detach())  # noqa: E731
        getattr(attention, name).register_forward_hook(hook)
    record = record_routes(model, IDS)[0]
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.topo_adapter.topo_routers."
    routes = HEADS if per == "query_head" else KV_HEADS
    for role, name, heads, digits in (
        ("query", "q_proj", routes, record.query_digits),
        ("key", "k_proj", KV_HEADS, record.key_digits),
    ):
        x = seen[name].unflatten(-1, (heads, -1)).transpose(1, 2).float()
        weight, bias, center, gain = (file[f"{prefix}{role}.{part}"] for part in ("weight", "bias", "center", "gain"))
        free = (
            torch.einsum("bhtd,hod->bhto", 3 * (x - center[:, None]) * gain[:, None, None], weight) + 90 * bias[:, None]
        )
        scores = torch.cat([torch.zeros(*free.shape[:3], 3, 1), free.unflatten(-1, (3, 2))], -1)
        assert torch.equal(digits, scores.argmax(-1).repeat_interleave(HEADS // heads, 1))


@pytest.mark.parametrize("per", ["query_head", "kv_head"])
def test_shapes_and_the_reference_child(per: str) -> None:
    router = make(3, 4, per)
    query, key = router(torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16))
    assert query.shape == (2, router.num_heads, 5, 4, 3) and key.shape == (2, 2, 5, 4, 3)
    assert query.dtype == torch.float32 and not query[..., 0].any() and not key[..., 0].any()
    routes = router.route(torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16), sample=True)
    assert routes.query.probs.shape == routes.key.probs.shape == query.shape
    assert torch.equal(routes.key.probs[:, 0], routes.key.probs[:, router.num_heads // 2 - 1])  # of one KV head


def test_another_geometry_is_refused() -> None:
    router = make()
    with pytest.raises(UnsupportedModelError, match="key must have 2 heads of 16 channels"):
        router(torch.zeros(1, 4, 5, 16), torch.zeros(1, 4, 5, 16))
    with pytest.raises(UnsupportedModelError, match="query must have 4 heads of 16 channels"):
        router(torch.zeros(1, 4, 5, 8), torch.zeros(1, 2, 5, 16))


def test_autocast_does_not_reach_it() -> None:
    router, q, k = make(), torch.randn(1, 4, 50, 16), torch.randn(1, 2, 50, 16)
    outside = router(q, k)
    with torch.autocast("cpu", torch.bfloat16):
        inside = router(q, k)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize(("arity", "depth"), [(2, 8), (8, 1), (4, 3), (2, 3)])
@pytest.mark.parametrize("per", ["query_head", "kv_head"])
def test_it_starts_from_the_keys(arity: int, depth: int, per: str) -> None:
    """Keys of one cluster share their address, those of others hardly any."""
    router = make(arity, depth, per)
    q, k, label = clustered(400)
    router.initialise(q, k, scale=4.0)
    query, key = router.addresses(q, k)
    same = label[None] == label[:, None]
    for route in range(router.num_heads):
        together = key[0, route, None, :] == key[0, route, :, None]
        assert together[same].float().mean() > 0.8  # k-means may cut one cluster and merge two
        assert together[~same].float().mean() < 0.2
        if depth == 1:  # a query scores the children by their means, whose sums over levels favour long ones
            assert (query[0, route] == key[0, route]).float().mean() > 0.8


def test_what_is_common_to_all_tokens_does_not_matter() -> None:
    x, linear = torch.randn(2, 400, 16), HeadLinear(2, 16, 5)
    linear.measure(x)
    out = linear(x[None])
    linear.measure(3 * x + 1000.0)
    torch.testing.assert_close(linear(3 * x[None] + 1000.0), out, rtol=1e-3, atol=1e-2)
    negative = linear(3 * x[None])
    assert float((negative - out).abs().max()) > 1


def test_a_start_needs_tokens() -> None:
    with pytest.raises(TopologyConfigError, match=r"input_ids must hold 8 tokens or more .* got 7"):
        make(4, 2).initialise(torch.randn(1, 4, 7, 16), torch.randn(1, 2, 7, 16), scale=1.0)


def test_narrow_heads_have_as_many_levels() -> None:
    router = make(2, 8, width=4)
    router.initialise(torch.randn(1, 4, 100, 4), torch.randn(1, 2, 100, 4), scale=0.5)
    _, key = router.addresses(torch.randn(1, 4, 300, 4), torch.randn(1, 2, 300, 4))
    assert len(key[0, 0].unique()) > 16


def test_initialize_routers_reaches_all_of_them() -> None:
    model = routed(tiny(), homotopy=0.0, **ON_HEADS)
    before, ids = logits_of(model, IDS), tokens(1, 200, 3)
    initialize_routers(model, ids)
    assert torch.equal(logits_of(model, IDS), before)
    linears = [module for module in model.modules() if isinstance(module, HeadLinear)]
    assert len(linears) == 2 * LAYERS and all(bool(each.center.any()) for each in linears)
    model.peft_config["default"].homotopy = 1.0
    filled = [record.key_digits.float().mean().item() for record in record_routes(model, ids).values()]
    assert all(0.3 < share < 0.7 for share in filled)


def test_it_learns() -> None:
    model = routed(tiny(), **ON_HEADS).train()
    loss_of(model, IDS).backward()
    assert len(router_gradients(model)) == 4 * LAYERS


# ---------------------------------------------------------------- config, files, reports


@pytest.mark.parametrize(("name", "value"), [("router_dim", 32), ("tie_query_key", True), ("init_weights", "collapse")])
def test_settings_of_the_other_routers_are_refused(name: str, value: Any) -> None:
    with pytest.raises(TopologyConfigError, match=f"{name} must be .*, its default, with router_input='heads'"):
        TopologyConfig(router_input="heads", **{name: value})


@pytest.mark.parametrize("per", ["query_head", "kv_head"])
def test_saved_and_loaded_it_is_the_same(per: str, tmp_path: Path) -> None:
    model = routed(tiny(), route_per=per, **ON_HEADS)
    for module in model.modules():
        if isinstance(module, HeadLinear):
            module.measure(torch.randn(module.weight.shape[0], 30, module.weight.shape[2]))
    out = logits_of(model, IDS)
    model.save_pretrained(tmp_path / "adapter")
    loaded = topo_adapter.load(tiny(), tmp_path / "adapter")
    assert loaded.peft_config["default"].router_input == "heads"
    assert torch.equal(logits_of(loaded, IDS), out)
    save_merged(model.merge_and_unload(), tmp_path / "merged")
    assert torch.equal(logits_of(load_merged(tmp_path / "merged"), IDS), out)


@pytest.mark.parametrize("part", ["query.gain", "key.center", "key.weight", "query.bias"])
def test_a_file_of_other_shapes_is_refused(part: str, tmp_path: Path) -> None:
    routed(tiny(), **ON_HEADS).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(part))
    for changed in (tensors[name][:1].clone(), None):
        save_file({k: v for k, v in {**tensors, name: changed}.items() if v is not None}, file)
        with pytest.raises(AdapterFileError, match="must have the shapes of"):
            topo_adapter.load(tiny(), tmp_path)


def test_the_other_kind_of_router_is_refused(tmp_path: Path) -> None:
    routed(tiny(), **ON_HEADS).save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text.replace('"heads"', '"hidden_states"'))
    with pytest.raises(AdapterFileError, match="must have the shapes of"):
        topo_adapter.load(tiny(), tmp_path)


def test_rounding_keeps_what_was_measured() -> None:
    router = make()
    router.key.center.fill_(700.1)
    router.round_to(torch.float8_e4m3fn)
    assert router.key.weight.dtype == torch.float8_e4m3fn and router.key.bias.dtype == torch.bfloat16
    assert router.key.center.dtype == torch.float32 and float(router.key.center[0, 0]) == pytest.approx(700.1)


def test_the_report_says_why_it_is_routed_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_report, "device_misfits", lambda *_: [])
    model = routed(tiny("qwen3"), visits=8, **ON_HEADS)
    model.peft_config["default"].homotopy = 1.0
    assert why_not(model) == {}
    for host in hosts(model):
        host.rotation = replace(host.rotation, pairs=None)
    (reason,) = why_not(model)[0]["route"]
    assert reason.startswith("router_input must be 'hidden_states' where the rotary embedding turns neither halves")
    large = routed(tiny("qwen3"), arity=300, depth=1, visible_depth=1, **ON_HEADS)
    assert "must multiply to at most 256 with router_input='heads', got 512" in why_not(large)[0]["route"][0]


@pytest.mark.parametrize(
    ("kind", "pairs"),
    [
        *((kind, "halves") for kind in ("llama", "phi3", "glm4_moe", "deepseek_v3")),
        *((kind, "neighbours") for kind in ("cohere", "cohere2", "ernie4_5_vl_moe")),
        *((kind, "neighbours_once") for kind in ("glm", "glm4", "helium", "ernie4_5")),
        *((kind, None) for kind in ("nanochat", "gpt_oss")),  # the other way around; as many angles as pairs
    ],
)
def test_which_channels_are_turned_with_each_other(kind: str, pairs: str | None) -> None:
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    assert rotary._pairs_of(module.apply_rotary_pos_emb) == pairs


@pytest.mark.parametrize(("first", "pairs"), [(16, "neighbours"), (15, None)])
def test_neighbours_from_an_odd_channel_on_stay_in_torch(
    first: int, pairs: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotary, "_pairs_of", lambda turn: "neighbours")
    model = family("deepseek_v3", {**MLA, "qk_nope_head_dim": first})
    found = rotary.rotation_of(model.model.layers[0].self_attn)
    assert found is not None and found.last and found.pairs == pairs


def test_a_turn_that_cannot_be_undone_is_refused() -> None:
    """DeepSeek-V2 turns by complex numbers: a router would read positions, and nobody would know."""
    base = family("deepseek_v2", MLA)
    before = [name for name, _ in base.named_modules()]
    with pytest.raises(UnsupportedModelError, match="router_input must be 'hidden_states' for layer 0, got 'heads'"):
        routed(base, **ON_HEADS)
    assert [name for name, _ in base.named_modules()] == before
    assert logits_of(routed(base, router_input="hidden_states"), tokens(1, 12)).isfinite().all()
