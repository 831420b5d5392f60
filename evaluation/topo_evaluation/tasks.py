"""Measure a topology adapter: quality over density, copying, needles, speed, beside the dense model and baselines.

    settings = EvaluationSettings(adapter="my-topology", lengths=[4096], densities=[0.1, 0.2])
    rows = evaluate(*load(settings), settings)

Densities are targets at the evaluated length, window and sinks included. Every text is measured by itself, on the
same windows for all methods. Baselines run at the density that the adapter realised on that text.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from topo_adapter import TopologyConfig, TopologyConfigError
from topo_adapter.density import calibrated_density, calibration_of

from .baselines import Window
from .embedded import opening_base, source
from .measures import (
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
from .results import Row, make_row, origin
from .texts import EVALUATION, TRAINING, fingerprint, text_windows

DENSE, ADAPTER = "dense", "adapter"
_BASE_OPTION = "--model (of topo bench: --base)"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class EvaluationSettings:
    """What is evaluated.

    Raises:
        TopologyConfigError: a value is out of range, or a text is unknown or one of training.
    """

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


def load(settings: EvaluationSettings) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The adapter on its base, in evaluation mode, and the tokenizer."""
    config = topology_config(PeftConfig.from_pretrained(settings.adapter))  # before gigabytes are loaded
    name = settings.model or config.base_model_name_or_path
    if name is None:
        raise TopologyConfigError(f"model must be given, {settings.adapter!r} does not name its base")
    with contextlib.nullcontext() if settings.model else opening_base(name, settings.adapter, _BASE_OPTION):
        base, tokenizer = load_base(name, settings.dtype, settings.device)
    return PeftModel.from_pretrained(base, settings.adapter).eval(), tokenizer


def load_base(name: str, dtype: str = "auto", device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer; see `EvaluationSettings` for the arguments."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        cpu = torch.device(device).type == "cpu"
    except RuntimeError as error:
        raise TopologyConfigError(f"device must be auto or a torch device, got {device!r}") from error
    weights = _DTYPES.get(dtype, torch.float32 if cpu else torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(source(name), dtype=weights).to(device).eval()
    return base, AutoTokenizer.from_pretrained(source(name))


def make_case(settings: EvaluationSettings, config: TopologyConfig, tokenizer: Any, text: str, length: int) -> Case:
    windows = text_windows(text, tokenizer, length, settings.windows, settings.seed)
    if not len(windows):
        raise TopologyConfigError(f"lengths must fit the texts, {text!r} holds no window of {length} tokens")
    copies = copy_windows(windows, config.local_window) if settings.copy else None
    needles = needle_prompts(windows, tokenizer, f"{text} {settings.seed}") if settings.needle else []
    return Case(text, windows, copies, needles)


# ---------------------------------------------------------------------------------------------------------
# Methods, each in force on one case


def in_reach(config: TopologyConfig, densities: list[float], length: int) -> dict[float, float]:
    """The densities that a depth map reaches at `length`, each with the `calibrated_density` of it."""
    found = {}
    for density in densities:
        with contextlib.suppress(TopologyConfigError):
            target = calibrated_density(config, density, length)
            config.setting_at(target)
            found[density] = target
    return found


def rows_of(adapter: PeftModel, case: Case, settings: EvaluationSettings) -> Iterator[Scores]:
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
    for target in settings.densities:

        def merged(target: float = target) -> Scores:
            return score_adapter(adapter, case, calibrated_density(config, target, case.length))

        found = row(ADAPTER, target, merged)
        yield found
        if settings.baselines and "unreachable" not in found:
            for name, make in baselines_at(base, case, config, found["density"], settings.seed).items():
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


def timings(adapter: PeftModel, settings: EvaluationSettings, cases: list[Case]) -> list[Scores]:
    """Speed at each length, on a window of the first text."""
    found = []
    for case in cases:
        if case.text == settings.texts[0]:
            targets, row = in_reach(config_of(adapter), settings.densities, case.length), case.windows[0]
            for method, target, timed in dense_and_merged(adapter, targets, partial(speed, adapter, row)):
                found.append({"length": case.length, "method": method, "target": target, **timed})
    return found


def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Tensor) -> str:
    """Greedy continuation by 40 tokens of a prompt `[N]`."""
    prompt = prompt[None].to(model.device)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)


