"""The PEFT life cycle on tiny random models: wrap, train, save, load, switch, disable, delete, unload."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from peft_helpers import (
    FAMILIES,
    HEADS,
    LAYERS,
    ROUTED,
    assert_same_weights,
    logits_of,
    loss_of,
    randomise_routers,
    routed,
    router_gradients,
    router_parameters,
    tiny,
    tokens,
    weights_of,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GptOssConfig,
    MistralConfig,
    PreTrainedModel,
)

import topo_adapter
from topo_adapter import (
    AdapterFileError,
    MergeError,
    TopologyConfig,
    TopologyConfigError,
    TopologyLayer,
    TopologyRouter,
    UnsupportedModelError,
)

REPOSITORY = Path(__file__).parents[1]
IDS = tokens(2, 24)
SMALL: dict[str, Any] = {"depth": 4, "visible_depth": 2, "router_dim": 8, "local_window": 3, "num_sink_tokens": 2}


def left_padded() -> dict[str, Tensor]:
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    return {"input_ids": IDS.masked_fill(mask == 0, 0), "attention_mask": mask}


def generate(model: nn.Module, **kwargs: Any) -> Tensor:
    return model.generate(**{"input_ids": IDS, "max_new_tokens": 8, "do_sample": False, **kwargs})


def routed_layers(model: nn.Module) -> list[int]:
    return sorted({int(name.split("layers.")[1].split(".")[0]) for name in router_parameters(model)})


# ---------------------------------------------------------------- fresh


@pytest.mark.parametrize("init_weights", ["random", "collapse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapter_is_the_base_bitwise(family: str, init_weights: str) -> None:
    base = tiny(family)
    reference = copy.deepcopy(base)
    model = get_peft_model(base, TopologyConfig(**SMALL, init_weights=init_weights))
    assert routed_layers(model) == ROUTED[family]
    for train in (False, True):
        reference.train(train), model.train(train)
        for inputs in ({"input_ids": IDS}, left_padded()):
            assert torch.equal(logits_of(model, **inputs), logits_of(reference, **inputs))
            with torch.enable_grad():  # the router's gradient path is attached to the output only here
                assert torch.equal(model(**inputs).logits, reference(**inputs).logits)
    reference.eval(), model.eval()
    assert torch.equal(generate(model), generate(reference))
    # the same comparison fails as soon as the topology has any force
    model.peft_config["default"].homotopy = 1.0
    if init_weights == "random":
        assert not torch.equal(logits_of(model, IDS), logits_of(reference, IDS))


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_eager_and_sdpa_bases_agree(attn_implementation: str) -> None:
    other = {"eager": "sdpa", "sdpa": "eager"}[attn_implementation]
    bases = [tiny(attn_implementation=name) for name in (attn_implementation, other)]
    assert [base.config._attn_implementation for base in bases] == [attn_implementation, other]
    one, two = (routed(copy.deepcopy(base)) for base in bases)
    for homotopy in (0.0, 0.5, 1.0):
        one.peft_config["default"].homotopy = two.peft_config["default"].homotopy = homotopy
        for inputs in ({"input_ids": IDS}, left_padded()):
            real = inputs.get("attention_mask", torch.ones_like(IDS)).bool()
            ours = logits_of(one, **inputs)
            torch.testing.assert_close(ours[real], logits_of(two, **inputs)[real], atol=1e-4, rtol=1e-4)
            assert torch.equal(ours, logits_of(bases[0], **inputs)) == (homotopy == 0)
    one.merge_adapter(), two.merge_adapter()
    for inputs in ({"input_ids": IDS}, left_padded()):
        real = inputs.get("attention_mask", torch.ones_like(IDS)).bool()
        ours, theirs = logits_of(one, **inputs), logits_of(two, **inputs)
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(ours[real], logits_of(bases[0], **inputs)[real], atol=1e-2)


def test_implementation_may_be_switched_after_wrapping() -> None:
    model = get_peft_model(tiny(attn_implementation="sdpa"), TopologyConfig(**SMALL)).eval()
    model.get_base_model().set_attn_implementation("eager")
    assert torch.equal(logits_of(model, IDS), logits_of(tiny(attn_implementation="eager"), IDS))


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_router_learns_from_the_language_model_loss_at_homotopy_0(family: str) -> None:
    model = get_peft_model(tiny(family), TopologyConfig(**SMALL, balance_weight=0.0, density_weight=0.0)).train()
    loss_of(model, IDS).backward()
    gradients = router_gradients(model)
    for layer in ROUTED[family]:
        assert sum(float(g.abs().sum()) for n, g in gradients.items() if f"layers.{layer}." in n) > 0, layer
    for name, weight in model.named_parameters():
        if name not in gradients:
            assert not weight.requires_grad and weight.grad is None, name


@pytest.mark.parametrize("init_weights", ["random", "collapse"])
@pytest.mark.parametrize("bridge", ["full", "masked"])
@pytest.mark.parametrize("tie", [True, False])
def test_every_start_and_bridge_gives_the_router_a_gradient(tie: bool, bridge: str, init_weights: str) -> None:
    config = TopologyConfig(
        **SMALL,
        tie_query_key=tie,
        gradient_bridge=bridge,
        init_weights=init_weights,
        balance_weight=0.0,
        density_weight=0.0,
    )
    model = get_peft_model(tiny(), config).train()
    loss_of(model, IDS).backward()
    router_gradients(model)


def test_dense_layers_get_no_gradient_from_the_language_model_loss() -> None:
    """Negative control of the two tests above: at visible depth 0 the mask cannot depend on the router."""
    config = TopologyConfig(**{**SMALL, "visible_depth": 0}, balance_weight=0.0, density_weight=0.0)
    model = get_peft_model(tiny(), config).train()
    loss_of(model, IDS).backward()
    assert sum(float(w.grad.abs().sum()) for w in router_parameters(model).values() if w.grad is not None) == 0


@pytest.mark.parametrize("homotopy", [0.0, 1.0])
def test_a_loss_has_gradients_in_evaluation_mode(homotopy: float) -> None:
    """As of PEFT's other methods; users forget `train()`, which from_pretrained does not call."""
    model = routed(tiny(num_hidden_layers=2), homotopy=homotopy)
    loss_of(model, IDS).backward()
    first = router_gradients(model)
    model.zero_grad()
    loss_of(model, IDS).backward()
    assert all(torch.equal(gradient, first[name]) for name, gradient in router_gradients(model).items())  # no noise
    cache = model(input_ids=IDS[:, :10]).past_key_values  # decoding asks for none
    assert model(input_ids=IDS[:, 10:11], past_key_values=cache).logits.isfinite().all()
    model.base_model.set_requires_grad("default", False)
    assert not model(input_ids=IDS).logits.requires_grad


