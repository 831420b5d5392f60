"""What can be routed: attention modules when an adapter is attached, and what they are handed when they run.

Everything that transformers can hand an attention module is either modelled or refused here; nothing is guessed.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging

from ..core.device import graph_is_recorded
from ..errors import CacheError, UnsupportedModelError

if TYPE_CHECKING:
    from ..forward import TopologyCall

_log = logging.get_logger(__name__)

#: The kind of layer that is routed.
FULL = "full_attention"
#: What the topology computes with or checks, of the arguments of transformers' attention functions.
_MODELLED = {
    *("module", "query", "key", "value", "query_states", "key_states", "value_states", "attention_mask"),
    *("scaling", "dropout", "softcap", "sliding_window", "is_causal", "output_attentions", "kwargs"),
}
#: Acts on attention in some model; an eager function that names another such argument is noticed by its signature.
_NOT_MODELLED = {
    *("position_bias", "attention_bias", "s_aux", "sinks", "indices", "block_indices"),
    *("head_mask", "layer_head_mask"),
}
#: Arguments of an attention module's forward that make its keys another sequence's, or act on its scores.
_NOT_OWN_KEYS = (
    *(
        "key_value_states",
        "key_hidden_states",
        "value_hidden_states",
        "encoder_hidden_states",
        "cross_attention_states",
    ),
    *("encoder_attention_mask", "relative_distance", "prev_topk_indices", *sorted(_NOT_MODELLED)),
)
#: Arguments of an attention module's forward by which a model that runs its layers several times says which run it is.
_LOOPS = {"layer_idx", "loop_layer_idx", "cycle_offset", "cache_offset"}


@dataclass(frozen=True)
class Geometry:
    """What the child needs to know of its attention module."""

    layer: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of queries and keys


def text_decoder(model: Any) -> Any:
    """What makes a model's last hidden states, without its head; the model itself where it has no such part.

    transformers' `get_decoder` gives Llama 4's whole causal LM.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    decoder = model if decoder is None else decoder
    return decoder.model if hasattr(decoder, "lm_head") and hasattr(decoder, "model") else decoder


def find_full_attention(model: Any) -> list[str]:
    """Names of the full-attention modules of the text decoder, as suffixes where a suffix is enough.

    Layers with a sliding window, linear attention, or the keys of another layer are left as they are. In a model that
    mixes kinds of layers its own word for them stands, also where a window hides nothing.

    Raises:
        UnsupportedModelError: there is none.
    """
    inside = {id(module) for module in text_decoder(model).modules()}
    names: list[str] = []
    borrowing: list[int] = []
    windows: list[int] = []  # of layers whose window hides nothing
    refused: dict[str, str | None] = {}
    for name, module in model.named_modules():
        if id(module) not in inside or not _may_attend(module):
            continue
        causal = getattr(module, "is_causal", False) and isinstance(getattr(module, "layer_idx", None), int)
        full = causal and hasattr(module, "config") and layer_kind(module) == FULL
        if full and borrows_keys(module):
            borrowing.append(module.layer_idx)
        elif full and _mixes_kinds(module) and module.config.layer_types[module.layer_idx] != FULL:
            windows.append(module.layer_idx)
        elif full:
            names.append(name)
        else:
            refused.setdefault(type(module).__name__, why_not(module))
    if not names:
        reasons = "; ".join(
            f"{kind}: {reason or 'it does not say that it is causal.'}" for kind, reason in refused.items()
        )
        raise UnsupportedModelError(
            f"target_modules: found no full-attention module that can be routed in {type(model).__name__}. "
            + (reasons or "It has no attention module.")
        )
    if borrowing:
        _log.warning(
            "layers %s reuse the keys of other layers and stay dense; the other full layers are routed", borrowing
        )
    if windows:
        _log.warning(
            "layers %s have a sliding window that is not shorter than the model's positions and stay as they are; name "
            "their modules in target_modules to route them too",
            windows,
        )
    return shortest_names(model, names)


def shortest_names(model: nn.Module, names: list[str]) -> list[str]:
    """Names of modules, as suffixes where those find the same modules."""
    suffixes = {name.rsplit(".", 1)[-1] for name in names}
    matched = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in suffixes]
    return sorted(suffixes) if sorted(matched) == sorted(names) else names


