"""Packed addresses from the kernels against the router's maths in fp64, on a GPU or in Triton's interpreter."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from topo_adapter.ops.backend import forced
from topo_adapter.ops.router import TopologyRouter
from topo_kernels import router as kernels
from topo_kernels.router import PackedRouter, pack_router, route_addresses

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
HALF, BF16 = torch.float16, torch.bfloat16
# Digit logits here have deviation 1. Digits whose two largest logits are closer than this may come out either way;
# about 4 of 100,000 are that close at arity 2 (twice the tolerance times a normal density at 0), more at larger ones.
NEAR_TIE = 5e-5

# ---------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    length: int = 65
    batch: int = 1
    channels: int = 128
    width: int = 32
    routes: int = 4
    depth: int = 4
    arity: int = 2
    tied: bool = False
    dtype: torch.dtype = torch.float32
    weights: torch.dtype = torch.float32  # what the router's weights were rounded to
    path: str | None = "fused"  # 'fused', 'split', None: the kernels choose

    def __str__(self) -> str:
        changed = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{name}={value}".replace("torch.", "") for name, value in changed) or "default"


def make(case: Case, seed: int = 0) -> tuple[TopologyRouter, Tensor]:
    """A router whose digits are about balanced, and hidden states with a large common component."""
    torch.manual_seed(seed)
    router = TopologyRouter(
        case.channels, case.routes, case.arity, case.depth, router_dim=case.width, tie_query_key=case.tied
    )
    common = torch.randn(case.channels)
    router.initialise(torch.randn(1, 256, case.channels) + common)
    hidden = torch.randn(case.batch, case.length, case.channels) + common
    return router.to(DEVICE, case.weights), hidden.to(DEVICE, case.dtype)


def pack(router: TopologyRouter, dtype: torch.dtype) -> PackedRouter:
    key = router.key
    return pack_router(
        router.down.weight,
        router.query.weight,
        router.query.bias,
        None if key is None else key.weight,
        None if key is None else key.bias,
        num_routes=router.num_heads,
        depth=router.depth,
        arity=router.arity,
        dtype=dtype,
    )


@contextmanager
def path(name: str | None) -> Iterator[None]:
    limit = {"fused": 0, "split": 2**31, None: kernels._SPLIT_TOKENS}[name]
    with mock.patch.object(kernels, "_SPLIT_TOKENS", limit):
        yield


def exact_logits(router: TopologyRouter, hidden: Tensor) -> list[Tensor]:
    """fp64 logits `[B, R, T, L, p]` of query and key."""
    h = F.gelu(hidden.double() @ router.down.weight.double().T)
    roles = [router.query, router.query if router.key is None else router.key]
    return [router._logits(h @ role.weight.double().T + role.bias.double()) for role in roles]


def wrong_digits(router: TopologyRouter, hidden: Tensor, addresses: tuple[Tensor, Tensor]) -> tuple[int, int, int]:
    """How many digits are wrong although no near-tie; how many are near-ties; how many there are."""
    wrong = near = total = 0
    for logits, address in zip(exact_logits(router, hidden), addresses, strict=True):
        assert address.dtype == torch.int32 and address.shape == logits.shape[:3] and address.is_contiguous()
        assert ((address >= 0) & (address < router.arity**router.depth)).all()
        powers = router.arity ** torch.arange(router.depth, device=address.device)
        digits = address[..., None].long() // powers % router.arity
        best = logits.topk(2, -1).values
        close = best[..., 0] - best[..., 1] < NEAR_TIE
        wrong += int(((digits != logits.argmax(-1)) & ~close).sum())
        near += int(close.sum())
        total += close.numel()
    return wrong, near, total


def check(case: Case, seed: int = 0) -> None:
    router, hidden = make(case, seed)
    with path(case.path):
        addresses = route_addresses(hidden, pack(router, case.dtype))
    wrong, near, total = wrong_digits(router, hidden, addresses)
    assert wrong == 0, f"{wrong} of {total} digits"
    assert near <= 3 + 4e-4 * total, f"{near} near-ties of {total} digits hide too much"


# ---------------------------------------------------------------- exactness

SHAPES = [
    *(Case(length=n) for n in (1, 7, 64, 129)),
    *(Case(channels=c) for c in (100, 576)),
    *(Case(width=w, length=20) for w in (5, 8, 64, 100)),
    *(Case(routes=r, length=20) for r in (1, 3, 8, 9, 20)),
    *(Case(depth=d, length=20) for d in (1, 8, 12)),
    *(Case(arity=p, depth=d, length=20) for p, d in ((3, 4), (5, 3), (7, 2), (20, 1))),
    Case(tied=True, routes=3),
    Case(tied=True, routes=33, depth=2, arity=3, length=9),
    Case(batch=3, length=7),
    Case(batch=70, length=1),
    Case(weights=HALF, length=20),
    *(Case(weights=BF16, width=w, length=20) for w in (8, 100)),
]
CASES = [
    *(replace(case, dtype=dtype) for case in SHAPES for dtype in (torch.float32, HALF)),
    # the interpreter pays per token here
    *(replace(case, path="split", length=min(case.length, 17), batch=min(case.batch, 9)) for case in SHAPES),
    *(replace(case, path="split", length=17, dtype=HALF) for case in SHAPES[:9]),
]

# as in models: Llama-3.1-8B and SmolLM2-135M
_LLAMA = Case(channels=4096, routes=32, depth=8, dtype=BF16, path=None)
_SMOL = Case(channels=576, routes=9, depth=8, dtype=BF16, path=None)
GPU_CASES = [
    *(
        replace(_LLAMA, length=n, dtype=dtype, weights=weights)
        for n in (1, 2, 17, 63, 512, 513, 4097)
        for dtype in (BF16, HALF, torch.float32)
        for weights in (torch.float32, BF16)
    ),
    *(replace(_LLAMA, length=n) for n in (20_001, 65_536)),  # large tiles
    *(
        replace(_LLAMA, length=3001, width=w, tied=tied, weights=weights)
        for w in (8, 64, 128)
        for tied in (False, True)
        for weights in (torch.float32, BF16)
    ),
    *(replace(_SMOL, length=n, width=w, weights=BF16) for n in (129, 8193, 65_536) for w in (32, 90, 128)),
    *(replace(_LLAMA, length=600, routes=r, depth=4) for r in (1, 5, 8, 100, 128)),
    *(replace(_LLAMA, length=600, arity=p, depth=d) for p, d in ((2, 12), (3, 7), (5, 5), (7, 4), (64, 2))),
    *(replace(_LLAMA, length=n, batch=b) for b, n in ((16, 1), (600, 1), (16, 4), (3, 1000), (200, 7))),
    *(
        replace(_SMOL, length=n, depth=d, dtype=dtype)
        for n in (1, 129, 8193)
        for d in (4, 8)
        for dtype in (BF16, HALF, torch.float32)
    ),
    *(replace(case, dtype=BF16, path=path) for case in SHAPES for path in ("fused", "split")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_fp64(case: Case) -> None:
    check(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_matches_fp64_on_gpu(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("path_", ["fused", "split"])
def test_matches_torch_router(path_: str) -> None:
    """The fp32 module itself, digit for digit: these seeds have no near-tie."""
    router, hidden = make(Case(length=40, arity=3))
    routes = router.route(hidden)
    with path(path_):
        query, key = route_addresses(hidden, pack(router, hidden.dtype))
    assert torch.equal(query, routes.query.address(3).int())
    assert torch.equal(key, routes.key.address(3).int())


def test_8_bit_weights_through_the_router() -> None:
    router, hidden = make(Case(length=40))
    before = router.addresses(hidden)
    router.round_to(torch.float8_e4m3fn)
    with forced(False, "route"):
        expected = router.addresses(hidden)
    with forced(True, "route"):
        found = router.addresses(hidden)
    for a, b, other in zip(found, expected, before, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, other)


@pytest.mark.parametrize("path_", ["fused", "split"])
def test_ties_go_to_the_lower_digit(path_: str) -> None:
    """Projections of 0 leave the biases: logits of children 1 and 2 (child 0 has 0), and the digit they give."""
    rows = [((0, 0), 0), ((-10, -10), 0), ((1, 1), 1), ((0, 1), 2), ((1, 0), 1), ((-1, 0), 0), ((2, 1), 1), ((1, 2), 2)]
    router, hidden = make(Case(length=20, routes=2, depth=4, arity=3, tied=True))
    with torch.no_grad():
        router.query.weight.zero_()
        router.query.bias.copy_(torch.tensor([logits for logits, _ in rows], dtype=torch.float32).flatten())
    with path(path_):
        query, key = route_addresses(hidden, pack(router, hidden.dtype))
    expected = [sum(digit * 3**i for i, (_, digit) in enumerate(rows[4 * r : 4 * r + 4])) for r in range(2)]
    assert query is key
    assert torch.equal(query, torch.tensor(expected, dtype=torch.int32, device=DEVICE)[None, :, None].expand(1, 2, 20))


def test_collapsed_router_sends_everything_to_address_0() -> None:
    router = TopologyRouter(64, 4, 2, 3, init_weights="collapse").to(DEVICE)
    hidden = torch.randn(1, 30, 64, device=DEVICE)
    assert not any(address.any() for address in route_addresses(hidden, pack(router, hidden.dtype)))


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
@pytest.mark.parametrize(
    ("weights", "parts"), [(torch.float32, {3}), (BF16, {1}), (HALF, {1, 2})], ids=["float32", "bfloat16", "float16"]
)
def test_parts_add_up_to_the_weight(dtype: torch.dtype, weights: torch.dtype, parts: set[int]) -> None:
    router, _ = make(Case(weights=weights, width=20, channels=200))
    packed = pack(router, dtype)
    assert packed.down.shape[0] in parts and packed.down.shape[1:] == (32, 256)
    assert (packed.down_scale.log2() % 1 == 0).all()
    total = packed.down.double().sum(0) * packed.down_scale.double()[:, None]
    down = router.down.weight.double()
    error = (total[:20, :200] - down).abs()
    assert (error <= down.abs().amax(1, keepdim=True) * 2.0**-38).all()  # fp16 underflow, far below a row's largest
    if dtype == BF16:
        assert not error.any()
    assert not total[20:].any() and not total[:, 200:].any()


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e4])
def test_half_precision_weights_of_any_size(scale: float) -> None:
    """fp16 could not hold these weights."""
    router, hidden = make(Case(dtype=HALF))
    with torch.no_grad():
        router.down.weight[0] *= scale
    addresses = route_addresses(hidden, pack(router, HALF))
    assert wrong_digits(router, hidden, addresses)[0] == 0


@pytest.mark.parametrize("dtype", [pytest.param(BF16, marks=pytest.mark.gpu), HALF], ids=str)
def test_rounded_weights_are_noticed(dtype: torch.dtype) -> None:
    """The control: without the lower parts of the weights digits are wrong."""
    router, hidden = make(Case(dtype=dtype, length=1000, routes=32, depth=8))
    packed = pack(router, dtype)
    with path("fused"):
        addresses = route_addresses(hidden, packed._replace(down=packed.down[:1].contiguous()))
    assert wrong_digits(router, hidden, addresses)[0] > 0


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_wrong_level_is_noticed(what: str) -> None:
    router, hidden = make(Case(length=20))
    packed = pack(router, hidden.dtype)
    packed = packed._replace(**{what: getattr(packed, what).roll(1, 0)})
    assert wrong_digits(router, hidden, route_addresses(hidden, packed))[0] > 0


# ---------------------------------------------------------------- memory


@contextmanager
def filled_memory() -> Iterator[None]:
    """`torch.empty` returns NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all() and (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def poisoned(tensor: Tensor, margin: int) -> Tensor:
    """The same values as a view into memory full of NaN."""
    memory = tensor.new_full([n + 2 * margin for n in tensor.shape], float("nan"))
    view = memory[tuple(slice(margin, margin + n) for n in tensor.shape)]
    return view.copy_(tensor)


@pytest.mark.parametrize("margin", [1, 16])  # unaligned rows, aligned rows
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=3, length=7, channels=100, path=path_, dtype=dtype, routes=routes)
        for path_ in ("fused", "split")
        for dtype in (torch.float32, HALF)
        for routes in (1, 9)
    ],
    ids=str,
)
def test_nothing_outside_is_read(case: Case, margin: int) -> None:
    router, hidden = make(case)
    packed = pack(router, case.dtype)
    with path(case.path):
        clean = route_addresses(hidden, packed)
        with filled_memory():
            again = route_addresses(poisoned(hidden, margin), packed)
    assert all(torch.equal(a, b) for a, b in zip(again, clean, strict=True))