def continuations(
    adapter: PeftModel, tokenizer: PreTrainedTokenizerBase, settings: EvaluationSettings, cases: list[Case]
) -> list[Scores]:
    """Greedy continuations of the first halves of three windows (or all there are): prompt's end, method and text.

    The windows have the shortest length at which the adapter can show anything.
    """
    reach = {length: in_reach(config_of(adapter), settings.densities, length) for length in settings.lengths}
    length = min(reach, key=lambda n: (not reach[n], n))
    texts = [case.windows for case in cases if case.length == length]
    turns = [each[i] for i in range(settings.windows) for each in texts if i < len(each)]
    prompts = [window[: length // 2] for window in turns[:3]]
    made = dense_and_merged(
        adapter, reach[length], lambda: [continuation(adapter, tokenizer, prompt) for prompt in prompts]
    )
    return [
        {
            "prompt": tokenizer.decode(prompt[-40:], skip_special_tokens=True),
            "length": length,
            "method": method,
            "target": target,
            "continuation": found[number],
        }
        for number, prompt in enumerate(prompts)
        for method, target, found in made
    ]


def label_of(method: str, target: float | None) -> str:
    return method if target is None else f"{method} at {target:g}"


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
                maps.append({"length": length, "target": target, "depths": depths[0], "density_map": mean})
    return maps


# ---------------------------------------------------------------------------------------------------------
# All of it


def evaluate(adapter: PeftModel, tokenizer: PreTrainedTokenizerBase, settings: EvaluationSettings) -> list[Row]:
    """Everything that the settings ask for; the adapter is left as it was.

    Returns:
        Rows of `results`: `quality` of every method, length and text; `density_map` and `speed` of every length and
        target; `continuation`, its text the note; `run`, the time of all.

    Raises:
        TopologyConfigError: the adapter is not calibrated, or a text is too short for a length.
    """
    started = time.perf_counter()
    transformers.set_seed(settings.seed)
    config, base = topology_config(config_of(adapter)), adapter.get_base_model()
    cases = [make_case(settings, config, tokenizer, text, n) for n in settings.lengths for text in settings.texts]

    found: list[Scores] = []
    methods = 2 + len(settings.densities) * (6 if settings.baselines else 1)
    with tqdm(total=len(cases) * methods, desc="evaluating") as bar:
        for case in cases:
            for scores in rows_of(adapter, case, settings):
                found.append(scores)
                bar.set_postfix_str(f"{case.text}, {case.length} tokens, {scores['method']}")
                bar.update()
    maps = take_maps(found)

    where = origin(base.config._name_or_path, base.device)
    common = {
        "adapter": settings.adapter,
        "dtype": str(base.dtype),
        "seed": settings.seed,
        **{key: getattr(config, key) for key in ("arity", "depth", "local_window", "num_sink_tokens", "route_per")},
        "calibrated_length": calibration_of(config)["length"],
    }

    def row(what: str, scores: Scores, note: str | None = None, **more: Any) -> Row:
        scores = dict(scores)
        chosen: Scores = {key: scores.pop(key) for key in ("length", "text", "method", "target") if key in scores}
        return make_row(where, what, {**common, **chosen, **more}, scores, note)

    windows = {(case.text, case.length): len(case.windows) for case in cases}
    prints = {text: fingerprint(text) for text in settings.texts}
    rows = []
    for scores in found:
        text, unreachable = scores["text"], scores.pop("unreachable", None)
        more = {"fingerprint": prints[text], "windows": windows[text, scores["length"]]}
        rows.append(row("quality", scores, unreachable, **more))
    rows += [row("density_map", each) for each in maps]
    if settings.speed:
        rows += [row("speed", each) for each in timings(adapter, settings, cases)]
    if settings.generate:
        for each in continuations(adapter, tokenizer, settings, cases):
            prompt, text = each.pop("prompt"), each.pop("continuation")
            rows.append(row("continuation", each, text, prompt_ends=prompt))
    return [*rows, row("run", {"total_seconds": time.perf_counter() - started})]
