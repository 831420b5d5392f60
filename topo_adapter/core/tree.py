"""The Bruhat-Tits tree: addresses, balls, valuation. Integers only, nothing learned.

An address is a p-adic integer `x = sum_l a_l p**l` with digits `a_l` in `{0..p-1}`; level `l = 0`
is the root, the coarsest choice. The ball of `x` at depth `d` is `x mod p**d`: its first `d` digits.
Balls are nested, depth 0 is one ball that holds everything. (docs/method.md, section 1.)

Every function works elementwise on integer tensors of any shape and is exact as long as
`p**L <= 2**62`.
"""

import torch
from torch import Tensor


def _check(arity: int, depth: int) -> None:
    if type(arity) is not int or arity < 2:
        raise ValueError(f"arity must be an integer >= 2, got {arity!r}")
    if type(depth) is not int or depth < 0:
        raise ValueError(f"depth must be an integer >= 0, got {depth!r}")
    if arity**depth > 2**62:
        raise ValueError(f"arity ** depth must be at most 2**62 to fit an int64, got {arity}**{depth}")


def digits_to_address(digits: Tensor, arity: int) -> Tensor:
    """Pack digits `[..., L]`, each in `{0..arity-1}`, into addresses `[...]` (int64)."""
    depth = digits.shape[-1]
    _check(arity, depth)
    powers = arity ** torch.arange(depth, device=digits.device)
    return (digits.long() * powers).sum(-1)


def address_to_digits(address: Tensor, arity: int, depth: int) -> Tensor:
    """Unpack addresses `[...]` in `[0, arity**depth)` into digits `[..., depth]` (int64), root first."""
    _check(arity, depth)
    powers = arity ** torch.arange(depth, device=address.device)
    return address.long()[..., None].div(powers, rounding_mode="floor") % arity


def ball(address: Tensor, arity: int, depth: int | Tensor) -> Tensor:
    """The ball of each address at `depth`: its first `depth` digits, as an integer in `[0, arity**depth)`.

    `depth` is an integer or an integer tensor that broadcasts against `address`.
    """
    if isinstance(depth, Tensor):
        _check(arity, 0)
        return address % torch.pow(arity, depth.long())
    _check(arity, depth)
    return address % arity**depth


def num_balls(arity: int, num_levels: int, depth: int) -> int:
    """Addresses modulo this are their balls at `depth`. One level below the leaves that leaves them as they are, and
    one more, which no key has, as well."""
    return arity**depth if depth <= num_levels else arity**num_levels + 1


def valuation(x: Tensor, y: Tensor, arity: int, depth: int) -> Tensor:
    """Number of leading digits that `x` and `y` share, in `0..depth`; `depth` if they are equal."""
    _check(arity, depth)
    shared = [ball(x, arity, d) == ball(y, arity, d) for d in range(1, depth + 1)]
    if not shared:
        return torch.zeros_like(x + y)
    return torch.stack(shared).sum(0)  # balls are nested, so "shared at d" is a run of ones from the root
