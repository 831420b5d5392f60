"""Documents and positions, from padding, position ids, caches and the masks that transformers makes."""

import hypothesis.strategies as st
import pytest
import torch
from helpers import LAYOUTS
from hypothesis import given, settings
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaModel, StaticCache
from transformers.masking_utils import create_causal_mask

from topo_adapter.core.layout import (
    SequenceLayout,
    causal_pairs,
    contiguous_layout,
    continued_layout,
    layout_from_cu_seq_lens,
    layout_from_mask,
    layout_from_padding,
    layout_from_position_ids,
)
from topo_adapter.errors import TopologyError, UnsupportedModelError

N = 6
TRIANGLE = torch.ones(N, N, dtype=torch.bool).tril()
# ids of packed rows with the documents that they mean
PACKED_IDS = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 0]])
PACKED = SequenceLayout(torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]]), PACKED_IDS)


def same_pairs(a: SequenceLayout, b: SequenceLayout) -> bool:
    """Equal up to the labels of documents and the label of padding."""
    return torch.equal(causal_pairs(a, a), causal_pairs(b, b)) and torch.equal(a.position, b.position)


# ---------------------------------------------------------------- padding and position ids


def test_contiguous() -> None:
    layout = contiguous_layout(2, N)
    assert torch.equal(layout.position, torch.arange(N).repeat(2, 1))
    assert layout.real.all()
    assert torch.equal(causal_pairs(layout, layout), TRIANGLE.repeat(2, 1, 1))


@pytest.mark.parametrize(
    ("real", "position"),
    [
        ([1, 1, 1, 1], [0, 1, 2, 3]),
        ([0, 0, 1, 1], [-1, -1, 0, 1]),  # left
        ([1, 1, 1, 0], [0, 1, 2, -1]),  # right
        ([1, 0, 1, 1], [0, -1, 1, 2]),  # middle
        ([0, 1, 0, 1], [-1, 0, -1, 1]),
        ([0, 0, 0, 0], [-1, -1, -1, -1]),
    ],
)
def test_padding_is_not_counted(real: list[int], position: list[int]) -> None:
    mask = torch.tensor([real], dtype=torch.bool)
    layout = layout_from_padding(mask)
    assert torch.equal(layout.position, torch.tensor([position]))
    assert torch.equal(layout.real, mask)
    expected = [[[bool(i >= j and real[i] and real[j]) for j in range(4)] for i in range(4)]]
    assert torch.equal(causal_pairs(layout, layout), torch.tensor(expected))


def test_position_ids_that_restart_begin_a_document() -> None:
    layout = layout_from_position_ids(PACKED_IDS)
    assert same_pairs(layout, PACKED)
    assert not same_pairs(layout, contiguous_layout(2, N))
    assert same_pairs(layout_from_position_ids(PACKED_IDS[:1] + 7), SequenceLayout(PACKED.document[:1], PACKED_IDS[:1]))


@pytest.mark.parametrize(
    ("ids", "starts"),
    [
        ([0, 0, 1, 1, 2, 2], []),  # Self-Extend
        ([0, 2, 4, 6, 8, 10], []),
        ([0, 1, 2, 60, 61, 62], []),  # PoSE, a dropped middle
        ([0, 1, 2, 30, 0, 1], [4]),
        ([5, 6, 7, 7, 8, 9], []),
        ([0, 0, 0, 1, 0, 0], [1, 2, 4, 5]),  # documents of one token
        ([40, 41, 42, 3, 4, 5], [3]),
        ([1, 1, 0, 1, 2, 3], [2]),
    ],
)
def test_repeated_positions_and_gaps_are_one_text(ids: list[int], starts: list[int]) -> None:
    document = (torch.arange(N)[:, None] >= torch.tensor(starts, dtype=torch.long)).sum(1)
    position = torch.tensor([int((document[:t] == document[t]).sum()) for t in range(N)])
    expected = SequenceLayout(document[None], position[None])
    assert same_pairs(layout_from_position_ids(torch.tensor([ids])), expected)
    past = layout_from_position_ids(torch.tensor([[7, 8]]))
    chunk = continued_layout(past, N, torch.tensor([ids]))
    joined = causal_pairs(chunk, past.extended(chunk))
    first_document = document == 0 if ids[0] else torch.zeros(N, dtype=torch.bool)  # 0 begins another one
    assert torch.equal(joined[0, :, 2:], causal_pairs(expected, expected)[0])
    assert torch.equal(joined[0, :, 0], first_document)


