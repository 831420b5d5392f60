"""What an adapter trains beside its routers: heads and other whole modules, single tokens, resized embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import (
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peft_helpers import FAMILIES, assert_same_weights, logits_of, loss_of, routed, tiny, tokens, weights_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from topo_adapter import (
    AdapterFileError,
    MergeError,
    TopologyConfig,
    TopologyConfigError,
    UnsupportedModelError,
    load_merged,
)
from topo_adapter.fingerprint import fingerprint

IDS = tokens(2, 16)
TOKENS = IDS[0, 3:5].sort().values.tolist()
ROUTERS = 2 * 5  # tensors in the file of an adapter of two layers
TASKS: dict[str, tuple[str, Any, list[str]]] = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", AutoPeftModelForSequenceClassification, ["score.weight"]),
    "TOKEN_CLS": (
        "AutoModelForTokenClassification",
        AutoPeftModelForTokenClassification,
        ["score.bias", "score.weight"],
    ),
    "QUESTION_ANS": (
        "AutoModelForQuestionAnswering",
        AutoPeftModelForQuestionAnswering,
        ["qa_outputs.bias", "qa_outputs.weight"],
    ),
}


def small(**settings: Any) -> Any:
    return tiny(num_hidden_layers=2, **settings)


def classifier(task: str, seed: int = 0) -> Any:
    """A model of the task; its head, which no file holds, is another with every seed."""
    torch.manual_seed(0)
    model = getattr(transformers, TASKS[task][0]).from_config(FAMILIES["llama"](num_hidden_layers=2, num_labels=3))
    for name, weight in model.named_parameters():
        if name in TASKS[task][2]:
            nn.init.normal_(weight, generator=torch.Generator().manual_seed(seed))
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS)[0]


def fit(model: nn.Module, steps: int = 2) -> None:
    """Train everything that the model trains."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    for _ in range(steps):
        (model.train()(input_ids=IDS)[0] ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def saved(model: PeftModel, folder: Path) -> set[str]:
    """The names in an adapter's file, but for those of routers, of which there are all."""
    model.save_pretrained(folder)
    keys = set(load_file(folder / "adapter_model.safetensors"))
    others = {key for key in keys if ".topo_routers." not in key}
    assert len(keys) - len(others) == ROUTERS
    return {key.removeprefix("base_model.model.") for key in others}


# ---------------------------------------------------------------- heads and other modules


@pytest.mark.parametrize("task", TASKS)
def test_a_new_head_is_trained_saved_and_reloaded(task: str, tmp_path: Path) -> None:
    _, auto, head = TASKS[task]
    classifier(task).save_pretrained(tmp_path / "base")
    base = getattr(transformers, TASKS[task][0]).from_pretrained(tmp_path / "base")
    model = routed(base, task_type=task)
    before = outputs(model)
    fit(model)
    trained = outputs(model)
    assert not torch.allclose(trained, before, atol=1e-2)
    assert saved(model, tmp_path / "adapter") == set(head)

    again = PeftModel.from_pretrained(classifier(task, seed=1), tmp_path / "adapter")
    assert torch.equal(outputs(again), trained)
    second = routed(classifier(task, seed=2), task_type=task)
    second.load_adapter(tmp_path / "adapter", adapter_name="second")
    assert not torch.allclose(outputs(second), trained, atol=1e-2)
    second.set_adapter("second")
    assert torch.equal(outputs(second), trained)
    assert torch.equal(outputs(auto.from_pretrained(tmp_path / "adapter")), trained)
    assert f"{auto.__name__}.from_pretrained" in (tmp_path / "adapter" / "README.md").read_text()


def test_the_users_config_serves_a_second_model() -> None:
    """PEFT adds the head's names to it, each time."""
    config = TopologyConfig(task_type="TOKEN_CLS")
    for _ in range(2):
        model = get_peft_model(classifier("TOKEN_CLS"), config)
        assert model.peft_config["default"].modules_to_save == ["classifier", "score"]


@pytest.mark.parametrize("low_memory", [False, True])
def test_modules_to_save_are_the_adapters_own(low_memory: bool, tmp_path: Path) -> None:
    base = small()
    untouched, dense = weights_of(base), logits_of(base, IDS)
    model = routed(base, modules_to_save=["lm_head"])
    mark = fingerprint(model)
    fit(model)
    trained = logits_of(model, IDS)
    assert saved(model, tmp_path) == {"lm_head.weight"}
    with model.disable_adapter():
        assert torch.equal(logits_of(model, IDS), dense)
    again = PeftModel.from_pretrained(small(), tmp_path, adapter_name="other", low_cpu_mem_usage=low_memory)
    assert torch.equal(logits_of(again.eval(), IDS), trained)
    assert not any(weight.requires_grad for weight in again.parameters())
    assert fingerprint(model) == mark
    again.delete_adapter("other")
    assert_same_weights(again.unload(), untouched)


def test_a_trained_input_embedding_is_not_the_bases_mark() -> None:
    model = routed(small(), modules_to_save=["embed_tokens"])
    mark = fingerprint(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    assert fingerprint(model) == mark == fingerprint(small())


def test_merged_models_keep_what_was_trained(tmp_path: Path) -> None:
    model = routed(classifier("SEQ_CLS"), task_type="SEQ_CLS")
    fit(model)
    trained = outputs(model)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model), trained, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged), trained, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    assert torch.equal(outputs(load_merged(tmp_path)), outputs(merged))
    assert not [name for name, _ in merged.named_parameters() if "modules_to_save" in name]


