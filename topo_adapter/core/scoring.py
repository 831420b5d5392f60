"""How an attention scores a query against a key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """Scores are `softcap * tanh(scale * q.k / softcap)`, or `scale * q.k` without a softcap. Both are > 0."""

    scale: float
    softcap: float | None = None

    def capped(self, scores: Tensor) -> Tensor:
        """What the softcap makes of scaled scores."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)
