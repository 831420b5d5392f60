"""How the modules of `topo_kernels` may import one another, read from their source."""

import ast
import graphlib
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "kernels" / "topo_kernels"


def imports() -> dict[str, list[tuple[str, str]]]:
    """For each module of the package the absolute module and the name of everything it imports, `""` for a module."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in PACKAGE.glob("*.py"):
        names = found[f"topo_kernels.{path.stem}".removesuffix(".__init__")] = []
        for node in ast.walk(ast.parse(path.read_text())):  # those inside functions too
            if isinstance(node, ast.Import):
                names += [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path.name} imports from outside its package"
                module = ".".join(filter(None, ("topo_kernels" if node.level else "", node.module)))
                names += [(module, alias.name) for alias in node.names]
    return found


def test_no_circle() -> None:
    found = imports()
    graph = {
        module: {f"{source}.{name}" if f"{source}.{name}" in found else source for source, name in names}
        for module, names in found.items()
    }
    assert "topo_kernels.primitives" in graph["topo_kernels.attention"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_kernels_stand_alone() -> None:
    """`topo_adapter` imports `topo_kernels`, never the other way round."""
    sources = {source.partition(".")[0] for names in imports().values() for source, _ in names}
    assert "topo_adapter" not in sources and {"topo_kernels", "torch", "triton"} <= sources


def test_private_names_stay_in_their_module() -> None:
    crossing = [
        (module, source, name)
        for module, names in imports().items()
        for source, name in names
        if source.startswith("topo_kernels") and (name.startswith("_") or "._" in source)
    ]
    assert not crossing