def test_unload_keeps_the_trained_head_as_peft_does() -> None:
    model = routed(small(), modules_to_save=["lm_head"])
    fit(model)
    head = model.base_model.model.lm_head.weight.detach().clone()
    plain = model.unload()
    assert type(plain.lm_head) is nn.Linear and torch.equal(plain.lm_head.weight, head)
    assert not torch.equal(head, small().lm_head.weight)


def test_a_module_without_a_weight_of_its_own_is_unloaded() -> None:
    model = routed(small(), modules_to_save=["mlp"])
    fit(model)
    trained = logits_of(model, IDS)
    torch.testing.assert_close(logits_of(model.merge_and_unload(), IDS), trained, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_another_adapters_head_is_not_merged(merge: str) -> None:
    model = routed(small(), modules_to_save=["lm_head"])
    model.add_adapter("b", TopologyConfig(depth=4, homotopy=1.0))
    for name in ("b", "default"):
        other = "default" if name == "b" else "b"
        model.set_adapter(other)
        with pytest.raises(MergeError, match=rf"{name!r} must be active.*set_adapter\({name!r}\)"):
            getattr(model, merge)(adapter_names=[name])
    model.set_adapter("b")
    getattr(model, merge)(adapter_names=["b"])


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("given", [TOKENS, {"embed_tokens": TOKENS}], ids=lambda given: type(given).__name__)
def test_single_tokens_are_trained_saved_and_reloaded(given: Any, tied: bool, tmp_path: Path) -> None:
    def base() -> Any:
        return small(tie_word_embeddings=tied)

    model = routed(base(), trainable_token_indices=given)
    fit(model)
    trained = logits_of(model, IDS)
    name = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert saved(model, tmp_path) == {name}
    assert load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.{name}"].shape == (2, 32)
    assert torch.equal(logits_of(PeftModel.from_pretrained(base(), tmp_path).eval(), IDS), trained)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, IDS), trained, atol=1e-4, rtol=1e-4)
    changed = (merged.get_input_embeddings().weight != base().get_input_embeddings().weight).any(1)
    assert changed.nonzero().flatten().tolist() == TOKENS


# ---------------------------------------------------------------- resized embeddings


@pytest.fixture
def resized(tmp_path: Path) -> tuple[Path, Callable[[], Any]]:
    """A base on disk, and that base with nine tokens more, whose embeddings are others each time."""
    small().save_pretrained(tmp_path / "base")

    def load() -> Any:
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(70, mean_resizing=False)
        return base.eval()

    return tmp_path / "base", load


EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        ({}, EMBEDDINGS),
        (
            {"modules_to_save": ["embed_tokens", "lm_head"]},
            EMBEDDINGS | {"model.embed_tokens.original_module.weight", "lm_head.original_module.weight"},
        ),
        (
            {"trainable_token_indices": [65, 66]},
            {
                "model.embed_tokens.token_adapter.trainable_tokens_delta",
                "model.embed_tokens.token_adapter.base_layer.weight",
                "lm_head.weight",
            },
        ),
    ],
    ids=["resized", "trained whole", "new tokens trained"],
)
def test_resized_embeddings_are_saved_and_reloaded(
    settings: dict[str, Any], others: set[str], resized: tuple[Path, Callable[[], Any]], tmp_path: Path
) -> None:
    _, load = resized
    ids = IDS.clone()
    ids[0, 3:8] = torch.tensor([62, 65, 66, 69, 61])  # new ones
    assert not torch.equal(logits_of(load(), ids), logits_of(load(), ids))
    model = routed(load(), **settings)
    fit(model)
    logits = logits_of(model, ids)
    with pytest.warns(UserWarning, match="embedding layer has been resized"):
        assert saved(model, tmp_path / "adapter") == others
    assert torch.equal(logits_of(PeftModel.from_pretrained(load(), tmp_path / "adapter").eval(), ids), logits)


def test_resized_embeddings_stay_out_of_the_file_where_the_user_says_so(
    resized: tuple[Path, Callable[[], Any]], tmp_path: Path
) -> None:
    routed(resized[1]()).save_pretrained(tmp_path, save_embedding_layers=False)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == ROUTERS


