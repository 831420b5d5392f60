"""What a forward is for is known per call: threads, nested passes, and configurations that stay as they were."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model
from peft_helpers import logits_of, routed, tiny, tokens
from torch import Tensor

from topo_adapter import TopologyConfig, UnsupportedModelError, calibrate, record_routes
from topo_adapter.core.passes import ORDINARY, Pass, changed, during
from topo_adapter.layer import hosts


class Train(Pass):
    trains = True


def test_threads_record_their_own_routes() -> None:
    """One thread records while others run, and two record different texts at once."""
    model = routed(tiny(num_hidden_layers=2))
    texts = [tokens(1, 30, seed) for seed in range(4)]
    alone = [record_routes(model, text) for text in texts]

    def record(index: int) -> bool:
        found = record_routes(model, texts[index])
        logits_of(model, texts[-1 - index])
        return all(
            torch.equal(found[layer].key_digits, routes.key_digits) and found[layer].visits.shape == (1, 4, 1, 30)
            for layer, routes in alone[index].items()
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(record, [0, 1, 2, 3] * 10))
    assert all(host.passes.current() is ORDINARY for host in hosts(model))


def test_the_innermost_pass_is_in_force_and_ends_with_its_block() -> None:
    model = routed(tiny(num_hidden_layers=1))
    (host,) = hosts(model)
    with during(model, Pass()) as outer:
        with pytest.raises(ZeroDivisionError), during(model, Pass()) as inner:
            assert host.passes.current() is inner
            raise ZeroDivisionError
        assert host.passes.current() is outer
        assert copy.deepcopy(model.base_model.model.model.layers[0].self_attn.topo_adapter).passes.current() is ORDINARY
    assert host.passes.current() is ORDINARY


def seen_in_backward(model: torch.nn.Module) -> Pass | UnsupportedModelError:
    """The pass that a backward pass in a thread of its own, as autograd's are on a GPU, finds, or its error."""
    (host,) = hosts(model)
    found: list[Pass | UnsupportedModelError] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            try:
                found.append(host.passes.current())
            except UnsupportedModelError as error:
                found.append(error)
            return grad

    thread = threading.Thread(target=lambda: Look.apply(torch.ones(1, requires_grad=True)).sum().backward())
    thread.start()
    thread.join()
    (seen,) = found
    return seen


def test_backward_passes_find_the_training_that_waits_for_them() -> None:
    """Gradient checkpointing runs layers again there; a recording of another thread is none of its business."""
    model = routed(tiny(num_hidden_layers=1))
    with during(model, Train()) as training:
        assert seen_in_backward(model) is training
    with during(model, Pass()):
        assert seen_in_backward(model) is ORDINARY


def test_two_trainings_of_one_model_at_once_are_refused() -> None:
    model = routed(tiny(num_hidden_layers=1))
    ready, done = threading.Event(), threading.Event()

    def other() -> None:
        with during(model, Train()):
            ready.set()
            done.wait()

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait()
    with during(model, Train()):
        seen = seen_in_backward(model)
    done.set()
    thread.join()
    assert isinstance(seen, UnsupportedModelError) and "one thread at a time" in str(seen)


def test_a_configuration_serves_several_models_and_stays_as_it_was() -> None:
    config = TopologyConfig(depth=4, visible_depth=2, local_window=3, num_sink_tokens=2, router_dim=8)
    before = config.to_dict()
    first, second = (get_peft_model(tiny(num_hidden_layers=2, seed=seed), config) for seed in (0, 1))
    calibrate(first, tokens(2, 40), target_density=0.5)
    first.peft_config["default"].homotopy = 1.0
    own = second.peft_config["default"]
    assert (own.homotopy, own.visible_depth, own.calibration) == (0.0, 2, None)
    after = {**config.to_dict(), "base_model_name_or_path": before["base_model_name_or_path"]}  # PEFT writes that
    assert after == before
    second.add_adapter("another", own)
    second.peft_config["another"].homotopy = 0.5
    assert own.homotopy == 0.0


def test_a_changed_configuration_is_another_object() -> None:
    config = TopologyConfig(visible_depth=2)
    new = changed(config, visible_depth={0: [1, 2]}, homotopy=1.0)
    assert (new.visible_depth, new.homotopy) == ({0: [1, 2]}, 1.0) and (config.visible_depth, config.homotopy) == (2, 0)
