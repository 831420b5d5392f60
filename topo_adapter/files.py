"""Files of an adapter: found where PEFT finds them, checked before anything is made of them, replaced whole.

Nothing here knows a model. What a file says is read as data: JSON once per key, tensors from safetensors alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from packaging.version import InvalidVersion, Version
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import AdapterFileError

#: What a file may take, in bytes. A calibration of 128 layers with 128 heads at 14 depths has less than 5 MB.
MAX_CONFIG, MAX_HEADER = 16_000_000, 4_000_000
_MAX_FIELDS = 200
#: PEFT's name of this kind of adapter.
PEFT_TYPE = "TOPOLOGY"
#: What PEFT puts before the names of an adapter's tensors.
WRAPPER = "base_model.model."
_ROUTER = re.compile(r"(.+)\.topo_adapter\.topo_routers\.([a-z]+\.[a-z]+)")
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
#: Of a merged model being saved: what is not whole yet, and what is and has to be put in its place.
_SAVING, _SAVED = ".topo_adapter_saving", ".topo_adapter_saved"
_WEIGHTS_OF_A_BASE = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


class Entry(NamedTuple):
    """One tensor of a header. dtype: safetensors' name of it."""

    dtype: str
    shape: tuple[int, ...]


class Tree(NamedTuple):
    """The settings of a config that say what its router tensors are."""

    arity: int
    depth: int
    router_dim: int | None
    tie_query_key: bool
    route_per: str
    router_input: str


def find(model_id: str | os.PathLike, name: str, subfolder: str | None = None, **hub: Any) -> Path | None:
    """The file that PEFT would read: of a directory that holds an adapter_config.json, else of the hub (downloaded).

    Args:
        hub: of `huggingface_hub.hf_hub_download`.
    """
    folder = Path(model_id, subfolder or "")
    if folder.is_dir():
        return folder / name if os.path.lexists(folder / name) else None
    try:
        return Path(hf_hub_download(str(model_id), name, subfolder=subfolder, **hub))
    except EntryNotFoundError:
        return None


# ---------------------------------------------------------------- reading


def read_fields(path: str | os.PathLike) -> dict[str, Any]:
    """The fields of an adapter_config.json. Warns if a newer PEFT wrote it.

    Raises:
        AdapterFileError: it is no regular file, larger than any config, not one JSON object that names each key once,
            of another kind of adapter, or has a pattern where names are needed.
    """
    with _opened(path) as (file, size):
        if size > MAX_CONFIG:
            raise AdapterFileError(f"{path} must have at most {MAX_CONFIG:,} bytes, got {size:,}")
        fields = _object(file.read(MAX_CONFIG + 1), str(path))
    if len(fields) > _MAX_FIELDS or fields.keys() & {"self", "cls"}:
        raise AdapterFileError(f"{path} must have the fields of a config, at most {_MAX_FIELDS}, got {len(fields):,}")
    if (kind := fields.get("peft_type", PEFT_TYPE)) != PEFT_TYPE:  # PEFT says that it is missing
        raise AdapterFileError(f"peft_type of {path} must be {PEFT_TYPE!r}, got {_short(kind)}; load it with PEFT")
    for name in ("target_modules", "exclude_modules"):
        if isinstance(names := fields.get(name), str):
            raise AdapterFileError(
                f"{name} of {path} must be a list of names, got the pattern {_short(names)}: patterns from files are "
                "not run, they can take for ever. Write the names of the attention modules, or their last parts."
            )
    version = str(fields.get("peft_version"))[:100]
    with contextlib.suppress(InvalidVersion):
        if Version(version.partition("@")[0]).release[:2] > Version(peft.__version__).release[:2]:
            warnings.warn(
                f"{path} was saved with PEFT version {version}, newer than {peft.__version__}, which is installed; "
                "what that version added is left out. Upgrade PEFT if the adapter needs it.",
                stacklevel=2,
            )
    return fields


def read_header(path: str | os.PathLike) -> dict[str, Entry]:
    """Names, dtypes and shapes of the tensors of a safetensors file, without its wrapper's name before them.

    Raises:
        AdapterFileError: it is no regular file, no safetensors file, longer or shorter than its header says, or names a
            tensor twice.
    """
    with _opened(path) as (file, size):
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise AdapterFileError(
                f"{path} must be a safetensors file with a header of at most {MAX_HEADER:,} bytes, got {size:,} bytes "
                f"that announce one of {length:,}; it is damaged, or no safetensors file. Save the adapter again."
            )
        header = _object(file.read(length), f"the header of {path}")
    header.pop("__metadata__", None)
    try:
        entries = {name: Entry(str(e["dtype"]), tuple(map(int, e["shape"]))) for name, e in header.items()}
        end = max((int(e["data_offsets"][1]) for e in header.values()), default=0)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise AdapterFileError(f"the header of {path} must describe tensors, got {_short(header)}") from error
    if 8 + length + end != size:
        raise AdapterFileError(
            f"{path} must have the {8 + length + end:,} bytes that its header speaks of, got {size:,}: it was cut or "
            "something was added. Save the adapter again."
        )
    bare = {name.removeprefix(WRAPPER): entry for name, entry in entries.items()}
    if len(bare) < len(entries):
        raise AdapterFileError(f"{path} must name each tensor once, got some with and without {WRAPPER!r}")
    return bare


