"""Measure a topology adapter: quality over density, copying, needles, speed, beside the dense model and baselines.

    python recipes/evaluate.py --adapter examples/smollm2-135m-topology
    python recipes/evaluate.py --adapter runs/distill --lengths 4096 --densities 0.1 0.2 --baselines
    python recipes/evaluate.py --adapter runs/qwen3 --texts book.txt --windows 8 --no_speed --no_generate

Densities are targets at the evaluated length, window and sinks included. Every text is measured by itself, on the
same windows for all methods. Baselines (`recipes/baselines.py`) run at the density that the adapter realised on that
text. Everything goes to `--output_dir`: `result.json`, `table.md`, `perplexity.png`, `density_map.png`.
"""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import peft
import torch
import transformers
from peft import PeftConfig, PeftModel
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase

import topo_adapter
from baselines import Window
from demo import continuation
from embedded import smollm2
from measures import (
    Case,
    Scores,
    baselines_at,
    config_of,
    copy_windows,
    gap_recovered,
    merged_at,
    needle_prompts,
    score_adapter,
    score_baseline,
    score_dense,
    speed,
)
from texts import EVALUATION, TRAINING, fingerprint, text_windows
from topo_adapter import TopologyConfig, TopologyConfigError
from topo_adapter.density import calibrated_density, calibration_of

DENSE, ADAPTER = "dense", "adapter"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class EvaluateArguments:
    adapter: str = field(metadata={"help": "Local path or hub id of a calibrated topology adapter."})
    model: str | None = field(
        default=None, metadata={"help": "'embedded', a hub id or a local path; None: the adapter's own base."}
    )
    lengths: list[int] = field(default_factory=lambda: [1024, 4096, 8192], metadata={"help": "Tokens per window."})
    densities: list[float] = field(
        default_factory=lambda: [0.1, 0.17, 0.2, 0.3], metadata={"help": "Target densities at the evaluated length."}
    )
    texts: list[str] = field(
        default_factory=lambda: list(EVALUATION), metadata={"help": "Names of evaluation texts, or plain-text files."}
    )
    windows: int = field(default=4, metadata={"help": "Windows per text and length."})
    baselines: bool = field(default=False, metadata={"help": "Measure the baselines too: slow, O(N^2)."})
    copy: bool = field(default=True, metadata={"help": "Loss on a passage that comes a second time."})
    needle: bool = field(default=True, metadata={"help": "Look up a number in a haystack."})
    generate: bool = field(default=True, metadata={"help": "Greedy continuations, dense and merged."})
    speed: bool = field(default=True, metadata={"help": "Time prefill and decoding, dense and merged."})
    dtype: str = field(
        default="auto", metadata={"help": "float32, bfloat16, float16; auto: float32 on a CPU, else bfloat16."}
    )
    device: str = field(default="auto", metadata={"help": "A torch device; auto: cuda if there is one."})
    output_dir: str = field(default="runs/evaluate", metadata={"help": "Where everything is written."})
    seed: int = field(default=0, metadata={"help": "Of windows, needles and random balls."})

    def __post_init__(self) -> None:
        for name, values, wanted, good in (
            ("lengths", self.lengths, "integers >= 16", all(n >= 16 for n in self.lengths)),
            ("densities", self.densities, "numbers in (0, 1]", all(0 < d <= 1 for d in self.densities)),
            ("texts", self.texts, "no training texts", not set(self.texts) & set(TRAINING)),
        ):
            if not values or len(set(values)) < len(values) or not good:
                raise TopologyConfigError(f"{name} must be one or more different values, {wanted}, got {values}")
        if unknown := [name for name in self.texts if name not in EVALUATION and not Path(name).is_file()]:
            raise TopologyConfigError(f"texts must be of {', '.join(EVALUATION)} or files, got {unknown}")
        if self.windows < 1:
            raise TopologyConfigError(f"windows must be at least 1, got {self.windows}")
        if self.dtype not in ("auto", *_DTYPES):
            raise TopologyConfigError(f"dtype must be auto, {', '.join(_DTYPES)}, got {self.dtype!r}")


# ---------------------------------------------------------------------------------------------------------
# Loading


