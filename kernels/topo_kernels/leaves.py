"""Level probabilities to leaf distributions and back, a token in a row: for `far_mass` (distill.py) and the bridge.

Leaf `v` of `V = p**L` has the digits `digit_l(v) = v // p**l % p`, and a token with level probabilities `pi` is in ball
`v mod p**d` of depth `d` with probability `w_d(v) = prod_{l<d} pi[l, digit_l(v)]`. Coarsening sums over the leaves of a
ball, so `<P_d, coarsen(values)> = sum_v w_d(v) values(v)`: no depth needs a tensor of its own, and a kernel reads and
writes every leaf of a token once. The gradient of `sum_d g_d sum_v w_d(v) values(v)` by Horner's rule:

    X_L = g_L values,    X_d(v) = g_d values(v) + pi[d, digit_d(v)] X_{d+1}(v)
    d pi[l, c] = sum over the leaves with digit_l(v) = c of w_l(v) X_{l+1}(v)
    d values(v) = sum_d g_d w_d(v)

without a division, so probabilities of 0 are like any other. Means over tokens are partial sums, one per program.

Tokens with `m` visits have `v_d = 1 - (1 - w_d)**m` in the place of `w_d` at every depth. `v_d` is no sum over finer
balls, so its mean is taken at every depth and written at all leaves of a ball. With `h_d(v)` the gradient of that entry

    X_L = G_L,    X_d(v) = G_d(v) + pi[d, digit_d(v)] X_{d+1}(v),    G_d = m (1 - w_d)**(m - 1) (g_d values + h_d)

takes the place of the first line, and `d values = sum_d g_d v_d`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED

MAX_TILE_LEAVES = 256  # wider leaf distributions do not fit a tile
_LENGTHS = ["stride_b", "stride_h", "N", "STEPS"]  # differ between batches of tokens: nothing is compiled for them


@triton.jit
def _branches(p_probs, m_n, o_v, stride_c, LEVEL: tl.constexpr, ARITY: tl.constexpr):
    """The probabilities `[BLOCK_N, BLOCK_V]` with which tokens take the leaves' branches at one level.

    Args: p_probs: `[BLOCK_N]`, of the tokens' first child at that level.
    """
    o_digit = o_v // ARITY**LEVEL % ARITY
    b_branch = tl.load(p_probs, mask=m_n, other=0.0)[:, None] + tl.zeros_like(o_v)[None, :]
    for i_c in range(1, ARITY):
        b_child = tl.load(p_probs + i_c * stride_c, mask=m_n, other=0.0)
        b_branch = tl.where((o_digit == i_c)[None, :], b_child[:, None], b_branch)
    return b_branch


@triton.jit
def _visited(b_probs, count):
    """`1 - (1 - P)**count` without a difference of nearly equal numbers, P itself for a count of 1."""
    b_visited = b_probs
    for _ in range(1, count):
        b_visited += b_probs * (1 - b_visited)
    return b_visited


@triton.jit
def _visited_slope(b_probs, count):
    """`count * (1 - P)**(count - 1)`, the derivative of `_visited`; a P of a rounding more than 1 counts as 1."""
    b_slope = tl.zeros_like(b_probs) + count
    for _ in range(1, count):
        b_slope *= tl.maximum(1 - b_probs, 0.0)
    return b_slope


@triton.jit(do_not_specialize=_LENGTHS)
def _leaves_kernel(
    probs,  # [B, H, N, L, p] fp32
    weight,  # [B, N] fp32
    visits,  # [H] int32, unused without VISITS
    leaves,  # [B, H, N, V]
    partial,  # [B, programs per head, H, V] fp32
    stride_b,
    stride_h,
    stride_n,
    stride_l,
    stride_c,
    N,
    H,
    STEPS,
    ARITY: tl.constexpr,
    DEPTH: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VISITS: tl.constexpr,
):
    n_n = tl.cdiv(N, BLOCK_N * STEPS)
    i_n = tl.program_id(0) % n_n
    i_bh = (tl.program_id(0) // n_n).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H

    o_v = tl.arange(0, BLOCK_V)
    m_v = (o_v < V)[None, :]
    b_mean = tl.zeros([BLOCK_V], dtype=tl.float32)
    for i_step in range(STEPS):
        o_n = (i_n * STEPS + i_step) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        b_weight = tl.load(weight + i_b * N + o_n, mask=m_n, other=0.0)
        m_real = b_weight > 0
        p_probs = probs + i_b * stride_b + i_h * stride_h + o_n.to(tl.int64) * stride_n
        b_leaves = _branches(p_probs, m_real, o_v, stride_c, 0, ARITY)
        for i_l in tl.static_range(1, DEPTH):
            b_leaves *= _branches(p_probs + i_l * stride_l, m_real, o_v, stride_c, i_l, ARITY)
        if VISITS:
            b_leaves = _visited(b_leaves, tl.load(visits + i_h))
        b_mean += tl.sum(b_weight[:, None] * b_leaves, 0)
        p_leaves = leaves + (i_bh * N + o_n)[:, None] * V + o_v[None, :]
        tl.store(p_leaves, b_leaves.to(leaves.dtype.element_ty), mask=m_n[:, None] & m_v)
    tl.store(partial + ((i_b * n_n + i_n) * H + i_h) * V + o_v, b_mean, mask=o_v < V)


@triton.jit(do_not_specialize=_LENGTHS)
def _kept_kernel(
    probs,  # [B, H, N, L, p] fp32
    weight,  # [B, N] fp32
    visits,  # [H] int32, unused without VISITS
    values,  # [B, H, N, V] fp32
    local,  # [B, H, N] fp32
    kept,  # [L, B, H, N] fp32
    partial,  # [B, programs per head, H, V] fp32, with VISITS [B, programs per head, L, H, V]
    stride_b,
    stride_h,
    stride_n,
    stride_l,
    stride_c,
    N,
    H,
    STEPS,
    ARITY: tl.constexpr,
    DEPTH: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VISITS: tl.constexpr,
    BLOCK_L: tl.constexpr,  # rows of means: one per depth with VISITS, else 1
):
    n_n = tl.cdiv(N, BLOCK_N * STEPS)
    n_bh = (tl.num_programs(0) // n_n).to(tl.int64)
    i_n = tl.program_id(0) % n_n
    i_bh = (tl.program_id(0) // n_n).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H

    o_v = tl.arange(0, BLOCK_V)
    m_v = (o_v < V)[None, :]
    MEANS: tl.constexpr = DEPTH if VISITS else 1
    o_mean = tl.arange(0, BLOCK_L)[:, None]
    b_means = tl.zeros([BLOCK_L, BLOCK_V], dtype=tl.float32)
    count = tl.load(visits + i_h) if VISITS else 1
    for i_step in range(STEPS):
        o_n = (i_n * STEPS + i_step) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        b_weight = tl.load(weight + i_b * N + o_n, mask=m_n, other=0.0)
        m_real = b_weight > 0
        o_row = i_bh * N + o_n
        b_values = tl.load(values + o_row[:, None] * V + o_v[None, :], mask=m_real[:, None] & m_v, other=0.0)
        b_local = tl.load(local + o_row, mask=m_real, other=0.0)
        p_probs = probs + i_b * stride_b + i_h * stride_h + o_n.to(tl.int64) * stride_n
        b_ball = tl.full([BLOCK_N, BLOCK_V], 1.0, dtype=tl.float32)
        for i_l in tl.static_range(DEPTH):
            b_ball *= _branches(p_probs + i_l * stride_l, m_real, o_v, stride_c, i_l, ARITY)
            b_visited = _visited(b_ball, count) if VISITS else b_ball
            b_kept = b_local + tl.sum(b_visited * b_values, 1)
            tl.store(kept + i_l * n_bh * N + o_row, b_kept, mask=m_n)
            if VISITS:
                b_mean = tl.sum(b_weight[:, None] * b_visited, 0)
                b_means += tl.where(o_mean == i_l, b_mean[None, :], 0.0)
        if not VISITS:
            b_means += tl.sum(b_weight[:, None] * b_ball, 0)[None, :]
    o_partial = ((i_b * n_n + i_n) * MEANS + o_mean) * H + i_h
    tl.store(partial + o_partial * V + o_v[None, :], b_means, mask=(o_mean < MEANS) & m_v)


@triton.jit(do_not_specialize=_LENGTHS)
def _leaf_gradient_kernel(
    probs,  # [B, H, N, L, p] fp32
    weight,  # [B, N] fp32
    visits,  # [H] int32, unused without VISITS
    values,  # [B, H, N, V] fp32
    dkept,  # [L, B, H, N] fp32, unused without ALL_DEPTHS
    dmean,  # [H, V] fp32, with ALL_DEPTHS and VISITS [L, H, V]
    dprobs,  # [B, H, N, L, p] fp32, contiguous
    dvalues,  # [B, H, N, V], unused without ALL_DEPTHS
    stride_b,
    stride_h,
    stride_n,
    stride_l,
    stride_c,
    N,
    H,
    STEPS,
    ARITY: tl.constexpr,
    DEPTH: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VISITS: tl.constexpr,
    ALL_DEPTHS: tl.constexpr,
):
    """With ALL_DEPTHS `g_d` is `dkept` at depth `d`; without, 1 at the last depth and 0 above."""
    n_n = tl.cdiv(N, BLOCK_N * STEPS)
    n_bh = (tl.num_programs(0) // n_n).to(tl.int64)
    i_n = tl.program_id(0) % n_n
    i_bh = (tl.program_id(0) // n_n).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H

    o_v = tl.arange(0, BLOCK_V)
    m_v = (o_v < V)[None, :]
    p_dmean = dmean + i_h * V + o_v
    count = tl.load(visits + i_h) if VISITS else 1
    for i_step in range(STEPS):
        o_n = (i_n * STEPS + i_step) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        b_weight = tl.load(weight + i_b * N + o_n, mask=m_n, other=0.0)
        m_real = b_weight > 0
        o_row = i_bh * N + o_n
        o_value = o_row[:, None] * V + o_v[None, :]
        b_values = tl.load(values + o_value, mask=m_real[:, None] & m_v, other=0.0)
        p_probs = probs + i_b * stride_b + i_h * stride_h + o_n.to(tl.int64) * stride_n

        b_ball = tl.full([BLOCK_N, BLOCK_V], 1.0, dtype=tl.float32)
        balls = (b_ball,)  # w_l; branches are read again rather than held
        b_dvalues = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
        for i_l in tl.static_range(DEPTH):
            b_ball *= _branches(p_probs + i_l * stride_l, m_real, o_v, stride_c, i_l, ARITY)
            balls += (b_ball,)  # type: ignore[assignment]
            if ALL_DEPTHS:
                b_dkept = tl.load(dkept + i_l * n_bh * N + o_row, mask=m_real, other=0.0)
                b_dvalues += b_dkept[:, None] * (_visited(b_ball, count) if VISITS else b_ball)
        if ALL_DEPTHS:
            tl.store(dvalues + o_value, b_dvalues.to(dvalues.dtype.element_ty), mask=m_n[:, None] & m_v)

        if ALL_DEPTHS and VISITS:
            b_x = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
        else:
            b_x = b_weight[:, None] * tl.load(p_dmean, mask=o_v < V, other=0.0)[None, :]
        if not ALL_DEPTHS:
            b_x += b_values
            if VISITS:
                b_x *= _visited_slope(b_ball, count)
        for i_l in tl.static_range(DEPTH - 1, -1, -1):
            if ALL_DEPTHS:
                b_own = tl.load(dkept + i_l * n_bh * N + o_row, mask=m_real, other=0.0)[:, None] * b_values
                if VISITS:
                    b_dmean = tl.load(p_dmean + i_l * H * V, mask=o_v < V, other=0.0)
                    b_own += b_weight[:, None] * b_dmean[None, :]
                    b_own *= _visited_slope(balls[i_l + 1], count)
                b_x += b_own
            b_product = balls[i_l] * b_x
            o_digit = o_v // ARITY**i_l % ARITY
            for i_c in range(ARITY):
                b_dprobs = tl.sum(tl.where((o_digit == i_c)[None, :], b_product, 0.0), 1)
                tl.store(dprobs + o_row * (DEPTH * ARITY) + (i_l * ARITY + i_c), b_dprobs, mask=m_n)
            if i_l > 0:
                b_x *= _branches(p_probs + i_l * stride_l, m_real, o_v, stride_c, i_l, ARITY)


def leaf_dtype(dtype: torch.dtype) -> torch.dtype:
    """How leaf distributions multiply queries' and keys' attention: float16 has three bits more than bfloat16."""
    return torch.float32 if dtype == torch.float32 else torch.float16


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """How gradients do: they need bfloat16's range, which the interpreter does not have."""
    return torch.float32 if dtype == torch.float32 or INTERPRETED else torch.bfloat16


