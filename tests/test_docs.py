"""The site: what `mkdocs build --strict` cannot see of its pages, and links of the repository's other pages."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import topo_adapter
import topo_kernels

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OTHERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + [
    ROOT / folder / "README.md"
    for folder in ("kernels", "results", "examples/smollm2-135m-topology", "examples/qwen2.5-coder-0.5b-topology")
]


def script(name: str) -> ModuleType:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


notebook = script("notebook_index")
NOTES = sorted(set(notebook.FOLDER.glob("*.md")) - {notebook.INDEX})


def leaves(nav: Any) -> Iterator[str]:
    """The pages of a navigation."""
    if isinstance(nav, str):
        yield nav
    for each in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from leaves(each)


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert {"Notebook": []} in nav, "hooks.py fills it"
    named = list(leaves(nav))
    assert sorted(named) == sorted(
        path.relative_to(DOCS).as_posix() for path in PAGES if path.parent != notebook.FOLDER
    )
    assert sorted(page.path for found in notebook.pages().values() for page in found) == NOTES


def test_the_index_of_the_notebook_is_of_its_pages() -> None:
    assert notebook.INDEX.read_text(encoding="utf-8") == notebook.index(), "run python docs/notebook_index.py"
    assert len(NOTES) >= 40


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "- **Machine:**",
            "- **Engine:**",
            r"must have a title, the fields Date, .*got the fields Date, Topic, .*Engine",
        ),
        ("- **Topic:** ", "- **Topic:** Un", "Topic must be one of"),
        ("- **Date:** 2026", "- **Date:** 2025", "Date must be 2026-"),
        ("## Detail", "## Details", "and '## Detail'"),
    ],
)
def test_a_page_without_its_fields_is_refused(before: str, after: str, message: str, tmp_path: Path) -> None:
    text = NOTES[0].read_text(encoding="utf-8")
    assert before in text
    page = tmp_path / NOTES[0].name
    page.write_text(text, encoding="utf-8")
    assert notebook.read(page).fields.keys() >= {"Question", "Verdict"}
    page.write_text(text.replace(before, after), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        notebook.read(page)


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(path: Path) -> set[str]:
    """What headings of a page are called in links, on the site and on GitHub alike for what is linked here."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


def broken(path: Path, text: str) -> list[str]:
    """Relative links of a page that lead nowhere."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("path", PAGES + OTHERS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    assert not broken(path, path.read_text(encoding="utf-8"))


def test_broken_links_are_found() -> None:
    text = "[a](nowhere.md), [b](results.md#speed), [c](results.md#beauty), `[d](code.md)`"
    assert broken(DOCS / "index.md", text) == ["nowhere.md", "results.md#beauty"]


def test_figures_are_what_is_drawn(tmp_path: Path) -> None:
    """But for the last digits of coordinates, and names made of them."""
    figures = script("figures")
    figures.draw(tmp_path)
    assert len(figures.FIGURES) == 4
    number = re.compile(r"-?\d+\.\d+|\d+(?=[ \"])")
    for name in figures.FIGURES:
        old, new = (
            re.sub(r"[mp][0-9a-f]{10}", "id", (folder / f"{name}.svg").read_text(encoding="utf-8"))
            for folder in (figures.FOLDER, tmp_path)
        )
        assert number.sub("", old) == number.sub("", new), f"run python docs/figures.py: {name}"
        pairs = zip(number.findall(old), number.findall(new), strict=True)
        assert all(abs(float(a) - float(b)) < 0.05 for a, b in pairs), f"run python docs/figures.py: {name}"


def python_of(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_python_on_the_pages_imports_what_there_is() -> None:
    checked = 0
    for path in PAGES:
        for code in python_of(path):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("topo_"):
                    module = importlib.import_module(node.module or "")
                    missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                    assert not missing, f"{path.name}: {node.module} has no {missing}"
                    checked += 1
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "topo_adapter"
                ):
                    assert hasattr(topo_adapter, node.attr), f"{path.name}: topo_adapter.{node.attr}"
                    checked += 1
    assert checked > 10


def test_quickstart_has_the_lines_that_are_run() -> None:
    """tests/test_shipped_adapter.py runs those of README."""
    readme = python_of(ROOT / "README.md")[0]
    assert "merge_adapter()" in readme and readme in python_of(DOCS / "guide" / "quickstart.md")


def test_the_reference_names_all_that_is_exported() -> None:
    named = set(re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE))
    for package in (topo_adapter, topo_kernels):
        assert {f"{package.__name__}.{name}" for name in package.__all__} <= named