def topology_config(config: PeftConfig) -> TopologyConfig:
    """The config of a calibrated topology adapter.

    Raises:
        TopologyConfigError: it is of another kind, or not calibrated.
    """
    if not isinstance(config, TopologyConfig):
        raise TopologyConfigError(f"adapter must be a topology adapter, got one of type {config.peft_type}")
    calibration_of(config)
    return config


def load(arguments: EvaluateArguments) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The adapter on its base, in evaluation mode, and the tokenizer."""
    config = topology_config(PeftConfig.from_pretrained(arguments.adapter))  # before gigabytes are loaded
    name = arguments.model or config.base_model_name_or_path
    if name is None:
        raise TopologyConfigError(f"model must be given, {arguments.adapter!r} does not name its base")
    if name == "embedded":
        name = smollm2()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        cpu = torch.device(device).type == "cpu"
    except RuntimeError as error:
        raise TopologyConfigError(f"device must be auto or a torch device, got {device!r}") from error
    dtype = _DTYPES.get(arguments.dtype, torch.float32 if cpu else torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    return PeftModel.from_pretrained(base, arguments.adapter).eval(), AutoTokenizer.from_pretrained(name)


def make_case(arguments: EvaluateArguments, config: TopologyConfig, tokenizer: Any, text: str, length: int) -> Case:
    windows = text_windows(text, tokenizer, length, arguments.windows, arguments.seed)
    if not len(windows):
        raise TopologyConfigError(f"lengths must fit the texts, {text!r} holds no window of {length} tokens")
    copies = copy_windows(windows, config.local_window) if arguments.copy else None
    needles = needle_prompts(windows, tokenizer, f"{text} {arguments.seed}") if arguments.needle else []
    return Case(text, windows, copies, needles)


# ---------------------------------------------------------------------------------------------------------
# Methods, each in force on one case


def in_reach(config: TopologyConfig, densities: list[float], length: int) -> dict[float, float]:
    """The densities that a depth map reaches at `length`, each with the `calibrated_density` of it."""
    found = {}
    for density in densities:
        with contextlib.suppress(TopologyConfigError):
            target = calibrated_density(config, density, length)
            config.depths_at(target)
            found[density] = target
    return found


def rows_of(adapter: PeftModel, case: Case, arguments: EvaluateArguments) -> Iterator[Scores]:
    """One row per method and target density: its scores, or why it is unreachable."""
    config, base = config_of(adapter), adapter.get_base_model()
    dense = score_dense(adapter, case)
    window = score_baseline(adapter, case, lambda: Window(config.local_window, config.num_sink_tokens))

    def row(method: str, target: float | None, measure: Callable[[], Scores]) -> Scores:
        made: Scores = {"length": case.length, "text": case.text, "method": method, "target": target}
        try:
            made |= measure()
        except TopologyConfigError as error:
            return made | {"unreachable": str(error)}
        made["over_dense_percent"] = 100 * (made["perplexity"] / dense["perplexity"] - 1)
        if "copy_loss" in made:
            made["gap_recovered"] = gap_recovered(window["copy_loss"], made["copy_loss"], dense["copy_loss"])
        return made

    yield row(DENSE, None, lambda: dense)
    yield row(Window.name, None, lambda: window)
    for target in arguments.densities:

        def merged(target: float = target) -> Scores:
            return score_adapter(adapter, case, calibrated_density(config, target, case.length))

        found = row(ADAPTER, target, merged)
        yield found
        if arguments.baselines and "unreachable" not in found:
            for name, make in baselines_at(base, case, config, found["density"], arguments.seed).items():
                yield row(name, target, partial(score_baseline, adapter, case, make))


def dense_and_merged(
    adapter: PeftModel, targets: dict[float, float], run: Callable[[], Any]
) -> list[tuple[str, float | None, Any]]:
    """Method, target and what `run` returns: of the dense model and of the adapter at each of `in_reach`'s targets."""
    with adapter.disable_adapter():
        found: list[tuple[str, float | None, Any]] = [(DENSE, None, run())]
    for density, target in targets.items():
        with merged_at(adapter, target):
            found.append((ADAPTER, density, run()))
    return found


def timings(adapter: PeftModel, arguments: EvaluateArguments, cases: list[Case]) -> list[Scores]:
    """Speed at each length, on a window of the first text."""
    found = []
    for case in cases:
        if case.text == arguments.texts[0]:
            targets, row = in_reach(config_of(adapter), arguments.densities, case.length), case.windows[0]
            for method, target, timed in dense_and_merged(adapter, targets, partial(speed, adapter, row)):
                found.append({"length": case.length, "method": method, "target": target, **timed})
    return found


