"""What kernels have in common: constants, tanh, and programmatic dependent launch as a kernel sees it."""

import math

import triton
import triton.language as tl

NEVER = tl.constexpr(2**31 - 1)  # above any rank
LOWEST = tl.constexpr(-1e30)  # below any score; finite, because -inf - -inf is NaN
TRUSTED = tl.constexpr(2.0**60)  # sums of exponentials relative to a fixed reference stay below this, or are redone
LOG2E = tl.constexpr(1 / math.log(2))


@triton.jit
def tanh(b_x):
    """tanh in float32: Cephes' polynomial near 0, where the quotient of exponentials cancels."""
    b_z = b_x * b_x
    b_poly = -5.70498872745e-3 * b_z + 2.06390887954e-2
    b_poly = b_poly * b_z - 5.37397155531e-2
    b_poly = b_poly * b_z + 1.33314422036e-1
    b_poly = b_poly * b_z - 3.33332819422e-1
    b_near = b_poly * b_z * b_x + b_x
    # the tensor first: in the interpreter a constexpr times a tensor is a constexpr, which Triton 3.9 refuses
    b_decay = tl.exp2(tl.abs(b_x) * (-2 * LOG2E))  # in (0, 1]: never overflows
    b_far = (1 - b_decay) / (1 + b_decay)
    return tl.where(tl.abs(b_x) < 0.625, b_near, tl.where(b_x < 0, -b_far, b_far))


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
