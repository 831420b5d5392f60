"""The parts of the benchmarks that need no GPU: inputs, oracles, masks, the rows and what is made of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_helpers import routed, tiny, tokens
from torch import Tensor
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicIndexedLayer

from benchmarks import (
    cases,
    end_to_end,
    flex,
    generation,
    harness,
    layer,
    models,
    oracles,
    plot,
    trained,
    training_step,
)
from topo_adapter.core.layout import contiguous_layout
from topo_adapter.core.reference import reference_attention
from topo_adapter.core.visibility import visible_pairs

SMALL = cases.Layer(heads=4, kv_heads=2, head_dim=16, hidden=8, window=16, dtype=torch.float32, device="cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def mask_of(query_ball: Tensor, key_ball: Tensor, window: int = SMALL.window) -> Tensor:
    layout = contiguous_layout(query_ball.shape[0], query_ball.shape[2])
    return visible_pairs(query_ball[:, :, None], key_ball, layout, layout, window, SMALL.sinks)


@pytest.mark.parametrize("balls", [1, 2, 20, 512])
@pytest.mark.parametrize("skewed", [False, True])
def test_random_addresses(balls: int, skewed: bool) -> None:
    address = cases.random_addresses(2, 3, 4096, balls, skewed)
    assert address.dtype == torch.int32 and address.shape == (2, 3, 4096)
    assert address.min() >= 0 and address.max() < cases.MAX_LEAVES
    share = torch.bincount(address.flatten() % balls, minlength=balls) / address.numel()
    expected = torch.full((balls,), 1 / balls)
    if skewed and balls > 1:
        expected[0], expected[1:] = 0.5, 0.5 / (balls - 1)
    assert torch.allclose(share, expected, atol=0.02)


@pytest.mark.parametrize("length", [1, 15, 100])
@pytest.mark.parametrize("balls", [1, 4, 50])
def test_visible_count(length: int, balls: int) -> None:
    case = cases.Case("", length, balls, routes=2, batch=2, skewed=balls == 4, layer=SMALL)
    inputs = cases.prefill_inputs(case)
    query_ball, key_ball = inputs.query_address % balls, inputs.key_address % balls
    counted = oracles.visible_count(query_ball, key_ball, SMALL.window, SMALL.sinks)
    assert torch.equal(counted, mask_of(query_ball, key_ball).sum((0, 2, 3)).double())
    if balls == 1:
        assert (counted == oracles.causal_count(2, length)).all()


@pytest.mark.parametrize("queries", [1, 60])
def test_sampled_error(queries: int) -> None:
    inputs = cases.prefill_inputs(cases.Case("", 60, 4, routes=2, batch=2, layer=SMALL))
    query_ball, key_ball = inputs.query_address % 4, inputs.key_address % 4
    visible = mask_of(query_ball, key_ball).repeat_interleave(2, 1)[:, :, -queries:]
    q, query_ball = inputs.q[:, :, -queries:], query_ball[..., -queries:]
    out = reference_attention(q, inputs.k, inputs.v, visible, SMALL.scale)
    rows = torch.arange(queries)
    assert oracles.sampled_error(out, q, inputs.k, inputs.v, query_ball, key_ball, rows, SMALL) < 1e-6
    other = (key_ball + 1) % 4
    assert oracles.sampled_error(out, q, inputs.k, inputs.v, query_ball, other, rows, SMALL) > harness.MAX_ERROR


def test_far_error() -> None:
    inputs = cases.prefill_inputs(cases.Case("", 60, 1, routes=4, layer=SMALL))
    leaves = torch.rand(1, 4, 60, 8)
    layout = contiguous_layout(1, 60)
    never = torch.zeros(1, 4, 60), torch.ones(1, 4, 60)  # queries and keys in different balls: only the window is left
    local = mask_of(*never)
    causal = visible_pairs(never[0][:, :, None], never[0], layout, layout, 1, 0)
    scores = inputs.q @ inputs.k.repeat_interleave(2, 1).transpose(-1, -2) * SMALL.scale
    probs = scores.masked_fill(~causal, -math.inf).softmax(-1)
    rows = torch.arange(60)
    check = inputs.q, inputs.k, leaves, rows, SMALL
    assert oracles.far_error(probs.masked_fill(local, 0.0) @ leaves, *check) < 1e-6
    assert oracles.far_error(probs @ leaves, *check) > harness.MAX_ERROR


def test_sample_rows() -> None:
    rows = oracles.sample_rows(100)
    assert rows.min() == 0 and rows.max() == 99


def test_decode_inputs() -> None:
    records = cases.decode_records(cases.Case("", 200, 5, routes=4, batch=2, layer=SMALL))
    assert records.address.shape == (2, 200, 4) and records.address.dtype == torch.uint8
    assert torch.equal(records.position[0], torch.arange(1, 201, dtype=torch.int32)) and not records.document.any()
    address = cases.random_addresses(2, 4, 1, 5)
    seen, loaded = oracles.decode_visible(address, records.address, 5, SMALL)
    query_ball = torch.zeros(2, 4, 200, dtype=torch.long)
    query_ball[..., -1:] = address % 5
    expected = mask_of(query_ball, records.address.transpose(1, 2) % 5)[:, :, -1]
    assert torch.equal(seen, expected)
    assert torch.equal(loaded, expected.unflatten(1, (2, 2)).any(2))


def test_block_mask() -> None:
    """At the window and block of the benchmark: a block is whole, needs a mask or is empty, as its pairs say."""
    query_ball, key_ball = torch.randint(0, 2, (2, 3, 5))
    partial, full = flex.block_mask_of(query_ball, key_ball)
    tokens = [ball.repeat_interleave(flex.FLEX_BLOCK, -1)[None] for ball in (query_ball, key_ball)]
    pairs = (
        mask_of(*tokens, window=cases.Layer().window)[0]
        .unflatten(-1, (5, -1))
        .unflatten(1, (5, -1))
        .transpose(2, 3)
        .flatten(-2)
    )
    assert torch.equal(full, pairs.all(-1))
    assert torch.equal(partial, pairs.any(-1) & ~pairs.all(-1))


def test_cases() -> None:
    """Every row of the table of targets is there, for both kinds of routes."""
    names = {(case.name, case.routes) for case in cases.prefill_cases() + cases.decode_cases()}
    for name in ("prefill 8k, 64 balls", "prefill 32k, one ball holds half", "decode 32k, batch 16, 10 %"):
        assert {(name, 32), (name, 8)} <= names
    assert {case.length // case.balls for case in cases.growth_cases()} == {512}
    for case in cases.density_cases() + cases.growth_cases():
        assert case.balls <= 2**case.router_depth <= cases.MAX_LEAVES


def test_only_refuses_unknown_parts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only must name parts among"):
        layer.run(layer.Arguments(output=str(tmp_path / "x.jsonl"), only=["prefil"]))


def timing(ms: float) -> Any:
    return harness.summary([ms, ms + 1, ms - 1])


def example(path: Path) -> harness.Table:
    """A table with a row of every part."""
    table = harness.Table(path, "abc")
    table.bandwidth, table.rate = 3e12, 8e14
    table.origin["machine"]["name"] = "some GPU"
    table.add("ceiling", "device copy", "torch", timing(2.0), {"note": "3.00 TB/s"})
    for length, ms in ((8192, 1.0), (32768, 16.0)):
        dense = {"length": length, "batch": 1, "density": 1.0, "gflop": 1e3, "megabytes": 1.0}
        table.add("dense", cases.label(length), "sdpa cudnn", timing(ms), dense)
        table.add("dense", cases.label(length), "sdpa flash", timing(2 * ms), dense)
        for name in (plot.PER_QUERY_HEAD, plot.PER_KV_HEAD):
            ours = {"length": length, "batch": 1, "density": 0.05, "gflop": 40.0, "megabytes": 300.0, "error": 2e-3}
            ours |= table.fastest("dense", cases.label(length))
            for part in ("prefill", "growth", "density"):
                table.add(part, f"{part} {cases.label(length)}, 64 balls", name, timing(2.0), ours)
            for stage in plot.STAGES:
                table.add("breakdown", f"prefill {cases.label(length)}, 64 balls", f"{stage}, {name}", timing(2.0), {})
    decode = {"length": 131072, "batch": 1, "density": 0.05, "megabytes": 60.0}
    table.add("decode", "decode 128k, batch 1, 5 %", "sdpa flash", timing(2.0), decode | {"density": 1.0})
    ours = decode | table.fastest("decode", "decode 128k, batch 1, 5 %")
    table.add("decode", "decode 128k, batch 1, 5 %", plot.PER_QUERY_HEAD, timing(0.5), ours)
    table.add("distill", "distillation 32k", "topology", timing(30.0), {"peak_mb": 2500.0})
    table.add("training", "local step 32k, nf4", "topology", timing(1500.0), {"length": 32768, "peak_mb": 9000.0})
    for name, ms, loss in (("dense", 4.0, 2.5), ("topology, dial at 0.1", 2.0, 2.53)):
        values = {"length": 8192, "batch": 8, "density": 0.1 if ms < 4 else 1.0, "loss": loss}
        table.add("trained", "prefill 8k", name, timing(ms), values | table.fastest("trained", "prefill 8k"))
    for name, speed in (("dense", 100.0), (plot.PER_QUERY_HEAD, 250.0)):
        values = {"length": 8192, "batch": 1, "tokens_per_s": speed, "peak_mb": 20000.0}
        for phase in ("prefill", "decode"):
            mode = "" if phase == "prefill" else ", CUDA graph"
            table.add("end_to_end", f"{phase} 8k batch 1, bf16{mode}", name, timing(9.0), values)
    return table


def test_table_computes_floor_and_speedup(tmp_path: Path) -> None:
    table = example(tmp_path / "x.jsonl")
    row = next(r for r in table.rows if r["config"] == "prefill 32k, 64 balls")
    assert math.isclose(row["floor_ms"], 0.1) and math.isclose(row["gap"], 20.0) and math.isclose(row["speedup"], 8.0)
    assert not table.failures
    table.add("prefill", "wrong", plot.PER_KV_HEAD, timing(1.0), {"error": math.nan})
    table.add("prefill", "wrong", plot.PER_QUERY_HEAD, timing(1.0), {"error": 0.5})
    assert len(table.failures) == 2


def test_rows_are_read_back_and_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    table = example(path)
    assert len(plot.read_rows([path])) == len(table.rows)
    again = harness.Table(path, "def")  # appends
    again.origin["machine"]["name"] = "some GPU"
    again.add("growth", "growth 8k, 64 balls", plot.PER_KV_HEAD, timing(7.0), {"length": 8192})
    again.failed("growth", "growth 8k, 64 balls", plot.PER_QUERY_HEAD, RuntimeError('no, "really"\nnot'))
    rows = plot.of_part(plot.read_rows([path]), "growth")
    assert rows["growth 8k, 64 balls"][plot.PER_KV_HEAD]["ms"] == 7.0
    assert plot.PER_QUERY_HEAD not in rows["growth 8k, 64 balls"]
    again.origin["machine"]["name"] = "another GPU"
    again.add("growth", "growth 16k, 64 balls", plot.PER_KV_HEAD, timing(7.0), {"length": 16384})
    with pytest.raises(ValueError, match="one GPU"):
        plot.read_rows([path])


def test_performance_section(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    example(path)
    section = plot.performance(plot.read_rows([path]), "x.jsonl")
    wanted = "| prefill 32k, 64 balls | 0.050 | 16 (sdpa cudnn) | 2 (8x) | 2 (8x) | 0.1 / 0.1 |"
    assert wanted in section.splitlines()
    assert "| decode 128k, batch 1, 5 % | 0.050 | 2 (sdpa flash) | 0.5 (4x) |  | 0.02 |" in section.splitlines()
    assert "| decode 8k batch 1, bf16, CUDA graph | 100 | 250 | 2.50x | 20.0 / 20.0 GB |" in section.splitlines()
    assert "| prefill 8k, dial at 0.1 | 0.100 | 2.5000 / 2.5300 | 4 | 2 (2x) |" in section.splitlines()
    assert "| local step 32k, nf4 | 1.5 | 9.0 GB |" in section.splitlines()
    assert "some GPU" in section and "device copy 3.00 TB/s" in section
    begin, end = plot.PERFORMANCE
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    written = plot.insert(text, section, plot.PERFORMANCE)
    assert "old" not in written and written.startswith("before\n") and written.endswith("\nafter\n")
    assert plot.insert(written, section, plot.PERFORMANCE) == written
    with pytest.raises(ValueError, match="the text must hold"):
        plot.insert(f"{end} {begin}", section, plot.PERFORMANCE)


def test_pictures(tmp_path: Path) -> None:
    path, page = tmp_path / "x.jsonl", tmp_path / "results.md"
    example(path)
    page.write_text("\n".join(plot.PERFORMANCE))
    plot.main(plot.Arguments(results=[str(path)], docs=str(tmp_path / "docs"), page=str(page), readme=""))
    names = {"length", "density", "decode", "breakdown", "end_to_end"}
    assert {p.name for p in (tmp_path / "docs").iterdir()} == {f"performance_{name}.png" for name in names}
    assert "prefill 32k" in page.read_text()


def test_visible_depth_leaves_512_tokens_to_a_ball() -> None:
    assert [end_to_end.visible_depth(n) for n in (256, 512, 8192, 32768, 65536, 131072)] == [0, 0, 4, 6, 7, 8]


def test_static_copy_holds_keys_and_records() -> None:
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, hidden_size=8, intermediate_size=8
    )
    cache = DynamicCache()
    cache.layers += [DynamicIndexedLayer(), DynamicIndexedLayer()]
    for index in range(2):
        cache.update(torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4), index)
        cache.update_indexer(torch.arange(15, dtype=torch.int32).reshape(1, 5, 3), index)
        cache.layers[index].topology_router = 7
    static = generation.static_copy(cache, config, 3, 8)
    assert int(static.get_seq_length()) == 5
    for source, target in zip(cache.layers, static.layers, strict=True):
        assert target.keys.shape == (3, 1, 8, 4) and target.topology_router == 7
        assert torch.equal(target.keys[2, :, :5], source.keys[0]) and torch.equal(
            target.values[0, :, :5], source.values[0]
        )
        assert torch.equal(target.indexer_keys[1, :5], source.indexer_keys[0]) and not target.indexer_keys[:, 5:].any()


def test_quantise_replaces_all_linear_layers_but_the_head() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64, bias=False) for name in ("q_proj", "lm_head")})
    x = torch.randn(2, 64)
    exact = model["q_proj"](x)
    models.quantise(model)
    assert isinstance(model["q_proj"], bnb.nn.Linear4bit) and type(model["lm_head"]) is torch.nn.Linear
    assert 0 < (model["q_proj"](x) - exact).norm() < 0.3 * exact.norm()


def test_layer_inputs_give_what_the_model_computes() -> None:
    base = tiny()
    model = routed(base, visible_depth=2, homotopy=1.0, local_window=4).eval()
    model.merge_adapter()
    computed: list[Tensor] = []
    for each in base.model.layers:
        each.self_attn.o_proj.register_forward_pre_hook(lambda module, args: computed.append(args[0]))
    inputs = trained.layer_inputs(model, tokens(2, 40))
    assert len(inputs) == len(computed) == len(base.model.layers)
    for each, right in zip(inputs, computed, strict=True):
        with torch.no_grad():
            found = each.attend()
        assert torch.equal(found.flatten(2), right)
    computed.clear()
    model(input_ids=tokens(2, 40), use_cache=False)
    assert len(computed) == len(base.model.layers)  # nothing is left patched


@pytest.mark.parametrize("stage", ["local", "kl"])
def test_training_step_times_the_steps_after_compilation(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    model = routed(tiny(), visible_depth=2, depth=5, homotopy=float(stage == "kl"), local_window=4)
    clock = training_step.Clock()
    arguments = training_step.Arguments(steps=3)
    training_step.trainer(stage, model, arguments, 40, str(tmp_path), clock).train()
    assert len(clock.ends) == 5 and len(clock.times()) == 3 and min(clock.times()) > 0
