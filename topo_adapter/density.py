"""Turning the density dial of a model that carries a calibrated adapter, merged or not."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from torch import nn
from transformers.utils import logging

from .config import Calibration, TopologyConfig
from .core.dial import at_length, check_density
from .core.visibility import always_density
from .errors import TopologyConfigError
from .layer import active_layers

_log = logging.get_logger(__name__)


def set_density(model: nn.Module, target_density: float, length: int | None = None) -> None:
    """Give every routed head the depth that the calibration finds for a density; weights stay as they are.

    Works on a PeftModel, merged or not, and on what `merge_and_unload` and `load_merged` return. The density stays: it
    is saved with the adapter. Graphs that were captured or compiled before keep the depths they were made with.

    Args:
        model: with an active, calibrated topology adapter.
        target_density: visible over causal pairs, window and sinks included, in (0, 1].
        length: tokens of the texts in which that is meant, >= 1; None is the calibrated length. Shorter texts see a
            larger share, since window and sinks are always visible.

    Raises:
        UnsupportedModelError: no active adapter. TopologyConfigError: the adapter is not calibrated, or the density is
            out of range or below what the sparsest map reaches.
    """
    turn_dial({id(config): config for _, config, _ in active_layers(model)}.values(), target_density, length)


def turn_dial(configs: Iterable[TopologyConfig], target_density: float, length: int | None) -> None:
    """`set_density` for configurations; all of them are turned, or none."""
    turned = []
    for config in configs:
        density = calibrated_density(config, target_density, length)
        turned.append((config, density, config.setting_at(density)))
    for config, density, setting in turned:
        config.target_density, config.setting = density, setting
        say_density(config, length)


def calibrated_density(config: TopologyConfig, target_density: float, length: int | None) -> float:
    """The density at the calibrated length of a map that has `target_density` in texts of `length` tokens.

    Raises:
        TopologyConfigError: not calibrated, `length` below 1, or window and sinks alone exceed the density there.
    """
    table = calibration_of(config)
    check_density(target_density)
    if length is None:
        return target_density
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise TopologyConfigError(f"length must be an integer >= 1 (tokens), got {length!r}")
    return at_length(target_density, length, table["length"], config.local_window, config.num_sink_tokens)


def calibration_of(config: TopologyConfig) -> Calibration:
    """The calibration of an adapter. Raises TopologyConfigError if it has none."""
    if config.calibration is None:
        raise TopologyConfigError(
            "adapter must hold a calibration to choose depths from, got none; call topo_adapter.calibrate(model, "
            "sequences) and save the adapter again"
        )
    return config.calibration


def say_density(config: TopologyConfig, length: int | None = None) -> None:
    """Log, once, what an adapter's density comes to at the calibrated length and at another one."""
    if not config.on_the_dial():
        return
    table, density = calibration_of(config), config.target_density
    assert density is not None  # on the dial
    own, other = table["length"], length or max(1, table["length"] // 4)
    near = always_density(own, config.local_window, config.num_sink_tokens)  # the table is rounded, and may be below
    there = at_length(max(density, near), own, other, config.local_window, config.num_sink_tokens)
    _say(
        f"density {density:.3g} of texts of {own:,} tokens, the calibrated length, is about {there:.3g} "
        f"of {other:,} tokens (window and sinks included)"
    )


@functools.cache
def _say(message: str) -> None:
    # a warning, because it is seen without any setting of the logger and the number asked for is not that of all texts
    _log.warning(message)
