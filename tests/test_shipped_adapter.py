"""The adapter in `examples/` on the real SmolLM2-135M: what its card says holds for the code that is here."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from topo_adapter.layer import hosts
from topo_evaluation.baselines import Window
from topo_evaluation.embedded import smollm2
from topo_evaluation.measures import (
    Case,
    Scores,
    copy_windows,
    density_map,
    gap_recovered,
    merged_at,
    score,
    score_baseline,
    score_dense,
)
from topo_evaluation.texts import text_windows

pytestmark = pytest.mark.real

REPOSITORY = Path(__file__).parents[1]
EXAMPLE = REPOSITORY / "examples" / "smollm2-135m-topology"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def adapter() -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    return PeftModel.from_pretrained(base, EXAMPLE).eval()


@pytest.fixture(scope="module")
def wikitext(adapter: PeftModel) -> tuple[Case, Scores]:
    """1,024 tokens of WikiText-2, and what the dense model scores on them."""
    windows = text_windows("wikitext2", AutoTokenizer.from_pretrained(smollm2()), 1024, 1, seed=0)
    case = Case("wikitext2", windows, copy_windows(windows, 128))
    return case, score_dense(adapter, case)


def test_it_is_small_and_holds_routers_alone() -> None:
    file = EXAMPLE / "adapter_model.safetensors"
    assert file.stat().st_size < 2e6
    for name, weight in load_file(file).items():
        assert ".self_attn.topo_adapter." in name and weight.float().isfinite().all()
        assert weight.dtype == (torch.bfloat16 if name.endswith(".bias") else torch.float8_e4m3fn)


def test_quality(adapter: PeftModel, wikitext: tuple[Case, Scores]) -> None:
    """Near the dense model, where window and sinks are far off and cannot copy."""
    case, dense = wikitext
    local = score_baseline(adapter, case, lambda: Window(128, 4))
    with merged_at(adapter, 0.1):  # of the calibrated 8,192 tokens
        found = score(adapter.get_base_model(), case)
        maps = density_map(adapter.get_base_model(), case.windows)
    density = statistics.fmean(value for heads in maps.values() for value in heads)
    assert 0.24 < density < 0.34
    over = {name: math.log(x["perplexity"] / dense["perplexity"]) for name, x in (("ours", found), ("window", local))}
    assert over["ours"] < 0.04 and over["window"] > 0.2
    copied = gap_recovered(local["copy_loss"], found["copy_loss"], dense["copy_loss"])
    assert copied is not None and copied > 0.9


# ---------------------------------------------------------------- by the README's lines, in an empty folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache that holds the base under its hub id, as if it had been downloaded."""
    home = tmp_path_factory.mktemp("hub")
    repository = home / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for file in Path(smollm2()).resolve().iterdir():
        (snapshot / file.name).symlink_to(file)
    return home


def run_elsewhere(script: str, folder: Path, hub: Path) -> str:
    """What a script prints, run offline from a folder that is not the repository's."""
    environment = {**os.environ, "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def snippet(text: str, beginning: str) -> str:
    """The one Python block that follows `beginning`."""
    found = re.search(re.escape(beginning) + r".*?```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1].replace('"examples/', f'"{REPOSITORY}/examples/')  # the reader stands in the repository


def test_the_readmes_lines_use_it(hub: Path, tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    lines = snippet(readme, "\nUse it.")
    assert "import topo_adapter" in lines and "merge_adapter()" in lines and HUB_ID in lines
    printed = run_elsewhere(lines, tmp_path, hub).strip()
    assert printed and f"`{printed}`" in readme, f"README says what it prints: {printed!r}"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2-sparse")  # topo_adapter is imported here too
    config = again.model.layers[0].self_attn.topo_adapter.topology_config
    assert len(hosts(again)) == 30 and 0.17 < config.target_density < 0.3  # at 8,192 tokens


def test_the_readmes_question_is_answered(adapter: PeftModel) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = re.search(
        r"```sh\n(\(echo .*?\)) \| topo generate \S+ --prompt - --max-new-tokens (\d)\n```", readme, re.DOTALL
    )
    assert found is not None
    text = subprocess.run(["bash", "-c", found[1]], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    prompt = tokenizer(text, return_tensors="pt")
    assert prompt.input_ids.shape[1] > 2200
    adapter.merge_adapter()
    ids = adapter.generate(**prompt, max_new_tokens=int(found[2]), do_sample=False)
    adapter.unmerge_adapter()
    assert f"`{tokenizer.decode(ids[0, prompt.input_ids.shape[1] :])}`" in readme


def test_the_cards_lines_use_it(hub: Path, tmp_path: Path) -> None:
    lines = snippet((EXAMPLE / "README.md").read_text(encoding="utf-8"), "\n# Learned sparse")
    more = f"""
assert model.base_model.model.model.layers[0].self_attn.topo_adapter.merged
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained({str(EXAMPLE)!r})
print(model.peft_config["default"].target_density, type(model.peft_config["default"].visible_depth).__name__)
"""
    assert run_elsewhere(lines + more, tmp_path, hub).split() == ["0.17", "dict"]


def test_it_runs_its_own_density_however_it_is_run(adapter: PeftModel, wikitext: tuple[Case, Scores]) -> None:
    """Unmerged as loaded, and by a plain merge, as the card says of its density."""
    config = json.loads((EXAMPLE / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["target_density"], config["visible_depth"]) == (
        HUB_ID,
        0.17,
        None,
    )
    with_copies, dense = wikitext
    case = replace(with_copies, copies=None)
    unmerged = score(adapter.get_base_model(), case)["perplexity"]
    maps = density_map(adapter.get_base_model(), case.windows)
    adapter.merge_adapter()
    try:
        merged = score(adapter.get_base_model(), case)["perplexity"]
    finally:
        adapter.unmerge_adapter()
    assert merged == pytest.approx(unmerged, rel=1e-4)
    assert math.log(merged / dense["perplexity"]) < 0.02
    density = statistics.fmean(value for heads in maps.values() for value in heads)
    assert 0.32 < density < 0.4  # of 1,024 tokens, .17 of 8,192
