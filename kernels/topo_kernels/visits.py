"""The balls that each query visits: the likeliest ones at its head's depth, by a beam over the levels of the tree.

A prefix that is not among the `m` likeliest of its level has as many before it, and so has each of its children: a beam
of `m` prefixes finds the likeliest balls exactly. What is summed along a prefix is how much the logits of its digits
lack to those of the likeliest ones, in float32 and from the root on, as `topo_adapter.core.visits` does: sums and ties
are the same, bit for bit. No sum is negative, so the bits of its float, followed by the candidate's place,
make one integer, and these are in the order of a stable sort.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import MAX_VISITS, check_device

MAX_ARITY = 256  # a tile holds all children of a beam
_PLACES = tl.constexpr(2**16)  # more than there are candidates
_NOTHING = tl.constexpr(2**63 - 1)  # after every candidate


@triton.jit(do_not_specialize=["T", "count"])
def _beam_kernel(
    logits,  # [B, R, T, L, p] fp32
    depths,  # [R] int32
    visits,  # [R] int32
    balls,  # [B, R, count, T] int32, written
    stride_b,
    stride_r,
    stride_t,
    stride_l,
    stride_c,
    T,
    R,
    count,
    ARITY: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,  # children
    BLOCK_M: tl.constexpr,  # prefixes in the beam
):
    n_t = tl.cdiv(T, BLOCK_T)
    i_br = (tl.program_id(0) // n_t).to(tl.int64)
    i_r = i_br % R
    o_t = tl.program_id(0) % n_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.arange(0, BLOCK_C)
    o_m = tl.arange(0, BLOCK_M)
    m_t = o_t < T
    m_tc = m_t[:, None] & (o_c < ARITY)[None, :]
    p_logits = logits + i_br // R * stride_b + i_r * stride_r
    p_logits += o_t.to(tl.int64)[:, None] * stride_t + o_c[None, :] * stride_c
    depth = tl.load(depths + i_r)
    most = tl.load(visits + i_r)

    o_place = o_c[:, None] * BLOCK_M + o_m[None, :]  # by child, then by the prefixes' order
    b_sum = tl.zeros([BLOCK_T, BLOCK_M], dtype=tl.float32)
    b_ball = tl.zeros([BLOCK_T, BLOCK_M], dtype=tl.int32)
    size = tl.where(depth > DEPTH, 0, 1)  # of the beam; nothing is below the leaves
    balls_above = 1
    for i_l in range(tl.minimum(depth, DEPTH)):
        b_logits = tl.load(p_logits + i_l * stride_l, mask=m_tc, other=0.0)
        b_top = tl.max(tl.where((o_c < ARITY)[None, :], b_logits, float("-inf")), 1)
        b_lack = b_top[:, None] - b_logits  # exactly 0 for the likeliest child
        b_sums = b_sum[:, None, :] + b_lack[:, :, None]  # [BLOCK_T, BLOCK_C, BLOCK_M]
        b_key = b_sums.to(tl.int32, bitcast=True).to(tl.int64) * _PLACES + o_place[None, :, :]
        m_some = (o_c < ARITY)[:, None] & (o_m < size)[None, :]
        b_key = tl.where(m_some[None, :, :], b_key, _NOTHING)
        b_parents = b_ball
        for i_m in tl.static_range(BLOCK_M):
            b_best = tl.min(tl.min(b_key, 2), 1)
            b_key = tl.where(b_key == b_best[:, None, None], _NOTHING, b_key)
            b_place = (b_best % _PLACES).to(tl.int32)
            m_parent = o_m[None, :] == (b_place % BLOCK_M)[:, None]
            b_new = tl.sum(tl.where(m_parent, b_parents, 0), 1) + b_place // BLOCK_M * balls_above
            b_total = (b_best // _PLACES).to(tl.int32).to(tl.float32, bitcast=True)
            b_sum = tl.where(o_m[None, :] == i_m, b_total[:, None], b_sum)
            b_ball = tl.where(o_m[None, :] == i_m, b_new[:, None], b_ball)
        size = tl.minimum(size * ARITY, most)
        balls_above *= ARITY
    p_balls = balls + (i_br * count + o_m[None, :]) * T + o_t[:, None]
    tl.store(p_balls, tl.where(o_m[None, :] < size, b_ball, -1), mask=m_t[:, None] & (o_m < count)[None, :])


def choose_tokens(candidates: int) -> int:
    """Tokens of a program: eight candidates per thread, of 128, where that is possible."""
    return max(1, 1024 // candidates)


@torch.library.custom_op("topo_kernels::likeliest_balls", mutates_args=())
def _likeliest_balls(logits: Tensor, depths: Tensor, visits: Tensor, count: int) -> Tensor:
    balls = _allocate(logits, depths, visits, count)
    if balls.numel() == 0:
        return balls
    B, R, T, depth, arity = logits.shape
    children, prefixes = triton.next_power_of_2(arity), triton.next_power_of_2(count)
    block = choose_tokens(children * prefixes)
    with torch.cuda.device_of(logits):
        _beam_kernel[(B * R * triton.cdiv(T, block),)](
            *(logits, depths.contiguous(), visits.contiguous(), balls, *logits.stride()),
            T=T,
            R=R,
            count=count,
            ARITY=arity,
            DEPTH=depth,
            BLOCK_T=block,
            BLOCK_C=children,
            BLOCK_M=prefixes,
            num_warps=4,
        )
    return balls


@_likeliest_balls.register_fake
def _allocate(logits: Tensor, depths: Tensor, visits: Tensor, count: int) -> Tensor:
    B, R, T = logits.shape[:3]
    return logits.new_empty(B, R, count, T, dtype=torch.int32)


def likeliest_balls(logits: Tensor, depths: Tensor, visits: Tensor, count: int) -> Tensor:
    """The balls that each query visits: the likeliest ones of the product of its level distributions.

    Args:
        logits: float32 `[B, R, T, L, p]`, of the digits of queries in R route heads; `L >= 1`, p from 2 to 256, `p**L`
            below 2**31. Any strides.
        depths: int32 `[R]`, from 0 to `L + 1`: at which depth of the tree a head's balls are; `L + 1` is no ball.
        visits: int32 `[R]`, from 1 to `count`: how many balls a query of the head visits. The values of both are
            trusted: checking them would wait for the GPU.
        count: from 1 to 8.

    Returns:
        int32 `[B, R, count, T]`: distinct balls `address % p**depth`, likeliest first, equally likely ones by the order
        of `topo_adapter.core.visits.likeliest_balls`; -1 behind a head's visits, and where the depth has fewer balls.

    Raises:
        ValueError: a shape, dtype, device or option does not fit; the message names the argument.
        RuntimeError: the tensors are not on a GPU.
    """
    if logits.ndim != 5 or logits.dtype != torch.float32:
        raise ValueError(f"logits must be float32 [B, R, T, L, p], got {logits.dtype} {list(logits.shape)}.")
    depth, arity = logits.shape[3:]
    if depth < 1 or not 2 <= arity <= MAX_ARITY or arity**depth >= 2**31:
        raise ValueError(
            f"logits must have L >= 1 levels of p from 2 to {MAX_ARITY} children, p**L below 2**31, got L = {depth} "
            f"and p = {arity}."
        )
    for name, tensor in (("depths", depths), ("visits", visits)):
        if tensor.shape != logits.shape[1:2] or tensor.dtype != torch.int32:
            raise ValueError(
                f"{name} must be int32 of shape [{logits.shape[1]}], got {tensor.dtype} {list(tensor.shape)}."
            )
        if tensor.device != logits.device:
            raise ValueError(f"{name} must be on logits' device {logits.device}, got {tensor.device}.")
    if not 1 <= count <= MAX_VISITS:
        raise ValueError(f"count must be from 1 to {MAX_VISITS}, got {count}.")
    check_device("likeliest_balls", logits=logits)
    return _likeliest_balls(logits.detach(), depths, visits, count)
