"""Which tensors the Triton kernels can serve; everything else takes the torch path, with the same result."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..core.visits import MAX_VISITS

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CAPABILITY = (8, 0)

Operation = Literal["route", "visits", "plan", "attend", "decode", "bridge", "distil"]


class Limits(NamedTuple):
    """What an operation's kernels have room for; None is no limit."""

    head_dim: tuple[int, int] | None = None  # of queries, keys and values, which have one width
    leaves: int | None = None  # `arity**depth`, at the deepest that is asked for
    router_dim: int | None = None
    arity: int | None = None
    visits: int = MAX_VISITS
    digit_logits: int | None = None  # of a router on heads, see `digit_logits`
    channels: int | None = None  # of a head that a router reads


#: The one table of what kernels can do; `misfits` says it in words.
LIMITS: dict[Operation, Limits] = {
    "route": Limits(router_dim=128, visits=1, digit_logits=256, channels=256),
    "visits": Limits(arity=256),
    "plan": Limits(),
    "attend": Limits(head_dim=(16, 256)),
    "decode": Limits(head_dim=(16, 256)),
    "bridge": Limits(head_dim=(16, 256), leaves=256),
    "distil": Limits(head_dim=(16, 256), leaves=256),
}


def digit_logits(depth: int, arity: int) -> int:
    """Logits of a token and head in a tile: depth and arity, each brought to a power of two, multiplied."""
    return 2 ** ((depth - 1).bit_length() + (arity - 1).bit_length())


def misfits(
    operation: Operation,
    *,
    widths: Sequence[int] = (),
    leaves: int = 1,
    router_dim: int = 1,
    arity: int = 2,
    visits: int = 1,
    digit_logits: int = 1,
    channels: int = 1,
    turns_pairs: bool = True,
    homotopy: float = 1.0,
) -> list[str]:
    """Why an operation of these sizes would not run on kernels, whatever the device; empty if it would.

    Args:
        widths: head dimensions of queries, keys and values. leaves: `arity**depth`. router_dim: of the router.
        arity: of the tree. visits: of a query. digit_logits, channels: of a router on heads and of what it reads.
        turns_pairs: what it turns back are pairs of channels that the kernel knows, or nothing. homotopy: of a bridge.
    """
    limits, found = LIMITS[operation], []
    if limits.head_dim is not None:
        low, high = limits.head_dim
        if not all(low <= width <= high for width in widths):
            found.append(f"the head dimension must be {low} to {high}, got {', '.join(map(str, widths))}")
        elif len(set(widths)) > 1:
            found.append(f"queries, keys and values must have one head dimension, got {', '.join(map(str, widths))}")
    if limits.leaves is not None and leaves > limits.leaves:
        found.append(f"arity ** depth must be at most {limits.leaves}, got {leaves}")
    if limits.router_dim is not None and router_dim > limits.router_dim:
        found.append(f"router_dim must be at most {limits.router_dim}, got {router_dim}")
    if limits.arity is not None and arity > limits.arity:
        found.append(f"arity must be at most {limits.arity}, got {arity}")
    if visits > limits.visits:
        most = "one ball" if limits.visits == 1 else f"at most {limits.visits} balls"
        found.append(f"queries must visit {most}, got {visits}")
    if limits.digit_logits is not None and digit_logits > limits.digit_logits:
        found.append(
            "depth and arity, brought to powers of two, must multiply to at most "
            f"{limits.digit_logits} with router_input='heads', got {digit_logits}"
        )
    if limits.channels is not None and channels > limits.channels:
        found.append(f"heads must have at most {limits.channels} channels with router_input='heads', got {channels}")
    if limits.channels is not None and not turns_pairs:
        found.append(
            "router_input must be 'hidden_states' where the rotary embedding turns neither halves of the channels nor "
            "neighbours with each other, got 'heads'"
        )
    if operation == "bridge" and homotopy != 1:
        found.append(f"homotopy must be 1, got {homotopy:g}")
    return found


def device_misfits(device: torch.device, *dtypes: torch.dtype) -> list[str]:
    """Why no kernel runs on a device, or for a dtype; empty if they do."""
    if device.type != "cuda":
        return [f"the device must be a CUDA GPU, got {device.type}"]
    found = []
    if not _new_enough(device):
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found.append(f"compute capability must be {'.'.join(map(str, _CAPABILITY))} or more, got {capability}")
    if importlib.util.find_spec("triton") is None:
        found.append("triton must be installed")
    for dtype in dtypes:
        if dtype.is_floating_point and dtype not in _DTYPES:
            found.append(f"the dtype must be float16, bfloat16 or float32, got {str(dtype).removeprefix('torch.')}")
    return found


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
    return torch.cuda.get_device_capability(device) >= _CAPABILITY


_forced: dict[Operation, bool] = {}


@contextlib.contextmanager
def forced(served: bool, *operations: Operation) -> Iterator[None]:
    """For tests: operations, all unless some are named, run on kernels that have room for them whatever the device, in
    Triton's interpreter; or they run in torch.
    """
    before = dict(_forced)
    _forced.update(dict.fromkeys(operations or LIMITS, served))
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def device_serves(operation: Operation, *tensors: Tensor) -> bool:
    """Whether `device_misfits` finds nothing of all tensors; quickly, and it warns of a GPU without Triton."""
    if operation in _forced:
        return _forced[operation]
    if not all(t.is_cuda and (t.dtype in _DTYPES or not t.is_floating_point()) for t in tensors):
        return False
    return _new_enough(tensors[0].device) and _triton_available()


def kernels_serve(operation: Operation, *tensors: Tensor, **sizes: Any) -> bool:
    """Whether kernels run an operation on these tensors; sizes: as `misfits`."""
    return device_serves(operation, *tensors) and not misfits(operation, **sizes)


@functools.cache
def warn_of_slow_training(reasons: str) -> None:
    """Say, once, why a GPU trains on a path whose time is `O(N^2)` in the length."""
    warnings.warn(
        f"this adapter trains without the kernels of its bridge, in time O(N^2) in the length: {reasons}. "
        "topo_adapter.why_not(model) lists the reasons of all layers.",
        stacklevel=2,
    )
