"""What the library computes, bit by bit, so that a change that should change nothing can show that it does not.

    python tests/goldens.py record before.pt          # on main; also --device cuda
    python tests/goldens.py record after.pt           # on the branch, same machine, same versions
    python tests/goldens.py compare before.pt after.pt

Everything goes through the public functions: logits, losses, gradients, decoded tokens, routes, calibration tables,
trained and saved weights. Without a GPU a second part runs the kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__" and "--device" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from peft import PeftModel
from peft_helpers import loss_of, routed, router_gradients, tiny, tokens
from torch import Tensor
from transformers import DynamicCache, Trainer, TrainingArguments

from topo_adapter import (
    DistillationTrainer,
    DistillConfig,
    KLTrainer,
    TopologyConfig,
    calibrate,
    distill,
    load_merged,
    measure_density,
    record_routes,
    save_merged,
)
from topo_adapter.ops.backend import forced

#: Maps with dense heads, heads without a tree, layers of one depth and, in most families, dense layers.
SETTINGS: dict[str, dict[str, Any]] = {
    "map": {"visible_depth": {1: [0, 2, 3, 5], 3: [1, 1, 4, 4]}},
    "kv_head": {"route_per": "kv_head", "tie_query_key": True, "visible_depth": {1: [2, 1], 3: 5}},
    "ternary": {"arity": 3, "depth": 3, "visible_depth": 2, "gradient_bridge": "masked", "num_sink_tokens": 0},
}
FAMILIES = ("llama", "gemma2", "qwen3")


class Recorder:
    """Values by name, on the CPU."""

    def __init__(self, device: str, length: int) -> None:
        self.device, self.length = device, length
        self.values: dict[str, Any] = {}

    def add(self, name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                self.add(f"{name}/{key}", each)
            return
        assert name not in self.values, name
        self.values[name] = value.detach().cpu().clone() if isinstance(value, Tensor) else value

    def model(self, family: str, dtype: torch.dtype, **settings: Any) -> PeftModel:
        size = {"hidden_size": 64} if family == "llama" else {}  # the kernels need a head dimension of 16
        # nothing that matters is left to a default, which may change
        return routed(tiny(family, dtype=dtype, **size).to(self.device), **{"balance_weight": 0.01, **settings})

    def ids(self, batch: int = 2, seed: int = 0) -> Tensor:
        return tokens(batch, self.length, seed).to(self.device)


def layouts(ids: Tensor) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Plain rows, left padding, and two packed documents."""
    length = ids.shape[1]
    yield "plain", {}
    mask = torch.ones_like(ids)
    mask[1, : length // 3] = 0
    yield "padded", {"attention_mask": mask}
    first = length // 2
    positions = torch.cat([torch.arange(first), torch.arange(length - first)]).to(ids.device)
    yield "packed", {"position_ids": positions[None].expand_as(ids)}


@torch.no_grad()
def forwards(record: Recorder, name: str, model: PeftModel) -> None:
    ids = record.ids()
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        state = f"{name}/{'merged' if merged else 'unmerged'}"
        for layout, inputs in layouts(ids):
            logits = model(input_ids=ids, use_cache=False, **inputs).logits
            if layout == "padded":
                logits = logits[inputs["attention_mask"].bool()]
            record.add(f"{state}/logits/{layout}", logits)
        mask = next(inputs for layout, inputs in layouts(ids) if layout == "padded")["attention_mask"]
        record.add(
            f"{state}/generated",
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0),
        )
        cache = DynamicCache(config=model.config)
        chunks = ids.split([record.length // 2, 18, record.length - record.length // 2 - 18], 1)
        steps = [model(input_ids=chunk, past_key_values=cache).logits for chunk in chunks]
        record.add(f"{state}/chunks", torch.cat(steps, 1))
    for layer, routes in record_routes(model, ids).items():
        record.add(f"{name}/routes/{layer}", vars(routes))
    record.add(f"{name}/density", measure_density(model, ids))
    model.unmerge_adapter()


def gradients(record: Recorder, name: str, model: PeftModel, homotopies: tuple[float, ...] = (0.0, 0.5, 1.0)) -> None:
    config = model.peft_config["default"]
    model.train()
    for homotopy in homotopies:
        for layout, inputs in layouts(record.ids()):
            model.zero_grad()
            config.homotopy = homotopy
            torch.manual_seed(0)
            real = inputs.get("attention_mask", torch.ones_like(record.ids())).bool()
            labels = record.ids().masked_fill(~real, -100)
            loss = model(input_ids=record.ids(), labels=labels, use_cache=False, **inputs).loss
            assert torch.isfinite(loss), (name, homotopy, layout)
            loss.backward()
            record.add(f"{name}/{homotopy}/{layout}/loss", loss)
            record.add(f"{name}/{homotopy}/{layout}/gradients", router_gradients(model))
    model.eval()


def arguments(folder: str, record: Recorder, steps: int, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "use_cpu": record.device == "cpu",
        "disable_tqdm": True,
        **more,
    }


def weights(model: PeftModel) -> dict[str, Tensor]:
    return {name: weight.float() for name, weight in model.named_parameters() if ".topo_routers." in name}


def logs(trainer: Trainer) -> list[float]:
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def distillation(record: Recorder, name: str, rows: list[dict[str, Tensor]], **settings: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = record.model("llama", torch.float32, homotopy=0.0, **settings)
        local = DistillationTrainer(
            model=model,
            args=TrainingArguments(**arguments(folder, record, 2)),
            train_dataset=rows,
            num_queries=record.length // 2,
        )
        local.train()
        record.add(f"{name}/local/losses", logs(local))
        record.add(f"{name}/local/weights", weights(model))


def trainings(record: Recorder, name: str, **settings: Any) -> None:
    rows = [{"input_ids": row} for row in tokens(24, record.length, 3)]
    distillation(record, name, rows, **settings)
    with tempfile.TemporaryDirectory() as folder:
        model = record.model("llama", torch.float32, **settings)
        for checkpointing in (False, True):
            kl = KLTrainer(
                model=model,
                args=TrainingArguments(**arguments(folder, record, 3, gradient_checkpointing=checkpointing)),
                train_dataset=rows,
                densities=(0.3, 0.6),
                calibration_rows=tokens(2, record.length, 4),
                lm_weight=0.5,
            )
            kl.train()
            kind = "checkpointed" if checkpointing else "kl"
            record.add(f"{name}/{kind}/losses", logs(kl))
            record.add(f"{name}/{kind}/weights", weights(model))
        base = tiny("llama", hidden_size=64)
        adapter = distill(
            base,
            rows,
            TopologyConfig(depth=4, local_window=3, num_sink_tokens=2, router_dim=8, balance_weight=0.01, **settings),
            DistillConfig(
                **{key: value for key, value in arguments(folder, record, 2).items() if key != "max_steps"},
                local_steps=2,
                kl_steps=2,
                calibration_rows=2,
                target_density=0.5,
            ),
        )
        adapter.save_pretrained(folder)
        saved = Path(folder, "adapter_model.safetensors").read_bytes()
        record.add(f"{name}/distilled/file", torch.frombuffer(bytearray(saved), dtype=torch.uint8))
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        record.add(f"{name}/distilled/depths", str(adapter.peft_config["default"].visible_depth))
        record.add(f"{name}/distilled/homotopy", config["homotopy"])


def calibrations(record: Recorder, name: str, dtype: torch.dtype, **settings: Any) -> None:
    model = record.model("llama", dtype, **settings)
    table = calibrate(model, record.ids(3, 5), seed=1, draws=2, target_density=0.5)
    record.add(f"{name}/table", json.dumps(table))
    model.merge_adapter(target_density=0.4)
    ids = record.ids()
    with torch.no_grad():
        record.add(f"{name}/logits", model(input_ids=ids).logits)
    with tempfile.TemporaryDirectory() as folder:
        save_merged(model.merge_and_unload(), folder)
        loaded = load_merged(folder, dtype=dtype).to(record.device)
        with torch.no_grad():
            record.add(f"{name}/loaded", loaded(input_ids=ids).logits)


def on_cpu(values: dict[str, Any]) -> None:
    for dtype, length in ((torch.float32, 41), (torch.float64, 41), (torch.float32, 700)):
        record = Recorder("cpu", length)
        # Gemma 2's own padded rows are NaN in float64
        for family in FAMILIES if (dtype, length) == (torch.float32, 41) else FAMILIES[:1]:
            for settings, options in SETTINGS.items():
                name = f"{family}/{settings}"
                forwards(record, f"forward/{name}", record.model(family, dtype, **options))
                if length == 41:
                    gradients(record, f"gradient/{name}", record.model(family, dtype, **options))
        if length == 41:
            for settings in ("map", "kv_head"):
                calibrations(record, f"calibration/{settings}", dtype, **SETTINGS[settings])
        values[f"{dtype}/{length}"] = record.values
    record = Recorder("cpu", 41)
    trainings(record, "training")
    trainings(record, "training of KV heads", route_per="kv_head")
    values["training"] = record.values


def in_the_interpreter(values: dict[str, Any]) -> None:
    from conftest import speed_up_the_interpreter

    speed_up_the_interpreter()
    record = Recorder("cpu", 30)
    with forced(True):
        model = record.model("llama", torch.float32, **SETTINGS["kv_head"])
        model.merge_adapter()
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            for number, chunk in enumerate(record.ids(1).split([22, 8], 1)):  # sorted, and scanned
                record.add(f"chunk {number}", model(input_ids=chunk, past_key_values=cache).logits)
        model = record.model("llama", torch.float32, **SETTINGS["map"]).train()
        torch.manual_seed(0)
        loss = loss_of(model, record.ids(1))
        loss.backward()
        record.add("loss", loss)
        record.add("gradients", router_gradients(model))
        distillation(record, "training", [{"input_ids": row} for row in tokens(4, record.length, 3)])
    values["interpreter"] = record.values


def on_gpu(values: dict[str, Any]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        record = Recorder("cuda", 900)
        for settings, options in SETTINGS.items():
            forwards(record, f"forward/{settings}", record.model("llama", dtype, **options))
            gradients(record, f"gradient/{settings}", record.model("llama", dtype, **options))
        if dtype == torch.float32:
            trainings(record, "training")
            calibrations(record, "calibration", dtype, **SETTINGS["map"])
        values[f"cuda/{dtype}"] = record.values


def differences(before: Any, after: Any, name: str = "") -> Iterator[str]:
    """Names of values that are not the same, bit by bit, and how far apart they are."""
    if isinstance(before, dict):
        for key in before.keys() | after.keys():
            if key not in before or key not in after:
                yield f"{name}/{key}: only {'before' if key in before else 'after'}"
            else:
                yield from differences(before[key], after[key], f"{name}/{key}")
    elif isinstance(before, Tensor):
        if before.shape != after.shape or before.dtype != after.dtype:
            yield f"{name}: {before.dtype} {tuple(before.shape)} became {after.dtype} {tuple(after.shape)}"
        elif not torch.equal(before, after):
            yield f"{name}: up to {(before.double() - after.double()).abs().max():.3g} apart"
    elif before != after:
        yield f"{name}: {str(before)[:60]} became {str(after)[:60]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("files", nargs="+")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--part", default="all", choices=["all", "torch", "interpreter"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.action == "record":
        values: dict[str, Any] = {}
        if options.device == "cuda":
            on_gpu(values)
        else:
            torch.set_num_threads(1)
            if options.part != "interpreter":
                on_cpu(values)
            if options.part != "torch":
                in_the_interpreter(values)
        torch.save(values, options.files[0])
        print(f"{sum(len(part) for part in values.values())} values")
        return 0
    before, after = (torch.load(file, weights_only=False) for file in options.files)
    found = sorted(differences(before, after))
    print("\n".join(found[:60]))
    print(f"{len(found)} of {sum(len(part) for part in before.values())} values differ")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
