"""The one definition of what a query sees (docs/method.md, section 2).

Query `i` sees key `j` iff `j <= i`, both are real tokens of one document, and the ball of `i` is the
ball of `j`, or `i - j < local_window`, or `j` is one of the first `num_sink_tokens` of the document.
Below the leaves (docs/method.md) no key has the ball of a query.
Everything else in this library - soft masks, the sorted plan, the kernels - is tested against this.
"""

from torch import Tensor

from .layout import SequenceLayout, causal_pairs


def always_visible(query: SequenceLayout, key: SequenceLayout, local_window: int, num_sink_tokens: int) -> Tensor:
    """bool `[B, T, S]`: pairs visible whatever the addresses are (local window and attention sinks)."""
    return causal_pairs(query, key) & _near_or_sink(query, key, local_window, num_sink_tokens)


def _near_or_sink(query: SequenceLayout, key: SequenceLayout, local_window: int, num_sink_tokens: int) -> Tensor:
    """bool `[B, T, S]`: of causal pairs, those that window and sinks make visible."""
    gap = query.position[:, :, None] - key.position[:, None, :]
    return (gap < local_window) | (key.position[:, None, :] < num_sink_tokens)


def always_density(length: int, local_window: int, num_sink_tokens: int) -> float:
    """Share in (0, 1] of the causal pairs of one document of `length` tokens that window and sinks make visible."""
    reached = min(length, local_window)  # queries whose window reaches the first token
    far = length - reached
    some = min(far, num_sink_tokens)  # queries that have fewer sinks than all beyond their window
    in_window = reached * (reached + 1) // 2 + far * local_window
    sinks = some * (some + 1) // 2 + (far - some) * num_sink_tokens
    return (in_window + sinks) / (length * (length + 1) // 2)


def visible_pairs(
    query_ball: Tensor,
    key_ball: Tensor,
    query: SequenceLayout,
    key: SequenceLayout,
    local_window: int,
    num_sink_tokens: int,
) -> Tensor:
    """Section 2's mask.

    Args:
        query_ball, key_ball: integer `[B, H, T]`, `[B, H, S]`; balls at each head's visible depth.
        query, key: layouts of the `T` queries and the `S` keys.

    Returns:
        bool `[B, H, T, S]`. Rows of padding queries are empty; every other row holds at least its own token.
    """
    tree = query_ball[..., :, None] == key_ball[..., None, :]
    tree |= _near_or_sink(query, key, local_window, num_sink_tokens)[:, None]
    tree &= causal_pairs(query, key)[:, None]
    return tree
