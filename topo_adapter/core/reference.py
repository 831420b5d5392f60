"""The specification: masked attention, written down directly in float64. Slow on purpose."""

import torch
from torch import Tensor


def reference_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attention over exactly the visible pairs.

    Args:
        q: `[B, H, T, D]`; k, v: `[B, H_kv, S, D]` with `H` a multiple of `H_kv`; any float dtype.
        visible: bool `[B, H, T, S]` (`topo_adapter.core.visibility.visible_pairs`).
        scale: factor on the scores before softmax.

    Returns:
        float64 `[B, H, T, D]`; rows that see nothing (padding) are 0.
    """
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible, float("-inf"))
    empty = ~visible.any(-1, keepdim=True)
    probs = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    return probs @ v
