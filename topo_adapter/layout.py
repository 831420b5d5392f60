"""Which document a token belongs to and its position there, counting real tokens only.

Left padding and packing shift nothing: the window, the sinks and causality are defined on
`(document, position)`, never on tensor indices. (docs/method.md, section 2.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import UnsupportedModelError


@dataclass(frozen=True, eq=False)  # compared by identity: what is derived from a layout is kept beside it
class SequenceLayout:
    """Document and position of every token of a batch.

    Attributes:
        document: int64 `[B, N]`; tokens see only keys of their own document (any labels, per row).
        position: int64 `[B, N]`; 0, 1, 2, ... within the document over real tokens, -1 for padding.
        plain: known on the host that every row is one document without padding. False says nothing.
    """

    document: Tensor
    position: Tensor
    plain: bool = False

    @property
    def real(self) -> Tensor:
        """bool `[B, N]`: True where the token is not padding."""
        return self.position >= 0

    def causal_count(self) -> Tensor:
        """int64 scalar: pairs of a token and one of its document up to itself, of the batch."""
        return (self.position + 1).sum()

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
    return SequenceLayout(torch.zeros_like(position), position, plain=True)


def layout_from_padding(real: Tensor) -> SequenceLayout:
    """One document per row; `real` is bool `[B, N]`, False marks padding (anywhere in the row)."""
    position = torch.where(real, real.long().cumsum(1) - 1, -1)
    return SequenceLayout(torch.zeros_like(position), position)


_FROM_POSITION_IDS = WeakTensorKeyDictionary()  # all layers of a forward share one object


def layout_from_position_ids(position_ids: Tensor, batch: int | None = None) -> SequenceLayout:
    """Packed rows: a document starts wherever `position_ids` does not continue by one.

    Args:
        position_ids: `[N_rows, N]` with `N_rows` the batch or 1. batch: rows of the layout if not `N_rows`.
    """
    batch = position_ids.shape[0] if batch is None else batch
    version = None if position_ids.is_inference() else position_ids._version
    known = _FROM_POSITION_IDS.get(position_ids)
    if known is not None and known[:2] == (version, batch):
        return known[2]
    layout = _split_at_restarts(position_ids.expand(batch, -1))
    _FROM_POSITION_IDS[position_ids] = (version, batch, layout)
    return layout


def _split_at_restarts(position_ids: Tensor) -> SequenceLayout:
    steps = torch.diff(position_ids, dim=1)
    starts = torch.cat([torch.zeros_like(position_ids[:, :1], dtype=torch.bool), steps != 1], dim=1)
    index = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    first = torch.where(starts, index, 0).cummax(1).values
    # one synchronisation per forward, before there is work to wait for; it spares every layer the general case
    plain = bool((steps == 1).all())
    return SequenceLayout(first, index - first, plain)


_FROM_MASK = WeakTensorKeyDictionary()  # all layers of a forward share one mask object


def layout_from_recorded_mask(mask: Tensor, past_length: int | Tensor = 0) -> SequenceLayout:
    """Read the layout of a forward's tokens off the model's own 4-D mask, trusting that it is a causal one.

    For use while a graph is recorded: nothing waits for the GPU.

    Args:
        mask: `[B, 1, T, S]`; bool with True = visible, or additive float with 0 = visible.
        past_length: number of cached tokens.
    """
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    own = torch.arange(visible.shape[1], device=mask.device) + past_length
    real = visible.gather(2, own[None, :, None].expand(visible.shape[0], -1, -1))[..., 0]
    position = torch.where(real, visible.sum(-1) - 1, -1)
    first = visible.to(torch.uint8).argmax(-1)  # index of the first key a token sees: one per document
    return SequenceLayout(first, position)


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
    layout = layout_from_recorded_mask(mask, past_length)
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    keys = layout if past is None else past.extended(layout)
    expected = causal_pairs(layout, keys).tril(past_length)
    unfilled = visible[..., total:].any()
    if unfilled or not torch.equal(expected, visible[..., :total] & layout.real[:, :, None]):
        raise UnsupportedModelError(
            "attention_mask must be causal within documents with padding hidden; this one is not (a prefix-LM, "
            "sliding-window, chunked or hand-made mask). Route full-attention layers only, see layers_to_transform."
        )
    _FROM_MASK[mask] = (version, layout)
    return layout


def continued_layout(
    past: SequenceLayout, length: int, position_ids: Tensor | None, past_length: int | Tensor | None = None
) -> SequenceLayout:
    """Layout of `length` unpadded tokens after `past`; `position_ids` that restart begin a new document.

    Args:
        past: of the cached tokens, or of the last of them. past_length: their number if `past` is of the last only.
    """
    batch = past.position.shape[0]
    past_length = past.position.shape[1] if past_length is None else past_length
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
