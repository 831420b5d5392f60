"""The passes of layer-local distillation: each layer keeps its own dense attention (docs/method.md, section 5.2)."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from ..config import TopologyConfig
from ..core.dial import numbers_of_visits
from ..core.passes import Pass, changed
from ..forward import Attention
from ..layer import TopologyHost
from ..ops.objective import attach_loss, distillation_loss, gradient_at_once
from .densities import Map, TrainAt


class Distil(Pass):
    """The base runs, and every routed layer adds a loss of its own to `losses`.

    Args:
        num_queries, density_weight: as `topo_adapter.ops.objective.distillation_loss`.
        draw: of a step, where queries may visit several balls: says how many they all visit in it, one of the numbers
            that the dial chooses from. None: as many as the configuration has.
    """

    needs_probabilities = True
    trains = True

    def __init__(self, num_queries: int = 256, density_weight: float = 0.05, draw: str | None = None) -> None:
        self.num_queries, self.density_weight, self.draw = num_queries, density_weight, draw
        self.losses: list[Tensor] = []

    def in_force(self, config: TopologyConfig) -> TopologyConfig:
        if config.visits == 1 or self.draw is None:
            return config
        # a string seeds alike on every platform and in every process
        drawn = random.Random(f"{self.draw}/visits").choice(numbers_of_visits(config.visits, config.arity))
        return changed(config, visits=drawn, head_visits=None)

    def attend(self, attention: Attention) -> tuple[Tensor, Tensor | None]:
        if attention.call.merged:  # nothing is left to learn
            return attention.topology()
        attention.measured_plan()
        out = attention.base()
        self.losses.append(self.loss(attention))
        return out

    def loss(self, attention: Attention, keep_graph: bool = False) -> Tensor:
        """A layer's own; its graph is free to go, where gradients are asked for and it is not kept."""
        call, learning = attention.call, torch.is_grad_enabled()
        assert call.routes is not None  # asked for
        with torch.enable_grad():
            loss = distillation_loss(
                attention.query.detach(),
                attention.key.detach(),
                call.routes,
                call.visibility,
                attention.scoring,
                num_queries=self.num_queries,
                density_weight=self.density_weight,
            )
        active = call.host.in_force()
        assert active is not None  # or there would be no call
        return gradient_at_once(loss, list(active.router.parameters()), keep_graph) if learning else loss.detach()


class DistilBeside(Distil):
    """In a training on another loss, to which the routers owe nothing yet: each layer's rides on its output.

    Its gradient is scaled as the auxiliary loss's.
    """

    def takes(self, training: bool) -> bool:
        """Not what a trainer samples or evaluates, nor the first of two forwards under gradient checkpointing."""
        return training and torch.is_grad_enabled()

    def attend(self, attention: Attention) -> tuple[Tensor, Tensor | None]:
        attention.measured_plan()
        out, weights = attention.base()
        return _beside(out, self.loss(attention), attention.call.host), weights


class TrainBeside(TrainAt):
    """`TrainAt`, where each layer's own loss rides on its output too.

    What a loss at the model's end says of a router is noisy; the layer's dense attention says it of every pair.

    Args:
        weight: of the layers' own losses, > 0. local: what they are; None is the default.
    """

    def __init__(
        self, configs: list[TopologyConfig], maps: list[Map], weight: float = 1.0, local: Distil | None = None
    ) -> None:
        super().__init__(configs, maps)
        self.weight, self.local = weight, Distil() if local is None else local

    def attend(self, attention: Attention) -> tuple[Tensor, Tensor | None]:
        out, weights = attention.topology()
        learning = any(weight.requires_grad for weight in attention.call.host.parameters())
        if not (learning and attention.call.training and torch.is_grad_enabled()):
            return out, weights
        loss = self.local.loss(attention, keep_graph=True)  # of the routes, which the trainer's loss needs as well
        return _beside(out, loss, attention.call.host, self.weight), weights


def _beside(out: Tensor, loss: Tensor, host: TopologyHost, weight: float = 1.0) -> Tensor:
    host.metrics["local_loss"] = loss.detach()
    return attach_loss(out, weight * loss, host)
