"""Key addresses in the key-value cache.

Addresses are per token and independent of the query, so they live beside the keys: in the indexer slot
that transformers' cache layers offer for sparse attention. Crop, beam reorder, batch repeat, offload and
reset then act on them as on the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticIndexedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from ..core.device import graph_is_recorded
from ..core.layout import SequenceLayout, continued_layout
from ..core.records import Keys, Records, pack_records
from ..errors import CacheError
from ..ops.router import Router

#: Names under which attention modules are handed their cache; newer ones are found by their type.
_CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")


def cache_among(inputs: dict[str, Any]) -> Cache | None:
    """The key-value cache among what an attention module is called with, whatever its name.

    Raises:
        CacheError: there are two, or one of a kind that cannot hold key addresses.
    """
    found: dict[int, Cache] = {}
    for name, value in inputs.items():
        if isinstance(value, EncoderDecoderCache) or (
            name in _CACHE_NAMES and value is not None and not isinstance(value, Cache)
        ):
            raise CacheError(
                f"{name} must be a DynamicCache or StaticCache for routed layers, got {type(value).__name__}; "
                "continuous batching's paged cache, encoder-decoder caches and tuples hold no key addresses"
            )
        if isinstance(value, Cache):
            found[id(value)] = value
    if len(found) > 1:
        raise CacheError(f"an attention module must be handed one key-value cache, got {len(found)} different ones")
    return next(iter(found.values()), None)


class KeyRecords:
    """The address records of one layer of a cache.

    Nothing here waits for the GPU while a graph is compiled or captured; the length of a static cache is a tensor
    then, and a cache that was filled in part without the topology is not noticed.

    Attributes:
        length: number of cached tokens.

    Args:
        routed: whether the router makes the new tokens' addresses; False where no head has a tree and nobody asks.
        window: sliding window that the model's config carries and the module does not follow, or None.

    Raises:
        CacheError: the cache layer's type cannot hold records, or it holds tokens without records because
            they were cached while no topology was active, or with records of another router.
    """

    length: int | Tensor

    def __init__(
        self, cache: Cache, layer: int, router: Router, routed: bool = True, window: int | None = None
    ) -> None:
        _make_indexed(cache, layer, window)
        self._cache, self._layer = cache, layer
        self._routes, self._leaves = router.num_heads, router.arity**router.depth
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
            raise CacheError(_why_unaddressed(layer, self.length, recorded))
        # an address means nothing on another router's tree
        if routed and self.length and getattr(slot, "topology_router", None) != id(router):
            raise CacheError(
                f"the key-value cache holds keys in layer {layer} that this adapter's router did not address: they "
                "were cached by another adapter, or while no head of the layer had a tree. Start from a fresh cache."
            )
        slot.topology_router = id(router) if routed else None

    @property
    def empty(self) -> bool:
        """Known on the host to hold no token."""
        return not isinstance(self.length, Tensor) and self.length == 0

    @property
    def layout(self) -> SequenceLayout:
        """Layout of the cached tokens; waits for the GPU where their number is a tensor."""
        return self._records(self._slot.indexer_keys[:, : self.length]).layout

    def continued_layout(self, batch: int, length: int, position_ids: Tensor | None) -> SequenceLayout:
        """Layout of `length` unpadded new tokens; `position_ids` `[B or 1, length]` that restart begin a new document.

        All layers of a forward share what the first one makes. A layer below the last that asked means another
        forward, also where a CUDA graph is captured and the values of a static cache's length are not known.
        """
        known: _Continued | None = getattr(self._cache, "topology_layout", None)
        words = self._slot.indexer_keys
        if known is not None and known.serves(self._layer, self.length, position_ids, (batch, length), words.device):
            known.layer = self._layer
            return known.layout
        last = torch.as_tensor(self.length, device=words.device).reshape(1) - 1
        last_token = self._records(words.index_select(1, last.clamp(min=0))).layout
        rows = None if position_ids is None else position_ids.expand(batch, -1)
        layout = continued_layout(last_token, length, rows, self.length)
        if not torch.compiler.is_compiling():  # it would guard on this, and compile anew for every token
            self._cache.topology_layout = _Continued(self._layer, self.length, position_ids, layout)
        return layout

    def append(self, address: Tensor, layout: SequenceLayout) -> Keys:
        """Add the new tokens' key addresses `[B, R, T]` and layout; return those of all cache slots."""
        fresh = self.empty
        words = self._cache.update_indexer(pack_records(address, layout, self._leaves).words, self._layer)
        if fresh and words.shape[1] == layout.position.shape[1]:
            return Keys(address, layout, self._records(words))
        return Keys(records=self._records(words))

    def _records(self, words: Tensor) -> Records:
        return Records(words, self._routes, self._leaves)


