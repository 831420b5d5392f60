"""Which balls a query visits: the likeliest at its depth, of what its router says of the digits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: Largest number of visits of a query.
MAX_VISITS = 8


@torch.no_grad()
def likeliest_leaves(logits: Tensor, count: int) -> Tensor:
    """The likeliest leaves of the product of level distributions, by a beam over the levels.

    A prefix that is not among the `count` likeliest has as many before it, and so has each of its children: nothing
    that the beam drops could have come back. For the same reason the leaves of a smaller `count` come first.

    Args:
        logits: `[..., L, p]`, of digits; any float dtype. count: >= 1.

    Returns:
        int64 `[..., count]`, distinct leaves, likeliest first and equally likely ones by their number; -1 where there
        are fewer. The first is the leaf of the likeliest digits.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    levels, arity = logits.shape[-2:]
    child = torch.arange(arity, device=logits.device)[:, None]
    # what a leaf's logits lack to the likeliest's: exactly 0 for that one, so rounding makes no other its equal
    lack = logits.amax(-1, keepdim=True) - logits
    total = logits.new_zeros(*logits.shape[:-2], 1)
    leaves = total.long()
    for level in range(levels):
        # by child, then by the parents' order, which a stable sort keeps where sums are equal: the numbers' order,
        # or the finer order of the parents' own sums
        total = (total[..., None, :] + lack[..., level, :, None]).flatten(-2)
        leaves = (leaves[..., None, :] + child * arity**level).flatten(-2)
        best = total.argsort(dim=-1, stable=True)[..., :count]
        total, leaves = total.gather(-1, best), leaves.gather(-1, best)
    return F.pad(leaves, (0, count - leaves.shape[-1]), value=-1)


@torch.no_grad()
def likeliest_balls(logits: Tensor, depths: Sequence[int], visits: Sequence[int]) -> Tensor:
    """Each route's likeliest balls at its depth: the `likeliest_leaves` of the digits down to there.

    More visits or less depth never lose a ball: those of fewer visits come first, and the parents of the balls that
    are visited at a depth are among those visited one level higher.

    Args:
        logits: `[B, R, T, L, p]`, of digits; any float dtype.
        depths, visits: of each route, in `0..L + 1` and >= 1.

    Returns:
        int64 `[B, R, max(visits), T]`, distinct balls, -1 where there are fewer, and everywhere below the leaves.
    """
    batch, routes, length, levels, _ = logits.shape
    most = max(visits)
    balls = torch.full((batch, routes, length, most), -1, dtype=torch.int64, device=logits.device)
    for depth, count in sorted(set(zip(depths, visits, strict=True))):
        if depth > levels:
            continue
        same = [r for r, each in enumerate(zip(depths, visits, strict=True)) if each == (depth, count)]
        balls[:, same, :, :count] = likeliest_leaves(logits[:, same, :, :depth], count)
    return balls.transpose(2, 3)
