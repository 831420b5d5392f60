"""Hidden states to packed addresses in one pass (docs/method.md, section 3): both projections, GELU and argmax.

Router maths is fp32 whatever the model's dtype, but tensor cores do not multiply fp32. A half-precision hidden state
is exact, so it is the first projection's weights that are split into up to three parts of its dtype, which add up to
the fp32 weight: every product is exact, and sums are fp32. Parts that are zero everywhere, because the weights were
rounded to the model's dtype, are not stored. What has fp32 operands runs as three TF32 products (relative error about
2^-22); but where the second projection's weights are bfloat16 numbers, as a rounded router's are, it is the hidden
layer that is split into three parts, for half the work. The second projection's columns are sorted by level, so that a
tile of routes takes its digits level by level.

Many tokens: one program takes a tile of them through everything and reads each hidden state once. Few tokens cannot
fill the GPU that way: one kernel gives each program a slice of the channels, a second one adds the slices in a fixed
order and does the rest. The two can choose different digits where the largest logits are equal to rounding.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_device
from .launch import INTERPRETED, overlap
from .primitives import let_next_start, wait_for_previous

MAX_ROUTER_WIDTH = 128  # of the hidden layer; wider ones do not fit into a program's registers
_SLICE = 128  # channels of one program of the split kernel
_SPLIT_TOKENS = 512  # up to here the split kernels run
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _project(
    p_row,  # [BLOCK_T] pointers to hidden states
    down,  # [PARTS, BLOCK_W, C padded]
    first,  # channels [first, last)
    last,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Hidden states times the down projection over some channels, `[BLOCK_T, BLOCK_W]` fp32, not yet rescaled."""
    o_w = tl.arange(0, BLOCK_W)
    b_acc = tl.zeros([BLOCK_T, BLOCK_W], dtype=tl.float32)
    for i_c in range(first, last, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        if C % BLOCK_C == 0:
            b_x = tl.load(p_row[:, None] + o_c[None, :])
        else:
            b_x = tl.load(p_row[:, None] + o_c[None, :], mask=(o_c < C)[None, :], other=0.0)
        # tensor cores truncate as they add, which over thousands of products would bias the sum: start afresh in
        # each tile (with a single part Triton folds the two sums into one again; its chain is a third as long)
        b_tile = tl.zeros([BLOCK_T, BLOCK_W], dtype=tl.float32)
        for i_part in tl.static_range(PARTS):
            p_down = down + i_part * BLOCK_W * C_PADDED + o_w[None, :] * C_PADDED + o_c[:, None]
            b_tile = tl.dot(b_x, tl.load(p_down), b_tile, input_precision="tf32x3")
        b_acc += b_tile
    return b_acc


@triton.jit
def _gelu(b_x):
    """The exact GELU, by erf."""
    return 0.5 * b_x * (1 + tl.erf(b_x * 0.7071067811865476))


@triton.jit(do_not_specialize=["B", "T"])
def _fused_kernel(
    hidden,  # [B, T, C]
    down,  # [PARTS, BLOCK_W, C padded]
    down_scale,  # [BLOCK_W]
    weight,  # [DEPTH, ARITY - 1, BLOCK_W, ROUTES_PADDED]
    bias,  # [DEPTH, ARITY - 1, ROUTES_PADDED]
    out,  # [roles, B, R, T] int32
    stride_hb,
    stride_ht,
    B,
    T,
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    R: tl.constexpr,
    ROUTES: tl.constexpr,  # roles x R
    ROUTES_PADDED: tl.constexpr,
    DEPTH: tl.constexpr,
    ARITY: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    n_t = tl.cdiv(T, BLOCK_T)
    i_b = tl.program_id(0) // n_t
    o_t = tl.program_id(0) % n_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_row = tl.minimum(o_t, T - 1).to(tl.int64)  # rows past the end repeat the last one: loads need no mask
    p_row = hidden + i_b.to(tl.int64) * stride_hb + o_row * stride_ht
    b_acc = _project(p_row, down, 0, C, C, C_PADDED, PARTS, BLOCK_T, BLOCK_W, BLOCK_C)
    o_w = tl.arange(0, BLOCK_W)
    b_h = _gelu(b_acc * tl.load(down_scale + o_w)[None, :])
    EXACT: tl.constexpr = weight.dtype.element_ty == tl.bfloat16
    if EXACT:
        b_high = b_h.to(tl.bfloat16)
        b_rest = b_h - b_high.to(tl.float32)
        b_middle = b_rest.to(tl.bfloat16)
        b_low = (b_rest - b_middle.to(tl.float32)).to(tl.bfloat16)

    for i_r in range(0, ROUTES_PADDED, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        b_address = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.int32)
        b_power = 1
        for i_l in range(DEPTH):
            b_best = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)  # child 0 has logit 0
            b_digit = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.int32)
            for i_child in range(ARITY - 1):
                i_column = i_l * (ARITY - 1) + i_child
                b_w = tl.load(weight + (i_column * BLOCK_W + o_w[:, None]) * ROUTES_PADDED + o_r[None, :])
                b_bias = tl.load(bias + i_column * ROUTES_PADDED + o_r)
                if EXACT:
                    b_logit = tl.dot(b_high, b_w, tl.dot(b_middle, b_w, tl.dot(b_low, b_w)))
                else:
                    b_logit = tl.dot(b_h, b_w, input_precision="tf32x3")
                b_logit += b_bias[None, :]
                b_digit = tl.where(b_logit > b_best, i_child + 1, b_digit)
                b_best = tl.maximum(b_logit, b_best)
            b_address += b_digit * b_power
            b_power *= ARITY
        o_out = (o_r // R * B + i_b).to(tl.int64) * R + o_r % R
        m_out = (o_t < T)[:, None] & (o_r < ROUTES)[None, :]
        tl.store(out + o_out[None, :] * T + o_t[:, None], b_address, mask=m_out)


@triton.jit(do_not_specialize=["T", "N"])
def _slice_kernel(
    hidden,  # [B, T, C]
    down,  # [PARTS, BLOCK_W, C padded]
    partial,  # [N, SLICES, PARTS, BLOCK_W] fp32
    stride_hb,
    stride_ht,
    T,
    N,  # B x T
    C: tl.constexpr,
    C_PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_previous(OVERLAP)
    let_next_start(OVERLAP)  # it loads its weights meanwhile
    i_part = tl.program_id(0) % PARTS
    first = tl.program_id(0) // PARTS * BLOCK_C
    o_n = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_row = tl.minimum(o_n, N - 1)
    p_row = hidden + (o_row // T).to(tl.int64) * stride_hb + (o_row % T).to(tl.int64) * stride_ht
    p_part = down + i_part * BLOCK_W * C_PADDED
    b_acc = _project(p_row, p_part, first, first + BLOCK_C, C, C_PADDED, 1, BLOCK_T, BLOCK_W, BLOCK_C)
    o_partial = o_n * (C_PADDED // BLOCK_C * PARTS) + tl.program_id(0)
    p_out = partial + o_partial[:, None] * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    tl.store(p_out, b_acc, mask=(o_n < N)[:, None])


@triton.jit(do_not_specialize=["B", "T"])
def _digits_kernel(
    partial,  # [N, ROWS, BLOCK_W] fp32
    down_scale,  # [BLOCK_W]
    weight,  # [DEPTH, ARITY - 1, BLOCK_W, ROUTES_PADDED]
    bias,  # [DEPTH, ARITY - 1, ROUTES_PADDED]
    out,  # [roles, B, R, T] int32
    B,
    T,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    ROUTES: tl.constexpr,
    ROUTES_PADDED: tl.constexpr,
    DEPTH: tl.constexpr,
    ARITY: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    i_n = tl.program_id(0)
    o_w = tl.arange(0, BLOCK_W)
    o_l = tl.arange(0, BLOCK_L)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_l = o_l < DEPTH
    # the first weights are on their way while the hidden layer is summed: nothing else hides their latency
    o_column = o_l * (ARITY - 1)
    o_weight = (o_column[:, None, None] * BLOCK_W + o_w[None, :, None]) * ROUTES_PADDED + o_r[None, None, :]
    o_bias = o_column[:, None] * ROUTES_PADDED + o_r[None, :]
    b_w = tl.load(weight + o_weight, mask=m_l[:, None, None], other=0.0)  # [BLOCK_L, BLOCK_W, BLOCK_R]
    b_bias = tl.load(bias + o_bias, mask=m_l[:, None], other=0.0)
    b_scale = tl.load(down_scale + o_w)

    wait_for_previous(OVERLAP)
    b_acc = tl.zeros([BLOCK_W], dtype=tl.float32)
    for i_s in range(0, ROWS, BLOCK_S):
        o_s = i_s + tl.arange(0, BLOCK_S)
        p_partial = partial + (i_n * ROWS + o_s)[:, None] * BLOCK_W + o_w[None, :]
        b_acc += tl.sum(tl.load(p_partial, mask=(o_s < ROWS)[:, None], other=0.0), 0)
    b_h = _gelu(b_acc * b_scale)

    b_best = tl.zeros([BLOCK_L, BLOCK_R], dtype=tl.float32)  # child 0 has logit 0
    b_digit = tl.zeros([BLOCK_L, BLOCK_R], dtype=tl.int32)
    for i_child in range(1, ARITY):
        b_logit = tl.sum(b_h[None, :, None] * b_w.to(tl.float32), 1) + b_bias
        b_digit = tl.where(b_logit > b_best, i_child, b_digit)
        b_best = tl.maximum(b_logit, b_best)
        m_next = m_l & (i_child < ARITY - 1)
        b_w = tl.load(weight + o_weight + i_child * BLOCK_W * ROUTES_PADDED, mask=m_next[:, None, None], other=0.0)
        b_bias = tl.load(bias + o_bias + i_child * ROUTES_PADDED, mask=m_next[:, None], other=0.0)
    b_power = tl.full([BLOCK_L], 1, dtype=tl.int32)
    for i_l in tl.static_range(DEPTH):
        b_power *= tl.where((o_l > i_l) & m_l, ARITY, 1)
    b_address = tl.sum(b_digit * b_power[:, None], 0)
    i_b = i_n // T
    o_out = (o_r // R * B + i_b).to(tl.int64) * R + o_r % R
    tl.store(out + o_out * T + i_n % T, b_address, mask=o_r < ROUTES)


class PackedRouter(NamedTuple):
    """A router as the kernels read it; made by `pack_router` once per version of the weights.

    down: `[parts, W', C']` in the hidden states' dtype; the sum of the parts times `down_scale` is the weight.
    down_scale: `[W']` float32, powers of two.
    weight: `[L, p - 1, W', routes']`, query routes first, then key routes unless tied; bfloat16 if that is exact and
        the hidden states have half precision, else float32.
    bias: `[L, p - 1, routes']` float32.

    Primed sizes are padded with zeros: W' and routes' to a power of two >= 16 (routes' beyond 64 to a multiple of 64),
    C' to a multiple of 128.
    """

    down: Tensor
    down_scale: Tensor
    weight: Tensor
    bias: Tensor
    hidden_size: int
    num_routes: int
    depth: int
    arity: int
    tied: bool


class RouterTile(NamedTuple):
    """Tile of one fused program and how it is compiled."""

    tokens: int
    channels: int
    routes: int
    num_warps: int
    num_stages: int


def choose_router_tile(num_tokens: int, packed: PackedRouter) -> RouterTile:
    """Tiles that fit the 99 KB of shared memory most GPUs from compute capability 8.0 on have.

    Args:
        num_tokens: B x T; small tiles where large ones would leave multiprocessors without work.
    """
    width, routes = packed.down.shape[1], packed.bias.shape[2]  # padded
    if width > 64:
        if packed.weight.dtype == torch.bfloat16:
            return RouterTile(64, 32, min(32, routes), 4, 3)
        return RouterTile(64, 32, 16, 8, 3)
    if packed.down.dtype == torch.float32:
        return RouterTile(64, 32, min(32, routes), 4, 3)
    if num_tokens <= 16384:
        if packed.down.is_cuda and torch.cuda.get_device_capability(packed.down.device) == (9, 0) and width <= 32:
            return RouterTile(64, 128, min(64 if packed.arity == 2 else 32, routes), 4, 3)  # 123 KB
        return RouterTile(
            64, 64, min(64 if packed.arity == 2 and width <= 32 else 32, routes), 4, 3 if width <= 32 else 2
        )
    return RouterTile(128, 64, min(32, routes), 8, 3 if width <= 32 else 2)


def _split(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Parts of `dtype` `[parts, W, C]` and scales `[W]` with `weight == scale * sum of parts`, up to underflow."""
    scale = torch.ones(weight.shape[0], device=weight.device)
    if dtype == torch.float16:  # has few exponents: bring the largest weight of a row just below its largest number
        exponent = (torch.frexp(weight.abs().amax(1)).exponent - 15).clamp(min=-100)
        scale = torch.ldexp(scale, exponent)
    rest, parts = weight / scale[:, None], []
    while True:
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].float()
        if len(parts) == 3 or not rest.any():  # 3 x 8 bits hold any float32
            return torch.stack(parts), scale


def pack_router(
    down: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    *,
    num_routes: int,
    depth: int,
    arity: int,
    dtype: torch.dtype,
) -> PackedRouter:
    """Lay a router's weights out for `route_addresses`. Waits for the GPU; done once per version of the weights.

    Args:
        down: `[W, C]`; W <= `MAX_ROUTER_WIDTH`. All weights are float32, bfloat16 or float16, on one device.
        query_weight: `[R * L * (p - 1), W]`, the logits of children 1 to p - 1; child 0 has logit 0.
        query_bias: `[R * L * (p - 1)]`.
        key_weight, key_bias: like the query's; both None if one projection serves both roles.
        num_routes: R >= 1. depth: L >= 1. arity: p >= 2; `p**L < 2**31`.
        dtype: of the hidden states to come; float16, bfloat16 or float32.

    Raises:
        ValueError: a shape, dtype, device or option does not fit; the message names the argument.
    """
    if num_routes < 1 or depth < 1 or arity < 2 or arity**depth >= 2**31:
        raise ValueError(
            f"num_routes and depth must be >= 1, arity >= 2 and arity**depth < 2**31, got num_routes={num_routes}, "
            f"depth={depth}, arity={arity}."
        )
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be float16, bfloat16 or float32, got {dtype}.")
    if down.ndim != 2 or 0 in down.shape:
        raise ValueError(f"down must have shape [W, C], got {list(down.shape)}.")
    W, C = down.shape
    if W > MAX_ROUTER_WIDTH:
        raise ValueError(
            f"down must have at most {MAX_ROUTER_WIDTH} rows (router_dim), got {W}: use the torch router beyond that."
        )
    if (key_weight is None) != (key_bias is None):
        raise ValueError("key_weight and key_bias must both be given, or both be None if tied, got one.")
    logits = num_routes * depth * (arity - 1)
    needs = {"down": (down, [W, C]), "query_weight": (query_weight, [logits, W]), "query_bias": (query_bias, [logits])}
    if key_weight is not None and key_bias is not None:
        needs |= {"key_weight": (key_weight, [logits, W]), "key_bias": (key_bias, [logits])}
    for name, (tensor, shape) in needs.items():
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {list(tensor.shape)}.")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}.")
        if tensor.device != down.device:
            raise ValueError(f"{name} must be on down's device {down.device}, got {tensor.device}.")

    width = max(16, triton.next_power_of_2(W))
    with torch.no_grad():
        padded = down.new_zeros(width, triton.cdiv(C, _SLICE) * _SLICE, dtype=torch.float32)
        padded[:W, :C] = down
        down_parts, down_scale = _split(padded, dtype)
        # [R, L, p - 1, W + 1] per role, the bias as last column -> [L, p - 1, W + 1, roles x R]
        roles = [(query_weight, query_bias)]
        if key_weight is not None and key_bias is not None:
            roles.append((key_weight, key_bias))
        columns = torch.cat([torch.cat([w.float(), b.float()[:, None]], 1) for w, b in roles])
        columns = columns.view(-1, depth, arity - 1, W + 1).permute(1, 2, 3, 0)
        routes = columns.shape[3]
        tile = min(64, max(16, triton.next_power_of_2(routes)))
        weight = columns.new_zeros(depth, arity - 1, width, triton.cdiv(routes, tile) * tile)
        weight[:, :, :W, :routes] = columns[:, :, :W]
        bias = torch.zeros_like(weight[:, :, 0])
        bias[..., :routes] = columns[:, :, W]
        narrow = weight.bfloat16()
        # Triton's interpreter computes bfloat16 products wrongly
        if dtype != torch.float32 and not INTERPRETED and torch.equal(narrow.float(), weight):
            weight = narrow
    return PackedRouter(down_parts, down_scale, weight, bias, C, num_routes, depth, arity, tied=key_weight is None)


def fused_pass(hidden: Tensor, packed: PackedRouter, out: Tensor, tile: RouterTile) -> None:
    """One program per tile of tokens; `out` `[roles, B, R, T]`."""
    B, T, C = hidden.shape
    parts, width, padded_channels = packed.down.shape
    _fused_kernel[(B * triton.cdiv(T, tile.tokens),)](
        *(hidden, packed.down, packed.down_scale, packed.weight, packed.bias, out),
        *(hidden.stride(0), hidden.stride(1), B, T),
        C=C,
        C_PADDED=padded_channels,
        R=packed.num_routes,
        ROUTES=out.shape[0] * packed.num_routes,
        ROUTES_PADDED=packed.bias.shape[2],
        DEPTH=packed.depth,
        ARITY=packed.arity,
        PARTS=parts,
        BLOCK_T=tile.tokens,
        BLOCK_W=width,
        BLOCK_C=tile.channels,
        BLOCK_R=tile.routes,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def split_passes(hidden: Tensor, packed: PackedRouter, out: Tensor) -> None:
    """First a program per 16 tokens, slice of channels and part, then one per token and a few routes."""
    B, T, C = hidden.shape
    parts, width, padded_channels = packed.down.shape
    rows = padded_channels // _SLICE * parts
    partial = torch.empty(B * T, rows, width, dtype=torch.float32, device=hidden.device)
    _slice_kernel[(rows, triton.cdiv(B * T, 16))](
        *(hidden, packed.down, partial, hidden.stride(0), hidden.stride(1), T, B * T),
        C=C,
        C_PADDED=padded_channels,
        PARTS=parts,
        BLOCK_T=16,
        BLOCK_W=width,
        BLOCK_C=_SLICE,
        num_warps=4 if width <= 64 else 8,
        num_stages=1,
        **overlap(hidden.device),
    )
    block_l = triton.next_power_of_2(packed.depth)
    block_r = min(16, max(1, 2048 // (block_l * width)))  # divides the padded number of routes
    routes_padded = packed.bias.shape[2]
    _digits_kernel[(B * T, routes_padded // block_r)](
        *(partial, packed.down_scale, packed.weight, packed.bias, out, B, T),
        ROWS=rows,
        R=packed.num_routes,
        ROUTES=out.shape[0] * packed.num_routes,
        ROUTES_PADDED=routes_padded,
        DEPTH=packed.depth,
        ARITY=packed.arity,
        BLOCK_S=min(4096 // width, triton.next_power_of_2(rows)),
        BLOCK_W=width,
        BLOCK_L=block_l,
        BLOCK_R=block_r,
        num_warps=4,
        num_stages=1,
        **overlap(hidden.device),
    )


@torch.library.custom_op("topo_kernels::route_addresses", mutates_args=())
def _route_addresses(
    hidden: Tensor,
    down: Tensor,
    down_scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_routes: int,
    depth: int,
    arity: int,
    tied: bool,
) -> Tensor:
    """Addresses `[roles, B, R, T]` of checked arguments."""
    check_device("route_addresses", hidden=hidden)
    B, T, C = hidden.shape
    packed = PackedRouter(down, down_scale, weight, bias, C, num_routes, depth, arity, tied)
    out = torch.empty(1 if tied else 2, B, num_routes, T, dtype=torch.int32, device=hidden.device)
    if out.numel() == 0:
        return out
    hidden = hidden if hidden.stride(2) == 1 else hidden.contiguous()
    with torch.cuda.device_of(hidden):
        if B * T <= _SPLIT_TOKENS:
            split_passes(hidden, packed, out)
        elif T == 1:  # a tile holds tokens of one row: swap batch and length
            swapped = torch.empty(out.shape[0], 1, num_routes, B, dtype=torch.int32, device=hidden.device)
            fused_pass(hidden.transpose(0, 1), packed, swapped, choose_router_tile(B, packed))
            out.copy_(swapped.permute(0, 3, 2, 1))
        else:
            fused_pass(hidden, packed, out, choose_router_tile(B * T, packed))
    return out


@_route_addresses.register_fake
def _(
    hidden: Tensor,
    down: Tensor,
    down_scale: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_routes: int,
    depth: int,
    arity: int,
    tied: bool,
) -> Tensor:
    B, T, _ = hidden.shape
    return torch.empty(1 if tied else 2, B, num_routes, T, dtype=torch.int32, device=hidden.device)


def _check(hidden: Tensor, packed: PackedRouter) -> None:
    if hidden.ndim != 3 or hidden.shape[2] != packed.hidden_size:
        raise ValueError(f"hidden must have shape [B, T, C={packed.hidden_size}], got {list(hidden.shape)}.")
    if hidden.dtype != packed.down.dtype:
        raise ValueError(
            f"hidden must have the dtype the router was packed for, {packed.down.dtype}, got {hidden.dtype}."
        )
    if hidden.device != packed.down.device:
        raise ValueError(f"hidden must be on the router's device {packed.down.device}, got {hidden.device}.")


def route_addresses(hidden: Tensor, packed: PackedRouter) -> tuple[Tensor, Tensor]:
    """Hard addresses of both roles: the digits `TopologyRouter` chooses, packed.

    An address is `sum_l digit_l * p**l`; a digit is the argmax over `[0, logits]`, ties to the lower digit. Digits
    whose two largest logits are equal to fp32 rounding may come out either way; all others are those of exact
    arithmetic. Not differentiable. Repeats are bitwise equal.

    Args:
        hidden: `[B, T, C]`, finite, the dtype and device `packed` was made for. Any strides (a strided last
            dimension is copied).
        packed: from `pack_router`.

    Returns:
        query and key addresses, int32 `[B, R, T]`, contiguous; the same tensor if tied.

    Raises:
        ValueError: `hidden` does not fit `packed`.
        RuntimeError: the device cannot run the kernels.
    """
    _check(hidden, packed)
    out = _route_addresses(
        hidden,
        packed.down,
        packed.down_scale,
        packed.weight,
        packed.bias,
        packed.num_routes,
        packed.depth,
        packed.arity,
        packed.tied,
    )
    query = out[0]
    return query, query if packed.tied else out[1]
