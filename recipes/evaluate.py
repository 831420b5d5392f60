"""Measure a topology adapter: quality over density, copying, needles, speed, beside the dense model and baselines.

    python recipes/evaluate.py --adapter examples/smollm2-135m-topology
    python recipes/evaluate.py --adapter runs/distill --lengths 4096 --densities 0.1 0.2 --baselines
    python recipes/evaluate.py --adapter runs/qwen3 --texts book.txt --windows 8 --no_speed --no_generate

Densities are targets at the evaluated length, window and sinks included. Every text is measured by itself, on the
same windows for all methods. Baselines (`topo_evaluation.baselines`) run at the density that the adapter realised on
that text. Everything goes to `--output_dir`: `results.jsonl`, `table.md`, `perplexity.png`, `density_map.png`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from topo_evaluation.report import plot_maps, plot_perplexity, report
from topo_evaluation.results import Row, write
from topo_evaluation.tasks import EvaluationSettings, evaluate, load


@dataclass
class OutputArguments:
    output_dir: str = field(default="runs/evaluate", metadata={"help": "Where everything is written."})


def main(settings: EvaluationSettings, arguments: OutputArguments) -> list[Row]:
    output = Path(arguments.output_dir)
    rows = evaluate(*load(settings), settings)
    write(output / "results.jsonl", rows)
    plot_perplexity(rows, output / "perplexity.png")
    plot_maps(rows, output / "density_map.png")
    text = report(rows)
    (output / "table.md").write_text(text)
    print(text)
    return rows


if __name__ == "__main__":
    main(*HfArgumentParser((EvaluationSettings, OutputArguments)).parse_args_into_dataclasses())
