"""The adapter in `examples/` on the real SmolLM2-135M: what its card says holds for the code that is here."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
from baselines import Window
from embedded import smollm2
from measures import Case, copy_windows, density_map, gap_recovered, merged_at, score, score_baseline, score_dense
from texts import text_windows

sys.path.remove(str(Path(__file__).parents[1] / "recipes"))

pytestmark = pytest.mark.real

EXAMPLE = Path(__file__).parents[1] / "examples" / "smollm2-135m-topology"


@pytest.fixture(scope="module")
def adapter() -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    return PeftModel.from_pretrained(base, EXAMPLE).eval()


def test_it_is_small_and_holds_routers_alone() -> None:
    file = EXAMPLE / "adapter_model.safetensors"
    assert file.stat().st_size < 2e6
    for name, weight in load_file(file).items():
        assert ".self_attn.topo_adapter." in name and weight.float().isfinite().all()
        assert weight.dtype == (torch.bfloat16 if name.endswith(".bias") else torch.float8_e4m3fn)


def test_quality(adapter: PeftModel) -> None:
    """1,024 tokens of WikiText-2: near the dense model, where window and sinks are far off and cannot copy."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    windows = text_windows("wikitext2", tokenizer, 1024, 1, seed=0)
    case = Case("wikitext2", windows, copy_windows(windows, 128))
    dense, local = score_dense(adapter, case), score_baseline(adapter, case, lambda: Window(128, 4))
    with merged_at(adapter, 0.1):  # of the calibrated 8,192 tokens
        found = score(adapter.get_base_model(), case)
        maps = density_map(adapter.get_base_model(), windows)
    density = statistics.fmean(value for heads in maps.values() for value in heads)
    assert 0.24 < density < 0.34
    over = {name: math.log(x["perplexity"] / dense["perplexity"]) for name, x in (("ours", found), ("window", local))}
    assert over["ours"] < 0.04 and over["window"] > 0.2
    copied = gap_recovered(local["copy_loss"], found["copy_loss"], dense["copy_loss"])
    assert copied is not None and copied > 0.9
