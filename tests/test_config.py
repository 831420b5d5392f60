"""`TopologyConfig`: what it refuses, what it saves, and the depth of each head."""

import json
import math
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig
from peft.utils import PeftType

from topo_adapter import TopologyConfig, TopologyConfigError
from topo_adapter.config import MAX_LEAVES
from topo_adapter.core.tree import num_balls

INTEGERS: tuple[Any, ...] = (True, 2.0, "2", [2])
NUMBERS: tuple[Any, ...] = (math.nan, math.inf, -math.inf, True, False, "0.5", None, [0.5], 1j)

BAD: dict[str, tuple[Any, ...]] = {
    "arity": (1, 0, -2, None, *INTEGERS),
    "depth": (0, -1, None, *INTEGERS),
    "visible_depth": (
        -1,
        10,  # depth is 8
        *INTEGERS,
        {0: 10},
        {0: -1},
        {0: True},
        {0: None},
        {0: "3"},
        {0: {1: 2}},
        {0: [1, 10]},
        {0: [1, True]},
        {0: [1, 2.0]},
        {-1: 3},
        {10**9: 3},
        {"-1": 3},
        {"first": 3},
        {1.0: 3},
        {True: 3},
        {None: 3},
        {(0, 1): 3},
    ),
    "visits": (0, -1, 9, None, *INTEGERS),
    "head_visits": (2, {0: 1}, {0: [0]}, {0: [2]}, {0: [True]}, {-1: [1]}, {"a": [1]}, {0: [1], "0": [1]}, [[1]]),
    "router_input": ("head", "", None, True, ["heads"]),
    "router_dim": (0, -1, 10**9, *INTEGERS),
    "tie_query_key": (0, 1, None, "yes"),
    "route_per": ("head", "", None, True, ["query_head"]),
    "depth_per": ("head", "kv_head", None, True),
    "local_window": (0, -1, None, 2**31, *INTEGERS),
    "num_sink_tokens": (-1, None, 10**30, *INTEGERS),
    "init_weights": ("zeros", "", None, True, False),
    "homotopy": (-0.01, 1.01, *NUMBERS),
    "temperature": (0, 0.0, -1.0, *NUMBERS),
    "gumbel_noise": (0, 1, None, "no"),
    "gradient_bridge": ("soft", "", None, True),
    "balance_weight": (-0.01, *NUMBERS),
    "density_weight": (-0.01, *NUMBERS),
    "target_density": (0.0, 1.5, float("nan"), "0.5", True, 0.5),  # the last is right, but there is no calibration
    "calibration": (True, {}, [], {"length": 4}, {"length": 0, "heads_per_route": 1, "density": {}, "loss": {}}),
    "training_runs": (
        True,
        {},
        [],
        [{}] * 33,
        [3],
        [{"path": "x"}],
        [{"data": "x" * 201}],
        [{"data": ["x"]}],
        [{"steps": -1}],
        [{"steps": 2**63}],
        [{"steps": 1.0}],
        [{"steps": True}],
        [{"seconds": math.nan}],
        [{"seconds": math.inf}],
        [{"seconds": 10**400}],
        [{"versions": "1"}],
        [{"versions": {"torch": 2}}],
        [{"versions": {str(n): "1" for n in range(21)}}],
    ),
    "base_fingerprint": ("", "00", 0, True, "g" * 128, b"00" * 64),
    "base_facts": (True, "llama", []),
    "weights_digest": ("", "00", 0, True, "g" * 64, b"00" * 32),
    "format_version": (0, 2, -1, None, *INTEGERS),
    "target_modules": (3, True, [1], ["self_attn", None], {"self_attn": 1}),
    "exclude_modules": (3, True, [1], ["self_attn", None], {"self_attn": 1}),
    "modules_to_save": ("lm_head", True, [1], [""], {"lm_head": 1}),
    "trainable_token_indices": (5, "5", [], [-1], [True], [1.0], {"embed_tokens": 5}, {"embed_tokens": ["5"]}),
    "layers_to_transform": (-1, 10**9, True, 1.5, "1", [0, -1], [True], [1.0], ["1"], {0: 1}),
}

