"""Draws what the other benchmarks measured, and writes their tables into README and docs/results.md; reads only files.

    python -m benchmarks.plot --results results/h100.jsonl

Of several rows of one configuration and implementation the last one counts, so a part may be measured anew by
appending. Pictures go to docs/, tables between two markers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from transformers import HfArgumentParser

from topo_evaluation import results

#: Between which lines a table stands.
PERFORMANCE, FRONT = ((f"<!-- {name}:begin -->", f"<!-- {name}:end -->") for name in ("performance", "front"))
PER_QUERY_HEAD, PER_KV_HEAD = "topology per query head", "topology per KV head"
COLOURS = {
    PER_QUERY_HEAD: "#1b6ca8",
    PER_KV_HEAD: "#0b9e8a",
    "sdpa cudnn": "#444444",
    "sdpa flash": "#999999",
    "FlexAttention": "#c4772b",
}
STAGES = {"router": "#6a4c93", "plan": "#c4772b", "local pass": "#0b9e8a", "tree pass": "#1b6ca8"}

Row = dict[str, Any]


# ---------------------------------------------------------------- rows


def read_rows(paths: Iterable[str | Path]) -> list[Row]:
    """Rows with a time; of equal (part, config, implementation) the last, and none if that one failed.

    Raises:
        ValueError: the rows come from different GPUs, so that their times cannot be compared.
    """
    latest: dict[tuple[str, str, str], Row] = {}
    for path in paths:
        for found in results.read(path):
            versions, machine = found["versions"] or {}, found["machine"] or {}
            row = {"part": found["what"], **results.flat(found), "commit": found["commit"], "gpu": machine.get("name")}
            row |= {name: versions.get(name) for name in ("torch", "triton")}
            latest[row["part"], row["config"], row["implementation"]] = row
    rows = [row for row in latest.values() if "ms" in row]
    gpus = {row["gpu"] for row in rows}
    if len(gpus) > 1:
        raise ValueError(f"results must hold rows of one GPU, got {', '.join(sorted(gpus))}")
    return rows


def of_part(rows: Sequence[Row], part: str) -> dict[str, dict[str, Row]]:
    """Configuration -> implementation -> row, in file order."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["part"] == part:
            found.setdefault(row["config"], {})[row["implementation"]] = row
    return found


def is_dense(implementation: str) -> bool:
    return implementation.startswith(("sdpa", "flash-attention", "dense"))


def fastest_dense(implementations: dict[str, Row]) -> Row | None:
    return min((r for name, r in implementations.items() if is_dense(name)), key=lambda r: r["ms"], default=None)


def dense_at(rows: Sequence[Row], length: float) -> dict[str, Row]:
    """Dense prefill of one layer at a length."""
    return {r["implementation"]: r for r in rows if r["part"] == "dense" and r["length"] == length}


