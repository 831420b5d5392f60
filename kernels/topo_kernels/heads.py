"""Queries and keys to digit logits and packed addresses in one pass (docs/method.md, section 3): routers on heads.

A program takes a tile of tokens of one route, or of one KV head: it turns their rotary embedding back, takes off what
all tokens have in common, multiplies by the router's matrix in float32 (three TF32 products on tensor cores, relative
error about 2^-22) and takes each level's likeliest child. Nothing of the size of queries or keys is written.
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_device
from .launch import overlap, stride_arguments
from .primitives import let_next_start, wait_for_previous

MAX_DIGIT_LOGITS = 256  # depth and arity, each brought to a power of two, multiplied: of one tile
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

#: Which of the n channels that a rotary embedding turns are turned with each other, and by which cosine and sine.
#: halves: i with i + n/2, each by its own (Llama). neighbours: 2i with 2i + 1, each by its own (Cohere).
#: neighbours_once: the same, both by those of channel i; the second half of what is given is not read (GLM).
Pairs = Literal["halves", "neighbours", "neighbours_once"]


@triton.jit(do_not_specialize=["T"])
def _heads_kernel(
    query,  # [B, H, T, D]
    key,  # [B, H_kv, T, D]
    cos,  # [B or 1, T, TURNED]
    sin,
    weight,  # [H + H_kv, BLOCK_D, BLOCK_L * BLOCK_C] fp32
    center,  # [H + H_kv, BLOCK_D] fp32
    bias,  # [R + H_kv, BLOCK_L * BLOCK_C] fp32; -inf where there is no such child
    logits,  # [B, R, T, DEPTH, ARITY] fp32, written
    query_address,  # [B, R, T] int32, written
    key_address,  # [B, H_kv, T] int32, written
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_cosb,
    stride_cost,
    stride_sinb,
    stride_sint,
    T,
    R: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # queries that a route is made of
    D: tl.constexpr,
    TURNED: tl.constexpr,  # channels that the rotary embedding turns; 0: none
    FIRST: tl.constexpr,  # of them
    PAIRS: tl.constexpr,  # as `Pairs`
    DEPTH: tl.constexpr,
    ARITY: tl.constexpr,
    KEEP_LOGITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    WIDTH: tl.constexpr = BLOCK_L * BLOCK_C
    n_t = tl.cdiv(T, BLOCK_T)
    i_head = (tl.program_id(0) // n_t % (R + KV_HEADS)).to(tl.int64)  # strides of long rows overflow otherwise
    i_b = (tl.program_id(0) // n_t // (R + KV_HEADS)).to(tl.int64)
    o_t = tl.program_id(0) % n_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, WIDTH)
    m_t = o_t < T
    m_x = m_t[:, None] & (o_d < D)[None, :]
    if i_head < R:
        p_x = query + i_b * stride_qb + i_head * GROUP * stride_qh + o_t.to(tl.int64)[:, None] * stride_qt
        i_row = i_head * GROUP
        parts = GROUP
    else:
        p_x = key + i_b * stride_kb + (i_head - R) * stride_kh + o_t.to(tl.int64)[:, None] * stride_kt
        i_row = R * GROUP + i_head - R
        parts = 1
    wait_for_previous(OVERLAP)  # before the weights too, which may just have been laid out
    b_logits = tl.zeros([BLOCK_T, WIDTH], dtype=tl.float32) + tl.load(bias + i_head * WIDTH + o_n)[None, :]
    if TURNED > 0:
        o_place = o_d - FIRST
        o_angle, N_ANGLES = o_place, TURNED
        if PAIRS == "halves":
            # the halves of what is turned are each other's partners; what is not turned is its own
            m_turned = (o_place >= 0) & (o_place < TURNED)
            m_first = o_place < TURNED // 2
            o_partner = tl.where(m_turned, tl.where(m_first, o_d + TURNED // 2, o_d - TURNED // 2), o_d)
        else:
            m_first = o_place % 2 == 0  # FIRST is even: pairs begin where the block's do
            if PAIRS == "neighbours_once":
                o_angle, N_ANGLES = tl.arange(0, BLOCK_D // 2) - FIRST // 2, TURNED // 2
        m_angle = m_t[:, None] & ((o_angle >= 0) & (o_angle < N_ANGLES))[None, :]
        p_cos = cos + i_b * stride_cosb + o_t[:, None] * stride_cost + o_angle[None, :]
        p_sin = sin + i_b * stride_sinb + o_t[:, None] * stride_sint + o_angle[None, :]
        b_cos = tl.load(p_cos, mask=m_angle, other=1.0).to(tl.float32)
        b_sin = tl.load(p_sin, mask=m_angle, other=0.0).to(tl.float32)
        if PAIRS == "neighbours_once":
            b_cos, b_sin = tl.interleave(b_cos, b_cos), tl.interleave(b_sin, b_sin)
        b_sin = tl.where(m_first[None, :], b_sin, -b_sin)
    for i_part in range(parts):
        b_x = tl.load(p_x + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
        if TURNED > 0:
            if PAIRS == "halves":
                b_partner = tl.load(p_x + o_partner[None, :], mask=m_x, other=0.0).to(tl.float32)
            else:  # a thread holds both neighbours
                b_one, b_other = tl.split(tl.reshape(b_x, [BLOCK_T, BLOCK_D // 2, 2]))
                b_partner = tl.interleave(b_other, b_one)
            b_x = b_x * b_cos + b_partner * b_sin
        b_x -= tl.load(center + (i_row + i_part) * BLOCK_D + o_d)[None, :]
        p_weight = weight + (i_row + i_part) * BLOCK_D * WIDTH + o_d[:, None] * WIDTH + o_n[None, :]
        b_logits = tl.dot(b_x, tl.load(p_weight), b_logits, input_precision="tf32x3")
        p_x += stride_qh
    let_next_start(OVERLAP)

    o_c = tl.arange(0, BLOCK_C)
    o_l = tl.arange(0, BLOCK_L)
    b_levels = tl.reshape(b_logits, [BLOCK_T, BLOCK_L, BLOCK_C])
    b_best = tl.max(b_levels, 2)
    b_digit = tl.min(tl.where(b_levels == b_best[:, :, None], o_c[None, None, :], ARITY - 1), 2)
    b_power = tl.full([BLOCK_L], 1, dtype=tl.int32)
    for i_l in tl.static_range(DEPTH):
        b_power *= tl.where((o_l > i_l) & (o_l < DEPTH), ARITY, 1)
    b_address = tl.sum(b_digit * b_power[None, :], 1)
    if i_head < R:
        i_route = i_b * R + i_head
        tl.store(query_address + i_route * T + o_t, b_address, mask=m_t)
        if KEEP_LOGITS:
            m_n = (o_n // BLOCK_C < DEPTH) & (o_n % BLOCK_C < ARITY)
            o_logit = o_n // BLOCK_C * ARITY + o_n % BLOCK_C
            p_logits = logits + (i_route * T + o_t)[:, None] * (DEPTH * ARITY) + o_logit[None, :]
            tl.store(p_logits, b_logits, mask=m_t[:, None] & m_n[None, :])
    else:
        tl.store(key_address + (i_b * KV_HEADS + i_head - R) * T + o_t, b_address, mask=m_t)


class PackedHeadRouter(NamedTuple):
    """A router on heads as the kernel reads it; made by `pack_head_router` once per version of the weights.

    weight: float32 `[H + H_kv, D', L' * p']`, a part of a route's matrix for each query head, then the KV heads'.
    center: float32 `[H + H_kv, D']`. bias: float32 `[R + H_kv, L' * p']`, -inf for children that there are not.

    Primed sizes are powers of two: D' at least 16, and L' so large that `L' * p'` is at least 16.
    """

    weight: Tensor
    center: Tensor
    bias: Tensor
    head_dim: int
    num_routes: int
    num_kv_heads: int
    depth: int
    arity: int


def padded_digits(depth: int, arity: int) -> tuple[int, int]:
    """Levels and children of a tile, powers of two: at least 16 logits, the least width of a matrix product."""
    children = triton.next_power_of_2(arity)
    return max(triton.next_power_of_2(depth), 16 // children), children


def pack_head_router(
    query_weight: Tensor,
    query_bias: Tensor,
    query_center: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    key_center: Tensor,
    *,
    depth: int,
    arity: int,
) -> PackedHeadRouter:
    """Lay out the weights of a router on heads.

    A digit's logits are 0 for child 0 and `weight (x - center) + bias` for the others.

    Args:
        query_weight: `[R, L * (p - 1), G * D]`, of routes that are each made of G queries, side by side.
        query_bias: `[R, L * (p - 1)]`. query_center: `[R, G * D]`.
        key_weight: `[H_kv, L * (p - 1), D]`. key_bias: `[H_kv, L * (p - 1)]`. key_center: `[H_kv, D]`.
            All float32, on one device.
        depth, arity: L >= 1 and p >= 2; brought to powers of two, their product may be 256 at most.

    Raises:
        ValueError: a shape, dtype or size does not fit; the message names the argument.
    """
    if depth < 1 or arity < 2 or arity**depth >= 2**31:
        raise ValueError(f"depth must be >= 1, arity >= 2 and arity**depth < 2**31, got {depth} and {arity}.")
    levels, children = padded_digits(depth, arity)
    if levels * children > MAX_DIGIT_LOGITS:
        raise ValueError(
            f"depth and arity, brought to powers of two, must multiply to at most {MAX_DIGIT_LOGITS}, got "
            f"{levels} and {children}: use the torch router beyond that."
        )
    if key_weight.ndim != 3 or query_weight.ndim != 3 or 0 in key_weight.shape or 0 in query_weight.shape:
        raise ValueError(
            f"query_weight and key_weight must have shapes [R, L * (p - 1), G * D] and [H_kv, L * (p - 1), D], got "
            f"{list(query_weight.shape)} and {list(key_weight.shape)}."
        )
    (R, _, width), (kv_heads, _, D), free = query_weight.shape, key_weight.shape, depth * (arity - 1)
    if width % D or R * (width // D) % kv_heads or D > 256:
        raise ValueError(
            f"query_weight must read a multiple of key_weight's channels, at most 256, and R * G heads, a multiple of "
            f"its H_kv, got {R} routes of {width} channels beside {kv_heads} KV heads of {D}."
        )
    needs = {
        "query_weight": (query_weight, [R, free, width]),
        "query_bias": (query_bias, [R, free]),
        "query_center": (query_center, [R, width]),
        "key_weight": (key_weight, [kv_heads, free, D]),
        "key_bias": (key_bias, [kv_heads, free]),
        "key_center": (key_center, [kv_heads, D]),
    }
    for name, (tensor, shape) in needs.items():
        if list(tensor.shape) != shape or tensor.dtype != torch.float32 or tensor.device != key_weight.device:
            raise ValueError(
                f"{name} must be float32 of shape {shape} on {key_weight.device}, got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}."
            )
    with torch.no_grad():
        padded = max(16, triton.next_power_of_2(D))
        parts = query_weight.unflatten(2, (-1, D)).transpose(1, 2).flatten(0, 1)  # [R * G, L * (p - 1), D]
        matrix = torch.cat([parts, key_weight]).unflatten(1, (depth, arity - 1))
        weight = matrix.new_zeros(len(matrix), padded, levels, children)
        weight[:, :D, :depth, 1:arity] = matrix.permute(0, 3, 1, 2)
        center = matrix.new_zeros(len(matrix), padded)
        center[:, :D] = torch.cat([query_center.unflatten(1, (-1, D)).flatten(0, 1), key_center])
        bias = matrix.new_full((R + kv_heads, levels, children), float("-inf"))
        bias[:, :, 0] = 0
        bias[:, :depth, 1:arity] = torch.cat([query_bias, key_bias]).unflatten(1, (depth, arity - 1))
    return PackedHeadRouter(weight.flatten(2), center, bias.flatten(1), D, R, kv_heads, depth, arity)


@torch.library.custom_op("topo_kernels::route_heads", mutates_args=())
def _route_heads(
    query: Tensor,
    key: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    first: int,
    pairs: str,
    weight: Tensor,
    center: Tensor,
    bias: Tensor,
    head_dim: int,
    num_routes: int,
    num_kv_heads: int,
    depth: int,
    arity: int,
    keep_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, query and key addresses of checked arguments."""
    logits, query_address, key_address = out = _allocate(query, num_routes, num_kv_heads, depth, arity, keep_logits)
    if query_address.numel() == 0:
        return out
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    turned = 0 if cos is None else cos.shape[2]
    if cos is None or sin is None:
        cos = sin = center[None]  # not read
    cos, sin = (x if x.stride(2) == 1 else x.contiguous() for x in (cos, sin))
    rows = {f"stride_{name}b": x.stride(0) if x.shape[0] > 1 else 0 for name, x in (("cos", cos), ("sin", sin))}
    (B, H, T, D), (levels, children) = query.shape, padded_digits(depth, arity)
    block = 16 if T <= 16 else 64 if D <= 128 and levels * children <= 32 else 32
    with torch.cuda.device_of(query):
        _heads_kernel[(triton.cdiv(T, block) * (num_routes + num_kv_heads) * B,)](
            *(query, key, cos, sin, weight, center, bias, logits, query_address, key_address),
            **stride_arguments(q=(query, "bht"), k=(key, "bht")),
            **rows,
            stride_cost=cos.stride(1),
            stride_sint=sin.stride(1),
            T=T,
            R=num_routes,
            KV_HEADS=num_kv_heads,
            GROUP=H // num_routes,
            D=D,
            TURNED=turned,
            FIRST=first,
            PAIRS=pairs,
            DEPTH=depth,
            ARITY=arity,
            KEEP_LOGITS=keep_logits,
            BLOCK_T=block,
            BLOCK_D=center.shape[1],
            BLOCK_L=levels,
            BLOCK_C=children,
            num_warps=4,
            **overlap(query.device),
        )
    return out


