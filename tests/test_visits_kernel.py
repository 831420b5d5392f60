"""The kernel that chooses balls against `likeliest_leaves`, bit for bit; on a GPU or interpreted."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from test_kernels import DEVICE, GPU, guarded, poisoned
from torch import Tensor

from topo_adapter.core.visits import likeliest_leaves
from topo_kernels import likeliest_balls, visits


def random(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape)


def tied(shape: tuple[int, ...]) -> Tensor:
    """Small integers: sums are exact, and few are different."""
    return torch.randint(3, shape).float()


def nearly_tied(shape: tuple[int, ...]) -> Tensor:
    """Sums that are equal or not by how they are rounded."""
    return torch.randint(3, shape) * torch.tensor(0.1)


def unequal(shape: tuple[int, ...]) -> Tensor:
    """Lacks from 1e-30 to 1e30, and hopeless children: sums that drown and that are infinite."""
    logits = torch.randn(shape) * 10.0 ** torch.randint(-30, 31, (*shape[:-1], 1))
    return logits.masked_fill(torch.rand(shape) < 0.1, float("-inf")).index_fill(-1, torch.tensor(0), 0.0)


KINDS: list[Callable[[tuple[int, ...]], Tensor]] = [random, tied, nearly_tied, unequal]


def expected(logits: Tensor, depths: list[int], counts: list[int], count: int) -> Tensor:
    B, R, T, L, _ = logits.shape
    found = torch.full((B, R, count, T), -1, dtype=torch.int32, device=logits.device)
    for r, (depth, m) in enumerate(zip(depths, counts, strict=True)):
        if depth <= L:
            found[:, r, :m] = likeliest_leaves(logits[:, r, :, :depth], m).int().transpose(1, 2)
    return found


def run(logits: Tensor, depths: list[int], counts: list[int], count: int, tokens: int | None = None) -> Tensor:
    """The interpreter pays per program."""
    tensors = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (depths, counts))
    tokens = tokens or (None if GPU else 64)
    choose = visits.choose_tokens if tokens is None else lambda _: tokens
    with mock.patch.object(visits, "choose_tokens", choose):
        return likeliest_balls(logits, *tensors, count)


# fmt: off
TREES = [  # arity, levels, depths of the heads, their visits, most visits
    (2, 5, [5, 0, 6, 2], [8, 3, 2, 3], 8),
    (2, 16, [16], [8], 8),
    (3, 3, [3, 2, 1], [3, 8, 2], 8),
    (3, 4, [4, 4], [1, 3], 3),
    (5, 2, [2, 1], [2, 2], 2),
    (11, 2, [2, 1], [8, 5], 8),
    (2, 3, [3, 1], [1, 1], 1),
]
# fmt: on


def of_all_kinds(batch: int, heads: int, tokens: int, levels: int, arity: int) -> Tensor:
    """Tokens of each kind, one after the other."""
    torch.manual_seed(0)
    return torch.cat([kind((batch, heads, tokens, levels, arity)) for kind in KINDS], 2).to(DEVICE)


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_the_balls_of_likeliest_leaves(tree: tuple) -> None:
    arity, levels, depths, counts, count = tree
    logits = of_all_kinds(1, len(depths), 1000 if GPU else 15, levels, arity)
    found = run(logits, depths, counts, count)
    assert found.dtype == torch.int32 and torch.equal(found, expected(logits, depths, counts, count))


@pytest.mark.gpu
@pytest.mark.parametrize("arity", [2, 3, 4, 7, 16, 64, 256])
@pytest.mark.parametrize("count", range(1, 9))
def test_every_count_on_gpu(arity: int, count: int) -> None:
    levels = {2: 12, 3: 7, 4: 6, 7: 4, 16: 3}.get(arity, 1)
    depths, counts = list(range(levels + 2)), [1 + i % count for i in range(levels + 2)]
    logits = of_all_kinds(1, levels + 2, 1025, levels, arity)
    assert torch.equal(run(logits, depths, counts, count), expected(logits, depths, counts, count))


@pytest.mark.parametrize("tokens", [1, 4])
def test_programs_of_few_tokens(tokens: int) -> None:
    torch.manual_seed(0)
    logits = tied((1, 2, 5, 3, 2)).to(DEVICE)
    assert torch.equal(run(logits, [3, 2], [3, 2], 3, tokens), expected(logits, [3, 2], [3, 2], 3))


def test_nothing_outside_is_read() -> None:
    torch.manual_seed(0)
    logits = random((2, 2, 21, 3, 3)).to(DEVICE)
    views = [poisoned(logits), logits.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)]
    right = expected(logits, [3, 2], [3, 1], 3)
    for view in views:
        assert not view.is_contiguous() and torch.equal(run(view, [3, 2], [3, 1], 3), right)
    depths, counts = (guarded(torch.tensor(x, dtype=torch.int32, device=DEVICE)) for x in ([3, 2], [3, 1]))
    assert torch.equal(likeliest_balls(logits, depths, counts, 3), right)


def test_other_logits_other_balls() -> None:
    torch.manual_seed(0)
    logits = random((1, 1, 30, 4, 2)).to(DEVICE)
    right = expected(logits, [4], [3], 3)
    assert not torch.equal(run(logits.flip(3), [4], [3], 3), right)
    assert not torch.equal(run(logits, [3], [3], 3), right) and not torch.equal(run(logits, [4], [2], 3), right)


@pytest.mark.parametrize("size", [2, 16, 128, 2048])
def test_tokens_of_a_program(size: int) -> None:
    tokens = visits.choose_tokens(size)
    assert tokens & (tokens - 1) == 0 and (tokens == 1 or tokens * size == 1024)


def test_no_queries() -> None:
    assert run(torch.zeros(2, 1, 0, 3, 2, device=DEVICE), [2], [2], 2).shape == (2, 1, 2, 0)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        (
            "logits",
            torch.zeros(1, 2, 3, 4),
            r"logits must be float32 \[B, R, T, L, p\], got torch.float32 \[1, 2, 3, 4\]",
        ),
        ("logits", torch.zeros(1, 2, 3, 4, 2).half(), "logits must be float32 .* got torch.float16"),
        ("logits", torch.zeros(1, 2, 3, 4, 1), "p from 2 to 256 children"),
        ("logits", torch.zeros(1, 2, 3, 31, 2), r"p\*\*L below 2\*\*31, got L = 31 and p = 2"),
        ("depths", torch.zeros(2), r"depths must be int32 of shape \[2\], got torch.float32 \[2\]"),
        ("visits", torch.ones(3, dtype=torch.int32), r"visits must be int32 of shape \[2\], got torch.int32 \[3\]"),
        ("count", 0, "count must be from 1 to 8, got 0"),
        ("count", 9, "count must be from 1 to 8, got 9"),
    ],
)
def test_refuses(argument: str, value: Tensor | int, message: str) -> None:
    ones = torch.ones(2, dtype=torch.int32)
    arguments = {"logits": torch.zeros(1, 2, 3, 4, 2), "depths": ones, "visits": ones, "count": 2, argument: value}
    with pytest.raises(ValueError, match=message):
        likeliest_balls(*(x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments.values()))


def test_operator() -> None:
    ones = torch.ones(2, dtype=torch.int32, device=DEVICE)
    arguments = torch.randn(1, 2, 3, 2, 2, device=DEVICE), ones, ones, 2
    torch.library.opcheck(visits._likeliest_balls, arguments, test_utils=("test_schema", "test_faketensor"))
