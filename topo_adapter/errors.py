"""Typed errors. Each message names the argument, what it needs, what it got, and the fix."""


class TopologyError(Exception):
    """Base class of every error this library raises on purpose."""


class TopologyConfigError(TopologyError, ValueError):
    """A configuration value is out of range, or does not fit the model it is applied to."""


class UnsupportedModelError(TopologyError, ValueError):
    """The model, one of its attention modules, or an input it sent cannot be routed exactly."""


class CacheError(TopologyError, ValueError):
    """The key-value cache cannot carry key addresses, or lacks them for tokens it holds."""


class MergeError(TopologyError, ValueError):
    """The adapter cannot be merged in its present state."""


class MissingPackageError(TopologyError, ImportError):
    """A package that an extra of this one brings is not installed."""


class AdapterFileError(TopologyError, ValueError):
    """An adapter file does not hold exactly the tensors the adapter needs."""
