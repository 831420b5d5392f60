"""Device times, and the table that they go to with where they come from.

Device time by CUDA events, median of many repeats, L2 flushed before each; a short sleep on the device before each lets
the host queue everything first, as in a model whose queue is full. `host_ms` is what the queueing itself takes.
"""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from topo_evaluation import results

MAX_ERROR = 1e-2

SETTINGS = ("config", "implementation", "length", "batch", "routes", "balls")


class Timing(NamedTuple):
    ms: float
    p20: float
    p80: float
    repeats: int
    host_ms: float = math.nan


def summary(times: Sequence[float], host: Sequence[float] = ()) -> Timing:
    ordered = sorted(times)
    last = len(ordered) - 1
    p20, p80 = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    return Timing(statistics.median(times), p20, p80, len(times), statistics.median(host) if host else math.nan)


def time_call(call: Callable[[], object], budget_ms: float = 150.0) -> Timing:
    """Device time of a call; the first call (compilation) is not counted."""
    return time_in_turn([call], budget_ms)[0]


def time_in_turn(calls: Sequence[Callable[[], object]], budget_ms: float = 150.0) -> list[Timing]:
    """Device time of each call, one after the other and again, so that a drift of the clock meets all alike."""
    estimate = 0.0
    for call in calls:
        call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        estimate = max(estimate, (time.perf_counter() - begin) * 1e3)
    repeats = int(min(100, max(3, budget_ms / estimate)))
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    events = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)] for _ in calls]
    host: list[list[float]] = [[] for _ in calls]
    for i in range(repeats):
        for call, pairs, spent in zip(calls, events, host, strict=True):
            start, end = pairs[i]
            flush.zero_()
            torch.cuda._sleep(1_000_000)  # about 0.6 ms in which the host gets ahead
            begin = time.perf_counter()
            start.record()
            call()
            end.record()
            spent.append((time.perf_counter() - begin) * 1e3)
            if estimate > 5:
                torch.cuda.synchronize()
    torch.cuda.synchronize()
    return [
        summary([start.elapsed_time(end) for start, end in pairs], spent)
        for pairs, spent in zip(events, host, strict=True)
    ]


def time_graph(calls: Sequence[Callable[[], object]], repeats: int = 20) -> Timing:
    """Time of one call in a CUDA graph that makes all of them, in turn and several times."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    rounds = max(1, 32 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / (rounds * len(calls)))
    return summary(times[1:])


def peak_mb(call: Callable[[], object]) -> float:
    """Device memory a call needs beyond its inputs, output included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


class Table:
    """Rows go to the file and to the screen at once, so that a run cut short loses nothing.

    model: what is measured, None for a layer alone. settings: of the whole run.
    """

    def __init__(
        self, path: Path, commit: str = "", model: str | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.settings = path, dict(settings or {})
        self.origin = results.origin(model, "cuda" if torch.cuda.is_available() else "cpu", commit)
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.bandwidth, self.rate = math.nan, math.nan  # bytes/s, FLOP/s

    def add(self, part: str, config: str, implementation: str, timing: Timing | None, values: dict[str, Any]) -> None:
        """Add a row of more `values`: SETTINGS, metrics, `note`, and `dense_ms`, which speedup is computed against.

        `gflop` and `megabytes`, the least possible work, give floor and gap.
        """
        dense_ms = values.get("dense_ms")
        row: dict[str, Any] = {"part": part, "config": config, "implementation": implementation}
        if timing is not None:
            row |= {"ms": timing.ms, "ms_p20": timing.p20, "ms_p80": timing.p80, "repeats": timing.repeats}
            if not math.isnan(timing.host_ms):
                row["host_ms"] = timing.host_ms
            floor = 1e3 * max(
                values.get("megabytes", 0) * 1e6 / self.bandwidth, values.get("gflop", 0) * 1e9 / self.rate
            )
            if floor > 0:
                row |= {"floor_ms": floor, "gap": timing.ms / floor}
            if dense_ms is not None:
                row["speedup"] = dense_ms / timing.ms
        row |= {name: value for name, value in values.items() if name != "dense_ms" and value != ""}
        if not row.get("error", 0.0) <= MAX_ERROR:  # NaN fails too
            self.failures.append(f"{part} {config} {implementation}: error {row['error']}")
        self.rows.append(row)
        settings = {name: row[name] for name in SETTINGS if name in row}
        metrics = {
            name: float(f"{value:.5g}") if isinstance(value, float) else value
            for name, value in row.items()
            if name not in (*SETTINGS, "part", "note") and math.isfinite(value)
        }
        written = results.make_row(self.origin, part, self.settings | settings, metrics, row.get("note"))
        results.append(self.path, [written])
        print(line(row), flush=True)

    def failed(self, part: str, config: str, implementation: str, error: Exception) -> None:
        message = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
        self.failures.append(f"{part} {config} {implementation}: {message}")
        self.add(part, config, implementation, None, {"note": f"failed: {message}"})
        traceback.print_exc(limit=4)

    def measured(self, part: str, config: str) -> list[dict[str, Any]]:
        return [r for r in self.rows if r["part"] == part and r["config"] == config and "ms" in r]

    def fastest(self, part: str, config: str) -> dict[str, float]:
        """`dense_ms` of the fastest dense implementation of a configuration; empty if none ran."""
        times = [row["ms"] for row in self.measured(part, config) if "topology" not in row["implementation"]]
        return {"dense_ms": min(times)} if times else {}


def line(row: dict[str, Any]) -> str:
    """One row on the screen."""
    cells = [f"{row['part']:9} {row['config']:30} {row['implementation']:24}"]
    for name, unit in (("ms", " ms"), ("speedup", "x"), ("gap", " of floor"), ("density", " dense"), ("error", " err")):
        cells.append(f"{row[name]:8.3g}{unit}" if name in row else " " * (8 + len(unit)))
    return " ".join(cells) + f" {row.get('note', '')}"
