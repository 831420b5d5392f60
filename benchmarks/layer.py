"""Times the topology's kernels beside dense attention on the GPU at hand; appends to a file row by row.

    python -m benchmarks.layer --output results/h100.jsonl
    python -m benchmarks.layer --only prefill decode --lengths 8192 32768

Shapes are one layer of an 8B Llama: 32 query and 8 KV heads of 128, hidden size 4096, bf16. `topology` rows hold the
whole path of a layer: router, plan, attention (what all layers of a forward share is timed apart). The router runs on
random hidden states; the plan then takes addresses drawn with the balance asked for (a router's work does not depend on
what it chooses), so that density is what the row says. Query and key addresses are drawn independently. Every
configuration is checked in the same run against float64 on sampled queries (column `error`, relative; the run fails
above 1e-2).

`floor_ms` is the larger of two times: the bytes that must move (each input once, output once; for decode only visible
keys, not the addresses) over the copy bandwidth, and the FLOPs of visible pairs and of the router over the bf16 matrix
rate, both ceilings measured in the same run. `gap` is time over floor. `speedup` is against the fastest dense
attention of the same run and shape. Draw plots and tables with `benchmarks.plot`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from .cases import Layer, decode_cases, density_cases, growth_cases, prefill_cases
from .decode import decode_step
from .distill import distill
from .flex import flex, window_only
from .harness import Table, line, time_call
from .prefill import prefill

PARTS = ("prefill", "decode", "distill", "breakdown", "density", "growth", "window", "flex")


def ceilings(table: Table, layer: Layer) -> None:
    """The two rates that floors are computed from, on random data."""
    source = torch.randn(2**30, device=layer.device).to(layer.dtype)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    timing = time_call(lambda: target.copy_(source))
    table.bandwidth = moved / timing.ms * 1e3
    note = f"{table.bandwidth / 1e12:.2f} TB/s"
    table.add("ceiling", "device copy", "torch", timing, {"megabytes": moved / 1e6, "note": note})
    a, b = (torch.randn(8192, 8192, device=layer.device).to(layer.dtype) for _ in range(2))
    timing = time_call(lambda: a @ b, 300.0)
    flop = 2 * 8192**3
    table.rate = flop / timing.ms * 1e3
    note = f"{table.rate / 1e12:.0f} TFLOP/s"
    table.add("ceiling", "bf16 matmul 8192", "torch", timing, {"gflop": flop / 1e9, "note": note})


@dataclass
class Arguments:
    output: str = field(default="runs/benchmark.jsonl", metadata={"help": "JSON lines; rows are appended."})
    only: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": f"Parts: {' '.join(PARTS)}."})
    lengths: list[int] = field(
        default_factory=list, metadata={"help": "Only configurations of these lengths; all if none is given."}
    )
    commit: str = field(default="", metadata={"help": "Recorded in each row; asked of git if not given."})
    seed: int = field(default=0)


def run(arguments: Arguments) -> Table:
    unknown = set(arguments.only) - set(PARTS)
    if unknown:
        raise ValueError(f"only must name parts among {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    layer = Layer()
    torch.manual_seed(arguments.seed)
    table = Table(Path(arguments.output), arguments.commit, settings={"seed": arguments.seed})

    def wanted(part: str, length: int) -> bool:
        return part in arguments.only and (not arguments.lengths or length in arguments.lengths)

    begin = time.perf_counter()

    def done(part: str) -> None:
        print(f"--- {part} done at {time.perf_counter() - begin:.0f} s", flush=True)

    ceilings(table, layer)
    breakdown = "breakdown" in arguments.only
    for case in prefill_cases(layer):
        if wanted("prefill", case.length):
            prefill(table, "prefill", case, breakdown and case.balls > 1)
    done("prefill")
    for case in decode_cases(layer):
        if wanted("decode", case.length):
            decode_step(table, case)
    done("decode")
    if wanted("distill", 32768):
        distill(table, 32768, layer)
    done("distill")
    for part, cases in (("density", density_cases(layer=layer)), ("growth", growth_cases(layer))):
        for case in cases:
            if wanted(part, case.length):
                prefill(table, part, case)
        done(part)
    for length, balls in ((8192, 64), (32768, 128), (131072, 256)):
        if wanted("window", length):
            window_only(table, length, "flex" in arguments.only, layer)
        if wanted("flex", length):
            flex(table, length, balls, layer)
    done("window and flex")
    return table


def main(arguments: Arguments) -> None:
    table = run(arguments)
    print("\nsummary")
    for row in table.rows:
        if row["part"] in ("ceiling", "dense", "prefill", "decode", "distill"):
            print(line(row))
    if table.failures:
        sys.exit("\nfailed:\n" + "\n".join(table.failures))


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
