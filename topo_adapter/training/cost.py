"""What a training costs, noted in the configs of the adapters that it trains (`history.TrainingRun`)."""

from __future__ import annotations

import functools
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments

from ..history import TrainingRun, add_run
from .routers import active_configs


class Meter:
    """Of one process's part of a training: a run that goes on from a checkpoint finds there what was noted before."""

    def __init__(self, state: TrainerState) -> None:
        self._begun, self._first, self._tokens = time.perf_counter(), state.global_step, state.num_input_tokens_seen
        self._noted: TrainingRun | None = None

    def note(self, args: TrainingArguments, state: TrainerState, model: nn.Module, data: Any) -> None:
        """Put what is known now into the active configs, in the place of what was noted before.

        Args:
            args: where it has `known_of_run`, a `TrainingRun`, that is part of the record.
            data: the data loader, if the caller has it.
        """
        if state.global_step == self._first:
            return
        run = TrainingRun(
            steps=state.global_step - self._first,
            seconds=round(time.perf_counter() - self._begun, 1),
            device=device_name(args),
            versions=_versions(),
        )
        if (name := data_name(getattr(data, "dataset", None))) is not None:
            run["data"] = name
        known: TrainingRun | None = getattr(args, "known_of_run", None)
        run.update(known or {})
        if state.num_input_tokens_seen > self._tokens:
            run["tokens"] = int(state.num_input_tokens_seen - self._tokens)
        elif data is not None and "length" in run:
            rows = rows_read(args, state.global_step, data) - rows_read(args, self._first, data)
            run["tokens"] = rows * run["length"]
        for config in active_configs(model):
            runs = config.training_runs or []
            if self._noted is not None and runs and runs[-1] == self._noted:
                runs = runs[:-1]
            config.training_runs = add_run(runs, run)
        self._noted = run


def rows_read(args: TrainingArguments, steps: int, data: Any) -> int:
    """Rows that the first steps of a training read, on all devices; an epoch's last step reads what is left of it."""
    on_all = args.train_batch_size * args.world_size
    rows, steps_of_epoch = len(data.dataset), -(-len(data) // args.gradient_accumulation_steps)
    if args.dataloader_drop_last:
        rows = len(data) * on_all
    epochs, more = divmod(steps, steps_of_epoch)
    return epochs * rows + min(more * on_all * args.gradient_accumulation_steps, rows)


def data_name(dataset: Any) -> str | None:
    """What a data set calls itself, or the last part of its path; None if it has no name."""
    if isinstance(dataset, (str, Path)):
        return Path(dataset).name[:200] or None
    info = getattr(dataset, "info", None)  # of datasets.Dataset
    name = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)
    if not isinstance(name, str) or not name:
        return None
    parts = [name, getattr(info, "config_name", None)]
    return ", ".join(part for part in parts if isinstance(part, str) and part and part != "default")[:200]


def device_name(args: TrainingArguments) -> str:
    """'2 x NVIDIA H100 80GB HBM3', 'cpu'."""
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    return name if args.world_size == 1 else f"{args.world_size} x {name}"


@functools.cache
def _versions() -> dict[str, str]:
    from .. import __version__

    return {"topo_adapter": __version__, **{name: version(name) for name in ("peft", "transformers", "torch")}}