def _why_unaddressed(layer: int, keys: int, addresses: int) -> str:
    """What must have happened to a cache layer that holds another number of keys than of their addresses."""
    found = f"the key-value cache holds {keys} keys in layer {layer} and the addresses of {addresses} tokens: "
    if addresses > keys:
        return found + (
            "keys were taken out of it by hand (pruned or evicted), which leaves the others without their addresses. "
            "Start from a fresh cache; to drop the last tokens call its crop()."
        )
    if addresses:
        return found + (
            "the others were put in by hand, or cached while the topology adapter was disabled or at homotopy 0. Start "
            "from a fresh cache."
        )
    return found + (
        "it was made from saved key and value tensors, which carry no addresses, or filled while the topology adapter "
        "was disabled or at homotopy 0. Start from a fresh cache; to keep one, keep the cache object (copy.deepcopy, "
        "pickle)."
    )


@dataclass
class _Continued:
    """The layout of new tokens, and what it was made for."""

    layer: int
    past_length: int | Tensor
    position_ids: Tensor | None
    layout: SequenceLayout

    def serves(
        self,
        layer: int,
        past_length: int | Tensor,
        position_ids: Tensor | None,
        shape: tuple[int, int],
        device: torch.device,
    ) -> bool:
        ints = isinstance(past_length, int) and isinstance(self.past_length, int)
        if ints and past_length != self.past_length:
            return False
        position = self.layout.position
        return (
            self.layer < layer
            and self.position_ids is position_ids
            and (position.shape, position.device) == (shape, device)
        )


def _make_indexed(cache: Cache, layer: int, window: int | None) -> None:
    while len(cache.layers) <= layer:
        if cache.layer_class_to_replicate is None:
            raise CacheError(f"the key-value cache has {len(cache.layers)} layers, but layer {layer} was asked for")
        cache.layers.append(cache.layer_class_to_replicate())
    old = cache.layers[layer]
    if isinstance(old, (DynamicIndexedLayer, StaticIndexedLayer)):
        return
    # A window in the config makes sliding cache layers, also where it hides nothing from the module: before they have
    # dropped a token they become full ones.
    new: DynamicIndexedLayer | StaticIndexedLayer
    if type(old) is DynamicLayer:
        new = DynamicIndexedLayer()
    elif type(old) is DynamicSlidingWindowLayer and old.sliding_window == window and not old.get_seq_length():
        cache.layers[layer] = DynamicIndexedLayer()
        return
    elif type(old) is StaticLayer or (type(old) is StaticSlidingWindowLayer and _holds_all(old, window)):
        new = StaticIndexedLayer(max_cache_len=old.max_cache_len)
    else:
        raise CacheError(
            f"the key-value cache's layer {layer} is a {type(old).__name__}, which cannot carry key addresses; use a "
            "DynamicCache or StaticCache (no quantised, sliding or hybrid layer) for routed layers."
        )
    new.__dict__.update(old.__dict__)
    cache.layers[layer] = new


def _holds_all(layer: StaticSlidingWindowLayer, window: int | None) -> bool:
    """Whether a static sliding layer is empty and as long as the cache it belongs to, which its window did not cut."""
    uncut = getattr(layer, "_is_croppable", None)  # older transformers does not say it
    if uncut is None:
        uncut = window is not None and layer.max_cache_len < window
    return bool(uncut) and not int(layer.get_seq_length())
