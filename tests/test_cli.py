"""The `topo` command, on tiny models."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_helpers import routed, tiny, tokens
from test_recipe import tokenizer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import topo_adapter
from topo_adapter import calibrate
from topo_adapter.core.dial import choose, expected_loss
from topo_cli import app, saved

PROMPT = "w2 w3 w4 w5 w6 w7 w8 w9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` with its tokenizer, and `adapter`, calibrated, which names it."""
    where = tmp_path_factory.mktemp("cli")
    tiny().save_pretrained(where / "base")
    tokenizer().save_pretrained(where / "base")
    model = routed(AutoModelForCausalLM.from_pretrained(where / "base"), depth=3, local_window=4, task_type="CAUSAL_LM")
    calibrate(model, tokens(2, 60))
    model.save_pretrained(where / "adapter")
    return where


def topo(*arguments: Any) -> Any:
    return CliRunner().invoke(app.app, list(map(str, arguments)))


def test_inspect_shows_the_dial(folder: Path) -> None:
    found = topo("inspect", folder / "adapter")
    config = topo_adapter.TopologyConfig.from_pretrained(folder / "adapter")
    assert found.exit_code == 0 and str(folder / "base") in found.output.replace("\n", "")
    assert "depth 3: 8 leaves" in found.output and "16 heads in 4 layers" in found.output
    for density in (0.5, 1.0):
        loss = expected_loss(config.calibration, choose(config.calibration, density))
        (row,) = (line for line in found.output.splitlines() if f" {density:.3f} " in line and "│" in line)
        assert f" {loss:.4f} " in row


def test_inspect_obeys_no_file(folder: Path, tmp_path: Path) -> None:
    """A terminal's commands, and rich's, in a file from anywhere."""
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"base_model_name_or_path": "[red]a\x1b[2J[/red]"}))
    assert "[red]a?[2J[/red]" in topo("inspect", tmp_path / "adapter").output


def test_inspect_of_an_adapter_without_a_dial(tmp_path: Path) -> None:
    routed(tiny()).save_pretrained(tmp_path)
    assert "not calibrated" in topo("inspect", tmp_path).output


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_why_not_says_so_and_ends_with_1(folder: Path, what: str) -> None:
    found = topo("why-not", folder / what, "--device", "cpu")
    assert found.exit_code == 1
    assert "attend, layers 0 to 3: the device must be a CUDA GPU, got cpu" in found.output
    assert "homotopy" not in found.output


def test_merged_it_generates_what_the_adapter_does(folder: Path, tmp_path: Path) -> None:
    found = topo("merge", folder / "adapter", tmp_path / "merged", "--density", 0.6)
    assert found.exit_code == 0, found.output
    texts = {
        what: topo("generate", where, "--prompt", PROMPT, "--max-new-tokens", 6, "--density", 0.6, "--device", "cpu")
        for what, where in (("merged", tmp_path / "merged"), ("adapter", folder / "adapter"))
    }
    model = topo_adapter.load(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
    model.merge_adapter(target_density=0.6)
    inputs = tokenizer()(PROMPT, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(input_ids=inputs.input_ids, max_new_tokens=6, do_sample=False)
    expected = tokenizer().decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert expected
    assert {what: text.stdout.strip().splitlines()[-1] for what, text in texts.items()} == dict.fromkeys(
        texts, expected
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "base"], "must be a directory or hub id with an adapter_config.json"),
        (["inspect", "nothing/at/all"], "nothing/at/all"),
        (["merge", "adapter", "out", "--density", "0.0001"], "target_density must be at least"),
        (["merge", "adapter", "base"], "output must hold no model or adapter yet"),
        (["generate", "adapter", "--prompt", ""], "prompt must be a text"),
        (["generate", "adapter", "--prompt", "w2", "--length", "9"], "without density"),
        (["generate", "adapter", "--prompt", "w2", "--chat", "--device", "cpu"], "chat_template"),
        (["why-not", "base", "--base", "base"], "base must be left out"),
        (["why-not", "base", "--device", "gpu"], "device must be auto"),
        (["why-not", "base", "--dtype", "int8"], "dtype must be auto"),
        (["why-not", "."], "config.json"),
    ],
)
def test_errors_are_one_line_and_end_with_2(
    folder: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["topo", *arguments])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err and not (folder / "out").exists()


def test_layers_are_told_in_ranges() -> None:
    assert saved._ranges([5, 0, 1, 2, 7, 8]) == "0 to 2, 5, 7 to 8"
