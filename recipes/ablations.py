"""Train variants of the default recipe, each without one part that we claim matters, and compare them.

    python recipes/ablations.py --variants default tied no_kl --output runs/ablations.jsonl
    python recipes/ablations.py --report_only --output runs/ablations.jsonl     # the table of what is there

Every variant sees the same texts in the same order for the same number of steps, and is measured on the same windows:
perplexity over dense at the density dial's targets, and at every uniform depth (`depth_1`, ...), which is what a
variant reaches without the dial. Lines of JSON; processes may write to one file side by side. `paper` is
the paper's recipe: tied addresses, the collapsed start, the masked bridge, the language-model loss alone. `sft`,
`sft_long` and `sft_lora` are TRL's SFTTrainer on the same documents, with its own defaults on rows of up to 1,024
tokens, on rows of `length`, and with a LoRA trained beside; they take as many steps. What a LoRA learned is in its
loss over the dense base; target 1.0 shows it alone.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer
from trl import SFTConfig, SFTTrainer

from topo_adapter import TopologyConfig, TopologyConfigError, TopologyTrainerMixin, calibrate, distill
from topo_adapter.sft import TopologySFTTrainer
from topo_adapter.training.callback import TopologyCallback
from topo_adapter.training.data import text_windows as cut
from topo_adapter.training.recipe import DistillConfig
from topo_adapter.training.routers import active_configs
from topo_evaluation.depths import over_depths
from topo_evaluation.embedded import source
from topo_evaluation.measures import Case, config_of, copy_windows
from topo_evaluation.results import Row, append, flat, make_row, origin, read
from topo_evaluation.texts import EVALUATION, FOLDER, text_windows, training_documents


@dataclass(frozen=True)
class Variant:
    """What differs from the default: fields of `TopologyConfig` and of `DistillConfig`.

    sft: None distils; otherwise fields of `SFTConfig`, whose trainer trains. long_rows: rows of the windows' length,
    not of TRL's. lora: one is trained beside.
    """

    topology: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    sft: dict[str, Any] | None = None
    long_rows: bool = False
    lora: bool = False


PAPER = "paper"
#: Routers that have no hidden layer.
HEADS: dict[str, Any] = {"router_input": "heads", "router_dim": TopologyConfig.router_dim}
VARIANTS: dict[str, Variant] = {
    "default": Variant(),
    "tied": Variant({"tie_query_key": True}),
    "masked_bridge": Variant({"gradient_bridge": "masked"}),
    "no_kl": Variant(training={"kl_steps": 0}),
    "no_local": Variant(training={"local_steps": 0}),
    "one_density": Variant(training={"lowest_density": 0.1, "highest_density": 0.1}),
    "kv_head": Variant({"route_per": "kv_head"}),
    "visits_4": Variant({"visits": 4}),
    "visits_8": Variant({"visits": 8}),
    "kv_head_visits_4": Variant({"route_per": "kv_head", "visits": 4}),
    "kv_head_visits_8": Variant({"route_per": "kv_head", "visits": 8}),
    "kv_head_own_depths": Variant({"route_per": "kv_head", "depth_per": "query_head"}),
    "heads": Variant({**HEADS, "visits": 1}),
    "heads_visits_8": Variant({**HEADS, "visits": 8}),
    "heads_visits_8_beside": Variant({**HEADS, "visits": 8}, training={"local_weight": 1.0}),
    "heads_visits_8_slow": Variant({**HEADS, "visits": 8}, training={"kl_learning_rate": 1e-3}),
    "kv_head_heads_visits_8": Variant({**HEADS, "visits": 8, "route_per": "kv_head"}),
    "heads_4_visits_8": Variant({**HEADS, "visits": 8, "arity": 4, "depth": 4, "visible_depth": 3}),
    "heads_16_visits_8": Variant({**HEADS, "visits": 8, "arity": 16, "depth": 2, "visible_depth": 1}),
    "router_dim_8": Variant({"router_dim": 8}),
    "router_dim_16": Variant({"router_dim": 16}),
    "router_dim_64": Variant({"router_dim": 64}),
    "router_dim_90": Variant({"router_dim": 90}),
    "router_dim_90_beside": Variant({"router_dim": 90}, training={"local_weight": 1.0}),
    "router_dim_90_visits_8": Variant({"router_dim": 90, "visits": 8}),
    "arity_3": Variant({"arity": 3, "depth": 5, "visible_depth": 3}),
    "arity_5": Variant({"arity": 5, "depth": 3, "visible_depth": 2}),
    "arity_7": Variant({"arity": 7, "depth": 2, "visible_depth": 1}),
    PAPER: Variant(
        {
            "tie_query_key": True,
            "gradient_bridge": "masked",
            "init_weights": "collapse",
            "balance_weight": 0.01,
            "density_weight": 0.0,
        }
    ),
    "sft": Variant(sft={}),
    "sft_long": Variant(sft={"per_device_train_batch_size": 2}, long_rows=True),
    "sft_lora": Variant(sft={"learning_rate": 2e-4}, lora=True),  # TRL's advice for a LoRA
}
#: Characters of a token, about, and of the shortest row for SFT.
CHARACTERS, LEAST_ROW = 4.1, 1500


@dataclass
class AblationArguments:
    output: str = field(default="runs/ablations.jsonl", metadata={"help": "JSON lines; rows are appended."})
    variants: list[str] = field(default_factory=lambda: list(VARIANTS), metadata={"help": "Names of VARIANTS."})
    report_only: bool = field(default=False, metadata={"help": "Train nothing, print the table of `output`."})
    model: str = field(default="embedded", metadata={"help": "'embedded', a hub id or a local path."})
    length: int = field(default=4096, metadata={"help": "Tokens per window, in training and evaluation."})
    local_steps: int = field(default=100)
    kl_steps: int = field(default=300)
    calibration_rows: int = field(default=DistillConfig.calibration_rows)
    densities: list[float] = field(default_factory=lambda: [0.1, 0.17])
    uniform_depths: bool = field(default=True, metadata={"help": "Measure at every uniform depth too."})
    texts: list[str] = field(default_factory=lambda: list(EVALUATION), metadata={"help": "To evaluate on."})
    windows: int = field(default=6, metadata={"help": "Per evaluation text."})
    text_files: list[str] | None = field(default=None, metadata={"help": "To train on; None: topo_evaluation's."})
    texts_folder: str = field(default=FOLDER, metadata={"help": "Where topo_evaluation's texts are kept."})
    local_window: int = field(default=128)
    dtype: str = field(default="auto", metadata={"help": "float32 or bfloat16; auto: bfloat16 on a GPU."})
    seed: int = field(default=0)

    def __post_init__(self) -> None:
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise TopologyConfigError(f"variants must be of {', '.join(VARIANTS)}, got {unknown}")


class LanguageModelTrainer(TopologyTrainerMixin, Trainer):
    """The paper's objective under the paper's schedule: always in force, temperature 1.0 to 0.1."""

    def default_topology_callback(self) -> TopologyCallback:
        return TopologyCallback(temperature=(1.0, 0.1), homotopy=(1.0, 1.0))


def train(name: str, base: Any, tokenizer: Any, arguments: AblationArguments) -> PeftModel:
    """A variant's adapter on `base`, calibrated."""
    variant = VARIANTS[name]
    chosen: dict[str, Any] = {
        "router_dim": 32,
        "local_window": arguments.local_window,
    }
    config = TopologyConfig(**{**chosen, **variant.topology}, task_type="CAUSAL_LM")
    if variant.sft is not None:
        return fine_tune(name, base, tokenizer, config, arguments)
    steps = {"local_steps": arguments.local_steps, "kl_steps": arguments.kl_steps, **variant.training}
    settings = DistillConfig(
        output_dir=str(Path(arguments.output).parent / f"checkpoints_{name}"),
        max_length=arguments.length,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        seed=arguments.seed,
        calibration_rows=arguments.calibration_rows,
        **steps,
    )
    texts = training_texts(arguments)
    if name != PAPER:
        return distill(base, texts, config, settings, processing_class=tokenizer)
    count = arguments.local_steps + arguments.kl_steps  # as many forwards as the other variants have
    windows = cut(texts, tokenizer, arguments.length, count)
    config.homotopy = 1.0  # the collapsed start is the dense model
    adapter = get_peft_model(base, config)
    rows = [{"input_ids": window, "labels": window} for window in windows]
    stage = settings.of_stage("lm", count, settings.kl_learning_rate)
    LanguageModelTrainer(model=adapter, args=stage, train_dataset=rows).train()
    calibrate(adapter, torch.stack(windows[: settings.calibration_rows]), seed=arguments.seed)
    return adapter.eval()


