"""Every trainer of TRL with a topology adapter: it trains, ends in full force, and what it saves is what it trained.

`docs/peft.md` shows what is tested of whom, and this file writes it there: `python tests/test_trl.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_helpers import DOCUMENT, documented
from test_training import router_state, tiny_base
from torch import Tensor
from transformers import LlamaForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from topo_adapter import TopologyConfig, TopologyTrainerMixin
from topo_adapter.layer import hosts

trl = pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from recipes import sft  # noqa: E402
from topo_adapter.sft import TopologySFTTrainer  # noqa: E402

TEXT = " ".join(f"t{i % 60}" for i in range(3, 27))  # longer than the window: shorter rows teach a router nothing
PROMPTS = {"prompt": [TEXT] * 8}
PAIRS = {"chosen": [f"{TEXT} t5 t6 t7"] * 8, "rejected": [f"{TEXT} t8 t9"] * 8}
SAMPLING: dict[str, Any] = {"num_generations": 2, "max_completion_length": 4}


def rewarded() -> dict[str, Any]:
    return {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]}


def taught() -> dict[str, Any]:
    return {"teacher_model": tiny_base()}  # the dense base


class Case(NamedTuple):
    """columns: of the data. options: of the trainer's own config. arguments: of the trainer, beside those of all."""

    columns: dict[str, list[Any]]
    options: dict[str, Any] = {}
    arguments: Callable[[], dict[str, Any]] = dict


CASES = {
    "SFT": Case({"text": [TEXT] * 8}),
    "DPO": Case({**PROMPTS, **PAIRS}),
    "KTO": Case({**PROMPTS, "completion": [" t5 t6 t7"] * 8, "label": [True, False] * 4}),
    "Reward": Case(PAIRS),
    "GRPO": Case(PROMPTS, SAMPLING, rewarded),
    "RLOO": Case(PROMPTS, SAMPLING, rewarded),
    "Distillation": Case(PROMPTS, {"max_completion_length": 4}, taught),
}


#: What `test_trains_and_saves` asks of each trainer -> whether it needs no mixin.
SETTINGS = {
    "trains, ends in full force": True,
    "is evaluated in full force in between": True,
    "saves what it trained": True,
    "accumulates gradients": True,
    "its model card says how to load": False,
}


def table() -> str:
    """The rows of docs/peft.md."""
    rows = [["TRL's trainer", *SETTINGS], ["---"] * (1 + len(SETTINGS))]
    rows += [[f"`{name}Trainer`", *("both" if alone else "mixin" for alone in SETTINGS.values())] for name in CASES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def test_the_documented_table_is_this_one() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert documented(text, "trainers", table()) == text, "run `python tests/test_trl.py`"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="t1", pad_token="t2", unk_token="t0")


def base(name: str) -> PreTrainedModel:
    model = tiny_base()
    if name != "Reward":
        return model
    model.config.num_labels, model.config.pad_token_id = 1, 2
    return LlamaForSequenceClassification(model.config)


def trainer(name: str, path: Path, tokenizer: Any, with_mixin: bool, model: Any = None, **settings: Any) -> Any:
    case = CASES[name]
    kind = getattr(trl, f"{name}Trainer")
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return (type(f"Topology{name}", (TopologyTrainerMixin, kind), {}) if with_mixin else kind)(
        model=base(name) if model is None else model,
        args=getattr(trl, f"{name}Config")(output_dir=str(path), **{**defaults, **case.options, **settings}),
        train_dataset=Dataset.from_dict(case.columns),
        eval_dataset=Dataset.from_dict({name: rows[:2] for name, rows in case.columns.items()}),
        processing_class=tokenizer,
        peft_config=TopologyConfig(
            depth=3, visible_depth=2, local_window=4, task_type="SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
        ),
        **case.arguments(),
    )