@pytest.mark.parametrize("path_", ["fused", "split"])
def test_strides(path_: str) -> None:
    router, hidden = make(Case(batch=2, length=20, channels=100))
    packed = pack(router, hidden.dtype)
    with path(path_):
        clean = route_addresses(hidden, packed)
        for dims in ((0, 1), (1, 2), (0, 2)):
            view = hidden.transpose(*dims).contiguous().transpose(*dims)
            assert all(torch.equal(a, b) for a, b in zip(route_addresses(view, packed), clean, strict=True))
        repeated = route_addresses(hidden[:1].expand(3, -1, -1), packed)
    assert all(torch.equal(a, b[:1].expand(3, -1, -1)) for a, b in zip(repeated, clean, strict=True))


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_no_tokens(shape: tuple[int, int]) -> None:
    router, hidden = make(Case())
    query, key = route_addresses(hidden.new_empty(*shape, 128), pack(router, hidden.dtype))
    assert query.shape == key.shape == (shape[0], 4, shape[1])


@pytest.mark.parametrize(
    "case",
    [
        *(replace(_LLAMA, length=n, weights=w) for n in (1, 64, 9001) for w in (torch.float32, BF16)),
        replace(_LLAMA, length=2000, dtype=torch.float32),
    ],
    ids=str,
)
@pytest.mark.gpu
def test_repeats_are_bitwise_equal(case: Case) -> None:
    router, hidden = make(case)
    packed = pack(router, case.dtype)
    first = torch.stack(route_addresses(hidden, packed))
    for _ in range(250):
        assert torch.equal(torch.stack(route_addresses(hidden, packed)), first)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    router, hidden = make(Case(length=40_000, channels=64, dtype=BF16))
    packed = pack(router, BF16)
    rows = torch.empty(1, 40_000, 2**16, dtype=BF16, device=DEVICE)  # 2^31 elements and more
    view = rows[..., :64].copy_(hidden)
    assert all(
        torch.equal(a, b) for a, b in zip(route_addresses(view, packed), route_addresses(hidden, packed), strict=True)
    )
    few = route_addresses(view[:, ::1000], packed)
    assert wrong_digits(router, hidden[:, ::1000], few)[0] == 0