def test_a_recorded_graph_is_asked_for_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(6)[None]
    eager = layout_from_position_ids(ids.clone())
    monkeypatch.setattr("topo_adapter.core.layout.graph_is_recorded", lambda: True)
    monkeypatch.setattr(Tensor, "__bool__", lambda _: pytest.fail("waits for the device"))
    recorded = layout_from_position_ids(ids.clone())
    monkeypatch.undo()
    assert eager.plain and not recorded.plain  # the general case, which is as right
    assert torch.equal(eager.position, recorded.position) and torch.equal(eager.document, recorded.document)


def test_cu_seq_lens_tell_documents() -> None:
    layout = layout_from_cu_seq_lens(torch.tensor([0, 3, 4, 6], dtype=torch.int32), 1, N)
    expected = SequenceLayout(torch.tensor([[0, 0, 0, 1, 2, 2]]), torch.tensor([[0, 1, 2, 0, 0, 1]]))
    assert same_pairs(layout, expected)
    with pytest.raises(UnsupportedModelError, match="cu_seq_lens_q needs a batch of one row, got 2"):
        layout_from_cu_seq_lens(torch.tensor([0, 6]), 2, N)


def test_causal_pairs_of_fewer_queries() -> None:
    last = PACKED.last(2)
    assert torch.equal(causal_pairs(last, PACKED), causal_pairs(PACKED, PACKED)[:, -2:])
    assert same_pairs(SequenceLayout(PACKED.document[:, :4], PACKED_IDS[:, :4]).extended(last), PACKED)


# ---------------------------------------------------------------- chunks after a cache


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), cut=st.integers(1, 19))
def test_continued_layout(sizes: list[int], cut: int) -> None:
    ids = torch.cat([torch.arange(n) for n in sizes]).expand(2, -1)
    cut = min(cut, ids.shape[1])
    whole = layout_from_position_ids(ids)
    past = layout_from_position_ids(ids[:, :cut])
    rest = continued_layout(past, ids.shape[1] - cut, ids[:, cut:])
    assert same_pairs(past.extended(rest), whole)


def test_continued_layout_rows_restart_on_their_own() -> None:
    past = layout_from_padding(torch.tensor([[True, True, True], [False, True, True]]))
    rest = continued_layout(past, 3, torch.tensor([[3, 0, 1], [2, 3, 0]]))
    assert torch.equal(rest.position, torch.tensor([[3, 0, 1], [2, 3, 0]]))
    pairs = causal_pairs(rest, past.extended(rest)).sum(-1)
    assert torch.equal(pairs, torch.tensor([[4, 1, 2], [3, 4, 1]]))


def test_continued_layout_without_position_ids() -> None:
    past = layout_from_position_ids(PACKED_IDS)
    rest = continued_layout(past, 2, None)
    assert torch.equal(rest.position, torch.tensor([[3, 4], [1, 2]]))
    assert torch.equal(causal_pairs(rest, past.extended(rest)).sum(-1), torch.tensor([[4, 5], [2, 3]]))


# ---------------------------------------------------------------- masks that transformers makes

PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
PADDINGS = {"left": PADDED, "right": PADDED.flip(1), "middle": torch.tensor([[1, 0, 1, 1, 0, 1]], dtype=torch.bool)}
IMPLEMENTATIONS = {"sdpa": torch.bool, "eager": torch.float32}


@pytest.fixture(params=list(IMPLEMENTATIONS))
def llama(request: pytest.FixtureRequest) -> LlamaModel:
    """A tiny model whose layers write the mask they get into `model.masks`."""
    config = LlamaConfig(
        hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=2, vocab_size=4, pad_token_id=0
    )
    config._attn_implementation = request.param
    model = LlamaModel(config).eval()
    model.masks = []
    for layer in model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: model.masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    return model


def mask_seen(model: LlamaModel, length: int, batch: int, **kwargs: object) -> Tensor:
    """The one mask that every layer of a forward gets."""
    model.masks.clear()
    with torch.no_grad():
        model(input_ids=torch.ones(batch, length, dtype=torch.long), **kwargs)
    first, second = model.masks
    assert first is second and first.dtype == IMPLEMENTATIONS[model.config._attn_implementation]
    return first


