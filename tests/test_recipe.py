"""The default recipe on tiny models: `distill`, its arguments, and `recipes/distill.py`."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from peft_helpers import routed, router_parameters, tiny, tokens
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainerState, TrainingArguments

from topo_adapter import TopologyConfig, TopologyConfigError, UnsupportedModelError
from topo_adapter.core.dial import choose_depths
from topo_adapter.measuring.calibration import calibrate
from topo_adapter.training import data, densities, recipe
from topo_adapter.training.data import text_windows, windows_of
from topo_adapter.training.local import DistillationTrainer
from topo_adapter.training.recipe import DistillConfig, distill
from topo_adapter.training.routers import initialize_routers
from topo_evaluation import texts

datasets = pytest.importorskip("datasets")  # of the train extra
Dataset, DatasetDict = datasets.Dataset, datasets.DatasetDict
REPOSITORY = Path(__file__).parents[1]
LENGTH = 24


def arguments(path: Path, **settings: Any) -> DistillConfig:
    defaults = {
        "local_steps": 2,
        "kl_steps": 2,
        "num_queries": 8,
        "calibration_rows": 2,
        "lowest_density": 0.5,
        "highest_density": 0.9,
        "per_device_train_batch_size": 1,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return DistillConfig(output_dir=str(path), **{**defaults, **settings})


def config(**settings: Any) -> TopologyConfig:
    defaults = {"depth": 3, "visible_depth": 2, "router_dim": 8, "local_window": 3, "num_sink_tokens": 2}
    return TopologyConfig(task_type="CAUSAL_LM", **{**defaults, **settings})


def base() -> Any:
    return tiny(num_hidden_layers=2)


def rows(count: int, length: int = LENGTH, seed: int = 0) -> list[dict[str, Tensor]]:
    return [{"input_ids": row} for row in tokens(count, length, seed)]


def tokenizer(end: bool = True, begin: bool = False) -> PreTrainedTokenizerFast:
    """A token per word, the number in it; token 1 ends texts, or nothing does, and token 0 begins them, or nothing."""
    words = {"<unk>": 0, "<end>": 1, **{f"w{number}": number for number in range(2, 61)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<end>"} if end else {}
    if begin:
        made.post_processor = processors.TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 0)])
        special["bos_token"] = "<unk>"
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special)


class Stages(TrainerCallback):
    """Notes the folder, the learning rate and the step of each step, and what has been logged."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int]] = []
        self.learning_rates: dict[str, float] = {}
        self.temperatures: dict[str, float] = {}
        self.logs: list[dict[str, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        stage = Path(args.output_dir).name
        self.steps.append((stage, state.global_step))
        self.learning_rates[stage] = args.learning_rate
        self.temperatures.setdefault(stage, model.peft_config["default"].temperature)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in state.log_history[-1]:
            self.logs.append(state.log_history[-1])


def assert_trained(adapter: PeftModel, length: int = LENGTH, calibrated_rows: Tensor | None = None) -> None:
    """What `distill` promises of the model that it returns."""
    settings = adapter.peft_config["default"]
    assert isinstance(adapter, PeftModel) and not any(module.training for module in adapter.modules())
    assert settings.homotopy == 1.0
    stored = settings.calibration
    assert stored["length"] == length
    if calibrated_rows is not None:
        assert calibrate(adapter, calibrated_rows, seed=42) == stored  # the default of TrainingArguments
    adapter.merge_adapter(target_density=0.9)
    assert settings.visible_depth == choose_depths(stored, 0.9)
    with torch.no_grad():
        assert adapter(input_ids=tokens(1, length)).logits.isfinite().all()


class TestDistill:
    @pytest.mark.parametrize(("count", "trained_on"), [(19, 19), (20, 18)])
    @pytest.mark.parametrize("kind", [list, Dataset.from_list])
    def test_calibration_rows_are_held_out(self, tmp_path: Path, count: int, trained_on: int, kind: Any) -> None:
        """If they are at most a tenth: here two of twenty, but not of nineteen."""
        seen: dict[str, int] = {}

        class Sizes(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any, **kwargs: Any) -> None:
                data = train_dataloader.dataset
                seen[Path(args.output_dir).name] = len(data)
                last = tokens(count, LENGTH)[-trained_on:]
                assert torch.equal(torch.stack([torch.as_tensor(row["input_ids"]) for row in data]), last)

        made = kind([{"input_ids": row.tolist()} for row in tokens(count, LENGTH)])
        adapter = distill(base(), made, config(), arguments(tmp_path), callbacks=[Sizes()])
        assert seen == {"local": trained_on, "kl": trained_on}
        assert_trained(adapter, calibrated_rows=tokens(count, LENGTH)[:2])

    def test_token_rows(self, tmp_path: Path) -> None:
        model, stages = base(), Stages()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        adapter = distill(model, rows(4), config(), arguments(tmp_path), callbacks=[stages])
        assert stages.steps == [("local", 0), ("local", 1), ("kl", 0), ("kl", 1)]
        assert stages.learning_rates == {"local": 1e-2, "kl": 3e-3}
        assert stages.temperatures == {"local": 1.0, "kl": pytest.approx(2.0)}
        assert ["kl" in log for log in stages.logs] == [False, False, True, True]
        assert all(0.5 <= log["topology/target_density"] <= 0.9 for log in stages.logs[2:])
        assert adapter.get_base_model() is model
        after = {name: weight for name, weight in adapter.state_dict().items() if "topo_" not in name}
        assert len(after) == len(before)
        for name, weight in before.items():
            assert torch.equal(after[f"base_model.model.{name}"], weight), name
        assert_trained(adapter, calibrated_rows=torch.stack([row["input_ids"] for row in rows(2)]))

    def test_each_stage_trains(self, tmp_path: Path) -> None:
        def weights(**settings: Any) -> Tensor:
            adapter = distill(base(), rows(4), config(), arguments(tmp_path, **settings))
            return torch.cat([weight.detach().float().flatten() for weight in router_parameters(adapter).values()])

        neither = weights(local_steps=0, kl_steps=0)
        local, kl, both = weights(kl_steps=0), weights(local_steps=0), weights()
        assert len({tuple(each.tolist()) for each in (neither, local, kl, both)}) == 4
        assert torch.equal(both, weights())  # of the seed alone
        assert not torch.equal(both, weights(seed=1))

    @pytest.mark.parametrize("steps", [{}, {"local_steps": 0}, {"kl_steps": 0}])
    def test_fresh_routers_are_initialised_once(
        self, tmp_path: Path, steps: dict[str, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        texts = []

        def note(model: Any, input_ids: Tensor) -> None:
            texts.append(input_ids)
            initialize_routers(model, input_ids)

        monkeypatch.setattr(recipe, "initialize_routers", note)
        distill(base(), rows(4), config(), arguments(tmp_path, **steps))
        assert len(texts) == 1 and torch.equal(texts[0], rows(1)[0]["input_ids"][None])

    @pytest.fixture(scope="class")
    def of_two_rows(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
        """The routers that two rows of tensors train."""
        adapter = distill(base(), rows(2), config(), arguments(tmp_path_factory.mktemp("rows")))
        return router_parameters(adapter)

    @pytest.mark.parametrize("kind", ["Dataset", "IterableDataset", "endless generator", "lists"])
    def test_kinds_of_token_rows(self, tmp_path: Path, kind: str, of_two_rows: dict[str, Tensor]) -> None:
        lists = [{"input_ids": row["input_ids"].tolist()} for row in rows(2)]
        dataset: Any = {
            "Dataset": lambda: Dataset.from_list([{**row, "source": "a"} for row in lists]),
            "IterableDataset": lambda: Dataset.from_list(lists).to_iterable_dataset(),
            "endless generator": lambda: itertools.cycle(lists),
            "lists": lambda: lists,
        }[kind]()
        adapter = distill(base(), dataset, config(), arguments(tmp_path))
        for name, weight in of_two_rows.items():
            assert torch.equal(router_parameters(adapter)[name], weight), name
        assert_trained(adapter)

    def test_a_path(self, tmp_path: Path) -> None:
        base().save_pretrained(tmp_path / "base")
        adapter = distill(str(tmp_path / "base"), rows(4), config(), arguments(tmp_path))
        expected = distill(base(), rows(4), config(), arguments(tmp_path))
        for name, weight in router_parameters(expected).items():
            assert torch.equal(router_parameters(adapter)[name], weight), name

    def test_the_default_config(self, tmp_path: Path) -> None:
        adapter = distill(base(), rows(2, 140), args=arguments(tmp_path, local_steps=1, kl_steps=0))
        default, found = TopologyConfig(), adapter.peft_config["default"]
        for name in ("depth", "local_window", "router_dim", "balance_weight", "density_weight"):
            assert getattr(found, name) == getattr(default, name), name
        assert found.task_type == "CAUSAL_LM"

    def test_a_peft_model_is_trained_on(self, tmp_path: Path) -> None:
        adapter = distill(base(), rows(4), config(), arguments(tmp_path, adapter_dtype="float32"))
        before = {name: weight.detach().clone() for name, weight in router_parameters(adapter).items()}
        again = distill(
            adapter,
            rows(4, seed=5),
            args=arguments(tmp_path, local_learning_rate=1e-6, kl_steps=0, adapter_dtype="float32"),
        )
        assert again is adapter
        moved = [(weight - before[name]).abs().max().item() for name, weight in router_parameters(again).items()]
        assert 0 < max(moved) < 1e-3  # it went on from what it was, and was not initialised again
        assert_trained(again)

    def test_without_steps_an_adapter_is_calibrated(self, tmp_path: Path) -> None:
        adapter = routed(base(), depth=3)
        before = {name: weight.detach().clone() for name, weight in router_parameters(adapter).items()}
        distill(adapter, rows(4), args=arguments(tmp_path, local_steps=0, kl_steps=0))
        for name, weight in router_parameters(adapter).items():
            assert torch.equal(weight, before[name])
        assert_trained(adapter, calibrated_rows=torch.stack([row["input_ids"] for row in rows(2)]))


class TestText:
    def test_windows_follow_one_another(self) -> None:
        texts = ["w2 w3 w4", "w5", "w6 w7 w8 w9"]
        windows = text_windows(texts, tokenizer(), 3, 10)
        assert [window.tolist() for window in windows] == [[2, 3, 4], [1, 5, 1], [6, 7, 8]]
        assert all(window.dtype == torch.int64 for window in windows)
        without = text_windows(texts, tokenizer(end=False), 3, 10)
        assert [window.tolist() for window in without] == [[2, 3, 4], [5, 6, 7]]

    def test_begin_as_the_tokenizer_begins_a_text(self) -> None:
        texts = ["w2 w3 w4 w5 w6", "w7", "w8 w9 w10 w11"]
        windows = text_windows(texts, tokenizer(begin=True), 4, 10)
        assert [window.tolist() for window in windows] == [[0, 2, 3, 4], [0, 5, 6, 1], [0, 7, 1, 0], [0, 8, 9, 10]]
        assert torch.equal(torch.stack(text_windows(texts, tokenizer(begin=True), 4, 2)), torch.stack(windows[:2]))
        named = tokenizer()  # a token of that name that the tokenizer puts nowhere, as SmolLM2's
        named.bos_token = "<unk>"
        assert text_windows(texts, named, 3, 1)[0].tolist() == [2, 3, 4]

    def test_read_no_more_than_they_need(self) -> None:
        read = []

        def texts() -> Iterator[str]:
            for number in range(2, 60):
                read.append(number)
                yield f"w{number} w{number}"

        windows = text_windows(texts(), tokenizer(), 4, 2)
        assert [window.tolist() for window in windows] == [[2, 2, 1, 3], [3, 1, 4, 4]] and read == [2, 3, 4]
        assert len(text_windows(["w2 " * 100], tokenizer(), 4, 3)) == 3
        assert text_windows([], tokenizer(), 4, 3) == [] and text_windows(["w2"], tokenizer(), 4, 3) == []

    def test_empty_texts_are_passed_over(self) -> None:
        texts = ["", "w2 w3", "", " \n", "w4", ""]
        assert [window.tolist() for window in text_windows(texts, tokenizer(), 5, 10)] == [[2, 3, 1, 4, 1]]

    def test_a_window_of_text_may_look_padded(self, tmp_path: Path) -> None:
        """Where the padding token ends texts too, as SmolLM2's does, and a text brings its own end along."""
        model = base()
        model.config.pad_token_id = model.config.eos_token_id = 1
        args = arguments(tmp_path, max_length=13)
        double = ["w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12 <end>", *["w5 w6 w7 w8 " * 8] * 4]
        first = text_windows(double, tokenizer(), 13, 1)[0]
        assert first[-2:].tolist() == [1, 1]
        adapter = distill(model, double, config(), args, processing_class=tokenizer())
        assert adapter.peft_config["default"].calibration["length"] == 13
        own = [{"input_ids": window} for window in text_windows(double, tokenizer(), 13, 4)]
        with pytest.raises(TopologyConfigError, match=r"must be unpadded, got padding .*check_padding=False"):
            distill(adapter, own, args=args)
        with pytest.raises(TopologyConfigError, match="must be unpadded"):
            calibrate(adapter, first[None])
        assert calibrate(adapter, first[None], check_padding=False)["length"] == 13

    def test_a_tensor_of_rows(self, tmp_path: Path) -> None:
        ids = tokens(4, LENGTH)
        adapter = distill(base(), ids, config(), arguments(tmp_path))
        assert_trained(adapter, calibrated_rows=ids[:2])

    @pytest.mark.parametrize("column", [True, False])
    def test_text_rows(self, tmp_path: Path, column: bool) -> None:
        texts = [" ".join(f"w{max(token, 2)}" for token in row["input_ids"].tolist()) for row in rows(30, seed=4)]
        dataset = [{"text": text, "url": "a"} for text in texts] if column else texts
        args = arguments(tmp_path, max_length=16)
        adapter = distill(base(), dataset, config(), args, processing_class=tokenizer())
        windows = torch.stack(text_windows(texts, tokenizer(), 16, 2))
        assert_trained(adapter, length=16, calibrated_rows=windows)

    def test_the_tokenizer_is_the_model_s_own(self, tmp_path: Path) -> None:
        base().save_pretrained(tmp_path / "base")
        tokenizer().save_pretrained(tmp_path / "base")
        texts = ["w5 w6 w7 w8 " * 30]
        adapter = distill(str(tmp_path / "base"), texts, config(), arguments(tmp_path, max_length=16))
        assert_trained(adapter, 16, torch.stack(text_windows(texts, tokenizer(), 16, 2)))

    @pytest.mark.parametrize("steps", [0, 1, 6])
    def test_there_are_windows_for_steps_and_calibration(
        self, tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measured, asked = [], []

        def note(model: PeftModel, sequences: Tensor, **kwargs: Any) -> Any:
            measured.append(sequences)
            return calibrate(model, sequences, **kwargs)

        def windows(*args: Any) -> Any:
            asked.append(args[-1])
            return windows_of(*args)

        monkeypatch.setattr(recipe, "calibrate", note)
        monkeypatch.setattr(data, "windows_of", windows)
        args = arguments(tmp_path, max_length=16, local_steps=steps, kl_steps=0, calibration_rows=5)
        distill(base(), ["w5 w6 w7 w8 " * 100], config(), args, processing_class=tokenizer())
        assert asked == [steps + 5] and measured[0].shape == (5, 16)

    @pytest.mark.parametrize(("count", "during"), [(8, 2), (1, 1)])
    def test_training_calibrates_on_a_quarter_of_the_rows(
        self, tmp_path: Path, count: int, during: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        measured = []

        def note(model: PeftModel, sequences: Tensor, **kwargs: Any) -> Any:
            measured.append(sequences)
            return calibrate(model, sequences, **kwargs)

        monkeypatch.setattr(recipe, "calibrate", note)
        monkeypatch.setattr(densities, "calibrate", note)
        data = rows(9)
        distill(base(), data, config(), arguments(tmp_path, local_steps=0, kl_steps=1, calibration_rows=count))
        assert [len(sequences) for sequences in measured] == [during, count]
        assert torch.equal(measured[0], measured[1][:during])


class TestResume:
    def run(self, path: Path, stop: tuple[str, int] | None = None, **settings: Any) -> tuple[PeftModel, Stages]:
        """Distil four steps each; `stop` breaks off before a step of a stage."""
        stages = Stages()

        class Stop(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if (Path(args.output_dir).name, state.global_step) == stop:
                    raise KeyboardInterrupt

        args = arguments(path, local_steps=4, kl_steps=4, save_strategy="steps", save_steps=2, **settings)
        return distill(base(), rows(16), config(), args, callbacks=[Stop(), stages]), stages

    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
        """What a run without a stop trains."""
        return self.run(tmp_path_factory.mktemp("whole"))[0]

    @pytest.mark.parametrize(
        ("stop", "left"),
        [
            (("local", 3), [*(("local", step) for step in (2, 3)), *(("kl", step) for step in range(4))]),
            (("kl", 1), [("kl", step) for step in range(4)]),  # the first stage is not run again
            (("kl", 3), [("kl", 2), ("kl", 3)]),
            (None, []),
        ],
    )
    def test_goes_on_where_it_stopped(
        self, tmp_path: Path, stop: tuple[str, int] | None, left: list[Any], whole: PeftModel
    ) -> None:
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                self.run(tmp_path / "parts", stop)
        else:
            self.run(tmp_path / "parts")
        resumed, stages = self.run(tmp_path / "parts", resume_from_checkpoint=True)
        assert stages.steps == left
        for name, weight in router_parameters(whole).items():
            if stop != ("kl", 3):  # resumed inside a round of steps, it calibrates anew there
                assert torch.equal(router_parameters(resumed)[name], weight), name
        assert resumed.peft_config["default"].temperature == whole.peft_config["default"].temperature == 0.5
        assert_trained(resumed)

    def test_the_second_stage_needs_nothing_of_the_first(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            self.run(tmp_path, ("kl", 3))
        shutil.rmtree(tmp_path / "local")
        _, stages = self.run(tmp_path, resume_from_checkpoint=True)
        assert stages.steps == [("kl", 2), ("kl", 3)]

    def test_starts_afresh_unless_asked(self, tmp_path: Path) -> None:
        self.run(tmp_path)
        _, stages = self.run(tmp_path)
        assert len(stages.steps) == 8
        assert (tmp_path / "local" / "checkpoint-4").is_dir() and (tmp_path / "kl" / "checkpoint-4").is_dir()

    def test_passes_over_checkpoints_that_are_not_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder, names = tmp_path / "local", [f"checkpoint-{step}" for step in (4, 8, 12, 16)]
        routed(base()).save_pretrained(folder / names[0])
        TrainerState(global_step=4).save_to_json(str(folder / names[0] / "trainer_state.json"))
        for name in names[1:]:
            shutil.copytree(folder / names[0], folder / name)
        (folder / names[1] / "trainer_state.json").unlink()
        (folder / names[2] / "trainer_state.json").write_text('{"global_')
        routed(base(), seed=1).save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "adapter_model.safetensors", folder / names[3])
        args = arguments(tmp_path, resume_from_checkpoint=True)
        with pytest.warns(UserWarning, match="not whole") as warned:
            assert args.last_checkpoint("local") == str(folder / names[0])
        assert [name for each in warned for name in names if f"{name} is" in str(each.message)] == names[:0:-1]
        trainer = DistillationTrainer(
            routed(base(), homotopy=0.0), args.of_stage("local", 8, 1e-2), train_dataset=rows(2), num_queries=8
        )
        asked: list[Any] = []
        monkeypatch.setattr(Trainer, "train", lambda self, resume: asked.append(resume))
        with pytest.warns(UserWarning, match="not whole"):
            trainer.train(resume_from_checkpoint=True)
        assert asked == [str(folder / names[0])]

    def test_a_checkpoint_that_is_written_over_is_not_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its adapter would be this run's and its optimizer the last one's."""
        args = arguments(tmp_path).of_stage("local", 8, 1e-2)
        trainer = DistillationTrainer(routed(base(), homotopy=0.0), args, train_dataset=rows(2), num_queries=8)
        file = tmp_path / "local" / "checkpoint-4" / "trainer_state.json"
        file.parent.mkdir(parents=True)
        TrainerState(global_step=4).save_to_json(str(file))
        trainer.state.global_step = 4

        def stopped(*args: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Trainer, "_save_checkpoint", stopped)
        with pytest.raises(KeyboardInterrupt):
            trainer._save_checkpoint(trainer.model, None)
        assert not file.exists()

    def test_without_checkpoints_it_starts_afresh(self, tmp_path: Path) -> None:
        _, stages = self.run(tmp_path, resume_from_checkpoint=True)
        assert len(stages.steps) == 8


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"local_steps": -1}, "local_steps must be an integer >= 0"),
            ({"kl_steps": -1}, "kl_steps"),
            ({"num_queries": 0}, "num_queries"),
            ({"max_length": 1}, "max_length"),
            ({"calibration_rows": 0}, "calibration_rows"),
            ({"local_learning_rate": 0.0}, "local_learning_rate"),
            ({"kl_learning_rate": float("nan")}, "kl_learning_rate"),
            ({"kl_temperature": 0.0}, "kl_temperature"),
            ({"local_density_weight": -1.0}, "local_density_weight"),
            ({"kl_weight": -1.0}, "kl_weight"),
            ({"lm_weight": float("inf")}, "lm_weight"),
            ({"local_weight": -1.0}, "local_weight"),
            ({"kl_weight": 0.0}, "kl_weight or lm_weight must be > 0"),
            ({"lowest_density": 0.0}, "lowest_density"),
            ({"lowest_density": 0.95}, "lowest_density"),
            ({"highest_density": 1.1}, "highest_density"),
            ({"max_steps": 5}, "local_steps and kl_steps"),
            ({"num_train_epochs": 1.0}, "num_train_epochs must be left alone, got 1.0; set local_steps and kl_steps"),
            ({"learning_rate": 1e-3}, "set local_learning_rate and kl_learning_rate"),
            ({"target_density": 0.0}, "target_density must be a number in"),
            ({"resume_from_checkpoint": "runs/a"}, "each stage finds its own"),
        ],
    )
    def test_arguments_out_of_range(self, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(TopologyConfigError, match=message):
            arguments(tmp_path, **settings)

    @pytest.mark.parametrize(
        ("dataset", "message"),
        [
            ("a text of many words", "of text files, got 'a text of many words'; pass .text."),
            (b"bytes", "rows that are strings, .* got int in row 0"),
            (Path("corpus.txt"), "of text files, got .*corpus.txt"),
            ({"train": ["a"], "test": ["b"]}, r"got a dict of \['test', 'train'\]; choose a split"),
            (DatasetDict(train=Dataset.from_dict({"text": ["a"]})), "got a DatasetDict of .*choose a split"),
            ([["a", "b"]], "rows that are strings, or mappings .*got list"),
            (torch.zeros(3, dtype=torch.int64), r"int64 \[rows, T\] of token ids"),
            (torch.zeros(3, 16), r"int64 \[rows, T\] of token ids"),
        ],
    )
    def test_what_is_no_data_set(self, tmp_path: Path, dataset: Any, message: str) -> None:
        with pytest.raises(TopologyConfigError, match=message):
            distill(base(), dataset, config(), arguments(tmp_path), processing_class=tokenizer())

    @pytest.mark.parametrize("bad", [None, 7, ["w2"]])
    def test_a_row_without_a_text(self, tmp_path: Path, bad: Any) -> None:
        texts = [{"text": "w2 w3"}, {"text": "w4"}, {"text": bad}]
        with pytest.raises(TopologyConfigError, match=f"got {type(bad).__name__} in row 2"):
            distill(base(), texts, config(), arguments(tmp_path), processing_class=tokenizer())

    def test_arguments_of_another_kind(self, tmp_path: Path) -> None:
        with pytest.raises(TopologyConfigError, match=r"args must be a topo_adapter\.DistillConfig, got Training"):
            distill(base(), rows(2), config(), TrainingArguments(str(tmp_path)))  # type: ignore[arg-type]

    def test_a_density_out_of_reach_is_told_before_any_training(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of 24 tokens window and sinks show .37 by themselves."""
        said: list[str] = []
        monkeypatch.setattr(recipe._log, "warning", said.append)
        stages = Stages()
        with pytest.raises(
            TopologyConfigError, match=r"target_density must be at least 0\.367 in windows of 24 tokens"
        ):
            distill(base(), rows(20), config(), arguments(tmp_path, target_density=0.3), callbacks=[stages])
        assert not stages.steps and not said
        distill(base(), rows(20), config(), arguments(tmp_path, kl_steps=0, local_steps=1))
        assert len(said) == 1 and "target_density should be at least 0.367" in said[0] and "got 0.17" in said[0]
        said.clear()
        distill(base(), rows(20), config(), arguments(tmp_path, kl_steps=0, local_steps=1, target_density=0.8))
        assert not said

    def test_memory_is_pinned_for_a_device_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for there in (False, True):
            monkeypatch.setattr(torch.accelerator, "is_available", lambda there=there: there)
            assert arguments(tmp_path, use_cpu=False).dataloader_pin_memory is there

    @pytest.mark.parametrize(("given", "resume"), [(None, False), ("true", True), (True, True), ("False", False)])
    def test_spellings_of_resume(self, tmp_path: Path, given: Any, resume: bool) -> None:
        assert arguments(tmp_path, resume_from_checkpoint=given).resume is resume

    def test_a_config_for_a_peft_model(self, tmp_path: Path) -> None:
        with pytest.raises(TopologyConfigError, match="config must be None for a PeftModel"):
            distill(routed(base()), rows(2), config(), arguments(tmp_path))

    def test_an_adapter_loaded_for_inference(self, tmp_path: Path) -> None:
        routed(base()).save_pretrained(tmp_path / "adapter")
        adapter = PeftModel.from_pretrained(base(), str(tmp_path / "adapter"))
        with pytest.raises(UnsupportedModelError, match="is_trainable=True"):
            distill(adapter, rows(2), args=arguments(tmp_path))
        adapter = PeftModel.from_pretrained(base(), str(tmp_path / "adapter"), is_trainable=True)
        assert_trained(distill(adapter, rows(2), args=arguments(tmp_path)))

    def test_a_merged_adapter(self, tmp_path: Path) -> None:
        adapter = routed(base())
        adapter.merge_adapter()
        with pytest.raises(UnsupportedModelError, match="active, enabled"):
            distill(adapter, rows(2), args=arguments(tmp_path))

    @pytest.mark.parametrize(
        ("dataset", "message"),
        [
            ([], "got none"),
            ([{"prompt": "a", "answer": "b"}], r"got the columns \['answer', 'prompt'\]"),
            (rows(2, 5), "local_window"),  # window 3, 2 sinks
            (rows(1, 24) + rows(1, 23), r"rows of one length, got \[23, 24\]"),
            ([{"input_ids": torch.zeros(24, dtype=torch.int64)}], "unpadded"),
            (["w2 w3"], "text for 1 windows of 16 tokens .* got 0"),
            (["w2 " * 8] * 3, "got 1"),
        ],
    )
    def test_rows_that_cannot_be_trained_on(self, tmp_path: Path, dataset: Any, message: str) -> None:
        args = arguments(tmp_path, max_length=16, per_device_train_batch_size=2 if message == "got 1" else 1)
        stages = Stages()
        with pytest.raises(TopologyConfigError, match=message):
            distill(base(), dataset, config(), args, processing_class=tokenizer(), callbacks=[stages])
        assert not stages.steps  # before any training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_the_file_holds_what_was_calibrated(dtype: torch.dtype, tmp_path: Path) -> None:
    args = arguments(tmp_path, adapter_dtype=str(dtype).removeprefix("torch."))
    adapter = distill(base(), rows(4), config(), args)
    adapter.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    narrow = dtype == torch.float8_e4m3fn
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.bfloat16 if narrow and name.endswith("bias") else dtype), name
    assert len(stored) == 5 * 2
    loaded = PeftModel.from_pretrained(base(), str(tmp_path / "saved"))
    ids = tokens(2, 30)
    for model in (adapter, loaded):
        model.merge_adapter(target_density=0.8, safe_merge=True)
    with torch.no_grad():
        assert torch.equal(adapter(input_ids=ids).logits, loaded(input_ids=ids).logits)
    # trained on, it is float32 again: a step this small would vanish in bfloat16
    adapter.unmerge_adapter()
    before = {name: weight.detach().float().clone() for name, weight in router_parameters(adapter).items()}
    steps = arguments(tmp_path / "on", local_steps=2, kl_steps=0, local_learning_rate=1e-6, adapter_dtype="float32")
    distill(adapter, rows(4, seed=5), args=steps)
    moved = [(weight - before[name]).abs().max().item() for name, weight in router_parameters(adapter).items()]
    assert 0 < max(moved) < 1e-4


class TestScript:
    @pytest.fixture
    def script(self) -> Any:
        pytest.importorskip("trl")
        from recipes import distill as script

        return script

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A base model with its tokenizer, and texts."""
        base().save_pretrained(tmp_path / "base")
        tokenizer().save_pretrained(tmp_path / "base")
        for number in (1, 2):
            text = " ".join(f"w{max(token, 2)}" for token in tokens(1, 300, seed=number)[0].tolist())
            (tmp_path / f"{number}.txt").write_text(text)
        return tmp_path

    def parse(self, script: Any, arguments: list[str]) -> Any:
        from trl import ModelConfig, TrlParser

        kinds = (script.TextArguments, DistillConfig, ModelConfig, script.TopologyArguments)
        return TrlParser(kinds).parse_args_and_config(arguments)

    def test_writes_an_adapter(self, script: Any, folder: Path) -> None:
        given = f"""--model_name_or_path {folder}/base --text_files {folder}/1.txt {folder}/2.txt
            --output_dir {folder}/out --max_length 24 --local_steps 2 --kl_steps 2 --num_queries 8
            --calibration_rows 3 --lowest_density 0.4 --highest_density 0.8 --per_device_train_batch_size 1
            --depth 3 --visible_depth 2 --router_dim 8 --local_window 3 --num_sink_tokens 2
            --use_cpu true --bf16 false --dtype float32 --report_to none --save_strategy no --logging_steps 1"""
        trained = script.main(*self.parse(script, given.split()))

        assert (folder / "out" / "training.png").stat().st_size > 5000
        table = json.loads((folder / "out" / "adapter_config.json").read_text())
        assert table["base_model_name_or_path"] == f"{folder}/base" and table["homotopy"] == 1.0
        assert (table["depth"], table["local_window"], table["num_sink_tokens"]) == (3, 3, 2)
        loaded = AutoPeftModelForCausalLM.from_pretrained(str(folder / "out"))
        assert loaded.peft_config["default"].calibration == trained.peft_config["default"].calibration
        assert loaded.peft_config["default"].calibration["length"] == 24
        for model in (trained, loaded):
            model.merge_adapter(target_density=0.7)
        ids = tokens(2, 30)
        with torch.no_grad():
            logits = loaded(input_ids=ids).logits
            torch.testing.assert_close(logits, trained(input_ids=ids).logits)
            assert not torch.allclose(logits, base()(input_ids=ids).logits, atol=1e-3)

    def test_the_text_files_are_the_text(self, script: Any, folder: Path) -> None:
        text, *_ = self.parse(script, ["--text_files", f"{folder}/2.txt", "--output_dir", str(folder)])
        assert list(script.rows(text, seed=0)) == [(folder / "2.txt").read_text()]

    def test_a_data_set_is_the_text(self, script: Any, folder: Path) -> None:
        (folder / "data").mkdir()
        (folder / "data" / "rows.jsonl").write_text("".join(json.dumps({"body": body}) + "\n" for body in "ab"))
        given = f"--dataset_name {folder}/data --dataset_streaming true --text_column body --output_dir {folder}"
        text, training, *_ = self.parse(script, given.split())
        assert [row[training.text_column] for row in script.rows(text, seed=0)] == ["a", "b"]

    def test_the_training_texts_are_the_default(self, script: Any, folder: Path, monkeypatch: Any) -> None:
        asked: list[str] = []
        monkeypatch.setattr(texts, "fetch", lambda names, folder: asked.extend(names))
        monkeypatch.setattr(texts, "documents", lambda name, folder: [f"{name} {number}" for number in range(3)])
        text, *_ = self.parse(script, ["--output_dir", str(folder)])
        rows = [list(script.rows(text, seed)) for seed in (0, 0, 1)]
        assert rows[0] == rows[1] != rows[2] and sorted(rows[0]) == sorted(rows[2])
        assert {row.split()[0] for row in rows[0]} == set(asked) == set(texts.TRAINING) - set(texts.TUNING)
        assert asked and texts.TUNING and not set(asked) & set(texts.TUNING)

    def test_texts_take_turns_by_their_length(self) -> None:
        split = [[letter * size] * count for letter, size, count in (("a", 1, 100), ("b", 10, 3), ("c", 4, 5))]
        found = list(texts.taking_turns(split, 0))
        assert sorted(found) == sorted(document for text in split for document in text)
        seen = dict.fromkeys("abc", 0)
        for document in found:
            left = [letter for letter, size in (("a", 100), ("b", 30), ("c", 20)) if seen[letter] < size]
            assert seen[document[0]] == min(seen[letter] for letter in left)
            seen[document[0]] += len(document)

    def test_the_yaml_fits_the_arguments(self, script: Any) -> None:
        path = REPOSITORY / "recipes" / "distill.yaml"
        text, training, model, topology = self.parse(script, ["--config", str(path)])
        assert model.model_name_or_path == "embedded" and text.text_files is None
        assert (training.lowest_density, training.highest_density, training.kl_steps) == (0.05, 0.4, 1400)
        assert TopologyConfig(**vars(topology)) == TopologyConfig()
        default = DistillConfig(output_dir=training.output_dir)
        changed = {f.name for f in fields(default) if getattr(default, f.name) != getattr(training, f.name)}
        assert changed <= {"logging_dir"}, "distill(model, data) is the recipe"
