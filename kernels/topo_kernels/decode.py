"""Attention of a few new tokens over a long cache under the topology, forward only (kernels/README.md).

No key order is kept: a key's record (one int32 per route, its position and its document) is tiny beside its K and V,
so every step scans the records and attends to the keys it finds.

1. Scan: lists the keys that each query sees, chunk by chunk of the cache. The query heads of one KV head share a list,
   the union of what they see, whose entries say which of them see the key: they read each row of K and V once.
2. Attend: each program takes an equal share of a list, wherever in the cache its keys lie (split-K).
3. Combine: merges the shares by log-sum-exp.

No `T x S` tensor beyond the lists, no float atomics, fixed summation order.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import _check_device, _tanh
from .launch import check_qkv, score_arguments, stride_arguments

_LOWEST = tl.constexpr(-1e30)  # below any score; finite, because -inf - -inf is NaN
_MAX_CHUNKS = 256  # a program of the attend kernel holds the counts of all chunks
_MAX_HEADS = 16  # per list: one bit each in the upper half of an entry, one row each of the smallest matrix product
_MAX_SPLITS = 128
_MAX_KEYS = _MAX_CHUNKS * 2**16  # an entry holds the index within its chunk in 16 bits


@triton.jit(do_not_specialize=["T", "S", "chunks", "chunk", "U", "R", "local_window", "num_sink_tokens"])
def _scan_kernel(
    records,  # [B, S, R + 2] int32: key addresses, position + 1, document
    query_address,  # [B, R, T] int32
    query_position,  # [B, T]
    query_document,  # [B, T]
    balls,  # [R] int32
    entries,  # [B, U, T, chunks, chunk] int32: key index within the chunk, and from bit 16 on which heads see it
    counts,  # [B, U, T, chunks] int32
    stride_rb,
    stride_rs,
    T,
    S,
    chunks,
    chunk,  # keys per chunk, a multiple of STEPS * SUBS
    U,
    R,
    local_window,
    num_sink_tokens,
    ROUTE_GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_U: tl.constexpr,
    STEPS: tl.constexpr,
    SUBS: tl.constexpr,
):
    """Compact the keys of one chunk that one query sees, for a block of lists."""
    i_t = tl.program_id(0) % T  # queries that share a chunk run together
    i_chunk = tl.program_id(0) // T % chunks
    i_bu = tl.program_id(0) // T // chunks
    n_u = tl.cdiv(U, BLOCK_U)
    i_b = (i_bu // n_u).to(tl.int64)
    o_u = i_bu % n_u * BLOCK_U + tl.arange(0, BLOCK_U)
    m_u = o_u < U

    # a thread walks over STEPS consecutive tokens, so that most of the running count needs no exchange
    o_token = tl.arange(0, SUBS)[:, None] * STEPS + tl.arange(0, STEPS)[None, :]  # [SUBS, STEPS]
    o_record = o_token * stride_rs
    b_position = tl.load(query_position + i_b * T + i_t).to(tl.int32) + 1  # like the records: 0 for padding
    b_document = tl.load(query_document + i_b * T + i_t).to(tl.int32)
    o_row = (i_b * U + o_u) * T + i_t  # [BLOCK_U]
    o_list = (o_row * chunks + i_chunk) * chunk
    b_found = tl.zeros([BLOCK_U], dtype=tl.int32)
    for i_start in range(0, chunk, SUBS * STEPS):
        i_key = i_chunk * chunk + i_start
        p_tile = records + i_b * stride_rb + i_key.to(tl.int64) * stride_rs
        m_key = o_token < S - i_key
        b_kpos = tl.load(p_tile + R + o_record, mask=m_key, other=0)
        b_kdoc = tl.load(p_tile + R + 1 + o_record, mask=m_key, other=0)
        m_causal = (b_kpos > 0) & (b_kpos <= b_position) & (b_kdoc == b_document)
        m_always = m_causal & ((b_position - b_kpos < local_window) | (b_kpos <= num_sink_tokens))
        b_state = (m_causal.to(tl.int32) + m_always.to(tl.int32))[None, :, :]
        m_load = m_key[None, :, :] & m_u[:, None, None]
        b_bits = tl.zeros([BLOCK_U, SUBS, STEPS], dtype=tl.int32)
        for i_bit in tl.static_range(BITS):
            o_route = (o_u * HEADS + i_bit * (HEADS // BITS)) // ROUTE_GROUP
            if HEADS % ROUTE_GROUP == 0:  # consecutive routes, at constant offsets
                p_key = p_tile + (o_record[None, :, :] + (o_u * (HEADS // ROUTE_GROUP))[:, None, None]) + i_bit
            else:
                p_key = p_tile + (o_record[None, :, :] + o_route[:, None, None])
            b_key = tl.load(p_key, mask=m_load).to(tl.uint32)
            # With m = ceil(2^32 / d) and |n| * d < 2^31, n is a multiple of d iff n * m is within m / 2 of 0, modulo
            # 2^32 (after Lemire). For d = 1, m wraps to 0 and this always holds.
            b_d = tl.load(balls + o_route, mask=m_u, other=1).to(tl.uint32)
            b_m = tl.full([BLOCK_U], -1, dtype=tl.int32).to(tl.uint32, bitcast=True) // b_d + 1
            b_half = b_m >> 1
            b_ask = tl.load(query_address + (i_b * R + o_route) * T + i_t, mask=m_u, other=0).to(tl.uint32)
            b_offset = b_half - b_ask * b_m
            m_ball = b_key * b_m[:, None, None] + b_offset[:, None, None] <= (b_half + b_half)[:, None, None]
            b_bits |= m_ball.to(tl.int32) << i_bit
        b_bits = tl.where(b_state == 2, (1 << BITS) - 1, tl.where(b_state == 1, b_bits, 0))
        b_seen = (b_bits != 0).to(tl.int32)  # [BLOCK_U, SUBS, STEPS]
        b_total = tl.sum(b_seen, 2)  # [BLOCK_U, SUBS]
        b_before = b_found[:, None] + tl.cumsum(b_total, 1) - b_total
        o_entry = b_before[:, :, None] + tl.cumsum(b_seen, 2) - 1
        p_entry = entries + o_list[:, None, None] + o_entry
        b_entry = i_start + o_token[None, :, :] + (b_bits << 16)
        tl.store(p_entry, b_entry, mask=(b_seen != 0) & m_u[:, None, None])
        b_found += tl.sum(b_total, 1)
    tl.store(counts + o_row * chunks + i_chunk, b_found, mask=m_u)


@triton.jit(do_not_specialize=["T", "chunks", "chunk", "splits", "rows", "U"])
def _attend_kernel(
    q,
    k,
    v,
    entries,  # [B, U, T, chunks, chunk] int32
    counts,  # [B, U, T, chunks] int32
    split_out,  # [B, U, T, HEADS, splits, D] fp32, unnormalised
    split_max,  # [B, U, T, HEADS, splits] fp32, base 2
    split_sum,  # [B, U, T, HEADS, splits] fp32; 0 where a share has no key for the head
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    T,
    chunks,
    chunk,
    splits,
    rows,  # B * U * T
    U,
    KV_GROUP,
    score_scale,
    score_cap,
    HEADS: tl.constexpr,
    BITS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MAP: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """Attend to one share of a list, all heads of the list at once."""
    i_split = tl.program_id(0) // rows  # all lists start together: a long one is not left for the end
    i_row = (tl.program_id(0) % rows).to(tl.int64)
    i_t = i_row % T
    i_u = i_row // T % U
    i_b = i_row // T // U
    i_kv = i_u * HEADS // KV_GROUP

    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_c = tl.arange(0, BLOCK_C)
    m_m = o_m < HEADS
    m_d = o_d < D
    p_q = q + i_b * stride_qb + (i_u * HEADS + o_m)[:, None] * stride_qh + i_t * stride_qt + o_d[None, :]
    b_q = tl.load(p_q, mask=m_m[:, None] & m_d[None, :], other=0.0)

    # even shares of the list, in whole tiles; where in the cache its keys lie does not matter
    b_count = tl.load(counts + i_row * chunks + o_c, mask=o_c < chunks, other=0)
    b_first = tl.cumsum(b_count, 0) - b_count  # rank of each chunk's first key
    total = tl.sum(b_count, 0)
    share = tl.cdiv(tl.cdiv(total, splits), BLOCK_N) * BLOCK_N
    lo = i_split * share
    hi = tl.minimum(lo + share, total)

    o_bit = 16 + tl.where(m_m, o_m // (HEADS // BITS), 0)
    p_entries = entries + i_row * chunks * chunk
    p_k = k + i_b * stride_kb + i_kv * stride_kh
    p_v = v + i_b * stride_vb + i_kv * stride_vh
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], _LOWEST, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    o_map = tl.arange(0, MAP)
    for i_map in range(lo, hi, MAP):
        # for several tiles at once: rank -> chunk, the last that starts at or before the rank, and place in it
        m_begun = b_first <= i_map
        m_within = (b_first > i_map) & (b_first < i_map + MAP)
        b_begins = tl.histogram(tl.where(m_within, b_first - i_map, 0), MAP, mask=m_within)
        o_chunk = tl.sum(m_begun.to(tl.int32), 0) - 1 + tl.cumsum(b_begins, 0)
        p_entry = p_entries + (o_chunk * chunk + i_map + o_map - tl.gather(b_first, o_chunk, 0))
        b_entries = tl.load(p_entry, mask=o_map < hi - i_map, other=0)
        b_keys = o_chunk * chunk + (b_entries & 0xFFFF)

        for i_n in range(i_map, tl.minimum(i_map + MAP, hi), BLOCK_N):
            m_n = o_n < hi - i_n
            o_map_n = tl.minimum(i_n - i_map + o_n, MAP - 1)  # the software pipeline looks beyond the last tile
            o_key = tl.gather(b_keys, o_map_n, 0).to(tl.int64)
            p_kt = p_k + o_key[None, :] * stride_ks + o_d[:, None]  # [BLOCK_D, BLOCK_N]
            p_vt = p_v + o_key[:, None] * stride_vs + o_d[None, :]  # [BLOCK_N, BLOCK_D]
            b_kt = tl.load(p_kt, mask=m_d[:, None] & m_n[None, :], other=0.0)
            b_v = tl.load(p_vt, mask=m_n[:, None] & m_d[None, :], other=0.0)
            b_s = tl.dot(b_q, b_kt, input_precision="ieee") * score_scale  # [BLOCK_M, BLOCK_N]
            if HAS_CAP:
                b_s = score_cap * _tanh(b_s)
            m_s = m_n[None, :]
            if BITS > 1:
                b_entry = tl.gather(b_entries, o_map_n, 0)
                m_s = m_s & ((b_entry[None, :] >> o_bit[:, None]) & 1 != 0)
            b_s = tl.where(m_s, b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1))
            b_decay = tl.exp2(b_max - b_new)
            b_probs = tl.exp2(b_s - b_new[:, None])
            b_sum = b_sum * b_decay + tl.sum(b_probs, 1)
            b_acc = tl.dot(b_probs.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision="ieee")
            b_max = b_new

    o_split = (i_row * HEADS + o_m) * splits + i_split
    tl.store(split_max + o_split, b_max, mask=m_m)
    tl.store(split_sum + o_split, b_sum, mask=m_m)
    m_some = (m_m & (b_sum > 0))[:, None] & m_d[None, :]  # the combine kernel reads no other rows
    tl.store(split_out + o_split[:, None] * D + o_d[None, :], b_acc, mask=m_some)


@triton.jit(do_not_specialize=["T", "splits", "U"])
def _combine_kernel(
    split_out,  # [B, U, T, HEADS, splits, D] fp32
    split_max,  # [B, U, T, HEADS, splits] fp32
    split_sum,
    out,  # [B, T, U * HEADS, D]
    T,
    splits,
    U,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merge the splits of one query and head by log-sum-exp, for BLOCK_D columns."""
    n_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    i_in = (tl.program_id(0) // n_d).to(tl.int64)
    i_head = i_in % HEADS
    i_t = i_in // HEADS % T
    i_u = i_in // HEADS // T % U
    i_b = i_in // HEADS // T // U

    o_s = tl.arange(0, BLOCK_S)
    o_d = tl.program_id(0) % n_d * BLOCK_D + tl.arange(0, BLOCK_D)
    m_s = o_s < splits
    b_sum = tl.load(split_sum + i_in * splits + o_s, mask=m_s, other=0.0)
    b_max = tl.load(split_max + i_in * splits + o_s, mask=m_s, other=_LOWEST)
    m_some = b_sum > 0
    b_weight = tl.where(m_some, tl.exp2(b_max - tl.max(b_max, 0)), 0.0)
    p_split = split_out + (i_in * splits + o_s)[:, None] * D + o_d[None, :]
    b_split = tl.load(p_split, mask=m_some[:, None] & (o_d < D)[None, :], other=0.0)
    total = tl.sum(b_weight * b_sum, 0)
    b_out = tl.sum(b_weight[:, None] * b_split, 0) / tl.where(total > 0, total, 1.0)  # 0 for padding
    o_out = (i_b * T + i_t) * U * HEADS + i_u * HEADS + i_head
    tl.store(out + o_out * D + o_d, b_out.to(out.dtype.element_ty), mask=o_d < D)


class Tiles(NamedTuple):
    """Work of one program and how it is compiled."""

    attend_keys: int
    attend_warps: int
    attend_stages: int
    map_keys: int = 256
    programs_per_processor: int = 2  # few, with long shares: each fills a software pipeline anew
    scan_keys: int = 256
    scan_warps: int = 8


def choose_tiles(head_dim: int, dtype: torch.dtype) -> Tiles:
    """Tiles of about 16 KB of K and V each: several programs share a processor and hide each other's latency."""
    if dtype == torch.float32:
        return Tiles(32 if head_dim <= 128 else 16, 8, 2)
    return Tiles(64 if head_dim <= 128 else 32, 4, 3)


def _heads_per_list(group: int) -> int:
    """Query heads that share a list: all of a KV head's, or the largest even part that the bits of an entry hold."""
    return max(n for n in range(1, _MAX_HEADS + 1) if group % n == 0)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@torch.library.custom_op("topo_kernels::decode_attention", mutates_args=())
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_address: Tensor,
    query_position: Tensor,
    query_document: Tensor,
    records: Tensor,
    balls: Tensor,
    local_window: int,
    num_sink_tokens: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """The three kernels on checked arguments; `[B, T, H, D]`."""
    q, k, v, records = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, records))
    query = [t.contiguous() for t in (query_address, query_position, query_document)]
    B, H, T, D = q.shape
    S, R = k.shape[2], balls.shape[0]
    tiles = choose_tiles(D, q.dtype)
    kv_group, route_group = H // k.shape[1], H // R
    heads = _heads_per_list(kv_group)
    lists = H // heads
    shared = math.gcd(heads, route_group)  # neighbours that share a route share a bit
    bits = heads // shared
    chunk = tiles.scan_keys * max(1, triton.cdiv(S, tiles.scan_keys * _MAX_CHUNKS))
    chunks = max(1, triton.cdiv(S, chunk))
    rows = B * lists * T
    wanted = triton.cdiv(tiles.programs_per_processor * _processors(q.device), rows)
    splits = max(1, min(wanted, triton.cdiv(S, tiles.attend_keys), _MAX_SPLITS))

    entries = torch.empty(rows, chunks, chunk, dtype=torch.int32, device=q.device)
    counts = torch.empty(rows, chunks, dtype=torch.int32, device=q.device)
    split_out = torch.empty(rows, heads, splits, D, dtype=torch.float32, device=q.device)
    split_max, split_sum = torch.empty(2, rows, heads, splits, dtype=torch.float32, device=q.device)
    out = q.new_empty(B, T, H, D)
    block_u = min(triton.next_power_of_2(lists), 16, 32 // triton.next_power_of_2(bits))  # bounds registers
    subs = 32 * tiles.scan_warps // block_u
    with torch.cuda.device_of(q):
        _scan_kernel[(B * triton.cdiv(lists, block_u) * chunks * T,)](
            records,
            *query,
            balls.contiguous(),
            entries,
            counts,
            records.stride(0),
            records.stride(1),
            T,
            S,
            chunks,
            chunk,
            lists,
            R,
            local_window,
            num_sink_tokens,
            ROUTE_GROUP=route_group,
            HEADS=heads,
            BITS=bits,
            BLOCK_U=block_u,
            STEPS=tiles.scan_keys // subs,
            SUBS=subs,
            num_warps=tiles.scan_warps,
            num_stages=1,
        )
        _attend_kernel[(rows * splits,)](
            q,
            k,
            v,
            entries,
            counts,
            split_out,
            split_max,
            split_sum,
            **stride_arguments(q=(q, "bht"), k=(k, "bhs"), v=(v, "bhs")),
            **score_arguments(D, scale, softcap),
            T=T,
            chunks=chunks,
            chunk=chunk,
            splits=splits,
            rows=rows,
            U=lists,
            KV_GROUP=kv_group,
            HEADS=heads,
            BITS=bits,
            BLOCK_M=16,
            BLOCK_N=tiles.attend_keys,
            BLOCK_C=_MAX_CHUNKS,
            MAP=tiles.map_keys,
            num_warps=tiles.attend_warps,
            num_stages=tiles.attend_stages,
        )
        columns = 32
        _combine_kernel[(rows * heads * triton.cdiv(D, columns),)](
            split_out,
            split_max,
            split_sum,
            out,
            T,
            splits,
            lists,
            HEADS=heads,
            D=D,
            BLOCK_S=_MAX_SPLITS,
            BLOCK_D=columns,
            num_warps=4,
        )
    return out


@_decode.register_fake
def _(q, *_others):
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D)


