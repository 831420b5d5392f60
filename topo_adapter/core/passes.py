"""What a forward is for, beside its output: `with during(model, Record()) as routes: model(...)`.

A pass belongs to the thread that began it: forwards of other threads do not see it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from ..config import TopologyConfig
    from ..forward import Attention
    from ..ops.router import Router


class Pass:
    """An ordinary forward; the subclasses change what they are for.

    Attributes:
        needs_addresses: hard routes are asked for, also where the base would run or no head has a tree.
        needs_probabilities: the router's probabilities are asked for, with a gradient of their own.
        trains: layers that run again in a backward pass (gradient checkpointing) belong to it, in whatever thread.
    """

    needs_addresses = False
    needs_probabilities = False
    trains = False

    def takes(self, training: bool) -> bool:
        """Whether it is for a layer's forward; training: the layer's mode. A forward that is not taken is ordinary."""
        return True

    def in_force(self, config: TopologyConfig) -> TopologyConfig:
        """The adapter's configuration, as this forward runs it; the adapter's own is never written to."""
        return config

    def entered(self, router: Router, seen: Callable[[], tuple[Tensor, ...]], scale: float) -> None:
        """A layer's router is about to see what it reads of the tokens: `seen()`; scale: of the attention's scores."""

    def attend(self, attention: Attention) -> tuple[Tensor, Tensor | None]:
        """The attention's output `[B, T, H, D]`, and weights if the base returns any."""
        return attention.topology()


ORDINARY = Pass()
AnyPass = TypeVar("AnyPass", bound=Pass)


class Passes:
    """The passes that are under way in one layer, by thread."""

    def __init__(self) -> None:
        self._of: dict[int, list[Pass]] = {}

    def current(self) -> Pass:
        """The innermost pass of this thread, or of the thread that waits for the backward pass this one runs."""
        if not self._of:
            return ORDINARY
        if own := self._of.get(threading.get_ident()):
            return own[-1]
        if torch._C._current_graph_task_id() == -1:  # not in a backward pass, which has threads of its own
            return ORDINARY
        training = [stack[-1] for stack in list(self._of.values()) if stack and stack[-1].trains]
        if len(training) > 1:
            raise UnsupportedModelError("one thread at a time can train or calibrate a model, got several; use copies")
        return training[0] if training else ORDINARY

    def begin(self, new: Pass) -> None:
        self._of.setdefault(threading.get_ident(), []).append(new)

    def end(self) -> None:
        stack = self._of[threading.get_ident()]
        stack.pop()
        if not stack:
            del self._of[threading.get_ident()]

    def __deepcopy__(self, memo: Any) -> Passes:
        return Passes()


@contextmanager
def during(model: nn.Module, new: AnyPass) -> Iterator[AnyPass]:
    """While active, forwards of this thread through the routed layers of `model` are for `new`."""
    found = [p for module in model.modules() if isinstance(p := getattr(module, "passes", None), Passes)]
    for passes in found:
        passes.begin(new)
    try:
        yield new
    finally:
        for passes in found:
            passes.end()


def changed(config: TopologyConfig, **fields: Any) -> TopologyConfig:
    """A copy with other values, unchecked: depths of a map and the like have been."""
    new = copy.copy(config)
    new.__dict__.update(fields)
    return new