# ---------------------------------------------------------------- tables


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cell(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{number(row['ms'])} ({row['speedup']:.2g}x)" if "speedup" in row else number(row["ms"])


def kernel_table(rows: Sequence[Row]) -> list[str]:
    """One line per configuration of one layer: dense beside both kinds of routes."""
    lines = [
        "| one layer | density | fastest dense | routes per query head | routes per KV head | floor |",
        "|---|---|---|---|---|---|",
    ]
    for part in ("prefill", "decode"):
        for config, found in of_part(rows, part).items():
            ours = [found.get(PER_QUERY_HEAD), found.get(PER_KV_HEAD)]
            first = next((row for row in ours if row is not None), None)
            if first is None:
                continue
            dense = fastest_dense(dense_at(rows, first["length"]) if part == "prefill" else found)
            shown = "" if dense is None else f"{number(dense['ms'])} ({dense['implementation']})"
            floors = " / ".join(number(row["floor_ms"]) for row in ours if row is not None)
            cells = [config, f"{first['density']:.3f}", shown, *(cell(row) for row in ours), floors]
            lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def distillation_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| distillation step of one layer, forward and backward | ms | peak memory |", "|---|---|---|"]
    for config, found in of_part(rows, "distill").items():
        for name, row in found.items():
            lines.append(f"| {config}, {name} | {number(row['ms'])} | {row['peak_mb'] / 1e3:.1f} GB |")
    return lines if len(lines) > 2 else []


def end_to_end_table(rows: Sequence[Row]) -> list[str]:
    """Whole model: tokens per second and peak memory, dense beside the topology."""
    lines = [
        "| Llama-3.1-8B shape | dense, tokens/s | topology, tokens/s | ratio | peak memory, dense / topology |",
        "|---|---|---|---|---|",
    ]
    for config, found in of_part(rows, "end_to_end").items():
        dense = found.get("dense")
        for name in (PER_QUERY_HEAD, PER_KV_HEAD):
            ours = found.get(name)
            if ours is None:
                continue
            title = config + (", routes per KV head" if name == PER_KV_HEAD else "")
            peaks = " / ".join("-" if r is None else f"{r['peak_mb'] / 1e3:.1f}" for r in (dense, ours))
            speeds = ["-" if r is None else number(r["tokens_per_s"]) for r in (dense, ours)]
            ratio = "-" if dense is None else f"{ours['tokens_per_s'] / dense['tokens_per_s']:.2f}x"
            lines.append(f"| {title} | {' | '.join(speeds)} | {ratio} | {peaks} GB |")
    return lines if len(lines) > 2 else []


def trained_table(rows: Sequence[Row]) -> list[str]:
    """A trained adapter at its own depth maps: loss and time, dense beside it."""
    lines = [
        "| trained SmolLM2-135M, WikiText-2 | density | loss, dense / topology | dense, ms | topology, ms |",
        "|---|---|---|---|---|",
    ]
    losses: dict[float, str] = {}
    for config, found in of_part(rows, "trained").items():
        dense = fastest_dense(found)
        for name, row in found.items():
            loss = f"{row['loss']:.4f}" if "loss" in row else ""
            if name == "dense":
                losses[row["length"]] = loss
            if dense is not None and not is_dense(name):
                pair = f"{losses.get(row['length'], '-')} / {loss}"
                cells = [f"{config}, {name.removeprefix('topology, ')}", f"{row['density']:.3f}", pair]
                lines.append(f"| {' | '.join([*cells, number(dense['ms']), cell(row)])} |")
    return lines if len(lines) > 2 else []


def training_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| training step, Llama-3.1-8B shape | seconds | peak memory |", "|---|---|---|"]
    for config, found in of_part(rows, "training").items():
        for row in found.values():
            lines.append(f"| {config} | {number(row['ms'] / 1e3)} | {row['peak_mb'] / 1e3:.1f} GB |")
    return lines if len(lines) > 2 else []


def provenance(rows: Sequence[Row]) -> str:
    values = {name: sorted({row[name] for row in rows if row[name]}) for name in ("gpu", "torch", "triton", "commit")}
    ceilings = [f"{row['config']} {row['note']}" for row in rows if row["part"] == "ceiling" and "note" in row]
    parts = [*values["gpu"], *(f"{name} {', '.join(values[name])}" for name in ("torch", "triton", "commit"))]
    return ", ".join(parts) + (f". Ceilings: {'; '.join(ceilings)}." if ceilings else ".")


def performance(rows: Sequence[Row], source: str) -> str:
    """Tables, and where they come from."""
    intro = (
        "Milliseconds of one layer (32 query and 8 KV heads of 128, bf16, window 128, 4 sinks), router and plan "
        "included; in brackets the ratio to the fastest dense attention of the same run. The floor is the larger of "
        "bytes over bandwidth and FLOPs over matrix rate (benchmarks/layer.py), per query head / per KV head."
    )
    tables = [
        table(rows) for table in (kernel_table, trained_table, distillation_table, training_table, end_to_end_table)
    ]
    blocks = [intro, *("\n".join(lines) for lines in tables if lines)]
    blocks.append(f"Written by `python -m benchmarks.plot --results {source}`. {provenance(rows)}")
    return "\n\n".join(blocks)


def front(speed: Sequence[Row], quality: Iterable[Row], length: int = 8192, target: float = 0.17) -> str:
    """The README's table: one trained adapter beside the dense model, four rows.

    Args:
        speed: of `read_rows`, with a trained adapter's. quality: of `results.read`, with the same adapter's copying at
            4,096 tokens. length, target: what is shown of `speed`; of `quality` the target nearest to it.
    """
    name = f"topology, dial at {target:g}"
    shown = [found for found in of_part(speed, "trained").values() if name in found and found[name]["length"] == length]
    prefill, decode = (
        next(found for found in shown if found[name]["config"].startswith(what)) for what in ("prefill", "decode")
    )
    wanted = {"method": "adapter", "seed": 0, "route_per": "query_head", "length": 4096}
    flattened = [results.flat(row) for row in quality if row["what"] == "quality" and row["settings"]["text"] is None]
    found = [row for row in flattened if all(row.get(key) == value for key, value in wanted.items())]
    copied = min(found, key=lambda row: abs(row["target"] - target))
    batch, kept = int(prefill[name]["batch"]), f"{100 * target:.0f} %"
    lines = [
        f"| SmolLM2-135M, {batch} texts of {length:,} tokens | dense | adapter that keeps {kept} of the pairs |",
        "|---|---|---|",
        f"| loss on WikiText-2, nats per token | {prefill['dense']['loss']:.3f} | {prefill[name]['loss']:.3f} |",
        f"| copying at 4,096 tokens (0: near tokens alone) | 1 | {copied['gap_recovered']:.2f} |",
        f"| prefill, ms on {prefill[name]['gpu']} | {number(prefill['dense']['ms'])} | {number(prefill[name]['ms'])} |",
        f"| decoding a token of each text, ms | {number(decode['dense']['ms'])} | {number(decode[name]['ms'])} |",
    ]
    return "\n".join(lines)


def insert(text: str, section: str, between: tuple[str, str]) -> str:
    """`text` with what is between two markers replaced.

    Raises:
        ValueError: the markers are missing or in the wrong order.
    """
    first, last = between
    begin, end = text.find(first), text.find(last)
    if begin < 0 or end < begin:
        raise ValueError(f"the text must hold the lines {first} and {last}, in this order")
    return f"{text[: begin + len(first)]}\n{section}\n{text[end:]}"


# ---------------------------------------------------------------- pictures


def draw_lengths(rows: Sequence[Row], path: Path) -> None:
    """Time, and speed-up against each dense attention, over length: one level more per doubling."""
    lines: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["part"] in ("growth", "dense"):
            lines.setdefault(row["implementation"], {})[row["length"]] = row["ms"]
        elif row["part"] == "window" and row["implementation"] == "FlexAttention":
            lines.setdefault("window only, FlexAttention", {})[row["length"]] = row["ms"]
        elif row["part"] == "window":
            lines.setdefault("window only, our local pass", {})[row["length"]] = row["ms"]
    ours = [name for name in (PER_QUERY_HEAD, PER_KV_HEAD) if name in lines]
    if not ours:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for name, times in lines.items():
        style = "--" if "window" in name else "-"
        left.plot(
            *zip(*sorted(times.items()), strict=True), style, marker="o", ms=3, label=name, color=COLOURS.get(name)
        )
    for name in ours:
        for dense in filter(is_dense, lines):
            both = sorted(set(lines[name]) & set(lines[dense]))
            ratio = [lines[dense][n] / lines[name][n] for n in both]
            style = "-" if "cudnn" in dense else "--"
            right.plot(both, ratio, style, marker="o", ms=3, label=f"{name} / {dense}", color=COLOURS.get(name))
    left.set(ylabel="ms, one layer", title="time")
    right.set(ylabel="dense time / topology time", title="speed-up")
    lengths = sorted({n for name in ours for n in lines[name]})
    for axis in (left, right):
        axis.set(xscale="log", yscale="log", xlabel="tokens")
        axis.set_xticks(lengths, [f"{n / 1024:.0f}k" for n in lengths])
        axis.minorticks_off()
    right.axhline(1, color="black", lw=0.5)
    save(figure, path)


def draw_density(rows: Sequence[Row], path: Path) -> None:
    """Speed-up against the fastest dense attention over density."""
    found = [row for row in rows if row["part"] in ("density", "flex") and "speedup" in row]
    lengths = {row["length"] for row in found if row["part"] == "density"}
    if not lengths:
        return
    figure, axis = plt.subplots(figsize=(5, 3.6))
    for name in dict.fromkeys(row["implementation"] for row in found):
        points = [(r["density"], r["speedup"]) for r in found if r["implementation"] == name and r["length"] in lengths]
        if points:
            axis.plot(*zip(*sorted(points), strict=True), marker="o", ms=3, label=name, color=COLOURS.get(name))
    axis.axhline(1, color="black", lw=0.5)
    axis.set(xscale="log", yscale="log", xlabel="density", ylabel="speed-up against the fastest dense attention")
    axis.set_title(f"prefill of {max(lengths) / 1024:.0f}k tokens")
    save(figure, path)


def draw_decode(rows: Sequence[Row], path: Path) -> None:
    """Time of one token, with the floor as a line on each bar."""
    configs = of_part(rows, "decode")
    if not configs:
        return
    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    names = ("fastest dense", PER_QUERY_HEAD, PER_KV_HEAD)
    for j, name in enumerate(names):
        for i, found in enumerate(configs.values()):
            row = fastest_dense(found) if j == 0 else found.get(name)
            if row is None:
                continue
            x, colour = i + 0.27 * (j - 1), COLOURS.get(name, "#444444")
            axis.bar(x, row["ms"] * 1e3, 0.25, color=colour, label=name if i == 0 else None)
            axis.hlines(row["floor_ms"] * 1e3, x - 0.125, x + 0.125, color="red", label="floor" if i + j == 0 else None)
    axis.set(yscale="log", ylabel="microseconds per token, one layer")
    legend_above(axis)
    axis.set_xticks(range(len(configs)), [name.removeprefix("decode ").replace(", ", "\n", 1) for name in configs])
    save(figure, path)


def draw_breakdown(rows: Sequence[Row], path: Path) -> None:
    """Where the time of prefill goes: shares of the stages, timed apart."""
    bars: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        stage, _, name = row["implementation"].partition(", ")
        if row["part"] == "breakdown" and stage in STAGES and row["config"].startswith("prefill"):
            bars.setdefault((row["config"].removeprefix("prefill "), name), {})[stage] = row["ms"]
    if not bars:
        return
    figure, axis = plt.subplots(figsize=(7, 0.35 * len(bars) + 1.2))
    for y, stages in enumerate(bars.values()):
        left, total = 0.0, sum(stages.values())
        for stage, colour in STAGES.items():
            share = stages.get(stage, 0.0) / total
            axis.barh(y, share, left=left, color=colour, label=stage if y == 0 else None)
            left += share
        axis.text(1.01, y, f"{number(total)} ms", va="center", fontsize=8)
    titles = [f"{config}, {name.removeprefix('topology ')}" for config, name in bars]
    axis.set_yticks(range(len(bars)), titles, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.15), xlabel="share of the stages, each timed alone")
    legend_above(axis)
    save(figure, path)