def training_texts(arguments: AblationArguments) -> Iterable[str]:
    if arguments.text_files:
        return (Path(file).read_text(encoding="utf-8", errors="ignore") for file in arguments.text_files)
    return training_documents(0, arguments.texts_folder)


def fine_tune(name: str, base: Any, tokenizer: Any, config: TopologyConfig, arguments: AblationArguments) -> PeftModel:
    """An adapter on `base` by TRL's SFTTrainer, in as many steps as `distill` takes for both stages."""
    variant = VARIANTS[name]
    given = {**({"max_length": arguments.length} if variant.long_rows else {}), **(variant.sft or {})}
    settings = SFTConfig(
        output_dir=str(Path(arguments.output).parent / f"checkpoints_{name}_{arguments.seed}"),
        max_steps=arguments.local_steps + arguments.kl_steps,
        logging_steps=25,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        seed=arguments.seed,
        **given,
    )
    size = round(CHARACTERS * settings.max_length)
    wanted = settings.max_steps * settings.per_device_train_batch_size
    pieces = (text[at : at + size] for text in training_texts(arguments) for at in range(0, len(text), size))
    rows = list(itertools.islice((piece for piece in pieces if len(piece) >= min(size, LEAST_ROW)), wanted))
    random.Random(arguments.seed).shuffle(rows)
    kind = SFTTrainer
    if variant.lora:
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        base, kind = get_peft_model(base, lora, adapter_name="lora").get_base_model(), TopologySFTTrainer
    trainer = kind(
        model=base,
        args=settings,
        train_dataset=Dataset.from_dict({"text": rows}),
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.train()
    return trainer.model.eval()


def cases_of(adapter: PeftModel, tokenizer: Any, arguments: AblationArguments) -> list[Case]:
    cases = []
    for text in arguments.texts:
        windows = text_windows(text, tokenizer, arguments.length, arguments.windows, arguments.seed)
        cases.append(Case(text, windows, copy_windows(windows, config_of(adapter).local_window)))
    return cases


def table(rows: list[Row]) -> str:
    """Markdown: perplexity over dense and copy gap at each target, and the uniform depth nearest to the first."""
    runs: dict[str, list[Row]] = {}
    for row in (flat(row) | {"commit": row["commit"]} for row in rows if row["what"].startswith("ablation")):
        runs.setdefault(json.dumps([row["commit"], row["variant"], row["seed"], row["length"]]), []).append(row)
    measured = [row for run in runs.values() for row in run if row.get("target") is not None]
    targets = list(dict.fromkeys(row["target"] for row in measured))
    lines = [["variant", "seed", "seconds", *(f"dial at {target:g}" for target in targets), "uniform depth"]]
    lines.append(["---"] * len(lines[0]))
    for run in runs.values():
        dial = {row["target"]: row for row in run if row.get("target") is not None}
        depths = [row for row in run if row.get("uniform_depth") is not None]
        seconds = sum(row.get("seconds", 0.0) for row in run)
        lines.append([run[0]["variant"], str(run[0]["seed"]), f"{seconds:.0f}"])
        lines[-1] += [cell(dial.get(target)) for target in targets]
        nearest = min(depths, key=lambda row: abs(row["density"] - targets[0]), default=None)
        lines[-1].append("" if nearest is None else f"{nearest['uniform_depth']}: {cell(nearest)}")
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(found: Row | None) -> str:
    if found is None or "density" not in found:
        return "not reached"
    copied = found.get("gap_recovered")
    text = f"{found['over_dense_percent']:+.2f} % ({found['density']:.3f})"
    return text if copied is None else f"{text}, copy {copied:.2f}"


def main(arguments: AblationArguments) -> None:
    output = Path(arguments.output)
    if not arguments.report_only:
        run(arguments, output)
    print(table(read(output)))


def run(arguments: AblationArguments, output: Path) -> None:
    """Train and measure each variant; its rows are written as soon as they are there."""
    name = source(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"auto": torch.bfloat16 if device == "cuda" else torch.float32}.get(arguments.dtype)
    where = origin(name, device)
    for variant in arguments.variants:
        base = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or getattr(torch, arguments.dtype)).to(device)
        start = time.perf_counter()
        adapter = train(variant, base, tokenizer, arguments)
        seconds = time.perf_counter() - start
        settings = asdict(arguments) | asdict(VARIANTS[variant]) | {"variant": variant}
        settings["homotopy"] = active_configs(adapter)[0].homotopy
        rows = [make_row(where, "ablation_training", settings, {"seconds": seconds})]
        cases = cases_of(adapter, tokenizer, arguments)
        for at, found in over_depths(adapter, cases, arguments.densities, arguments.uniform_depths):
            unreachable = found.pop("unreachable", None)
            rows.append(make_row(where, "ablation", settings | at, found, unreachable))
        append(output, rows)


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(AblationArguments).parse_args_into_dataclasses()
    main(parsed)