@pytest.mark.parametrize("homotopy", [0.0, 0.5])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(
    use_reentrant: bool, homotopy: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    forward = TopologyRouter.forward

    def counted(self: TopologyRouter, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return forward(self, hidden_states)

    monkeypatch.setattr(TopologyRouter, "forward", counted)

    def gradients(checkpointing: bool, seed: int = 3) -> tuple[dict[str, Tensor], int]:
        nonlocal calls
        base = tiny()
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model = routed(base, homotopy=homotopy, gumbel_noise=True).train()
        calls = 0
        torch.manual_seed(seed)
        loss_of(model, IDS).backward()
        return router_gradients(model), calls

    plain, once = gradients(False)
    checkpointed, twice = gradients(True)
    assert (once, twice) == (LAYERS, 2 * LAYERS)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7)
    # the noise matters, so equality means that the recomputation saw the same
    other, _ = gradients(True, seed=4)
    assert any(not torch.allclose(other[name], gradient, rtol=1e-2) for name, gradient in plain.items())


@pytest.mark.parametrize("homotopy", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_training_step_is_finite_in_every_dtype(dtype: torch.dtype, homotopy: float) -> None:
    model = routed(tiny(dtype=dtype), homotopy=homotopy, temperature=0.1).train()
    assert {weight.dtype for weight in router_parameters(model).values()} == {torch.float32}
    optimizer = torch.optim.SGD(router_parameters(model).values(), lr=1e-2)
    before = weights_of(model)
    for _ in range(2):
        loss_of(model, **left_padded()).backward()
        router_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and changed <= router_parameters(model).keys()
    assert logits_of(model.eval(), IDS).dtype == dtype


def test_autocast_step_is_finite_and_routes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed(tiny())
    forward = TopologyRouter.forward
    routed_alike = []

    def compared(self: TopologyRouter, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        logits = forward(self, hidden_states)
        with torch.autocast("cpu", enabled=False):
            routed_alike.append(all(map(torch.equal, logits, forward(self, hidden_states))))
        return logits

    monkeypatch.setattr(TopologyRouter, "forward", compared)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model.train(), IDS)
    assert routed_alike == [True] * LAYERS
    loss.backward()
    router_gradients(model)


# ---------------------------------------------------------------- files


def test_saved_files_hold_routers_only(tmp_path: Path) -> None:
    model = routed(tiny())
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    names = ["down.weight", "key.bias", "key.weight", "query.bias", "query.weight"]
    prefix = "base_model.model.model.layers.{}.self_attn.topo_adapter.topo_routers.{}"
    assert sorted(tensors) == sorted(prefix.format(layer, name) for layer in range(LAYERS) for name in names)
    routers = router_parameters(model)
    for key, value in tensors.items():
        assert torch.equal(value, routers[key.replace(".topo_routers.", ".topo_routers.default.")])
    numbers = sum(value.numel() for value in tensors.values())
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * numbers + 8192
    assert numbers < sum(p.numel() for p in tiny().parameters()) / 2
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "TOPOLOGY"


def test_model_card_says_what_to_import(tmp_path: Path) -> None:
    """Without the import, PEFT's answer is a bare KeyError: 'TOPOLOGY'."""
    routed(tiny()).save_pretrained(tmp_path)
    assert "import topo_adapter" in (tmp_path / "README.md").read_text()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Tensor]:
    """An adapter on disk beside its base, and its logits."""
    tiny().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = routed(base, visible_depth={0: 2, 1: [0, 1, 2, 3], 3: 4}, seed=5, temperature=0.25)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits_of(model, IDS)


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: PeftModel.from_pretrained(tiny(), folder),
        lambda folder: PeftModel.from_pretrained(tiny(), folder, adapter_name="renamed"),
        lambda folder: PeftModel.from_pretrained(tiny(), folder, adapter_name="key"),
        lambda folder: PeftModel.from_pretrained(tiny(), folder, is_trainable=True),
        lambda folder: PeftModel.from_pretrained(tiny(), folder, low_cpu_mem_usage=True),
        lambda folder: PeftModel.from_pretrained(tiny(), folder, config=TopologyConfig.from_pretrained(folder)),
        lambda folder: AutoPeftModelForCausalLM.from_pretrained(folder),
    ],
    ids=["PeftModel", "renamed", "named like a tensor", "trainable", "low_cpu_mem_usage", "config", "Auto"],
)
def test_reloading_gives_the_same_logits(saved: tuple[Path, Tensor], load: Callable[[Path], PeftModel]) -> None:
    folder, logits = saved
    model = load(folder)
    assert torch.equal(logits_of(model.eval(), IDS), logits)
    assert not torch.equal(logits, logits_of(tiny(), IDS))
    randomise_routers(model, seed=6)  # other routers give other logits, so the file was read
    assert not torch.allclose(logits_of(model, IDS), logits, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_reloading_after_a_cast_gives_the_same_logits(dtype: torch.dtype, tmp_path: Path) -> None:
    """The file's dtype is what is evaluated: a router cast with its model loses nothing more by saving."""
    model = routed(tiny()).to(dtype)
    if dtype == torch.float64:  # digits beyond float32, which the file keeps and the evaluation drops
        with torch.no_grad():
            for weight in router_parameters(model).values():
                weight.mul_(1 + 1e-12)
    logits = logits_of(model, IDS)
    assert logits.dtype == dtype
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(tiny(dtype=dtype), tmp_path).eval(), IDS), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_adapter_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT's switch: float32 routers, or those of the base's dtype; they are computed with in float32 either way."""
    base = tiny(dtype=dtype, num_hidden_layers=2)
    model = get_peft_model(base, TopologyConfig(**SMALL, homotopy=1.0), autocast_adapter_dtype=False).eval()
    assert {weight.dtype for weight in router_parameters(model).values()} == {dtype}
    assert all(weight.requires_grad for weight in router_parameters(model).values())
    model.save_pretrained(tmp_path)
    for autocast, wanted in ((False, dtype), (True, torch.float32)):
        again = PeftModel.from_pretrained(
            tiny(dtype=dtype, num_hidden_layers=2), tmp_path, autocast_adapter_dtype=autocast
        )
        assert {weight.dtype for weight in router_parameters(again).values()} == {wanted}
        assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))


def test_loading_decides_trainability(saved: tuple[Path, Tensor]) -> None:
    for trainable in (False, True):
        model = PeftModel.from_pretrained(tiny(), saved[0], is_trainable=trainable).train()
        assert {weight.requires_grad for weight in router_parameters(model).values()} == {trainable}
    loss_of(model, IDS).backward()
    router_gradients(model)


def test_loading_through_functions_on_a_plain_model(saved: tuple[Path, Tensor]) -> None:
    folder, logits = saved
    base = tiny()
    inject_adapter_in_model(TopologyConfig.from_pretrained(folder), base, adapter_name="mine")
    result = set_peft_model_state_dict(base, load_file(folder / "adapter_model.safetensors"), adapter_name="mine")
    assert not result.unexpected_keys
    assert torch.equal(logits_of(base.eval(), IDS), logits)
    again = get_peft_model_state_dict(base, adapter_name="mine")
    file = load_file(folder / "adapter_model.safetensors")
    assert {"base_model.model." + key for key in again} == file.keys()
    assert all(torch.equal(value, file["base_model.model." + key]) for key, value in again.items())


@pytest.mark.parametrize("layers", [None, [0, 2]], ids=str)
def test_injecting_by_the_keys_of_a_state_dict(layers: list[int] | None) -> None:
    given = tiny()
    inject_adapter_in_model(TopologyConfig(**SMALL, layers_to_transform=layers), given)
    tensors = get_peft_model_state_dict(given)
    again = inject_adapter_in_model(TopologyConfig(**SMALL, layers_to_transform=layers), tiny(), state_dict=tensors)
    assert routed_layers(again) == (layers or list(range(LAYERS)))
    assert not set_peft_model_state_dict(again, tensors).unexpected_keys
    assert all(torch.equal(value, tensors[key]) for key, value in get_peft_model_state_dict(again).items())


def test_config_round_trip(saved: tuple[Path, Tensor]) -> None:
    for load in (PeftConfig.from_pretrained, TopologyConfig.from_pretrained):
        config = load(saved[0])
        assert type(config) is TopologyConfig and config.peft_type is PeftType.TOPOLOGY
        assert config.visible_depth == {0: 2, 1: [0, 1, 2, 3], 3: 4}
        assert (config.depth, config.router_dim, config.homotopy, config.temperature) == (4, 8, 1.0, 0.25)
        assert (config.local_window, config.num_sink_tokens, config.target_modules) == (3, 2, {"self_attn"})


@pytest.mark.parametrize(
    ("visits", "message"),
    [({9: [1] * HEADS}, r"head_visits names layers \[9\]"), ({0: [1, 2]}, r"head_visits\[0\] must have 4 entries")],
)
def test_visits_that_fit_no_layer_are_refused(visits: dict[int, list[int]], message: str) -> None:
    with pytest.raises(TopologyConfigError, match=message):
        get_peft_model(tiny(), TopologyConfig(visits=2, head_visits=visits))


def test_every_config_field_survives_a_file(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "arity": 3,
        "depth": 5,
        "visible_depth": {2: [1, 2, 3, 4], 0: 5},
        "visits": 3,
        "head_visits": {2: [1, 3, 2, 2]},
        "router_dim": None,
        "tie_query_key": True,
        "route_per": "kv_head",
        "depth_per": "query_head",
        "local_window": 7,
        "num_sink_tokens": 0,
        "init_weights": "collapse",
        "homotopy": 0.375,
        "temperature": 0.5,
        "gumbel_noise": False,
        "gradient_bridge": "masked",
        "balance_weight": 0.25,
        "density_weight": 0.75,
        "calibration": {
            "length": 64,
            "heads_per_route": 2,
            "choices": [[0, 1], [1, 1], *([d, m] for d in (2, 3, 4, 5) for m in (3, 1)), [6, 1]],
            "density": {2: [[1.0, 0.5, 0.5, 0.25, 0.25, 0.2, 0.2, 0.1, 0.1, 0.08, 0.05]] * 4},
            "loss": {2: [[0.0, 0.1, 0.1, 0.2, 0.2, 0.2, 0.2, 0.3, 0.3, 0.4, 0.5]] * 4},
        },
        "training_runs": [{"data": "books", "steps": 3, "seconds": 1.5, "versions": {"torch": "2.13"}}],
        "base_fingerprint": "7f" * 64,
        "base_facts": {"model_type": "llama", "rope_parameters": {"rope_theta": 1e4}},
        "target_modules": {"self_attn"},
        "exclude_modules": {"layers.2.self_attn"},
        "layers_to_transform": [0, 2],
        "modules_to_save": ["lm_head"],
        "trainable_token_indices": {"embed_tokens": [3, 5]},
    }
    ours = {f.name for f in dataclasses.fields(TopologyConfig)} - {f.name for f in dataclasses.fields(PeftConfig)}
    # saving writes two; test_head_router has the third, whose other value goes with few of these
    by_themselves = {"format_version", "weights_digest", "router_input"}
    assert given.keys() == ours - {"target_density"} - by_themselves  # in place of a map: test_calibration
    default = TopologyConfig()
    TopologyConfig(**given).save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    for name, value in given.items():
        assert value != getattr(default, name), name
        assert getattr(loaded, name) == value, name


def _missing(tensors: dict[str, Tensor]) -> None:
    tensors.pop(sorted(tensors)[3])


def _extra_base_weight(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.zeros_like(tiny().lm_head.weight)


def _extra_router(tensors: dict[str, Tensor]) -> None:
    key = sorted(tensors)[0]
    tensors[key.replace("layers.0", "layers.9")] = tensors[key].clone()


def _renamed(tensors: dict[str, Tensor]) -> None:
    key = sorted(tensors)[0]
    tensors[key.replace(".topo_routers.", ".topo_routers.default.")] = tensors.pop(key)


def _wrong_shape(tensors: dict[str, Tensor]) -> None:
    key = sorted(tensors)[0]
    tensors[key] = tensors[key][:-1].clone()


def _broadcastable(tensors: dict[str, Tensor]) -> None:
    key = next(key for key in sorted(tensors) if key.endswith("query.bias"))
    tensors[key] = tensors[key][:1].clone()


def _nan(tensors: dict[str, Tensor]) -> None:
    tensors[sorted(tensors)[-1]][0] = float("nan")


def _infinite(tensors: dict[str, Tensor]) -> None:
    tensors[sorted(tensors)[-1]][0] = float("inf")


def _unharmed(tensors: dict[str, Tensor]) -> None:
    pass


DAMAGE = [_missing, _extra_base_weight, _extra_router, _renamed, _wrong_shape, _broadcastable, _nan, _infinite]


def damage(folder: Path, how: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    how(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("how", DAMAGE, ids=lambda how: how.__name__.strip("_"))
def test_damaged_file_is_refused_and_no_base_weight_changes(
    saved: tuple[Path, Tensor], how: Callable[[dict[str, Tensor]], None]
) -> None:
    damage(saved[0], how)
    base = tiny()
    before = weights_of(base)
    with pytest.raises(AdapterFileError):
        PeftModel.from_pretrained(base, saved[0])
    after = base.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())

    model = routed(tiny(), seed=2)
    logits, before = logits_of(model, IDS), weights_of(model)
    with pytest.raises(AdapterFileError):
        model.load_adapter(saved[0], adapter_name="second")
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert model.active_adapters == ["default"]
    assert torch.equal(logits_of(model, IDS), logits)


def test_the_same_file_unharmed_is_accepted(saved: tuple[Path, Tensor]) -> None:
    """Negative control of the test above: rewriting the file is not what is refused."""
    damage(saved[0], _unharmed)
    assert torch.equal(logits_of(PeftModel.from_pretrained(tiny(), saved[0]).eval(), IDS), saved[1])


def test_refused_file_leaves_no_random_router_in_force(saved: tuple[Path, Tensor]) -> None:
    damage(saved[0], _nan)
    base = tiny()
    before = logits_of(base, IDS)
    with pytest.raises(AdapterFileError):
        PeftModel.from_pretrained(base, saved[0])
    assert torch.equal(logits_of(base, IDS), before)


def test_refused_file_does_not_take_a_trained_adapter_with_it(saved: tuple[Path, Tensor]) -> None:
    """A trainer that resumes loads over the adapter in place; a damaged checkpoint must not cost what was learned."""
    damage(saved[0], _nan)
    model = routed(tiny(), seed=2)
    logits, before = logits_of(model, IDS), weights_of(model)
    with pytest.raises(AdapterFileError):
        model.load_adapter(saved[0], adapter_name="default")
    assert_same_weights(model, before)
    assert torch.equal(logits_of(model, IDS), logits)


def test_refused_file_leaves_no_idle_adapter_behind(saved: tuple[Path, Tensor]) -> None:
    """Another adapter's forward does not make the fresh one a used one."""
    model = routed(tiny(), seed=2)
    model.add_adapter("b", TopologyConfig.from_pretrained(saved[0]))
    damage(saved[0], _nan)
    logits = logits_of(model, IDS)
    with pytest.raises(AdapterFileError):
        model.load_adapter(saved[0], adapter_name="b")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits_of(model, IDS), logits)


