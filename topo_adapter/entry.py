"""What a model with a topology refuses where it is called, because its layers could not say it or would say it late."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from . import auxiliary
from .errors import UnsupportedModelError
from .forward import uninstall
from .hf.gates import refused_attentions, text_decoder
from .layer import CHILD, TopologyHost, TopologyLayer, hosts

#: The method through which all of transformers' continuous batching goes (`generate_batch` among it).
_BATCHING = "init_continuous_batching"


def guard(model: nn.Module) -> None:
    """Make a model refuse continuous batching, and attention weights while a topology is in force; and its trained
    modules to stay aside while their adapter is in force. Idempotent."""
    first, *others = hosts(model)
    for host in others:
        host.schedule = first.schedule  # what is said of training is said once
    for name, wrapper in auxiliary.wrappers(model).items():
        if not any(getattr(hook, "func", None) is _refuse_idle for hook in wrapper._forward_pre_hooks.values()):
            wrapper.register_forward_pre_hook(functools.partial(_refuse_idle, first, name))
    for module in _callable_parts(model):
        if _refuse_attentions not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_refuse_attentions, with_kwargs=True)
    if hasattr(model, _BATCHING):
        # its own loop would swallow the error of a layer and return empty answers
        setattr(model, _BATCHING, _refuse_continuous_batching)


def unguard(model: nn.Module) -> None:
    """Undo `guard`."""
    for module in _callable_parts(model):
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _refuse_attentions:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    model.__dict__.pop(_BATCHING, None)


def discard(model: Any, adapter_name: str) -> None:
    """Take an adapter that was never used out of a model, a PeftModel or not; the last one takes the child modules
    along."""
    children = [layer for layer in hosts(model) if isinstance(layer, TopologyLayer)]
    if not any(adapter_name in layer.unused for layer in children):
        return  # it was trained or loaded before: a damaged file must not cost it
    for module in list(model.modules()):
        child: Any = getattr(module, CHILD, None)
        holds_it = isinstance(child, TopologyLayer) and adapter_name in child.topo_routers
        if holds_it:
            child.delete_adapter(adapter_name)
            if not child.topo_routers:
                uninstall(module)
    auxiliary.discard(model, adapter_name)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hosts(model):
        unguard(base)
    model.peft_config.pop(adapter_name, None)
    if not model.peft_config:
        base.__dict__.pop("peft_config", None)  # or PEFT takes the base for one that has adapters


def _callable_parts(model: Any) -> list[nn.Module]:
    """The model and, if it is another module, its text decoder."""
    decoder = text_decoder(model)
    return [model] if decoder is model else [model, decoder]


def _refuse_attentions(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    asked = kwargs.get("output_attentions")
    if asked is None:
        asked = getattr(getattr(model, "config", None), "output_attentions", False)
    if asked and any(host.replaces_attention() for host in hosts(model)):
        raise refused_attentions()


def _refuse_idle(host: TopologyHost, name: str, wrapper: Any, args: tuple[Any, ...]) -> None:
    if not isinstance(host, TopologyLayer) or host.disable_adapters:
        return
    active: Any = host.active_adapters
    idle = set(active) & (wrapper._get_available_adapters() - set(wrapper.active_adapters))
    if idle:
        raise UnsupportedModelError(
            f"{name} must run as the active adapter {min(idle)!r} has trained it, but an adapter of another method, "
            "added later, took it out of force: PEFT has one active adapter for all trained modules. Add that adapter "
            "first, or let it train no module of its own (modules_to_save, task_type)."
        )


def _refuse_continuous_batching(*args: Any, **kwargs: Any) -> None:
    raise UnsupportedModelError(
        "continuous batching (generate_batch) keeps keys in a paged cache, which holds no key addresses; call "
        "generate(), or unload() the adapter first"
    )
