"""The library on its kernels: on a GPU, or in Triton's interpreter with the choice of path forced."""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import topo_kernels.attention
import topo_kernels.backward
import topo_kernels.bridge
import topo_kernels.decode
import topo_kernels.leaves
import topo_kernels.plan
import topo_kernels.router
from topo_adapter import (
    TopologyConfig,
    initialize_routers,
    record_routes,
)
from topo_adapter.core.layout import SequenceLayout, contiguous_layout, layout_from_padding, layout_from_position_ids
from topo_adapter.core.records import Keys
from topo_adapter.core.rule import Rule
from topo_adapter.core.scoring import Scoring
from topo_adapter.core.visibility import Visibility
from topo_adapter.ops.attention import hard_attention
from topo_adapter.ops.backend import forced
from topo_adapter.ops.plan import Plan, build_plan, local_plan, make_plan
from topo_adapter.ops.torch_attention import torch_attention
from topo_kernels.attention import ForwardTiles
from topo_kernels.backward import BackwardTiles
from topo_kernels.bridge import BridgeTiles
from topo_kernels.launch import Tile
from topo_kernels.leaves import Rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH, VOCAB = 28, 97


@pytest.fixture
def kernels() -> Iterator[None]:
    """Everything that may run on kernels does."""
    with ExitStack() as stack:
        stack.enter_context(forced(True))
        if DEVICE == "cpu":  # the interpreter pays per tile
            small = BridgeTiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2))
            stack.enter_context(mock.patch.object(topo_kernels.bridge, "choose_bridge_tiles", lambda *_: small))
            stack.enter_context(mock.patch.object(topo_kernels.leaves, "choose_rows", lambda _: Rows(32, 2)))
            square = Tile(64, 64, 4, 2)
            tiles = mock.patch.object(
                topo_kernels.attention, "choose_forward_tiles", lambda *_: ForwardTiles(square, square)
            )
            stack.enter_context(tiles)
            backwards = BackwardTiles(square, square, Tile(64, 16, 4, 2), 64)
            tiles = mock.patch.object(topo_kernels.backward, "choose_backward_tiles", lambda *_: backwards)
            stack.enter_context(tiles)
            sizes = replace_blocks(chunk=64, sort_warps=1, place=64)
            stack.enter_context(mock.patch.object(topo_kernels.plan, "choose_plan_tiles", sizes))
            decode = topo_kernels.decode.DecodeTiles(16, 1, 1, 2, map_keys=32, scan_keys=32, scan_warps=1)
            stack.enter_context(mock.patch.object(topo_kernels.decode, "choose_decode_tiles", lambda *_: decode))
            # a program per token costs most: prefill takes the kernel of many tokens, decode steps that of few
            stack.enter_context(mock.patch.object(topo_kernels.router, "_SPLIT_TOKENS", 8))
        yield


def replace_blocks(**sizes: int) -> Any:
    choose = topo_kernels.plan.choose_plan_tiles
    return lambda max_balls: choose(max_balls)._replace(**sizes)


