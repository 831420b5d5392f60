"""Key addresses in the key-value cache.

Addresses are per token and independent of the query, so they live beside the keys: in the indexer slot
that transformers' cache layers offer for sparse attention. Crop, beam reorder, batch repeat, offload and
reset then act on them as on the keys. One record per token, int32 `[B, S, R + 2]`: the key address of
each of the `R` routes, the position in its document plus one (0: padding or an unfilled slot), and the
document.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    StaticIndexedLayer,
    StaticLayer,
)

from .backend import graph_is_recorded
from .errors import CacheError
from .layout import SequenceLayout


class Keys:
    """Addresses and layout of all keys of a forward.

    Attributes:
        records: int32 `[B, S, R + 2]`, every slot of the cache; None without a cache.
        address: integer `[B, R, S]`. layout: of the `S` keys; both are read off the records when asked for.
    """

    def __init__(
        self, address: Tensor | None = None, layout: SequenceLayout | None = None, records: Tensor | None = None
    ) -> None:
        self.records = records
        if address is not None:
            self.address = address
        if layout is not None:
            self.layout = layout

    @cached_property
    def address(self) -> Tensor:
        assert self.records is not None
        return self.records[..., :-2].transpose(1, 2)

    @cached_property
    def layout(self) -> SequenceLayout:
        assert self.records is not None
        return _layout_of(self.records)


class KeyRecords:
    """The address records of one layer of a cache.

    Nothing here waits for the GPU while a graph is compiled or captured; the length of a static cache is a tensor
    then, and a cache that was filled in part without the topology is not noticed.

    Attributes:
        length: number of cached tokens.

    Raises:
        CacheError: the cache layer's type cannot hold records, or it holds tokens without records because
            they were cached while no topology was active, or with records of another router.
    """

    length: int | Tensor

    def __init__(self, cache: Cache, layer: int, router: nn.Module) -> None:
        if not isinstance(cache, Cache):
            raise CacheError(f"past_key_values must be a transformers Cache, got {type(cache).__name__}")
        _make_indexed(cache, layer)
        self._cache, self._layer = cache, layer
        slot = cache.layers[layer]
        self._slot = slot
        self.length = slot.get_seq_length()
        if isinstance(self.length, Tensor):
            if graph_is_recorded():
                return
            self.length = int(self.length)
        recorded = 0
        if slot.is_indexer_initialized:
            counter = getattr(slot, "indexer_cumulative_length", None)
            recorded = slot.indexer_keys.shape[1] if counter is None else int(counter)
        if recorded != self.length:
            raise CacheError(
                f"past_key_values holds {self.length} tokens in layer {layer} but key addresses for {recorded}: part "
                "of it was filled while the topology adapter was disabled or at homotopy 0. "
                "Start from a fresh cache."
            )
        owner = id(router)  # an address means nothing on another router's tree
        if self.length and getattr(slot, "topology_router", None) != owner:
            raise CacheError(
                f"past_key_values holds key addresses of another adapter in layer {layer}; start from a fresh cache "
                "after set_adapter"
            )
        slot.topology_router = owner

    @property
    def empty(self) -> bool:
        """Known on the host to hold no token."""
        return not isinstance(self.length, Tensor) and self.length == 0

    @property
    def layout(self) -> SequenceLayout:
        """Layout of the cached tokens; waits for the GPU where their number is a tensor."""
        return _layout_of(self._slot.indexer_keys[:, : self.length])

    @property
    def last_token(self) -> SequenceLayout:
        """Layout `[B, 1]` of the last cached token."""
        records = self._slot.indexer_keys
        last = torch.as_tensor(self.length, device=records.device).reshape(1) - 1
        return _layout_of(records.index_select(1, last.clamp(min=0)))

    def append(self, address: Tensor, layout: SequenceLayout) -> Keys:
        """Add the new tokens' key addresses `[B, R, T]` and layout; return those of all cache slots."""
        fields = [address.transpose(1, 2), layout.position[..., None] + 1, layout.document[..., None]]
        fresh = self.empty
        records = self._cache.update_indexer(torch.cat([x.int() for x in fields], -1), self._layer)
        if fresh and records.shape[1] == layout.position.shape[1]:
            return Keys(address, layout, records)
        return Keys(records=records)


def _layout_of(records: Tensor) -> SequenceLayout:
    return SequenceLayout(records[..., -1].long(), records[..., -2].long() - 1)


def _make_indexed(cache: Cache, layer: int) -> None:
    while len(cache.layers) <= layer:
        if cache.layer_class_to_replicate is None:
            raise CacheError(f"past_key_values has {len(cache.layers)} layers, but layer {layer} was asked for")
        cache.layers.append(cache.layer_class_to_replicate())
    old = cache.layers[layer]
    if isinstance(old, (DynamicIndexedLayer, StaticIndexedLayer)):
        return
    if type(old) is DynamicLayer:
        new = DynamicIndexedLayer()
    elif type(old) is StaticLayer:
        new = StaticIndexedLayer(max_cache_len=old.max_cache_len)
    else:
        raise CacheError(
            f"past_key_values.layers[{layer}] is a {type(old).__name__}, which cannot carry key addresses; use a "
            "DynamicCache or StaticCache (no quantised, sliding or hybrid layer) for routed layers."
        )
    new.__dict__.update(old.__dict__)
    cache.layers[layer] = new
