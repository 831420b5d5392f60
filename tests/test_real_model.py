"""The first layers of the real SmolLM2-135M in float64: every form of a topology against the stranger's attention, to
1e-4 in logits.

All prompts are the beginnings of one text. Attention is causal, so the stranger's logits of the longest prompt are its
logits of every shorter one and are computed once per case; the forms run each prompt on its own.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft_helpers import Stranger, logits_of, routed, twin
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from topo_adapter import MissingPackageError, RecordedRoutes, load_merged, measure_density, record_routes, save_merged
from topo_evaluation.embedded import smollm2, standard_library

pytestmark = pytest.mark.real

REPOSITORY = Path(__file__).parents[1]
TOLERANCE = 1e-4
SHORT = [1, 7, 127, 128, 129]
LONG = 300  # more than twice the largest window
LAYERS, HEADS, KV_HEADS = 8, 9, 3  # of 30 layers; all of them run in test_shipped_adapter.py


@dataclass(frozen=True)
class Case:
    """One corner of the settings; together they cover every pair of addresses and routes, and long prompts twice."""

    settings: dict[str, Any]
    longest: int
    forms: tuple[str, ...]
    from_files: tuple[str, ...] = ()  # what the forms do, on weights that were saved: a short and the longest prompt
    decoded: tuple[str, ...] = ()
    padded: tuple[tuple[int, ...], ...] = ((1, 128, 129),)


def mixed_depths(per_kv_head: bool) -> dict[int, Any]:
    """Depth 0 for whole layers, for single heads, and by omission; one number, or one per head, up to 9: no tree."""
    depths: dict[int, Any] = {layer: layer % 7 for layer in range(0, LAYERS, 2)}
    for layer in range(1, LAYERS - 2, 2):
        heads = KV_HEADS if per_kv_head and layer % 4 == 1 else HEADS
        depths[layer] = [(layer + 3 * head) % 10 for head in range(heads)]
    return depths  # the last layer is left out


CASES = {
    "untied, query head": Case(
        {"local_window": 32, "num_sink_tokens": 4, "visible_depth": mixed_depths(False)},
        LONG,
        ("adapter", "merged"),
        from_files=("reloaded", "saved"),
        decoded=("merged",),
    ),
    "tied, KV head": Case(
        {
            "tie_query_key": True,
            "route_per": "kv_head",
            "local_window": 128,
            "num_sink_tokens": 0,
            "visible_depth": mixed_depths(True),
        },
        LONG,
        ("merged",),
        padded=(tuple(SHORT), (7, LONG)),
    ),
    "untied, KV head, arity 3": Case(
        {
            "route_per": "kv_head",
            "arity": 3,
            "depth": 5,
            "local_window": 5,
            "num_sink_tokens": 1,
            "visible_depth": {layer: [layer % 7, 0, 5] if layer % 2 else 2 for layer in range(LAYERS)},
        },
        129,
        ("adapter", "saved"),
    ),
    "tied, query head": Case(
        {"tie_query_key": True, "local_window": 1, "num_sink_tokens": 0, "visible_depth": 2},
        129,
        ("adapter", "merged"),
        decoded=("adapter",),
    ),
}


@pytest.fixture(scope="module")
def real() -> tuple[PreTrainedModel, Tensor]:
    """The model's first layers in float64 and 300 tokens of Python's standard library."""
    folder = os.environ.get("TOPO_SMOLLM2", str(REPOSITORY / ".models" / "smollm2-135m"))
    try:
        folder = smollm2(folder)
    except MissingPackageError as missing:
        pytest.skip(f"no real weights: {missing}")
    text = standard_library()[1][0].read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text, verbose=False).input_ids[:LONG])[None]
    assert ids.shape == (1, LONG)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    assert (model.config.num_hidden_layers, model.config.num_attention_heads) == (30, HEADS)
    del model.model.layers[LAYERS:]
    model.config.num_hidden_layers = LAYERS
    return model, ids


@dataclass
class Scene:
    """One case on the real model: the adapter, the stranger and its answer for the longest prompt."""

    case: Case
    base: PreTrainedModel
    adapter: PeftModel
    ids: Tensor
    stranger: Stranger
    records: dict[int, RecordedRoutes]
    logits: Tensor
    forms: dict[str, nn.Module] = field(default_factory=dict)

    def form(self, form: str) -> nn.Module:
        if form not in self.forms:
            self.forms[form] = self._make(form).eval()
        return self.forms[form]

    def _make(self, form: str) -> nn.Module:
        model = twin(self.adapter)
        with tempfile.TemporaryDirectory() as folder:
            if form == "reloaded":
                model.save_pretrained(folder)
                assert (Path(folder) / "adapter_model.safetensors").stat().st_size < 6e6
                return PeftModel.from_pretrained(twin(self.base), folder)
            if form == "merged":
                model.merge_adapter()
            elif form == "saved":
                save_merged(model.merge_and_unload(), folder)
                return load_merged(folder)
        return model


@pytest.fixture(scope="module", params=CASES)
def scene(request: pytest.FixtureRequest, real: tuple[PreTrainedModel, Tensor]) -> Iterator[Scene]:
    case: Case = CASES[request.param]
    base, ids = real
    ids = ids[:, : case.longest]
    adapter = routed(twin(base), seed=1, **{"depth": 8, "router_dim": 32, **case.settings})
    stranger = Stranger(base, case.settings["local_window"], case.settings["num_sink_tokens"])
    records = record_routes(adapter, ids)
    assert sorted(records) == list(range(LAYERS))
    yield Scene(case, base, adapter, ids, stranger, records, stranger.logits(ids, records))


def gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference of finite float64 logits."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == torch.float64
    assert bool(torch.isfinite(ours).all()) and bool(torch.isfinite(theirs).all())
    return float((ours - theirs).abs().max())


@torch.no_grad()
def feed(model: nn.Module, ids: Tensor, chunks: list[int]) -> Tensor:
    """Logits of `ids`, sent in `chunks` through a fresh cache."""
    assert sum(chunks) == ids.shape[1]
    cache = DynamicCache()
    parts = ids.split(chunks, dim=1)
    return torch.cat([model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts], 1)


def test_routes_are_diverse_and_the_mask_bites(scene: Scene) -> None:
    used = max(
        len({tuple(digits) for digits in record.key_digits[0, head].tolist()})
        for record in scene.records.values()
        for head in range(HEADS)
    )
    assert used >= 4
    depths = {depth for record in scene.records.values() for depth in record.visible_depth.tolist()}
    assert (0 in depths and len(depths) > 2) or scene.case.settings["visible_depth"] == 2
    beyond_window = scene.ids[:, :192]
    density = torch.stack(list(measure_density(scene.adapter, beyond_window).values()))
    assert density.max() <= 1 and density.min() < 0.95
    with scene.adapter.disable_adapter():
        dense = logits_of(scene.adapter, beyond_window)
    assert gap(dense, scene.logits[:, :192]) > 1000 * TOLERANCE


def test_every_prompt_in_every_form_is_the_strangers(scene: Scene) -> None:
    longest = scene.case.longest
    every, few = sorted({*SHORT, longest}), [7, longest]
    for form, lengths in [*((f, every) for f in scene.case.forms), *((f, few) for f in scene.case.from_files)]:
        model = scene.form(form)
        for length in lengths:
            largest = gap(logits_of(model, scene.ids[:, :length]), scene.logits[:, :length])
            assert largest <= TOLERANCE, (form, length)


def test_token_by_token_is_the_strangers(scene: Scene) -> None:
    """The prompts of 1, 7, 127 and 128 tokens are steps on the way to 129; the tokens from 41 to 126 come at once."""
    for form in scene.case.decoded:
        model = scene.form(form)
        assert gap(feed(model, scene.ids[:, :129], [*[1] * 40, 86, *[1] * 3]), scene.logits[:, :129]) <= TOLERANCE
        if scene.case.longest == LONG:
            assert gap(feed(model, scene.ids, [LONG - 10, *[1] * 10]), scene.logits) <= TOLERANCE


def test_left_padded_batch_is_the_strangers(scene: Scene) -> None:
    for lengths in scene.case.padded:
        longest = max(lengths)
        ids, mask = torch.zeros(len(lengths), longest, dtype=torch.long), torch.zeros(len(lengths), longest).long()
        for row, length in enumerate(lengths):
            ids[row, longest - length :] = scene.ids[0, :length]
            mask[row, longest - length :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # as generate() counts them
        ours = logits_of(scene.form(scene.case.forms[0]), ids, attention_mask=mask, position_ids=positions)
        for row, length in enumerate(lengths):
            largest = gap(ours[row : row + 1, longest - length :], scene.logits[:, :length])
            assert largest <= TOLERANCE, length


@pytest.fixture(scope="module")
def shorter(scene: Scene) -> tuple[Tensor, dict[int, RecordedRoutes]]:
    """192 tokens and their routes, to which the stranger answers as before."""
    ids = scene.ids[:, :192]
    length = ids.shape[1]
    records = {
        layer: RecordedRoutes(
            r.query_digits[:, :, :length], r.key_digits[:, :, :length], r.visible_depth, r.visits[..., :length]
        )
        for layer, r in scene.records.items()
    }
    assert gap(scene.stranger.logits(ids, records), scene.logits[:, :length]) <= TOLERANCE
    return ids, records


@pytest.mark.parametrize("change", ["depth", "window"])
def test_negative_control(scene: Scene, shorter: tuple[Tensor, dict[int, RecordedRoutes]], change: str) -> None:
    """A stranger whose window or depths are off by one is told apart, by a thousand times the tolerance."""
    ids, records = shorter
    off = {"depth": 1} if change == "depth" else {"window": scene.stranger.window + 1}
    assert gap(scene.stranger.logits(ids, records, **off), scene.logits[:, : ids.shape[1]]) > 1000 * TOLERANCE
