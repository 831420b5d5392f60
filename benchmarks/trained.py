"""Loss and time of a trained adapter on a real text, at its own depth maps, beside the dense model; appends to a file.

    python -m benchmarks.trained --model HuggingFaceTB/SmolLM2-135M-Instruct \
        --adapter examples/smollm2-135m-topology --text book.txt --output results/h100.jsonl

For every length and target density: the loss per token; the attention of all routed layers in a CUDA graph (hidden
states, queries, keys and values taken from a forward of the merged model; router, plan and attention) against the
fastest dense attention of the same shapes; prefill of the whole model, which for a small model is as much waiting for
Python as attention; and decode through a CUDA graph. The text is cut into rows from its beginning.
"""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser

import topo_adapter.forward
from topo_adapter import MergeError, TopologyConfigError, measure_density
from topo_adapter.core.passes import Pass, during
from topo_adapter.forward import Attention, arrive
from topo_adapter.layer import hosts
from topo_adapter.training.routers import active_configs

from .cases import label
from .dense import UNMASKED, choose_dense, dense_calls
from .generation import graph_decode, static_copy
from .harness import Table, summary, time_call, time_graph


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Hub id or local path of the base model."})
    adapter: str = field(metadata={"help": "Hub id or local path of a calibrated adapter."})
    text: str = field(metadata={"help": "A plain-text file, not one that the adapter was trained on."})
    output: str = field(default="runs/benchmark.jsonl", metadata={"help": "JSON lines; rows are appended."})
    lengths: list[int] = field(default_factory=lambda: [4096, 8192])
    densities: list[float] = field(default_factory=lambda: [0.1, 0.17], metadata={"help": "Targets of the dial."})
    batch: int = field(default=8, metadata={"help": "Rows of the text, prefilled together."})
    tokens: int = field(default=64, metadata={"help": "Tokens decoded through a CUDA graph; 0 leaves that out."})
    commit: str = field(default="")


class LayerInputs(NamedTuple):
    """What entered one routed layer and its attention."""

    attention: Attention

    def attend(self) -> Tensor:
        """Router, plan and attention of the layer, as in a forward of the merged model: the layout is known, which the
        first layer reads off the positions for all of them."""
        attention, before = self.attention, self.attention.call.arrival
        layout = before.layout
        with mock.patch.object(topo_adapter.forward, "_layout", lambda *_: layout):
            arrival = arrive(before.host, before.hidden_states, before.inputs)
        assert arrival is not None  # it was merged when its inputs were taken
        call = arrival.route(attention.query, attention.key, attention.scoring.scale)
        return replace(attention, call=call).hard()


class TakeInputs(Pass):
    """Keeps what every routed layer gets."""

    def __init__(self) -> None:
        self.found: list[LayerInputs] = []

    def attend(self, attention: Attention) -> tuple[Tensor, Tensor | None]:
        self.found.append(LayerInputs(attention))
        return attention.topology()


@torch.no_grad()
def layer_inputs(model: Any, rows: Tensor) -> list[LayerInputs]:
    """Inputs of every routed layer of a merged model, from one forward without a cache."""
    taken = TakeInputs()
    with during(model, taken):
        model(input_ids=rows, use_cache=False, logits_to_keep=1)
    return taken.found


