"""An adapter at each target of its density dial, and with all heads at one depth, which needs no dial."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from peft import PeftModel

from topo_adapter import TopologyConfigError

from .baselines import Window
from .measures import (
    Case,
    Scores,
    config_of,
    density_map,
    gap_recovered,
    merged_at,
    score,
    score_baseline,
    score_dense,
    uniform_at,
)


def over_depths(
    adapter: PeftModel, cases: Sequence[Case], densities: Sequence[float], uniform: bool = True
) -> Iterator[tuple[Scores, Scores]]:
    """Setting (`target`, or where `uniform` `uniform_depth`), and means over texts and each text's scores.

    Where a target is `unreachable`, why.
    """
    config, base = config_of(adapter), adapter.get_base_model()
    dense = [score_dense(adapter, case) for case in cases]
    window = [
        score_baseline(adapter, case, lambda: Window(config.local_window, config.num_sink_tokens)) for case in cases
    ]

    def means() -> Scores:
        rows = []
        for case, full, least in zip(cases, dense, window, strict=True):
            found = score(base, case)
            density = density_map(base, case.windows)
            row = {
                "density": statistics.fmean(value for heads in density.values() for value in heads),
                "over_dense_percent": 100 * (found["perplexity"] / full["perplexity"] - 1),
            }
            if "copy_loss" in found:
                row["gap_recovered"] = gap_recovered(least["copy_loss"], found["copy_loss"], full["copy_loss"])
            rows.append(row)
        result: Scores = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
        result["texts"] = dict(zip((case.text for case in cases), rows, strict=True))
        return result

    for target in densities:
        at = {"target": target, "uniform_depth": None}
        try:
            with merged_at(adapter, target):
                found = means()
        except TopologyConfigError as error:
            found = {"unreachable": str(error)}
        yield at, found
    for depth in range(1, config.depth + 1) if uniform else ():
        with uniform_at(adapter, depth):
            found = means()
        yield {"target": None, "uniform_depth": depth}, found
