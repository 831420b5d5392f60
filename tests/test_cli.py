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
from topo_evaluation import embedded

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


def test_embedded_is_a_base_everywhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "smollm2", lambda: str(folder / "base"))
    found = topo("why-not", "embedded", "--device", "cpu")
    assert found.exit_code == 1 and "attend, layers 0 to 3" in found.output
    config = lost_base(folder, tmp_path)
    given = ["--prompt", PROMPT, "--max-new-tokens", 4, "--device", "cpu"]
    expected = topo("generate", folder / "adapter", *given).stdout.strip().splitlines()[-1]
    found = topo("generate", config.parent, *given, "--base", "embedded")
    assert found.stdout.strip().splitlines()[-1] == expected
    dense = ["--dense-until", 1]  # every token sees itself anyway
    assert topo("merge", config.parent, tmp_path / "merged", "--base", "embedded", *dense).exit_code == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dense_until"] == 1
    found = topo("generate", tmp_path / "merged", *given)
    assert found.stdout.strip().splitlines()[-1] == expected


def lost_base(folder: Path, tmp_path: Path) -> Path:
    """adapter_config.json of a copy of the adapter that names a base which is not there."""
    shutil.copytree(folder / "adapter", tmp_path / "lost")
    file = tmp_path / "lost" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": ".moved/base"}))
    return file


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["generate", "lost", "--prompt", "w2"], "--base"),
        (["merge", "lost", "out"], "--base"),
        (["why-not", "lost"], "--base"),
        (["evaluate", "lost", "--lengths", "32"], "--model"),
        (["bench", "lost", "--lengths", "32"], "--base"),
    ],
)
def test_a_base_that_is_not_there(
    folder: Path,
    command: list[str],
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lost_base(folder, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["topo", *command])
    with pytest.raises(SystemExit) as ended:
        app.main()
    said = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2
    assert "lost names the base '.moved/base', which must be a directory" in said
    assert "Name a copy of the base with" in said and option in said


def test_a_merged_model_without_its_tokenizer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = topo_adapter.load(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    monkeypatch.setattr(sys, "argv", ["topo", "generate", str(tmp_path / "merged"), "--prompt", PROMPT])
    with pytest.raises(SystemExit) as ended:
        app.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "must hold a tokenizer beside the model" in said and ".save_pretrained(" in said


def test_what_an_adapter_calls_its_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(embedded, "smollm2", lambda: "base")
    model = topo_adapter.load(AutoModelForCausalLM.from_pretrained("base"), "adapter")
    for name, recorded in (
        ("embedded", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        (None, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("base", str(folder / "base")),
        ("some/repository", "some/repository"),
    ):
        embedded.record_base(model, name)
        assert model.peft_config["default"].base_model_name_or_path == recorded


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
