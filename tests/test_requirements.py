"""What pyproject.toml says: the two environments that CI runs in are its floors and newer versions, and wheels are
whole."""

import fnmatch
import re
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


# ---------------------------------------------------------------- wheels

TOOL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
WHERE = [ROOT / folder for folder in TOOL["packages"]["find"]["where"]]
PACKAGES = {  # top packages of a wheel -> their folders
    path.parent.name: path.parent
    for folder in WHERE
    for path in folder.glob("*/__init__.py")
    if any(fnmatch.fnmatchcase(path.parent.name, pattern) for pattern in TOOL["packages"]["find"]["include"])
}


def test_wheels_hold_every_file_of_the_packages() -> None:
    """Setuptools takes Python files by itself, others by a pattern of their package's."""
    assert {"topo_adapter", "topo_cli", "topo_kernels", "topo_evaluation"} == PACKAGES.keys()
    others = {
        path
        for folder in PACKAGES.values()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    taken = set()
    for package, patterns in TOOL["package-data"].items():
        assert package in PACKAGES, f"{package} must be a package of a wheel"
        for pattern in patterns:
            found = set(PACKAGES[package].glob(pattern))
            assert found, f"{pattern} of {package} must be the name of a file"
            taken |= found
    assert {"py.typed", "balls.html", "wikitext2_validation.txt.gz"} <= {path.name for path in others}
    assert others == taken


def test_extras_that_errors_name_are_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    sources = [path.read_text(encoding="utf-8") for folder in PACKAGES.values() for path in folder.rglob("*.py")]
    named = {name for source in sources for name in re.findall(r"topo-adapter\[(\w+)\]", source)}
    assert "viz" in named and named <= extras