GOOD: dict[str, tuple[Any, ...]] = {
    "arity": (2, 3, 10),
    "depth": (5, 12),
    "visible_depth": (0, 5, 8, 9, {}, {3: 9}, {0: 0, 7: [1, 2, 3, 9]}),
    "visits": (1, 8),
    "head_visits": (None, {}, {3: [1, 1]}),
    "router_input": ("hidden_states", "heads"),
    "router_dim": (1, None),
    "tie_query_key": (True, False),
    "route_per": ("query_head", "kv_head"),
    "depth_per": ("route", "query_head"),
    "local_window": (1, 4096),
    "num_sink_tokens": (0, 4096),
    "init_weights": ("random", "collapse"),
    "homotopy": (0, 0.0, 0.5, 1, 1.0),
    "temperature": (1e-9, 0.1, 1, 10),
    "gumbel_noise": (True, False),
    "gradient_bridge": ("full", "masked"),
    "balance_weight": (0, 0.0, 3),
    "density_weight": (0, 0.0, 3),
    "target_density": (None,),
    "calibration": (
        None,
        {"length": 200, "heads_per_route": 1, "density": {1: [[1.0] * 10]}, "loss": {1: [[0.0] * 10]}},
    ),
    "training_runs": (
        None,
        [{}],
        [{"data": "books", "steps": 3, "tokens": 2**40, "seconds": 1, "versions": {"torch": "2"}}] * 32,
    ),
    "base_fingerprint": (None, "0f" * 64),
    "base_facts": (None, {}, {"model_type": "llama"}),
    "weights_digest": (None, "0f" * 32),
    "format_version": (1,),
    "target_modules": (None, "self_attn", {"self_attn"}, r".*\.[0-3]\.self_attn"),
    "exclude_modules": (None, "self_attn", {"self_attn"}, r".*\.[0-3]\.self_attn"),
    "modules_to_save": (None, [], ["lm_head", "score"]),
    "trainable_token_indices": (None, [0, 5], {"embed_tokens": [3]}),
    "layers_to_transform": (None, 0, [], [0, 3]),
}


def cases(table: dict[str, tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={value!r}") for name, values in table.items() for value in values]


def test_tables_name_every_field() -> None:
    own = {f.name for f in fields(TopologyConfig)} - {f.name for f in fields(PeftConfig)}
    assert own == set(BAD) == set(GOOD)


def test_every_field_is_documented() -> None:
    for field in fields(TopologyConfig):
        if field.name in BAD:
            assert len(field.metadata["help"]) > 20, field.name


def test_defaults() -> None:
    config = TopologyConfig()
    assert config.peft_type == PeftType.TOPOLOGY
    assert (config.arity, config.depth, config.visible_depth) == (2, 8, 5)
    assert config.homotopy == 0, "a fresh adapter is the base model"
    assert not config.tie_query_key and config.visits == 1
    assert config == TopologyConfig() != TopologyConfig(visible_depth=4)


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_refuses(name: str, value: Any) -> None:
    with pytest.raises(TopologyConfigError, match=rf"^{name}\b.* must be .*got "):
        TopologyConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("visible_depth", {"9" * 5000: 3}),
        ("target_modules", [f"layer_{i}" for i in range(10_001)]),
        ("homotopy", 10**400),
        ("arity", 10**400),
        ("depth", 10**30),
        ("depth", 10**9),
    ],
    ids=lambda value: str(value)[:9],
)
def test_refuses_at_once_what_no_model_has(name: str, value: Any) -> None:
    start = time.process_time()
    with pytest.raises(TopologyConfigError) as caught:
        TopologyConfig(**{name: value})
    assert time.process_time() - start < 0.1 and name in str(caught.value) and len(str(caught.value)) < 800


