"""Every trainer of TRL with a topology adapter: it trains, ends in full force, and what it saves is what it trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from peft import PeftModel
from test_training import router_state, tiny_base
from transformers import LlamaForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from topo_adapter import TopologyCallback, TopologyConfig, TopologyConfigError, TopologyTrainerMixin

trl = pytest.importorskip("trl")
from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

TEXT = " ".join(f"t{i % 60}" for i in range(3, 27))  # longer than the window: shorter rows teach a router nothing
PROMPTS = {"prompt": [TEXT] * 8}
PAIRS = {"chosen": [f"{TEXT} t5 t6 t7"] * 8, "rejected": [f"{TEXT} t8 t9"] * 8}
SAMPLING: dict[str, Any] = {"num_generations": 2, "max_completion_length": 4}


class Case(NamedTuple):
    """columns: of the training data. options: of the trainer's own config. rewards: the trainer samples."""

    columns: dict[str, list[Any]]
    options: dict[str, Any] = {}
    rewards: bool = False


CASES = {
    "SFT": Case({"text": [TEXT] * 8}),
    "DPO": Case({**PROMPTS, **PAIRS}),
    "KTO": Case({**PROMPTS, "completion": [" t5 t6 t7"] * 8, "label": [True, False] * 4}),
    "Reward": Case(PAIRS),
    "GRPO": Case(PROMPTS, SAMPLING, rewards=True),
    "RLOO": Case(PROMPTS, SAMPLING, rewards=True),
}


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


def trainer(name: str, path: Path, tokenizer: Any, with_mixin: bool, **settings: Any) -> Any:
    case = CASES[name]
    kind = getattr(trl, f"{name}Trainer")
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    rewards = {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]}
    return (type(f"Topology{name}", (TopologyTrainerMixin, kind), {}) if with_mixin else kind)(
        model=base(name),
        args=getattr(trl, f"{name}Config")(output_dir=str(path), **{**defaults, **case.options, **settings}),
        train_dataset=Dataset.from_dict(case.columns),
        processing_class=tokenizer,
        peft_config=TopologyConfig(
            depth=3, visible_depth=2, local_window=4, task_type="SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
        ),
        callbacks=[] if with_mixin else [TopologyCallback()],
        **(rewards if case.rewards else {}),
    )


@pytest.mark.parametrize(
    ("name", "with_mixin"), [*((name, True) for name in CASES), ("DPO", False), ("GRPO", False), ("Reward", False)]
)
def test_trains_and_saves(name: str, with_mixin: bool, tokenizer: Any, tmp_path: Path) -> None:
    training = trainer(name, tmp_path, tokenizer, with_mixin)
    before = router_state(training.model)
    training.train()
    after = router_state(training.model)
    assert max((after[key] - value).abs().max() for key, value in before.items()) > 0
    assert training.model.peft_config["default"].homotopy == 1.0
    logs = [log for log in training.state.log_history if "loss" in log]
    assert logs and all("topology/density" in log for log in logs)

    if with_mixin:
        training.create_model_card()  # over the card that saving wrote
        assert (tmp_path / "README.md").read_text().count("import topo_adapter") == 1
    training.save_model(str(tmp_path / "adapter"))
    again = router_state(PeftModel.from_pretrained(base(name), str(tmp_path / "adapter")))
    assert again.keys() == after.keys() and all((again[key] == value).all() for key, value in after.items())


def test_accumulation_needs_the_mixin(tokenizer: Any, tmp_path: Path) -> None:
    """Without it the auxiliary gradient would have another scale than the loss: refused."""
    with pytest.raises(TopologyConfigError, match="gradient_accumulation_steps=1"):
        trainer("DPO", tmp_path, tokenizer, with_mixin=False, gradient_accumulation_steps=2).train()
