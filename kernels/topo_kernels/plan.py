"""The tree pass's plan by a stable counting sort over balls, three launches (kernels/README.md).

1. sort: a program takes one chunk of tokens of one head and role (queries first, then keys in order of local rank),
   sorts it by ball and writes it as codes `ball * CHUNK + index in the chunk`, with the end of every ball's run.
2. shift: sums over the chunks give every run's place among the sorted tokens, kept as the shift from its place in
   the chunk.
3. place: codes + shift is the sorted order. A query's bounds are found by bisection in the run of its ball in the
   chunk of keys that holds the bound.

Everything is an integer and written once, without atomics: repeats are bitwise equal.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_device, check_sinks

MAX_BALLS = 4096  # a chunk has as many tokens, and one program sorts it

# the code of what is not sorted: sinks, padding, queries in no ball, the rest of the last chunk. Above all codes; twice
# it is an int32
_NOTHING = tl.constexpr(2**29)


@triton.jit
def _bit(BIT: tl.constexpr, LOG: tl.constexpr):
    """Bit `BIT` of an element's index, for a cube of `LOG` axes of 2."""
    return tl.reshape(tl.arange(0, 2), [1] * (LOG - 1 - BIT) + [2] + [1] * BIT)


@triton.jit
def _exchange(b_cube, BIT: tl.constexpr, LOG: tl.constexpr):
    """The smaller of two elements that differ in `BIT` goes first."""
    b_other = tl.sum(b_cube, LOG - 1 - BIT, keep_dims=True) - b_cube
    return tl.where(_bit(BIT, LOG) == 1, tl.maximum(b_cube, b_other), tl.minimum(b_cube, b_other))


@triton.jit
def _sort(b_code, LOG: tl.constexpr):
    """Bitonic sort of 2**LOG codes, in fewer instructions than tl.sort: what is to fall is complemented and rises, so
    that every exchange is a minimum or a maximum."""
    b_cube = tl.reshape(b_code, [2] * LOG)
    for stage in tl.static_range(1, LOG + 1):
        if stage < LOG:
            b_cube = b_cube ^ -_bit(stage, LOG)
        for step in tl.static_range(stage):
            b_cube = _exchange(b_cube, stage - 1 - step, LOG)
        if stage < LOG:
            b_cube = b_cube ^ -_bit(stage, LOG)
    return tl.reshape(b_cube, [2**LOG])


