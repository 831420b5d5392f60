"""PEFT-style adapters that give a frozen LLM a learned sparse attention on a p-adic tree."""

from .register import register

register()

from .checkpoint import load_merged, save_merged  # noqa: E402
from .config import TopologyConfig  # noqa: E402
from .errors import (  # noqa: E402
    AdapterFileError,
    CacheError,
    MergeError,
    TopologyConfigError,
    TopologyError,
    UnsupportedModelError,
)
from .layer import RecordedRoutes, TopologyLayer  # noqa: E402
from .model import TopologyModel  # noqa: E402
from .router import TopologyRouter  # noqa: E402
from .routes import measure_density, record_routes  # noqa: E402
from .training import DistillationTrainer, TopologyCallback, TopologyTrainerMixin, initialize_routers  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "AdapterFileError",
    "CacheError",
    "DistillationTrainer",
    "MergeError",
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
    "initialize_routers",
    "load_merged",
    "measure_density",
    "record_routes",
    "save_merged",
]
