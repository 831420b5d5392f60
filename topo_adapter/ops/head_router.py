"""The router on heads: each head's own queries and keys to digits (docs/method.md, section 3)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.visibility import per_head
from ..errors import TopologyConfigError, UnsupportedModelError
from .backend import digit_logits, kernels_serve
from .router import Router

if TYPE_CHECKING:
    from collections.abc import Iterator

    from topo_kernels import PackedHeadRouter
    from topo_kernels.heads import Pairs

#: Principal directions of a head's keys that the digits of a fresh router are spread over.
_PRINCIPAL = 32
#: Rounds of k-means, which has converged to what a start needs long before.
_ROUNDS = 10
#: What a unit of a weight, and of a bias, is worth. Optimizers like Adam move all parameters by one size a step: so the
#: learning rates that suit routers on hidden states suit these, whose balls have to be able to change their size by
#: several nats within a few dozen steps (docs/notebook/2026-11-30-routers-on-heads.md).
_UNIT, _BIAS_UNIT = 3.0, 90.0


class HeadLinear(nn.Module):
    """A linear map for each head, of vectors that are brought to mean 0 and mean square 1 first; float32 inside.

    Keys of some models have entries in the hundreds that hardly differ between tokens: taken off first, they do not
    drown the rest in rounding, and matrices have entries of one size in all models.

    Args:
        heads, in_features, out_features: sizes; the weight is `[heads, out_features, in_features]`.
    """

    center: Tensor
    gain: Tensor

    def __init__(self, heads: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(heads, out_features))
        # buffers: measured, never trained
        self.register_buffer("center", torch.zeros(heads, in_features))
        self.register_buffer("gain", torch.ones(heads))
        nn.init.normal_(self.weight, std=1 / math.sqrt(in_features))

    def forward(self, x: Tensor) -> Tensor:
        """float32 `[B, heads, T, out_features]` of `[B, heads, T, in_features]`: `3 W (x - center) gain + 90 bias`."""
        with torch.autocast(x.device.type, enabled=False):
            x = (x.float() - self.center.float()[:, None]) * (_UNIT * self.gain.float())[:, None, None]
            return x @ self.weight.float().mT + (_BIAS_UNIT * self.bias.float())[:, None]

    def folded(self) -> tuple[Tensor, Tensor, Tensor]:
        """float32 matrix, offset and center: `forward` is `matrix (x - center) + offset`."""
        matrix = self.weight.float() * (_UNIT * self.gain.float())[:, None, None]
        return matrix, _BIAS_UNIT * self.bias.float(), self.center.float()

    @torch.no_grad()
    def measure(self, x: Tensor) -> None:
        """Set what is taken off and divided by to the mean and deviation of tokens `[heads, N, in_features]`."""
        self.center.copy_(x.mean(1))
        self.gain.copy_((x - self.center[:, None]).square().mean((1, 2)).clamp(min=1e-12).rsqrt())

    @torch.no_grad()
    def become(self, head: int, matrix: Tensor, offset: Tensor) -> None:
        """Make a head's map `matrix (x - center) + offset`; matrix: `[out_features, in_features]`."""
        self.weight[head] = matrix / (_UNIT * self.gain[head])
        self.bias[head] = offset / _BIAS_UNIT


