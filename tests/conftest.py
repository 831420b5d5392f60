"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are imported."""

import gc
import importlib.util
import os
from functools import cache
from typing import Any

import pytest
import torch


def speed_up_the_interpreter() -> None:
    """Keeps what Triton (3.6 to 3.9) does anew, by the million: over a third of the time of the interpreted tests.

    At every call of a device function it patches all of `triton.language`, which the kernel that calls it did already,
    and at every operation it builds a table of dtypes.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang

    def patch_lang_once(function: Any) -> Any:
        seen = {module for module in function.__globals__.values() if module is tl or module is tl.core}
        if any(tl.core.is_builtin(module.load) for module in seen):
            return patch_lang(function)
        return interpreter._LangPatchScope()

    scalar_dtype = cache(interpreter._get_np_dtype)
    pointer = interpreter.np.dtype("uint64")

    def np_dtype(kind: Any) -> Any:
        return pointer if kind.scalar.is_ptr() else scalar_dtype(kind.scalar)

    interpreter._patch_lang, interpreter._get_np_dtype = patch_lang_once, np_dtype


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        speed_up_the_interpreter()


@pytest.fixture(autouse=True, scope="module")
def freeze_what_is_imported() -> None:
    """Garbage collection passes over what is alive before a file's first test: torch and transformers, mostly.

    Accelerate collects after every training, and would go through all of them each time, for half a second.
    """
    gc.collect()
    gc.freeze()


#: Minutes each, or the better part of one, on one core.
LONGEST = [
    *("real_model", "kernel_paths", "shipped_adapter", "recipe", "bridge_kernel", "decode_kernel", "kl", "gates"),
    "notebooks",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="PEFT's own tests on every family of models, not on one")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device (skipped without one)")
    # Triton 3.6's interpreter converts one-element arrays to loop bounds
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest files must not be the last: those named, then those of interpreted kernels. The two that need real
    # weights are not the first two, or two processes unpack the weights at once, over each other's.
    def rank(item: pytest.Item) -> tuple[int, bool]:
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST), "kernel" not in name

    items.sort(key=rank)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
