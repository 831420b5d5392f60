"""The one schema of results: what is written is read again, and every file in `results/` is of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import plot
from recipes import ablations
from topo_evaluation.results import KEYS, UNITS, append, flat, make_row, origin, read, write

RESULTS = Path(__file__).parents[1] / "results"
FILES = sorted(RESULTS.glob("*.jsonl"))


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    where = origin("a model", "cpu", "abc")
    rows = [
        make_row(where, "quality", {"text": text}, {"perplexity": 2.5}, note)
        for text, note in (("a", "é"), ("b", None))
    ]
    path = tmp_path / "new" / "rows.jsonl"
    write(path, rows)
    append(path, rows[:1])
    assert read(path) == [*rows, rows[0]]
    assert flat(rows[0]) == {"text": "a", "perplexity": 2.5, "note": "é"} and flat(rows[1]).keys() == {
        "text",
        "perplexity",
    }
    assert rows[0]["commit"] == "abc" and rows[0]["machine"]["name"] and rows[0]["versions"]["torch"]
    write(path, rows)
    assert read(path) == rows


def test_a_metric_has_a_unit() -> None:
    with pytest.raises(ValueError, match=r"metrics must be of .*UNITS, got \['beauty'\]"):
        make_row(origin(None, "cpu"), "quality", {}, {"beauty": 1.0})


@pytest.mark.parametrize("line", ["[]", json.dumps({"what": "quality"}), json.dumps(dict.fromkeys([*KEYS, "more"]))])
def test_lines_of_another_schema_are_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1, must be an object of what, command"):
        read(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_files_are_of_the_schema(path: Path) -> None:
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert f"`{path.name}`" in text
    rows = read(path)
    assert rows
    for row in rows:
        assert f"`{row['what']}`" in text
        assert row["metrics"].keys() <= UNITS.keys() and (row["metrics"] or row["note"])
        assert isinstance(row["settings"], dict)


def test_the_readme_lists_no_other_file() -> None:
    named = set(re.findall(r"`(\w+\.jsonl)`", (RESULTS / "README.md").read_text(encoding="utf-8")))
    assert named == {path.name for path in FILES}


def test_tables_are_those_of_the_files() -> None:
    """What `python -m benchmarks.plot` would write is there already."""
    page, readme = ((RESULTS.parent / name).read_text(encoding="utf-8") for name in ("docs/results.md", "README.md"))
    rows = plot.read_rows([RESULTS / "h100.jsonl"])
    assert plot.insert(page, plot.performance(rows, "results/h100.jsonl"), plot.PERFORMANCE) == page
    front = plot.front(rows, read(RESULTS / "smollm2_135m_recipe.jsonl"))
    assert plot.insert(readme, front, plot.FRONT) == readme and len(readme.splitlines()) <= 150


def test_the_ablations_table_is_made_of_the_file() -> None:
    table = ablations.table(read(RESULTS / "smollm2_135m_ablations_mended_4096.jsonl")).splitlines()
    assert len(table) == 2 + 15
    assert "+5.22 % (0.103), copy 0.86" in next(line for line in table if "| default " in line and "+5.2" in line)