def draw_end_to_end(rows: Sequence[Row], path: Path) -> None:
    """Tokens per second of the whole model over length, batch 1."""
    found = [row for row in rows if row["part"] == "end_to_end" and row["batch"] == 1]
    if not found:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for axis, phase in zip(axes, ("prefill", "decode"), strict=True):
        lines: dict[str, dict[float, float]] = {}
        for row in found:
            title, length = row["config"].split(" ")[0], row["length"]
            kind = ", ".join(row["config"].split(", ")[1:])
            if title == phase:
                lines.setdefault(f"{row['implementation']}, {kind}", {})[length] = row["tokens_per_s"]
        for name, speeds in lines.items():
            colour = COLOURS.get(name.split(", ")[0], "#444444")
            style = {"bf16": "-", "nf4": "--"}.get(name.split(", ")[1], ":")
            style = ":" if "eager" in name else style
            axis.plot(*zip(*sorted(speeds.items()), strict=True), style, marker="o", ms=3, label=name, color=colour)
        lengths = sorted({n for speeds in lines.values() for n in speeds})
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="tokens per second", title=phase)
        axis.set_xticks(lengths, [f"{n / 1024:.0f}k" for n in lengths])
        axis.minorticks_off()
    save(figure, path)


def legend_above(axis: Any) -> None:
    axis.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4)


