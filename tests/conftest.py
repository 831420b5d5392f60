"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device (skipped without one)")
    # Triton 3.6's interpreter converts one-element arrays to loop bounds
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # the longest files must not be the last: the real model's, then those of interpreted kernels
    items.sort(key=lambda item: (item.get_closest_marker("real") is None, "kernel" not in item.path.name))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