@pytest.mark.parametrize("with_mixin", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_trains_and_saves(name: str, with_mixin: bool, tokenizer: Any, tmp_path: Path) -> None:
    """What `SETTINGS` lists; without the mixin, by the callback that every trainer has, all but the card."""
    accumulation = 2
    training = trainer(name, tmp_path, tokenizer, with_mixin, gradient_accumulation_steps=accumulation)
    before, config = router_state(training.model), training.model.peft_config["default"]
    homotopies: dict[str, list[float]] = {"training_step": [], "evaluate": []}

    def noting(method: str) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            homotopies[method].append(round(config.homotopy, 2))
            return call(*args, **kwargs)

        call = getattr(training, method)
        return noted

    for method in homotopies:
        setattr(training, method, noting(method))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training.train()
    raised = [str(each.message) for each in caught if "its homotopy raised over the training" in str(each.message)]
    assert len(raised) == (name == "Reward"), "a model without a language-model head cannot be calibrated"
    assert (config.calibration is None) == (name == "Reward")
    after = router_state(training.model)
    assert max((after[key] - value).abs().max() for key, value in before.items()) > 0
    on_its_way = [0.0, 0.0, 0.71, 0.71] if name == "Reward" else [1.0] * 4
    assert homotopies == {"training_step": on_its_way, "evaluate": [1.0, 1.0]} and config.homotopy == 1.0
    logs = [log for log in training.state.log_history if "loss" in log]
    assert logs and all("topology/density" in log for log in logs)
    # a mean of each forward, whatever the loss is a mean of
    assert {float(host.auxiliary_scale) for host in hosts(training.model)} == {1 / accumulation}

    training.create_model_card()  # over the card that saving wrote
    assert (tmp_path / "README.md").read_text().count("import topo_adapter") == with_mixin
    training.save_model(str(tmp_path / "adapter"))
    again = router_state(PeftModel.from_pretrained(base(name), str(tmp_path / "adapter")))
    assert again.keys() == after.keys() and all((again[key] == value).all() for key, value in after.items())


def weights_of_both(model: PeftModel) -> dict[str, Tensor]:
    return {key: weight.detach().clone() for key, weight in model.named_parameters() if weight.requires_grad}


def test_a_lora_trains_beside_and_a_resumed_run_goes_on_as_it_would_have(tokenizer: Any, tmp_path: Path) -> None:
    def training() -> Any:
        torch.manual_seed(0)
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return TopologySFTTrainer(
            model=get_peft_model(tiny_base(), lora, adapter_name="beside").get_base_model(),
            args=trl.SFTConfig(
                output_dir=str(tmp_path),
                max_steps=4,
                per_device_train_batch_size=2,
                learning_rate=1e-2,
                lr_scheduler_type="constant",
                save_steps=2,
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"text": [TEXT] * 8}),
            processing_class=tokenizer,
            peft_config=TopologyConfig(depth=3, visible_depth=2, local_window=4, task_type="CAUSAL_LM"),
        )

    whole = training()
    before = weights_of_both(whole.model)
    whole.train()
    after = weights_of_both(whole.model)
    assert {".lora_" in key for key in before} == {True, False}
    assert all((after[key] != value).any() for key, value in before.items() if "lora_A" not in key)
    rates = {len(group["params"]): group["lr"] for group in whole.optimizer.param_groups}
    assert rates == {8: 1e-2, 4: 3e-3, 6: 3e-3}, "LoRA; the routers' weights; their biases, which do not decay"

    resumed = training()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = weights_of_both(resumed.model)
    assert again.keys() == after.keys() and all(torch.equal(again[key], value) for key, value in after.items())
    assert resumed.model.peft_config["default"].calibration == whole.model.peft_config["default"].calibration

    # from the files, the LoRA first
    base = PeftModel.from_pretrained(tiny_base(), str(tmp_path / "checkpoint-4" / "beside"), adapter_name="beside")
    loaded = PeftModel.from_pretrained(base.get_base_model(), str(tmp_path / "checkpoint-4"))
    ids = torch.as_tensor(whole.train_dataset[0]["input_ids"])[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, whole.model.eval()(input_ids=ids).logits)


def test_the_best_model_is_that_of_every_adapter(tokenizer: Any, tmp_path: Path) -> None:
    saved = {}

    class Keep(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            saved[state.global_step] = weights_of_both(model)

    lora = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    training = trainer(
        "SFT",
        tmp_path,
        tokenizer,
        True,
        model=get_peft_model(tiny_base(), lora, adapter_name="beside").get_base_model(),
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the first: losses fall
    )
    training.add_callback(Keep())
    training.train()
    best = saved[int(training.state.best_model_checkpoint.rpartition("-")[2])]
    after = weights_of_both(training.model)
    assert all(torch.equal(after[key], value) for key, value in best.items())
    assert any((saved[3][key] != value).any() for key, value in best.items() if ".lora_" in key)


def test_what_is_frozen_stays_so_when_a_run_goes_on(tokenizer: Any, tmp_path: Path) -> None:
    for checkpoint in (None, str(tmp_path / "checkpoint-1")):
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        base = get_peft_model(tiny_base(), lora, adapter_name="beside").get_base_model()
        settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"}
        training = trainer("SFT", tmp_path, tokenizer, True, model=base, **settings)
        for host in hosts(training.model):
            host.requires_grad_(False)
        training.train(resume_from_checkpoint=checkpoint)
        assert all(".lora_" in name for name in weights_of_both(training.model))


def test_prompts_that_are_completed_need_not_be_long(tokenizer: Any, tmp_path: Path) -> None:
    """Their data set holds no completions, which are most of what the trainer reads."""
    training = trainer("GRPO", tmp_path, tokenizer, True, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    training.model.peft_config["default"].local_window = 20
    training.train()
    assert training.model.peft_config["default"].calibration["length"] > 20 + 4 + 24


def test_the_recipe_trains_both_and_says_what_that_gives(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for split in ("train", "test"):
        Dataset.from_dict({"text": [TEXT] * 8}).to_json(tmp_path / "task" / f"{split}.jsonl")
    arguments: list[Any] = ["--model_name_or_path", tmp_path / "base", "--dataset_name", tmp_path / "task"]
    arguments += ["--output_dir", tmp_path / "out", "--use_peft", "--max_steps", 2, "--use_cpu", "--bf16", "false"]
    arguments += ["--report_to", "none", "--local_window", 4, "--depth", 3, "--visible_depth", 2]
    arguments += [
        "--per_device_train_batch_size",
        2,
        "--max_length",
        24,
        "--densities",
        1.0,
        0.6,
        0.01,
        "--speed_length",
        24,
    ]
    kinds = (sft.TaskArguments, trl.SFTConfig, trl.ModelConfig, sft.TopologyArguments)
    sft.main(*trl.TrlParser(kinds).parse_args_and_config(list(map(str, arguments))))
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[0] == ["loss", "prefill of 24 tokens, ms", "decoded token, ms"]
    assert [line[0] for line in lines[2:]] == ["base", *(f"trained, density {d}" for d in ("1", "0.6", "0.01"))]
    assert all(float(number) > 0 for line in lines[2:5] for number in line[1:])
    assert lines[5][1].startswith("not reached: target_density must be")
    names = {file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*.safetensors")}
    assert {"adapter_model.safetensors", "lora/adapter_model.safetensors"} <= names


if __name__ == "__main__":
    DOCUMENT.write_text(documented(DOCUMENT.read_text(encoding="utf-8"), "trainers", table()), encoding="utf-8")
