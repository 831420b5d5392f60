"""Train, save, load, merge and measure a small topology adapter on a real model, on a CPU, in minutes.

    python recipes/demo.py                                            # embedded SmolLM2-135M
    python recipes/demo.py --model Qwen/Qwen3-0.6B --max_steps 200    # any hub id or local path

Everything goes to `--output_dir`: `adapter/`, `results.jsonl`, `routing.png`.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from topo_adapter import (
    DistillationTrainer,
    TopologyConfig,
    calibrate,
    initialize_routers,
    measure_density,
    record_routes,
    set_density,
)
from topo_adapter.core.layout import contiguous_layout
from topo_adapter.core.visibility import always_visible
from topo_evaluation.embedded import smollm2, standard_library, windows
from topo_evaluation.results import Row, flat, make_row, origin, write
from topo_evaluation.tasks import continuation


@dataclass
class DemoArguments:
    model: str = field(default="embedded", metadata={"help": "'embedded', a hub id or a local path."})
    output_dir: str = field(default="runs/demo", metadata={"help": "Where everything is written."})
    max_steps: int = field(default=80, metadata={"help": "Training steps of one window each."})
    train_length: int = field(default=1024, metadata={"help": "Tokens per training window."})
    eval_length: int = field(default=2048, metadata={"help": "Tokens per held-out window."})
    eval_windows: int = field(default=3, metadata={"help": "Number of held-out windows."})
    learning_rate: float = field(default=1e-2)
    density_weight: float = field(default=0.03, metadata={"help": "Price of density against kept attention."})
    depth: int = field(default=4, metadata={"help": "Digits per address; all depths are trained at once."})
    density: float = field(default=0.17, metadata={"help": "Density that the dial is turned to, at eval_length."})
    calibration_windows: int = field(default=2, metadata={"help": "Training windows that the dial is calibrated on."})
    local_window: int = field(default=64)
    seed: int = field(default=0)


@torch.no_grad()
def perplexity(model: torch.nn.Module, text: Tensor, label: str, mask: Tensor | None = None) -> tuple[float, float]:
    """Perplexity over the windows `[K, N]` and seconds per window; `mask` is bool `[N, N]`, True = visible."""
    total, start = 0.0, time.perf_counter()
    for ids in tqdm(text, desc=f"perplexity, {label}", leave=False):
        inputs = ids[None].to(model.device)
        logits = model(inputs, attention_mask=None if mask is None else mask[None, None], use_cache=False).logits
        total += torch.nn.functional.cross_entropy(logits[0, :-1].float(), inputs[0, 1:]).item()
    return math.exp(total / len(text)), (time.perf_counter() - start) / len(text)


def window_mask(length: int, window: int, sinks: int) -> Tensor:
    """Local window and sinks without a tree, bool `[N, N]`."""
    layout = contiguous_layout(1, length)
    return always_visible(layout, layout, window, sinks)[0]


def share(mask: Tensor) -> float:
    """Density of a mask `[N, N]`: visible pairs over causal pairs."""
    return mask.sum().item() / (len(mask) * (len(mask) + 1) / 2)


def window_of_density(length: int, density: float, sinks: int) -> int:
    """The smallest window that, with the sinks, reaches a density."""
    low, high = 1, length
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if share(window_mask(length, middle, sinks)) < density else (low, middle)
    return low


def picture(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor, arity: int, path: Path) -> None:
    """Density per layer and head, and the balls of the tokens of a text in one layer."""
    densities = measure_density(model, ids[None].to(model.device))
    routes = record_routes(model, ids[None].to(model.device))
    grid = torch.stack(list(densities.values()))
    layer = list(densities)[int(grid.mean(1).sub(grid.mean()).abs().argmin())]  # a layer of typical density
    record, shown = routes[layer], min(96, len(ids))
    query, key = record.balls(arity)
    rows = [balls[0].cpu() for balls in (query[:, :, 0], key)]
    balls = torch.stack(rows, 1).flatten(0, 1)[:, -shown:]  # query and key row of each head in turn

    figure, (left, right) = plt.subplots(1, 2, figsize=(16, 6.5), width_ratios=[1, 2.4], layout="constrained", dpi=110)
    image = left.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    left.set(title=f"density on {len(ids)} tokens (mean {grid.mean():.3f})", xlabel="query head", ylabel="layer")
    figure.colorbar(image, ax=left, label="visible pairs / causal pairs")
    right.imshow(balls, aspect="auto", cmap="tab20", interpolation="nearest")
    right.set(title=f"layer {layer}: ball of each token (colour), query above key row per head")
    right.set_yticks(range(len(balls)), [f"head {i // 2} {'qk'[i % 2]}" for i in range(len(balls))], fontsize=7)
    words = [tokenizer.decode([i]).replace("\n", "\\n").replace("$", "\\$") for i in ids[-shown:].tolist()]
    right.set_xticks(range(shown), words, rotation=90, fontsize=6, family="monospace")
    figure.savefig(path)
    plt.close(figure)


def main(arguments: DemoArguments) -> list[Row]:
    transformers.set_seed(arguments.seed)
    started = time.perf_counter()
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    source = smollm2() if arguments.model == "embedded" else arguments.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    train_files, held_out_files = standard_library()
    train = windows(train_files, tokenizer, arguments.train_length, arguments.max_steps)
    held_out = windows(held_out_files, tokenizer, arguments.eval_length, arguments.eval_windows)

    def fresh_base() -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", device_map="auto")
        return model.float() if model.device.type == "cpu" else model

    # train
    config = TopologyConfig(depth=arguments.depth, local_window=arguments.local_window, router_dim=32)
    model = get_peft_model(fresh_base(), config)
    initialize_routers(model, train[:1].to(model.device))
    model.print_trainable_parameters()
    trainer = DistillationTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output / "trainer"),
            max_steps=arguments.max_steps,
            per_device_train_batch_size=1,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            seed=arguments.seed,
        ),
        train_dataset=[{"input_ids": ids} for ids in train],
        num_queries=64,
        density_weight=arguments.density_weight,
    )
    clock = time.perf_counter()
    trainer.train()
    train_seconds = time.perf_counter() - clock

    # calibrate the density dial, on a few of the training windows, and turn it to the length that is measured
    clock = time.perf_counter()
    calibrate(model, train[: arguments.calibration_windows], around=())
    set_density(model, arguments.density, length=arguments.eval_length)
    calibrate_seconds = time.perf_counter() - clock
    model.save_pretrained(output / "adapter")
    size = (output / "adapter" / "adapter_model.safetensors").stat().st_size
    del model, trainer

    # load into a fresh base and measure
    sinks, length = config.num_sink_tokens, arguments.eval_length
    model = PeftModel.from_pretrained(fresh_base(), str(output / "adapter")).eval()
    layers = [torch.stack(list(measure_density(model, ids[None].to(model.device)).values())) for ids in held_out]
    density = torch.stack(layers).mean().item()
    longer = window_of_density(length, density, sinks)
    rows: list[Row] = []

    def measure(name: str, density: float, mask: Tensor | None = None) -> None:
        device_mask = None if mask is None else mask.to(model.device)
        ppl, seconds = perplexity(model, held_out, name, device_mask)
        rows.append({"model": name, "perplexity": ppl, "density": density, "seconds_per_window": seconds})

    with model.disable_adapter():
        measure("dense", 1.0)
        for window in (arguments.local_window, longer):
            mask = window_mask(length, window, sinks)
            measure(f"window {window} + {sinks} sinks only", share(mask), mask)
        prompt = held_out[0, : length // 2]
        texts = {"dense": continuation(model, tokenizer, prompt)}
    measure("adapter, unmerged", density)
    model.merge_adapter()
    measure("adapter, merged", density)
    texts["merged"] = continuation(model, tokenizer, prompt)
    picture(model, tokenizer, held_out[0], config.arity, output / "routing.png")

    settings = asdict(arguments) | {
        "held_out": f"{arguments.eval_windows} windows of {length} tokens, held-out standard-library modules",
    }
    where = origin(source, model.device)
    run = {
        "adapter_bytes": size,
        "train_seconds": train_seconds,
        "calibrate_seconds": calibrate_seconds,
        "total_seconds": time.perf_counter() - started,
    }
    found = [make_row(where, "demo", {**settings, "method": row.pop("model")}, row) for row in rows]
    found.append(make_row(where, "run", settings, run))
    found += [make_row(where, "continuation", {**settings, "method": name}, {}, text) for name, text in texts.items()]
    write(output / "results.jsonl", found)
    report(found)
    return found


def report(rows: list[Row]) -> None:
    """Print the table and the continuations."""
    print(f"\n{'':34}{'perplexity':>11}{'density':>9}{'s/window':>10}")
    for row in (flat(row) for row in rows if row["what"] == "demo"):
        print(f"{row['method']:34}{row['perplexity']:11.2f}{row['density']:9.3f}{row['seconds_per_window']:10.2f}")
    (run,) = (flat(row) for row in rows if row["what"] == "run")
    print(f"\nheld out: {run['held_out']}")
    print(
        f"adapter {run['adapter_bytes'] / 1e6:.2f} MB, trained in {run['train_seconds']:.0f} s, calibrated "
        f"in {run['calibrate_seconds']:.0f} s, everything in {run['total_seconds']:.0f} s, in {run['output_dir']}"
    )
    for row in (flat(row) for row in rows if row["what"] == "continuation"):
        print(f"\n{row['method']} continues: {row['note']!r}")


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()
    main(parsed)
