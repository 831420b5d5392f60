"""The two environments that CI runs in are what pyproject.toml allows: its floors, and newer versions."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
NOT_TESTED_WITH = {"mypy", "ruff", "mkdocs-material", "mkdocstrings"}  # linters, and what builds the site


def allowed() -> dict[str, Requirement]:
    """What pyproject.toml requires, extras included, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return {r.name: r for r in (Requirement(line) for lines in lists for line in lines)}


def pins(name: str) -> dict[str, Version]:
    """The exact pins of a requirements file."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    exact = [Requirement(line) for line in lines if "==" in line]
    return {r.name: Version(str(r.specifier).removeprefix("==")) for r in exact}


def test_the_oldest_environment_is_the_floors() -> None:
    floors = {}
    for name, requirement in allowed().items():
        (floor,) = requirement.specifier  # a floor and nothing else
        assert floor.operator == ">=", f"{requirement} must be a floor, like {name}>=1.0"
        floors[name] = Version(floor.version)
    assert floors.keys() >= NOT_TESTED_WITH
    assert pins("requirements-oldest.txt") == {name: floors[name] for name in floors.keys() - NOT_TESTED_WITH}


def test_the_newest_environment_is_allowed() -> None:
    newest, oldest = pins("requirements.txt"), pins("requirements-oldest.txt")
    required = allowed()
    # torch for CUDA brings its own triton, so the Makefile installs it where it is missing
    assert newest.keys() == required.keys() - {"triton"}
    assert all(version in required[name].specifier for name, version in newest.items())
    assert newest["transformers"] > oldest["transformers"], "both environments run the same transformers"