@torch.no_grad()
def loss(model: Any, rows: Tensor) -> float:
    """Mean cross-entropy of the next token in nats, a row at a time."""
    return statistics.mean(model(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in rows)


@torch.no_grad()
def prefill(model: Any, rows: Tensor) -> DynamicCache:
    cache = DynamicCache()
    model(input_ids=rows, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def prefill_times(model: Any, rows: Tensor, repeats: int = 5) -> list[float]:
    """Milliseconds of whole prefills; the first is not counted."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        prefill(model, rows)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return times[1:]


def measure_model(model: Any, name: str, table: Table, rows: Tensor, tokens: int, values: dict[str, Any]) -> None:
    """Prefill of all rows, and decode with the first of them repeated."""
    batch, length = rows.shape
    config = f"{label(length)} batch {batch}"
    times = prefill_times(model, rows)
    rate = {"tokens_per_s": rows.numel() / statistics.median(times) * 1e3}
    name_of = f"prefill {config}"
    table.add("trained", name_of, name, summary(times), values | rate | faster_than_dense(table, name_of, name))
    if not tokens:
        return
    cache = prefill(model, rows[:1])
    copied = static_copy(cache, model.config, batch, length + tokens + 8)
    timing = graph_decode(model, copied, rows[:1, -1:], length, tokens)
    name_of, rate = f"decode {config}, CUDA graph", {"tokens_per_s": batch / timing.ms * 1e3}
    table.add("trained", name_of, name, timing, values | rate | faster_than_dense(table, name_of, name))


def faster_than_dense(table: Table, config: str, name: str) -> dict[str, float]:
    return {} if name == "dense" else table.fastest("trained", config)


def measure_attention(model: Any, name: str, table: Table, rows: Tensor, values: dict[str, Any]) -> None:
    """All routed layers' attention, one after the other in a graph, and the dense attention of the same shapes."""
    inputs = layer_inputs(model, rows)
    config = f"attention {label(rows.shape[1])} batch {len(rows)}, {len(inputs)} layers"
    if not table.fastest("trained", config):
        first, shape = inputs[0], {"length": rows.shape[1], "batch": len(rows)}
        for dense, call in dense_calls(first.attention.query, first.attention.key, first.attention.value).items():
            try:
                one = time_call(call)
                scaled = one._replace(ms=one.ms * len(inputs), p20=one.p20 * len(inputs), p80=one.p80 * len(inputs))
                table.add("trained", config, dense, scaled, shape | {"density": 1.0})
            except Exception as problem:
                table.failed("trained", config, dense, problem)
    with torch.no_grad():
        timing = time_graph([functools.partial(all_layers, inputs)], repeats=5)
    table.add("trained", config, name, timing, values | table.fastest("trained", config))


def all_layers(inputs: list[LayerInputs]) -> None:
    for each in inputs:
        each.attend()


def shape_of(model: Any) -> tuple[int, int, int]:
    """Query heads, KV heads and head dimension of the first routed layer."""
    geometry = hosts(model)[0].geometry
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return geometry.num_heads, geometry.num_kv_heads, width


def measure_length(model: Any, table: Table, rows: Tensor, arguments: Arguments) -> None:
    """The dense model, then the adapter at each density."""
    count, length = rows.shape
    shape: dict[str, Any] = {"length": length, "batch": count}
    config = model.get_base_model().config
    choose_dense(length, count, count, shape_of(model))
    with model.disable_adapter():
        own, config._attn_implementation = config._attn_implementation, UNMASKED  # SDPA is fastest without a mask
        values = shape | {"density": 1.0, "loss": loss(model, rows)}
        measure_model(model, "dense", table, rows, arguments.tokens, values)
        config._attn_implementation = own
    for target in arguments.densities:
        model.merge_adapter(target_density=target)
        name = f"topology, dial at {target:g}"
        density = torch.stack(list(measure_density(model, rows[:1]).values())).mean().item()
        values = shape | {"density": density, "loss": loss(model, rows)}
        measure_model(model, name, table, rows, arguments.tokens, values)
        measure_attention(model, name, table, rows, values)
        model.unmerge_adapter()
        torch.cuda.empty_cache()


def main(arguments: Arguments) -> None:
    settings = {"adapter": arguments.adapter, "text": arguments.text}
    table = Table(Path(arguments.output), arguments.commit, arguments.model, settings)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).to("cuda").eval()
    model = PeftModel.from_pretrained(base, arguments.adapter).eval()
    if active_configs(model)[0].calibration is None:
        raise MergeError(f"adapter must be calibrated, got {arguments.adapter} without; see topo_adapter.calibrate")
    ids = tokenizer(Path(arguments.text).read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
    for length in arguments.lengths:
        count = min(arguments.batch, len(ids) // length)
        if count < 1:
            raise TopologyConfigError(f"text must have {length} tokens, got {len(ids)}")
        rows = ids[: count * length].view(count, length).to("cuda")
        try:
            measure_length(model, table, rows, arguments)
        except Exception as problem:
            table.failed("trained", label(length), "topology", problem)


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    main(parsed)
