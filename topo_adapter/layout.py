"""Which document a token belongs to and its position there, counting real tokens only.

Left padding and packing shift nothing: the window, the sinks and causality are defined on
`(document, position)`, never on tensor indices. (docs/method.md, section 2.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import UnsupportedModelError


@dataclass(frozen=True)
class SequenceLayout:
    """Document and position of every token of a batch.

    Attributes:
        document: int64 `[B, N]`; tokens see only keys of their own document (any labels, per row).
        position: int64 `[B, N]`; 0, 1, 2, ... within the document over real tokens, -1 for padding.
    """

    document: Tensor
    position: Tensor

    @property
    def real(self) -> Tensor:
        """bool `[B, N]`: True where the token is not padding."""
        return self.position >= 0

    def last(self, count: int) -> "SequenceLayout":
        """The layout of the last `count` tokens."""
        start = self.position.shape[1] - count
        return SequenceLayout(self.document[:, start:], self.position[:, start:])

    def extended(self, other: "SequenceLayout") -> "SequenceLayout":
        """This layout followed by `other`."""
        return SequenceLayout(
            torch.cat([self.document, other.document], 1), torch.cat([self.position, other.position], 1)
        )


def contiguous_layout(batch: int, length: int, device: torch.device | str = "cpu") -> SequenceLayout:
    """One document per row, no padding."""
    position = torch.arange(length, device=device).expand(batch, length)
    return SequenceLayout(torch.zeros_like(position), position)


def layout_from_padding(real: Tensor) -> SequenceLayout:
    """One document per row; `real` is bool `[B, N]`, False marks padding (anywhere in the row)."""
    position = torch.where(real, real.long().cumsum(1) - 1, -1)
    return SequenceLayout(torch.zeros_like(position), position)


def layout_from_position_ids(position_ids: Tensor) -> SequenceLayout:
    """Packed rows: a document starts wherever `position_ids` `[B, N]` does not continue by one."""
    steps = torch.diff(position_ids, dim=1)
    starts = torch.cat([torch.zeros_like(position_ids[:, :1], dtype=torch.bool), steps != 1], dim=1)
    index = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    first = torch.where(starts, index, 0).cummax(1).values
    return SequenceLayout(first, index - first)


_FROM_MASK = WeakTensorKeyDictionary()  # all layers of a forward share one mask object


def layout_from_mask(mask: Tensor, past: SequenceLayout | None = None, past_length: int = 0) -> SequenceLayout:
    """Read the layout of a forward's tokens off the model's own 4-D mask.

    Args:
        mask: `[B, 1, T, S]`; bool with True = visible, or additive float with 0 = visible. Columns from
            `past_length + T` on are unfilled cache slots.
        past: layout of the `past_length` cached tokens.

    Raises:
        UnsupportedModelError: the mask is not "causal within documents, padding hidden", so that
            `(document, position)` cannot express it.
    """
    version = None if mask.is_inference() else mask._version  # a mask changed in place is another mask
    known = _FROM_MASK.get(mask)
    if known is not None and known[0] == version:
        return known[1]
    length = mask.shape[-2]
    total = past_length + length
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[3] < total:
        raise UnsupportedModelError(
            f"attention_mask must have shape [B, 1, T, S] with S >= {total} (cached and new tokens), got "
            f"{tuple(mask.shape)}; masks that differ between heads cannot be routed. Pass a 2-D padding mask instead."
        )
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    real = visible[:, :, past_length:total].diagonal(dim1=1, dim2=2)
    position = torch.where(real, visible.sum(-1) - 1, -1)
    first = visible.to(torch.uint8).argmax(-1)  # index of the first key a token sees: one per document
    layout = SequenceLayout(first, position)
    keys = layout if past is None else past.extended(layout)
    expected = causal_pairs(layout, keys).tril(past_length)
    unfilled = visible[..., total:].any()
    if unfilled or not torch.equal(expected, visible[..., :total] & real[:, :, None]):
        raise UnsupportedModelError(
            "attention_mask must be causal within documents with padding hidden; this one is not (a prefix-LM, "
            "sliding-window, chunked or hand-made mask). Route full-attention layers only, see layers_to_transform."
        )
    _FROM_MASK[mask] = (version, layout)
    return layout


def continued_layout(past: SequenceLayout, length: int, position_ids: Tensor | None) -> SequenceLayout:
    """Layout of `length` unpadded tokens after `past`; `position_ids` that restart begin a new document."""
    batch, past_length = past.position.shape
    index = torch.arange(length, device=past.position.device).expand(batch, length)
    starts = torch.zeros_like(index, dtype=torch.bool)
    if position_ids is not None:
        starts[:, :1] = position_ids[:, :1] == 0
        starts[:, 1:] = torch.diff(position_ids, dim=1) != 1
    first = torch.where(starts, index, -1).cummax(1).values  # -1: still in the last cached document
    new = first >= 0
    document = torch.where(new, past_length + first, past.document[:, -1:])
    return SequenceLayout(document, torch.where(new, index - first, past.position[:, -1:] + 1 + index))


def causal_pairs(query: SequenceLayout, key: SequenceLayout) -> Tensor:
    """bool `[B, T, S]`: the key is a real token of the query's document and not after it."""
    same = query.document[:, :, None] == key.document[:, None, :]
    past = key.position[:, None, :] <= query.position[:, :, None]
    return same & past & key.real[:, None, :] & query.real[:, :, None]
