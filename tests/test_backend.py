"""The table of what kernels can do, and `why_not`, which says it of a model."""

from __future__ import annotations

import copy
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from peft_helpers import HEADS, KV_HEADS, ROUTED, logits_of, loss_of, routed, router_gradients, tiny, tokens
from torch import Tensor

from topo_adapter import UnsupportedModelError, kernel_report, why_not
from topo_adapter.core.passes import during
from topo_adapter.ops import backend
from topo_adapter.ops.backend import LIMITS, device_misfits, forced, kernels_serve, misfits
from topo_adapter.training.distil import Distil

CPU = "the device must be a CUDA GPU, got cpu"
LEAVES = "arity ** depth must be at most 256, got 512"
NARROW = "the head dimension must be 16 to 256, got 8, 8"


@pytest.mark.parametrize(
    ("operation", "sizes", "reasons"),
    [
        ("attend", {"widths": (64, 64)}, []),
        ("attend", {"widths": (8, 8)}, [NARROW]),
        ("attend", {"widths": (192, 128)}, ["queries, keys and values must have one head dimension, got 192, 128"]),
        ("attend", {"leaves": 4096, "homotopy": 0.5, "router_dim": 999}, []),
        ("decode", {"visits": 8}, []),
        ("decode", {"visits": 9}, ["queries must visit at most 8 balls, got 9"]),
        ("route", {"visits": 3}, ["queries must visit one ball, got 3"]),
        ("route", {"digit_logits": 256, "channels": 256}, []),
        ("route", {"channels": 512}, ["heads must have at most 256 channels with router_input='heads', got 512"]),
        ("bridge", {"leaves": 512, "homotopy": 0.5}, [LEAVES, "homotopy must be 1, got 0.5"]),
        ("distil", {"leaves": 256, "homotopy": 0.0}, []),
        ("distil", {"leaves": 512}, [LEAVES]),
        ("route", {"router_dim": 129}, ["router_dim must be at most 128, got 129"]),
        ("plan", {"leaves": 4096}, []),
    ],
    ids=str,
)
def test_misfits(operation: Any, sizes: dict[str, Any], reasons: list[str]) -> None:
    assert misfits(operation, **sizes) == reasons


def test_the_table_is_that_of_the_kernels() -> None:
    topo_kernels = pytest.importorskip("topo_kernels")
    assert LIMITS["route"].router_dim == topo_kernels.MAX_ROUTER_WIDTH
    assert LIMITS["bridge"].leaves == LIMITS["distil"].leaves == topo_kernels.MAX_TILE_LEAVES
    for width in (15, 257):
        with pytest.raises(ValueError, match="from 16 to 256"):
            q = torch.zeros(1, 1, 4, width)
            topo_kernels.topology_attention(q, q, q, mock.Mock(), mock.Mock(scale=1.0, softcap=None))


def test_no_kernel_runs_on_a_cpu() -> None:
    assert device_misfits(torch.device("cpu"), torch.float32) == [CPU]
    assert not kernels_serve("plan", torch.zeros(1))


def test_forced_is_for_a_while_and_for_what_it_names() -> None:
    tensor = torch.zeros(1)
    with forced(True, "route"):
        assert kernels_serve("route", tensor, router_dim=8) and not kernels_serve("plan", tensor)
        assert not kernels_serve("route", tensor, router_dim=1000)  # no kernel has room for it
        with forced(False):
            assert not kernels_serve("route", tensor)
        assert kernels_serve("route", tensor)
    assert not kernels_serve("route", tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_words_and_predicate_agree_on_a_gpu(dtype: torch.dtype) -> None:
    tensor = torch.zeros(1, dtype=dtype, device="cuda")
    assert kernels_serve("plan", tensor) == (not device_misfits(tensor.device, dtype))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`why_not` of a model as if it were on a GPU."""
    monkeypatch.setattr(kernel_report, "device_misfits", lambda *_: [])


def test_why_not_names_the_device() -> None:
    found = why_not(routed(tiny("gemma2")))
    assert list(found) == ROUTED["gemma2"]
    assert all(set(each) == set(LIMITS) - {"visits"} and each["attend"][0] == CPU for each in found.values())


@pytest.mark.usefixtures("on_gpu")
def test_why_not_of_a_model_that_fits_is_empty() -> None:
    model = routed(tiny(hidden_size=64))
    assert why_not(model) == {}
    model.peft_config["default"].homotopy = 0.5
    assert why_not(model) == {layer: {"bridge": ["homotopy must be 1, got 0.5"]} for layer in range(4)}


@pytest.mark.usefixtures("on_gpu")
def test_why_not_of_several_visits() -> None:
    model = routed(tiny(hidden_size=64), visits=4)
    reason = ["queries must visit one ball, got 4"]
    assert why_not(model) == {layer: {"route": reason} for layer in range(4)}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_several_visits_run_on_kernels_as_in_torch(device: str) -> None:
    """Merged, in force and in distillation, with heads of one layer that have their own numbers of visits."""
    pytest.importorskip("topo_kernels")
    settings: dict[str, Any] = {"visits": 3, "head_visits": {0: [3, 1, 2, 3]}, "visible_depth": {0: [3, 2, 1, 5]}}
    model = routed(tiny(hidden_size=64, num_hidden_layers=1), density_weight=1.0, **settings)
    model, ids = model.to(device), tokens(1, 14).to(device)

    def outcomes(kernels: bool) -> list[Tensor]:
        with forced(kernels):
            found = [logits_of(model, ids)]
            model.zero_grad()
            loss_of(model.train(), ids).backward()
            found += router_gradients(model).values()
            with during(model, Distil(num_queries=99)) as distilled:
                model(input_ids=ids)
            found.append(distilled.losses[0].detach())
            merged = copy.deepcopy(model.eval()).merge_and_unload()
            return [*found, logits_of(merged, ids)]

    torch.manual_seed(0)
    served = outcomes(True)
    torch.manual_seed(0)
    for with_kernels, without in zip(served, outcomes(False), strict=True):
        torch.testing.assert_close(with_kernels, without, rtol=2e-3, atol=2e-5)
    model.peft_config["default"].head_visits = {0: [1] * HEADS}
    assert (logits_of(model, ids) - served[0]).abs().max() > 1e-2


@pytest.mark.usefixtures("on_gpu")
def test_why_not_looks_at_each_layer() -> None:
    settings: dict[str, Any] = {"depth": 9, "router_dim": 130, "route_per": "kv_head"}
    model = routed(tiny(), visible_depth={1: 9, 2: [0] * KV_HEADS}, **settings)
    found = why_not(model)
    assert found[1]["bridge"] == [NARROW, LEAVES] and found[2]["bridge"] == [NARROW]
    assert found[2]["distil"] == [NARROW, LEAVES] and found[3]["route"] == ["router_dim must be at most 128, got 130"]
    model.merge_adapter()
    assert set(why_not(model)[1]) == {"route", "attend", "decode"}, "nothing trains in a merged model"
    assert why_not(model.merge_and_unload())[1]["attend"] == [NARROW]


def test_why_not_needs_a_topology() -> None:
    with pytest.raises(UnsupportedModelError, match="active"):
        why_not(tiny())


def test_slow_training_is_said_once() -> None:
    backend.warn_of_slow_training.cache_clear()
    with pytest.warns(UserWarning, match=r"O\(N\^2\) in the length: homotopy must be 1, got 0.5"):
        backend.warn_of_slow_training("homotopy must be 1, got 0.5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.warn_of_slow_training("homotopy must be 1, got 0.5")
