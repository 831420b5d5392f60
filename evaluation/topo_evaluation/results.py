"""Results as JSON lines, one measurement a line; results/README.md of the repository gives the schema."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import topo_adapter

Row = dict[str, Any]

#: The keys of a row, in this order; what is not known is None.
KEYS = ("what", "command", "date", "commit", "machine", "versions", "model", "settings", "metrics", "note")

#: Units of metrics. A metric is a number, or a list or mapping of numbers of this unit.
UNITS: dict[str, str] = {
    **dict.fromkeys(("density", "density_map"), "visible over causal pairs"),
    **dict.fromkeys(("depths", "depth_counts", "dense_heads"), "levels, or heads at each number of levels"),
    "kept_mass": "share of the dense attention weight on visible keys",
    "heads_without_ball": "share of sparse heads, at the lowest density; a list of step and share",
    **dict.fromkeys(("perplexity", "points_of_perplexity", "mean_points_of_perplexity"), "perplexity"),
    **dict.fromkeys(("over_dense_percent", "over_dense_percent_at_aim"), "% of the dense perplexity"),
    **dict.fromkeys(("copy_loss", "loss", "loss_difference", "needle_log_prob"), "nats per token"),
    **dict.fromkeys(("kl", "kl_at_aim", "kl_of_steps", "expected_loss"), "nats per token; of steps: step, nats"),
    "gap_recovered": "share of what window and sinks lose in copying against the dense model",
    **dict.fromkeys(("needle_exact", "needle_exact_at"), "share of prompts; at: by depth of the needle"),
    **dict.fromkeys(("ms", "ms_p20", "ms_p80", "host_ms", "floor_ms", "decode_ms"), "ms"),
    **dict.fromkeys(
        (
            *("seconds", "total_seconds", "train_seconds", "calibrate_seconds", "prefill_seconds"),
            *("seconds_per_window", "local_seconds", "kl_seconds", "elapsed_seconds"),
            "seconds_with_loading_and_both_calibrations",
        ),
        "s",
    ),
    "repeats": "measurements of which ms is the median",
    **dict.fromkeys(("speedup", "gap"), "time of the fastest dense attention over ms; ms over floor_ms"),
    "gflop": "10^9 floating-point operations",
    **dict.fromkeys(("megabytes", "peak_mb"), "10^6 bytes"),
    "adapter_bytes": "bytes",
    "error": "relative to float64, Frobenius norm",
    "tokens_per_s": "tokens per second",
    **dict.fromkeys(
        (
            *("addresses_unmerged_equal_merged", "key_addresses_prefill_equal_decode"),
            "top1_prefill_equal_decode",
        ),
        "share of addresses or tokens",
    ),
    **dict.fromkeys(
        ("logit_difference_unmerged_merged_mean", "logit_difference_prefill_decode_mean"), "mean absolute logit"
    ),
    "texts": "the same metrics of each text",
    **dict.fromkeys(("points", "training", "calibrations"), "a list, each with metrics of its own"),
}


def origin(model: str | None, device: torch.device | str, commit: str = "") -> Row:
    """What the rows of this process have in common.

    Args:
        model: the base model's name. device: where it is measured. commit: of the code; '' asks git.
    """
    on_gpu = torch.device(device).type == "cuda"
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": commit or _commit(),
        "machine": {
            "name": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
            "device": str(device),
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "topo_adapter": topo_adapter.__version__,
            **{name: found for name in ("torch", "transformers", "peft", "triton") if (found := _version(name))},
            "python": platform.python_version(),
        },
        "model": model,
    }


def make_row(
    origin: Mapping[str, Any],
    what: str,
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any],
    note: str | None = None,
) -> Row:
    """One measurement.

    Raises:
        ValueError: a metric has no unit in `UNITS`.
    """
    if unknown := sorted(metrics.keys() - UNITS.keys()):
        raise ValueError(f"metrics must be of topo_evaluation.results.UNITS, got {unknown}; add their units there")
    row = {**origin, "what": what, "settings": dict(settings), "metrics": dict(metrics), "note": note}
    return {key: row[key] for key in KEYS}


def flat(row: Row) -> Row:
    """Settings and metrics of a row together, with its note."""
    return {**row["settings"], **row["metrics"], **({} if row["note"] is None else {"note": row["note"]})}


def append(path: str | Path, rows: Iterable[Row]) -> None:
    """Add rows to a file, which is made if there is none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: str | Path, rows: Iterable[Row]) -> None:
    """A file of these rows alone."""
    Path(path).unlink(missing_ok=True)
    append(path, rows)


def read(path: str | Path) -> list[Row]:
    """The rows of a file.

    Raises:
        ValueError: a line is not of the schema.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if not isinstance(row, dict) or tuple(row) != KEYS:
            raise ValueError(f"{path}, line {number}, must be an object of {', '.join(KEYS)}, got {line[:80]}")
        rows.append(row)
    return rows


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the repository that this file is tracked in; None where it is installed, or git is missing."""
    if not shutil.which("git"):
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    return (git("ls-files", Path(__file__).name) and git("describe", "--always", "--dirty")) or None