def _allocate(
    query: Tensor, num_routes: int, num_kv_heads: int, depth: int, arity: int, keep_logits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, T, _ = query.shape
    logits = query.new_empty((B, num_routes, T, depth, arity) if keep_logits else (0,), dtype=torch.float32)
    query_address, key_address = (query.new_empty(B, n, T, dtype=torch.int32) for n in (num_routes, num_kv_heads))
    return logits, query_address, key_address


@_route_heads.register_fake
def _(query: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate(query, *others[-5:])


def _check(
    query: Tensor,
    key: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    first: int,
    pairs: Pairs,
    packed: PackedHeadRouter,
) -> None:
    heads, D = len(packed.center) - packed.num_kv_heads, packed.head_dim
    if query.ndim != 4 or query.shape[1] != heads or query.shape[3] != D:
        raise ValueError(f"query must have shape [B, H={heads}, T, D={D}], got {list(query.shape)}.")
    B, _, T, _ = query.shape
    if list(key.shape) != [B, packed.num_kv_heads, T, D]:
        raise ValueError(f"key must have shape {[B, packed.num_kv_heads, T, D]}, got {list(key.shape)}.")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must both be given, or neither, got one.")
    if pairs not in get_args(Pairs):
        raise ValueError(f"pairs must be one of {', '.join(map(repr, get_args(Pairs)))}, got {pairs!r}.")
    if pairs != "halves" and first % 2:
        raise ValueError(f"first must be even where neighbours were turned with each other, got {first}.")
    for name, tensor in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        if tensor is None:
            continue
        if tensor.dtype not in _DTYPES or tensor.device != packed.weight.device:
            raise ValueError(
                f"{name} must be float16, bfloat16 or float32 on the router's device {packed.weight.device}, got "
                f"{tensor.dtype} on {tensor.device}."
            )
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor is None:
            continue
        if tensor.ndim != 3 or tensor.shape[0] not in (1, B) or tensor.shape[1] != T:
            raise ValueError(f"{name} must have shape [{B} or 1, T={T}, channels], got {list(tensor.shape)}.")
        width = tensor.shape[2]
        if width % 2 or not 0 <= first <= D - width or cos is None or width != cos.shape[2]:
            raise ValueError(
                f"{name} must have an even number of channels, as many as the other and at most {D - first} from "
                f"channel {first} on, got {width}."
            )


def route_heads(
    query: Tensor,
    key: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    packed: PackedHeadRouter,
    *,
    first: int = 0,
    pairs: Pairs = "halves",
    keep_logits: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Digit logits and hard addresses of queries and keys whose rotary embedding is turned back on the way.

    An address is `sum_l digit_l * p**l`; a digit is the argmax of its logits, ties to the lower digit. Digits whose
    two largest logits are equal to fp32 rounding may come out either way. Not differentiable; repeats are bitwise
    equal. Never waits for the GPU.

    Args:
        query: `[B, H, T, D]`; key: `[B, H_kv, T, D]`, of the same tokens; float16, bfloat16 or float32, any strides (a
            strided last dimension is copied).
        cos, sin: `[B or 1, T, n]`, of the angles by which the `n` channels from `first` on were turned (`x cos +
            rotate_half(x) sin`); any float dtype of these. None: nothing was turned.
        pairs: which of these channels were turned with each other. "halves": `i` with `i + n/2`, each by its own
            cosine and sine, as transformers' Llama does. "neighbours": `2i` with `2i + 1`, each by its own (Cohere);
            `first` must be even. "neighbours_once": the same, both by those of channel `i`; the second half is not
            read (GLM).
        packed: from `pack_head_router`. keep_logits: whether the queries' logits are wanted.

    Returns:
        logits of the queries' digits, float32 `[B, R, T, L, p]`, or None; query addresses, int32 `[B, R, T]`, and key
        addresses, int32 `[B, H_kv, T]`.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        RuntimeError: the device cannot run the kernel.
    """
    _check(query, key, cos, sin, first, pairs, packed)
    check_device("route_heads", query=query, key=key)
    logits, query_address, key_address = _route_heads(query, key, cos, sin, first, pairs, *packed, keep_logits)
    return logits if keep_logits else None, query_address, key_address
