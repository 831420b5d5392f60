"""What every module that asks a device must not do: wait for it, or ask for values while a graph is recorded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sent(values: Sequence[int], device: torch.device) -> Tensor:
    """int32 `values` on a device, without waiting for what it is busy with as `torch.tensor(..., device=...)` does."""
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)


def graph_is_recorded() -> bool:
    """Whether torch.compile or a CUDA graph records what runs, so that the host must not ask for values."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
