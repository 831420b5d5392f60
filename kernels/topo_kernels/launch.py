"""What the kernels' launches and checks have in common."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

INTERPRETED = triton.knobs.runtime.interpret  # read before the kernels are decorated


@functools.cache
def overlap(device: torch.device) -> dict[str, Any]:
    """Launch options of a short kernel that may start while the kernel before it ends (programmatic dependent launch).

    It calls `wait_for_previous` before it reads or writes what others do. A kernel that calls `let_next_start`, not
    before that, lets the next one start while it still runs.
    """
    overlaps = not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if overlaps else {"OVERLAP": False}


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


def stride_arguments(**tensors: tuple[Tensor, str]) -> dict[str, int]:
    """`stride_<name><axis>` for each tensor and the letters of its leading axes."""
    return {
        f"stride_{name}{axis}": tensor.stride(i)
        for name, (tensor, axes) in tensors.items()
        for i, axis in enumerate(axes)
    }


def score_arguments(head_dim: int, scale: float, softcap: float | None) -> dict[str, int | float]:
    """Head dimension and scores in base 2: `score * score_scale`, or `score_cap * tanh(score * score_scale)`."""
    log2e = 1 / math.log(2)
    return {
        "score_scale": scale * log2e if softcap is None else scale / softcap,
        "score_cap": 0.0 if softcap is None else softcap * log2e,
        "HAS_CAP": softcap is not None,
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
    }


_DERIVED = WeakTensorKeyDictionary()  # of the last tensor: what it was derived from, and the result


def derived(make: Callable[..., Any], tensors: tuple[Tensor | None, ...], *options: int) -> Any:
    """`make(*tensors, *options)`, made once for tensors that many layers share: those of a local plan.

    Kept for as long as the last of `tensors` lives and none of them is written to; so the result may not hold that one.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return make(*tensors, *options)
    versions = tuple(None if t is None or t.is_inference() else t._version for t in tensors)
    known = _DERIVED.setdefault(tensors[-1], {})
    found = known.get((make, options))
    if found is None or found[1] != versions or any(a is not b for a, b in zip(found[0], tensors[:-1], strict=True)):
        found = known[make, options] = tensors[:-1], versions, make(*tensors, *options)
    return found[2]


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse queries, keys and values that do not fit together.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have shape [B, heads, length, D], got {tuple(tensor.shape)}.")
    B, H, _, D = q.shape
    kv_heads, S = k.shape[1], k.shape[2]
    if k.shape != (B, kv_heads, S, D):
        raise ValueError(f"k must have shape [B={B}, H_kv, S, D={D}] to match q, got {tuple(k.shape)}.")
    if kv_heads == 0 or H == 0 or H % kv_heads:
        raise ValueError(f"q must have a multiple of k's heads, got {H} query heads and {kv_heads} key heads.")
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}.")
    if not 16 <= D <= 256:
        raise ValueError(f"q, k and v must have a head dimension D from 16 to 256, got {D}.")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q must be float16, bfloat16 or float32, got {q.dtype}.")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}.")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}.")


def check_device(function: str, **tensors: Tensor) -> None:
    """Refuse what the kernels of a public function cannot run on.

    Raises:
        RuntimeError: a tensor is not on a GPU, the GPU is too old, or the interpreter would compute wrongly.
    """
    for name, tensor in tensors.items():
        if INTERPRETED:
            if tensor.dtype == torch.bfloat16:
                raise RuntimeError("Triton's interpreter computes bfloat16 wrongly: use float16 or float32 with it.")
        elif not tensor.is_cuda:
            raise RuntimeError(
                f"{function} needs CUDA tensors, got {name} on {tensor.device}. Use the torch path, or set "
                "TRITON_INTERPRET=1 before importing topo_kernels to run the kernels slowly on a CPU."
            )
        elif torch.version.cuda and torch.cuda.get_device_capability(tensor.device) < (8, 0):
            major, minor = torch.cuda.get_device_capability(tensor.device)
            raise RuntimeError(
                f"{function} needs compute capability 8.0 (Ampere) or newer, got {major}.{minor} "
                f"({torch.cuda.get_device_name(tensor.device)}). Use the torch path."
            )