@triton.jit(do_not_specialize=["stride_qb", "stride_qr", "stride_kb", "stride_kr", "T", "S", "num_sink_tokens"])
def _sort_kernel(
    query_address,  # [B, R, T], any strides
    key_address,  # [B, R, S], any strides
    balls,  # [R]
    tree_queries,  # [B, T] if HAS_ORDER
    tree_keys,  # [B, S] if HAS_ORDER
    codes,  # [B, R, chunks, CHUNK], written
    run_end,  # [B, R, chunks, BALLS] int16, written
    stride_qb,
    stride_qr,
    stride_qt,
    stride_kb,
    stride_kr,
    stride_ks,
    T,
    S,
    R,
    num_sink_tokens,
    CHUNK: tl.constexpr,
    BALLS: tl.constexpr,
    LOG_CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,  # neighbouring ranks that one thread sorts
    HAS_ORDER: tl.constexpr,
):
    n_q = tl.cdiv(T, CHUNK)
    n_c = n_q + tl.cdiv(S, CHUNK)
    i_c = tl.program_id(0) % n_c
    i_br = (tl.program_id(0) // n_c).to(tl.int64)
    i_b = i_br // R
    i_r = i_br % R

    # the code holds the index, so any order will do here: this one gives a thread neighbours to sort in its
    # registers, and still loads coalesced
    o_index = tl.arange(0, CHUNK // WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :] * (CHUNK // WIDTH)
    if i_c < n_q:
        o_t = i_c * CHUNK + o_index
        m_code = o_t < T
        if HAS_ORDER:
            o_t = tl.load(tree_queries + i_b * T + o_t, mask=m_code, other=-1)
            m_code = o_t >= 0
        p_address = query_address + i_b * stride_qb + i_r * stride_qr + o_t.to(tl.int64) * stride_qt
    else:
        o_s = (i_c - n_q) * CHUNK + o_index
        m_code = (o_s >= num_sink_tokens) & (o_s < S)
        if HAS_ORDER:
            o_s = tl.load(tree_keys + i_b * S + o_s, mask=o_s < S, other=-1)
            m_code = o_s >= 0
        p_address = key_address + i_b * stride_kb + i_r * stride_kr + o_s.to(tl.int64) * stride_ks
    b_address = tl.load(p_address, mask=m_code, other=0)
    m_code = m_code & (b_address >= 0)
    b_ball = (b_address.to(tl.uint32) % tl.load(balls + i_r).to(tl.uint32)).to(tl.int32)
    b_code = tl.reshape(tl.where(m_code, b_ball * CHUNK + o_index, _NOTHING), [CHUNK])
    b_code = _sort(b_code, LOG_CHUNK)
    i_bc = i_br * n_c + i_c
    tl.store(codes + i_bc * CHUNK + tl.arange(0, CHUNK), b_code)

    # where each ball ends, by bisection: tl.histogram costs more, and spills at thousands of balls
    o_ball = tl.arange(0, BALLS)
    b_lo = tl.zeros([BALLS], dtype=tl.int32)
    b_hi = tl.full([BALLS], CHUNK, dtype=tl.int32)
    for _ in tl.static_range(LOG_CHUNK + 1):
        b_mid = (b_lo + b_hi) // 2
        b_probe = tl.gather(b_code, tl.minimum(b_mid, CHUNK - 1), 0)
        m_below = (b_lo < b_hi) & (b_probe < (o_ball + 1) * CHUNK)
        b_lo = tl.where(m_below, b_mid + 1, b_lo)
        b_hi = tl.where(m_below, b_hi, b_mid)  # closed ones have b_mid == b_hi
    tl.store(run_end + i_bc * BALLS + o_ball, b_lo.to(tl.int16))


@triton.jit
def _load_runs(run_end, o_bc, o_ball, m_run, BALLS: tl.constexpr):
    """Where the runs of some balls in some chunks start and end, counted from the chunk's first code."""
    p_end = run_end + o_bc * BALLS + o_ball
    b_end = tl.load(p_end, mask=m_run, other=0).to(tl.int32)
    b_start = tl.load(p_end - 1, mask=m_run & (o_ball > 0), other=0).to(tl.int32)
    return b_start, b_end


@triton.jit(do_not_specialize=["T", "S"])
def _shift_kernel(
    run_end,  # [B, R, chunks, BALLS] int16
    shift,  # [B, R, chunks, BALLS], written: place among the sorted tokens minus place in the chunk
    T,
    S,
    CHUNK: tl.constexpr,
    BALLS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    N_BLOCKS: tl.constexpr = BALLS // BLOCK_B
    o_ball = (tl.program_id(0) % N_BLOCKS * BLOCK_B + tl.arange(0, BLOCK_B))[None, :]
    i_role = tl.program_id(0) // N_BLOCKS % 2
    i_br = (tl.program_id(0) // (2 * N_BLOCKS)).to(tl.int64)
    n_q = tl.cdiv(T, CHUNK)
    n_c = n_q + tl.cdiv(S, CHUNK)
    first = tl.where(i_role == 0, 0, n_q)
    last = tl.where(i_role == 0, n_q, n_c)

    # all tokens in lower balls come first: a run's start, summed over all chunks
    b_place = tl.zeros([BLOCK_B], dtype=tl.int32)
    for i_c in range(first, last, BLOCK_C):
        o_c = (i_c + tl.arange(0, BLOCK_C))[:, None]
        b_start, b_end = _load_runs(run_end, i_br * n_c + o_c, o_ball, o_c < last, BALLS)
        b_place += tl.sum(b_start, 0)
    for i_c in range(first, last, BLOCK_C):
        o_c = (i_c + tl.arange(0, BLOCK_C))[:, None]
        b_start, b_end = _load_runs(run_end, i_br * n_c + o_c, o_ball, o_c < last, BALLS)
        b_count = b_end - b_start
        b_shift = b_place[None, :] + tl.cumsum(b_count, 0) - b_count - b_start
        tl.store(shift + (i_br * n_c + o_c) * BALLS + o_ball, b_shift, mask=o_c < last)
        b_place += tl.sum(b_count, 0)


@triton.jit
def _keys_before(
    b_rank,  # [BLOCK] local ranks of the bounds
    b_ball,
    m_rank,
    codes,
    run_end,
    shift,
    i_key,  # the first chunk of keys
    n_key,  # chunks of keys
    CHUNK: tl.constexpr,
    BALLS: tl.constexpr,
):
    """Place among the sorted keys of the first one of `b_ball` that has local rank `b_rank` or more."""
    o_c = tl.minimum(b_rank // CHUNK, n_key - 1)
    b_code = b_ball * CHUNK + (b_rank - o_c * CHUNK)
    b_lo, b_hi = _load_runs(run_end, i_key + o_c, b_ball, m_rank, BALLS)
    b_shift = tl.load(shift + (i_key + o_c) * BALLS + b_ball, mask=m_rank, other=0)
    p_code = codes + (i_key + o_c) * CHUNK
    longest = tl.max(b_hi - b_lo, 0)
    while longest > 0:
        b_mid = (b_lo + b_hi) // 2
        m_open = b_lo < b_hi
        m_below = m_open & (tl.load(p_code + b_mid, mask=m_open, other=0) < b_code)
        b_lo = tl.where(m_below, b_mid + 1, b_lo)
        b_hi = tl.where(m_below, b_hi, b_mid)  # closed ones have b_mid == b_hi
        longest = longest // 2
    return b_shift + b_lo


@triton.jit(do_not_specialize=["T", "S"])
def _place_kernel(
    codes,  # [B, R, chunks, CHUNK]
    run_end,  # [B, R, chunks, BALLS] int16
    shift,  # [B, R, chunks, BALLS]
    local_start,  # [B, T]
    document_start,  # [B, T] if HAS_ORDER
    tree_queries,  # [B, T] if HAS_ORDER
    tree_keys,  # [B, S] if HAS_ORDER
    query_order,  # [B, R, T], written
    range_start,  # [B, R, T], written
    range_end,  # [B, R, T], written
    key_order,  # [B, R, S], written
    T,
    S,
    R,
    CHUNK: tl.constexpr,
    BALLS: tl.constexpr,
    BLOCK: tl.constexpr,  # a part of a chunk
    HAS_ORDER: tl.constexpr,
):
    PARTS: tl.constexpr = CHUNK // BLOCK
    n_q = tl.cdiv(T, CHUNK)
    n_c = n_q + tl.cdiv(S, CHUNK)
    i_c = tl.program_id(0) // PARTS % n_c
    i_br = (tl.program_id(0) // PARTS // n_c).to(tl.int64)
    i_b = i_br // R
    i_bc = i_br * n_c + i_c
    i_key = i_br * n_c + n_q

    o_i = tl.program_id(0) % PARTS * BLOCK + tl.arange(0, BLOCK)
    b_code = tl.load(codes + i_bc * CHUNK + o_i)
    m_code = b_code != _NOTHING
    b_ball = tl.where(m_code, b_code // CHUNK, 0)
    b_place = o_i + tl.load(shift + i_bc * BALLS + b_ball, mask=m_code, other=0)
    if i_c < n_q:
        o_t = i_c * CHUNK + b_code % CHUNK
        if HAS_ORDER:
            o_t = tl.load(tree_queries + i_b * T + o_t, mask=m_code, other=0)
        b_end = tl.load(local_start + i_b * T + o_t, mask=m_code, other=0)
        b_end = _keys_before(b_end, b_ball, m_code, codes, run_end, shift, i_key, n_c - n_q, CHUNK, BALLS)
        if HAS_ORDER:
            b_start = tl.load(document_start + i_b * T + o_t, mask=m_code, other=0)
            b_start = _keys_before(b_start, b_ball, m_code, codes, run_end, shift, i_key, n_c - n_q, CHUNK, BALLS)
        else:  # the ball's first key
            b_start, _ = _load_runs(run_end, i_key, b_ball, m_code, BALLS)
            b_start += tl.load(shift + i_key * BALLS + b_ball, mask=m_code, other=0)
        p_out = i_br * T + b_place
        tl.store(query_order + p_out, o_t, mask=m_code)
        tl.store(range_start + p_out, b_start, mask=m_code)
        tl.store(range_end + p_out, b_end, mask=m_code)
        # padding comes last, wherever it was, and so do queries in no ball
        p_run = i_key * BALLS - 1  # the last ball in the last chunk
        o_t = i_c * CHUNK + o_i
        m_rest = (o_t >= tl.load(shift + p_run) + tl.load(run_end + p_run)) & (o_t < T)
        p_out = i_br * T + o_t
        tl.store(query_order + p_out, -1, mask=m_rest)
        tl.store(range_start + p_out, 0, mask=m_rest)
        tl.store(range_end + p_out, 0, mask=m_rest)
    else:
        o_s = (i_c - n_q) * CHUNK + b_code % CHUNK
        if HAS_ORDER:
            o_s = tl.load(tree_keys + i_b * S + o_s, mask=m_code, other=0)
        tl.store(key_order + i_br * S + b_place, o_s, mask=m_code)
        p_run = (i_br + 1) * n_c * BALLS - 1
        o_s = (i_c - n_q) * CHUNK + o_i
        m_rest = (o_s >= tl.load(shift + p_run) + tl.load(run_end + p_run)) & (o_s < S)
        tl.store(key_order + i_br * S + o_s, 0, mask=m_rest)


class PlanTiles(NamedTuple):
    """Sizes of the three launches; all are powers of two."""

    chunk: int  # tokens that one program sorts
    sort_warps: int
    shift_chunks: int  # chunks and balls of one program
    shift_balls: int
    shift_warps: int
    place: int  # sorted tokens of one program
    place_warps: int


def choose_plan_tiles(max_balls: int) -> PlanTiles:
    """A chunk has as many tokens as there are balls, so that the runs take no more memory than the addresses."""
    chunk = max(1024, triton.next_power_of_2(max_balls))
    # place: one token per thread, or Triton would move its loads and stores between layouts
    return PlanTiles(chunk, chunk // 256, shift_chunks=64, shift_balls=32, shift_warps=4, place=256, place_warps=8)


@torch.library.custom_op("topo_kernels::tree_plan", mutates_args=())
def _tree_plan(
    query_address: Tensor,
    key_address: Tensor,
    balls: Tensor,
    local_start: Tensor,
    document_start: Tensor | None,
    tree_queries: Tensor | None,
    tree_keys: Tensor | None,
    max_balls: int,
    num_sink_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _allocate(query_address, key_address)
    batch, routes, queries = query_address.shape
    keys = key_address.shape[2]
    if key_address.numel() == 0:
        return outputs
    tiles = choose_plan_tiles(max_balls)
    columns = max(tiles.shift_balls, triton.next_power_of_2(max_balls))
    chunks = triton.cdiv(queries, tiles.chunk) + triton.cdiv(keys, tiles.chunk)
    has_order = tree_keys is not None
    codes = balls.new_empty(batch, routes, chunks, tiles.chunk)
    run_end = balls.new_empty(batch, routes, chunks, columns, dtype=torch.int16)
    shift = balls.new_empty(batch, routes, chunks, columns)
    balls, local_start = balls.contiguous(), local_start.contiguous()
    # a plain batch has none of these, but a kernel's argument must be some pointer
    document_start, tree_queries, tree_keys = (
        balls if t is None else t.contiguous() for t in (document_start, tree_queries, tree_keys)
    )
    sizes = {"T": queries, "S": keys, "CHUNK": tiles.chunk, "BALLS": columns}
    with torch.cuda.device_of(query_address):
        _sort_kernel[(batch * routes * chunks,)](
            *(query_address, key_address, balls, tree_queries, tree_keys, codes, run_end),
            *(*query_address.stride(), *key_address.stride()),
            R=routes,
            num_sink_tokens=num_sink_tokens,
            LOG_CHUNK=tiles.chunk.bit_length() - 1,
            WIDTH=max(1, tiles.chunk // (32 * tiles.sort_warps)),
            HAS_ORDER=has_order,
            num_warps=tiles.sort_warps,
            **sizes,
        )
        _shift_kernel[(batch * routes * 2 * (columns // tiles.shift_balls),)](
            run_end,
            shift,
            BLOCK_C=tiles.shift_chunks,
            BLOCK_B=tiles.shift_balls,
            num_warps=tiles.shift_warps,
            **sizes,
        )
        _place_kernel[(batch * routes * chunks * (tiles.chunk // tiles.place),)](
            *(codes, run_end, shift, local_start, document_start, tree_queries, tree_keys, *outputs),
            R=routes,
            BLOCK=tiles.place,
            HAS_ORDER=has_order,
            num_warps=tiles.place_warps,
            **sizes,
        )
    return outputs


@_tree_plan.register_fake
def _allocate(query_address: Tensor, key_address: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query_order, range_start, range_end and key_order."""
    queries = [query_address.new_empty(query_address.shape) for _ in range(3)]
    return queries[0], queries[1], queries[2], key_address.new_empty(key_address.shape)


def _check(tensors: dict[str, Tensor], max_balls: int, num_sink_tokens: int) -> None:
    query_address, key_address = tensors["query_address"], tensors["key_address"]
    for name in ("query_address", "key_address"):
        if tensors[name].ndim != 3:
            raise ValueError(f"{name} must have shape [B, R, length], got {list(tensors[name].shape)}.")
    batch, routes, queries = query_address.shape
    keys = key_address.shape[2]
    if queries > 0 and keys == 0:
        raise ValueError(f"key_address must hold the queries' own keys at least, got S = 0 for T = {queries}.")
    needs = {"key_address": (batch, routes, keys), "balls": (routes,), "tree_keys": (batch, keys)}
    needs |= dict.fromkeys(("local_start", "document_start", "tree_queries"), (batch, queries))
    for name, tensor in tensors.items():
        if tensor.shape != needs.get(name, tensor.shape):
            raise ValueError(f"{name} must have shape {list(needs[name])}, got {list(tensor.shape)}.")
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, got {tensor.dtype}.")
        if tensor.device != query_address.device:
            raise ValueError(f"{name} must be on query_address's device {query_address.device}, got {tensor.device}.")
    if not 1 <= max_balls <= MAX_BALLS:
        raise ValueError(f"max_balls must be from 1 to {MAX_BALLS}, got {max_balls}.")
    check_sinks(num_sink_tokens)
    check_device("tree_plan", query_address=query_address)


def tree_plan(
    query_address: Tensor,
    key_address: Tensor,
    balls: Tensor,
    local_start: Tensor,
    document_start: Tensor | None = None,
    tree_queries: Tensor | None = None,
    tree_keys: Tensor | None = None,
    *,
    max_balls: int,
    num_sink_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort queries and keys by ball and find every query's keys (docs/method.md, section 6).

    The ball of a token in head `r` is `address % balls[r]`. A query's tree keys are those of its ball with a local
    rank in `[document_start, local_start)` that are no sinks. They are contiguous when the keys are sorted by ball and
    then local rank, because local ranks are by document and position. O(N log N) time at most, O(N) memory, no host
    synchronisation, deterministic. Values are trusted: checking them would wait for the GPU.

    The three optional tensors are given together. Without them the batch is plain: no padding, one document in each
    row, so that the local rank of a key is its index, and the first `num_sink_tokens` keys are the sinks.

    Args:
        query_address: int32 `[B, R, T]`, addresses >= 0, or -1 of a query that is in no ball. Any strides.
        key_address: int32 `[B, R, S]`, of cached and new tokens. Any strides.
        balls: int32 `[R]`, from 1 to `max_balls`: `arity**depth` of each head.
        local_start: int32 `[B, T]`, 0 to S; the local rank where the query's window starts, as in `topology_attention`.
        document_start: int32 `[B, T]`; the local rank where the query's document starts, or its first tree key.
        tree_queries: int32 `[B, T]`; the real queries by local rank, then -1 once for each padding query.
        tree_keys: int32 `[B, S]`; local rank -> key, -1 for sinks and padding.
        max_balls: the largest of `balls` or more, from 1 to 4096.
        num_sink_tokens: >= 0. Not used if `tree_keys` is given.

    Returns:
        query_order: int32 `[B, R, T]`; sorted rank -> query, by ball and then local rank. Padding queries and those in
            no ball come last, as -1.
        range_start, range_end: int32 `[B, R, T]`; the sorted query's keys are `key_order[start:end]`, in order of
            local rank. Both ends rise along the sorted queries; they are 0 where the query is -1.
        key_order: int32 `[B, R, S]`; sorted rank -> key. The sorted keys are followed by zeros, which are in no range.

    Raises:
        ValueError: a shape, dtype, device or option does not fit; the message names the argument.
        RuntimeError: the tensors are not on a GPU.
    """
    order = {"document_start": document_start, "tree_queries": tree_queries, "tree_keys": tree_keys}
    given = {name: tensor for name, tensor in order.items() if tensor is not None}
    if 0 < len(given) < len(order):
        raise ValueError(f"{', '.join(order)} must be given together or not at all, got {', '.join(given)} alone.")
    tensors = {"query_address": query_address, "key_address": key_address, "balls": balls, "local_start": local_start}
    _check(tensors | given, max_balls, num_sink_tokens)
    return _tree_plan(
        query_address,
        key_address,
        balls,
        local_start,
        document_start,
        tree_queries,
        tree_keys,
        max_balls,
        num_sink_tokens,
    )
