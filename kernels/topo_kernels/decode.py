"""Attention of a few new tokens over a long cache under the topology, forward only (kernels/README.md).

No key order is kept: a key's addresses, position and document are tiny beside its K and V, so every step scans them
all and attends to the keys it finds.

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

from .checks import MAX_VISITS, check_device, check_qkv, check_scoring, check_sinks
from .launch import overlap, score_arguments, stride_arguments
from .primitives import LOWEST, let_next_start, tanh, wait_for_previous
from .types import Scores, Scoring

_MAX_CHUNKS = 256  # a program of the attend kernel holds the counts of all chunks
_MAX_HEADS = 16  # per list: one bit each in the upper half of an entry, one row each of the smallest matrix product
_MAX_SPLITS = 128
_SCANS = 4  # programs of the scan kernel for each processor, about
_MAX_KEYS = _MAX_CHUNKS * 2**16  # an entry holds the index within its chunk in 16 bits


@triton.jit
def _ceil_2_32_over(b_d):
    """ceil(2^32 / d) modulo 2^32 as uint32, for int32 d in [1, 2^15], without an integer division."""
    b_guess = (4294967040.0 / b_d.to(tl.float32)).to(tl.uint32)  # at most 1100 / d off
    b_rest = (-(b_guess * b_d.to(tl.uint32)).to(tl.int32, bitcast=True)).to(tl.float32)  # 2^32 - guess * d
    return b_guess + tl.ceil((b_rest - 0.5) / b_d).to(tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def _without_tree(
    p_position, p_document, o_key, last, stride_ps, stride_ds, position, document, reach, num_sink_tokens
):
    """Which keys a query may see at all, and which it sees whatever their balls; nothing from key `last` on."""
    m_key = o_key < last
    b_kpos = tl.load(p_position + o_key * stride_ps, mask=m_key, other=0)
    b_kdoc = tl.load(p_document + o_key * stride_ds, mask=m_key, other=0)
    m_causal = (b_kpos > 0) & (b_kpos <= position) & (b_kdoc == document)
    return m_causal, m_causal & ((position - b_kpos < reach) | (b_kpos <= num_sink_tokens))


@triton.jit(do_not_specialize=["T", "S", "chunks", "chunk", "U", "R", "local_window", "num_sink_tokens", "dense_until"])
def _scan_kernel(
    key_address,  # [B, S, R] uint8, int16 or int32
    key_position,  # [B, S] int32, plus one
    key_document,  # [B, S] int32
    query_address,  # [B, R, VISITS, T] int32; -1: nowhere
    query_position,  # [B, T]
    query_document,  # [B, T]
    balls,  # [R] int32
    entries,  # [B, U, T, chunks, chunk] int32: key index within the chunk, and from bit 16 on which heads see it
    counts,  # [B, U, T, chunks] int32
    stride_ab,
    stride_as,
    stride_pb,
    stride_ps,
    stride_db,
    stride_ds,
    T,
    S,
    chunks,
    chunk,  # keys per chunk, a multiple of GROUPS * KEYS
    U,
    R,
    local_window,
    num_sink_tokens,
    dense_until,
    ROUTE_GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    BITS: tl.constexpr,
    VISITS: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUPS: tl.constexpr,
    KEYS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Compact the keys of one chunk that one query sees, for a block of lists."""
    ALL: tl.constexpr = (1 << BITS) - 1
    i_t = tl.program_id(0) % T  # queries that share a chunk run together
    i_bu = tl.program_id(0) // T
    i_chunk = tl.program_id(1)
    n_u = tl.cdiv(U, BLOCK_U)
    i_b = (i_bu // n_u).to(tl.int64)
    o_u = i_bu % n_u * BLOCK_U + tl.arange(0, BLOCK_U)
    m_u = o_u < U

    wait_for_previous(OVERLAP)
    position = tl.load(query_position + i_b * T + i_t).to(tl.int32) + 1  # like the keys': 0 for padding
    document = tl.load(query_document + i_b * T + i_t).to(tl.int32)
    reach = tl.where(position <= dense_until, position, local_window)  # of an early query: all keys before it
    o_row = (i_b * U + o_u) * T + i_t  # [BLOCK_U]
    p_list = entries + (o_row * chunks + i_chunk) * chunk
    # A thread takes KEYS neighbours at a time and keeps their bits in one word, so that few counts are exchanged.
    o_group = tl.arange(0, GROUPS) * KEYS
    o_v = tl.arange(0, BLOCK_V)
    b_found = tl.zeros([BLOCK_U], dtype=tl.int32)
    for i_start in range(0, chunk, GROUPS * KEYS):
        i_key = (i_chunk * chunk + i_start).to(tl.int64)
        last = tl.minimum(S - i_key, GROUPS * KEYS).to(tl.int32)
        p_position = key_position + i_b * stride_pb + i_key * stride_ps
        p_document = key_document + i_b * stride_db + i_key * stride_ds
        m_causal, m_always = _without_tree(
            *(p_position, p_document, tl.arange(0, GROUPS * KEYS), last, stride_ps, stride_ds),
            *(position, document, reach, num_sink_tokens),
        )
        both = tl.sum(m_causal.to(tl.int32) + (m_always.to(tl.int32) << 16), 0)
        if both > 0:
            p_address = key_address + i_b * stride_ab + i_key * stride_as
            b_words = tl.zeros([BLOCK_U, GROUPS], dtype=tl.uint32)
            for i_bit in tl.static_range(BITS):
                o_route = (tl.minimum(o_u, U - 1) * HEADS + i_bit * (HEADS // BITS)) // ROUTE_GROUP
                # With m = ceil(2^32 / d) and |n| * d < 2^31, n is a multiple of d iff n * m is within m / 2 of 0,
                # modulo 2^32 (after Lemire). For d = 1, m wraps to 0 and this always holds.
                b_m = _ceil_2_32_over(tl.load(balls + o_route))
                b_half = b_m >> 1
                p_ask = query_address + (i_b * R + o_route) * VISITS * T + i_t
                if VISITS == 1:
                    b_ask = tl.load(p_ask)
                    b_offset = b_half - b_ask.to(tl.uint32) * b_m
                    m_ask = b_ask >= 0
                else:
                    b_asks = tl.load(p_ask[:, None] + o_v[None, :] * T, mask=(o_v < VISITS)[None, :], other=-1)
                    b_offsets = b_half[:, None] - b_asks.to(tl.uint32) * b_m[:, None]  # [BLOCK_U, BLOCK_V]
                    m_asks = b_asks >= 0
                for i_n in tl.static_range(KEYS):
                    # lists and keys beyond the last repeat it here, and are dropped below: cheaper than masks
                    o_key = tl.minimum(o_group + i_n, last - 1)
                    b_key = tl.load(p_address + o_key[None, :] * stride_as + o_route[:, None])
                    b_product = b_key.to(tl.uint32) * b_m[:, None]
                    if VISITS == 1:
                        m_ball = (b_product + b_offset[:, None] <= (b_half + b_half)[:, None]) & m_ask[:, None]
                    else:
                        b_apart = b_product[:, :, None] + b_offsets[:, None, :]
                        m_each = (b_apart <= (b_half + b_half)[:, None, None]) & m_asks[:, None, :]
                        m_ball = tl.max(m_each.to(tl.int32), 2) != 0
                    b_words |= m_ball.to(tl.uint32) << (i_n * BITS + i_bit)
            # most tiles hold only keys that the tree alone decides on
            if both != GROUPS * KEYS:
                b_may = tl.zeros([GROUPS], dtype=tl.uint32)
                b_must = tl.zeros([GROUPS], dtype=tl.uint32)
                for i_n in tl.static_range(KEYS):
                    m_may, m_must = _without_tree(
                        *(p_position, p_document, o_group + i_n, last, stride_ps, stride_ds),
                        *(position, document, reach, num_sink_tokens),
                    )
                    b_may |= tl.where(m_may, ALL, 0).to(tl.uint32) << (i_n * BITS)
                    b_must |= tl.where(m_must, ALL, 0).to(tl.uint32) << (i_n * BITS)
                b_words = b_words & b_may[None, :] | b_must[None, :]
            b_words = tl.where(m_u[:, None], b_words, 0)

            b_count = tl.zeros([BLOCK_U, GROUPS], dtype=tl.int32)
            for i_n in tl.static_range(KEYS):
                b_count += ((b_words >> (i_n * BITS)) & ALL != 0).to(tl.int32)
            o_entry = b_found[:, None] + tl.cumsum(b_count, 1) - b_count
            for i_n in tl.static_range(KEYS):
                b_bits = ((b_words >> (i_n * BITS)) & ALL).to(tl.int32)
                b_entry = i_start + i_n + o_group[None, :] + (b_bits << 16)
                tl.store(p_list[:, None] + o_entry, b_entry, mask=b_bits != 0)
                o_entry += (b_bits != 0).to(tl.int32)
            b_found += tl.sum(b_count, 1)
    tl.store(counts + o_row * chunks + i_chunk, b_found, mask=m_u)
    let_next_start(OVERLAP)


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
    OVERLAP: tl.constexpr,
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

    wait_for_previous(OVERLAP)
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
    b_max = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
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
                b_s = score_cap * tanh(b_s)
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

    let_next_start(OVERLAP)
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
    OVERLAP: tl.constexpr,
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
    wait_for_previous(OVERLAP)
    b_sum = tl.load(split_sum + i_in * splits + o_s, mask=m_s, other=0.0)
    b_max = tl.load(split_max + i_in * splits + o_s, mask=m_s, other=LOWEST)
    m_some = b_sum > 0
    b_weight = tl.where(m_some, tl.exp2(b_max - tl.max(b_max, 0)), 0.0)
    p_split = split_out + (i_in * splits + o_s)[:, None] * D + o_d[None, :]
    b_split = tl.load(p_split, mask=m_some[:, None] & (o_d < D)[None, :], other=0.0)
    total = tl.sum(b_weight * b_sum, 0)
    b_out = tl.sum(b_weight[:, None] * b_split, 0) / tl.where(total > 0, total, 1.0)  # 0 for padding
    o_out = (i_b * T + i_t) * U * HEADS + i_u * HEADS + i_head
    tl.store(out + o_out * D + o_d, b_out.to(out.dtype.element_ty), mask=o_d < D)


class DecodeTiles(NamedTuple):
    """Work of one program and how it is compiled."""

    attend_keys: int
    attend_warps: int
    attend_stages: int
    programs_per_processor: int  # as many as run at once, with long shares: each fills a software pipeline anew
    map_keys: int = 256
    scan_keys: int = 256
    scan_warps: int = 4


def choose_decode_tiles(head_dim: int, dtype: torch.dtype) -> DecodeTiles:
    """Tiles of about 16 KB of K and V each: several programs share a processor and hide each other's latency."""
    if dtype == torch.float32:
        return DecodeTiles(32 if head_dim <= 128 else 16, 8, 2, 2)
    return DecodeTiles(64 if head_dim <= 128 else 32, 4, 2, 3)


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
    key_address: Tensor,
    key_position: Tensor,
    key_document: Tensor,
    balls: Tensor,
    local_window: int,
    num_sink_tokens: int,
    dense_until: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """The three kernels on checked arguments; `[B, T, H, D]`."""
    q, k, v, key_address = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, key_address))
    query = [t.contiguous() for t in (query_address, query_position, query_document)]
    B, H, T, D = q.shape
    S, R = k.shape[2], balls.shape[0]
    tiles = choose_decode_tiles(D, q.dtype)
    kv_group, route_group = H // k.shape[1], H // R
    heads = _heads_per_list(kv_group)
    lists, visits = H // heads, query_address.shape[2]
    shared = math.gcd(heads, route_group)  # neighbours that share a route share a bit
    bits = heads // shared
    block_u = min(triton.next_power_of_2(lists), 16)
    scans = B * triton.cdiv(lists, block_u) * T  # programs for each chunk
    chunk = tiles.scan_keys * max(
        1,
        triton.cdiv(S, tiles.scan_keys * _MAX_CHUNKS),
        S * scans // (tiles.scan_keys * _SCANS * _processors(q.device)),
    )
    chunk = min(chunk, 2**16)
    chunks = max(1, triton.cdiv(S, chunk))
    rows = B * lists * T
    wanted = tiles.programs_per_processor * _processors(q.device) // rows  # all at once
    splits = max(1, min(wanted, triton.cdiv(S, tiles.attend_keys), _MAX_SPLITS))
    overlapped = overlap(q.device)

    entries = torch.empty(rows, chunks, chunk, dtype=torch.int32, device=q.device)
    counts = torch.empty(rows, chunks, dtype=torch.int32, device=q.device)
    split_out = torch.empty(rows, heads, splits, D, dtype=torch.float32, device=q.device)
    split_max, split_sum = torch.empty(2, rows, heads, splits, dtype=torch.float32, device=q.device)
    out = q.new_empty(B, T, H, D)
    keys = min(8, triton.next_power_of_2(32 // bits // 2 + 1))  # a word holds their bits
    with torch.cuda.device_of(q):
        _scan_kernel[(scans, chunks)](
            *(key_address, key_position, key_document, *query, balls.contiguous(), entries, counts),
            *(*key_address.stride()[:2], *key_position.stride(), *key_document.stride()),
            *(T, S, chunks, chunk, lists, R, local_window, num_sink_tokens, dense_until),
            ROUTE_GROUP=route_group,
            HEADS=heads,
            BITS=bits,
            VISITS=visits,
            BLOCK_U=block_u,
            BLOCK_V=triton.next_power_of_2(visits),
            GROUPS=tiles.scan_keys // keys,
            KEYS=keys,
            num_warps=tiles.scan_warps,
            num_stages=1,
            **overlapped,
        )
        _attend_kernel[(rows * splits,)](
            *(q, k, v, entries, counts, split_out, split_max, split_sum),
            **stride_arguments(q=(q, "bht"), k=(k, "bhs"), v=(v, "bhs")),
            **score_arguments(D, Scores(scale, softcap)),
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
            **overlapped,
        )
        columns = 32
        _combine_kernel[(rows * heads * triton.cdiv(D, columns),)](
            *(split_out, split_max, split_sum, out, T, splits, lists),
            HEADS=heads,
            D=D,
            BLOCK_S=triton.next_power_of_2(splits),
            BLOCK_D=columns,
            num_warps=4,
            **overlapped,
        )
    return out


@_decode.register_fake
def _(q, *_others):
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D)


def _check(
    q: Tensor, k: Tensor, v: Tensor, query: dict[str, Tensor], key: dict[str, Tensor], balls: Tensor, local_window: int
) -> None:
    check_qkv(q, k, v)
    B, H, T, _ = q.shape
    S = k.shape[2]
    if S > _MAX_KEYS:
        raise ValueError(f"k must have at most {_MAX_KEYS} keys, got {S}.")
    if balls.ndim != 1 or balls.shape[0] == 0 or H % balls.shape[0]:
        raise ValueError(f"balls must have shape [R] with R a divisor of q's {H} heads, got {tuple(balls.shape)}.")
    R = balls.shape[0]
    visits = query["query_address"].shape[2] if query["query_address"].ndim == 4 else 0
    if not 1 <= visits <= MAX_VISITS:
        raise ValueError(
            f"query_address must have shape [B, R, m, T] with m from 1 to {MAX_VISITS}, got "
            f"{list(query['query_address'].shape)}."
        )
    integer = (torch.int32, torch.int64)
    needs: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "query_address": ((B, R, visits, T), (torch.int32,)),
        "query_position": ((B, T), integer),
        "query_document": ((B, T), integer),
        "key_address": ((B, S, R), (torch.uint8, torch.int16, torch.int32)),
        "key_position": ((B, S), (torch.int32,)),
        "key_document": ((B, S), (torch.int32,)),
        "balls": ((R,), (torch.int32,)),
    }
    for name, tensor in (query | key | {"balls": balls}).items():
        shape, dtypes = needs[name]
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}.")
        if tensor.dtype not in dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{name} must be {allowed}, got {tensor.dtype}.")
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
    key_address: Tensor,
    key_position: Tensor,
    key_document: Tensor,
    balls: Tensor,
    scoring: Scoring,
    *,
    local_window: int,
    num_sink_tokens: int,
    dense_until: int = 0,
) -> Tensor:
    """Attention of new tokens over a cache, over the visible pairs of docs/method.md, section 2.

    Made for a few queries: time and scratch memory (`4 * H_kv * S` bytes for each) grow with `B * T`. The values of
    integer tensors are trusted: checking them would wait for the GPU. Not differentiable. Never waits for the GPU and
    takes its grids from shapes, so it may be captured in a CUDA graph.

    Args:
        q: `[B, H, T, D]`, float16, bfloat16 or float32; D from 16 to 256. Any strides.
        k, v: `[B, H_kv, S, D]`, q's dtype, H a multiple of H_kv; any strides, but a strided last dimension is copied.
            The new tokens are among the keys. Keys that no query sees are not read: they may be NaN.
        query_address: int32 `[B, R, m, T]`, H a multiple of R, m from 1 to 8; an address in each ball that a query
            visits, in `[0, 2^15)`, or -1 for none. Head `h` takes route `h // (H // R)`.
        query_position: int32 or int64 `[B, T]`; position in the query's document, -1 for padding.
        query_document: int32 or int64 `[B, T]`; any label that fits an int32.
        key_address: uint8, int16 or int32 `[B, S, R]`, in `[0, 2^15)`. Every step reads all of it: the narrower, the
            faster. A strided last dimension is copied.
        key_position: int32 `[B, S]`, any strides; position in the key's document plus one, 0 for padding and unfilled
            slots of the cache.
        key_document: int32 `[B, S]`, any strides.
        balls: int32 `[R]`, number of balls at each route's visible depth, 1 (dense) to 2^15: the ball of an address is
            its remainder by this.
        local_window: >= 1. num_sink_tokens: >= 0. dense_until: >= 0; queries at positions below it see all keys before
            them.

    Returns:
        `[B, H, T, D]` in q's dtype, the transposed view of a contiguous `[B, T, H, D]`. Rows of padding queries are 0.

    Raises:
        ValueError: a shape, dtype, device or option does not fit; the message names the argument.
        RuntimeError: the device cannot run the kernels, or a gradient was asked for.
    """
    query = {"query_address": query_address, "query_position": query_position, "query_document": query_document}
    key = {"key_address": key_address, "key_position": key_position, "key_document": key_document}
    _check(q, k, v, query, key, balls, local_window)
    check_sinks(num_sink_tokens)
    if not 0 <= dense_until < 2**31:
        raise ValueError(f"dense_until must be >= 0 and < 2**31, got {dense_until}.")
    check_scoring(scoring)
    check_device("decode_attention", q=q)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise RuntimeError(
            "decode_attention is forward only, but q, k or v requires a gradient: use the torch path for training, "
            "or call it under torch.no_grad()."
        )
    if q.numel() == 0:
        return torch.empty_like(q)
    options = (local_window, num_sink_tokens, dense_until, scoring.scale, scoring.softcap)
    out = _decode(q, k, v, *query.values(), *key.values(), balls, *options)
    return out.transpose(1, 2)
