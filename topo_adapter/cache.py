"""Key addresses in the key-value cache.

Addresses are per token and independent of the query, so they live beside the keys: in the indexer slot
that transformers' cache layers offer for sparse attention. Crop, beam reorder, batch repeat, offload and
reset then act on them as on the keys. One record per token, int32 `[B, S, R + 2]`: the key address of
each of the `R` routes, the position in its document plus one (0: padding or an unfilled slot), and the
document.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    StaticIndexedLayer,
    StaticLayer,
)

from .errors import CacheError
from .layout import SequenceLayout


class KeyRecords:
    """The address records of one layer of a cache.

    Raises:
        CacheError: the cache layer's type cannot hold records, or it holds tokens without records because
            they were cached while no topology was active, or with records of another router.
    """

    def __init__(self, cache: Cache, layer: int, router: nn.Module) -> None:
        if not isinstance(cache, Cache):
            raise CacheError(f"past_key_values must be a transformers Cache, got {type(cache).__name__}")
        _make_indexed(cache, layer)
        self._cache, self._layer = cache, layer
        slot = cache.layers[layer]
        self.length = int(slot.get_seq_length())
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
        self._records: Tensor | None = slot.indexer_keys[:, : self.length] if self.length else None

    @property
    def layout(self) -> SequenceLayout | None:
        """Layout of the cached tokens; None if there are none."""
        if self._records is None:
            return None
        records = self._records.long()
        return SequenceLayout(records[..., -1], records[..., -2] - 1)

    def append(self, address: Tensor, layout: SequenceLayout) -> tuple[Tensor, SequenceLayout]:
        """Add the new tokens' key addresses `[B, R, T]` and layout; return those of all cache slots."""
        fields = [address.transpose(1, 2), layout.position[..., None] + 1, layout.document[..., None]]
        records = self._cache.update_indexer(torch.cat(fields, -1).to(torch.int32), self._layer).long()
        every = SequenceLayout(records[..., -1], records[..., -2] - 1)
        return records[..., :-2].transpose(1, 2), every


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