class HeadRouter(Router):
    """Digit logits that are linear in a head's own query, and in its KV head's key, before the rotary embedding.

    A query and the keys that attention gives it lie near each other already; a router that reads them starts from
    there, see `initialise`, and is as small as the heads are.

    Each level has `arity - 1` logits; child 0 is the reference with logit 0.

    Args:
        num_heads: query heads. num_kv_heads: KV heads, a divisor. head_dim: of queries and keys.
        arity, depth: the tree.
        route_per: one route per query head, or one for the query heads of a KV head, from all of their queries. Keys
            have one address per KV head either way.
    """

    reads_heads = True

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        arity: int,
        depth: int,
        route_per: Literal["query_head", "kv_head"] = "query_head",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads if route_per == "query_head" else num_kv_heads
        self.num_kv_heads, self.arity, self.depth = num_kv_heads, arity, depth
        logits = depth * (arity - 1)
        self.query = HeadLinear(self.num_heads, head_dim * num_heads // self.num_heads, logits)
        self.key = HeadLinear(num_kv_heads, head_dim, logits)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Digit logits of both roles.

        Args:
            query: `[B, H, T, D]`; key: `[B, H_kv, T, D]`, any float dtype.

        Returns:
            float32 `[B, R, T, L, p]` of the `R` routes' queries, and `[B, H_kv, T, L, p]` of the keys.

        Raises:
            UnsupportedModelError: other numbers of heads or another head dimension than the router was made for.
        """
        grouped = self._grouped(query)
        for name, given, linear in (("query", grouped, self.query), ("key", key, self.key)):
            heads, _, width = linear.weight.shape
            if linear.weight.ndim == 3 and (given.shape[1], given.shape[3]) != (heads, width):
                raise UnsupportedModelError(
                    f"{name} must have {heads} heads of {width} channels as the router was made for, got "
                    f"{given.shape[1]} of {given.shape[3]}; use router_input='hidden_states' for this model"
                )
        return self._logits(self.query(grouped)), self._logits(self.key(key))

    def _grouped(self, query: Tensor) -> Tensor:
        """`[B, R, T, ...]`: the queries that a route is made of, side by side."""
        if query.shape[1] == self.num_heads:
            return query
        return query.unflatten(1, (self.num_heads, -1)).transpose(2, 3).flatten(3)

    def _logits(self, free: Tensor) -> Tensor:
        return F.pad(free.unflatten(-1, (self.depth, self.arity - 1)), (1, 0))  # child 0 is the reference

    @torch.no_grad()
    def turned(
        self,
        query: Tensor,
        key: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        *,
        first: int = 0,
        pairs: Pairs = "halves",
        keep_logits: bool = False,
        merged: bool = False,
    ) -> tuple[Tensor | None, Tensor, Tensor] | None:
        """The hard choice of queries and keys that the rotary embedding has turned, in one pass on a GPU.

        Args:
            query: `[B, H, T, D]`; key: `[B, H_kv, T, D]`, of the same tokens.
            cos, sin: `[B or 1, T, n]`, of the `n` channels from `first` on; None where nothing was turned.
            pairs: which of them were turned with each other, as `topo_kernels.route_heads` names it.
            keep_logits: whether the queries' logits are wanted. merged: as `addresses`.

        Returns:
            the queries' logits, float32 `[B, R, T, L, p]`, or None; their addresses and the keys', int32 `[B, R, T]`.
            None where no kernel runs it.
        """
        batch, heads, length, width = query.shape
        linear = self.query.weight
        if linear.ndim != 3 or key.shape != (batch, self.num_kv_heads, length, width):  # ZeRO-3 may hold none of it
            return None
        if linear.shape[0] * linear.shape[2] != heads * width or linear.shape[0] > heads:
            return None
        for angle in (cos, sin):
            if angle is not None and (angle.ndim != 3 or angle.shape[0] not in (1, batch) or angle.shape[1] != length):
                return None
        angles = [angle for angle in (cos, sin) if angle is not None]
        sizes = {"channels": width, "digit_logits": digit_logits(self.depth, self.arity)}
        if not kernels_serve("route", query, key, *angles, self.query.center, **sizes):
            return None
        from topo_kernels import route_heads

        packed = self.packed(self._laid_out, merged)
        logits, address, key_address = route_heads(
            query, key, cos, sin, packed, first=first, pairs=pairs, keep_logits=keep_logits
        )
        return logits, address, self.of_routes(key_address)

    def _laid_out(self) -> PackedHeadRouter:
        from topo_kernels import pack_head_router

        return pack_head_router(*self.query.folded(), *self.key.folded(), depth=self.depth, arity=self.arity)

    def of_routes(self, keys: Tensor) -> Tensor:
        """The routes' of what KV heads have, `[B, R, ...]` of `[B, H_kv, ...]`."""
        return per_head(keys, self.num_heads)

    @torch.no_grad()
    def initialise(self, query: Tensor, key: Tensor, *, scale: float) -> None:  # type: ignore[override]
        """Start from the keys: tokens whose keys are alike get digits that are alike.

        Product quantisation (Jegou et al., 2011) of each KV head's keys: their principal directions are rotated and
        dealt out to the levels, and the keys are clustered (k-means) in each level's directions; a child is a cluster.
        A key's logits are those of its clusters as Gaussians of equal width, a query's are what it would score the
        clusters' means with, plus the logarithm of their shares.

        Args:
            query: `[B, H, T, D]`; key: `[B, H_kv, T, D]`, with `B * T >= 2 * arity`. scale: of attention's scores.

        Raises:
            TopologyConfigError: there are fewer tokens.
        """
        q, k = (x.transpose(0, 1).flatten(1, 2).float() for x in (self._grouped(query), key))
        if k.shape[1] < 2 * self.arity:
            raise TopologyConfigError(
                f"input_ids must hold {2 * self.arity} tokens or more to spread over the tree, got {k.shape[1]}"
            )
        self.query.measure(q)
        self.key.measure(k)
        per_route = self.num_heads // self.num_kv_heads
        parts = q.shape[-1] // k.shape[-1]  # queries that a route is made of
        # on the host: the same draws on every device
        generator = torch.Generator().manual_seed(0)
        for head, keys in enumerate((k - self.key.center[:, None]).unbind()):
            means, widths, shares = (torch.stack(part) for part in zip(*self._quantised(keys, generator), strict=True))
            as_key = means / widths[:, None, None]
            squares = -0.5 * (means * as_key).sum(-1, keepdim=True)
            self.key.become(head, self._free(as_key), self._free(squares)[:, 0])
            as_query = (self._free(means) * scale / parts).repeat(1, parts)
            popularity = self._free(shares.log()[..., None])[:, 0]
            for route in range(head * per_route, (head + 1) * per_route):
                self.query.become(route, as_query, as_query @ self.query.center[route] + popularity)

    def _quantised(self, keys: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each level: the clusters' means `[p, D]`, their keys' mean square distance to them in one direction, and
        their shares `[p]`; keys: `[N, D]`, of mean 0."""
        tokens, width = keys.shape
        used = min(_PRINCIPAL, width, tokens)
        directions = torch.linalg.svd(keys.T @ keys)[0][:, :used].T  # of a Gram matrix: as many rows as channels
        per_level = max(1, used // self.depth)
        rotated: list[Tensor] = []
        while len(rotated) < self.depth:  # more levels than directions: in other mixtures again
            mixed = torch.linalg.qr(torch.randn(used, used, generator=generator))[0].to(keys.device) @ directions
            rotated += mixed[: used // per_level * per_level].split(per_level)
        for mine in rotated[: self.depth]:
            seen = keys @ mine.T
            means = self._apart(seen, self.arity, generator)
            for _ in range(_ROUNDS):
                sums, counts, _ = self._clusters(seen, means)
                means = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), means)
            _, counts, square = self._clusters(seen, means)
            yield means @ mine, square.clamp(min=1e-6), (counts + 0.5) / (tokens + 0.5 * self.arity)

    @staticmethod
    def _apart(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """`count` of the tokens `[N, d]` to begin k-means with, drawn by the square of their distance to those before
        (k-means++, Arthur and Vassilvitskii, 2007)."""
        chosen = [tokens[int(torch.randint(len(tokens), (), generator=generator))]]
        square = (tokens - chosen[0]).square().sum(-1)
        while len(chosen) < count:
            drawn = torch.multinomial(square.cpu().double() + 1e-30, 1, generator=generator)
            chosen.append(tokens[int(drawn)])
            square = torch.minimum(square, (tokens - chosen[-1]).square().sum(-1))
        return torch.stack(chosen)

    @staticmethod
    def _clusters(tokens: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the nearest mean's tokens: sums `[p, d]`, numbers `[p]`; and the mean square distance, of a channel."""
        nearest = torch.cdist(tokens, means).argmin(-1)
        counts = torch.bincount(nearest, minlength=len(means)).float()
        sums = torch.zeros_like(means).index_add_(0, nearest, tokens)
        return sums, counts, (tokens - means[nearest]).square().mean()

    @staticmethod
    def _free(of_children: Tensor) -> Tensor:
        """`[L * (p - 1), ...]` of `[L, p, ...]`: what there is relative to child 0."""
        return (of_children[:, 1:] - of_children[:, :1]).flatten(0, 1)