def test_loading_over_an_adapter_in_place(saved: tuple[Path, Tensor]) -> None:
    """Negative control of the test above, and what a trainer does at the end to load its best checkpoint."""
    model = routed(tiny(), seed=2, visible_depth={0: 2, 1: [0, 1, 2, 3], 3: 4})
    assert not torch.allclose(logits_of(model, IDS), saved[1], atol=1e-2)
    model.load_adapter(saved[0], adapter_name="default")
    assert torch.equal(logits_of(model.eval(), IDS), saved[1])


# ---------------------------------------------------------------- disable, switch, delete, unload


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_disabled_is_the_base_bitwise(family: str, merged: bool) -> None:
    base = tiny(family)
    reference = copy.deepcopy(base)
    model = routed(base)
    if merged:
        model.merge_adapter()
    ours = logits_of(model, IDS)
    assert not torch.allclose(ours, logits_of(reference, IDS), atol=1e-3)
    with model.disable_adapter():
        for train in (False, True):
            reference.train(train), model.train(train)
            for inputs in ({"input_ids": IDS}, left_padded()):
                assert torch.equal(logits_of(model, **inputs), logits_of(reference, **inputs))
        reference.eval(), model.eval()
        assert torch.equal(generate(model), generate(reference))
    assert torch.equal(logits_of(model, IDS), ours)
    assert all(layer.merged == merged for layer in model.modules() if isinstance(layer, TopologyLayer))


