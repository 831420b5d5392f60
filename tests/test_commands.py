"""The commands of `topo` that train and measure, on tiny models; those for saved adapters are in test_cli.py."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftModel
from peft_helpers import tiny
from safetensors.torch import load_file
from test_evaluate import adapted
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from topo_adapter import DistillConfig
from topo_cli import app, options, train
from topo_evaluation import bench, demo, embedded
from topo_evaluation.baselines import LongerWindow, attending
from topo_evaluation.measures import config_of, next_token_losses
from topo_evaluation.results import read

REPOSITORY = Path(__file__).parents[1]
SMALL = {"depth": 3, "visible-depth": 2, "local-window": 3, "num-sink-tokens": 2}
ON_A_CPU = {"use-cpu": True, "bf16": False, "dtype": "float32", "report-to": "none", "save-strategy": "no"}
TINY = {
    **{"max-length": 96, "num-queries": 8, "calibration-rows": 2, "lowest-density": 0.4, "highest-density": 0.8},
    **{"router-dim": 8, "kl-steps": 1},
}


def as_given(options: dict[str, Any]) -> list[str]:
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, which reads bytes, `adapter`, calibrated, which names it, and `a.txt`."""
    path = tmp_path_factory.mktemp("commands")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<pad>", "<s>", "</s>", *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>").save_pretrained(path / "base")
    tiny(num_hidden_layers=2, vocab_size=259, max_position_embeddings=1024).save_pretrained(path / "base")
    adapter = adapted()
    adapter.peft_config["default"].base_model_name_or_path = str(path / "base")
    adapter.save_pretrained(path / "adapter")
    words = random.Random(0)
    for name in "ab":
        text = " ".join(words.choice(["tree", "ball", "leaf", "root"]) for _ in range(600))
        (path / f"{name}.txt").write_text(text)
    return path


