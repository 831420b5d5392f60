"""What the views return: pictures and pages, which show themselves in notebooks and save themselves to files."""

from __future__ import annotations

import html
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import TopologyConfigError


@dataclass(frozen=True, eq=False)
class Picture:
    """A `matplotlib.figure.Figure` with the text that belongs below it."""

    figure: Any
    caption: str

    def save(self, path: str | Path, dpi: int = 150) -> None:
        """Write it; the path's suffix is the format: png, svg, pdf. dpi: pixels per inch, of png."""
        self.figure.savefig(path, dpi=dpi)

    def _repr_png_(self) -> bytes:
        with io.BytesIO() as file:
            self.figure.savefig(file, format="png", dpi=100)
            return file.getvalue()


@dataclass(frozen=True, eq=False)
class Page:
    """A whole HTML document that loads nothing."""

    html: str

    def save(self, path: str | Path) -> None:
        """Write it, in UTF-8."""
        Path(path).write_text(self.html, encoding="utf-8")

    def _repr_html_(self) -> str:
        # a frame of its own: its styles and scripts reach nothing else in the notebook, nor the notebook's server
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(self.html)}" '
            'style="width: 100%; height: 560px; border: 1px solid #ccc"></iframe>'
        )


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str | Tensor) -> Tensor:
    """int64 `[1, T]`: of a text, with the special tokens that the tokenizer adds; token ids are taken as they are.

    Raises:
        TopologyConfigError: the text has no token.
    """
    if not isinstance(text, str):
        return text
    ids = tokenizer(text, return_tensors="pt", return_attention_mask=False).input_ids.long()
    if not ids.numel():
        raise TopologyConfigError("text must hold at least one token, got none")
    return ids


def words_of(tokenizer: PreTrainedTokenizerBase, input_ids: Tensor) -> list[str]:
    """The text of each token of `[1, T]`; parts of a character that several tokens share are shown as U+FFFD."""
    return [tokenizer.decode([token]) for token in input_ids[0].tolist()]


def one_line(word: str) -> str:
    """A token in one line: line breaks as signs, other control characters as U+FFFD."""
    signs = {"\n": "⏎", "\t": "⇥"}
    return "".join(signs.get(each, each if each.isprintable() else "\ufffd") for each in word)