def _may_attend(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() or hasattr(module, "is_causal")


def geometry_of(attention: Any, name: str) -> Geometry:
    """Read the geometry of an attention module and check that it can be routed.

    Raises:
        UnsupportedModelError: the module is not a causal full-attention module that dispatches through
            transformers' attention interface, or it uses a feature the topology does not model.
    """
    reason = why_not(attention)
    if reason is not None:
        raise UnsupportedModelError(f"target_modules: {name!r} ({type(attention).__name__}) cannot be routed: {reason}")
    config = attention.config
    if (per_layer := getattr(config, "per_layer_config", None)) is not None:  # heads may differ between layers
        config = per_layer[attention.layer_idx]
    projection = next((getattr(attention, n) for n in ("q_proj", "qkv_proj") if hasattr(attention, n)), None)
    hidden_size = getattr(projection, "in_features", config.hidden_size)
    heads = config.num_attention_heads
    groups = getattr(attention, "num_key_value_groups", None)  # the module's own number is the surest
    declared = not dataclasses.is_dataclass(config) or "num_key_value_heads" in _declared(config)
    kv_heads = heads // groups if groups else (declared and getattr(config, "num_key_value_heads", None)) or heads
    # multi-head latent attention has two dimensions, and more in its queries and keys
    width = getattr(attention, "qk_head_dim", None) or getattr(attention, "head_dim", None)
    width = width or getattr(config, "head_dim", None) or hidden_size // heads
    return Geometry(attention.layer_idx, hidden_size, heads, kv_heads, width)


def why_not(attention: Any) -> str | None:
    """Why a module cannot be routed, in words; None if it can."""
    forward = inspect.unwrap(type(attention).forward)
    if getattr(attention, "config", None) is None or not isinstance(getattr(attention, "layer_idx", None), int):
        return "it needs the attributes `config` and `layer_idx` of a transformers attention module."
    parameters = inspect.signature(forward).parameters
    takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    if "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names or not takes_any:
        return "its forward must pass **kwargs to transformers' attention interface."
    if loops := _LOOPS & parameters.keys():
        return f"its model runs it several times in a forward (its forward takes {', '.join(sorted(loops))})."
    if not getattr(attention, "is_causal", True):
        return "it is not causal."
    if borrows_keys(attention):
        return "it reuses the keys of another layer."
    if (kind := layer_kind(attention)) != FULL:
        what = "it has a sliding window" if kind == "sliding_attention" else f"it is of the layer type {kind!r}"
        return f"{what}; route full-attention layers only (see layers_to_transform)."
    if isinstance(getattr(attention, "sinks", None), nn.Parameter):
        return "its softmax has learned sink logits, which the topology does not model."
    return None


def borrows_keys(attention: Any) -> bool:
    """Whether a module attends to the keys of an earlier layer (Gemma 3n, Gemma 4)."""
    return bool(getattr(attention, "is_kv_shared_layer", False))


def layer_kind(attention: Any) -> str:
    """What a causal attention module attends to, in transformers' words: 'full_attention', 'sliding_attention', ...

    A window that is not shorter than the positions the model knows hides nothing, nor does one that the model's code
    never reads: both are full attention.
    """
    config = attention.config
    types = getattr(config, "layer_types", None)
    if types is not None:
        kind, window = types[attention.layer_idx], getattr(config, "sliding_window", None) or 1
        if kind != "sliding_attention":
            return kind
    elif hasattr(attention, "sliding_window"):
        window = attention.sliding_window
    else:
        window = getattr(config, "sliding_window", None)
        if not _reads_a_window(inspect.unwrap(type(attention).forward)):
            return FULL
    positions = config.max_position_embeddings if "max_position_embeddings" in _declared(config) else None
    hides_nothing = window is None or (positions is not None and window >= positions)
    return FULL if hides_nothing else "sliding_attention"


def _declared(config: Any) -> set[str]:
    """What a config has: an argument that it only carries along says nothing of the model."""
    return {field.name for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()


def _mixes_kinds(attention: Any) -> bool:
    return len(set(getattr(attention.config, "layer_types", None) or ())) > 1


def _reads_a_window(forward: Callable[..., Any]) -> bool:
    """Whether an attention module, or the masks of the model it is written beside, follow `config.sliding_window`."""
    return (
        "create_sliding_window_causal_mask" in forward.__globals__
        or "sliding_window" in forward.__code__.co_names
        or "sliding_window" in forward.__code__.co_consts
    )


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes; the weights of one that accelerate offloads are elsewhere until then."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(module.parameters()).device


def eager_attention_of(kind: type[nn.Module]) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
    """The eager attention function of the model that a kind of attention module belongs to."""
    return inspect.unwrap(kind.forward).__globals__.get("eager_attention_forward")


def acting_arguments(kind: type[nn.Module]) -> list[str]:
    """Arguments by which a module's attention functions act on attention, but for those that the topology models."""
    functions = [function for function in (eager_attention_of(kind), sdpa_attention_forward) if function is not None]
    named = {name for function in functions for name in inspect.signature(function).parameters}
    return sorted((named | _NOT_MODELLED) - _MODELLED)


def refuse_inputs(layer: int, inputs: dict[str, Any]) -> None:
    """Check what a routed module is called with, by name.

    Raises:
        UnsupportedModelError: it is to attend to something else than its own hidden states.
    """
    for name in _NOT_OWN_KEYS:
        if inputs.get(name) is not None:
            raise UnsupportedModelError(
                f"layer {layer} is called with {name!r}, which the topology does not model; leave the layer out with "
                "layers_to_transform."
            )


def refuse_heads(geometry: Geometry, query: Tensor) -> None:
    """Raises UnsupportedModelError unless there are as many query heads as the config says; query: `[B, H, T, D]`."""
    if query.shape[1] != geometry.num_heads:
        raise UnsupportedModelError(
            f"layer {geometry.layer} must have {geometry.num_heads} query heads as its config says, got "
            f"{query.shape[1]}"
        )


def refuse_unmodelled(
    module: nn.Module, call: TopologyCall, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
) -> None:
    """Check everything that reaches a routed module's attention against what was prepared for it.

    Args:
        query: `[B, H, T, D]`; key: `[B, H_kv, S, D]`. mask, kwargs: what else the attention function was called with.

    Raises:
        UnsupportedModelError, CacheError: it is something that the topology does not model, or not what the hook saw.
    """
    layer = call.host.geometry.layer
    if kwargs.get("dropout"):
        raise UnsupportedModelError(
            f"attention dropout must be 0 in routed layers, got {kwargs['dropout']} in layer {layer}; set "
            "model.config.attention_dropout = 0 before loading."
        )
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedModelError(
            f"attention must be causal in routed layers, got is_causal=False in layer {layer}; disable the adapter for "
            "bidirectional use, or leave the layer out with layers_to_transform."
        )
    window = kwargs.get("sliding_window")
    if window is not None and window < key.shape[2]:
        raise UnsupportedModelError(
            f"layer {layer} passes a sliding_window of {window} tokens to its attention of {key.shape[2]} keys, which "
            "the topology does not model; leave the layer out with layers_to_transform, or read shorter texts."
        )
    for name in call.host.acting_arguments:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"layer {layer} passes {name!r} to its attention, which the topology does not model; leave the "
                "layer out with layers_to_transform."
            )
    if kwargs.get("output_attentions"):
        raise refused_attentions()
    addressed = call.visibility.query.position.shape[1], call.visibility.keys.count
    if (query.shape[2], key.shape[2]) != addressed:
        raise CacheError(
            f"layer {layer} attends with {query.shape[2]} queries to {key.shape[2]} keys, but the topology has "
            f"addresses for {addressed[0]} and {addressed[1]}: {type(module).__name__} got its "
            "cache under a name that was not recognised, or keeps keys elsewhere. Use a DynamicCache or StaticCache, "
            "or use_cache=False."
        )
    if not _same_mask(mask, call.arrival.mask):
        raise UnsupportedModelError(
            f"layer {layer} must attend with the attention_mask it is given, but {type(module).__name__} changes it; "
            "the topology would not see what it hides. Leave the layer out with layers_to_transform."
        )


def refused_attentions() -> UnsupportedModelError:
    return UnsupportedModelError(
        "output_attentions must be False with a topology in force, got True: routed layers make no attention weights. "
        "record_routes says what each query sees; disable_adapter() gives the dense model's weights."
    )


def _same_mask(mask: Any, read: Any) -> bool:
    """Whether a mask is the one that was read, or a view of its first columns."""
    if mask is read:
        return True
    if not (isinstance(mask, Tensor) and isinstance(read, Tensor)) or mask.dtype != read.dtype:
        return False
    if graph_is_recorded():  # addresses are not known then
        return mask.shape[:-1] == read.shape[:-1]
    same_place = mask.data_ptr() == read.data_ptr() and mask.stride() == read.stride()
    return same_place and mask.shape[:-1] == read.shape[:-1] and mask.shape[-1] <= read.shape[-1]
