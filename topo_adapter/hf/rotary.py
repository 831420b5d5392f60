"""Queries and keys as they were before the rotary embedding, which a router on heads reads."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from topo_kernels.heads import Pairs


@dataclass(frozen=True)
class Rotation:
    """How an attention module turns its queries and keys.

    turn: its model's function for it, of queries, keys, cosines and sines. last: of heads that are turned in part, the
    last channels are (multi-head latent attention), not the first. pairs: which channels are turned with each other, as
    `topo_kernels.route_heads` names it; None if in a way that it does not know.
    """

    turn: Callable[..., tuple[Tensor, Tensor]]
    last: bool
    pairs: Pairs | None

    def angles(self, given: Any, width: int) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of a call; None where nothing is to be turned back.

        Args:
            given: the `position_embeddings` that the module is called with. width: channels of a head.
        """
        if not isinstance(given, tuple) or len(given) != 2 or not all(isinstance(each, Tensor) for each in given):
            return None
        return None if given[0].shape[-1] > width else given

    def undo(self, query: Tensor, key: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Turn queries and keys of the same tokens back.

        Args:
            query: `[B, H, T, D]`; key: `[B, H_kv, T, D]`, float32.
            angles: what `angles` made of the call.

        Returns:
            The same shapes in float32; scaled where the embedding scales (YaRN).
        """
        cos, sin = (each.float() for each in angles)
        turned, width = cos.shape[-1], query.shape[-1]
        with torch.autocast(query.device.type, enabled=False):
            if turned == width:
                return self.turn(query, key, cos, -sin)
            mine = slice(width - turned, width) if self.last else slice(turned)
            back = self.turn(query[..., mine], key[..., mine], cos, -sin)
        return tuple(_put(x, mine, part) for x, part in zip((query, key), back, strict=True))  # type: ignore[return-value]


def rotation_of(attention: Any) -> Rotation | None:
    """How a module turns its queries and keys; None if it does not, or not by a function that is known."""
    turn = _known_turn(attention)
    if turn is None or not _rotates(attention):
        return None
    pairs, last = _pairs_of(turn), hasattr(attention, "qk_rope_head_dim")
    if pairs != "halves" and last and getattr(attention, "qk_nope_head_dim", 0) % 2:
        pairs = None  # the kernel takes neighbours from an even channel on
    return Rotation(turn, last, pairs)


def rotates_otherwise(attention: Any) -> bool:
    """Whether a module turns its queries and keys by a function that is not known."""
    return _rotates(attention) and _known_turn(attention) is None


def _rotates(attention: Any) -> bool:
    forward = inspect.unwrap(type(attention).forward)
    if not any(name.startswith("apply_rotary") for name in forward.__code__.co_names):
        return False
    # layers of some models do not turn at all: SmolLM3, Cohere 2, Llama 4
    return all(bool(eval(test, {"self": attention})) == wanted for test, wanted in _conditions_of(forward))


def _known_turn(attention: Any) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The function of queries, keys, cosines and sines that a module's model turns them with."""
    turn = inspect.unwrap(type(attention).forward).__globals__.get("apply_rotary_pos_emb")
    names = [] if turn is None else list(inspect.signature(turn).parameters)
    if names[:3] in (["x", "cos", "sin"], ["tensor", "cos", "sin"]):
        return functools.partial(_each, turn)
    return turn if names[:4] == ["q", "k", "cos", "sin"] else None


def _pairs_of(turn: Callable[..., tuple[Tensor, Tensor]]) -> Pairs | None:
    """Which channels a function turns with each other: it does to random numbers what one of the known ways does."""
    generator = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(shape, generator=generator) for shape in ((1, 1, 3, 8), (1, 3, 8), (1, 3, 8)))
    low, high = x.chunk(2, -1)
    across = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    once = [angle[..., :4].repeat_interleave(2, -1) for angle in (cos, sin)]
    ways: dict[Pairs, Tensor] = {
        "halves": x * cos + torch.cat([-high, low], -1) * sin,
        "neighbours": x * cos + across * sin,
        "neighbours_once": x * once[0] + across * once[1],
    }
    try:
        found = turn(x, x, cos, sin)
    except (RuntimeError, TypeError, ValueError):  # it wants angles of another shape
        return None
    for pairs, expected in ways.items():
        if all(each.shape == x.shape and torch.allclose(each, expected) for each in found):
            return pairs
    return None


def _each(turn: Callable[..., Tensor], query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return turn(query, cos, sin), turn(key, cos, sin)


def _put(x: Tensor, where: slice, part: Tensor) -> Tensor:
    return torch.cat([x[..., : where.start or 0], part, x[..., where.stop :]], dim=-1)


@functools.cache
def _conditions_of(forward: Callable[..., Any]) -> list[tuple[CodeType, bool]]:
    """What a module's forward asks of its own attributes before it rotates, and the answer with which it does."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
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
