"""PEFT-style adapters that give a frozen LLM a learned sparse attention on a p-adic tree."""

from .register import register

register()

from .checkpoint import load_merged, save_merged  # noqa: E402
from .config import Calibration, TopologyConfig  # noqa: E402
from .core.dial import choose_depths  # noqa: E402
from .density import set_density  # noqa: E402
from .errors import (  # noqa: E402
    AdapterFileError,
    CacheError,
    MergeError,
    MissingPackageError,
    TopologyConfigError,
    TopologyError,
    UnsupportedModelError,
)
from .kernel_report import why_not  # noqa: E402
from .layer import TopologyLayer  # noqa: E402
from .loading import load  # noqa: E402
from .measuring.calibration import calibrate  # noqa: E402
from .measuring.report import density_report, recording_density  # noqa: E402
from .measuring.routes import RecordedRoutes, measure_density, record_routes  # noqa: E402
from .model import TopologyModel  # noqa: E402
from .ops.router import TopologyRouter  # noqa: E402
from .training.callback import DensityCallback, TopologyCallback, drive_every_trainer  # noqa: E402
from .training.kl import KLTrainer  # noqa: E402
from .training.local import DistillationTrainer  # noqa: E402
from .training.recipe import DistillConfig, distill  # noqa: E402
from .training.routers import initialize_routers  # noqa: E402
from .training.trainer import TopologyTrainerMixin  # noqa: E402

drive_every_trainer()

__version__ = "0.1.0"

__all__ = [
    "AdapterFileError",
    "CacheError",
    "Calibration",
    "DensityCallback",
    "DistillConfig",
    "DistillationTrainer",
    "KLTrainer",
    "MergeError",
    "MissingPackageError",
    "RecordedRoutes",
    "TopologyCallback",
    "TopologyConfig",
    "TopologyConfigError",
    "TopologyError",
    "TopologyLayer",
    "TopologyModel",
    "TopologyRouter",
    "TopologyTrainerMixin",
    "UnsupportedModelError",
    "calibrate",
    "choose_depths",
    "density_report",
    "distill",
    "initialize_routers",
    "load",
    "load_merged",
    "measure_density",
    "record_routes",
    "recording_density",
    "save_merged",
    "set_density",
    "why_not",
]
