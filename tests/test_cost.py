"""What a training notes of itself in the adapter's config."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft_helpers import routed, tiny, tokens
from test_recipe import LENGTH, arguments, config, rows
from transformers import Trainer, TrainerState, TrainingArguments

from topo_adapter import __version__, distill
from topo_adapter.training.cost import Meter, data_name, rows_read

datasets = pytest.importorskip("datasets")  # of the train extra


def base() -> Any:
    return tiny(num_hidden_layers=1)


def runs_of(adapter: Any) -> list[Any]:
    return adapter.peft_config["default"].training_runs


def saved_runs(folder: Path) -> list[Any]:
    return json.loads((folder / "adapter_config.json").read_text())["training_runs"]


def test_distill_notes_both_stages(tmp_path: Path) -> None:
    lists = [{"input_ids": row["input_ids"].tolist()} for row in rows(3)]
    info = datasets.DatasetInfo(dataset_name="books", config_name="old")
    dataset = datasets.Dataset.from_list(lists, info=info)
    args = arguments(tmp_path, local_steps=1, kl_steps=4, save_strategy="steps", save_steps=2)
    adapter = distill(base(), dataset, config(), args)
    local, kl = runs_of(adapter)
    assert (local.pop("stage"), local.pop("steps"), local.pop("tokens")) == ("local", 1, LENGTH)
    assert (kl.pop("stage"), kl.pop("steps"), kl.pop("tokens")) == ("kl", 4, 4 * LENGTH)
    for run in (local, kl):
        assert 0 <= run.pop("seconds") < 600
        assert run.pop("versions").keys() == {"topo_adapter", "peft", "transformers", "torch"}
        assert run == {"data": "books, old", "length": LENGTH, "device": "cpu"}
    assert [run["steps"] for run in saved_runs(tmp_path / "kl" / "checkpoint-4")] == [1, 4]

    # what the process that was stopped noted is in its checkpoint
    more = arguments(tmp_path, local_steps=1, kl_steps=6, resume_from_checkpoint="true")
    again = distill(base(), dataset, config(), more)
    assert [(run["stage"], run["steps"], run["tokens"]) for run in runs_of(again)] == [
        ("local", 1, LENGTH),
        ("kl", 4, 4 * LENGTH),
        ("kl", 2, 2 * LENGTH),
    ]
    done = distill(base(), dataset, config(), arguments(tmp_path, kl_steps=4, resume_from_checkpoint="true"))
    assert [run["steps"] for run in runs_of(done)] == [1, 4], "nothing was left to do"


def test_any_trainer_notes_what_it_knows(tmp_path: Path) -> None:
    adapter = routed(base(), homotopy=0.0)
    args = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        include_num_input_tokens_seen=True,
    )
    data = [{"input_ids": row, "labels": row} for row in tokens(2, 12)]
    Trainer(adapter, args, train_dataset=data).train()
    run = dict(runs_of(adapter)[0])
    assert run["versions"]["topo_adapter"] == __version__
    assert run.keys() == {"steps", "tokens", "seconds", "device", "versions"}
    assert (run["steps"], run["tokens"]) == (2, 2 * 2 * 12)


def test_a_run_of_no_step_is_none() -> None:
    adapter = routed(base())
    state = TrainerState()
    Meter(state).note(TrainingArguments(report_to=[], use_cpu=True), state, adapter, None)
    assert runs_of(adapter) is None


def test_rows_of_epochs() -> None:
    """Against counting: 7 rows in batches of 2, two of which are a step."""
    args = SimpleNamespace(train_batch_size=2, world_size=1, gradient_accumulation_steps=2, dataloader_drop_last=False)
    batches = [2, 2, 2, 1]

    class Loader:
        dataset = range(7)

        def __len__(self) -> int:
            return len(batches)

    of_steps = itertools.cycle([batches[:2], batches[2:]])
    counted = [0, *itertools.accumulate(sum(next(of_steps)) for _ in range(6))]
    assert [rows_read(args, steps, Loader()) for steps in range(7)] == counted  # type: ignore[arg-type]


def test_names_of_data(tmp_path: Path) -> None:
    assert data_name(tmp_path / "secret" / "my-texts") == data_name(str(tmp_path / "secret" / "my-texts")) == "my-texts"
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.jsonl").write_text('{"text": "a"}\n')
    for streaming in (False, True):
        splits = datasets.load_dataset(str(tmp_path / "books"), streaming=streaming, cache_dir=str(tmp_path / "cache"))
        (loaded,) = splits.values()
        assert data_name(loaded.map(dict)) == "books"
    for nameless in (datasets.Dataset.from_list([{"a": 1}]), [1], iter([1]), tokens(1, 2), None):
        assert data_name(nameless) is None