@pytest.mark.parametrize(("name", "value"), cases(GOOD))
def test_accepts(name: str, value: Any) -> None:
    small = {"visible_depth": 0, "depth": 3} if name in ("arity", "depth") else {}
    assert getattr(TopologyConfig(**{**small, name: value}), name) == value


@pytest.mark.parametrize(("arity", "depth"), [(2, 12), (4096, 1), (64, 2), (3, 7)])
def test_leaves_are_limited(arity: int, depth: int) -> None:
    assert arity**depth <= MAX_LEAVES < arity ** (depth + 1)
    TopologyConfig(arity=arity, depth=depth, visible_depth=depth)
    with pytest.raises(
        TopologyConfigError, match=f"^arity .* depth must be at most {MAX_LEAVES}.*lower depth or arity"
    ):
        TopologyConfig(arity=arity, depth=depth + 1, visible_depth=1)


def test_visible_depth_is_limited_by_depth() -> None:
    TopologyConfig(depth=3, visible_depth=4)
    with pytest.raises(TopologyConfigError, match=r"visible_depth must be an integer in 0\.\.4, got 5"):
        TopologyConfig(depth=3, visible_depth=5)
    with pytest.raises(TopologyConfigError, match=r"visible_depth\[2\] must be an integer in 0\.\.4, got 5"):
        TopologyConfig(depth=3, visible_depth={2: [3, 5]})


@pytest.mark.parametrize(("arity", "depth", "sparsest"), [(2, 11, 12), (2, 12, 12), (63, 2, 3), (64, 2, 2)])
def test_the_level_below_the_leaves_needs_room_for_one_more_ball(arity: int, depth: int, sparsest: int) -> None:
    config = TopologyConfig(arity=arity, depth=depth, visible_depth=sparsest)
    assert config.sparsest_depth == sparsest
    assert num_balls(arity, depth, sparsest) <= MAX_LEAVES
    with pytest.raises(TopologyConfigError, match=rf"visible_depth must be an integer in 0\.\.{sparsest}, got"):
        TopologyConfig(arity=arity, depth=depth, visible_depth=sparsest + 1)


def test_the_error_is_a_value_error_of_this_library() -> None:
    from topo_adapter import TopologyError

    assert issubclass(TopologyConfigError, TopologyError) and issubclass(TopologyConfigError, ValueError)


# ---------------------------------------------------------------- files

SAVED: list[dict[str, Any]] = [
    {},
    {"visible_depth": 3, "arity": 3, "depth": 4, "homotopy": 1, "layers_to_transform": [0, 2]},
    {"visible_depth": {}, "visits": 4},
    {"visible_depth": {0: 3, 11: [1, 2, 3, 4], 2: 0}, "route_per": "kv_head", "router_dim": None},
    {"homotopy": 0.375, "temperature": 0.1, "target_modules": {"self_attn"}, "gradient_bridge": "masked"},
]


@pytest.mark.parametrize("settings", SAVED, ids=str)
def test_survives_a_file(settings: dict[str, Any], tmp_path: Path) -> None:
    config = TopologyConfig(**settings)
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is TopologyConfig
    assert loaded == config
    assert loaded.peft_type == PeftType.TOPOLOGY
    for name, value in settings.items():
        assert getattr(loaded, name) == value
    if isinstance(loaded.visible_depth, dict):
        assert all(type(layer) is int for layer in loaded.visible_depth)


def test_a_file_from_before_visits_has_one(tmp_path: Path) -> None:
    TopologyConfig(visits=3).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    fields_of_file = json.loads(file.read_text())
    assert fields_of_file.pop("visits") == 3
    file.write_text(json.dumps(fields_of_file))
    assert PeftConfig.from_pretrained(str(tmp_path)) == TopologyConfig()


