"""Training at drawn densities: each step runs the depth map that the dial has for one (docs/method.md, section 5.3)."""

from __future__ import annotations

import math
import random
import warnings
from statistics import fmean
from typing import NamedTuple

from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ..config import TopologyConfig, VisibleDepth
from ..core.dial import allot, expected_loss, reachable
from ..core.passes import Pass, changed
from ..core.visibility import always_density
from ..errors import TopologyConfigError
from ..measuring.calibration import calibrate
from .routers import active_configs

_STRATA = 8
#: Calibrations in the course of a training, at equal distances; more of them at its start change nothing
#: (docs/notebook/2026-11-26-calibrating-earlier.md).
CALIBRATIONS = 5
_MAX_SPARSEST = 0.25  # share of the steps that may train the sparsest map unmentioned
_MAX_RATIO = 16.0  # of losses in `loss_weight`, where a map is expected to lose next to nothing
#: First and last temperature. The forward does not depend on it; in backward a digit whose logit is more than a few
#: temperatures from its threshold has no gradient, and after layer-local distillation most are
#: (docs/notebook/2026-11-25-backward-temperature.md).
TEMPERATURES = (2.0, 0.5)


def drawn_density(seed: int, step: int, lowest: float, highest: float) -> float:
    """The density of a training step, log-uniform in `[lowest, highest]`.

    A function of its arguments alone, so every process draws alike and a resumed run goes on as it would have. Each
    run of 8 steps has a density of each eighth of the range, in an order of its own: logs over several steps stay
    comparable.
    """
    block, index = divmod(step, _STRATA)
    strata = list(range(_STRATA))
    random.Random(f"{seed}/{block}").shuffle(strata)  # a string seeds alike on every platform and in every process
    offset = random.Random(f"{seed}/{step}/density").random()
    share = (strata[index] + offset) / _STRATA
    return lowest * (highest / lowest) ** share


class TrainAt(Pass):
    """Each configuration has its depths and price of density, and heads take their likeliest digits."""

    trains = True

    def __init__(self, configs: list[TopologyConfig], maps: list[Map]) -> None:
        self._in_force = {
            id(config): changed(
                config,
                visible_depth=each.depths,
                head_visits=each.visits,
                density_weight=each.price,
                gumbel_noise=False,
            )
            for config, each in zip(configs, maps, strict=True)
        }

    def takes(self, training: bool) -> bool:
        """An error in a step leaves a callback's pass in force, which evaluation is not to run."""
        return training

    def in_force(self, config: TopologyConfig) -> TopologyConfig:
        return self._in_force.get(id(config), config)


class Map(NamedTuple):
    """Depths and visits to train at, the price of density there, and the loss that the calibration expects."""

    depths: VisibleDepth
    visits: dict[int, list[int]] | None
    price: float
    loss: float = 0.0


def nearest_map(config: TopologyConfig, density: float) -> Map:
    """The depth map of a density, or the sparsest one where that is more.

    The price is what the dial itself would pay for a little more density, in terms of `density_weight` (the mean over
    a layer's heads has that weight), at most the config's own: where density is cheap to the dial, so it is to the
    routers.
    """
    assert config.calibration is not None  # of calibrate
    setting, rate = allot(config.calibration, reachable(config.calibration, density))
    depths = setting.depths
    price = min(config.density_weight, rate * sum(map(len, depths.values())) / len(depths))
    return Map(dict(depths), setting.visits, price, expected_loss(config.calibration, setting))


def without_ball(config: TopologyConfig, density: float) -> float:
    """Share of the heads that the depth map of a density gives no ball: they see window and sinks alone."""
    assert config.calibration is not None  # of calibrate
    setting, _ = allot(config.calibration, reachable(config.calibration, density))
    heads = [depth for of_layer in setting.depths.values() for depth in of_layer]
    return sum(depth > config.depth for depth in heads) / len(heads)


def loss_weight(configs: list[TopologyConfig], maps: list[Map], densities: tuple[float, float]) -> float:
    """Makes the losses of sparse and dense maps alike: what the middle of the range is expected to lose over what this
    step's map is.

    The KL at density .08 is ten times that at .4, and so is its gradient, which would drown the other's.
    """
    middle = math.sqrt(densities[0] * densities[1])
    reference = math.fsum(nearest_map(config, middle).loss for config in configs)
    if reference <= 0:
        return 1.0
    expected = math.fsum(m.loss for m in maps)
    return reference / max(expected, reference / _MAX_RATIO)


def warn_of_sparsest_steps(densities: tuple[float, float], rows: Tensor, config: TopologyConfig) -> None:
    """Say so where many of the densities to be drawn are below what window and sinks show of such rows."""
    lowest, highest = densities
    near = always_density(rows.shape[1], config.local_window, config.num_sink_tokens)
    if near <= lowest:
        return
    share = min(1.0, math.log(near / lowest) / math.log(highest / lowest)) if highest > lowest else 1.0
    if share > _MAX_SPARSEST:
        warnings.warn(
            f"{share:.0%} of the densities drawn from {lowest:g} to {highest:g} are below the {near:.3g} that "
            f"local_window {config.local_window} and {config.num_sink_tokens} sinks show of {rows.shape[1]} "
            "tokens; those steps all train the sparsest map. Train on longer rows, raise lowest_density, or lower "
            "local_window.",
            stacklevel=3,
        )


def check_densities(densities: tuple[float, float]) -> None:
    """Raises TopologyConfigError unless they are the lowest and the highest density of a range."""
    if not 0 < densities[0] <= densities[1] <= 1:
        raise TopologyConfigError(
            f"densities must be lowest and highest with 0 < lowest <= highest <= 1, got {densities}"
        )


class DrawnDensities:
    """The depth maps of a training's steps, from a calibration that is renewed as the routers change.

    Args:
        densities: lowest and highest density to draw, `0 < lowest <= highest <= 1`, at the length of `rows`; a density
            below that of the sparsest map is trained at the sparsest.
        rows: int64 `[B, T]`, what `calibrate` measures on, and its `check_padding`.
        seed: of the draws.

    Raises:
        TopologyConfigError: `densities` is out of range.
    """

    def __init__(self, densities: tuple[float, float], rows: Tensor, check_padding: bool, seed: int) -> None:
        check_densities(densities)
        self.densities, self.rows, self.check_padding, self.seed = densities, rows, check_padding, seed
        self.without_ball = 0.0  # share of the heads at the lowest density, by the last calibration
        self._calibrated: int | None = None  # the fifth of the training that the calibration is of

    def renew(self, model: nn.Module, step: int, steps: int) -> None:
        """Calibrate where it is due before a step of so many, or where a resumed run has not."""
        fifth = step * CALIBRATIONS // steps
        if self._calibrated == fifth:
            return
        calibrate(model, self.rows, seed=self.seed, check_padding=self.check_padding)
        configs = active_configs(model)
        for config in configs:  # atomic additions differ between processes, their maps must not
            (config.calibration,) = broadcast_object_list([config.calibration])
        self.without_ball = fmean(without_ball(config, self.densities[0]) for config in configs)
        self._calibrated = fifth

    def draw(self, configs: list[TopologyConfig], step: int) -> tuple[float, list[Map]]:
        """A step's density, and each configuration's map of it."""
        density = drawn_density(self.seed, step, *self.densities)
        return density, [nearest_map(config, density) for config in configs]
