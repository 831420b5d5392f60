"""Whether what is timed is right: visible pairs counted without a plan, float64 attention of sampled queries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .cases import Layer


def visible_count(query_ball: Tensor, key_ball: Tensor, window: int, sinks: int) -> Tensor:
    """Visible pairs (docs/method.md, section 2) of unpadded rows `[B, R, N]`: float64 `[R]`; counted without a plan."""
    length = query_ball.shape[-1]
    position = torch.arange(length, device=query_ball.device)
    rank = key_ball.long() * length + position
    rank[..., :sinks] = torch.iinfo(torch.int64).max
    rank = rank.sort(-1).values
    first = query_ball.long() * length
    reach = first + (position - window + 1).clamp(min=0)
    tree = torch.searchsorted(rank, reach) - torch.searchsorted(rank, first)
    always = (position + 1).clamp(max=window) + (position + 1 - window).clamp(0, sinks)
    return tree.clamp(min=0).sum((0, 2), dtype=torch.float64) + query_ball.shape[0] * always.sum().double()


def causal_count(batch: int, length: int) -> float:
    return batch * length * (length + 1) / 2


def sampled_error(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, query_ball: Tensor, key_ball: Tensor, rows: Tensor, layer: Layer
) -> float:
    """`‖out - ref‖ / ‖ref‖` over the sampled queries, with a float64 reference of these rows alone.

    Args:
        out, q: `[B, H, T, D]`; k, v: `[B, H_kv, S, D]`. Query `i` has position `S - T + i`.
        query_ball, key_ball: `[B, R, T]`, `[B, R, S]`. rows: int64 `[M]`, indices of queries.
    """
    heads, length = q.shape[1], k.shape[2]
    per_route, per_kv = heads // query_ball.shape[1], heads // k.shape[1]
    gap = (rows + length - q.shape[2])[:, None] - torch.arange(length, device=q.device)
    always = (gap < layer.window) | (torch.arange(length, device=q.device) < layer.sinks)
    difference, norm = 0.0, 0.0
    for b in range(q.shape[0]):
        for h in range(heads):
            ball = query_ball[b, h // per_route, rows, None] == key_ball[b, h // per_route]
            scores = q[b, h, rows].double() @ k[b, h // per_kv].double().T * layer.scale
            probs = scores.masked_fill(~((ball | always) & (gap >= 0)), -math.inf).softmax(-1)
            ref = probs @ v[b, h // per_kv].double()
            difference += (out[b, h, rows].double() - ref).square().sum().item()
            norm += ref.square().sum().item()
    return math.sqrt(difference / norm)


def far_error(values: Tensor, q: Tensor, k: Tensor, key_leaves: Tensor, rows: Tensor, layer: Layer) -> float:
    """`sampled_error` of the distillation's values: dense causal attention without the values of window and sinks."""
    heads, length = q.shape[1], q.shape[2]
    position = torch.arange(length, device=q.device)
    gap = rows[:, None] - position
    difference, norm = 0.0, 0.0
    for h in range(heads):
        scores = q[0, h, rows].double() @ k[0, h // (heads // k.shape[1])].double().T * layer.scale
        probs = scores.masked_fill(gap < 0, -math.inf).softmax(-1)
        ref = probs.masked_fill((gap < layer.window) | (position < layer.sinks), 0.0) @ key_leaves[0, h].double()
        difference += (values[0, h, rows].double() - ref).square().sum().item()
        norm += ref.square().sum().item()
    return math.sqrt(difference / norm)


def sample_rows(length: int, count: int = 32) -> Tensor:
    """The first and the last query and some between."""
    return torch.cat([torch.tensor([0, length - 1]), torch.randint(0, length, (count,))])


def decode_visible(query_address: Tensor, key_address: Tensor, balls: int, layer: Layer) -> tuple[Tensor, Tensor]:
    """Keys seen by each route head, and by any head of each KV head: bool `[B, R, S]` and `[B, H_kv, S]`.

    Args: query_address: `[B, R, 1]`, of the newest token. key_address: `[B, S, R]`, unpadded.
    """
    seen = query_address % balls == key_address.transpose(1, 2) % balls
    position = torch.arange(key_address.shape[1], device=key_address.device)
    seen = seen | (position >= key_address.shape[1] - layer.window) | (position < layer.sinks)
    routes = seen.shape[1]
    return seen, seen.unflatten(1, (min(layer.kv_heads, routes), -1)).any(2)
