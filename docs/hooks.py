"""What mkdocs does beside its plugins: the notebook's pages in the navigation, and links that leave `docs/`.

On a page `../recipes/sft.py` is right for who reads the repository. The site publishes such a file as `source/...`.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from notebook_index import pages

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)(#[^)\s]*)?(?=\))")
#: GitHub wants a bar in the code of a table's cell escaped, Python-Markdown would show the escape.
_ROW, _CODE = re.compile(r"^\|.*$", re.MULTILINE), re.compile(r"`[^`\n]+`")
_RAW = {".md", ".py", ".yaml", ".yml", ".jsonl", ".toml"}  # shown by browsers if they are text


def on_config(config: Any) -> Any:
    """The notebook's part of the navigation, which mkdocs.yml leaves to this."""
    for entry in config.nav:
        if "Notebook" in entry:
            topics = [
                {topic: [f"notebook/{page.path.name}" for page in found]} for topic, found in pages().items() if found
            ]
            entry["Notebook"] = ["notebook/index.md", *topics]
    return config


def published(target: Path) -> str:
    """Where the site has a file of the repository."""
    name = target.relative_to(ROOT).as_posix()
    return f"source/{name}.txt" if target.suffix in _RAW else f"source/{name}"


def outside(page: Path, link: str) -> Path | None:
    """The file of the repository that a relative link of a page leads to, if it is outside of `docs/`."""
    target = Path(os.path.normpath(page.parent / link))
    if target.is_relative_to(ROOT / "docs") or not target.is_relative_to(ROOT):
        return None
    return target / "README.md" if (target / "README.md").is_file() else target


def on_files(files: Any, config: Any) -> Any:
    """Publish what pages link to; a link to nothing is left for mkdocs to complain of."""
    from mkdocs.structure.files import File

    for page in list(files.documentation_pages()):
        path = Path(page.abs_src_path)
        for link, _ in _LINK.findall(path.read_text(encoding="utf-8")):
            target = outside(path, link)
            if target is not None and target.is_file() and files.get_file_from_path(published(target)) is None:
                files.append(File.generated(config, published(target), abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links that leave `docs/` to what the site publishes; bars in the code of tables."""
    path = Path(page.file.abs_src_path)

    def lead(match: re.Match[str]) -> str:
        target = outside(path, match[1])
        if target is None or not target.is_file():
            return match[0]
        return posixpath.relpath(published(target), posixpath.dirname(page.file.src_uri) or ".")

    markdown = _ROW.sub(lambda row: _CODE.sub(lambda code: code[0].replace(r"\|", "|"), row[0]), markdown)
    return _LINK.sub(lead, markdown)
