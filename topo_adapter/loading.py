"""`load`: an adapter from files that nobody has to trust, with one kind of error for whatever is wrong with them."""

from __future__ import annotations

import os
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError

from .config import TopologyConfig
from .entry import discard
from .errors import AdapterFileError, TopologyError
from .files import find, read_fields


def load(
    model: Any,
    directory: str | os.PathLike,
    adapter_name: str = "default",
    *,
    subfolder: str | None = None,
    **kwargs: Any,
) -> PeftModel:
    """Load a saved adapter: `PeftModel.from_pretrained`, or `load_adapter` if `model` is a PeftModel already.

    PEFT reads adapter_config.json before this library sees it, and its errors there are of many kinds; this reads it
    first. Whatever is refused, the model is as it was.

    Args:
        model: a transformers model, or a PeftModel with topology adapters.
        directory: local path or hub id.
        adapter_name: the name it gets; None may have it yet.
        subfolder: where in `directory` it lies. kwargs: as for PEFT, `is_trainable` and `revision` among them.

    Raises:
        AdapterFileError: a file is missing, damaged, not an adapter's, or does not belong to the other.
        TopologyConfigError: a value of the config is out of range, or it does not fit the model.
        UnsupportedModelError: the model cannot be routed.
    """
    wrapped = isinstance(model, PeftModel)
    if wrapped and adapter_name in model.peft_config:
        raise AdapterFileError(f"adapter_name must be a new one, got {adapter_name!r}; delete_adapter it first")
    hub = TopologyConfig._split_kwargs(kwargs)[0]
    if subfolder is not None:
        kwargs["subfolder"] = subfolder
    loaded = False
    try:
        path = find(directory, CONFIG_NAME, subfolder, **hub)
        if path is None:
            raise AdapterFileError(f"{directory} must hold an {CONFIG_NAME}, got none")
        if "peft_type" not in read_fields(path):
            raise AdapterFileError(f"{path} must have a peft_type, got none: it is no adapter's")
        if wrapped:
            model.load_adapter(directory, adapter_name, **kwargs)
        else:
            model = PeftModel.from_pretrained(model, directory, adapter_name, **kwargs)
        loaded = True
        return model
    except TopologyError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError) as error:  # KeyError: PEFT looks for a tensor in the file
        raise AdapterFileError(f"{directory} must hold an adapter that PEFT can load, got: {error}") from error
    finally:
        if not loaded:
            discard(model, adapter_name)
