"""What `distill` reads of a data set's rows: text, chats, prompts with completions, the files of a directory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peft_helpers import tiny
from test_recipe import arguments, assert_trained, base, config, tokenizer
from transformers import PreTrainedTokenizerFast

from topo_adapter import TopologyConfigError, distill
from topo_adapter.training.data import rows_of
from topo_adapter.training.documents import document_tokens, text_files

datasets = pytest.importorskip("datasets")  # of the train extra

#: 'user w2 w3 <end>' for each message; refuses others than users and assistants, as real templates do.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ 'w10 ' if m.role == 'user' else 'w20 ' }}{{ m.content }} <end> {% endfor %}"
)


def chatting() -> PreTrainedTokenizerFast:
    made = tokenizer()
    made.chat_template = TEMPLATE
    return made


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED, ANSWERED = said("user", "w2 w3"), said("assistant", "w4")
CHAT = [10, 2, 3, 1, 20, 4, 1]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("w2 w3", [2, 3, 1]),
        ({"text": "w2 w3", "messages": [ASKED]}, [2, 3, 1]),
        ({"messages": [ASKED, ANSWERED]}, CHAT),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, CHAT),
        ({"prompt": "w2 w3", "completion": " w4"}, [2, 3, 4, 1]),
    ],
)
def test_kinds_of_rows(row: Any, expected: list[int]) -> None:
    assert list(document_tokens([row, "", row], chatting())) == [expected, expected]


def test_the_column_of_text() -> None:
    assert list(document_tokens([{"body": "w2", "text": 5}], tokenizer(), "body")) == [[2, 1]]
    with pytest.raises(TopologyConfigError, match="'boddy'"):
        list(document_tokens([{"body": "w2", "messages": [ASKED]}], chatting(), "boddy"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (5, r"rows that are strings, .* got int in row 1"),
        ({"prompt": "a", "answer": "b"}, r"'text', 'messages', .* columns \['answer', 'prompt'\] in row 1"),
        ({"text": None}, "a text in every row, got NoneType in row 1"),
        ({"prompt": "w2", "completion": [ANSWERED]}, "one kind, .* got str and list in row 1"),
        ({"prompt": 2, "completion": 3}, "one kind, .* got int and int in row 1"),
        ({"messages": [said("system", "w2")]}, "the chat template takes, got in row 1: no system role"),
        ({"messages": 7}, "messages that are lists, got int in row 1"),
        ({"messages": '[{"role": "user", "content": "w2"}]'}, "messages that are lists, got str in row 1"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "w2"}]}]},
            "a content of text, got in row 1",
        ),
        ({"messages": [[ASKED, ANSWERED]]}, "a content of text, got in row 1"),
    ],
)
def test_rows_that_hold_none(row: Any, message: str) -> None:
    with pytest.raises(TopologyConfigError, match=message):
        list(document_tokens(["w2", row], chatting()))


def test_chats_need_a_template() -> None:
    with pytest.raises(TopologyConfigError, match=r"messages in row 0, .* a chat_template .* processing_class"):
        list(document_tokens([{"messages": [ASKED]}], tokenizer()))


def test_a_first_row_of_none_is_a_row() -> None:
    with pytest.raises(TopologyConfigError, match="got NoneType in row 0"):
        rows_of([None, "w2"], tiny(), tokenizer(), length=4, per_step=1, needed=1)


def test_a_directory_is_read_file_by_file(tmp_path: Path) -> None:
    for name, text in (("b.md", "w4"), ("a/c.txt", "w2 w3"), (".git/d", "w9"), ("a/.e.txt", "w9")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(text_files(tmp_path)) == ["w2 w3", "w4"] and list(text_files(str(tmp_path / "b.md"))) == ["w4"]
    (tmp_path / "z.bin").write_bytes(b"\xff\xfe\x00")
    found = text_files(tmp_path)
    assert next(found) == "w2 w3" and next(found) == "w4"
    with pytest.raises(TopologyConfigError, match=r"UTF-8 text files, got .*z\.bin"):
        next(found)


@pytest.mark.parametrize("dataset", ["org/name", "w2 w3 " * 1000, "a\0b", "", b"w2"])
def test_what_is_no_place(dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # an empty directory, which "" is
    with pytest.raises(TopologyConfigError, match="dataset must"):
        rows_of(dataset, tiny(), tokenizer(), length=4, per_step=1, needed=1)


# ---------------------------------------------------------------- streams


class Stream:
    """Streamed rows of `datasets`, each of which is counted when it is read."""

    def __init__(self, rows: Iterable[Any], more: int = 10**6) -> None:
        self.read: list[int] = []
        self.rows, self.more = list(rows), more

    def __call__(self, name: str = "") -> Any:
        def generate(name: str) -> Iterator[Any]:
            for number in range(self.more):
                self.read.append(number)
                yield self.rows[number % len(self.rows)]

        return datasets.IterableDataset.from_generator(generate, gen_kwargs={"name": name})


WORDS = {"text": "w2 w3 w4"}  # four tokens with the end's


def windows_from(stream: Any, needed: int = 3, length: int = 4, **settings: Any) -> list[list[int]]:
    rows, cut = rows_of(stream, tiny(), chatting(), length=length, per_step=1, needed=needed, **settings)
    assert len(rows) == needed
    return [row["input_ids"].tolist() if cut else list(row["input_ids"]) for row in rows]


@pytest.mark.parametrize(
    ("row", "window"),
    [
        (WORDS, [2, 3, 4, 1]),
        ({"messages": [said("user", "w2 w3")]}, [10, 2, 3, 1]),
        ({"prompt": "w2", "completion": " w3 w4"}, [2, 3, 4, 1]),
        ({"input_ids": [2, 3, 4, 1]}, [2, 3, 4, 1]),
    ],
)
def test_a_stream_is_read_as_far_as_needed(row: Any, window: list[int]) -> None:
    stream = Stream([row])
    assert windows_from(stream()) == [window] * 3 and stream.read == [0, 1, 2]


def test_streams_that_are_shuffled_interleaved_and_mapped() -> None:
    stream = Stream([WORDS])
    assert windows_from(stream().shuffle(seed=0, buffer_size=5)) == [[2, 3, 4, 1]] * 3
    assert len(stream.read) <= 5 + 3, "what its buffer holds, and what was taken"
    one, other = Stream([WORDS]), Stream([{"text": "w5 w6 w7"}])
    mixed = datasets.interleave_datasets([one("one"), other("other")])
    looked_at = len(one.read), len(other.read)  # for their columns
    assert windows_from(mixed, needed=4) == [[2, 3, 4, 1], [5, 6, 7, 1]] * 2
    assert len(one.read) <= looked_at[0] + 4 and len(other.read) <= looked_at[1] + 4
    body = Stream([{"body": "w9 w9 w9"}])
    mapped = body().filter(lambda row: row["body"]).map(lambda row: {"body": row["body"].replace("9", "8")})
    assert windows_from(mapped, text_column="body") == [[8, 8, 8, 1]] * 3 and len(body.read) <= 4


def test_a_stream_that_ends_is_taken_whole() -> None:
    stream = Stream([WORDS], more=2)
    found, _ = rows_of(stream(), tiny(), tokenizer(), length=4, per_step=1, needed=9)
    assert len(found) == 2
    with pytest.raises(TopologyConfigError, match=r"windows of 9 tokens \(one step\), got 0"):
        rows_of(stream(), tiny(), tokenizer(), length=9, per_step=1, needed=9)
    with pytest.raises(TopologyConfigError, match="must have rows, got none"):
        rows_of(Stream([WORDS], more=0)(), tiny(), tokenizer(), length=4, per_step=1, needed=9)


@pytest.mark.parametrize(
    ("row", "message"),
    [({"text": None}, "got NoneType in row 2"), ({"content": "w2"}, r"columns \['content'\] in row 2")],
)
def test_a_streams_bad_row_is_named_once_it_is_needed(row: Any, message: str) -> None:
    stream = Stream([WORDS, WORDS, row], more=3)
    assert windows_from(stream(), needed=2) == [[2, 3, 4, 1]] * 2
    with pytest.raises(TopologyConfigError, match=message):
        windows_from(stream())


def test_distill_trains_on_chats(tmp_path: Path) -> None:
    rows = [{"messages": [said("user", "w2 w3 w5"), said("assistant", f"w{n} w4")]} for n in range(6, 40)]
    args = arguments(tmp_path, max_length=16)
    assert_trained(distill(base(), rows, config(), args, processing_class=chatting()), 16)
