"""The router: hidden states to digits (docs/method.md, section 3). fp32 inside, whatever the model's dtype."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.device import graph_is_recorded
from ..core.tree import digits_to_address
from ..core.visibility import per_head
from ..errors import TopologyConfigError
from .backend import kernels_serve

if TYPE_CHECKING:
    from collections.abc import Callable

    from topo_kernels import PackedRouter

PackedT = TypeVar("PackedT")


class RoleDigits(NamedTuple):
    """Digits of one role (query or key).

    probs: float32 `[B, H, T, L, p]`, level probabilities (relaxed in training, softmax at evaluation).
    digits: int64 `[B, H, T, L]`, the hard choice: argmax, ties towards the lower digit.
    logits: float32 `[B, H, T, L, p]`, what both are of, with the noise that was drawn; no gradient. None where nobody
        chooses other balls than the likeliest by them.
    """

    probs: Tensor
    digits: Tensor
    logits: Tensor | None = None

    def address(self, arity: int) -> Tensor:
        """int64 `[B, H, T]`."""
        return digits_to_address(self.digits, arity)


class Routes(NamedTuple):
    """Query and key digits of one attention layer; the two are the same object if tied."""

    query: RoleDigits
    key: RoleDigits

    def per_head(self, heads: int) -> Routes:
        """With the routes of KV heads repeated for the `heads` query heads that share them."""
        if self.query.probs.shape[1] == heads:
            return self

        def repeated(role: RoleDigits) -> RoleDigits:
            logits = None if role.logits is None else per_head(role.logits, heads)
            return RoleDigits(per_head(role.probs, heads), per_head(role.digits, heads), logits)

        query = repeated(self.query)
        return Routes(query, query if self.key is self.query else repeated(self.key))


class Float32Linear(nn.Module):
    """A linear layer that computes in float32, whatever its weights were rounded to and autocast says.

    It is no `nn.Linear`: what looks for those in a model, to adapt or to quantize them, must not find a router's.

    Args:
        in_features, out_features, bias: as of `nn.Linear`; the weights are float32.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        linear = nn.Linear(in_features, out_features, bias, dtype=torch.float32)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class Router(nn.Module):
    """What gives tokens their digits. The subclasses say what of the tokens they see, and make logits of it.

    Attributes:
        num_heads: routes, `R`. arity, depth: the tree.
        reads_heads: whether it sees queries `[B, H, T, D]` and keys `[B, H_kv, T, D]`, or hidden states.
    """

    num_heads: int
    arity: int
    depth: int
    reads_heads = False
    _packing: tuple[Any, Any] | None = None  # what the weights were when they were laid out, and the layout

    def forward(self, *seen: Tensor) -> tuple[Tensor, Tensor]:
        """Digit logits of queries and keys, float32 `[B, R, T, L, p]`; one tensor if tied. Keys may have fewer routes:
        those of `of_routes`."""
        raise NotImplementedError

    def of_routes(self, keys: Tensor) -> Tensor:
        """The routes' of what keys have, `[B, R, ...]`."""
        return keys

    def initialise(self, *seen: Tensor, scale: float) -> None:
        """Spread these tokens over the tree.

        Args:
            scale: of the attention's scores.

        Raises:
            TopologyConfigError: there are too few tokens, or they cannot be spread.
        """
        raise NotImplementedError

    @torch.no_grad()
    def round_to(self, dtype: torch.dtype) -> None:
        """Round the parameters, in place; they are computed with in float32 whatever they are.

        Args:
            dtype: a floating type. With `torch.float8_e4m3fn` it is the matrices that are rounded to it: biases, and a
                matrix with an entry beyond its range of 448, become bfloat16.
        """
        for name, parameter in self.named_parameters():
            narrow, matrix = dtype.itemsize == 1, name.endswith("weight")
            fits = not narrow or (matrix and bool(parameter.abs().max() <= torch.finfo(dtype).max))
            parameter.data = parameter.data.to(dtype if fits else torch.bfloat16)

    @torch.no_grad()
    def addresses(self, *seen: Tensor, merged: bool = False) -> tuple[Tensor, Tensor]:
        """The hard choice alone, without probabilities.

        Args:
            merged: the weights are those of the last `forget_packing`, or have changed in a way that autograd counts.

        Returns:
            query and key addresses, int32 `[B, R, T]`; the same tensor if tied.
        """
        query, key = self(*seen)
        if query.shape != key.shape:
            query, key = (digits_to_address(logits.argmax(-1), self.arity).int() for logits in (query, key))
            return query, self.of_routes(key)
        # both roles at once: for a single token, as in decoding, the number of operations is the cost
        logits = query[None] if key is query else torch.stack([query, key])
        address = digits_to_address(logits.argmax(-1), self.arity).int()
        return address[0], address[-1]

    @torch.no_grad()
    def logits(self, *seen: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the queries' digits, float32 `[B, R, T, L, p]`, and the keys' addresses, int32 `[B, R, T]`."""
        query, key = self(*seen)
        return query, self.of_routes(digits_to_address(key.argmax(-1), self.arity).int())

    def route(self, *seen: Tensor, temperature: float = 1.0, sample: bool = False, keep_logits: bool = False) -> Routes:
        """Digits and level probabilities for both roles.

        Args:
            temperature: > 0; softmax temperature of the probabilities.
            sample: draw Gumbel noise (factorised Gumbel-Softmax, one draw per level).
            keep_logits: of the queries, as large as their probabilities.
        """
        query_logits, key_logits = self(*seen)  # a module call: ZeRO-3 gathers weights there
        query = relax(query_logits, temperature, sample, keep_logits)
        if key_logits is query_logits:
            return Routes(query, query)
        key = relax(key_logits, temperature, sample)
        return Routes(query, RoleDigits(self.of_routes(key.probs), self.of_routes(key.digits)))

    def forget_packing(self) -> None:
        """Lay the weights out anew for the kernels when they are next needed."""
        self._packing = None

    def packed(self, make: Callable[[], PackedT], merged: bool, *options: Any) -> PackedT:
        """The weights as the kernels read them, laid out anew when they have changed.

        Args:
            make: lays them out. merged: as `addresses`. options: what the layout depends on beside the weights.
        """
        recorded = graph_is_recorded()
        # fused optimizers change weights without counting it in their version; a graph keeps what it recorded
        if not merged and not recorded:
            self._packing = None
        if self._packing is not None and recorded and self._packing[0][0] == options:
            return self._packing[1]
        tensors = [*self.parameters(), *self.buffers()]
        version = options, *((t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors)
        if self._packing is None or self._packing[0] != version:
            self._packing = version, make()
        return self._packing[1]


class TopologyRouter(Router):
    """`h = GELU(W_down x)`, then one projection per role to the digit logits of every head and level.

    Each level has `arity - 1` logits; child 0 is the reference with logit 0. That is the softmax over
    `arity` children without its redundant degree of freedom: one logit per level for `arity = 2`.

    Args:
        hidden_size: width of the hidden states that enter the attention module.
        num_heads: number of routes (query heads, or KV heads).
        arity, depth: the tree. router_dim: width of `h`; None = `hidden_size`.
        tie_query_key: one projection serves both roles.
        init_weights: 'random', or 'collapse': projection 0 and bias -10 for every child but child 0, the
            paper's +5 / -5 written with child 0 as reference.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        arity: int,
        depth: int,
        router_dim: int | None = 32,
        tie_query_key: bool = False,
        init_weights: Literal["random", "collapse"] = "random",
    ) -> None:
        super().__init__()
        self.num_heads, self.arity, self.depth = num_heads, arity, depth
        width = hidden_size if router_dim is None else router_dim
        logits = num_heads * depth * (arity - 1)
        self.router_dim = width
        self.down = Float32Linear(hidden_size, width, bias=False)
        self.query = Float32Linear(width, logits)
        self.key = None if tie_query_key else Float32Linear(width, logits)
        nn.init.normal_(self.down.weight, std=1 / math.sqrt(hidden_size))
        for projection in (self.query, self.key):
            if projection is None:
                continue
            if init_weights == "collapse":
                nn.init.zeros_(projection.weight)
                nn.init.constant_(projection.bias, -10.0)
            else:
                nn.init.normal_(projection.weight, std=1 / math.sqrt(width))
                nn.init.zeros_(projection.bias)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Digit logits of both roles.

        Args:
            hidden_states: `[B, T, hidden_size]`, any float dtype.

        Returns:
            query and key logits, float32 `[B, H, T, L, p]`; the same tensor if tied.
        """
        h = F.gelu(self.down(hidden_states))
        query = self._logits(self.query(h))
        return query, query if self.key is None else self._logits(self.key(h))

    def _logits(self, free: Tensor) -> Tensor:
        free = free.unflatten(-1, (self.num_heads, self.depth, self.arity - 1)).transpose(1, 2)
        return F.pad(free, (1, 0))  # child 0 is the reference

    @torch.no_grad()
    def initialise(self, hidden_states: Tensor, *, scale: float = 1.0) -> None:  # type: ignore[override]
        """Rescale the projections so that every digit logit has mean 0 and deviation 1 over these tokens.

        Hidden states share a large common component, which sends a random router's tokens all to one ball;
        standardised, the balls start out about equally full.

        Args:
            hidden_states: `[B, T, hidden_size]`, `B * T >= 2`.

        Raises:
            TopologyConfigError: fewer than two tokens, or a logit is the same for all, as in a collapsed router.
        """
        h = F.gelu(self.down(hidden_states)).flatten(0, -2)
        if len(h) < 2:
            raise TopologyConfigError(f"input_ids must hold two tokens or more to spread over the tree, got {len(h)}")
        for projection in (self.query, self.key):
            if projection is None:
                continue
            free = projection(h)
            deviation, mean = torch.std_mean(free, dim=0)
            if (deviation < 1e-6).any():
                raise TopologyConfigError(
                    "init_weights must be 'random' to initialise routers from data: a collapsed router's logits are "
                    "constant"
                )
            projection.weight.copy_(projection.weight / deviation[:, None])
            projection.bias.copy_((projection.bias - mean) / deviation)

    @torch.no_grad()
    def addresses(self, hidden_states: Tensor, *, merged: bool = False) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """As of every router; one fused pass on a GPU."""
        whole = self.down.weight.shape == (self.down.out_features, self.down.in_features)  # ZeRO-3 may hold none of it
        if whole and kernels_serve("route", hidden_states, self.down.weight, router_dim=self.router_dim):
            from topo_kernels import route_addresses

            dtype = hidden_states.dtype
            return route_addresses(hidden_states, self.packed(lambda: self._laid_out(dtype), merged, dtype))
        return super().addresses(hidden_states)

    def _laid_out(self, dtype: torch.dtype) -> PackedRouter:
        from topo_kernels import pack_router

        return pack_router(
            _at_least_16_bits(self.down.weight),
            _at_least_16_bits(self.query.weight),
            self.query.bias,
            None if self.key is None else _at_least_16_bits(self.key.weight),
            None if self.key is None else self.key.bias,
            num_routes=self.num_heads,
            depth=self.depth,
            arity=self.arity,
            dtype=dtype,
        )


def _at_least_16_bits(weight: Tensor) -> Tensor:
    """The kernels know no 8-bit weights, which bfloat16 holds exactly."""
    return weight.bfloat16() if weight.dtype.itemsize == 1 else weight


def relax(logits: Tensor, temperature: float, sample: bool, keep_logits: bool = False) -> RoleDigits:
    """Factorised Gumbel-Softmax of logits `[..., p]` in float32."""
    logits = with_noise(logits) if sample else logits.float()
    probs = torch.softmax(logits / temperature, dim=-1)
    digits = logits.argmax(-1)  # torch.argmax returns the first of equal maxima
    return RoleDigits(probs, digits, logits.detach() if keep_logits else None)


def with_noise(logits: Tensor) -> Tensor:
    """Logits, float32, with a draw of Gumbel noise for each.

    The noise is drawn in float32: in half precision the uniform variate rounds to 0 or 1 and its double
    logarithm is infinite (one of the paper's fp16 traps).
    """
    logits = logits.float()
    return logits - torch.empty_like(logits).exponential_().clamp_min_(1e-30).log()
