"""The layer-local stage: every layer learns to keep its own dense attention (docs/method.md, section 5.2)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..core.passes import during
from ..errors import UnsupportedModelError
from .callback import TopologyCallback
from .distil import Distil
from .trainer import TopologyTrainerMixin


class DistillationTrainer(TopologyTrainerMixin):
    """Layer-local distillation of the frozen model's own attention (docs/method.md, section 5.2).

    No backward through the LLM and no language-model loss: every routed layer learns on its own to keep its
    dense attention's mass at every depth of the tree. Any tokenised text will do; labels are not used.

    Args:
        num_queries: queries sampled per layer and step; cost is linear in it.
        density_weight: nats of kept mass that the density of evenly filled balls may cost.
        Other arguments: as `transformers.Trainer`.
    """

    def __init__(self, *args: Any, num_queries: int = 256, density_weight: float = 0.05, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_queries, self.density_weight = num_queries, density_weight
        self.model_accepts_loss_kwargs = False  # our loss is a mean; let the trainer divide it when accumulating

    def default_topology_callback(self) -> TopologyCallback:
        return TopologyCallback(homotopy=None)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
        adapter = self.accelerator.unwrap_model(model)
        if "logits_to_keep" in inspect.signature(adapter.get_base_model().forward).parameters:
            inputs["logits_to_keep"] = 1  # nobody looks at the logits
        draw = f"{self.args.seed}/{self.state.global_step}" if model.training else None
        with during(model, Distil(self.num_queries, self.density_weight, draw)) as distilled:
            # an output of the forward: what DistributedDataParallel does not find there it takes for unused
            hook = adapter.register_forward_hook(lambda *args: (args[-1], _mean(distilled.losses)))
            try:
                outputs, loss = model(**inputs)
            finally:
                hook.remove()
        return (loss, outputs) if return_outputs else loss


def _mean(losses: list[Tensor]) -> Tensor:
    if not losses:
        raise UnsupportedModelError("model must have an active, enabled topology adapter; see get_peft_model")
    return torch.stack([value.to(losses[0].device) for value in losses]).mean()
