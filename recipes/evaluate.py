"""Measure a topology adapter: quality over density, copying, needles, speed, beside the dense model and baselines.

    python recipes/evaluate.py --adapter examples/smollm2-135m-topology
    python recipes/evaluate.py --adapter runs/distill --lengths 4096 --densities 0.1 0.2 --baselines
    python recipes/evaluate.py --adapter runs/qwen3 --texts book.txt --windows 8 --no_speed --no_generate

Densities are targets at the evaluated length, window and sinks included. Every text is measured by itself, on the
same windows for all methods. Baselines (`topo_evaluation.baselines`) run at the density that the adapter realised on
that text. Everything goes to `--output_dir`: `results.jsonl`, `table.md`, `perplexity.png`, `density_map.png`.
From a shell without this file: `topo evaluate ADAPTER`.
"""

from transformers import HfArgumentParser

from topo_evaluation.report import OutputArguments, write_all
from topo_evaluation.results import Row
from topo_evaluation.tasks import EvaluationSettings, evaluate, load


def main(settings: EvaluationSettings, output: OutputArguments) -> list[Row]:
    rows = evaluate(*load(settings), settings)
    print(write_all(rows, output.output_dir))
    return rows


if __name__ == "__main__":
    main(*HfArgumentParser((EvaluationSettings, OutputArguments)).parse_args_into_dataclasses())
