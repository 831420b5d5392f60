"""What marks the base model of an adapter: bases of one shape are easily taken for one another."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

_ENTRIES = 64
_SIZES = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
_KINDS = ("model_type", "vocab_size", "rope_parameters")
#: Cosine similarity of marks below which bases are taken for different ones. Unrelated embeddings have 0 with a
#: standard deviation of 1 / 8; fine-tuning, merging and another dtype leave them nearly as they were.
_SAME = 0.8


def fingerprint(model: nn.Module) -> str | None:
    """64 entries of the input embedding, from its first 256 rows, as signed bytes in hexadecimal.

    None where they cannot be read here: no input embedding, a meta or quantized weight, or one that is sharded.
    """
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        weight = getattr(embedding, "original_module", embedding).weight  # an adapter's trained one is not the base's
    except (AttributeError, NotImplementedError):
        return None
    plain = type(weight.detach()) in (Tensor, nn.Parameter) and weight.dim() == 2 and weight.numel() > 0
    if not plain or weight.is_meta or not weight.is_floating_point():
        return None
    index = torch.arange(_ENTRIES, device=weight.device)
    entries = weight.detach()[4 * index % weight.shape[0], 31 * index % weight.shape[1]].float().cpu()
    largest = entries.abs().amax()
    if not (largest.isfinite() and largest > 0):
        return None
    return bytes((entries / largest * 127).round().to(torch.int8).view(torch.uint8).tolist()).hex()


def same_base(one: str, other: str) -> bool:
    """Whether two marks are of one base, or of one and its fine-tuned form."""
    a, b = (torch.frombuffer(bytearray.fromhex(mark), dtype=torch.int8).float() for mark in (one, other))
    return bool(torch.nn.functional.cosine_similarity(a, b, dim=0) >= _SAME)


def facts_of(model: nn.Module) -> dict[str, Any] | None:
    """What the config of a model's text decoder says of it, as JSON gives it back; None without a config."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None
    config = config.get_text_config()
    facts = {name: _fact(config, name) for name in (*_SIZES, *_KINDS)}
    if facts["head_dim"] is None and facts["hidden_size"] and facts["num_attention_heads"]:
        facts["head_dim"] = facts["hidden_size"] // facts["num_attention_heads"]
    return json.loads(json.dumps({name: fact for name, fact in facts.items() if fact is not None}, default=str))


def _fact(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers does not give one value of what differs between layers
        return None


def other_facts(own: dict[str, Any], found: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """How two bases differ, name -> 'own, here another': in sizes, and in what two bases of one size can differ in."""
    differing = {name for name in own.keys() & found.keys() if own[name] != found[name]}
    said = {name: f"{own[name]!r:.100}, here {found[name]!r:.100}" for name in sorted(differing)}
    return {name: said[name] for name in _SIZES if name in said}, {name: said[name] for name in _KINDS if name in said}