@pytest.mark.parametrize("padding", list(PADDINGS))
def test_mask_of_padded_rows(llama: LlamaModel, padding: str) -> None:
    real = PADDINGS[padding]
    mask = mask_seen(llama, N, len(real), attention_mask=real.long(), use_cache=False)
    layout = layout_from_mask(mask)
    assert same_pairs(layout, layout_from_padding(real))
    assert not same_pairs(layout, contiguous_layout(len(real), N))
    with torch.no_grad():
        assert layout_from_mask(mask, layer=3) is layout, "the layers of a forward share the work"


def test_mask_of_packed_rows(llama: LlamaModel) -> None:
    layout = layout_from_mask(mask_seen(llama, N, 2, position_ids=PACKED_IDS, use_cache=False))
    assert same_pairs(layout, layout_from_position_ids(PACKED_IDS))


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_mask_with_a_cache(llama: LlamaModel, static: bool) -> None:
    """Prefill of padded rows, then two more chunks; a static cache has unfilled slots behind them."""
    cache = StaticCache(config=llama.config, max_cache_len=12) if static else DynamicCache(config=llama.config)
    past, real = None, PADDED.long()
    for new in (N, 1, 3):
        if past is not None:
            real = torch.cat([real, real.new_ones(len(real), new)], 1)
        past_length = real.shape[1] - new
        mask = mask_seen(llama, new, len(real), attention_mask=real, past_key_values=cache)
        assert mask.shape[-1] == (12 if static else real.shape[1])
        layout = layout_from_mask(mask, past, past_length)
        past = layout if past is None else past.extended(layout)
        assert same_pairs(past, layout_from_padding(real.bool()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_additive_mask_in_half_precision(dtype: torch.dtype) -> None:
    config = LlamaConfig(hidden_size=8, num_attention_heads=2)
    config._attn_implementation = "eager"
    mask = create_causal_mask(config, torch.zeros(3, N, 8, dtype=dtype), PADDED.long(), None)
    assert mask.dtype == dtype
    assert same_pairs(layout_from_mask(mask), layout_from_padding(PADDED))


@pytest.mark.parametrize("name", list(LAYOUTS))
@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_mask_of_every_layout(name: str, additive: bool) -> None:
    torch.manual_seed(0)
    expected = LAYOUTS[name](2, 20)
    mask = causal_pairs(expected, expected)[:, None]
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    assert same_pairs(layout_from_mask(mask), expected)


def test_padding_rows_of_a_mask_may_see_keys() -> None:
    """Right-padded queries see the real keys before them in transformers' masks; they stay padding."""
    real = torch.tensor([[True, True, True, True, False, False]])
    layout = layout_from_mask((TRIANGLE & real)[None, None])
    assert same_pairs(layout, layout_from_padding(real))


def change_counted(tensor: Tensor, new: Tensor) -> None:
    tensor.copy_(new)


def change_uncounted(tensor: Tensor, new: Tensor) -> None:
    tensor.data.copy_(new)  # as numpy, a captured graph or a kernel of one's own does


CHANGES = {
    "no_grad": (torch.no_grad, change_counted),
    "inference": (torch.inference_mode, change_counted),
    "uncounted": (torch.no_grad, change_uncounted),
}


@pytest.mark.parametrize("how", list(CHANGES))
def test_mask_changed_in_place_is_read_again(how: str) -> None:
    context, change = CHANGES[how]
    with context():
        mask = TRIANGLE[None, None].clone()
        layouts = [layout_from_mask(mask, layer=layer) for layer in (1, 3)]
        assert same_pairs(layouts[0], contiguous_layout(1, N)) and layouts[0] is layouts[1]
        real = torch.arange(N)[None] > 0
        change(mask, TRIANGLE & real)
        for layer in (1, 3):
            assert same_pairs(layout_from_mask(mask, layer=layer), layout_from_padding(real))


@pytest.mark.parametrize("how", list(CHANGES))
def test_position_ids_changed_in_place_are_read_again(how: str) -> None:
    context, change = CHANGES[how]
    with context():
        ids = torch.arange(N)[None].clone()
        assert same_pairs(layout_from_position_ids(ids, layer=1), contiguous_layout(1, N))
        change(ids, PACKED_IDS[:1])
        for layer in (1, 3):
            layout = layout_from_position_ids(ids, layer=layer)
            assert same_pairs(layout, SequenceLayout(PACKED.document[:1], PACKED_IDS[:1]))


def test_recomputed_layers_share_what_was_read() -> None:
    """Gradient checkpointing runs the layers again from the last to the first."""
    mask = TRIANGLE[None, None].clone()
    first = layout_from_mask(mask, layer=0)
    assert [layout_from_mask(mask, layer=layer) is first for layer in (1, 2, 2, 1, 0)] == [True] * 5


# ---------------------------------------------------------------- masks that cannot be routed

WINDOW = TRIANGLE & ~torch.ones(N, N, dtype=torch.bool).tril(-3)
PREFIX = TRIANGLE.clone()
PREFIX[:3, :3] = True
HOLE = TRIANGLE.clone()
HOLE[5, 2] = False
ONE_EYE = TRIANGLE.clone()
ONE_EYE[1, 4] = True
SPLIT_BACK = TRIANGLE.clone()  # the first half is a document, the second sees both
SPLIT_BACK[3:, :1] = False
UNROUTABLE = {
    "bidirectional": torch.ones(N, N, dtype=torch.bool),
    "sliding window": WINDOW,
    "prefix-LM": PREFIX,
    "a hidden pair": HOLE,
    "a look ahead": ONE_EYE,
    "overlapping documents": SPLIT_BACK,
    "anti-causal": TRIANGLE.T,
}


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize("name", list(UNROUTABLE))
def test_refuses_masks_that_are_not_causal(name: str, additive: bool) -> None:
    mask = UNROUTABLE[name][None, None]
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    with pytest.raises(UnsupportedModelError, match="must be causal within documents"):
        layout_from_mask(mask)


@pytest.mark.parametrize("bias", [-1.0, -1e-6, 1e-6, 2.0, -9999.0, float("nan")])
@pytest.mark.parametrize("length", [N, 1])
def test_refuses_biases(bias: float, length: int) -> None:
    """ALiBi and soft masks: a bias is neither visible nor hidden."""
    mask = torch.zeros(N, N).masked_fill(~TRIANGLE, -1e4)[None, None]
    past = contiguous_layout(1, N - length)
    assert same_pairs(past.extended(layout_from_mask(mask[:, :, -length:], past, N - length)), contiguous_layout(1, N))
    mask[..., -1, 1] = bias
    with pytest.raises(UnsupportedModelError, match="biases"):
        layout_from_mask(mask[:, :, -length:], past, N - length)


def test_refuses_one_bad_row_of_a_batch() -> None:
    with pytest.raises(UnsupportedModelError, match="must be causal within documents"):
        layout_from_mask(torch.stack([TRIANGLE, WINDOW])[:, None])


def test_refuses_a_window_in_decode() -> None:
    """One query over a cache: the keys it does not see are the only sign of a window."""
    past = contiguous_layout(1, N - 1)
    assert torch.equal(layout_from_mask(TRIANGLE[None, None, -1:].clone(), past, N - 1).position, torch.tensor([[5]]))
    with pytest.raises(UnsupportedModelError, match="must be causal within documents"):
        layout_from_mask(WINDOW[None, None, -1:].clone(), past, N - 1)


def test_refuses_visible_unfilled_slots() -> None:
    mask = torch.nn.functional.pad(TRIANGLE, (0, 2))[None, None]
    assert same_pairs(layout_from_mask(mask), contiguous_layout(1, N))
    seen = mask.clone()
    seen[..., -1, -1] = True
    with pytest.raises(UnsupportedModelError, match="must be causal within documents"):
        layout_from_mask(seen)


@pytest.mark.parametrize(
    "mask",
    [TRIANGLE.expand(1, 2, N, N), TRIANGLE[None], TRIANGLE[None, None, :, 1:]],
    ids=["per head", "three dimensions", "too few keys"],
)
def test_refuses_shapes(mask: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match=r"must have shape \[B, 1, T, S\]"):
        layout_from_mask(mask)
    assert issubclass(UnsupportedModelError, (TopologyError, ValueError))