def read_tensors(path: str | os.PathLike) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file one by one, sorted by their names without the wrapper's.

    Raises:
        AdapterFileError: safetensors refuses the file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys(), key=lambda name: name.removeprefix(WRAPPER)):
                yield name.removeprefix(WRAPPER), file.get_tensor(name)
    except (SafetensorError, OSError, MemoryError) as error:
        raise AdapterFileError(f"{path} must be a safetensors file, got: {_short(error)}") from error


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[tuple[Any, int]]:
    """A regular file, open for reading, and its size; nothing else is opened, because a pipe would block."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise AdapterFileError(f"{path} must be a regular file, got a directory, pipe or device")
            yield file, status.st_size
    except OSError as error:
        raise AdapterFileError(f"{path} must be a file that can be read, got: {error}") from error


def _object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except AdapterFileError as error:
        raise AdapterFileError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(
            f"{where} must be JSON in UTF-8, got {len(raw):,} bytes that are not: {_short(error)}. It is damaged, or "
            "its saving was cut short."
        ) from error
    if not isinstance(value, dict):
        raise AdapterFileError(f"{where} must be a JSON object, got {_short(value)}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})[:3] if len(names) < 10_000 else "some"
        raise AdapterFileError(f"each key must be given once, got {twice} more than once")
    return found


def _short(value: object) -> str:
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


# ---------------------------------------------------------------- what an adapter's tensors must be


def check_tensors(path: Path, tree: Tree, digest: str | None) -> Path:
    """The file that holds whole routers of a tree, finite, and those that its config was saved with.

    Args:
        digest: the config's `weights_digest`; None, of an adapter that was saved without, lets any tensors pass.

    Returns:
        `path`; where a save was stopped between the tensors and the config, the file of before that belongs to the
        config (`keep`).

    Raises:
        AdapterFileError: there is none.
    """
    for each in (path, _kept(path)):
        if each is path or each.is_file():
            check_entries(each, read_header(each), tree)
            if digest_of(_finite(each), tree) == digest or digest is None:
                return each
    raise AdapterFileError(
        f"{path} must hold the tensors that its {CONFIG_NAME} was saved with, got others, or the config's tree "
        f"({tree}) was changed: they are of two saves, the later of which was cut short. Save the adapter again, "
        f"or remove weights_digest from {CONFIG_NAME} if you know that they belong together."
    )


def check_entries(path: str | os.PathLike, entries: Mapping[str, Entry], tree: Tree) -> None:
    """Whether a header is of whole routers of a tree. Raises AdapterFileError: it is not.

    Which modules have one, and what else may be there, only the model can say, to which PEFT hands the tensors.
    """
    routers: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        if (match := _ROUTER.fullmatch(name)) is None:
            continue
        routers.setdefault(match[1], {})[match[2]] = entry
        if entry.dtype not in _FLOATS:
            raise AdapterFileError(f"{name} of {path} must be of a float dtype, got {_short(entry.dtype)}")
    if not routers:
        raise AdapterFileError(f"{path} must hold router tensors, got {_short(sorted(entries)[:3])}")
    for module, parts in routers.items():
        shapes = {name: entry.shape for name, entry in parts.items()}
        if shapes != _expected(shapes, tree):
            raise AdapterFileError(
                f"the router of {module} in {path} must have the shapes of {tree}, got {_short(shapes)}; check that "
                f"{CONFIG_NAME} belongs to this file"
            )


def _expected(shapes: Mapping[str, tuple[int, ...]], tree: Tree) -> dict[str, tuple[int, ...]] | None:
    """Shapes of a router that reads and routes as much as these say; None if they say nothing."""
    if tree.router_input == "heads":
        return _expected_on_heads(shapes, tree)
    down, query = shapes.get("down.weight", ()), shapes.get("query.weight", ())
    if len(down) != 2 or len(query) != 2 or 0 in (*down, *query) or query[0] % (tree.depth * (tree.arity - 1)):
        return None
    width, logits = down[1] if tree.router_dim is None else tree.router_dim, query[0]
    roles = ("query",) if tree.tie_query_key else ("query", "key")
    of_roles = {f"{role}.{part}": shape for role in roles for part, shape in _projection(logits, width)}
    return {"down.weight": (width, down[1]), **of_roles}


def _expected_on_heads(shapes: Mapping[str, tuple[int, ...]], tree: Tree) -> dict[str, tuple[int, ...]] | None:
    sizes = {role: shapes.get(f"{role}.weight", ()) for role in ("query", "key")}
    logits = tree.depth * (tree.arity - 1)
    if any(len(shape) != 3 or 0 in shape or shape[1] != logits for shape in sizes.values()):
        return None
    (routes, _, width), (kv_heads, _, head_dim) = sizes["query"], sizes["key"]
    alike = routes == kv_heads if tree.route_per == "kv_head" else routes % kv_heads == 0 and width == head_dim
    if not alike or width % head_dim:
        return None
    parts = {
        role: {"weight": (heads, logits, each), "bias": (heads, logits), "center": (heads, each), "gain": (heads,)}
        for role, (heads, _, each) in sizes.items()
    }
    return {f"{role}.{name}": shape for role, of_role in parts.items() for name, shape in of_role.items()}


def _projection(logits: int, width: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return ("weight", (logits, width)), ("bias", (logits,))


def _finite(path: str | os.PathLike) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in read_tensors(path):
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise AdapterFileError(f"{name} of {path} must be finite in float32, got NaN, infinity or larger numbers")
        yield name, tensor


def digest_of(tensors: Iterable[tuple[str, Tensor]], tree: Tree) -> str:
    """SHA-256 of tensors in the order of their names, and of the tree that they are read as, in hexadecimal."""
    read_as = tree if tree.router_input == "heads" else tree[:-1]  # as before there were others
    found = hashlib.sha256(json.dumps(read_as).encode())
    for name, tensor in tensors:
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def digest_of_file(path: Path, tree: Tree) -> str | None:
    """`digest_of` a file that was written just now, made durable; None if there is none of routers."""
    try:
        check_entries(path, read_header(path), tree)
        found = digest_of(read_tensors(path), tree)
    except AdapterFileError:
        return None
    _make_durable(path)
    return found


# ---------------------------------------------------------------- writing


def keep(path: Path) -> None:
    """Keep a tensor file, under another name, while it is written over: until the new config is there, too, the old one
    is the one in force, and has to have its tensors. What is kept already belongs to a config that is still there.
    `drop` ends it."""
    with contextlib.suppress(OSError):  # kept already, no file, or a file system without links
        os.link(path, _kept(path))


def drop(path: Path) -> None:
    """Remove what `keep` kept."""
    _kept(path).unlink(missing_ok=True)


def _kept(path: Path) -> Path:
    return path.with_name(f".{path.name}.kept")


def replace_text(path: Path, text: str) -> None:
    """`replace_bytes` of a text in UTF-8."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader, whenever it comes and whatever stops us, finds the old content or the new one."""
    aside = path.with_name(f".{path.name}.new")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    _make_durable(path.parent)


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """An empty folder whose files take the places of those in a directory, all of them or none, after the block.

    From the moment at which all are there `newest` finds them, and what stops us before they are in their places costs
    nothing: the next `replacing` puts them there. Weights of the earlier save that the new one lacks are removed.
    """
    _put_in_place(directory)
    saving = directory / _SAVING
    shutil.rmtree(saving, ignore_errors=True)
    saving.mkdir(parents=True)
    try:
        yield saving
        for path in _paths_in(saving):
            _make_durable(path)
        os.rename(saving, directory / _SAVED)
    except BaseException:
        shutil.rmtree(saving, ignore_errors=True)
        raise
    _make_durable(directory)
    _put_in_place(directory)