def _check(
    q: Tensor, k: Tensor, v: Tensor, query: dict[str, Tensor], records: Tensor, balls: Tensor, local_window: int
) -> None:
    check_qkv(q, k, v)
    B, H, T, _ = q.shape
    S = k.shape[2]
    if S > _MAX_KEYS:
        raise ValueError(f"k must have at most {_MAX_KEYS} keys, got {S}.")
    if balls.ndim != 1 or balls.shape[0] == 0 or H % balls.shape[0]:
        raise ValueError(f"balls must have shape [R] with R a divisor of q's {H} heads, got {tuple(balls.shape)}.")
    R = balls.shape[0]
    shapes = {"query_address": (B, R, T), "query_position": (B, T), "query_document": (B, T), "records": (B, S, R + 2)}
    tensors = query | {"records": records, "balls": balls}
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensors[name].shape)}.")
    for name in ("query_address", "records", "balls"):
        if tensors[name].dtype != torch.int32:
            raise ValueError(f"{name} must be int32, got {tensors[name].dtype}.")
    for name in ("query_position", "query_document"):
        if tensors[name].dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64, got {tensors[name].dtype}.")
    for name, tensor in tensors.items():
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}.")
    if local_window < 1:
        raise ValueError(f"local_window must be >= 1, got {local_window}.")


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_address: Tensor,
    query_position: Tensor,
    query_document: Tensor,
    records: Tensor,
    balls: Tensor,
    *,
    local_window: int,
    num_sink_tokens: int,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention of new tokens over a cache, over the visible pairs of docs/method.md, section 2.

    Made for a few queries: time and scratch memory (`4 * H_kv * S` bytes for each) grow with `B * T`. The values of
    integer tensors are trusted: checking them would wait for the GPU. Not differentiable. Never waits for the GPU and
    takes its grids from shapes, so it may be captured in a CUDA graph.

    Args:
        q: `[B, H, T, D]`, float16, bfloat16 or float32; D from 16 to 256. Any strides.
        k, v: `[B, H_kv, S, D]`, q's dtype, H a multiple of H_kv; any strides, but a strided last dimension is copied.
            The new tokens are among the keys. Keys that no query sees are not read: they may be NaN.
        query_address: int32 `[B, R, T]`, H a multiple of R; in `[0, 2^15)`. Head `h` takes route `h // (H // R)`.
        query_position: int32 or int64 `[B, T]`; position in the query's document, -1 for padding.
        query_document: int32 or int64 `[B, T]`; any label that fits an int32.
        records: int32 `[B, S, R + 2]`, any strides (a strided last dimension is copied); per key the R addresses, in
            `[0, 2^15)`, its position plus one (0: padding or an unfilled slot of the cache) and its document.
        balls: int32 `[R]`, number of balls at each route's visible depth, 1 (dense) to 2^15: the ball of an address is
            its remainder by this.
        local_window: >= 1. num_sink_tokens: >= 0.
        scale: factor on the scores.
        softcap: if given, > 0; scores become `softcap * tanh(score / softcap)`.

    Returns:
        `[B, H, T, D]` in q's dtype, the transposed view of a contiguous `[B, T, H, D]`. Rows of padding queries are 0.

    Raises:
        ValueError: a shape, dtype, device or option does not fit; the message names the argument.
        RuntimeError: the device cannot run the kernels, or a gradient was asked for.
    """
    query = {"query_address": query_address, "query_position": query_position, "query_document": query_document}
    _check(q, k, v, query, records, balls, local_window)
    if num_sink_tokens < 0:
        raise ValueError(f"num_sink_tokens must be >= 0, got {num_sink_tokens}.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be None or > 0, got {softcap}.")
    _check_device(q)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError(
            "decode_attention is forward only, but q, k or v requires a gradient: use the torch path for training, "
            "or call it under torch.no_grad()."
        )
    if q.numel() == 0:
        return torch.empty_like(q)
    out = _decode(q, k, v, *query.values(), records, balls, local_window, num_sink_tokens, scale, softcap)
    return out.transpose(1, 2)
