"""Token ids of a data set's documents: text, chats, prompts with completions, and the text files of a directory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import TopologyConfigError

_MESSAGES, _PROMPT, _COMPLETION = "messages", "prompt", "completion"  # of TRL's data sets


def text_files(path: str | os.PathLike) -> Iterator[str]:
    """The text of a file, or of all files in a directory and those below it, in the order of their names.

    Hidden files and folders are passed over.

    Raises:
        TopologyConfigError: there is no such place, it holds no file, or a file is not UTF-8.
    """
    place = Path(path)
    try:
        inside = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
        files = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(place).parts)]
        found = bool(files) and files[0].is_file()
    except OSError:  # a text is no path
        found = False
    if not found:
        shown = repr(path) if len(repr(path)) <= 60 else f"{repr(path)[:57]}..."
        raise TopologyConfigError(
            "dataset must be a datasets.Dataset, a list of texts, or the path of a text file or of a directory of "
            f"text files, got {shown}; pass [text] for a text, datasets.load_dataset(name, split='train') for one of "
            "the hub"
        )

    def texts() -> Iterator[str]:
        for file in files:
            try:
                yield file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise TopologyConfigError(f"dataset must be of UTF-8 text files, got {file}: {error}") from None

    return texts()


def document_tokens(
    rows: Iterable[Any], tokenizer: PreTrainedTokenizerBase, text_column: str = "text"
) -> Iterator[list[int]]:
    """Token ids of each row's document, whole; empty texts are passed over.

    A text, and a prompt with its completion, ends with the tokenizer's end-of-text token, if there is one; a chat ends
    as its template ends it.

    Args:
        rows: strings, or mappings with a text in `text_column`; where that is 'text', also with `messages`, or with
            `prompt` and `completion` (strings or messages), the first of these that a row has.

    Raises:
        TopologyConfigError: with the number of the row, from 0, where it holds none of these or something else in
            their place; chats without a chat template.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for number, row in enumerate(rows):
        content = _content(row, number, text_column)
        if isinstance(content, str):
            if content.strip():
                yield tokenizer(content, verbose=False).input_ids + end
        else:
            yield _chat(content, number, tokenizer)


def _content(row: Any, number: int, text_column: str) -> Any:
    """The text of a row, or its messages."""
    if isinstance(row, str):
        return row
    if isinstance(row, Mapping):
        if text_column in row:
            if isinstance(row[text_column], str):
                return row[text_column]
            raise TopologyConfigError(
                f"dataset must have a text in every row, got {type(row[text_column]).__name__} in row {number}; filter "
                "such rows out"
            )
        if _MESSAGES in row and text_column == "text":
            if isinstance(row[_MESSAGES], list):
                return row[_MESSAGES]
            raise TopologyConfigError(
                f"dataset must have messages that are lists, got {type(row[_MESSAGES]).__name__} in row {number}"
            )
        if _PROMPT in row and _COMPLETION in row and text_column == "text":
            prompt, completion = row[_PROMPT], row[_COMPLETION]
            if type(prompt) is type(completion) and isinstance(prompt, (str, list)):
                return prompt + completion
            raise TopologyConfigError(
                f"dataset must have prompt and completion of one kind, strings or messages, got "
                f"{type(prompt).__name__} and {type(completion).__name__} in row {number}"
            )
    columns = f"the columns {sorted(row)}" if isinstance(row, Mapping) else type(row).__name__
    raise TopologyConfigError(
        f"dataset must have rows that are strings, or mappings with 'input_ids', {text_column!r}, 'messages', or "
        f"'prompt' and 'completion', got {columns} in row {number}; text_column says which column holds text"
    )


def _chat(messages: Any, number: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not tokenizer.chat_template:
        raise TopologyConfigError(
            f"dataset has messages in row {number}, and the tokenizer must have a chat_template for them, got none: "
            "pass the tokenizer of a chat model as processing_class, or rows of text"
        )
    for message in messages:
        said = isinstance(message, Mapping) and (isinstance(message.get("content"), str) or message.get("tool_calls"))
        if not said:
            raise TopologyConfigError(
                f"dataset must have messages that are mappings with a role and a content of text, got in row {number}: "
                f"{str(message)[:60]}"
            )
    try:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
    except Exception as error:  # jinja's, of a template's own checks, and whatever a row of another shape raises
        raise TopologyConfigError(
            f"dataset must have messages that the chat template takes, got in row {number}: {error}"
        ) from error
