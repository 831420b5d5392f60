"""What a key-value cache keeps of a token beside its key: address, position and document.

One record per token, int32 `[B, S, W + 2]`: the key addresses of the `R` routes, packed as bytes (up to 256 leaves) or
int16 into `W` words, the position in its document plus one (0: padding or an unfilled slot), and the document.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from .layout import SequenceLayout


class Records:
    """Records of `S` tokens.

    Attributes:
        words: int32 `[B, S, W + 2]`, as a cache holds them.
        address: uint8 or int16 `[B, S, R]`. position: int32 `[B, S]`, plus one. document: int32 `[B, S]`.
            Views of the words.
    """

    def __init__(self, words: Tensor, routes: int, leaves: int) -> None:
        self.words = words
        self.address = words[..., :-2].view(_address_type(leaves))[..., :routes]
        self.position, self.document = words[..., -2], words[..., -1]

    @property
    def layout(self) -> SequenceLayout:
        return SequenceLayout(self.document.long(), self.position.long() - 1)


def pack_records(address: Tensor, layout: SequenceLayout, leaves: int) -> Records:
    """Records of tokens with key addresses `[B, R, T]`, in `[0, leaves)`."""
    batch, routes, length = address.shape
    size = routes * _address_type(leaves).itemsize
    new = torch.empty if size % 4 == 0 else torch.zeros  # the rest of the last word is 0
    words = new(batch, length, -(-size // 4) + 2, dtype=torch.int32, device=address.device)
    records = Records(words, routes, leaves)
    records.address.copy_(address.transpose(1, 2))
    records.position.copy_(layout.position + 1)
    records.document.copy_(layout.document)
    return records


def _address_type(leaves: int) -> torch.dtype:
    return torch.uint8 if leaves <= 256 else torch.int16


class Keys:
    """Addresses and layout of all keys of a forward.

    Attributes:
        records: of every slot of the cache; None without a cache.
        address: integer `[B, R, S]`. layout: of the `S` keys; both are read off the records when asked for.
    """

    def __init__(
        self, address: Tensor | None = None, layout: SequenceLayout | None = None, records: Records | None = None
    ) -> None:
        self.records = records
        if address is not None:
            self.address = address
        if layout is not None:
            self.layout = layout

    @property
    def count(self) -> int:
        """`S`."""
        return self.address.shape[-1] if self.records is None else self.records.words.shape[1]

    @cached_property
    def address(self) -> Tensor:
        assert self.records is not None
        return self.records.address.transpose(1, 2).int()

    @cached_property
    def layout(self) -> SequenceLayout:
        assert self.records is not None
        return self.records.layout
