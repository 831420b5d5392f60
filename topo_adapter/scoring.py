"""How an attention scores a query against a key."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scoring:
    """Scores are `softcap * tanh(scale * q.k / softcap)`, or `scale * q.k` without a softcap."""

    scale: float
    softcap: float | None = None