def save(figure: Any, path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0] and axis.get_legend() is None:
            axis.legend(fontsize=6, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"wrote {path}")


# ---------------------------------------------------------------- command line


@dataclass
class Arguments:
    results: list[str] = field(
        default_factory=lambda: ["results/h100.jsonl"], metadata={"help": "One or more files of JSON lines."}
    )
    docs: str = field(default="docs", metadata={"help": "Where the pictures go."})
    page: str = field(
        default="docs/results.md", metadata={"help": "Its performance section is rewritten; '' leaves it."}
    )
    readme: str = field(default="README.md", metadata={"help": "Its table at the front is rewritten; '' leaves it."})
    quality: str = field(
        default="results/smollm2_135m_recipe.jsonl", metadata={"help": "Quality of the adapter in that table."}
    )


def main(arguments: Arguments) -> None:
    rows = read_rows(arguments.results)
    docs = Path(arguments.docs)
    for name, draw in (
        ("length", draw_lengths),
        ("density", draw_density),
        ("decode", draw_decode),
        ("breakdown", draw_breakdown),
        ("end_to_end", draw_end_to_end),
    ):
        draw(rows, docs / f"performance_{name}.png")
    section = performance(rows, " ".join(arguments.results))
    print(section)
    if arguments.page:
        rewrite(Path(arguments.page), section, PERFORMANCE)
    if arguments.readme:
        rewrite(Path(arguments.readme), front(rows, results.read(arguments.quality)), FRONT)


def rewrite(path: Path, section: str, between: tuple[str, str]) -> None:
    path.write_text(insert(path.read_text(encoding="utf-8"), section, between), encoding="utf-8")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
