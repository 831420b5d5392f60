"""What the commands say: results on standard output, stages and errors on standard error."""

from __future__ import annotations

import importlib.util
import logging
import os

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text
from transformers.utils import logging as transformers_logging

from topo_adapter import MissingPackageError

#: Loggers whose stages are shown. A library says them at level INFO, which is silent until somebody asks.
_SPEAKERS = ("topo_adapter", "topo_evaluation", "topo_cli")


def show_stages() -> None:
    """From now on a sentence for each stage stands on standard error, with the time; of the first process alone."""
    if os.environ.get("RANK", "0") != "0":  # accelerate's and torchrun's
        return
    for name in _SPEAKERS:
        logger = transformers_logging.get_logger(name)
        logger.setLevel(logging.INFO)
        if not any(isinstance(handler, RichHandler) for handler in logger.handlers):
            console = Console(stderr=True, soft_wrap=True)
            logger.addHandler(RichHandler(console=console, show_level=False, show_path=False, log_time_format="%X"))
            logger.propagate = False  # the root logger would say it again


def need(command: str, extra: str, *modules: str) -> None:
    """Raise MissingPackageError, which names the extra, unless all modules of it are installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"topo {command} needs {', '.join(missing)}, which the extra {extra!r} brings, got none: "
            f"pip install 'topo-adapter[{extra}]'"
        )


def plain(value: object) -> Text:
    """What a file says, without what a terminal or rich would take for a command."""
    return Text("".join(each if each.isprintable() else "?" for each in str(value)))
