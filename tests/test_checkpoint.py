"""Merged models on disk: they come back sparse, or are refused by name; never dense, never with foreign code."""

import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from peft_helpers import logits_of, routed, tiny, tokens
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from topo_adapter import MergeError, TopologyConfig, UnsupportedModelError, load_merged, save_merged
from topo_adapter.checkpoint import MergedModel
from topo_adapter.layer import hosts

IDS = tokens(2, 24)


def merged(family: str = "llama", **settings: Any) -> Any:
    return routed(tiny(family), **settings).merge_and_unload()


def file_names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved merged model, and a tokenizer beside it."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2").save_pretrained(tmp_path / "m")
    merged().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


# ---------------------------------------------------------------- saving


def test_both_ways_of_saving_write_the_same(tmp_path: Path) -> None:
    model = merged()
    model.save_pretrained(tmp_path / "own")
    save_merged(model, tmp_path / "ours")
    names = file_names(tmp_path / "own")
    assert {"config.json", "model.safetensors", "generation_config.json", "README.md"} < names
    assert {"topology/adapter_config.json", "topology/adapter_model.safetensors"} < names
    assert names == file_names(tmp_path / "ours") and "topology/README.md" not in names
    assert all((tmp_path / "own" / n).read_bytes() == (tmp_path / "ours" / n).read_bytes() for n in names)
    assert not any("topo" in key for key in load_file(tmp_path / "own" / "model.safetensors"))
    config = read(tmp_path / "own")
    assert config["model_type"] == "topo_adapter" and config["architectures"] == ["LlamaForCausalLM"]
    assert config["base_config"]["model_type"] == "llama" and config["base_config"]["hidden_size"] == 32
    assert "import topo_adapter" in (tmp_path / "own" / "README.md").read_text()


def test_what_is_loaded_and_saved_again_is_the_same(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("# My own card\n")
    before = {name: (folder / name).read_bytes() for name in file_names(folder)}
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for name in file_names(tmp_path / "again") - {"README.md"}:
        assert (tmp_path / "again" / name).read_bytes() == before[name], name
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in file_names(folder)} == before