def newest(directory: Path) -> Path:
    """Where the newest whole save of `replacing` lies: in the directory, or in it but not in its place yet."""
    return saved if (saved := directory / _SAVED).is_dir() else directory


def _put_in_place(directory: Path) -> None:
    saved = directory / _SAVED
    if not saved.is_dir():
        return
    paths = sorted(_paths_in(saved), key=lambda path: path.name == "config.json")  # which says what is there, last
    names = {str(path.relative_to(saved)) for path in paths}
    for other in directory.iterdir():
        if _WEIGHTS_OF_A_BASE.fullmatch(other.name) and other.name not in names:
            other.unlink()
    for path in paths:
        place = directory / path.relative_to(saved)
        place.parent.mkdir(exist_ok=True)
        aside = place.with_name(f".{place.name}.new")
        aside.unlink(missing_ok=True)
        try:
            os.link(path, aside)
        except OSError:  # a file system without links
            shutil.copyfile(path, aside)
        os.replace(aside, place)
    shutil.rmtree(directory / _SAVING, ignore_errors=True)
    os.rename(saved, directory / _SAVING)  # half removed, it must not be found
    shutil.rmtree(directory / _SAVING)


def _paths_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _make_durable(path: Path) -> None:
    with contextlib.suppress(OSError):  # some systems sync no directory
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
