"""Queries and keys as they were before the rotary embedding, which a router on heads reads."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn


@functools.cache
def rotation_of(kind: type[nn.Module]) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The function by which a kind of attention module turns its queries and keys; None if it is not known."""
    forward = inspect.unwrap(kind.forward)
    rotate = forward.__globals__.get("apply_rotary_pos_emb")
    if rotate is None or not any(name.startswith("apply_rotary") for name in forward.__code__.co_names):
        return None
    names = list(inspect.signature(rotate).parameters)
    if names[:4] == ["q", "k", "cos", "sin"]:
        return rotate
    if names[:3] in (["x", "cos", "sin"], ["tensor", "cos", "sin"]):
        return lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin))
    return None


def unrotated(attention: Any, query: Tensor, key: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Take the rotary embedding off queries and keys of the same tokens, by turning them back.

    Where the module's own function for it is not known, or it has none, they stay as attention gets them.

    Args:
        attention: the module. query: `[B, H, T, D]`; key: `[B, H_kv, T, D]`.
        inputs: everything the module is called with, by name.

    Returns:
        The same shapes in float32; scaled where the embedding scales (YaRN).
    """
    query, key = query.float(), key.float()
    angles: Any = inputs.get("position_embeddings")
    kind: Any = type(attention)
    rotate = rotation_of(kind)
    known = isinstance(angles, tuple) and len(angles) == 2 and all(isinstance(each, Tensor) for each in angles)
    if rotate is None or not known or not _rotates(attention):
        return query, key
    cos, sin = (each.float() for each in angles)
    turned, width = cos.shape[-1], query.shape[-1]
    if turned > width:
        return query, key
    with torch.autocast(query.device.type, enabled=False):
        if turned == width:
            return rotate(query, key, cos, -sin)
        last = hasattr(attention, "qk_rope_head_dim")  # multi-head latent attention turns the last channels
        mine = slice(width - turned, width) if last else slice(turned)
        back = rotate(query[..., mine], key[..., mine], cos, -sin)
    return tuple(_put(x, mine, part) for x, part in zip((query, key), back, strict=True))  # type: ignore[return-value]


def _put(x: Tensor, where: slice, part: Tensor) -> Tensor:
    return torch.cat([x[..., : where.start or 0], part, x[..., where.stop :]], dim=-1)


def _rotates(attention: Any) -> bool:
    """Whether a module turns its queries and keys at all: layers of some models do not (SmolLM3, Cohere 2, Llama 4)."""
    kind: Any = type(attention)
    return all(bool(eval(test, {"self": attention})) == wanted for test, wanted in _conditions_of(kind))


@functools.cache
def _conditions_of(kind: type[nn.Module]) -> list[tuple[CodeType, bool]]:
    """What a kind of module asks of its own attributes before it rotates, and the answer with which it does."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))
    except (OSError, SyntaxError):  # no source to read
        return []
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.If) or {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)} != {"self"}:
            continue
        turning = [answer for branch, answer in ((node.body, True), (node.orelse, False)) if _turns(branch)]
        if len(turning) == 1:  # else it does either way, or the question is about something else
            found.append((compile(ast.Expression(node.test), "<condition>", "eval"), turning[0]))
    return found


def _turns(branch: list[ast.stmt]) -> bool:
    names = {node.id for part in branch for node in ast.walk(part) if isinstance(node, ast.Name)}
    return any(name.startswith("apply_rotary") for name in names)