def continuations(
    adapter: PeftModel, tokenizer: PreTrainedTokenizerBase, arguments: EvaluateArguments, cases: list[Case]
) -> list[dict[str, str]]:
    """Greedy continuations of the first halves of three windows (or all there are), side by side.

    The windows have the shortest length at which the adapter can show anything.
    """
    reach = {length: in_reach(config_of(adapter), arguments.densities, length) for length in arguments.lengths}
    length = min(reach, key=lambda n: (not reach[n], n))
    texts = [case.windows for case in cases if case.length == length]
    turns = [each[i] for i in range(arguments.windows) for each in texts if i < len(each)]
    prompts = [window[: length // 2] for window in turns[:3]]
    sides = [{"prompt ends": tokenizer.decode(prompt[-40:], skip_special_tokens=True)} for prompt in prompts]
    made = dense_and_merged(
        adapter, reach[length], lambda: [continuation(adapter, tokenizer, prompt) for prompt in prompts]
    )
    for method, target, found in made:
        for side, text in zip(sides, found, strict=True):
            side[label_of(method, target)] = text
    return sides


def label_of(method: str, target: float | None) -> str:
    return method if target is None else f"{method} at {target:g}"


# ---------------------------------------------------------------------------------------------------------
# Reporting


def mean_of(rows: list[Scores], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.fmean(values) if values else None


def grouped(rows: list[Scores], length: int) -> dict[tuple[str, float | None], list[Scores]]:
    """The rows of a length by method and target, one for each text."""
    groups: dict[tuple[str, float | None], list[Scores]] = {}
    for row in rows:
        if row["length"] == length:
            groups.setdefault((row["method"], row["target"]), []).append(row)
    return groups


def take_maps(rows: list[Scores]) -> list[Scores]:
    """Moves depths and density maps out of the rows; one entry per length and target, the mean over texts."""
    maps = []
    for length in dict.fromkeys(row["length"] for row in rows):
        for (_, target), group in grouped(rows, length).items():
            found = [row.pop("density_map") for row in group if "density_map" in row]
            depths = [row.pop("depths") for row in group if "depths" in row]
            if found:
                mean = {layer: torch.tensor([each[layer] for each in found]).mean(0).tolist() for layer in found[0]}
                maps.append({"length": length, "target": target, "depths": depths[0], "density": mean})
    return maps


def table(result: dict[str, Any]) -> str:
    """Markdown, a table per length."""
    texts, show = result["arguments"]["texts"], lambda value, form: "" if value is None else format(value, form)
    head = ["method", "density", *(f"{Path(text).name} ppl" for text in texts), "kept mass", "copy gap", "needle"]
    speeds = {(row["length"], row["method"], row["target"]): row for row in result["speed"]}
    lines = []
    for length in result["arguments"]["lengths"]:
        lines += [f"### {length} tokens", "", f"| {' | '.join([*head, 'prefill s', 'decode ms'])} |"]
        lines.append("|---" * (len(head) + 2) + "|")
        for (method, target), group in grouped(result["rows"], length).items():
            reached = [row for row in group if "unreachable" not in row]
            if not reached:
                cells = [label_of(method, target), "unreachable", *[""] * len(head)]
                lines.append(f"| {' | '.join(cells)} |")
                continue
            by_text = {row["text"]: row for row in reached}
            cells = [label_of(method, target), show(mean_of(reached, "density"), ".4f")]
            for text in texts:
                key, form = ("perplexity", ".2f") if method == DENSE else ("over_dense_percent", "+.2f")
                cells.append(show(by_text.get(text, {}).get(key), form) + "%" * (method != DENSE and text in by_text))
            for key in ("kept_mass", "gap_recovered", "needle_exact"):
                cells.append(show(mean_of(reached, key), ".3f"))
            timed = speeds.get((length, method, target), {})
            cells += [show(timed.get("prefill_seconds"), ".4f"), show(timed.get("decode_ms"), ".2f")]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot_perplexity(result: dict[str, Any], path: Path) -> None:
    """Perplexity over density, mean over texts: a panel per length, a line per method."""
    lengths = result["arguments"]["lengths"]
    figure, axes = plt.subplots(1, len(lengths), figsize=(6 * len(lengths), 5), squeeze=False, layout="constrained")
    for axis, length in zip(axes[0], lengths, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for (method, _), group in grouped(result["rows"], length).items():
            density, over = mean_of(group, "density"), mean_of(group, "over_dense_percent")
            if density is not None and over is not None:
                lines.setdefault(method, []).append((density, over))
        for method, points in lines.items():
            wide = {"linewidth": 2.5, "zorder": 3} if method == ADAPTER else {}
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=method, **wide)
        axis.set_yscale("symlog", linthresh=1)
        axis.set(title=f"{length} tokens", xlabel="density", ylabel="perplexity over dense, %")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_maps(maps: list[Scores], path: Path) -> None:
    """Realised density of every routed layer and head, a panel per length and target."""
    count = max(1, len(maps))
    figure, axes = plt.subplots(1, count, figsize=(1 + 3 * count, 6), squeeze=False, layout="constrained")
    for axis, each in zip(axes[0], maps, strict=False):
        layers = sorted(each["density"])
        image = axis.imshow([each["density"][layer] for layer in layers], aspect="auto", vmin=0, vmax=1)
        axis.set(title=f"{each['length']} tokens, at {each['target']:g}", xlabel="query head", ylabel="layer")
        axis.set_yticks(range(len(layers)), layers, fontsize=6)
    if maps:
        figure.colorbar(image, ax=axes[0], label="visible pairs / causal pairs")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {"device": str(device), "name": name, "platform": platform.platform(), "threads": torch.get_num_threads()}


def main(arguments: EvaluateArguments) -> dict[str, Any]:
    started = time.perf_counter()
    transformers.set_seed(arguments.seed)
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    adapter, tokenizer = load(arguments)
    config, base = config_of(adapter), adapter.get_base_model()
    cases = [make_case(arguments, config, tokenizer, text, n) for n in arguments.lengths for text in arguments.texts]

    rows: list[Scores] = []
    methods = 2 + len(arguments.densities) * (6 if arguments.baselines else 1)
    with tqdm(total=len(cases) * methods, desc="evaluating") as bar:
        for case in cases:
            for row in rows_of(adapter, case, arguments):
                rows.append(row)
                bar.set_postfix_str(f"{case.text}, {case.length} tokens, {row['method']}")
                bar.update()

    result: dict[str, Any] = {
        "arguments": asdict(arguments),
        "adapter": {
            "base": base.config._name_or_path,
            **{key: getattr(config, key) for key in ("arity", "depth", "local_window", "num_sink_tokens", "route_per")},
            "calibrated_length": calibration_of(config)["length"],
        },
        "texts": {text: fingerprint(text) for text in arguments.texts},
        "windows": {f"{case.text} {case.length}": len(case.windows) for case in cases},
        "maps": take_maps(rows),
        "rows": rows,
        "speed": timings(adapter, arguments, cases) if arguments.speed else [],
        "continuations": continuations(adapter, tokenizer, arguments, cases) if arguments.generate else [],
        "dtype": str(base.dtype),
        "machine": machine(base.device),
        "versions": {m.__name__: m.__version__ for m in (topo_adapter, torch, transformers, peft)}
        | {"python": platform.python_version()},
        "total_seconds": time.perf_counter() - started,
    }
    (output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    plot_perplexity(result, output / "perplexity.png")
    plot_maps(result["maps"], output / "density_map.png")
    (output / "table.md").write_text(report(result))
    return result


def report(result: dict[str, Any]) -> str:
    """Prints tables and continuations; returns them as Markdown."""
    where = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [table(result), f"{where['name'] or where['device']}, {result['dtype']}, {versions}.", ""]
    lines += ["Perplexity in % over dense; kept mass, copy gap recovered and exact needles: mean over texts.", ""]
    reasons = dict.fromkeys(row["unreachable"] for row in result["rows"] if "unreachable" in row)
    lines += [f"- unreachable: {reason}" for reason in reasons]
    for side in result["continuations"]:
        lines += ["", *(f"- {name}: {text!r}" for name, text in side.items())]
    text = "\n".join(lines) + "\n"
    print(text)
    return text


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(EvaluateArguments).parse_args_into_dataclasses()
    main(parsed)
