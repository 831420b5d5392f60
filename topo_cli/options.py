"""Options of the commands that take dataclasses: YAML files, and a help that shows ours before the Trainer's."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import typer
import yaml
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from topo_adapter import TopologyConfigError

from .console import plain

#: Of typer: the command takes every argument as it is, `--help` too.
EVERYTHING: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
_INHERITED = "Inherited from transformers and TRL"


class Options(HfArgumentParser):
    """Dataclasses as the options of a command.

    `--config FILE` reads YAML of the same keys; what stands on the command line comes first. `--help` shows the fields
    of `shown`, `--help-all` every field.

    Args:
        kinds: dataclasses.
        usage: what follows `topo`, without the options. about: a sentence or two of help.
        shown: heading -> names of fields. defaults: of fields, where they are not the dataclasses'.
    """

    def __init__(
        self,
        kinds: Sequence[Any],
        usage: str,
        about: str,
        shown: Mapping[str, Iterable[str]],
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(kinds, add_help=False, allow_abbrev=False)
        self.usage_line, self.about, self.shown = f"topo {usage} [OPTIONS]", about, shown
        self.defaults = defaults or {}
        self.fields = {each.name: (each, hint) for kind in kinds for each, hint in _fields(kind)}

    def error(self, message: str) -> NoReturn:
        """Raise instead of a page of usage."""
        raise TopologyConfigError(f"{message}; topo {self.usage_line.split()[1]} --help shows the options")

    def parse(self, given: Sequence[str]) -> tuple[Any, ...]:
        """One object of each dataclass.

        Args:
            given: from the command line, without positional arguments; with a `--help` in it the help is printed and
                the command ends.

        Raises:
            TopologyConfigError: an option or key is unknown, or a value is of the wrong type; and as the dataclasses.
        """
        for option, everything in (("--help", False), ("--help-all", True)):
            if option in given:
                self.show(everything)
                raise typer.Exit(0)
        rest, config = list(given), {}
        if "--config" in rest:
            place = rest.index("--config")
            if place + 1 == len(rest):
                self.error("--config must be followed by a YAML file")
            config = self._read(Path(rest[place + 1]))
            del rest[place : place + 2]
        *found, unknown = self.parse_args_into_dataclasses(
            [*_as_options(self.defaults), *_as_options(config), *rest],
            return_remaining_strings=True,
            look_for_args_file=False,
        )
        if unknown:
            self.error(f"options must be of this command, got {' '.join(unknown)}")
        return tuple(found)

    def _read(self, path: Path) -> dict[str, Any]:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            self.error(f"{path} must be a YAML mapping of options, got {type(config).__name__}")
        if unknown := sorted(map(str, config.keys() - self.fields.keys())):
            self.error(f"keys of {path} must be options of this command, got {', '.join(unknown)}")
        return config

    def show(self, everything: bool) -> None:
        """Print the help."""
        out = Console()
        out.print(f"\nUsage: {self.usage_line}", style="bold", markup=False)
        out.print(f"\n{self.about}\n", markup=False)
        groups = {title: list(names) for title, names in self.shown.items()}
        if everything:
            ours = {name for names in groups.values() for name in names}
            groups[_INHERITED] = [name for name in self.fields if name not in ours]
        for title, names in groups.items():
            grid = Table(
                title=title, title_justify="left", title_style="bold", box=None, show_header=False, expand=True
            )
            grid.add_column(no_wrap=not everything, ratio=None if not everything else 2)
            grid.add_column(ratio=3)
            for name in names:
                each, hint = self.fields[name]
                grid.add_row(
                    plain(f"--{name.replace('_', '-')} {_kind(hint)}"), plain(_help(each, self.defaults.get(name)))
                )
            out.print(grid)
            out.print()
        out.print("--config FILE takes YAML of the same keys; an option given here comes first.", markup=False)
        if not everything:
            out.print("--help-all shows what is inherited from transformers and TRL too.", markup=False)


def split(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before the first option, and the rest."""
    place = next((place for place, each in enumerate(given) if each.startswith("-")), len(given))
    return list(given[:place]), list(given[place:])


def _fields(kind: Any) -> list[tuple[dataclasses.Field, Any]]:
    hints = typing.get_type_hints(kind)
    return [(each, hints[each.name]) for each in dataclasses.fields(kind) if each.init]


def _as_options(values: Mapping[str, Any]) -> list[str]:
    """`{"a_b": [1, 2]}` as `["--a_b", "1", "2"]`; None, the default of what has it, is left out."""
    found = []
    for name, value in values.items():
        if value is not None:
            texts = value if isinstance(value, list) else [value]
            found += [f"--{name}", *(json.dumps(each) if isinstance(each, dict) else str(each) for each in texts)]
    return found


def _kind(hint: Any) -> str:
    """A word for the type of a value."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [each for each in typing.get_args(hint) if each is not type(None)]
        return _kind(kinds[0])
    if typing.get_origin(hint) is Literal:
        return "|".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is list or hint is list:
        inner = typing.get_args(hint)
        return f"{_kind(inner[0]) if inner else 'TEXT'} ..."
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "NAME"
    return {int: "N", float: "X", bool: "BOOL", dict: "JSON"}.get(hint, "TEXT")


def _help(each: dataclasses.Field, default: Any) -> str:
    """What a field is, and its default, which may be the command's own."""
    text = " ".join(str(each.metadata.get("help", "")).replace("%%", "%").split())  # argparse wants them doubled
    if default is None:
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
    if default is dataclasses.MISSING or default is None:
        return text
    if isinstance(default, enum.Enum):
        default = default.value
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    return f"{text} [{shown}]"
