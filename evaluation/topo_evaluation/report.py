"""What was evaluated, for people: Markdown tables, perplexity over density, density per layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .measures import Scores
from .results import Row, flat, write
from .tasks import ADAPTER, DENSE, grouped, label_of, mean_of


@dataclass
class OutputArguments:
    """Where an evaluation goes."""

    output_dir: str = field(default="runs/evaluate", metadata={"help": "Where everything is written."})


def of(rows: Sequence[Row], what: str) -> list[Scores]:
    """Settings and metrics of the rows of a kind."""
    return [flat(row) for row in rows if row["what"] == what]


def table(rows: Sequence[Row]) -> str:
    """Markdown, a table per length."""
    quality = of(rows, "quality")
    texts, show = list(dict.fromkeys(row["text"] for row in quality)), _shown
    head = ["method", "density", *(f"{Path(text).name} ppl" for text in texts), "kept mass", "copy gap", "needle"]
    speeds = {(row["length"], row["method"], row["target"]): row for row in of(rows, "speed")}
    lines = []
    for length in dict.fromkeys(row["length"] for row in quality):
        lines += [f"### {length} tokens", "", f"| {' | '.join([*head, 'prefill s', 'decode ms'])} |"]
        lines.append("|---" * (len(head) + 2) + "|")
        for (method, target), group in grouped(quality, length).items():
            reached = [row for row in group if "perplexity" in row]
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


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def plot_perplexity(rows: Sequence[Row], path: Path) -> None:
    """Perplexity over density, mean over texts: a panel per length, a line per method."""
    quality = of(rows, "quality")
    lengths = list(dict.fromkeys(row["length"] for row in quality))
    figure, axes = plt.subplots(1, len(lengths), figsize=(6 * len(lengths), 5), squeeze=False, layout="constrained")
    for axis, length in zip(axes[0], lengths, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for (method, _), group in grouped(quality, length).items():
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


def plot_maps(rows: Sequence[Row], path: Path) -> None:
    """Realised density of every routed layer and head, a panel per length and target."""
    maps = of(rows, "density_map")
    count = max(1, len(maps))
    figure, axes = plt.subplots(1, count, figsize=(1 + 3 * count, 6), squeeze=False, layout="constrained")
    for axis, each in zip(axes[0], maps, strict=False):
        layers = sorted(each["density_map"], key=int)
        image = axis.imshow([each["density_map"][layer] for layer in layers], aspect="auto", vmin=0, vmax=1)
        axis.set(title=f"{each['length']} tokens, at {each['target']:g}", xlabel="query head", ylabel="layer")
        axis.set_yticks(range(len(layers)), layers, fontsize=6)
    if maps:
        figure.colorbar(image, ax=axes[0], label="visible pairs / causal pairs")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(rows: Sequence[Row]) -> str:
    """Tables and continuations, Markdown."""
    first = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    where = f"{first['machine']['name']}, {first['settings']['dtype']}, {versions}."
    lines = [table(rows), where, ""]
    lines += ["Perplexity in % over dense; kept mass, copy gap recovered and exact needles: mean over texts.", ""]
    reasons = dict.fromkeys(row["note"] for row in rows if row["what"] == "quality" and row["note"] is not None)
    lines += [f"- unreachable: {reason}" for reason in reasons]
    prompts: dict[str, list[str]] = {}
    for each in of(rows, "continuation"):
        shown = f"- {label_of(each['method'], each['target'])}: {each['note']!r}"
        prompts.setdefault(each["prompt_ends"], []).append(shown)
    for prompt, continued in prompts.items():
        lines += ["", f"- prompt ends: {prompt!r}", *continued]
    return "\n".join(lines) + "\n"


def write_all(rows: Sequence[Row], folder: str | Path) -> str:
    """Writes `results.jsonl`, `table.md`, `perplexity.png` and `density_map.png` into a folder; returns the table."""
    folder = Path(folder)
    write(folder / "results.jsonl", rows)
    plot_perplexity(rows, folder / "perplexity.png")
    plot_maps(rows, folder / "density_map.png")
    text = report(rows)
    (folder / "table.md").write_text(text, encoding="utf-8")
    return text
