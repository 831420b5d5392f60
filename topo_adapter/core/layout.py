"""Which document a token belongs to and its position there, counting real tokens only.

Left padding and packing shift nothing: the window, the sinks and causality are defined on
`(document, position)`, never on tensor indices. (docs/method.md, section 2.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import UnsupportedModelError
from .device import graph_is_recorded


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


_KNOWN = WeakTensorKeyDictionary()  # all layers of a forward are handed one mask, or one tensor of positions


def _shared(source: Tensor, layer: int, options: Any, make: Callable[[], SequenceLayout]) -> SequenceLayout:
    """What `make` reads off `source`, for all layers of one forward.

    A tensor may be another one's values by the next forward, also where torch does not count that (in inference mode,
    through numpy, in a CUDA graph). So what was read is kept only for layers above the last that asked; recomputed
    layers of a backward pass come in any order, and there the count has to do.
    """
    version = None if source.is_inference() else source._version
    known = _KNOWN.get(source)
    if known is not None and known[:2] == (version, options):
        recomputed = version is not None and torch.is_grad_enabled()
        if recomputed or known[2] < layer:
            _KNOWN[source] = (*known[:2], layer, known[3])
            return known[3]
    layout = make()
    _KNOWN[source] = (version, options, layer, layout)
    return layout


def layout_from_position_ids(position_ids: Tensor, batch: int | None = None, layer: int = 0) -> SequenceLayout:
    """Packed rows: documents start where `_restarts` says.

    Args:
        position_ids: `[N_rows, N]` with `N_rows` the batch or 1. batch: rows of the layout if not `N_rows`.
        layer: index of the layer that asks, see `_shared`.
    """
    batch = position_ids.shape[0] if batch is None else batch

    def split() -> SequenceLayout:
        starts = _restarts(position_ids.expand(batch, -1))
        # one synchronisation per forward, before there is work to wait for; it spares every layer the general case,
        # which is what a graph records, where nothing may be waited for
        plain = not graph_is_recorded() and not bool(starts.any())
        index = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
        first = torch.where(starts, index, 0).cummax(1).values
        return SequenceLayout(first, index - first, plain)

    return _shared(position_ids, layer, batch, split)


def _restarts(position_ids: Tensor) -> Tensor:
    """bool `[B, N]`: a document starts here; False for the first token.

    Positions that fall start one. So does a 0 after a 0, a document of one token, but only in rows that count up by one
    from 0 to 0: elsewhere repeated positions and gaps belong to one text (Self-Extend, PoSE, prompts with a part cut
    out).
    """
    steps = torch.diff(position_ids, dim=1)
    zero = position_ids[:, 1:] == 0
    counting = ((steps == 1) | zero).all(1, keepdim=True)
    starts = torch.zeros_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = (steps < 0) | (zero & counting)
    return starts


def layout_from_cu_seq_lens(cu_seq_lens: Tensor, batch: int, length: int) -> SequenceLayout:
    """Packed rows, told by where documents start: int `[documents + 1]`, from 0 to `length`.

    Raises:
        UnsupportedModelError: the batch is not one row.
    """
    if batch != 1:
        raise UnsupportedModelError(f"cu_seq_lens_q needs a batch of one row, got {batch}")
    index = torch.arange(length, device=cu_seq_lens.device)
    document = torch.searchsorted(cu_seq_lens.long(), index, right=True) - 1
    return SequenceLayout(document[None], (index - cu_seq_lens.long()[document])[None])


_HIDDEN = -1e4  # additive masks hide with this or less, down to minus infinity


def layout_from_recorded_mask(mask: Tensor, past_length: int | Tensor = 0) -> SequenceLayout:
    """Read the layout of a forward's tokens off the model's own 4-D mask, trusting that it is a causal one.

    For use while a graph is recorded: nothing waits for the GPU.

    Args:
        mask: `[B, 1, T, S]`; bool with True = visible, or additive float with 0 = visible, else hidden.
        past_length: number of cached tokens.
    """
    visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    own = torch.arange(visible.shape[1], device=mask.device) + past_length
    real = visible.gather(2, own[None, :, None].expand(visible.shape[0], -1, -1))[..., 0]
    position = torch.where(real, visible.sum(-1) - 1, -1)
    first = visible.to(torch.uint8).argmax(-1)  # index of the first key a token sees: one per document
    return SequenceLayout(first, position)


def layout_from_mask(
    mask: Tensor, past: SequenceLayout | None = None, past_length: int = 0, layer: int = 0
) -> SequenceLayout:
    """Read the layout of a forward's tokens off the model's own 4-D mask.

    Args:
        mask: `[B, 1, T, S]`; bool with True = visible, or additive float with 0 = visible and -10,000 or less hidden.
            Columns from `past_length + T` on are unfilled cache slots.
        past: layout of the `past_length` cached tokens. layer: index of the layer that asks, see `_shared`.

    Raises:
        UnsupportedModelError: the mask is not "causal within documents, padding hidden", so that
            `(document, position)` cannot express it, or it holds biases.
    """
    return _shared(mask, layer, past_length, lambda: _checked_layout(mask, past, past_length))


def _checked_layout(mask: Tensor, past: SequenceLayout | None, past_length: int) -> SequenceLayout:
    length = mask.shape[-2]
    total = past_length + length
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[3] < total:
        raise UnsupportedModelError(
            f"attention_mask must have shape [B, 1, T, S] with S >= {total} (cached and new tokens), got "
            f"{tuple(mask.shape)}; masks that differ between heads cannot be routed. Pass a 2-D padding mask instead."
        )
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask <= _HIDDEN)).all()):
        raise UnsupportedModelError(
            "attention_mask must be 0 where a key is visible and -10,000 or less where it is hidden, got others: "
            "biases (ALiBi, soft masks) cannot be routed. Leave such layers out with layers_to_transform."
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
    return layout


def continued_layout(
    past: SequenceLayout, length: int, position_ids: Tensor | None, past_length: int | Tensor | None = None
) -> SequenceLayout:
    """Layout of `length` unpadded tokens after `past`; a new document starts at a first position of 0, and
    where `_restarts` says.

    Args:
        past: of the cached tokens, or of the last of them. past_length: their number if `past` is of the last only.
    """
    batch = past.position.shape[0]
    past_length = past.position.shape[1] if past_length is None else past_length
    index = torch.arange(length, device=past.position.device).expand(batch, length)
    starts = torch.zeros_like(index, dtype=torch.bool)
    if position_ids is not None:
        starts = _restarts(position_ids.expand(batch, -1))
        starts[:, :1] = position_ids[:, :1] == 0
    first = torch.where(starts, index, -1).cummax(1).values  # -1: still in the last cached document
    new = first >= 0
    document = torch.where(new, past_length + first, past.document[:, -1:])
    return SequenceLayout(document, torch.where(new, index - first, past.position[:, -1:] + 1 + index))


def causal_pairs(query: SequenceLayout, key: SequenceLayout) -> Tensor:
    """bool `[B, T, S]`: the key is a real token of the query's document and not after it."""
    same = query.document[:, :, None] == key.document[:, None, :]
    past = key.position[:, None, :] <= query.position[:, :, None]
    return same & past & key.real[:, None, :] & query.real[:, :, None]
