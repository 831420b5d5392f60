"""The `topo` command itself: its subcommands in the order of their help, and exit codes."""

from __future__ import annotations

import sys

import typer
from huggingface_hub.errors import HFValidationError
from rich.console import Console
from safetensors import SafetensorError

from topo_adapter import TopologyError

from . import measured, saved, train
from .console import show_stages
from .options import EVERYTHING

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learned sparse attention for frozen LLMs. Each command has a --help of its own. "
    "Exit codes: 0 done, 1 the answer is no, 2 it cannot be done.",
)
_TRAIN, _MEASURE, _USE = "Train", "Measure", "Use"

for _name, _function in (("distill", train.distill), ("sft", train.sft)):
    app.command(_name, rich_help_panel=_TRAIN, add_help_option=False, context_settings=EVERYTHING)(_function)
for _name, _function in (("demo", measured.demo), ("evaluate", measured.evaluate), ("bench", measured.bench)):
    app.command(_name, rich_help_panel=_MEASURE, add_help_option=False, context_settings=EVERYTHING)(_function)
app.command("inspect", rich_help_panel=_USE)(saved.inspect)
app.command("why-not", rich_help_panel=_USE)(saved.why_not)
app.command("generate", rich_help_panel=_USE)(saved.generate)
app.command("merge", rich_help_panel=_USE)(saved.merge)


def main() -> None:
    """The command: exit code 2 where something cannot be done, 1 where the answer is no."""
    show_stages()
    try:
        app(prog_name="topo")
    except (TopologyError, HFValidationError, SafetensorError, OSError, ValueError) as error:
        # the others: transformers', of what is not there, not whole, or of no kind that it knows
        Console(stderr=True, soft_wrap=True).print(f"topo: {error}", style="red", markup=False)
        sys.exit(2)
