"""Commands that measure: `topo evaluate` an adapter, `topo bench` seconds, `topo demo` of all of it."""

from __future__ import annotations

import dataclasses

import typer

from .console import need
from .options import Options, split


def evaluate(context: typer.Context) -> None:
    """Measure an adapter: perplexity, copying, needles and speed, beside the dense model."""
    need("evaluate", "evaluation", "matplotlib")
    from topo_evaluation.report import OutputArguments, write_all
    from topo_evaluation.tasks import EvaluationSettings, load
    from topo_evaluation.tasks import evaluate as evaluate_

    options = Options(
        (EvaluationSettings, OutputArguments),
        "evaluate ADAPTER",
        "Measure a calibrated adapter beside the dense model, on texts that nothing was trained on: perplexity over "
        "density, copying, needles, seconds, and with --baselines sparse attention that needs no training. Writes "
        "results.jsonl, table.md and two pictures to --output-dir.",
        {"Options": [each.name for each in (*_fields(EvaluationSettings)[1:], *_fields(OutputArguments))]},
    )
    settings, output = options.parse(_first("adapter", context.args))
    rows = evaluate_(*load(settings), settings)
    print(write_all(rows, output.output_dir))


def bench(context: typer.Context) -> None:
    """Time a model dense and sparse: the first token, and decoding."""
    from topo_evaluation.bench import BenchSettings, report
    from topo_evaluation.bench import bench as bench_

    options = Options(
        (BenchSettings,),
        "bench MODEL_OR_ADAPTER",
        "Time a model dense and sparse in one run: seconds to the first token and decoded tokens a second, medians, at "
        "each length and density. A model without an adapter gets random groups, which cost what trained ones do.",
        {"Options": [each.name for each in _fields(BenchSettings)[1:]]},
    )
    (settings,) = options.parse(_first("model", context.args))
    print(report(bench_(settings)))


def demo(context: typer.Context) -> None:
    """Show the whole method on a small model, in ten minutes on two CPU cores."""
    need("demo", "evaluation", "matplotlib")
    from topo_evaluation.demo import DemoSettings, demonstrate

    options = Options(
        (DemoSettings,),
        "demo",
        "Train, save, load and merge an adapter of a small model, and show loss, seconds and answers, dense and "
        "sparse. Ten minutes on two CPU cores; uses a GPU where there is one. Writes to --output-dir.",
        {"Options": [each.name for each in _fields(DemoSettings)]},
    )
    (settings,) = options.parse(context.args)
    demonstrate(settings)


def _fields(kind: type) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(kind)


def _first(name: str, given: list[str]) -> list[str]:
    """Arguments whose first, if it is no option, is the value of an option."""
    names, rest = split(given)
    return [*([f"--{name}", names[0]] if names else []), *names[1:], *rest]