def test_several_adapters_switch_and_delete() -> None:
    alone = {name: logits_of(routed(tiny(), seed=seed), IDS) for name, seed in (("a", 1), ("b", 2))}
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-2)
    model = routed(tiny(), seed=1, adapter_name="a")
    model.add_adapter("b", TopologyConfig(**SMALL, homotopy=1.0))
    assert model.active_adapters == ["a"] and torch.equal(logits_of(model, IDS), alone["a"])
    model.set_adapter("b")
    randomise_routers(model, 2, "b")
    assert torch.equal(logits_of(model, IDS), alone["b"])
    for name, weight in router_parameters(model).items():
        assert weight.requires_grad == (".b." in name)
    model.delete_adapter("a")
    assert list(model.peft_config) == ["b"] and not any(".a." in name for name in router_parameters(model))
    assert torch.equal(logits_of(model, IDS), alone["b"])
    model.add_adapter("c", TopologyConfig(**{**SMALL, "depth": 3, "arity": 3}, route_per="kv_head", homotopy=1.0))
    model.set_adapter("c")
    logits_of(model, IDS)
    with pytest.warns(UserWarning, match="c was active"):
        model.delete_adapter("c")  # the active one: the remaining one takes over
    assert torch.equal(logits_of(model, IDS), alone["b"])
    model.delete_adapter("b")  # PEFT's own wrapper cannot run without an adapter, the model inside can
    assert torch.equal(logits_of(model.base_model.model, IDS), logits_of(tiny(), IDS))