# ---------------------------------------------------------------- graphs and compilation


def test_custom_op_is_well_formed() -> None:
    router, hidden = make(Case(length=5, batch=2))
    packed = pack(router, hidden.dtype)
    arguments = (hidden, *packed[:4], packed.num_routes, packed.depth, packed.arity, packed.tied)
    torch.library.opcheck(kernels._route_addresses, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 1000])
def test_cuda_graph(length: int) -> None:
    router, hidden = make(replace(_LLAMA, length=length))
    packed = pack(router, BF16)
    route_addresses(hidden, packed)  # compiles
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(hidden)
    with torch.cuda.graph(graph):
        out = route_addresses(static, packed)
    static.copy_(hidden)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(out, route_addresses(hidden, packed), strict=True))


@pytest.mark.parametrize(
    ("case", "lengths"),
    [(Case(length=17), (17, 5)), pytest.param(replace(_LLAMA, length=600), (600, 577, 3), marks=pytest.mark.gpu)],
    ids=str,
)
def test_torch_compile(case: Case, lengths: tuple[int, ...]) -> None:
    router, hidden = make(case)
    packed = pack(router, case.dtype)
    backend = "inductor" if GPU else "eager"
    compiled = torch.compile(
        lambda x: [a + 1 for a in route_addresses(x, packed)], fullgraph=True, dynamic=True, backend=backend
    )
    for n in lengths:
        x = hidden[:, :n]
        assert all(torch.equal(a, b + 1) for a, b in zip(compiled(x), route_addresses(x, packed), strict=True))


