"""Checks of arguments that public functions share."""

import torch
from torch import Tensor

from .launch import INTERPRETED
from .types import Plan, Scoring

MAX_VISITS = 8  # balls that a query may visit


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


def check_plan(q: Tensor, k: Tensor, plan: Plan) -> None:
    """Refuse a plan that does not fit checked queries and keys. Its values are trusted.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    B, H, T, _ = q.shape
    S = k.shape[2]
    routes = plan.query_order.shape[1] if plan.query_order.ndim in (3, 4) else 0
    visits = plan.query_order.shape[2:-1]
    if routes == 0 or H % routes or 0 in visits:
        raise ValueError(
            f"query_order must have shape [B={B}, R, m, T={T}] with R a divisor of q's {H} heads and m >= 1, "
            f"got {tuple(plan.query_order.shape)}."
        )
    shapes: dict[str, tuple[int, ...]] = {}
    shapes |= dict.fromkeys(("query_order", "range_start", "range_end"), (B, routes, *visits, T))
    shapes |= {"key_order": (B, routes, S), "local_order": (B, S)}
    shapes |= dict.fromkeys(("document_start", "local_start", "local_end"), (B, T))
    if plan.local_order is None:
        del shapes["local_order"]
    for name, shape in shapes.items():
        tensor = getattr(plan, name)
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}.")
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, got {tensor.dtype}.")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}.")
    check_sinks(plan.num_sink_tokens)


def check_sinks(num_sink_tokens: int) -> None:
    """Refuse a negative number of sinks with a ValueError."""
    if num_sink_tokens < 0:
        raise ValueError(f"num_sink_tokens must be >= 0, got {num_sink_tokens}.")


def check_visits(visits: Tensor | None, q: Tensor) -> None:
    """Refuse numbers of visits that are no int32 `[H]` beside q `[B, H, ...]` with a ValueError. Values are trusted."""
    if visits is not None and (visits.shape != q.shape[1:2] or visits.dtype != torch.int32):
        raise ValueError(
            f"visits must be None or torch.int32 of shape [{q.shape[1]}], got {visits.dtype} {list(visits.shape)}."
        )
    if visits is not None and visits.device != q.device:
        raise ValueError(f"visits must be on q's device {q.device}, got {visits.device}.")


def check_scoring(scoring: Scoring) -> None:
    """Refuse a scale or softcap that is not positive with a ValueError."""
    if not scoring.scale > 0:
        raise ValueError(f"scale must be > 0, got {scoring.scale}.")
    if scoring.softcap is not None and not scoring.softcap > 0:
        raise ValueError(f"softcap must be None or > 0, got {scoring.softcap}.")


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