def test_adapters_on_different_layers() -> None:
    model = routed(tiny(), layers_to_transform=[0], adapter_name="a")
    only_first = logits_of(model, IDS)
    model.add_adapter("b", TopologyConfig(**SMALL, homotopy=1.0, layers_to_transform=[2]))
    assert torch.equal(logits_of(model, IDS), only_first)
    model.set_adapter("b")
    randomise_routers(model, 1, "b")
    alone = logits_of(routed(tiny(), seed=1, layers_to_transform=[2]), IDS)
    assert not torch.allclose(alone, only_first, atol=1e-2)
    assert torch.equal(logits_of(model, IDS), alone)
    model.set_adapter("a")
    assert torch.equal(logits_of(model, IDS), only_first)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model's structure that wrapping could leave traces in."""
    return {
        name: (
            type(module),
            sorted(vars(module)),
            sorted(module._modules),
            list(module._forward_pre_hooks.values()),
            list(module._forward_pre_hooks_with_kwargs.values()),
            list(module._forward_hooks.values()),
            list(module._backward_hooks.values()),
            id(getattr(module, "config", None)),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("state", ["fresh", "in force", "two adapters", "merged", "disabled", "last one deleted"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_unload_restores_the_base_exactly(family: str, state: str) -> None:
    base = tiny(family)
    before, weights, logits = fingerprint(base), weights_of(base), logits_of(base, IDS)
    implementation = base.config._attn_implementation
    model = get_peft_model(base, TopologyConfig(**SMALL)) if state == "fresh" else routed(base)
    logits_of(model, IDS)
    assert fingerprint(base) != before
    if state == "two adapters":
        model.add_adapter("b", TopologyConfig(**SMALL, homotopy=1.0))
    elif state == "merged":
        model.merge_adapter()
        logits_of(model, IDS)
    elif state == "disabled":
        model.base_model.disable_adapter_layers()
    elif state == "last one deleted":
        model.delete_adapter("default")
    unloaded = model.unload()
    assert unloaded is base and not hasattr(base, "peft_config")
    assert fingerprint(base) == before
    assert {m.config._attn_implementation for m in base.modules() if hasattr(m, "config")} == {implementation}
    assert_same_weights(base, weights)
    assert torch.equal(logits_of(base, IDS), logits)


def test_wrapping_again_after_unload() -> None:
    base = tiny()
    first = routed(base, seed=1)
    logits = logits_of(first, IDS)
    again = routed(first.unload(), seed=1)
    assert torch.equal(logits_of(again, IDS), logits)
    hooks = [len(module._forward_pre_hooks) for name, module in base.named_modules() if name.endswith("self_attn")]
    assert hooks == [1] * LAYERS


def test_merged_model_is_not_wrapped_again() -> None:
    merged = routed(tiny()).merge_and_unload()
    logits = logits_of(merged, IDS)
    with pytest.raises(UnsupportedModelError, match="merged topology"):
        get_peft_model(merged, TopologyConfig(**SMALL))
    assert torch.equal(logits_of(merged, IDS), logits)


def test_base_state_dict_is_untouched() -> None:
    base = tiny()
    weights = weights_of(base)
    model = routed(base).train()
    loss_of(model, IDS).backward()
    torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1).step()
    inside = {key: value for key, value in base.state_dict().items() if ".topo_adapter." not in key}
    assert inside.keys() == weights.keys()
    assert all(torch.equal(inside[key], value) for key, value in weights.items())
    fresh = tiny(seed=1)
    fresh.load_state_dict(inside)  # keys and shapes are those of a plain model
    base.load_state_dict(weights_of(tiny(seed=2)), strict=False)
    assert torch.equal(base.lm_head.weight, tiny(seed=2).lm_head.weight)


def test_peft_reports_on_the_model(capsys: pytest.CaptureFixture) -> None:
    model = routed(tiny())
    routers = sum(weight.numel() for weight in router_parameters(model).values())
    model.print_trainable_parameters()
    assert f"trainable params: {routers:,}" in capsys.readouterr().out
    status = model.get_model_status()
    assert status.peft_types == {"default": "TOPOLOGY"} and status.num_adapter_layers == LAYERS
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    assert len(model.get_layer_status()) == LAYERS


def test_layers_can_be_inspected() -> None:
    """PEFT's `weight` and `bias` properties look for a wrapped base layer; a child module has none."""
    layer = next(module for module in routed(tiny()).modules() if isinstance(module, TopologyLayer))
    assert not hasattr(layer, "weight") and not hasattr(layer, "bias")


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("form", ["adapter", "merged", "unloaded"])
def test_copies_are_equal_and_independent(form: str, how: str) -> None:
    model: Any = routed(tiny("gemma3"))
    if form == "merged":
        model.merge_adapter()
    elif form == "unloaded":
        model = model.merge_and_unload()
    logits = logits_of(model, IDS)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(logits_of(twin, IDS), logits)
    if form == "unloaded":
        with torch.no_grad():
            for name, weight in twin.named_parameters():
                if ".router." in name:
                    weight.copy_(torch.randn_like(weight))
    else:
        randomise_routers(twin, seed=9)
    assert not torch.allclose(logits_of(twin, IDS), logits, atol=1e-3)
    if form == "adapter":
        twin.peft_config["default"].homotopy = 0.0
        assert torch.equal(logits_of(twin, IDS), logits_of(tiny("gemma3"), IDS))
        plain = twin.unload()
        assert {id(m.config) for m in plain.modules() if hasattr(m, "config")} == {id(plain.config)}
    assert torch.equal(logits_of(model, IDS), logits)


# ---------------------------------------------------------------- together with LoRA


def with_lora(order: str, homotopy: float = 0.0) -> tuple[PreTrainedModel, PeftModel]:
    base = tiny()
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    topology = TopologyConfig(**SMALL, homotopy=homotopy)
    if order == "LoRA first":
        inject_adapter_in_model(lora, base, adapter_name="lora")
        model = get_peft_model(base, topology, adapter_name="topology")
    else:
        inject_adapter_in_model(topology, base, adapter_name="topology")
        model = get_peft_model(base, lora, adapter_name="lora")
    randomise_routers(model)
    return base, model.eval()


@pytest.mark.parametrize("homotopy", [0.0, 1.0])
@pytest.mark.parametrize("order", ["LoRA first", "topology first"])
def test_lora_and_topology_train_together(order: str, homotopy: float) -> None:
    _, model = with_lora(order, homotopy)
    loss_of(model.train(), IDS).backward()
    router_gradients(model)
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any(".lora_A." in name for name in trainable) and any(".topo_routers." in name for name in trainable)
    for name, weight in model.named_parameters():
        if name in trainable:
            assert weight.grad is not None and torch.isfinite(weight.grad).all() and weight.grad.abs().sum() > 0, name
        else:
            assert weight.grad is None, name


@pytest.mark.parametrize("order", ["LoRA first", "topology first"])
def test_lora_and_topology_save_apart_and_reload_together(order: str, tmp_path: Path) -> None:
    _, model = with_lora(order, homotopy=1.0)
    logits = logits_of(model, IDS)
    model.save_pretrained(tmp_path)
    ours = load_file(tmp_path / "topology" / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert len(ours) == 5 * LAYERS and all(".topo_routers." in key for key in ours)
    assert len(theirs) == 4 * LAYERS and all(".lora_" in key for key in theirs)

    base = tiny()
    lora = PeftConfig.from_pretrained(tmp_path / "lora")
    inject_adapter_in_model(lora, base, adapter_name="lora")
    result = set_peft_model_state_dict(base, theirs, adapter_name="lora")
    assert not result.unexpected_keys
    again = PeftModel.from_pretrained(base, tmp_path / "topology", adapter_name="topology").eval()
    assert torch.equal(logits_of(again, IDS), logits)


def test_both_of_one_name_are_refused() -> None:
    """PEFT keeps one configuration of a name, and saves what that one says."""
    base = tiny()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), base, adapter_name="default")
    before = fingerprint(base)
    with pytest.raises(TopologyConfigError, match=r"adapter_name.*peft.tuners.lora.*'default' for both"):
        get_peft_model(base, TopologyConfig(**SMALL))
    assert fingerprint(base) == before and isinstance(base.peft_config["default"], LoraConfig)
    get_peft_model(base, TopologyConfig(**SMALL), adapter_name="topology")


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("order", ["LoRA first", "topology first"])
def test_disable_and_unload_with_lora(order: str, merged: bool) -> None:
    base, model = with_lora(order, homotopy=1.0)
    both = logits_of(model, IDS)
    if merged:
        model.merge_adapter()
        torch.testing.assert_close(logits_of(model, IDS), both, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model, IDS), logits_of(tiny(), IDS), rtol=1e-5, atol=1e-5)
    if merged:
        model.unmerge_adapter()
    torch.testing.assert_close(logits_of(model, IDS), both, rtol=1e-5, atol=1e-5)
    assert model.unload() is base
    if order == "LoRA first":
        torch.testing.assert_close(logits_of(base, IDS), logits_of(tiny(), IDS), rtol=1e-5, atol=1e-5)
        assert base.state_dict().keys() == tiny().state_dict().keys()
    else:  # a LoRA's own PeftModel unloads the LoRA; the topology stays in force
        assert not any("lora_" in name for name, _ in base.named_modules())
        torch.testing.assert_close(logits_of(base, IDS), logits_of(routed(tiny()), IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("state", ["unmerged", "merged", "unloaded"])
def test_all_linear_of_a_lora_leaves_routers_out(state: str, tmp_path: Path) -> None:
    """A pair on a router would never get a gradient, and DDP stops at such parameters."""
    topology = routed(tiny(num_hidden_layers=2))
    expected = logits_of(topology, IDS)
    base = topology.get_base_model()
    if state == "merged":
        topology.merge_adapter()
    elif state == "unloaded":
        base = topology.merge_and_unload()
    model = get_peft_model(base, LoraConfig(target_modules="all-linear"), adapter_name="lora")
    assert len(model.targeted_module_names) == 2 * 7 and not any(
        "topo_adapter" in n for n in model.targeted_module_names
    )
    torch.testing.assert_close(logits_of(model.eval(), IDS), expected, rtol=1e-4, atol=1e-4)
    loss_of(model.train(), IDS).backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if ".lora_" in name)
    model.save_pretrained(tmp_path, selected_adapters=["lora"])
    file = next(tmp_path.rglob("adapter_model.safetensors"))
    assert all(".lora_" in key for key in load_file(file))
    unloaded = model.merge_and_unload()
    torch.testing.assert_close(logits_of(unloaded.eval(), IDS), expected, rtol=1e-4, atol=1e-4)


def test_a_lora_trained_on_a_merged_topology_reloads(tmp_path: Path) -> None:
    merged = routed(tiny(num_hidden_layers=2)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(merged, lora).eval()
    logits = logits_of(model, IDS)
    model.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(topo_adapter.load_merged(tmp_path / "merged"), tmp_path / "lora").eval()
    assert torch.equal(logits_of(again, IDS), logits)
    both = again.merge_and_unload()
    both.save_pretrained(tmp_path / "both")
    torch.testing.assert_close(
        logits_of(topo_adapter.load_merged(tmp_path / "both"), IDS), logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("order", ["LoRA first", "topology first"])
def test_merge_and_unload_with_lora(order: str) -> None:
    _, model = with_lora(order, homotopy=1.0)
    both = logits_of(model, IDS)
    merged = model.merge_and_unload()
    assert not any("lora_" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits_of(merged, IDS), both, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both, logits_of(tiny(), IDS), atol=1e-2)


# ---------------------------------------------------------------- which modules


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, [0, 1, 2, 3]),
        ({"layers_to_transform": [0, 2]}, [0, 2]),
        ({"layers_to_transform": 3}, [3]),
        ({"target_modules": ["self_attn"]}, [0, 1, 2, 3]),
        ({"target_modules": ["layers.1.self_attn", "model.layers.3.self_attn"]}, [1, 3]),
        ({"target_modules": r".*\.[02]\.self_attn"}, [0, 2]),
        ({"target_modules": ["self_attn"], "layers_to_transform": [1]}, [1]),
    ],
    ids=str,
)
def test_which_layers_are_routed(settings: dict[str, Any], layers: list[int]) -> None:
    model = routed(tiny(), **settings)
    assert routed_layers(model) == layers
    assert sorted(topo_adapter.record_routes(model, IDS)) == layers


def test_layers_to_transform_on_a_model_with_sliding_layers() -> None:
    """There the targets are full module names, which PEFT matches without looking at layers_to_transform."""
    assert routed_layers(get_peft_model(tiny("gemma3"), TopologyConfig(**SMALL, layers_to_transform=[3]))) == [3]


def test_layers_to_transform_is_not_ignored_beside_a_regex() -> None:
    """PEFT ignores it there; either honour it or refuse the combination."""
    try:
        config = TopologyConfig(**SMALL, target_modules=r".*\.self_attn", layers_to_transform=[3])
    except TopologyConfigError:
        return
    assert routed_layers(get_peft_model(tiny(), config)) == [3]


def test_unnamed_layers_of_a_depth_map_stay_dense() -> None:
    model = routed(tiny(), visible_depth={1: 2})
    records = topo_adapter.record_routes(model, IDS)
    assert [records[layer].visible_depth.tolist() for layer in range(LAYERS)] == [[0] * 4, [2] * 4, [0] * 4, [0] * 4]


# ---------------------------------------------------------------- refusals


def refuses(base: PreTrainedModel, error: type[Exception], match: str, **settings: Any) -> None:
    """Wrapping raises, and the base is as it was before."""
    before, weights, logits = fingerprint(base), weights_of(base), logits_of(base, IDS)
    with pytest.raises(error, match=match):
        get_peft_model(base, TopologyConfig(**{**SMALL, **settings}))
    assert torch.equal(logits_of(base, IDS), logits)
    assert_same_weights(base, weights)
    assert fingerprint(base) == before


def test_refuses_a_model_with_sliding_layers_only() -> None:
    config = tiny("mistral").config.to_dict()
    base = AutoModelForCausalLM.from_config(MistralConfig(**{**config, "sliding_window": 4})).eval()
    refuses(base, UnsupportedModelError, "MistralAttention: it has a sliding window")
    refuses(base, UnsupportedModelError, "sliding window", target_modules=["self_attn"])


def test_refuses_a_model_with_adapters_around_it() -> None:
    """The first move of who has a LoRA already: the file would hold neither."""
    lora = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]))
    before = {name for name, _ in lora.named_modules()}
    with pytest.raises(UnsupportedModelError, match=r"PeftModel.*'default'.*inject_adapter_in_model.*merge_and_unload"):
        get_peft_model(lora, TopologyConfig())
    assert {name for name, _ in lora.named_modules()} == before
    get_peft_model(lora.merge_and_unload(), TopologyConfig())