@pytest.mark.gpu
def test_lengths_do_not_recompile() -> None:
    router, hidden = make(replace(_LLAMA, length=3000))
    packed = pack(router, BF16)

    def compiled() -> int:
        caches = (k.device_caches[0][0] for k in (kernels._fused_kernel, kernels._slice_kernel, kernels._digits_kernel))
        return sum(map(len, caches))

    for n in (513, 1):
        route_addresses(hidden[:, :n], packed)
    before = compiled()
    for n in (2, 3, 16, 17, 64, 512, 514, 1024, 2999, 3000):
        route_addresses(hidden[:, :n], packed)
    assert compiled() == before


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down": torch.zeros(32)}, r"down must have shape \[W, C\], got \[32\]"),
        ({"down": torch.zeros(129, 64)}, "down must have at most 128 rows .*got 129: use the torch router"),
        ({"query_weight": torch.zeros(11, 32)}, r"query_weight must have shape \[12, 32\], got \[11, 32\]"),
        ({"query_bias": torch.zeros(12, 1)}, r"query_bias must have shape \[12\], got \[12, 1\]"),
        ({"key_weight": None}, "both be given, or both be None"),
        ({"key_weight": torch.zeros(12, 31)}, r"key_weight must have shape \[12, 32\], got \[12, 31\]"),
        ({"key_bias": torch.zeros(12, dtype=torch.int32)}, "key_bias must be float32, bfloat16 or float16"),
        ({"query_bias": torch.zeros(12, device="meta")}, "query_bias must be on down's device cpu, got meta"),
        ({"num_routes": 0}, "num_routes and depth must be >= 1"),
        ({"arity": 1}, "arity >= 2"),
        ({"depth": 31}, r"arity\*\*depth < 2\*\*31, got num_routes=4, depth=31, arity=2"),
        ({"dtype": torch.float64}, "dtype must be float16, bfloat16 or float32, got torch.float64"),
    ],
)
def test_pack_refuses(change: dict, message: str) -> None:
    weights = {"down": torch.zeros(32, 64), "query_weight": torch.zeros(12, 32), "query_bias": torch.zeros(12)}
    weights |= {"key_weight": torch.zeros(12, 32), "key_bias": torch.zeros(12)}
    options = {"num_routes": 4, "depth": 3, "arity": 2, "dtype": torch.float32}
    with pytest.raises(ValueError, match=message):
        pack_router(**(weights | options | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[0], r"hidden must have shape \[B, T, C=128\], got \[5, 128\]"),
        (lambda t: t[..., :64], r"hidden must have shape \[B, T, C=128\], got \[1, 5, 64\]"),
        (lambda t: t.half(), "packed for, torch.float32, got torch.float16"),
        (lambda t: t.to("meta"), "hidden must be on the router's device"),
    ],
)
def test_route_refuses(change, message: str) -> None:
    router, hidden = make(Case(length=5))
    with pytest.raises(ValueError, match=message):
        route_addresses(change(hidden), pack(router, torch.float32))


@pytest.mark.skipif(GPU, reason="the interpreter's limit")
def test_interpreter_refuses_bfloat16() -> None:
    router, hidden = make(Case(length=5, dtype=BF16))
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"):
        route_addresses(hidden, pack(router, BF16))
