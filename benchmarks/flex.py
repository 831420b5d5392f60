"""FlexAttention: on a block-level mask, and for window and sinks alone beside our local pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .cases import Case, Inputs, Layer, label, prefill_inputs
from .harness import Table, peak_mb, time_call
from .oracles import causal_count, sample_rows, sampled_error, visible_count
from .prefill import attention_megabytes, dense_prefill
from .topology import passes, plan_for

FLEX_BLOCK = 128


def block_mask_of(query_ball: Tensor, key_ball: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks that need a mask and blocks seen whole, bool `[R, blocks, blocks]`, of 128-token blocks with a ball each.

    Args: query_ball, key_ball: `[R, blocks]`. Needs window and sinks of at most FLEX_BLOCK.
    """
    index = torch.arange(query_ball.shape[1], device=query_ball.device)
    gap = index[:, None] - index
    same = query_ball[:, :, None] == key_ball[:, None, :]
    full = same & (gap > 0)
    partial = ~full & (gap >= 0) & ((gap <= 1) | (index == 0))
    return partial, full


def flex_call(inputs: Inputs, query_ball: Tensor, key_ball: Tensor) -> tuple[Callable[[], Tensor], float]:
    """FlexAttention where the 128 tokens of a block share a ball `[R, blocks]`, and the share of causal blocks visited.

    Token-level balls in their original order would leave hardly a block empty, so this is the mask that FlexAttention
    can use: the paper's.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    partial, full = block_mask_of(query_ball, key_ball)
    layer, length = inputs.case.layer, inputs.case.length
    per_route = layer.heads // query_ball.shape[0] if query_ball.shape[0] > 1 else layer.heads

    def visible(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        r = h // per_route
        same = query_ball[r, q_idx // FLEX_BLOCK] == key_ball[r, kv_idx // FLEX_BLOCK]
        return (q_idx >= kv_idx) & (same | (q_idx - kv_idx < layer.window) | (kv_idx < layer.sinks))

    def ordered(mask: Tensor) -> tuple[Tensor, Tensor]:
        count = mask.sum(-1, dtype=torch.int32)
        return count[None], mask.int().argsort(dim=-1, descending=True, stable=True).int()[None]

    mask = BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(full), BLOCK_SIZE=FLEX_BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    causal = partial.shape[0] * partial.shape[1] * (partial.shape[1] + 1) / 2
    visited = (partial | full).sum().item() / causal
    return lambda: compiled(inputs.q, inputs.k, inputs.v, block_mask=mask, enable_gqa=True), visited


@torch.no_grad()
def flex(table: Table, length: int, balls: int, layer: Layer) -> None:
    """FlexAttention on a block-level mask of as many balls; density is the share of blocks visited."""
    config = f"prefill {label(length)}, {balls} balls"
    try:
        inputs = prefill_inputs(Case(config, length, balls, layer.heads, layer=layer))
        against = dense_prefill(table, inputs)
        query_ball, key_ball = torch.randint(0, balls, (2, layer.heads, length // FLEX_BLOCK), device=layer.device)
        call, visited = flex_call(inputs, query_ball, key_ball)
        query_ball, key_ball = (x.repeat_interleave(FLEX_BLOCK, -1)[None] for x in (query_ball, key_ball))
        rows = sample_rows(length).to(layer.device)
        error = sampled_error(call(), inputs.q, inputs.k, inputs.v, query_ball, key_ball, rows, layer)
        values = {
            "length": length,
            "batch": 1,
            "routes": layer.heads,
            "balls": balls,
            "density": visited,
            "error": error,
            "peak_mb": peak_mb(call),
            "note": "another mask: 128 tokens share a ball; no router, no plan",
        }
        table.add("flex", config, "FlexAttention, 128-token blocks", time_call(call), values | against)
    except Exception as problem:
        table.failed("flex", config, "FlexAttention, 128-token blocks", problem)
    torch.compiler.reset()
    torch.cuda.empty_cache()


@torch.no_grad()
def window_only(table: Table, length: int, flex: bool, layer: Layer) -> None:
    """Window and sinks without a tree: our local pass, and FlexAttention."""
    config = f"window {label(length)}"
    try:
        inputs = prefill_inputs(Case(config, length, 64, routes=1, layer=layer))
        plan = plan_for(inputs)
        unseen = torch.full_like(inputs.query_address, 1), torch.zeros_like(inputs.key_address)
        visible = visible_count(*unseen, layer.window, layer.sinks).item()
        shape = {
            "length": length,
            "batch": 1,
            "density": visible / causal_count(1, length),
            "gflop": visible * layer.heads * 4 * layer.head_dim / 1e9,
            "megabytes": attention_megabytes(inputs),
        }
        check = (inputs.q, inputs.k, inputs.v, *unseen, sample_rows(length).to(layer.device), layer)
        call = passes(inputs, plan)["local_pass"]
        error = sampled_error(call()[0].transpose(1, 2), *check)
        table.add("window", config, "our local pass", time_call(call), shape | {"error": error})
        if flex:
            blocks = -(-length // FLEX_BLOCK)
            call, _ = flex_call(inputs, *(torch.full((1, blocks), i, device=layer.device) for i in (0, 1)))
            error = sampled_error(call(), *check)
            table.add("window", config, "FlexAttention", time_call(call), shape | {"error": error})
    except Exception as problem:
        table.failed("window", config, "all", problem)
    torch.compiler.reset()
    torch.cuda.empty_cache()