class Rows(NamedTuple):
    """Tokens that a program, one warp, holds at a time, and how often it goes on to the next."""

    block: int
    steps: int


def choose_rows(leaves: int) -> Rows:
    """Up to eight values per thread of each tile: a gradient holds one tile per level and more.

    16 tokens per program are few enough for a sample of queries to fill the GPU.
    """
    block = max(1, min(16, 256 // triton.next_power_of_2(leaves)))
    return Rows(block, 16 // block)


class _Launch(NamedTuple):
    """What the kernels of one role are launched with; `partial` is `[B, programs per head, H, V]`."""

    grid: tuple[int]
    arguments: dict[str, int]
    partial: tuple[int, int, int, int]
    visits: Tensor  # `[H]`, or anything where it is not read


def _launch(probs: Tensor, visits: Tensor | None) -> _Launch:
    B, H, N, depth, arity = probs.shape
    leaves = arity**depth
    rows = choose_rows(leaves)
    programs = triton.cdiv(N, rows.block * rows.steps)
    arguments = {
        **{f"stride_{axis}": stride for axis, stride in zip("bhnlc", probs.stride(), strict=True)},
        "N": N,
        "H": H,
        "STEPS": rows.steps,
        "ARITY": arity,
        "DEPTH": depth,
        "V": leaves,
        "BLOCK_N": rows.block,
        "BLOCK_V": triton.next_power_of_2(leaves),
        "VISITS": visits is not None,
        "num_warps": 1,
    }
    visits = probs if visits is None else visits.contiguous()
    return _Launch((B * H * programs,), arguments, (B, programs, H, leaves), visits)


def leaf_distributions(
    probs: Tensor, weight: Tensor, dtype: torch.dtype, visits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Leaf distributions and their weighted sum over all tokens.

    Args:
        probs: float32 `[B, H, N, L, p]`, any strides.
        weight: float32 `[B, N]`; tokens of weight 0 are padding: their probabilities are not read and count as 0.
        dtype: of the distributions.
        visits: None, or int32 `[H]`, >= 1: in the place of a leaf's probability `P` stands that of being among so many
            independent draws, `1 - (1 - P)**visits`.

    Returns:
        `[B, H, N, p**L]`, and float32 `[H, p**L]`.
    """
    B, H, N = probs.shape[:3]
    grid, arguments, shape, visits = _launch(probs, visits)
    leaves = torch.empty(B, H, N, shape[3], dtype=dtype, device=probs.device)
    partial = probs.new_empty(shape)
    _leaves_kernel[grid](probs, weight.contiguous(), visits, leaves, partial, **arguments)
    return leaves, partial.sum((0, 1))


def kept_of_values(
    probs: Tensor, weight: Tensor, values: Tensor, local: Tensor, visits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`local + sum_v w_d(v) values(v)` at every depth `d` in `1..L`, and the weighted sum of the leaf distributions.

    Args:
        probs, weight, visits: as in `leaf_distributions`. values: float32 `[B, H, N, p**L]`; local: float32
            `[B, H, N]`; both contiguous.

    Returns:
        float32 `[L, B, H, N]`, 0 in padding, and float32 `[H, p**L]`. With `visits` the latter is `[L, H, p**L]`, the
        sums at the depths `1..L`: the entry of leaf `v` at depth `d` is that of its ball `v % p**d`, so the first
        `p**d` entries are those of all balls in turn.
    """
    grid, arguments, shape, counts = _launch(probs, visits)
    depth = probs.shape[3]
    B, programs, H, leaves = shape
    kept = probs.new_empty(depth, *local.shape)
    partial = probs.new_empty(shape if visits is None else (B, programs, depth, H, leaves))
    rows = 1 if visits is None else triton.next_power_of_2(depth)
    tensors = weight.contiguous(), counts, values, local, kept, partial
    _kept_kernel[grid](probs, *tensors, **arguments, BLOCK_L=rows)
    return kept, partial.sum((0, 1))


def kept_gradient(
    probs: Tensor,
    weight: Tensor,
    values: Tensor,
    dkept: Tensor,
    dmean: Tensor,
    dtype: torch.dtype,
    visits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `kept_of_values` in its `probs`, float32, and in its `values`, in `dtype`; both contiguous."""
    grid, arguments, _, visits = _launch(probs, visits)
    dprobs = torch.empty_like(probs, memory_format=torch.contiguous_format)
    dvalues = torch.empty_like(values, dtype=dtype)
    tensors = weight.contiguous(), visits, values, dkept.contiguous(), dmean.contiguous(), dprobs, dvalues
    _leaf_gradient_kernel[grid](probs, *tensors, **arguments, ALL_DEPTHS=True)
    return dprobs, dvalues


def leaf_gradient(
    probs: Tensor, weight: Tensor, dleaves: Tensor, dmean: Tensor, visits: Tensor | None = None
) -> Tensor:
    """Gradient of `leaf_distributions` in its `probs`: float32, contiguous. dleaves: float32, contiguous."""
    grid, arguments, _, visits = _launch(probs, visits)
    dprobs = torch.empty_like(probs, memory_format=torch.contiguous_format)
    tensors = weight.contiguous(), visits, dleaves, dleaves, dmean.contiguous(), dprobs, dleaves
    _leaf_gradient_kernel[grid](probs, *tensors, **arguments, ALL_DEPTHS=False)
    return dprobs