def test_a_base_that_was_not_resized_is_refused(resized: tuple[Path, Callable[[], Any]], tmp_path: Path) -> None:
    routed(resized[1]()).save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    base = small()
    before, logits = weights_of(base), logits_of(base, IDS)
    with pytest.raises(AdapterFileError, match=r"\(61, 32\), got \(70, 32\).*resize_token_embeddings"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_same_weights(base, before)
    assert torch.equal(logits_of(base, IDS), logits)


# ---------------------------------------------------------------- files and settings that do not fit


def _damage(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32)}),
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(61, 32)}),
        lambda t: t.update({"base_model.model.lm_head.weight": t["base_model.model.lm_head.weight"][:60].clone()}),
        lambda t: t["base_model.model.lm_head.weight"][3].fill_(float("nan")),
    ],
    ids=["a base weight", "one of two embeddings", "another shape", "NaN"],
)
def test_a_damaged_file_is_refused_and_takes_its_modules_along(
    change: Callable[[dict[str, Tensor]], Any], tmp_path: Path
) -> None:
    routed(small(), modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    _damage(tmp_path, change)
    base = small()
    before, names = weights_of(base), [name for name, _ in base.named_modules()]
    with pytest.raises(AdapterFileError):
        PeftModel.from_pretrained(base, tmp_path)
    assert_same_weights(base, before)
    assert [name for name, _ in base.named_modules()] == names

    model = routed(small(), seed=2, modules_to_save=["lm_head"])
    logits, before = logits_of(model, IDS), weights_of(model)
    with pytest.raises(AdapterFileError):
        model.load_adapter(tmp_path, adapter_name="second")
    assert_same_weights(model, before)
    assert torch.equal(logits_of(model, IDS), logits)


def test_a_head_that_the_config_does_not_name_is_refused(tmp_path: Path) -> None:
    model = routed(small(), modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.modules_to_save = None
    with pytest.raises(AdapterFileError, match=r"unexpected.*lm_head"):
        PeftModel.from_pretrained(small(), tmp_path, config=config)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"modules_to_save": "lm_head"}, "modules_to_save must be a list"),
        ({"modules_to_save": ["lm_haed"]}, r"modules_to_save.*'lm_haed'"),
        ({"modules_to_save": ["attn"]}, r"modules_to_save.*routed"),
        ({"task_type": "SEQ_CLS"}, "head named classifier or score"),
        ({"trainable_token_indices": [3, 61]}, "below the 61 rows.*got 61"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices must be an integer >= 0"),
        ({"trainable_token_indices": 5}, "trainable_token_indices must be a list"),
        ({"trainable_token_indices": {"wte": [5]}}, "'wte'"),
        ({"exclude_modules": ["mlp"]}, "exclude_modules must leave out"),
        ({"exclude_modules": 5}, "exclude_modules must be a list of names"),
    ],
    ids=str,
)
def test_a_setting_without_effect_is_refused(settings: dict[str, Any], match: str) -> None:
    base = small()
    names, before = [name for name, _ in base.named_modules()], weights_of(base)
    with pytest.raises(TopologyConfigError, match=match):
        get_peft_model(base, TopologyConfig(**settings))
    assert [name for name, _ in base.named_modules()] == names
    assert_same_weights(base, before)


@pytest.mark.parametrize("exclude", [["layers.0.self_attn"], r".*\.0\..*"], ids=str)
def test_excluded_modules_stay_dense(exclude: Any) -> None:
    model = get_peft_model(small(), TopologyConfig(exclude_modules=exclude))
    assert model.targeted_module_names == ["model.layers.1.self_attn"]


# ---------------------------------------------------------------- beside LoRA


def test_the_head_that_a_lora_beside_trains_stays_in_force() -> None:
    """PEFT takes every wrapped module out of force that the adapter which is made active has no copy of."""
    base = small()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), base, "lora")
    with torch.no_grad():
        base.lm_head.modules_to_save["lora"].weight.mul_(2)
    expected = logits_of(base, IDS)
    model = get_peft_model(base, TopologyConfig(), adapter_name="topology")
    assert torch.equal(logits_of(model.eval(), IDS), expected)
    loss_of(model.train(), IDS).backward()
    head = base.lm_head.modules_to_save["lora"].weight
    assert head.grad is not None
    for trained in (True, False):
        head.requires_grad_(trained)
        model.set_adapter("topology")
        assert head.requires_grad == trained
    assert torch.equal(logits_of(model.eval(), IDS), expected)


def test_one_module_is_not_trained_by_two_methods() -> None:
    base = small()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), base, "lora")
    with pytest.raises(UnsupportedModelError, match="'lm_head' is trained by the adapter 'lora'"):
        get_peft_model(base, TopologyConfig(modules_to_save=["lm_head"]), adapter_name="topology")


def test_a_lora_added_later_does_not_silently_take_the_head_out_of_force() -> None:
    base = small()
    inject_adapter_in_model(TopologyConfig(homotopy=1.0, modules_to_save=["lm_head"]), base, "topology")
    logits_of(base, IDS)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]), adapter_name="lora")
    with pytest.raises(UnsupportedModelError, match="lm_head must run as the active adapter 'topology' has trained it"):
        model(input_ids=IDS)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, IDS), logits_of(small(), IDS))