def test_settings_of_save_pretrained(tmp_path: Path) -> None:
    model = merged()
    expected = logits_of(model, IDS)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert torch.equal(logits_of(load_merged(tmp_path / "shards"), IDS), expected)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "topology").exists()
    state = {key: value * 2 if ".router." in key else value for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "state", state_dict=state)
    written = load_file(tmp_path / "state" / "topology" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.topo_adapter.topo_routers.down.weight"
    assert torch.equal(written[name], 2 * model.model.layers[0].self_attn.topo_adapter.router.down.weight)
    with pytest.raises(UnsupportedModelError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)
    assert not (tmp_path / "hub").exists()
    with pytest.raises(UnsupportedModelError, match="must come from merge_and_unload"):
        save_merged(tiny(), tmp_path / "base")


def test_a_trainer_saves_it_whole(tmp_path: Path) -> None:
    model = merged()
    Trainer(model, TrainingArguments(str(tmp_path / "runs"), report_to=[])).save_model(str(tmp_path / "saved"))
    assert torch.equal(logits_of(load_merged(tmp_path / "saved"), IDS), logits_of(model, IDS))


# ---------------------------------------------------------------- the class


def test_the_class_keeps_its_name_and_copies_keep_the_class() -> None:
    model = merged()
    expected = logits_of(model, IDS)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(each, LlamaForCausalLM) and isinstance(each, MergedModel)
        assert (type(each).__name__, type(each).__module__) == ("LlamaForCausalLM", LlamaForCausalLM.__module__)
        assert type(each) is type(model) and len(hosts(each)) == 4
        assert torch.equal(logits_of(each, IDS), expected)
    assert type(routed(tiny()).unload()) is LlamaForCausalLM
    with pytest.raises(UnsupportedModelError, match="merged topology already"):
        get_peft_model(model, TopologyConfig())


def test_nothing_keeps_a_merged_model_alive() -> None:
    model = merged()
    alive = weakref.ref(model)
    del model
    assert alive() is None


# ---------------------------------------------------------------- loading


def test_opens_sparse_however_it_is_opened(folder: Path) -> None:
    expected = logits_of(merged(), IDS)
    dense = logits_of(tiny(), IDS)
    assert (expected - dense).abs().max() > 0.1
    for model in (load_merged(folder), load_merged(str(folder)), AutoModelForCausalLM.from_pretrained(folder)):
        assert torch.equal(logits_of(model, IDS), expected)
        assert isinstance(model.config, LlamaConfig) and model.config.model_type == "llama"
    generator = pipeline("text-generation", model=str(folder))
    assert len(hosts(generator.model)) == 4
    text = generator("w5 w6 w7", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert text.startswith("w5 w6 w7") and text.count("w") == 6
    assert AutoTokenizer.from_pretrained(folder)("w5 w6").input_ids == [5, 6]
    assert AutoConfig.from_pretrained(folder).base()[0].hidden_size == 32
    assert AutoConfig.from_pretrained(folder).get_text_config().hidden_size == 32


def test_the_callers_settings_reach_the_base(folder: Path) -> None:
    for load in (load_merged, AutoModelForCausalLM.from_pretrained):
        model = load(folder, dtype=torch.float64, attn_implementation="eager", use_cache=False)
        assert model.dtype == torch.float64 and model.config._attn_implementation == "eager"
        assert model.config.use_cache is False
        torch.testing.assert_close(logits_of(model, IDS).float(), logits_of(merged(), IDS), rtol=0, atol=1e-3)


def test_without_the_import_it_fails_by_name(folder: Path) -> None:
    script = """
        import sys
        from transformers import AutoConfig, AutoModelForCausalLM, pipeline
        for open_it in (
            AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained,
            lambda where: pipeline("text-generation", model=where),
        ):
            try:
                open_it(sys.argv[1])
            except Exception as error:
                assert "topo_adapter" in str(error), error
                print("refused")
        assert "topo_adapter" not in sys.modules
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(folder)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused"] * 3


def test_other_directories_are_refused(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="holds a model of type 'llama'"):
        load_merged(tmp_path)
    untrained = routed(tiny(), homotopy=0.5)
    with pytest.raises(MergeError, match="homotopy must be 1"):
        untrained.merge_and_unload()
    assert type(untrained.get_base_model()) is LlamaForCausalLM


def test_a_classifier_keeps_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny().config
    config.num_labels = 3
    base = LlamaForSequenceClassification(config).eval()
    model = routed(base, task_type="SEQ_CLS").merge_and_unload()
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(load_merged(tmp_path)(input_ids=IDS).logits, expected)
    with pytest.raises(UnsupportedModelError, match="merged LlamaForSequenceClassification"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="MergedConfig"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


# ---------------------------------------------------------------- files that ask for code

EVIL = "evil/kernel"
FIELDS = (
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)


@pytest.mark.parametrize("where", ["base", "top", "nested"])
@pytest.mark.parametrize("field", [*FIELDS, "auto_map"])
def test_a_file_cannot_choose_what_runs(folder: Path, field: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def note(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        raise RuntimeError("code of a file was asked for")

    for module, name in (
        (transformers.modeling_utils, "lazy_import_flash_attention"),
        (transformers.integrations.hub_kernels, "load_and_register_attn_kernel"),
        (transformers.models.auto.auto_factory, "get_class_from_dynamic_module"),
        (transformers.models.auto.configuration_auto, "get_class_from_dynamic_module"),
    ):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, note)
    config = read(folder)
    value: Any = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"} if field == "auto_map" else EVIL
    place = {"base": config["base_config"], "top": config, "nested": config["base_config"].setdefault("sub", {})}[where]
    place[field] = value
    (folder / "config.json").write_text(json.dumps(config))
    expected = logits_of(merged(), IDS)
    for load in (load_merged, AutoModelForCausalLM.from_pretrained):
        model = load(folder)
        assert EVIL not in str(vars(model.config)) and "evil." not in str(vars(model.config))
        assert torch.equal(logits_of(model, IDS), expected)
    assert not asked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_config": None}, "base_config must name a model type"),
        ({"base_config": {"model_type": "evil"}}, "got 'evil'"),
        ({"architectures": ["os"]}, "architectures must name a model class"),
        ({"architectures": ["Trainer"]}, "architectures must name a model class"),
        ({"architectures": None}, "architectures must name a model class"),
    ],
)
def test_a_damaged_config_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    (folder / "config.json").write_text(json.dumps({**read(folder), **change}))
    with pytest.raises(UnsupportedModelError, match=message):
        load_merged(folder)


def test_the_adapter_inside_loads_by_itself(folder: Path) -> None:
    model = PeftModel.from_pretrained(tiny(), folder / "topology").eval()
    torch.testing.assert_close(logits_of(model, IDS), logits_of(merged(), IDS), rtol=0, atol=1e-5)
    assert isinstance(model, nn.Module)
