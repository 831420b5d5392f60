"""Imports go one way, read from the sources: recipes, topo_cli, benchmarks; topo_evaluation; topo_adapter; kernels."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FLOORS = {  # package -> its folder, and the packages of this repository that it may import
    "topo_kernels": (REPOSITORY / "kernels" / "topo_kernels", set()),
    "topo_adapter": (REPOSITORY / "topo_adapter", {"topo_kernels"}),
    "topo_evaluation": (REPOSITORY / "evaluation" / "topo_evaluation", {"topo_adapter"}),
    "topo_cli": (REPOSITORY / "topo_cli", {"topo_evaluation", "topo_adapter"}),
    "benchmarks": (REPOSITORY / "benchmarks", {"topo_evaluation", "topo_adapter", "topo_kernels"}),
    "recipes": (REPOSITORY / "recipes", {"topo_evaluation", "topo_adapter"}),
}
RECIPES = {path.stem for path in FLOORS["recipes"][0].glob("*.py")}


def module_name(path: Path, package: str) -> str:
    """`topo_adapter.layer` of its file."""
    parts = path.relative_to(FLOORS[package][0]).with_suffix("").parts
    return ".".join([package, *(part for part in parts if part != "__init__")])


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """What a module imports anywhere, in functions too, absolute; `from a import b` counts as a and as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package and node.level == 1 else is_package - node.level]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def modules(package: str) -> dict[str, set[str]]:
    """Module -> what it imports."""
    paths = sorted(FLOORS[package][0].rglob("*.py"))
    names = {path: module_name(path, package) for path in paths}
    return {
        name: imports(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
        for path, name in names.items()
    }


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a circle; a package's `__init__` is no part of it."""
    inner = {name for name in graph if "." in name}
    try:
        TopologicalSorter({name: (graph[name] & inner) - {name} for name in inner}).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return None


def test_relative_imports_are_resolved() -> None:
    source = "import torch.nn\nfrom . import layer\nfrom .tree import lca\ndef f():\n    from ..kl import x"
    found = imports(source, "topo_adapter.core.plan")
    assert found == {
        *("torch.nn", "topo_adapter.core", "topo_adapter.core.layer", "topo_adapter.core.tree"),
        *("topo_adapter.core.tree.lca", "topo_adapter.kl", "topo_adapter.kl.x"),
    }
    inside = imports("from .tree import lca\nfrom ..kl import x", "topo_adapter.core", is_package=True)
    assert inside == {"topo_adapter.core.tree", "topo_adapter.core.tree.lca", "topo_adapter.kl", "topo_adapter.kl.x"}


def test_circles_are_found() -> None:
    assert circle({"p.a": {"p.b", "torch"}, "p.b": {"p"}, "p": {"p.a"}}) is None
    assert circle({"p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": {"p.a"}}) is not None


@pytest.mark.parametrize("package", FLOORS)
def test_imports_go_down(package: str) -> None:
    allowed = FLOORS[package][1] | {package}
    found = modules(package)
    assert found
    for module, imported in found.items():
        roots = {name.split(".")[0] for name in imported}
        assert not (roots & FLOORS.keys()) - allowed, f"{module} imports {sorted((roots & FLOORS.keys()) - allowed)}"
        if package != "recipes":
            assert not roots & RECIPES, f"{module} imports a recipe from its folder: {sorted(roots & RECIPES)}"


def test_topo_adapter_imports_what_stands_before_it() -> None:
    """CONTRIBUTING's list of floors, module by module; types are no imports."""
    lines = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8").split("The floors of topo_adapter")[1]
    floors = [line.split() for line in lines.split("\n\n")[1].splitlines()]
    listed = [f"{folder.strip('./')}.{name}".strip(".") for folder, *names in floors for name in names]
    root = FLOORS["topo_adapter"][0]
    paths = {module_name(path, "topo_adapter").partition(".")[2]: path for path in root.rglob("[a-z]*.py")}
    assert sorted(listed) == sorted(paths), "every module has its floor"
    for place, name in enumerate(listed):
        below = {f"topo_adapter.{module}" for module in listed[:place]}
        found = imports(ast.unparse(runtime(paths[name].read_text(encoding="utf-8"))), f"topo_adapter.{name}")
        modules = {f"topo_adapter.{module}" for module in listed} & found
        assert modules <= below, f"{name} imports {sorted(modules - below)}"


def test_folders_of_topo_adapter_gather_nothing() -> None:
    """What a folder offers is imported from its modules: a list of names in its `__init__` would load them all."""
    for path in FLOORS["topo_adapter"][0].glob("*/__init__.py"):
        assert not imports(path.read_text(encoding="utf-8"), path.parent.name, is_package=True), path


def runtime(source: str) -> ast.Module:
    """The module without its `if TYPE_CHECKING:` blocks."""
    module = ast.parse(source)
    module.body = [
        node
        for node in module.body
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
    ]
    return module


def test_a_recipe_stands_alone() -> None:
    for module, imported in modules("recipes").items():
        roots = {name.split(".")[0] for name in imported}
        assert not roots & ({"recipes"} | RECIPES), f"{module} imports another recipe"


@pytest.mark.parametrize("package", ["topo_evaluation", "topo_cli", "benchmarks"])
def test_no_circles(package: str) -> None:
    assert circle(modules(package)) is None
