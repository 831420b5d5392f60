"""Which tensors the Triton kernels can serve; everything else takes the torch path, with the same result."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _triton_available() -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    warnings.warn(
        "triton is not installed: the topology runs exactly but slowly on this GPU. pip install triton",
        stacklevel=2,
    )
    return False


@functools.cache
def _new_enough(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def kernels_serve(*tensors: Tensor) -> bool:
    """Whether all tensors are on a GPU that runs the kernels; integers and half to single precision floats."""
    if not all(t.is_cuda and (t.dtype in _DTYPES or not t.is_floating_point()) for t in tensors):
        return False
    return _new_enough(tensors[0].device) and _triton_available()


def sent(values: Sequence[int], device: torch.device) -> Tensor:
    """int32 `values` on a device, without waiting for what it is busy with as `torch.tensor(..., device=...)` does."""
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)


def graph_is_recorded() -> bool:
    """Whether torch.compile or a CUDA graph records what runs, so that the host must not ask for values."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
