"""Ranges turned around: what each query sees of sorted keys, as what sees each key of sorted queries. In torch."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .types import LocalPlan, Plan

_ABSENT = torch.iinfo(torch.int32).max  # sorts after every rank


class QueryRanges(NamedTuple):
    """The queries that see each of N keys: `query_order[first:last]`.

    query_order: int32 `[B, R, T]`. first, last: int32 `[B, R, N]`.
    key_order: int32 `[B, R, N]`, the keys; None for the identity.
    """

    query_order: Tensor
    key_order: Tensor | None
    first: Tensor
    last: Tensor


class SinkChunks(NamedTuple):
    """Where the gradients of sinks are summed: slot `sink_index` of each chunk in `[chunk_first, chunk_last)`.

    All int32 `[B, S]`, by local rank; an empty range for other keys.
    """

    chunk_first: Tensor
    chunk_last: Tensor
    sink_index: Tensor


def inverse_ranges(range_start: Tensor, range_end: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """For each sorted key the sorted queries that see it: int32 `[B, R, S]` first, and one past the last.

    Among the queries with a range that is not empty, starts and ends must rise. The others take the end before them
    and the start after them, so that no key counts them.

    Args:
        range_start, range_end: int32 `[B, R, T]`; sorted query `i` sees the sorted keys `[start, end)`.
    """
    some = range_start < range_end
    ends = torch.where(some, range_end, 0).cummax(-1).values
    starts = torch.where(some, range_start, _ABSENT).flip(-1).cummin(-1).values.flip(-1)
    rank = torch.arange(num_keys, dtype=torch.int32, device=starts.device)
    rank = rank.expand(*starts.shape[:2], num_keys).contiguous()
    first = torch.searchsorted(ends, rank, right=True, out_int32=True)
    return first, torch.searchsorted(starts.contiguous(), rank, right=True, out_int32=True)


def tree_ranges(plan: Plan) -> tuple[QueryRanges, Tensor]:
    """Turn the tree's ranges around.

    Returns:
        The ranges, and int32 `[B, R, S]`: the rank of each key in `key_order`, -1 if no query sees it.
    """
    key_order = plan.key_order
    B, R, S = key_order.shape
    first, last = inverse_ranges(plan.range_start, plan.range_end, S)
    seen = first < last
    slot = torch.full((B, R, S + 1), -1, dtype=torch.int32, device=key_order.device)
    index = torch.where(seen, key_order, S).long()  # entries that are in no range share a column
    rank = torch.arange(S, dtype=torch.int32, device=key_order.device)
    slot.scatter_(2, index, torch.where(seen, rank, -1))
    return QueryRanges(plan.query_order, key_order, first, last), slot[..., :-1].contiguous()


def local_ranges(
    plan: LocalPlan, num_keys: int, chunk: int, block: int
) -> tuple[QueryRanges, QueryRanges | None, SinkChunks]:
    """Turn windows and sinks around: for each key, by local rank, the queries, by local rank, that see it.

    First come the queries with the key in their window; where the key is a sink, the rest of its document follows.
    A chunk is `chunk` queries in a row. Its first query's document has the chunk to itself as far as its sinks are
    concerned, so there is one set of sinks per chunk; documents that begin within a chunk are left to the local pass
    there, at most `chunk` queries for each key.

    Args:
        block: slots of a chunk are a multiple of it, so that no block of slots lies in two chunks.

    Returns:
        The local pass, the chunks' pass with `[B, 1, chunks * slots]` keys (None: no chunks), and where that leaves
        the sums.
    """
    local_order, num_sink_tokens = plan.local_order, plan.num_sink_tokens
    B, T = plan.local_end.shape
    real = plan.local_start < plan.local_end
    own, query_order = torch.where(real, plan.local_end - 1, _ABSENT).sort(-1)
    starts = torch.where(real, plan.local_start, _ABSENT).gather(1, query_order)
    documents = torch.where(real, plan.document_start, _ABSENT).gather(1, query_order)
    query_order = query_order.int()[:, None]
    rank = torch.arange(num_keys, dtype=torch.int32, device=own.device).expand(B, num_keys).contiguous()

    def count(values: Tensor, right: bool) -> Tensor:
        return torch.searchsorted(values, rank, right=right, out_int32=True)

    first, window, last = count(own, False), count(starts, True), count(documents, True)
    begin = documents.gather(1, window.clamp(max=T - 1).long())  # of the document, if anything follows the window
    sink = (window < last) & (rank - begin < num_sink_tokens)
    zero = torch.zeros_like(rank)
    key_order = None if local_order is None else local_order[:, None]
    if num_sink_tokens == 0 or chunk >= T:
        local = QueryRanges(query_order, key_order, first[:, None], torch.where(sink, last, window)[:, None])
        return local, None, SinkChunks(zero, zero, zero)

    num_chunks, num_slots = triton.cdiv(T, chunk), triton.cdiv(min(num_sink_tokens, num_keys), block) * block
    begin = torch.where(sink, begin, 0)
    # the first query of each key's document, and the first chunk that begins in it
    document_first = torch.searchsorted(documents, begin.contiguous(), out_int32=True)
    chunk_first = (document_first + chunk - 1) // chunk
    chunk_last = (last + chunk - 1) // chunk
    near = torch.where(sink, torch.maximum(window, torch.minimum(last, chunk_first * chunk)), window)
    local = QueryRanges(query_order, key_order, first[:, None], near[:, None])
    sums = SinkChunks(
        torch.where(sink, chunk_first, 0), torch.where(sink, chunk_last, 0), torch.where(sink, rank - begin, 0)
    )
    # slot s of a chunk is sink s of the document of the chunk's first query
    owner = documents[:, ::chunk]  # [B, chunks]
    index = torch.arange(num_slots, dtype=torch.int32, device=own.device)
    exists = (owner < _ABSENT)[..., None] & (index < num_sink_tokens)
    place = torch.where(exists, owner[..., None] + index, num_keys).clamp(max=num_keys)
    exists = (place < num_keys).flatten(1)
    place = place.clamp(max=num_keys - 1).flatten(1).long()
    begins = torch.arange(0, T, chunk, dtype=torch.int32, device=own.device)[:, None]
    document_last = last.gather(1, owner.clamp(max=num_keys - 1).long())[..., None]
    slot_first = torch.maximum(window.gather(1, place).view(B, num_chunks, num_slots), begins)
    slot_last = torch.minimum(document_last, begins + chunk).expand_as(slot_first)
    slot_last = torch.where(exists.view_as(slot_first), slot_last, 0)
    slot_first, slot_last = (t.flatten(1)[:, None].contiguous() for t in (slot_first, slot_last))
    keys = place.int() if local_order is None else local_order.gather(1, place)
    chunks = QueryRanges(query_order, keys[:, None], slot_first, slot_last)
    return local, chunks, sums


class FarRanges(NamedTuple):
    """Both sides of the far pairs, by local rank: of each query the range of keys, of each key the range of queries."""

    query_order: Tensor | None  # int32 [B, T], padding last; None: the identity
    start: Tensor  # [B, T]
    end: Tensor
    first: Tensor  # [B, 1, S]
    last: Tensor


def far_ranges(plan: LocalPlan, num_keys: int) -> FarRanges:
    """The far keys of each query, between its document's sinks and its window, and the queries far from each key."""
    start, end = torch.minimum(plan.document_start + plan.num_sink_tokens, plan.local_start), plan.local_start
    query_order = None
    if plan.local_order is None:
        start, end = start.contiguous(), end.contiguous()
    else:
        real = plan.local_start < plan.local_end
        query_order = torch.where(real, plan.local_end, _ABSENT).argsort(1)
        start, end = start.gather(1, query_order), torch.where(real, end, start).gather(1, query_order)
        query_order = query_order.int()
    first, last = inverse_ranges(start[:, None], end[:, None], num_keys)
    return FarRanges(query_order, start, end, first, last)