def merged_model(layers: int = 1, **settings: Any) -> Any:
    """Of one layer, because the interpreter takes seconds for each, or of two where the settings tell them apart."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2 if isinstance(settings.get("visible_depth"), dict) else layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    settings = {"depth": 3, "visible_depth": 2, "local_window": 4, "num_sink_tokens": 2, **settings}
    model = get_peft_model(LlamaForCausalLM(config).to(DEVICE), TopologyConfig(**settings)).eval()
    initialize_routers(model, tokens())
    model.peft_config["default"].homotopy = 1.0
    model.merge_adapter()
    return model


def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def largest_error(found: Tensor, right: Tensor) -> float:
    return float((found - right).abs().max() / right.abs().max())


SETTINGS: list[dict[str, Any]] = [
    {},
    {"route_per": "kv_head"},
    {"route_per": "kv_head", "visible_depth": {0: [0, 1, 4, 3], 1: 0}},  # depths differ within a route; no tree at 4
    {"arity": 3, "depth": 2, "tie_query_key": True},
    {"depth": 9},  # addresses that do not fit a byte
    {"router_input": "heads"},
    {"router_input": "heads", "route_per": "kv_head", "arity": 3, "depth": 2},
    {"router_input": "heads", "visits": 3},
    {"visits": 2, "visible_depth": {0: [0, 1, 4, 3], 1: 0}},
]


CACHES = ["dynamic", "none", "static", "dynamic", "dynamic", "static", "dynamic", "dynamic", "static"]
PAIRS = list(zip(SETTINGS, CACHES, strict=True))


@pytest.mark.parametrize(("settings", "cache_type"), PAIRS, ids=str)
@torch.no_grad()
def test_kernels_and_torch_agree(settings: dict[str, Any], cache_type: str, request: pytest.FixtureRequest) -> None:
    """Prefill, token by token and in small chunks, against one forward of the torch path."""
    model, ids = merged_model(1 if settings else 2, **settings), tokens()  # two layers share the layout of new tokens
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # left padding
    with forced(False, "attend", "decode"):
        right = model(ids, attention_mask=mask, use_cache=False).logits
        with mock.patch.object(model.peft_config["default"], "local_window", 5):
            other = model(ids, attention_mask=mask, use_cache=False).logits
    request.getfixturevalue("kernels")
    cache = {"none": lambda: None, "dynamic": DynamicCache, "static": lambda: static_cache(model)}[cache_type]()
    cuts = [0, LENGTH] if cache is None else [0, 20, 21, 24, LENGTH]
    found = []
    with (
        mock.patch.object(topo_kernels, "decode_attention", wraps=topo_kernels.decode_attention) as decode,
        mock.patch.object(topo_kernels, "route_heads", wraps=topo_kernels.route_heads) as route_heads,
    ):
        for start, end in pairwise(cuts):
            found.append(
                model(
                    ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=cache is not None
                )
            )
    assert decode.call_count == (0 if cache is None else 3 * model.config.num_hidden_layers)
    on_heads = settings.get("router_input") == "heads"
    assert route_heads.call_count == (len(cuts) - 1 if on_heads else 0)
    real = mask.bool()
    assert largest_error(torch.cat([f.logits for f in found], 1)[real], right[real]) < 1e-5
    assert largest_error(other[real], right[real]) > 1e-3, "another window must show"


def static_cache(model: Any) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=LENGTH + 9)


@pytest.mark.parametrize("settings", [{}, {"router_input": "heads"}], ids=str)
@torch.no_grad()
def test_decoding_compiles_to_one_graph(kernels: None, settings: dict[str, Any]) -> None:
    model, ids = merged_model(**settings), tokens()
    right = model(ids, use_cache=False).logits
    cache = static_cache(model)
    model(ids[:, :24], past_key_values=cache)
    model(ids[:, 24:25], past_key_values=cache)

    def step(token: Tensor) -> Tensor:
        return model(token, past_key_values=cache).logits

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    found = torch.cat([compiled(ids[:, i : i + 1]) for i in range(25, LENGTH)], 1)
    assert largest_error(found, right[:, 25:]) < 1e-5


@torch.no_grad()
def test_a_changed_router_is_packed_anew(kernels: None) -> None:
    module = merged_model().base_model.model.model.layers[0].self_attn.topo_adapter.topo_routers["default"]
    hidden = torch.randn(1, LENGTH, 64, device=DEVICE)
    query, key = module.addresses(hidden, merged=True)
    module.query.weight.neg_()
    changed, same = module.addresses(hidden, merged=True)
    assert torch.equal(key, same) and not torch.equal(query, changed)


def fused_step(model: Any) -> None:
    """A large step of what transformers trains with by default; it does not raise the weights' version."""
    weights = [weight for name, weight in model.named_parameters() if "topo_" in name]
    for weight in weights:
        weight.requires_grad_().grad = torch.randn_like(weight)
    torch.optim.AdamW(weights, lr=0.5, fused=True).step()
    for weight in weights:
        weight.grad = None


@torch.no_grad()
@pytest.mark.parametrize("read", ["hidden_states", "heads"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_trained_router_is_packed_anew(merged: bool, read: str, kernels: None) -> None:
    model, ids = merged_model(router_input=read), tokens()

    def routes() -> list[Tensor]:
        if merged:
            model.merge_adapter()
        try:
            return [record.query_digits for record in record_routes(model, ids).values()]
        finally:
            model.unmerge_adapter()

    model.unmerge_adapter()
    before = routes()
    versions = [weight._version for weight in model.parameters()]
    fused_step(model)
    assert versions == [weight._version for weight in model.parameters()]  # or the test would prove nothing
    found = routes()
    with forced(False, "route"):
        expected = routes()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(found, before, strict=True))


# ---------------------------------------------------------------- plans


def problem(length: int = 50) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 16, device=DEVICE) for heads in (4, 2, 2))
    addresses = (torch.randint(8, (2, 4, length), dtype=torch.int32, device=DEVICE) for _ in range(2))
    return q, k, v, *addresses