def test_refuses_sliding_layers_that_are_named() -> None:
    refuses(tiny("gemma3"), UnsupportedModelError, "sliding window", target_modules=["layers.2.self_attn"])


def test_refuses_attention_that_is_not_causal() -> None:
    base = tiny()
    for layer in base.model.layers:
        layer.self_attn.is_causal = False
    refuses(base, UnsupportedModelError, "no full-attention")
    refuses(base, UnsupportedModelError, "causal", target_modules=["self_attn"])


@pytest.mark.parametrize("name", ["mlp", "q_proj", "input_layernorm"])
def test_refuses_modules_that_are_no_attention(name: str) -> None:
    refuses(tiny(), UnsupportedModelError, name, target_modules=[name])


def test_refuses_attention_outside_the_interface() -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)).eval()
    refuses(base, UnsupportedModelError, "self_attention", target_modules=["self_attention"])


def test_refuses_learned_sinks() -> None:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"] * 2,
    )
    refuses(AutoModelForCausalLM.from_config(config).float().eval(), UnsupportedModelError, "sink")


def test_refuses_unknown_layers_in_a_depth_map() -> None:
    refuses(tiny(), TopologyConfigError, r"\[4\]", visible_depth={0: 1, 4: 2})


@pytest.mark.parametrize("layer", [0, 2])
def test_refuses_a_depth_list_of_wrong_length(layer: int) -> None:
    refuses(tiny(), TopologyConfigError, rf"visible_depth\[{layer}\]", visible_depth={layer: [1, 2, 3]})
    refuses(
        tiny(), TopologyConfigError, "4 entries", visible_depth={layer: [1, 2]}
    )  # per KV head: not with this router
    model = routed(tiny(), visible_depth={layer: [1, 2]}, route_per="kv_head")
    assert topo_adapter.record_routes(model, IDS)[layer].visible_depth.tolist() == [1, 1, 2, 2]


