"""What a merged model's queries saw of a text, beside what calibration leads to expect."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..core.dial import column_of
from ..core.markup import table
from ..core.passes import Pass, during
from ..core.visibility import always_density
from ..errors import MergeError, UnsupportedModelError
from ..forward import Attention, TopologyCall
from ..layer import active_layers, hosts
from ..ops.plan import Plan, make_plan

#: `density_report` warns above this ratio of realised to calibrated density.
WARN_RATIO = 1.5


class DensityReport(dict[int, dict[str, float]]):
    """What `density_report` returns; a notebook shows it as a table."""

    def _repr_html_(self) -> str:
        names = ("density", "calibrated", "ratio")
        rows = [(layer, *(f"{values[name]:.3f}" for name in names)) for layer, values in self.items()]
        return table(("layer", *names), rows, "Visible over causal pairs: of this text, expected by calibration")


@contextlib.contextmanager
def recording_density(model: nn.Module) -> Iterator[None]:
    """While active, the layers of a merged model count what their queries see, for `density_report`: in forwards of
    this thread.

    A few small kernels per layer and forward, and nothing waits for them. Forwards of up to 16 new tokens over a
    cache scan it and make no plan to count: decoding is not recorded.

    Args:
        model: with a merged and calibrated topology adapter, or a merged model.

    Raises:
        UnsupportedModelError: no active adapter. MergeError: not merged, or not calibrated, or on texts that window
            and sinks cover, which say nothing of others.
    """
    layers = active_layers(model)
    for layer, config, merged in layers:
        if not merged or config.calibration is None:
            raise MergeError(
                "recording_density needs a merged adapter with a calibration, got layer "
                f"{layer.geometry.layer} {'without calibration' if merged else 'unmerged'}; call calibrate, then "
                "merge_adapter"
            )
        length, window, sinks = config.calibration["length"], config.local_window, config.num_sink_tokens
        if always_density(length, window, sinks) == 1:
            raise MergeError(
                f"recording_density needs a calibration on texts that window ({window}) and sinks ({sinks}) do not "
                f"cover, got one on texts of {length} tokens; calibrate on longer ones"
            )
    for layer, _, _ in layers:
        layer.density_counts = None
    with during(model, _CountDensity()):
        yield


def density_report(model: nn.Module) -> DensityReport:
    """Density that the last `recording_density` saw in each layer, beside what calibration leads to expect.

    The expectation takes the share of far pairs (beyond window and sinks) that a map reveals as independent of
    length, so that texts shorter or longer than the calibrated ones compare fairly. Warns once, naming the layers
    whose realised density is more than 1.5 times the expected: the text is unlike those of the calibration, and
    neither its speed nor its quality is what the dial was set to.

    Returns:
        Layer index -> `density` and `calibrated`, means over the heads in (0, 1], and `ratio`, their quotient.

    Raises:
        UnsupportedModelError: nothing was recorded.
    """
    report = DensityReport()
    for layer in hosts(model):
        if layer.density_counts is not None:
            visible, expected, causal = layer.density_counts.tolist()
            report[layer.geometry.layer] = {
                "density": visible / causal,
                "calibrated": expected / causal,
                "ratio": visible / expected,
            }
    if not report:
        raise UnsupportedModelError(
            "density_report needs a recorded forward of a merged model, got none; run the text inside `with "
            "recording_density(model):`"
        )
    above = {layer: round(values["ratio"], 2) for layer, values in report.items() if values["ratio"] > WARN_RATIO}
    if above:
        warnings.warn(
            f"density is more than {WARN_RATIO} times what calibration leads to expect in layers (ratio) {above}: "
            "this text is far outside the calibration; calibrate on such texts, or merge at a lower target_density.",
            stacklevel=2,
        )
    return report


class _CountDensity(Pass):
    def attend(self, attention: Attention) -> tuple[Tensor, Tensor | None]:
        if not attention.call.hard or attention.scans_cache:
            return attention.topology()
        plan = make_plan(attention.call.visibility)
        self._count(attention.call, plan)
        return attention.hard(plan), None

    def _count(self, call: TopologyCall, plan: Plan) -> None:
        """Add visible, expected and causal pairs of a mean head, float64 `[3]`; nothing waits for the device."""
        calibration = call.config.calibration
        assert calibration is not None  # recording_density has looked
        density = calibration["density"][call.host.geometry.layer]
        length, window, sinks = calibration["length"], call.config.local_window, call.config.num_sink_tokens
        near = always_density(length, window, sinks)
        rule = call.visibility.rule
        heads = zip(density, rule.depths, rule.visits, strict=True)
        revealed = sum(values[column_of(calibration, depth, visits)] for values, depth, visits in heads) / len(density)
        share = max(revealed - near, 0.0) / (1 - near)  # of the far pairs
        visible, causal = plan.visible_count().mean(), plan.causal_count()
        local = visible - plan.far_count().mean()
        counts = torch.stack([visible, local + (causal - local) * share, causal])
        host = call.host
        host.density_counts = counts if host.density_counts is None else host.density_counts + counts
