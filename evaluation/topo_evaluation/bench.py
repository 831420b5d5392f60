"""Seconds of a model, dense beside sparse, in one run: prefill and decoding at each length and density.

    rows = bench(BenchSettings("my-topology", lengths=[8192], densities=[0.1]))

Runs the model as `generate` does, a forward over the whole text and then one token after the other, without graphs of
one's own around it. Every number is a median. The benchmarks of kernels, and of decoding in CUDA graphs, are in
`benchmarks/` of the repository.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME
from torch import Tensor
from transformers.utils import logging

from topo_adapter import TopologyConfig, TopologyConfigError, initialize_routers
from topo_adapter.core.visibility import always_density
from topo_adapter.density import calibrated_density
from topo_adapter.files import find

from .embedded import source
from .measures import Scores, config_of, density_map, merged_at, speed, uniform_at
from .results import Row, append, flat, make_row, origin
from .tasks import ADAPTER, DENSE, EvaluationSettings, load, load_base
from .texts import text_windows

_log = logging.get_logger(__name__)
RANDOM = "random groups"


@dataclass
class BenchSettings:
    """What is timed.

    Raises:
        TopologyConfigError: a value is out of range.
    """

    model: str = field(metadata={"help": "Hub id or directory of an adapter or of a model, or 'embedded'."})
    base: str | None = field(
        default=None, metadata={"help": "Of an adapter, where its file names another; or 'embedded'."}
    )
    lengths: list[int] = field(default_factory=lambda: [1024, 4096], metadata={"help": "Tokens of a text."})
    densities: list[float] = field(
        default_factory=lambda: [0.1, 0.3], metadata={"help": "Visible over causal pairs, at each length."}
    )
    batch: int = field(default=1, metadata={"help": "Texts at once."})
    repeats: int = field(default=3, metadata={"help": "Prefills that the median is taken of."})
    new_tokens: int = field(default=16, metadata={"help": "Decoded tokens that the median is taken of."})
    text: str = field(default="moby_dick", metadata={"help": "Name of an evaluation text, or a plain-text file."})
    dtype: str = field(
        default="auto", metadata={"help": "float32, bfloat16, float16; auto: float32 on a CPU, else bfloat16."}
    )
    device: str = field(default="auto", metadata={"help": "A torch device; auto: cuda if there is one."})
    output: str | None = field(default=None, metadata={"help": "A file of JSON lines that the rows are added to."})

    def __post_init__(self) -> None:
        self.evaluation()  # checks lengths, densities, text and dtype
        for name in ("batch", "repeats", "new_tokens"):
            if getattr(self, name) < 1:
                raise TopologyConfigError(f"{name} must be an integer >= 1, got {getattr(self, name)}")

    def evaluation(self) -> EvaluationSettings:
        """These settings as an evaluation has them."""
        return EvaluationSettings(
            adapter=self.model,
            model=self.base,
            lengths=self.lengths,
            densities=self.densities,
            texts=[self.text],
            dtype=self.dtype,
            device=self.device,
        )


def bench(settings: BenchSettings) -> list[Row]:
    """Times the dense model and the sparse one at every density of every length.

    A model without an adapter gets routers that know nothing, whose groups are random and evenly filled: its times are
    those of a trained adapter of that density, its output is not.

    Returns:
        Rows of `results`, `speed`; where a density is out of reach, the note says why. They are added to
        `settings.output`, where that is given.

    Raises:
        TopologyConfigError: the text has too few tokens, the adapter is not calibrated, or a model that is no adapter
            has a `base`.
    """
    trained = find(source(settings.model), CONFIG_NAME) is not None
    if not trained and settings.base is not None:
        raise TopologyConfigError(f"base must be left out where {settings.model} is no adapter, got {settings.base!r}")
    if trained:
        adapter, tokenizer = load(settings.evaluation())
    else:
        base, tokenizer = load_base(settings.model, settings.dtype, settings.device)
        adapter = get_peft_model(base, TopologyConfig(task_type="CAUSAL_LM")).eval()
    base = adapter.get_base_model()
    where = origin(base.config._name_or_path, base.device)
    common = asdict(settings) | {"dtype": str(base.dtype)}
    rows = []
    for length in settings.lengths:
        texts = text_windows(settings.text, tokenizer, length, settings.batch)
        if len(texts) < settings.batch:
            raise TopologyConfigError(
                f"text must hold batch = {settings.batch} windows of {length} tokens, got {len(texts)} in "
                f"{settings.text!r}: lower batch or lengths, or name a longer text"
            )
        if not trained:
            config_of(adapter).homotopy = 0.0  # what initialises them reads the dense model
            initialize_routers(adapter, texts[:1].to(base.device))
            config_of(adapter).homotopy = 1.0
        for method, target, in_force in methods(adapter, settings.densities, length, trained):
            _log.info(f"Timing {method}{'' if target is None else f' at density {target:g}'}, {length:,} tokens.")
            chosen = {"length": length, "method": method, "target": target}
            try:
                with in_force:
                    found, note = timed(base, texts, settings, dense=method == DENSE), None
            except TopologyConfigError as error:
                found, note = {}, str(error)
            rows.append(make_row(where, "speed", common | chosen, found, note))
    if settings.output is not None:
        append(settings.output, rows)
    return rows


Method = tuple[str, float | None, contextlib.AbstractContextManager]


def methods(adapter: PeftModel, densities: list[float], length: int, trained: bool) -> Iterator[Method]:
    """Name, target density at `length` tokens, and what is in force while it is timed."""
    yield DENSE, None, adapter.disable_adapter()
    for density in densities:
        yield (ADAPTER if trained else RANDOM), density, _at(adapter, density, length, trained)


@contextlib.contextmanager
def _at(adapter: PeftModel, density: float, length: int, trained: bool) -> Iterator[None]:
    config = config_of(adapter)
    if trained:
        with merged_at(adapter, calibrated_density(config, density, length)):
            yield
        return
    near = always_density(length, config.local_window, config.num_sink_tokens)
    if density <= near:
        raise TopologyConfigError(
            f"densities must be above {near:.3g} at {length} tokens, what window and sinks show, got {density:g}"
        )
    # groups of one depth share all but their first digits: each digit divides what is seen by the arity
    depth = round(math.log((1 - near) / (density - near), config.arity))
    with uniform_at(adapter, min(depth, config.depth)):
        yield


def timed(base: torch.nn.Module, texts: Tensor, settings: BenchSettings, dense: bool) -> Scores:
    """What `speed` finds for the texts `[B, T]`, the rate of decoding, and the density that was realised."""
    found = speed(base, texts, settings.repeats, settings.new_tokens)
    heads = [] if dense else [value for each in density_map(base, texts[:1]).values() for value in each]
    rate = 1e3 * len(texts) / found["decode_ms"]
    return found | {"tokens_per_s": rate, "density": 1.0 if dense else statistics.fmean(heads)}


def report(rows: list[Row]) -> str:
    """A table of the rows, and what it was measured on."""
    first = rows[0]
    head = ("tokens", "", "density", "first token, s", "beside dense", "decoded, tokens/s", "beside dense")
    lines = [head]
    dense: Scores = {}
    for row in map(flat, rows):
        if row["method"] == DENSE:
            dense = row
        name = row["method"] if row["target"] is None else f"{row['method']} at {row['target']:g}"
        if "prefill_seconds" not in row:
            lines.append((f"{row['length']:,}", name, "not reached", "", "", "", ""))
            continue
        lines.append(
            (
                f"{row['length']:,}",
                name,
                f"{row['density']:.3f}",
                f"{row['prefill_seconds']:.4f}",
                f"{dense['prefill_seconds'] / row['prefill_seconds']:.2f}x",
                f"{row['tokens_per_s']:.1f}",
                f"{row['tokens_per_s'] / dense['tokens_per_s']:.2f}x",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    settings, machine = first["settings"], first["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    notes = dict.fromkeys(row["note"] for row in rows if row["note"] is not None)
    return "\n".join(
        [
            *table,
            "",
            f"{first['model']}, {settings['batch']} text(s) at once, {settings['dtype']}, {machine['name']} "
            f"({machine['device']}, {machine['threads']} threads); {versions}.",
            f"Medians of {settings['repeats']} prefills and {settings['new_tokens']} tokens, without CUDA graphs. "
            "Above 1x is faster than dense.",
            *(f"Not reached: {note}" for note in notes),
            *([] if all(row["settings"]["method"] != RANDOM for row in rows) else [_RANDOM_NOTE]),
        ]
    )


_RANDOM_NOTE = "The model has no adapter: its groups are random, so these are seconds alone, of no use for its output."