def test_a_bad_file_is_refused(tmp_path: Path) -> None:
    TopologyConfig(visible_depth={1: 2}).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    assert saved["visible_depth"] == {"1": 2} and saved["peft_type"] == "TOPOLOGY"
    path.write_text(json.dumps(saved | {"visible_depth": {"1": 99}}))
    with pytest.raises(TopologyConfigError, match=r"visible_depth\[1\]"):
        PeftConfig.from_pretrained(str(tmp_path))


# ---------------------------------------------------------------- depths

HEADS, KV_HEADS = 4, 2


@pytest.mark.parametrize(
    ("visible_depth", "route_per", "expected"),
    [
        (3, "query_head", {0: [3, 3, 3, 3], 9: [3, 3, 3, 3]}),
        (0, "query_head", {0: [0, 0, 0, 0]}),
        ({}, "query_head", {0: [0, 0, 0, 0]}),
        ({1: 3}, "query_head", {0: [0, 0, 0, 0], 1: [3, 3, 3, 3]}),
        ({"1": 3}, "query_head", {0: [0, 0, 0, 0], 1: [3, 3, 3, 3]}),
        ({0: [1, 2, 3, 4], 1: 5}, "query_head", {0: [1, 2, 3, 4], 1: [5, 5, 5, 5], 2: [0, 0, 0, 0]}),
        ({0: (1, 2, 3, 4)}, "kv_head", {0: [1, 2, 3, 4]}),
        ({0: [1, 2]}, "kv_head", {0: [1, 1, 2, 2]}),
        (3, "kv_head", {0: [3, 3, 3, 3]}),
    ],
)
def test_depths_of_layer(visible_depth: Any, route_per: str, expected: dict[int, list[int]]) -> None:
    config = TopologyConfig(visible_depth=visible_depth, route_per=route_per)
    for layer, depths in expected.items():
        assert config.depths_of_layer(layer, HEADS, KV_HEADS) == depths


@pytest.mark.parametrize(
    ("depths", "route_per", "message"),
    [
        ([1, 2], "query_head", r"visible_depth\[5\] must have 4 entries \(query heads\), got 2: \[1, 2\]"),
        ([1, 2, 3], "query_head", r"must have 4 entries \(query heads\), got 3"),
        ([1, 2, 3], "kv_head", r"must have 4 entries \(query heads\) or 2 \(KV heads\), got 3"),
        ([], "kv_head", "got 0"),
    ],
)
def test_refuses_another_number_of_heads(depths: list[int], route_per: str, message: str) -> None:
    config = TopologyConfig(visible_depth={5: depths}, route_per=route_per)
    assert config.depths_of_layer(4, HEADS, KV_HEADS) == [0, 0, 0, 0]
    with pytest.raises(TopologyConfigError, match=message):
        config.depths_of_layer(5, HEADS, KV_HEADS)


def test_visits_of_layer() -> None:
    config = TopologyConfig(visits=3, head_visits={"1": [1, 3, 2, 1]})  # type: ignore[dict-item]
    assert config.visits_of_layer(0, HEADS) == [3, 3, 3, 3] and config.visits_of_layer(1, HEADS) == [1, 3, 2, 1]
    with pytest.raises(TopologyConfigError, match=r"head_visits\[1\] must have 2 entries \(query heads\), got 4"):
        config.visits_of_layer(1, 2)


def test_depths_are_copies() -> None:
    config = TopologyConfig(visible_depth={0: [1, 2, 3, 4]})
    config.depths_of_layer(0, HEADS, KV_HEADS)[0] = 7
    assert config.depths_of_layer(0, HEADS, KV_HEADS) == [1, 2, 3, 4]


@pytest.mark.parametrize(("depth", "expected"), [(8, 5), (5, 5), (3, 3), (1, 1)])
def test_visible_depth_by_default_fits_the_tree(depth: int, expected: int) -> None:
    assert TopologyConfig(depth=depth).visible_depth == expected
    with pytest.raises(TopologyConfigError, match="visible_depth"):
        TopologyConfig(depth=depth, visible_depth=depth + 2)
