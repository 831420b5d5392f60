"""HTML tables, with which objects show themselves in notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def table(head: Sequence[object], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """A table; whatever the cells hold is escaped. An empty `head` leaves its row out."""
    lines = [f"<caption>{html.escape(caption)}</caption>"] if caption else []
    if head:
        lines.append(f"<thead>{_row('th', head)}</thead>")
    lines += ["<tbody>", *(_row("td", row) for row in rows), "</tbody>"]
    return f"<table>{''.join(lines)}</table>"


def _row(cell: str, values: Sequence[object]) -> str:
    return f"<tr>{''.join(f'<{cell}>{html.escape(str(value))}</{cell}>' for value in values)}</tr>"