def test_refuses_a_sliding_layer_after_a_full_one() -> None:
    """The first layer is fine and would be wrapped already when the second is refused."""
    refuses(
        tiny("gemma3"),
        UnsupportedModelError,
        "sliding window",
        target_modules=["layers.1.self_attn", "layers.2.self_attn"],
    )


def test_refused_second_adapter_leaves_the_first_alone() -> None:
    model = routed(tiny())
    logits, before = logits_of(model, IDS), fingerprint(model)
    with pytest.raises(TopologyConfigError):
        model.add_adapter("b", TopologyConfig(**{**SMALL, "visible_depth": {2: [1]}}))
    assert list(model.peft_config) == ["default"] and torch.equal(logits_of(model, IDS), logits)
    assert fingerprint(model) == before


def test_refuses_attention_dropout_in_training() -> None:
    model = routed(tiny(attention_dropout=0.1), homotopy=0.5)
    logits_of(model, IDS)
    with pytest.raises(UnsupportedModelError, match="dropout"):
        model.train()(input_ids=IDS)
    model.peft_config["default"].homotopy = 0.0
    with pytest.raises(UnsupportedModelError, match="dropout"):
        model(input_ids=IDS)


def test_refuses_a_block_mask() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return q >= kv

    mask = create_block_mask(causal, 2, None, 24, 24, device="cpu")  # what an attn_implementation of flex makes
    with pytest.raises(UnsupportedModelError, match="BlockMask"):
        routed(tiny())(input_ids=IDS, attention_mask=mask)


def test_refuses_two_active_adapters() -> None:
    model = routed(tiny())
    model.add_adapter("b", TopologyConfig(**SMALL, homotopy=1.0))
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(MergeError, match="one topology adapter"):
        model(input_ids=IDS)


def test_refuses_one_adapter_per_sample() -> None:
    """PEFT's mixed batches: an unsupporting method must not silently run the active adapter for every sample."""
    model = routed(tiny())
    model.add_adapter("b", TopologyConfig(**SMALL, homotopy=1.0))
    with pytest.raises((ValueError, NotImplementedError, TypeError)):
        model(input_ids=IDS, adapter_names=["default", "b"])


@pytest.mark.parametrize("new", [1, 14])
@pytest.mark.parametrize("homotopy", [0.0, 0.5, 1.0])
def test_refuses_cached_tokens_in_training(homotopy: float, new: int) -> None:
    model = routed(tiny(), homotopy=homotopy).train()
    cache = model(input_ids=IDS[:, :10], use_cache=True).past_key_values
    with pytest.raises(UnsupportedModelError, match="key-value cache must be empty in training"):
        model(input_ids=IDS[:, 10 : 10 + new], past_key_values=cache)


@pytest.mark.parametrize("homotopy", [0.0, 0.5, 1.0])
def test_samples_in_training_mode_as_in_evaluation_mode(homotopy: float) -> None:
    """Trainers that sample (GRPO) leave the model in training mode; generate() asks for no gradient."""
    model = routed(tiny(), homotopy=homotopy)
    expected = model.generate(input_ids=IDS[:, :10], max_new_tokens=8, do_sample=False)
    assert torch.equal(model.train().generate(input_ids=IDS[:, :10], max_new_tokens=8, do_sample=False), expected)


