"""Rows of token ids, from whatever a user passes as a data set."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Subset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import TopologyConfigError
from ..measuring.calibration import check_sequences
from .documents import document_tokens, text_files
from .routers import active_configs


def rows_of(
    dataset: Iterable[Any] | str | os.PathLike,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    length: int,
    per_step: int,
    needed: int,
    text_column: str = "text",
) -> tuple[Sequence[Any], bool]:
    """Rows with `input_ids`, and whether they are windows cut from text here, not the data set's own.

    Args:
        dataset, tokenizer: as `distill`'s. model: whose tokenizer is loaded where none is given.
        length: tokens of a window. per_step: rows of one step, the fewest to train on. needed: the most that are read.
        text_column: of mappings with text.
    """
    if isinstance(dataset, (str, os.PathLike)):
        dataset = text_files(dataset)
    if isinstance(dataset, Mapping):
        raise TopologyConfigError(
            f"dataset must be one data set, got a {type(dataset).__name__} of {sorted(map(str, dataset))}; choose a "
            "split: dataset['train']"
        )
    if isinstance(dataset, Tensor):
        if dataset.ndim != 2 or dataset.dtype != torch.int64:
            raise TopologyConfigError(
                f"dataset must be int64 [rows, T] of token ids if it is a tensor, got {dataset.dtype} "
                f"{list(dataset.shape)}"
            )
        return [{"input_ids": row} for row in dataset], False
    rows = iter(dataset)
    try:
        first = next(rows)
    except StopIteration:
        raise TopologyConfigError("dataset must have rows, got none") from None
    if isinstance(first, Mapping) and "input_ids" in first:
        if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
            return dataset, False  # type: ignore[return-value]
        return [first, *itertools.islice(rows, needed - 1)], False
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    documents = document_tokens(itertools.chain([first], rows), tokenizer, text_column)
    windows = windows_of(documents, text_beginning(tokenizer), length, needed)
    if len(windows) < per_step:
        raise TopologyConfigError(
            f"dataset must have text for {per_step} windows of {length} tokens (one step), got "
            f"{len(windows)}; add text or lower max_length"
        )
    return [{"input_ids": window} for window in windows], True


def text_beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer puts before a text: its beginning-of-sequence token, or nothing."""
    return [token for token in tokenizer("").input_ids[:1] if token == tokenizer.bos_token_id]


def text_windows(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> list[Tensor]:
    """Up to `count` windows of `length` tokens, int64, cut from the texts one after the other.

    Each text ends with the tokenizer's end-of-text token, if it has one; empty texts are passed over. Each window
    begins with the token that the tokenizer puts before a text, if it does: models that have always seen one read badly
    without it (docs/notebook/2026-11-26-gemma-windows-without-a-beginning.md). Reads no more texts than it needs; a
    last part shorter than a window is left out.
    """
    return windows_of(document_tokens(texts, tokenizer), text_beginning(tokenizer), length, count)


def windows_of(rows: Iterable[list[int]], begin: list[int], length: int, count: int) -> list[Tensor]:
    """Up to `count` windows of `length` tokens, int64, cut from the rows one after the other; each begins with `begin`.

    Reads no more rows than it needs; a last part shorter than a window is left out.
    """
    windows: list[Tensor] = []
    rest: list[int] = []
    for row in rows:
        rest += row
        start = 0
        while len(windows) < count:
            missing = [] if rest[start : start + 1] == begin else begin
            stop = start + length - len(missing)
            if stop > len(rest):
                break
            windows.append(torch.tensor(missing + rest[start:stop]))
            start = stop
        rest = rest[start:]
        if len(windows) == count:
            break
    return windows


#: Columns that hold a row's token ids, in the order of its text: those of Trainer, and of TRL's trainers.
_TOKENS = ("input_ids", "prompt_ids", "chosen_ids", "completion_ids")
_WHOLE = ("input_ids", "chosen_ids", "completion_ids")  # of rows that are no prompts to complete
_TRIED = 8  # rows without tokens, after which no more are read


def windows_of_training_data(
    dataset: Any,
    model: PreTrainedModel,
    tokenizer: Any,
    length: int,
    count: int,
    rows: int | None = None,
    row_length: int | None = None,
) -> Tensor | None:
    """int64 `[up to count, T]`: a trainer's data as unpadded windows of one length; None without tokens.

    `T` is `length`, or the model's positions, `rows` of the longest rows, or all tokens there are, if that is less.
    Short rows follow each other in a window, as packed documents do in pretraining.

    Args:
        dataset: its rows are mappings with token ids (`_TOKENS`), or with a string `text` or `prompt`.
        tokenizer: of strings.
        rows: of a forward of the trainer's, which a window is not to be larger than; None, and where the rows are
            prompts that it completes: it may be.
        row_length: tokens that the trainer cuts rows to; None: it does not.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = min(length, positions or length)
    first = getattr(model.config.get_text_config(), "bos_token_id", None)

    def tokens(row: Any) -> list[int]:
        if not isinstance(row, Mapping):
            return []
        parts = [torch.as_tensor(row[name]) for name in _TOKENS if row.get(name) is not None]
        if row.get("input_ids") is not None and row.get("attention_mask") is not None:
            parts = [parts[0][torch.as_tensor(row["attention_mask"]).bool()]]
        if parts:
            return torch.cat(parts).tolist()
        text = row.get("text", row.get("prompt"))
        return tokenizer(text, verbose=False).input_ids if isinstance(text, str) and tokenizer is not None else []

    found, total = [], 0
    for row in dataset:
        found.append(tokens(row))
        total += len(found[-1])
        if total >= length * count or (not total and len(found) == _TRIED):
            break
    if not total:
        return None
    begin = [first] if next(row for row in found if row)[0] == first else []
    whole = any(name in row for name in _WHOLE)
    longest = max(map(len, found))
    largest = rows * min(longest, row_length or longest) if rows is not None and whole else total
    return torch.stack(windows_of(found, begin, min(length, total, largest), count))


def rows_to_calibrate_on(rows: Sequence[Any], adapter: PeftModel, count: int, check_padding: bool) -> Tensor:
    """The first rows, `[B, T]`, refused before training if they cannot be calibrated on."""
    chosen = [torch.as_tensor(rows[index]["input_ids"]) for index in range(min(count, len(rows)))]
    lengths = sorted({len(ids) for ids in chosen})
    if len(lengths) > 1:
        raise TopologyConfigError(
            f"dataset must have rows of one length, got {lengths}; cut them into windows, or pass their text"
        )
    sequences = torch.stack(chosen)
    for config in active_configs(adapter):
        try:
            check_sequences(sequences, config, adapter.get_base_model(), check_padding)
        except TopologyConfigError as error:
            raise TopologyConfigError(f"dataset must have rows that can be calibrated on: {error}") from None
    return sequences


def rows_to_train_on(rows: Sequence[Any], calibrated: int) -> Sequence[Any]:
    """The rows after the first, which the dial is calibrated on; all of them where those are more than a tenth."""
    if calibrated > len(rows) // 10:
        return rows
    rest = range(calibrated, len(rows))
    # a datasets.Dataset stays one: the trainer drops its unused columns
    return rows.select(rest) if hasattr(rows, "select") else Subset(rows, rest)  # type: ignore[arg-type]
