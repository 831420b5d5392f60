"""Saving and loading a merged model: the base as transformers saves it, the topology beside it.

A topology is a mask, not a weight delta, so unlike LoRA it cannot disappear into the weights: the
directory holds the base model plus `topology/` with the adapter, and `load_merged` puts the two together
again. Loaded with `from_pretrained` alone, the directory is the dense base model.
"""

from __future__ import annotations

import os
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from .errors import UnsupportedModelError
from .layer import CHILD, MergedTopology

SUBFOLDER = "topology"


def save_merged(model: PreTrainedModel, directory: str | os.PathLike) -> None:
    """Save a model returned by `merge_and_unload()` whole.

    Raises:
        UnsupportedModelError: the model carries no merged topology (a PeftModel is saved by its own
            `save_pretrained`).
    """
    merged = {name: module for name, module in model.named_modules() if isinstance(module, MergedTopology)}
    if not merged or isinstance(model, PeftModel):
        raise UnsupportedModelError(
            f"model must come from merge_and_unload() of a topology adapter, got {type(model).__name__} without a "
            "merged topology; save adapters with their own save_pretrained"
        )
    child = f".{CHILD}."
    base = {key: value for key, value in model.state_dict().items() if child not in key}
    model.save_pretrained(directory, state_dict=base)
    folder = os.path.join(directory, SUBFOLDER)
    os.makedirs(folder, exist_ok=True)
    routers = {
        f"base_model.model.{name}.topo_routers.{key}": value.contiguous().cpu()
        for name, host in merged.items()
        for key, value in host.router.state_dict().items()
    }
    save_file(routers, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    next(iter(merged.values())).topology_config.save_pretrained(folder)


def load_merged(directory: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """Load what `save_merged` wrote; `kwargs` go to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        UnsupportedModelError: the directory has no `topology/` folder.
    """
    folder = os.path.join(directory, SUBFOLDER)
    if not os.path.isdir(folder):
        raise UnsupportedModelError(f"directory must have been written by save_merged, {folder!r} does not exist")
    model = AutoModelForCausalLM.from_pretrained(directory, **kwargs)
    return PeftModel.from_pretrained(model, folder).merge_and_unload()