def visibility(query: Tensor, key: Tensor, layout: SequenceLayout, depths: tuple[int, ...]) -> Visibility:
    return Visibility(query[:, :, None], layout, Keys(key, layout), Rule(2, 3, depths, query.shape[1], 4, 2))


def test_plain_dense_heads_are_sdpa(kernels: None) -> None:
    q, k, v, query, key = problem()
    layout = contiguous_layout(2, 50, DEVICE)
    dense = make_plan(visibility(query, key, layout, (0,) * 4))
    general = build_plan(query[:, :, None] % 1, key % 1, layout, layout, 4, 2)
    assert dense.dense and not general.dense
    assert torch.equal(dense.visible_count(), general.visible_count())
    right = torch_attention(q, k, v, general, Scoring(0.25))
    with mock.patch.object(topo_kernels, "topology_attention", side_effect=AssertionError("SDPA is the way")):
        assert largest_error(hard_attention(q, k, v, dense, Scoring(0.25)), right) < 1e-5
    assert largest_error(torch_attention(q, k, v, dense, Scoring(0.25)), right) < 1e-5
    assert not make_plan(visibility(query, key, layout_from_padding(layout.real), (0,) * 4)).dense


@pytest.mark.parametrize("padded", [False, True])
def test_the_torch_path_runs_a_kernel_plan(kernels: None, padded: bool) -> None:
    """float64 on a GPU: planned by kernels, which leave padding queries out, and attended by torch."""
    q, k, v, query, key = problem()
    real = torch.arange(50, device=DEVICE) >= torch.tensor([0, 9 if padded else 0], device=DEVICE)[:, None]
    layout = layout_from_padding(real) if padded else contiguous_layout(2, 50, DEVICE)
    seen = visibility(query, key, layout, (0, 1, 2, 3))
    ours = make_plan(seen)
    assert isinstance(ours, Plan) and (ours.local_order is None) != padded
    right = build_plan(*seen.balls(), layout, layout, 4, 2)
    found, expected = (torch_attention(q.double(), k, v, p, Scoring(0.25)) for p in (ours, right))
    assert torch.equal(found, expected)


def test_layers_share_what_depends_on_positions_alone() -> None:
    ids = torch.arange(12, device=DEVICE)[None]
    layout = layout_from_position_ids(ids, 2)
    assert layout_from_position_ids(ids, 2) is layout and layout.plain
    assert local_plan(layout, layout, 4, 2) is local_plan(layout, layout, 4, 2)
    assert local_plan(layout, layout, 4, 2) is not local_plan(layout, layout, 5, 2)
    assert layout_from_position_ids(ids) is not layout
    ids[0, 6:] -= 6  # in place: another document starts
    assert not layout_from_position_ids(ids, 2).plain


TRAINED: list[dict[str, Any]] = [
    {},
    {"visible_depth": {0: [0, 1, 4, 3], 1: [4, 0, 2, 1]}},
    {"route_per": "kv_head", "visible_depth": {0: [1, 1, 3, 3], 1: 0}},
    {"arity": 3, "depth": 2, "tie_query_key": True},
]


def gradients(model: Any) -> dict[str, Tensor]:
    """The routers' gradients of a sum of logits and of the price of density, padding included."""
    weights = {name: weight for name, weight in model.named_parameters() if "topo_adapter" in name}
    mask = torch.ones_like(tokens())
    mask[1, :5] = 0
    logits = model(tokens(), attention_mask=mask, use_cache=False).logits
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    loss = (logits * upstream * mask[..., None]).sum()
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), allow_unused=True), strict=True))


@pytest.mark.parametrize("settings", TRAINED, ids=str)
def test_kernels_and_torch_train_alike(settings: dict[str, Any], request: pytest.FixtureRequest) -> None:
    learning = {"gumbel_noise": False, "density_weight": 100.0, "balance_weight": 0.0, "temperature": 0.5}
    model = merged_model(2, **settings, **learning)
    model.unmerge_adapter()
    model.train()
    with forced(False):
        right = gradients(model)
        with mock.patch.object(model.peft_config["default"], "density_weight", 0.0):
            without_price = gradients(model)
    request.getfixturevalue("kernels")
    with mock.patch.object(
        topo_kernels, "bridged_topology_attention", wraps=topo_kernels.bridged_topology_attention
    ) as bridge:
        found = gradients(model)
    assert bridge.called
    learned = [name for name, gradient in right.items() if gradient is not None and gradient.abs().max() > 1e-4]
    assert learned
    for name in learned:
        assert largest_error(found[name], right[name]) < 2e-3, name
    assert max(largest_error(without_price[name], right[name]) for name in learned) > 2e-2
