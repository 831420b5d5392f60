"""`recipes/ablations.py`: variants differ in what they say, and the table says what was measured."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_helpers import routed, tiny, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from topo_adapter import TopologyConfig, TopologyConfigError, calibrate
from topo_adapter.training.recipe import DistillConfig

pytest.importorskip("trl")
from trl import SFTConfig

from recipes.ablations import PAPER, VARIANTS, AblationArguments, Variant, cases_of, main, table, train
from topo_evaluation.depths import over_depths
from topo_evaluation.results import flat, make_row, origin, read
from topo_evaluation.texts import text_windows

VOCAB = 64


def base() -> Any:
    return tiny(num_hidden_layers=2, vocab_size=VOCAB)


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(
        models.WordLevel({"<unk>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}, unk_token="<unk>")
    )
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def arguments(tmp_path: Path) -> AblationArguments:
    base().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    for name, seed in (("train", 1), ("test", 2)):
        words = " ".join(f"w{max(token, 2)}" for token in tokens(1, 800, seed=seed)[0].tolist())
        (tmp_path / f"{name}.txt").write_text(words)
    return AblationArguments(
        output=str(tmp_path / "out" / "lines.jsonl"),
        variants=["default", PAPER, "sft_lora"],
        model=str(tmp_path / "base"),
        length=48,
        local_steps=1,
        kl_steps=1,
        densities=[0.5, 0.02],
        texts=[str(tmp_path / "test.txt")],
        windows=2,
        text_files=[str(tmp_path / "train.txt")],
        local_window=4,
    )


def test_variants_are_fields_of_the_two_configurations() -> None:
    for variant in VARIANTS.values():
        TopologyConfig(**variant.topology)
        DistillConfig(use_cpu=True, **variant.training)
        SFTConfig(use_cpu=True, bf16=False, **variant.sft or {})
    assert VARIANTS["default"] == Variant()
    assert len({json.dumps(asdict(v)) for v in VARIANTS.values()}) == len(VARIANTS)


def test_unknown_variants_are_refused() -> None:
    with pytest.raises(TopologyConfigError, match=r"variants must be of default, .*, got \['bold'\]"):
        AblationArguments(variants=["default", "bold"])


def test_main_trains_measures_and_reports(arguments: AblationArguments, capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments)
    rows = read(arguments.output)
    assert list(dict.fromkeys(row["settings"]["variant"] for row in rows)) == arguments.variants
    for variant in arguments.variants:
        found = [flat(row) for row in rows if row["settings"]["variant"] == variant]
        assert found[0]["seconds"] > 0 and all(row["homotopy"] == 1.0 for row in found)
        (low,) = (row for row in found if row.get("target") == 0.02)
        assert "density" not in low and "target_density must be" in low["note"]
        depths = [row["density"] for row in found if row.get("uniform_depth") is not None]
        assert len(depths) == 8 and depths == sorted(depths, reverse=True)
    printed = capsys.readouterr().out
    assert printed.count("not reached") >= 2
    main(replace(arguments, report_only=True))
    assert capsys.readouterr().out.strip() in printed
    assert len(read(arguments.output)) == len(rows)


def test_the_paper_starts_dense_and_trains_on_the_language_model_loss(arguments: AblationArguments) -> None:
    adapter = train(PAPER, base(), tokenizer(), replace(arguments, local_steps=0, kl_steps=1))
    config = adapter.peft_config["default"]
    assert config.tie_query_key and config.gradient_bridge == "masked" and config.init_weights == "collapse"
    for *tree, treeless in (row for heads in config.calibration["density"].values() for row in heads):
        assert tree == [1.0] * 9 and treeless < 1


def test_evaluation_is_of_the_merged_adapter(arguments: AblationArguments) -> None:
    adapter = routed(base(), depth=3, local_window=4, num_sink_tokens=2, task_type="CAUSAL_LM")
    calibrate(adapter, tokens(2, 48, seed=5))
    measured = list(over_depths(adapter, cases_of(adapter, tokenizer(), arguments), [1.0, 0.6]))
    assert [at["target"] for at, _ in measured] == [1.0, 0.6, None, None, None]
    found = {at["uniform_depth"]: scores for at, scores in measured}
    assert list(found) == [None, 1, 2, 3]
    (_, whole), (_, part), *_ = measured
    assert whole["over_dense_percent"] == pytest.approx(0, abs=1e-3)
    assert whole["density"] == 1.0 and part["density"] < 0.8
    assert not adapter.base_model.model.model.layers[0].self_attn.topo_adapter.merged  # left as it was
    adapter.peft_config["default"].visible_depth = 2
    adapter.merge_adapter()
    ids = text_windows(arguments.texts[0], tokenizer(), 48, 2)
    with torch.no_grad():
        loss = torch.stack([adapter(input_ids=row[None], labels=row[None]).loss for row in ids]).mean()
    adapter.unmerge_adapter()
    with adapter.disable_adapter(), torch.no_grad():
        dense = torch.stack([adapter(input_ids=row[None], labels=row[None]).loss for row in ids]).mean()
    expected = 100 * ((loss - dense).exp().item() - 1)
    assert found[2]["over_dense_percent"] == pytest.approx(expected, abs=0.01)


def test_table_takes_the_uniform_depth_nearest_to_the_first_target() -> None:
    row = {"density": 0.1, "over_dense_percent": 5.0, "gap_recovered": 0.5}
    where = origin(None, "cpu")
    settings = {"variant": "default", "seed": 3, "length": 4096}
    rows = [make_row(where, "ablation_training", settings, {"seconds": 7.2})]
    for target, depth, density in ((0.1, None, 0.1), (None, 1, 0.4), (None, 2, 0.12)):
        at = {"target": target, "uniform_depth": depth}
        rows.append(make_row(where, "ablation", settings | at, row | {"density": density}))
    assert table(rows).splitlines()[-1] == (
        "| default | 3 | 7 | +5.00 % (0.100), copy 0.50 | 2: +5.00 % (0.120), copy 0.50 |"
    )
