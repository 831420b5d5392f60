"""The notebook's index, by topic: `python docs/notebook_index.py` writes it from the fields of the pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "notebook"
INDEX = FOLDER / "index.md"
BEGIN, END = "<!-- pages:begin -->", "<!-- pages:end -->"
FIELDS = ("Date", "Topic", "Question", "Command", "Machine", "Verdict")
OPTIONAL = ("Negative",)
#: In the order of the index.
TOPICS = (
    "Quality of the recipe",
    "Calibration and the density dial",
    "Training: objectives, prices, routers",
    "Tasks: SFT, LoRA beside",
    "Gemma 3 270M",
    "Speed on a GPU",
    "Speed on a CPU",
    "Exactness and safety",
    "Runs of the test suites",
)


@dataclass(frozen=True)
class Page:
    """A page of the notebook: its path, its title and its fields by name."""

    path: Path
    title: str
    fields: dict[str, str]


def read(path: Path) -> Page:
    """A page as it is written: a title, the fields as a list, `## Detail`.

    Raises:
        ValueError: a field is missing, empty, unknown or out of order; names the page and what it needs.
    """
    head, detail, _ = path.read_text(encoding="utf-8").partition("\n## Detail\n")
    title = re.match(r"# (.+)\n\n", head)
    found = re.findall(r"^- \*\*(\w+):\*\* (.+)$", head, re.MULTILINE)
    names = tuple(name for name, _ in found)
    if not (title and detail) or names not in (FIELDS, FIELDS + OPTIONAL):
        wanted = f"a title, the fields {', '.join(FIELDS)} and, where so, {OPTIONAL[0]}, and '## Detail'"
        raise ValueError(f"{path} must have {wanted}, got the fields {', '.join(names) or 'none'}")
    fields = dict(found)
    if fields["Topic"] not in TOPICS:
        raise ValueError(f"{path}: Topic must be one of {', '.join(TOPICS)}, got {fields['Topic']!r}")
    if not re.fullmatch(rf"{re.escape(path.name[:10])}( \(\d\))?", fields["Date"]):
        raise ValueError(
            f"{path}: Date must be {path.name[:10]}, as its name begins, or {path.name[:10]} (2) for what "
            f"was measured later that day, got {fields['Date']}"
        )
    return Page(path, title[1], fields)


def pages() -> dict[str, list[Page]]:
    """Topic -> its pages, newest first."""
    found = [read(path) for path in sorted(FOLDER.glob("*.md"), reverse=True) if path != INDEX]
    found.sort(key=lambda page: page.fields["Date"], reverse=True)
    return {topic: [page for page in found if page.fields["Topic"] == topic] for topic in TOPICS}


def index() -> str:
    """The text of the index, with tables of the pages as they are now."""
    lines = []
    for topic, of_topic in pages().items():
        lines += [f"## {topic}", "", "| date | page | verdict | negative |", "|---|---|---|---|"]
        for page in of_topic:
            cells = (
                page.fields["Date"].replace("-", "\u2011").replace(" ", "\u00a0"),  # one line
                f"[{page.title}]({page.path.name})",
                page.fields["Verdict"],
                f"**negative:** {page.fields['Negative']}" if "Negative" in page.fields else "",
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    before, _, rest = INDEX.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    INDEX.write_text(index(), encoding="utf-8")