def topo(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    """Runs `topo` as a shell does; its exit code."""
    monkeypatch.setattr(sys, "argv", ["topo", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        app.main()
    return int(ended.value.code or 0)


# ---------------------------------------------------------------- training


def test_distill_does_what_the_recipe_does(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    trl = pytest.importorskip("trl")
    from recipes import distill as recipe

    monkeypatch.chdir(folder)  # the adapter is to name its base by the whole path
    (tmp_path / "local.yaml").write_text("local_steps: 2\nkl_steps: 7\n")
    given = [*as_given(TINY | SMALL | ON_A_CPU), "--config", tmp_path / "local.yaml", "--output_dir"]
    assert topo(monkeypatch, "distill", "base", folder / "a.txt", *given, tmp_path / "command") == 0
    said = " ".join(capfd.readouterr().err.split())
    for sentence in (
        *("Stage 1 of 2", "2 steps of 1 window(s) of 96 tokens", "Stage 2 of 2", "1 steps, with 1 calibrations on the"),
        *("Calibrating", "one last calibration, on all 2 window(s)"),
    ):
        assert sentence in said, sentence
    assert "pin_memory" not in said
    config = json.loads((tmp_path / "command" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "base")
    kinds = (recipe.TextArguments, DistillConfig, trl.ModelConfig, recipe.TopologyArguments)
    named = ["--model_name_or_path", folder / "base", "--text_files", folder / "a.txt", *given, tmp_path / "recipe"]
    recipe.main(*trl.TrlParser(kinds).parse_args_and_config(list(map(str, named))))
    command, same = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("command", "recipe"))
    assert command.keys() == same.keys() and all(
        torch.equal(weight.float(), same[name].float()) for name, weight in command.items()
    )
    assert (tmp_path / "command" / "training.png").stat().st_size > 5000


def test_sft_trains_and_shows_its_table(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset

    for split in ("train", "test"):
        Dataset.from_dict({"text": ["trees and leaves " * 4] * 4}).to_json(tmp_path / "task" / f"{split}.jsonl")
    monkeypatch.setattr(embedded, "smollm2", lambda: str(folder / "base"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # PEFT would look there for the base's config
    task = {"max-steps": 2, "max-length": 48, "densities": 0.7, "per-device-train-batch-size": 2}
    given = as_given(task | SMALL | ON_A_CPU)
    assert topo(monkeypatch, "sft", "embedded", tmp_path / "task", *given, "--output-dir", tmp_path / "out") == 0
    found = capfd.readouterr()
    rows = [line.strip("| ").split(" | ") for line in found.out.splitlines() if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == ["base", "trained, density 0.7"] and float(rows[2][1]) > 0
    assert "Training routers on the loss of 4 rows" in " ".join(found.err.split())
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == embedded.HUB_ID


class Called(Exception):
    """Holds the arguments that `distill` was called with."""


def test_the_line_for_a_cpu_trains_as_the_demo_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As README and the guide print it."""
    pytest.importorskip("trl")

    def called(*args: Any, **kwargs: Any) -> None:
        raise Called(*args)

    lines = {
        re.findall(r"topo distill embedded my-texts/\*\.txt ([^`\n]+)", (REPOSITORY / name).read_text())[0]
        for name in ("README.md", "docs/guide/train.md")
    }
    (line,) = lines
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(embedded, "smollm2", lambda: str(folder / "base"))
    monkeypatch.setattr(train, "distill_", called)
    monkeypatch.setattr(sys, "argv", ["topo", "distill", "embedded", str(folder / "a.txt"), *line.split()])
    with pytest.raises(Called) as ours:
        app.main()
    monkeypatch.setattr(demo, "distill", called)
    monkeypatch.setattr(demo, "windows", lambda *args: torch.zeros(1, 1))
    base, settings = AutoModelForCausalLM.from_pretrained(folder / "base"), demo.DemoSettings()
    with pytest.raises(Called) as theirs:
        demo.train(settings, base, None)  # type: ignore[arg-type]
    (_, _, config, training), (_, _, wanted, demos) = ours.value.args, theirs.value.args
    assert config == wanted and training.max_length == settings.train_length
    differing = {f.name for f in fields(demos) if f.init and getattr(demos, f.name) != getattr(training, f.name)}
    assert differing <= {"output_dir", "max_length", "lowest_density", "highest_density", "target_density", "seed"}
    for name in ("lowest_density", "highest_density"):
        assert getattr(training, name) == pytest.approx(getattr(demos, name), abs=1e-3)


@pytest.mark.parametrize("name", ["distill", "sft"])
def test_the_recipes_yaml_means_the_same(name: str) -> None:
    """Both parsers make the same objects of it."""
    trl = pytest.importorskip("trl")
    from topo_evaluation.training import TaskArguments, TextArguments, TopologyArguments

    first, training = {"distill": (TextArguments, DistillConfig), "sft": (TaskArguments, trl.SFTConfig)}[name]
    kinds = (first, training, trl.ModelConfig, TopologyArguments)
    given = ["--config", str(REPOSITORY / "recipes" / f"{name}.yaml"), "--seed", "3", "--depth", "5"]
    ours = options.Options(kinds, name, "", {}).parse(given)
    for mine, theirs in zip(ours, trl.TrlParser(kinds).parse_args_and_config(list(given)), strict=True):
        assert {f.name: getattr(mine, f.name) for f in fields(mine)} == {
            f.name: getattr(theirs, f.name) for f in fields(theirs) if f.name != "logging_dir"
        }


def test_help_shows_ours_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    assert topo(monkeypatch, "distill", "--help") == 0
    short = capsys.readouterr().out
    assert short.index("--local-window") < short.index("--kl-steps") and "--adam-beta1" not in short
    assert topo(monkeypatch, "distill", "--help-all") == 0
    whole = capsys.readouterr().out
    assert whole.index("--kl-steps") < whole.index(options._INHERITED) < whole.index("--adam-beta1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill", "base", "--nonsense", "1"], "options must be of this command, got --nonsense 1"),
        (["distill", "base", "--config", "bad.yaml"], "keys of bad.yaml must be options of this command, got speling"),
        (["distill", "base", "--config"], "--config must be followed by a YAML file"),
        (["distill", "base", "--config", "list.yaml"], "list.yaml must be a YAML mapping of options, got list"),
        (["distill", "base", "--depth", "many"], "--depth"),
        (["distill", "base", "one/set", "other/set"], "DATASET must be text files or one data set"),
        (["distill", "--kl-steps", "1"], "MODEL must be a hub id, a directory or 'embedded', got none"),
        (["distill", "nothing/at/all", "a.txt"], "nothing/at/all"),
        (["sft", "base", "--dataset-name", "base", "--dataset-streaming"], "dataset_streaming must be false"),
        (["evaluate"], "adapter"),
        (["evaluate", "adapter", "--densities", "2"], "densities must be"),
        (["bench", "base", "--base", "base"], "base must be left out where base is no adapter"),
        (["bench", "base", "--batch", "0"], "batch must be an integer >= 1"),
        (["bench", "base", "--text", "a.txt", "--lengths", "100000"], "text must hold batch = 1 windows of 100000"),
        (["demo", "--density", "0"], "target_density must be a number in (0, 1]"),
        (["demo", "--eval-length", "31"], "eval_length must be at least twice local_window"),
    ],
)
def test_errors_are_one_line_and_end_with_2(
    folder: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("trl")
    monkeypatch.chdir(folder)
    Path("bad.yaml").write_text("speling: 1\n")
    Path("list.yaml").write_text("- 1\n")
    assert topo(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


@pytest.mark.parametrize(("command", "extra"), [("distill", "train"), ("sft", "train"), ("demo", "evaluation")])
def test_a_missing_extra_is_named(
    command: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert topo(monkeypatch, command, "embedded") == 2
    assert f"pip install 'topo-adapter[{extra}]'" in capsys.readouterr().err


# ---------------------------------------------------------------- measuring


def test_evaluate_writes_its_table(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--lengths", 64, "--densities", 0.5, "--windows", 1, "--no_needle", "--no_generate", "--device", "cpu"]
    given += ["--texts", folder / "a.txt", "--output-dir", tmp_path]
    assert topo(monkeypatch, "evaluate", folder / "adapter", *given) == 0
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert {row["settings"]["method"] for row in read(tmp_path / "results.jsonl") if row["what"] == "quality"} == {
        "dense",
        "window + sinks",
        "adapter",
    }


def test_bench_times_dense_beside_sparse(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--lengths", 64, "--densities", 0.01, 0.5, "--batch", 2, "--repeats", 1, "--new-tokens", 2]
    given += ["--text", folder / "a.txt", "--device", "cpu", "--output", tmp_path / "rows.jsonl"]
    assert topo(monkeypatch, "bench", folder / "adapter", *given) == 0
    table = capsys.readouterr().out
    rows = read(tmp_path / "rows.jsonl")
    assert [row["settings"]["method"] for row in rows] == ["dense", "adapter", "adapter"]
    for row in rows:
        if row["settings"]["target"] == 0.01:
            assert not row["metrics"] and "must be" in row["note"]
            continue
        assert row["metrics"]["prefill_seconds"] > 0
        assert row["metrics"]["tokens_per_s"] == pytest.approx(2e3 / row["metrics"]["decode_ms"])
    assert rows[0]["metrics"]["density"] == 1 and 0.2 < rows[2]["metrics"]["density"] < 0.7
    assert rows[0]["machine"]["name"] in table and f"torch {torch.__version__}" in table
    assert "not reached" in table and bench._RANDOM_NOTE not in table


def test_bench_of_a_model_takes_the_depth_of_a_density(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Window and sinks show 0.44 of 512 tokens; a digit more halves the rest."""
    monkeypatch.setattr(embedded, "smollm2", lambda: str(folder / "base"))
    settings = bench.BenchSettings(
        "embedded",
        lengths=[512],
        densities=[0.2, 0.58, 0.72],
        repeats=1,
        new_tokens=1,
        text=str(folder / "a.txt"),
        device="cpu",
    )
    rows = bench.bench(settings)
    _, below, quarter, half = rows
    assert bench._RANDOM_NOTE in bench.report(rows)
    assert not below["metrics"] and "must be above 0.4" in below["note"]
    assert quarter["metrics"]["density"] == pytest.approx(0.58, abs=0.04)
    assert half["metrics"]["density"] == pytest.approx(0.72, abs=0.04)


# ---------------------------------------------------------------- the demo


@pytest.fixture(scope="module")
def shown(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[demo.DemoSettings, list[Any]]]:
    settings = demo.DemoSettings(
        model=str(folder / "base"),
        output_dir=str(tmp_path_factory.mktemp("demo")),
        train_length=64,
        local_steps=1,
        kl_steps=1,
        eval_length=400,
        eval_windows=2,
        density=0.5,
        local_window=8,
        depth=3,
        router_dim=8,
    )
    few = ([folder / "a.txt"], [folder / "b.txt"])  # bytes of the whole standard library take half a minute
    with mock.patch.object(demo, "standard_library", lambda: few):
        yield settings, demo.demonstrate(settings)


def test_the_demo_shows_everything(shown: Any) -> None:
    settings, rows = shown
    assert rows == read(Path(settings.output_dir) / "results.jsonl")
    by = {what: [row for row in rows if row["what"] == what] for what in ("demo", "needle", "continuation", "run")}
    dense, sparse, window = (row["metrics"] for row in by["demo"])
    assert [row["settings"]["method"] for row in by["demo"]][:2] == ["dense", "adapter, merged"]
    assert dense["density"] == 1 and sparse["density"] == pytest.approx(0.5, abs=0.1)
    assert window["density"] == pytest.approx(sparse["density"], abs=0.02), "at equal density"
    assert len({dense["loss"], sparse["loss"], window["loss"]}) == 3
    assert all(row["prefill_seconds"] > 0 and row["decode_ms"] > 0 for row in (dense, sparse, window))
    reach = int(by["demo"][2]["settings"]["method"].split()[2])
    assert by["needle"] and all(row["settings"]["distance"] > reach for row in by["needle"])
    for row in by["needle"]:
        assert row["metrics"]["needle_exact"] == (row["note"] == row["settings"]["expected"])
    assert len(by["continuation"]) == 3 and by["run"][0]["metrics"]["adapter_bytes"] > 0
    text = demo.report(rows)
    assert "nats per token" in text and all(repr(row["note"]) in text for row in by["continuation"])
    assert (Path(settings.output_dir) / "routing.png").stat().st_size > 5000


def test_the_demo_s_window_is_the_baseline(shown: Any, folder: Path) -> None:
    """Window and sinks alone, run by the merged adapter, are what topo_evaluation's baseline is."""
    settings, _ = shown
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapter = PeftModel.from_pretrained(base, str(Path(settings.output_dir) / "adapter")).eval()
    row, config = torch.randint(3, 259, (200,), generator=torch.Generator().manual_seed(0)), config_of(adapter)
    before = config.local_window, config.visible_depth
    with demo.window_alone(adapter, 40):
        found = next_token_losses(base, row)
    assert (config.local_window, config.visible_depth) == before
    same = LongerWindow(1, config.num_sink_tokens, 200, 0.1)
    same.window = 40
    with adapter.disable_adapter(), attending(base, same):
        torch.testing.assert_close(found, next_token_losses(base, row))
    with demo.merged(adapter):
        assert not torch.allclose(found, next_token_losses(base, row))