@pytest.mark.parametrize("merged", [False, True])
def test_refuses_masks_that_no_document_and_position_express(merged: bool) -> None:
    model = routed(tiny())
    if merged:
        model.merge_adapter()
    length = IDS.shape[1]
    causal = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    torch.testing.assert_close(logits_of(model, IDS, attention_mask=causal), logits_of(model, IDS))
    per_head = causal.expand(2, 4, length, length)
    prefix = causal.clone()
    prefix[..., :6, :6] = True
    banded = causal & ~torch.ones_like(causal).tril(-9)
    for mask in (per_head, prefix, banded):
        with pytest.raises(UnsupportedModelError, match="attention_mask"):
            model(input_ids=IDS, attention_mask=mask)


def test_a_mask_that_is_changed_in_place_is_read_again() -> None:
    model = routed(tiny())
    mask = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
    before = logits_of(model, IDS, attention_mask=mask)
    mask[..., 12:, :12] = False  # two documents now
    after = logits_of(model, IDS, attention_mask=mask)
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, logits_of(model, IDS, attention_mask=mask.clone()))


# ---------------------------------------------------------------- registration and import


def test_registration_is_idempotent() -> None:
    members, mapped = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    importlib.import_module("topo_adapter")
    module = importlib.reload(sys.modules["topo_adapter.register"])
    module.add_peft_type()
    module.register()
    assert list(PeftType) == members and members.count(PeftType.TOPOLOGY) == 1
    assert mapped == PEFT_TYPE_TO_CONFIG_MAPPING
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.TOPOLOGY] is TopologyConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.TOPOLOGY] is topo_adapter.TopologyModel


def test_peft_type_member_behaves_like_the_others() -> None:
    member = PeftType.TOPOLOGY
    assert PeftType("TOPOLOGY") is member and PeftType["TOPOLOGY"] is member
    assert member in PeftType and member in list(PeftType) and PeftType.__members__["TOPOLOGY"] is member
    assert len(PeftType) == len(list(PeftType)) == len(set(PeftType))
    assert (member.name, member.value) == ("TOPOLOGY", "TOPOLOGY")
    assert isinstance(member, PeftType) and isinstance(member, str) and member == "TOPOLOGY"
    assert {member: 1}[PeftType("TOPOLOGY")] == 1 and hash(member) == hash(PeftType.TOPOLOGY)
    assert member is not PeftType.LORA and member != PeftType.LORA
    for twin in (pickle.loads(pickle.dumps(member)), copy.deepcopy(member), copy.copy(member)):
        assert twin is member
    assert json.loads(json.dumps({"type": member})) == {"type": "TOPOLOGY"}
    assert json.dumps(member) == json.dumps("TOPOLOGY")
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "TOPOLOGY")
    assert str(member) == str(PeftType.LORA).replace("LORA", "TOPOLOGY")
    with pytest.raises(ValueError, match="NO_SUCH_METHOD"):
        PeftType("NO_SUCH_METHOD")


_MAIN = """
import importlib.util, sys
blocked = {blocked!r}
for name in blocked:
    sys.modules[name] = None
import torch, transformers, peft
import topo_adapter
assert not [name for name in blocked if sys.modules.get(name) is not None]
assert not [name for name in ("trl", "matplotlib", "topo_kernels") if sys.modules.get(name) is not None]
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2)
model = get_peft_model(LlamaForCausalLM(config), topo_adapter.TopologyConfig(homotopy=1.0)).eval()
ids = torch.arange(1, 20)[None]
soft = model(input_ids=ids).logits
model.merge_adapter()
torch.testing.assert_close(model(input_ids=ids).logits, soft, atol=1e-4, rtol=1e-4)
spec = importlib.util.find_spec("kernels")
print("kernels:", None if spec is None else spec.origin, topo_adapter.__file__)
"""


@pytest.mark.parametrize("where", ["repository root, everything installed", "elsewhere, extras missing"])
def test_import_in_a_fresh_process(where: str, tmp_path: Path) -> None:
    missing = ["triton", "trl", "bitsandbytes", "matplotlib", "datasets"] if where.startswith("elsewhere") else []
    folder = tmp_path if missing else REPOSITORY
    if not missing:
        # the folder kernels/ is importable here, but as a namespace only: it must hide nothing
        assert not (REPOSITORY / "kernels" / "__init__.py").exists()
    program = textwrap.dedent(_MAIN).format(blocked=missing)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.startswith("kernels: None") and str(REPOSITORY) in run.stdout


# ---------------------------------------------------------------- quantised base


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_nf4_base_trains_saves_and_reloads(tmp_path: Path) -> None:
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    config = tiny().config.to_dict()
    torch.manual_seed(0)
    # bitsandbytes' CPU kernels need multiples of 64
    config |= {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "num_hidden_layers": 2}
    plain = AutoModelForCausalLM.from_config(type(tiny().config)(**config))
    plain.save_pretrained(tmp_path / "base")
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )

    def quantised() -> PreTrainedModel:
        # Every forward below gets a fresh base: bitsandbytes repacks weights one way in the first eval-mode forward
        # without grad, on CPUs with AVX512-BF16, and later backward passes through them are wrong.
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantisation, device_map={"": "cpu"}
        )

    assert isinstance(quantised().model.layers[0].self_attn.q_proj, Linear4bit)
    fresh = get_peft_model(quantised(), TopologyConfig(**SMALL)).eval()
    dense = logits_of(quantised().eval(), IDS)
    assert torch.equal(logits_of(fresh, IDS), dense)

    model = routed(quantised(), homotopy=0.5).train()
    before = weights_of(model)
    optimizer = torch.optim.AdamW(router_parameters(model).values(), lr=1e-2)
    for _ in range(2):
        loss_of(model, IDS).backward()
        router_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert changed and all(".topo_routers." in key for key in changed)

    model.peft_config["default"].homotopy = 1.0
    model.save_pretrained(tmp_path / "adapter")
    assert all(".topo_routers." in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    logits = logits_of(model.eval(), IDS)
    assert not torch.allclose(logits, dense, atol=1e-4)
    reloaded = PeftModel.from_pretrained(quantised(), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(reloaded, IDS), logits)
    reloaded.merge_adapter()
    torch.testing.assert_close(logits_of(reloaded, IDS), logits, atol=1e-4, rtol=1e-4)
