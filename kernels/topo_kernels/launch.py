"""What launches of the kernels have in common."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .types import LocalPlan, Scoring

INTERPRETED = triton.knobs.runtime.interpret  # read before the kernels are decorated


class Tile(NamedTuple):
    """Tile of one program (rows x keys) and how it is compiled."""

    m: int
    n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have; what every GPU from compute capability 8.0 on has, if interpreted."""
    if INTERPRETED:
        return 99 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


@functools.cache
def overlap(device: torch.device) -> dict[str, Any]:
    """Launch options of a short kernel that may start while the kernel before it ends (programmatic dependent launch).

    It calls `wait_for_previous` before it reads or writes what others do. A kernel that calls `let_next_start`, not
    before that, lets the next one start while it still runs.
    """
    overlaps = not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"OVERLAP": True, "launch_pdl": True} if overlaps else {"OVERLAP": False}


def stride_arguments(**tensors: tuple[Tensor, str]) -> dict[str, int]:
    """`stride_<name><axis>` for each tensor and the letters of its leading axes."""
    return {
        f"stride_{name}{axis}": tensor.stride(i)
        for name, (tensor, axes) in tensors.items()
        for i, axis in enumerate(axes)
    }


def score_arguments(head_dim: int, scoring: Scoring) -> dict[str, int | float]:
    """Head dimension and scores in base 2: `score * score_scale`, or `score_cap * tanh(score * score_scale)`."""
    log2e = 1 / math.log(2)
    scale, softcap = scoring.scale, scoring.softcap
    return {
        "score_scale": scale * log2e if softcap is None else scale / softcap,
        "score_cap": 0.0 if softcap is None else softcap * log2e,
        "HAS_CAP": softcap is not None,
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
    }


def tile_arguments(tile: Tile) -> dict[str, int | None]:
    """What a kernel of one tile per program is launched with."""
    return {
        "BLOCK_M": tile.m,
        "BLOCK_N": tile.n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "maxnreg": tile.max_registers,
    }


def attention_arguments(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, tile: Tile) -> dict[str, Any]:
    """What the hard attention's kernels, forward and backward, are launched with."""
    return {
        **stride_arguments(q=(q, "bht"), k=(k, "bhs"), v=(v, "bhs")),
        **score_arguments(q.shape[3], scoring),
        **tile_arguments(tile),
        "T": q.shape[2],
        "S": k.shape[2],
        "H": q.shape[1],
        "KV_GROUP": q.shape[1] // k.shape[1],
    }


_DERIVED = WeakTensorKeyDictionary()  # of a local_end: what was derived from its plan, and the result


def derived(make: Callable[..., Any], plan: LocalPlan, *options: int) -> Any:
    """`make(plan, *options)`, made once for what many layers share: the tensors of a local plan.

    Kept for as long as `local_end` lives and none of the tensors is written to; so the result may not hold that one.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return make(plan, *options)
    tensors = plan.local_order, plan.document_start, plan.local_start, plan.local_end
    key = make, plan.num_sink_tokens, *options
    versions = tuple(None if t is None or t.is_inference() else t._version for t in tensors)
    known = _DERIVED.setdefault(tensors[-1], {})
    found = known.get(key)
    if found is None or found[1] != versions or any(a is not b for a, b in zip(found[0], tensors[:-1], strict=True)):
        found = known[key] = tensors[:-1], versions, make(plan, *options)
    return found[2]
