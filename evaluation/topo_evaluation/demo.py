"""The whole method on a small real model in ten minutes on two CPU cores: train, save, load, merge, measure, ask.

    rows = demonstrate(DemoSettings())

Both stages of `topo_adapter.distill` on the source of Python's standard library, the density dial turned by its
calibration; then, on files that were held out, loss and seconds of the dense model, of the same model with the adapter
merged, and of window and sinks alone at the same density. Last, facts are hidden in a text, farther back than the
window reaches, and each of the three is asked for them.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from topo_adapter import (
    DistillConfig,
    TopologyConfig,
    TopologyConfigError,
    distill,
    measure_density,
    record_routes,
    set_density,
)
from topo_adapter.core.dial import check_density, choose, expected_loss
from topo_adapter.core.visibility import always_density
from topo_adapter.density import calibration_of

from .baselines import LongerWindow
from .embedded import record_base, source, standard_library, windows
from .measures import Needle, Scores, config_of, needle_prompts, next_token_losses, speed
from .results import Row, flat, make_row, origin, write
from .tasks import continuation, in_reach

_log = logging.get_logger(__name__)

#: Shares of the pairs beyond window and sinks that training draws from.
FAR = (0.06, 0.4)
#: What the dial is tried at, from sparse to dense.
DENSITIES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)


@dataclass
class DemoSettings:
    """What the demo trains and measures.

    Raises:
        TopologyConfigError: `density` is not in (0, 1], or a length leaves no room for what it is for.
    """

    model: str = field(default="embedded", metadata={"help": "'embedded' (SmolLM2-135M), a hub id or a local path."})
    output_dir: str = field(default="runs/demo", metadata={"help": "Where everything is written."})
    train_length: int = field(default=256, metadata={"help": "Tokens of a training window; a step has one window."})
    local_steps: int = field(default=80, metadata={"help": "Steps of the first stage, layer by layer."})
    kl_steps: int = field(default=20, metadata={"help": "Steps of the second stage, end to end."})
    eval_length: int = field(default=768, metadata={"help": "Tokens of a held-out window."})
    eval_windows: int = field(default=2, metadata={"help": "Held-out windows that the loss is a mean of."})
    density: float | None = field(
        default=None,
        metadata={
            "help": "Visible over causal pairs of the held-out windows; None: the sparsest at which the dial expects "
            "to lose at most `max_loss`."
        },
    )
    max_loss: float = field(default=0.05, metadata={"help": "Nats per token that the dial may expect to lose."})
    local_window: int = field(default=64, metadata={"help": "A query always sees its last W tokens."})
    depth: int = field(default=4, metadata={"help": "Digits per address."})
    router_dim: int = field(default=32, metadata={"help": "Width of the routers' hidden layer."})
    seed: int = field(default=0, metadata={"help": "Of training, calibration and hidden facts."})

    def __post_init__(self) -> None:
        if self.density is not None:
            check_density(self.density)
        for name, least in (("local_steps", 0), ("kl_steps", 0), ("eval_windows", 1)):
            if getattr(self, name) < least:
                raise TopologyConfigError(f"{name} must be an integer >= {least}, got {getattr(self, name)}")
        for name in ("train_length", "eval_length"):
            if getattr(self, name) < 2 * self.local_window:
                raise TopologyConfigError(
                    f"{name} must be at least twice local_window, {2 * self.local_window}, got {getattr(self, name)}"
                )


def demonstrate(settings: DemoSettings) -> list[Row]:
    """Train, measure, ask and print; `adapter/`, `results.jsonl` and `routing.png` go to `settings.output_dir`.

    Returns:
        Rows of `results`: `demo`, one of each method; `needle`, one of each method and hidden fact, with the answer as
        its note; `continuation` of each method; `run`, seconds and size.
    """
    started = time.perf_counter()
    transformers.set_seed(settings.seed)
    output, name = Path(settings.output_dir), source(settings.model)
    _log.info(
        f"Training an adapter of {name} on the source of Python's standard library, then asking it: about ten minutes "
        f"on two CPU cores with SmolLM2-135M, seconds to minutes on a GPU. Everything goes to {output}."
    )
    tokenizer = AutoTokenizer.from_pretrained(name)
    held_out = windows(standard_library()[1], tokenizer, settings.eval_length, settings.eval_windows)

    adapter = train(settings, _base(name), tokenizer)
    train_seconds = time.perf_counter() - started
    record_base(adapter, settings.model)
    adapter.save_pretrained(output / "adapter", save_embedding_layers=False)
    size = (output / "adapter" / "adapter_model.safetensors").stat().st_size
    _log.info(f"Saved the adapter, {size / 1e6:.1f} MB, and loading it into a fresh base, as a user would.")
    adapter = PeftModel.from_pretrained(_base(name), str(output / "adapter")).eval()

    rows = measure(settings, adapter, tokenizer, held_out)
    adapter.merge_adapter()
    picture(adapter, tokenizer, held_out[0], config_of(adapter).arity, output / "routing.png")
    seconds = {"train_seconds": train_seconds, "total_seconds": time.perf_counter() - started}
    where = origin(name, adapter.device)
    common = asdict(settings) | {
        "held_out": f"{len(held_out)} windows of {settings.eval_length} tokens, held-out standard-library modules"
    }
    found = [make_row(where, what, common | chosen, metrics, note) for what, chosen, metrics, note in rows]
    found.append(make_row(where, "run", common, seconds | {"adapter_bytes": size}))
    write(output / "results.jsonl", found)
    print(report(found))
    return found


def _base(name: str) -> PreTrainedModel:
    """On a GPU where there is one; on a CPU in float32, which is faster there than bfloat16."""
    cuda = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16 if cuda else torch.float32)
    return model.to("cuda" if cuda else "cpu").eval()


def train(settings: DemoSettings, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    """`distill` as everybody calls it, with fewer steps of shorter windows; the dial is turned."""
    calibration_rows = 2
    count = max(settings.local_steps, settings.kl_steps) + calibration_rows
    rows = windows(standard_library()[0], tokenizer, settings.train_length, count)
    config = TopologyConfig(
        depth=settings.depth,
        local_window=settings.local_window,
        router_dim=settings.router_dim,
        task_type="CAUSAL_LM",
    )
    near = always_density(settings.train_length, settings.local_window, config.num_sink_tokens)
    lowest, highest = (near + (1 - near) * share for share in FAR)
    arguments = DistillConfig(
        output_dir=str(Path(settings.output_dir) / "trainer"),
        local_steps=settings.local_steps,
        kl_steps=settings.kl_steps,
        num_queries=64,
        lowest_density=lowest,
        highest_density=highest,
        calibration_rows=calibration_rows,
        use_cpu=base.device.type == "cpu",
        save_strategy="no",
        report_to=[],
        seed=settings.seed,
    )
    adapter = distill(base, rows, config, arguments, processing_class=tokenizer)
    density = chosen_density(config_of(adapter), settings) if settings.density is None else settings.density
    set_density(adapter, density, settings.eval_length)
    return adapter


def chosen_density(config: TopologyConfig, settings: DemoSettings) -> float:
    """The sparsest of `DENSITIES`, at `eval_length`, at which the dial expects to lose at most `max_loss`; the last
    where it expects more at all of them, or they are out of reach."""
    table = calibration_of(config)
    for density, target in in_reach(config, list(DENSITIES), settings.eval_length).items():
        loss = expected_loss(table, choose(table, target))
        if loss <= settings.max_loss:
            _log.info(f"The dial expects to lose {loss:.3f} nats per token at density {density:g}: turned to that.")
            return density
    _log.info(f"The dial expects to lose over {settings.max_loss:g} nats per token: turned to {DENSITIES[-1]:g}.")
    return DENSITIES[-1]


# ---------------------------------------------------------------------------------------------------------
# Methods: what is in force while something is measured


@contextlib.contextmanager
def merged(adapter: PeftModel) -> Iterator[None]:
    """While active, the adapter is merged at its own density."""
    adapter.merge_adapter()
    try:
        yield
    finally:
        adapter.unmerge_adapter()


@contextlib.contextmanager
def window_alone(adapter: PeftModel, window: int) -> Iterator[None]:
    """While active, every head sees a window of so many tokens and the sinks, and nothing through the tree."""
    config = config_of(adapter)
    before = config.local_window, config.visible_depth
    config.local_window, config.visible_depth = window, config.sparsest_depth
    try:
        with merged(adapter):
            yield
    finally:
        config.local_window, config.visible_depth = before


Method = tuple[str, Callable[[], Any]]
Found = tuple[str, dict[str, Any], Scores, str | None]  # what, settings, metrics, note of a row


def measure(
    settings: DemoSettings, adapter: PeftModel, tokenizer: PreTrainedTokenizerBase, held_out: Tensor
) -> list[Found]:
    """Every method on the same windows `[K, T]`, the same needles and the same prompt."""
    base, config, length = adapter.get_base_model(), config_of(adapter), held_out.shape[1]
    with merged(adapter):
        density = _density(base, held_out)
    window = LongerWindow(config.local_window, config.num_sink_tokens, length, density).window
    methods: list[Method] = [
        ("dense", adapter.disable_adapter),
        ("adapter, merged", lambda: merged(adapter)),
        (f"window of {window} + {config.num_sink_tokens} sinks", lambda: window_alone(adapter, window)),
    ]
    needles = [n for n in needle_prompts(held_out[:1], tokenizer, settings.seed) if _distance(n) > window]
    found: list[Found] = []
    for name, in_force in methods:
        _log.info(f"Measuring, {name}: loss, seconds, {len(needles)} hidden facts and a continuation.")
        with in_force():
            loss = torch.stack([next_token_losses(base, row).mean() for row in held_out]).mean().item()
            share = 1.0 if name == "dense" else _density(base, held_out)
            scores = {"loss": loss, "perplexity": math.exp(loss), "density": share, **speed(base, held_out[0])}
            found.append(("demo", {"method": name}, scores, None))
            for needle in needles:
                text, exact = answer(base, tokenizer, needle)
                chosen = {"method": name, "distance": _distance(needle), "expected": _expected(tokenizer, needle)}
                found.append(("needle", chosen, {"needle_exact": float(exact)}, text))
            text = continuation(base, tokenizer, held_out[0, : length // 2])
            found.append(("continuation", {"method": name}, {}, text))
    return found


def _density(base: PreTrainedModel, rows: Tensor) -> float:
    found = [torch.stack(list(measure_density(base, row[None].to(base.device)).values())) for row in rows]
    return torch.stack(found).mean().item()


def _distance(needle: Needle) -> int:
    """About how many tokens lie between the fact and the end of the question."""
    return round((1 - needle.depth) * (len(needle.ids) - needle.answer))


def _expected(tokenizer: PreTrainedTokenizerBase, needle: Needle) -> str:
    return tokenizer.decode(needle.ids[-needle.answer :]).strip()


def answer(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, needle: Needle) -> tuple[str, bool]:
    """What the model says when it is asked for the fact, greedily and with its cache; and whether it is right."""
    prompt = needle.ids[None, : -needle.answer].to(base.device)
    ids = base.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=needle.answer,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )[0, prompt.shape[1] :]
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return text, text == _expected(tokenizer, needle)


# ---------------------------------------------------------------------------------------------------------
# What is shown


def picture(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor, arity: int, path: str | os.PathLike
) -> None:
    """Density per layer and head, and the balls of the tokens `[N]` of a text in one layer."""
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


def report(rows: list[Row]) -> str:
    """The tables and the texts, for the screen."""
    (run,) = (flat(row) for row in rows if row["what"] == "run")
    measured = [flat(row) for row in rows if row["what"] == "demo"]
    machine, versions = rows[0]["machine"], rows[0]["versions"]
    lines = [
        "",
        f"Held out: {run['held_out']}. {machine['name']}, {machine['threads']} threads, torch {versions['torch']}.",
        "",
        f"{'':30}{'loss':>8}{'perplexity':>12}{'density':>9}{'prefill, s':>12}{'a token, ms':>13}",
    ]
    for row in measured:
        lines.append(
            f"{row['method']:30}{row['loss']:8.3f}{row['perplexity']:12.2f}{row['density']:9.3f}"
            f"{row['prefill_seconds']:12.2f}{row['decode_ms']:13.1f}"
        )
    lines += [
        "Loss in nats per token. Density: visible pairs of tokens over all pairs. Seconds are those of this machine at",
        f"{run['eval_length']} tokens: sparse attention saves time on a GPU, in long texts (docs/results.md).",
    ]
    needles = [flat(row) for row in rows if row["what"] == "needle"]
    if needles:
        lines += ["", "Facts hidden in a text, and what each says when it is asked for them (greedy):", ""]
        columns = [row["method"] for row in measured]
        lines.append(f"{'fact':>8} {'tokens back':>12}  " + "".join(f"{method:30}" for method in columns))
        for distance, expected in dict.fromkeys((row["distance"], row["expected"]) for row in needles):
            said = {row["method"]: row for row in needles if (row["distance"], row["expected"]) == (distance, expected)}
            cells = [f"{said[m]['note']!r} {'right' if said[m]['needle_exact'] else 'wrong'}" for m in columns]
            lines.append(f"{expected:>8} {distance:12}  " + "".join(f"{cell:30}" for cell in cells))
    lines += ["", "The same text, continued by each (greedy):", ""]
    for row in rows:
        if row["what"] == "continuation":
            lines.append(f"{row['settings']['method']}: {row['note']!r}")
    lines += [
        "",
        f"Adapter of {run['adapter_bytes'] / 1e6:.1f} MB, trained and calibrated in {run['train_seconds']:.0f} s; "
        f"all in {run['total_seconds']:.0f} s. In {run['output_dir']}: adapter/, results.jsonl, routing.png.",
    ]
    return "\n".join(lines)
