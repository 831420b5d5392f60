"""Adapter files: whatever is wrong with them is said by name, before the model is touched; what stops a save costs
nothing."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import random
import shutil
import socket
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_helpers import assert_same_weights, logits_of, randomise_routers, routed, tiny, tokens, weights_of
from safetensors.torch import load_file, save_file

import topo_adapter
from topo_adapter import AdapterFileError, TopologyConfig, TopologyConfigError, TopologyError, files
from topo_adapter.layer import hosts

IDS = tokens(1, 12)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: Mutated files of `test_fuzz`; more by hand: TOPO_FUZZ_CASES=100000 pytest tests/test_files.py -k fuzz
CASES = int(os.environ.get("TOPO_FUZZ_CASES", "5000"))


def base(**sizes: Any) -> Any:
    return tiny(**{"num_hidden_layers": 2, **sizes})


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "adapter"
    routed(base(), depth=3, task_type="CAUSAL_LM").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def change(folder: Path, **fields: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def state(model: Any) -> tuple[Any, ...]:
    """What a refusal must leave alone, beside the weights."""
    modules = dict(model.named_modules())
    own = getattr(model, "peft_config", {})
    hooks = [name for name, module in modules.items() if module._forward_pre_hooks or module._forward_hooks]
    named = {name: sorted(host.topo_routers) for name, host in modules.items() if hasattr(host, "topo_routers")}
    return list(modules), hooks, named, list(own), set(model.__dict__), model.config._attn_implementation


def refused(folder: Path, error: type[Exception], message: str) -> None:
    plain = base()
    before = state(plain)
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(plain, folder)
    assert state(plain) == before and not hosts(plain)


# ---------------------------------------------------------------- tensors that are none


def header(change: Callable[[dict[str, Any], bytes], Any]) -> Callable[[Path], None]:
    """Damage of a safetensors file: what makes another header, or a header and data, or a whole file of its own."""

    def damage(path: Path) -> None:
        raw = path.read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        made = change(json.loads(raw[8 : 8 + size]), raw[8 + size :])
        if not isinstance(made, bytes):
            text, data = made
            text = text if isinstance(text, bytes) else json.dumps(text).encode()
            made = struct.pack("<Q", len(text)) + text + data
        path.write_bytes(made)

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda path: save_file(change(load_file(path)), path)


def instead(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may not be long
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


def _first(entries: dict[str, Any]) -> str:
    return sorted(key for key in entries if key != "__metadata__")[0]


def _with(entries: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**entries, _first(entries): {**entries[_first(entries)], **fields}}


def _repeated(entries: dict[str, Any]) -> bytes:
    again = json.dumps({_first(entries): entries[_first(entries)]})[1:]
    return (json.dumps(entries)[:-1] + "," + again).encode()


_MANY = {f"x{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(70_000)}
_DOWN = "base_model.model.model.layers.0.self_attn.topo_adapter.topo_routers.down.weight"

UNREADABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (header(lambda h, d: (h, d[:-16])), "it was cut or something was added"),
    "longer": (header(lambda h, d: (h, d + b"x")), "it was cut or something was added"),
    "empty": (header(lambda h, d: b""), "announce"),
    "eight bytes": (header(lambda h, d: bytes(8)), "announce"),
    "header of 2**63 bytes": (header(lambda h, d: struct.pack("<Q", 2**63) + d), "announce"),
    "padded header": (header(lambda h, d: (json.dumps(h).encode() + b" " * 5_000_000, d)), "at most 4,000,000 bytes"),
    "many tensors": (header(lambda h, d: ({**h, **_MANY}, d)), "at most 4,000,000 bytes"),
    "list for a header": (header(lambda h, d: (b"[]", d)), "must be a JSON object"),
    "no JSON": (header(lambda h, d: (b"{nonsense", d)), "must be JSON"),
    "no UTF-8": (header(lambda h, d: (b"\xff\xfe", d)), "must be JSON"),
    "deep": (header(lambda h, d: (b"[" * 100_000, d)), "must be JSON"),
    "a key twice": (header(lambda h, d: (_repeated(h), d)), "given once"),
    "unknown dtype": (header(lambda h, d: (_with(h, dtype="EVIL"), d)), "float dtype"),
    "shape of words": (header(lambda h, d: (_with(h, shape="ab"), d)), "must describe tensors"),
    "shape of another size": (header(lambda h, d: (_with(h, shape=[16, 32]), d)), "must have the shapes"),
    "offsets of another": (header(lambda h, d: (_with(h, data_offsets=[4, 8]), d)), "must be a safetensors file"),
    "integers": (tensors(lambda t: {k: v.to(torch.int32) for k, v in t.items()}), "float dtype"),
    "a pickle": (header(lambda h, d: pickle.dumps({"a": 1})), "announce"),
    "both names": (
        tensors(lambda t: {**t, **{k.removeprefix("base_model.model."): v + 1 for k, v in t.items()}}),
        "name each tensor once",
    ),
    "not finite": (tensors(lambda t: {**t, _DOWN: t[_DOWN] * float("nan")}), "must be finite"),
    "beyond float32": (tensors(lambda t: {k: v.double() + 1e300 for k, v in t.items()}), "must be finite"),
    "a base weight": (
        tensors(lambda t: {**t, "base_model.model.lm_head.weight": torch.ones(61, 32)}),
        "they are of two saves",
    ),
    "half a router": (tensors(lambda t: {k: v for k, v in t.items() if k != _DOWN}), "must have the shapes"),
    "others": (tensors(lambda t: {k: v + 1 for k, v in t.items()}), "they are of two saves"),
    "of another dtype": (tensors(lambda t: {k: v.bfloat16() for k, v in t.items()}), "they are of two saves"),
    "a pipe": (instead(os.mkfifo), "must be a regular file"),
    "a device": (instead(lambda path: path.symlink_to("/dev/zero")), "must be a regular file"),
    "a directory": (instead(lambda path: path.mkdir()), "must be a file that can be read"),
    "a link to nowhere": (instead(lambda path: path.symlink_to("nowhere")), "must be a file that can be read"),
    "a link to itself": (instead(lambda path: path.symlink_to(path)), "must be a file that can be read"),
    "a socket": (instead(_socket), "must be a file that can be read"),
    "sparse": (lambda path: os.truncate(path, 2**33), "it was cut or something was added"),
    "nothing": (instead(lambda path: None), "must have its tensors beside"),
    "weights in a pickle": (
        instead(lambda path: torch.save({}, path.with_name("adapter_model.bin"))),
        "a pickle: it is not opened",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_tensors_are_checked_before_anything_is_attached(case: str, folder: Path) -> None:
    damage, message = UNREADABLE[case]
    damage(folder / WEIGHTS)
    refused(folder, AdapterFileError, message)


def test_a_refusal_leaves_every_loaders_model_as_it_was(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, 5000)
    plain, adapted = base(), routed(base(), depth=3, seed=3)
    before = [(state(model), weights_of(model), logits_of(model, IDS)) for model in (plain, adapted)]
    for load in (
        lambda: PeftModel.from_pretrained(plain, folder),
        lambda: topo_adapter.load(plain, folder),
        lambda: adapted.load_adapter(folder, "second"),
        lambda: topo_adapter.load(adapted, folder, "second"),
    ):
        with pytest.raises(AdapterFileError, match="it was cut"):
            load()
    for model, (known, weights, logits) in zip((plain, adapted), before, strict=True):
        assert state(model) == known
        assert_same_weights(model, weights)
        assert torch.equal(logits_of(model, IDS), logits)


def test_a_file_that_changes_after_its_check_is_taken_out_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load` alone can do that: PEFT reads the tensors once more, and raises from there."""
    plain = base()
    before = state(plain)

    def cut_first(*args: Any, **kwargs: Any) -> Any:
        os.truncate(folder / WEIGHTS, 5000)
        return read(*args, **kwargs)

    read = peft.peft_model.load_peft_weights
    monkeypatch.setattr(peft.peft_model, "load_peft_weights", cut_first)
    with pytest.raises(AdapterFileError, match="that PEFT can load"):
        topo_adapter.load(plain, folder)
    assert state(plain) == before and not hosts(plain)


def test_files_of_the_hub_are_checked_where_it_keeps_them(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--someone--adapter" / "snapshots" / ("0" * 40)
    shutil.copytree(good, snapshot)
    (tmp_path / "models--someone--adapter" / "refs").mkdir()
    (tmp_path / "models--someone--adapter" / "refs" / "main").write_text("0" * 40)
    expected = logits_of(routed(base(), depth=3), IDS)
    for load in (PeftModel.from_pretrained, topo_adapter.load):
        assert torch.equal(logits_of(load(base(), "someone/adapter", cache_dir=tmp_path).eval(), IDS), expected)
    for damage in (lambda path: os.truncate(path, 5000), Path.unlink):
        damage(snapshot / WEIGHTS)
        for load in (PeftModel.from_pretrained, topo_adapter.load):
            plain = base()
            with pytest.raises(AdapterFileError, match=r"it was cut|must have its tensors beside"):
                load(plain, "someone/adapter", cache_dir=tmp_path)
            assert not hosts(plain)


def test_names_with_and_without_the_wrapper_are_the_same(folder: Path) -> None:
    tensors(lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()})(folder / WEIGHTS)
    expected = logits_of(routed(base(), depth=3), IDS)
    assert torch.equal(logits_of(topo_adapter.load(base(), folder).eval(), IDS), expected)


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "must be JSON"),
        (b"null", "must be a JSON object"),
        (b"{}", "peft_type"),
        (b'{"peft_type": "LORA", "r": 8}', "peft_type .* must be 'TOPOLOGY', got 'LORA'"),
        (b'{"peft_type": ["TOPOLOGY"]}', "peft_type"),
        (b'\xef\xbb\xbf{"peft_type": "TOPOLOGY"}', "must be JSON"),
        (b'{"peft_type": "TOPOLOGY", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "must be JSON"),
        (b'{"peft_type": "TOPOLOGY", "arity": ' + b"9" * 5000 + b"}", "must be JSON"),
        (b'{"peft_type": "TOPOLOGY", "homotopy": 1, "homotopy": 0}', "given once"),
        (b'{"peft_type": "TOPOLOGY", "revision": "' + b"x" * 17_000_000 + b'"}', "at most 16,000,000 bytes"),
        (json.dumps({"peft_type": "TOPOLOGY", **{f"x{i}": 1 for i in range(300)}}).encode(), "at most 200"),
        (b'{"peft_type": "TOPOLOGY", "self": 1}', "fields of a config"),
        (b'{"peft_type": "TOPOLOGY", "task_type": "EVIL"}', "task_type: .*Invalid task type"),
        (b'{"peft_type": "TOPOLOGY", "auto_mapping": "evil"}', "auto_mapping must be"),
        (b'{"peft_type": "TOPOLOGY", "format_version": 999}', "saved by a newer topo_adapter"),
    ],
    ids=lambda value: str(value[:60]),
)
def test_load_says_what_is_wrong_with_a_config(text: bytes, message: str, folder: Path) -> None:
    (folder / CONFIG).write_bytes(text)
    plain = base()
    before = state(plain)
    with pytest.raises((AdapterFileError, TopologyConfigError), match=message):
        topo_adapter.load(plain, folder)
    assert state(plain) == before


def test_a_pattern_of_a_file_is_not_run(folder: Path) -> None:
    change(folder, target_modules=r"(([a-z_.0-9])+)+X")
    refused(folder, AdapterFileError, "patterns from files are not run")


def test_a_pattern_is_saved_as_the_names_it_found(tmp_path: Path) -> None:
    for pattern, names in ((r".*self_attn", ["self_attn"]), (r".*\.1\.self_attn", ["model.layers.1.self_attn"])):
        model = routed(base(), target_modules=pattern)
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == names
        again = topo_adapter.load(base(), tmp_path).eval()
        assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))


def test_a_tree_is_not_read_as_another_of_its_size(folder: Path) -> None:
    change(folder, arity=4, depth=1, visible_depth=1)  # 3 logits a head, as 2 ** 3 leaves have
    refused(folder, AdapterFileError, "config's tree .* was changed")


def test_a_width_is_compared_before_it_is_allocated(folder: Path) -> None:
    change(folder, router_dim=60_000, weights_digest=None)
    refused(folder, AdapterFileError, "must have the shapes")


def test_files_of_before_load_and_are_saved_anew(folder: Path, tmp_path: Path) -> None:
    fields = json.loads((folder / CONFIG).read_text())
    for name in ("weights_digest", "base_facts", "format_version", "base_fingerprint"):
        fields.pop(name)
    (folder / CONFIG).write_text(json.dumps(fields))
    model = PeftModel.from_pretrained(base(), folder)
    config = model.peft_config["default"]
    assert config.base_facts is None and config.base_fingerprint is None, "nobody knows that this is its base"
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["weights_digest"] is not None


def test_a_config_alone_is_good_for_a_fresh_adapter_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    config = TopologyConfig.from_pretrained(folder)
    with pytest.raises(AdapterFileError, match="must have its tensors beside"):
        get_peft_model(base(), config)
    config.inference_mode, config.homotopy = False, 0.0
    assert len(hosts(get_peft_model(base(), config))) == 2


@pytest.mark.filterwarnings("ignore:.*saved with PEFT version")
def test_a_newer_peft_is_named(folder: Path) -> None:
    change(folder, peft_version="99.0.0")
    with pytest.warns(UserWarning, match=r"PEFT version 99\.0\.0"):
        topo_adapter.load(base(), folder)
    for none in ("9" * 4400, "not one", 7, None):
        change(folder, peft_version=none)
        TopologyConfig.from_pretrained(folder)
    change(folder, peft_version=peft.__version__)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        TopologyConfig.from_pretrained(folder)


def test_a_config_that_trains_what_the_file_lacks_is_refused(folder: Path) -> None:
    """PEFT would raise KeyError once the routers are attached. The digest is of tensors and tree: it says nothing."""
    for fields in ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}):
        change(folder, **{"modules_to_save": None, **fields})
        refused(folder, AdapterFileError, "must hold the tensors that its config trains beside the routers")
        adapted = routed(base(), depth=3, seed=3)
        before = state(adapted)
        for load in (PeftModel.load_adapter, topo_adapter.load):
            with pytest.raises(AdapterFileError, match=r"trains beside the routers.*(lm_head|embed_tokens)"):
                load(adapted, folder, "second")
            assert state(adapted) == before


def test_a_config_of_ones_own_that_trains_what_the_file_lacks_is_refused_by_load(folder: Path) -> None:
    plain = base()
    before = state(plain)
    with pytest.raises(AdapterFileError, match=r"that PEFT can load, got: .*lm_head\.weight"):
        topo_adapter.load(plain, folder, config=TopologyConfig(depth=3, modules_to_save=["lm_head"]))
    assert state(plain) == before


def test_a_file_that_holds_what_the_config_does_not_train_is_refused(tmp_path: Path) -> None:
    routed(base(), depth=3, modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    change(tmp_path, modules_to_save=None)
    refused(tmp_path, AdapterFileError, "has unexpected .*lm_head")


# ---------------------------------------------------------------- the base


def test_another_base_is_noticed(folder: Path) -> None:
    plain = base(num_hidden_layers=3)
    with pytest.raises(TopologyConfigError, match=r"num_hidden_layers.*2, here 3"):
        PeftModel.from_pretrained(plain, folder)
    assert not hosts(plain)
    with pytest.warns(UserWarning, match="model_type.*'llama', here 'mistral'"):
        PeftModel.from_pretrained(base(family="mistral"), folder)
    with pytest.warns(UserWarning, match="rope_parameters"):
        PeftModel.from_pretrained(base(rope_theta=5e5), folder)
    with pytest.warns(UserWarning, match="input embedding.*another"):
        PeftModel.from_pretrained(base(seed=9), folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the adapter was trained on another")
        PeftModel.from_pretrained(base().bfloat16(), folder)  # another dtype is no other base


def test_added_tokens_make_no_other_base(tmp_path: Path) -> None:
    routed(base(vocab_size=300)).save_pretrained(tmp_path)
    larger = base(vocab_size=300)
    larger.resize_token_embeddings(310)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the adapter was trained on another")
        PeftModel.from_pretrained(larger, tmp_path)


# ---------------------------------------------------------------- saving


def test_a_pickle_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="safe_serialization must be True"):
        routed(base()).save_pretrained(tmp_path, safe_serialization=False)


def test_saving_leaves_no_file_of_its_own_behind(tmp_path: Path) -> None:
    model = routed(base())
    for name in ("a", "b", "a"):
        model.save_pretrained(tmp_path / name)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {f"{name}/{file}" for name in "ab" for file in (CONFIG, WEIGHTS, "README.md")}
    (tmp_path / "any").touch()
    assert (tmp_path / "a" / CONFIG).stat().st_mode == (tmp_path / "any").stat().st_mode


class Stop:
    """Ends the process, as SIGKILL would, before the n-th of the calls that change files."""

    NAMES = ("replace", "link", "rename", "fsync", "unlink")

    def __init__(self, n: int) -> None:
        self.left = n

    def count(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                os._exit(9)
            return call(*args, **kwargs)

        return counted

    def install(self) -> None:
        for name in self.NAMES:
            setattr(os, name, self.count(getattr(os, name)))
        peft.peft_model.safe_save_file = self.count(peft.peft_model.safe_save_file)
        topo_adapter.checkpoint.save_file = self.count(topo_adapter.checkpoint.save_file)


def stopped_everywhere(save: Callable[[], Any], step: int = 1) -> Iterator[int]:
    """Run a save in forked processes, each of which dies `step` calls later, until one gets through."""
    for n in range(0, 1000, step):
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                Stop(n).install()
                save()
                code = 0
            os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9), status
        yield n
        if status == 0:
            return
    raise AssertionError("no save got through")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_adapter_is_the_old_or_the_new_one_wherever_its_saving_stops(tmp_path: Path) -> None:
    model, folder = routed(base()), tmp_path / "adapter"
    model.save_pretrained(folder)
    old = dict(files.read_tensors(folder / WEIGHTS))
    randomise_routers(model, seed=1)
    model.peft_config["default"].temperature = 0.5
    found = []
    for _ in stopped_everywhere(lambda: model.save_pretrained(folder)):
        config = TopologyConfig.from_pretrained(folder)  # refuses a mixed pair
        loaded = dict(files.read_tensors(config.kept_weights or folder / WEIGHTS))
        same = all(torch.equal(value, old[name]) for name, value in loaded.items())
        assert same == (config.temperature == 1.0)
        if config.kept_weights is not None:
            again = topo_adapter.load(base(), folder)
            name = "base_model.model.model.layers.0.self_attn.topo_adapter.topo_routers.default.down.weight"
            assert torch.equal(again.state_dict()[name], old[_DOWN.removeprefix(files.WRAPPER)])
        found.append((same, config.kept_weights is not None))
    assert {(True, False), (True, True), (False, False)} == set(found), "each of the three was seen"
    assert found == sorted(found, key=lambda pair: not pair[0]) and found[-1] == (False, False)
    assert not list(folder.glob(".*.kept"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_merged_model_is_the_old_or_the_new_one_wherever_its_saving_stops(tmp_path: Path) -> None:
    """The new one has another base, another topology and fewer files."""
    folder = tmp_path / "merged"
    routed(base(num_hidden_layers=1)).merge_and_unload().save_pretrained(folder, max_shard_size="20KB")
    new = routed(base(seed=1, num_hidden_layers=1), seed=1).merge_and_unload()
    expected = {True: logits_of(topo_adapter.load_merged(folder), IDS), False: logits_of(new, IDS)}
    found = []
    for _ in stopped_everywhere(lambda: new.save_pretrained(folder), step=3):
        where = files.newest(folder)
        is_old = (where / "model.safetensors.index.json").exists()
        if (is_old, where == folder) not in found:
            assert torch.equal(logits_of(topo_adapter.load_merged(folder), IDS), expected[is_old])
        found.append((is_old, where == folder))
    assert set(found) == {(True, True), (False, False), (False, True)}, "in its place or not, each was seen"
    assert found == sorted(found, key=lambda pair: not pair[0]) and found[-1] == (False, True)
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_a_damaged_merged_model_is_refused(tmp_path: Path) -> None:
    routed(base()).merge_and_unload().save_pretrained(tmp_path)
    file, raw = tmp_path / "config.json", (tmp_path / "config.json").read_bytes()
    fields = json.loads(raw)
    fields["base_config"]["num_hidden_layers"] = 3
    file.write_text(json.dumps(fields))
    with pytest.raises(TopologyConfigError, match=r"num_hidden_layers.*2, here 3"):
        topo_adapter.load_merged(tmp_path)
    for name, value, message in (("intermediate_size", 64, "6 mismatched"), ("attention_bias", True, "missing")):
        file.write_text(json.dumps({**fields, "base_config": {**json.loads(raw)["base_config"], name: value}}))
        with pytest.raises(AdapterFileError, match=f"the base that its config.json describes, got .*{message}_keys"):
            topo_adapter.load_merged(tmp_path)
    file.write_text(json.dumps({**json.loads(raw), "num_hidden_layers": 3}))  # not where the base's are: of no effect
    topo_adapter.load_merged(tmp_path)
    file.write_bytes(raw)
    os.truncate(tmp_path / "model.safetensors", 500)
    with pytest.raises(AdapterFileError, match="must hold the base in safetensors files"):
        topo_adapter.load_merged(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(AdapterFileError, match="must hold a merged model"):
        topo_adapter.load_merged(tmp_path)


def test_a_merged_model_with_another_base_is_refused(tmp_path: Path) -> None:
    for seed in (0, 1):
        routed(base(seed=seed)).merge_and_unload().save_pretrained(tmp_path / str(seed))
    shutil.copy(tmp_path / "1" / "model.safetensors", tmp_path / "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AdapterFileError, match="must hold the base that its topology was merged into"):
            topo_adapter.load_merged(tmp_path / "0")


# ---------------------------------------------------------------- fuzz

_WEIRD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 13, 2**31, 2**63, -(2**63), 10**20, 10**400, 0.5, 1e308, 1e-320),
    *(
        float("nan"),
        float("inf"),
        "",
        "a",
        "0",
        "TOPOLOGY",
        "LORA",
        "\0",
        "\ud800",
        "\u0661",
        "(",
        "(a+)+$",
        "x" * 3000,
    ),
    *([], {}, [[]], {"a": 1}, {"0": 1}, {"0": [1, 2]}, [1, 2, 3], list(range(300)), {str(i): i for i in range(50)}),
]


def mutated(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """A JSON value with something wrong in it, or in something of it."""
    if isinstance(value, dict) and value and rng.random() < 0.8 and depth < 6:
        key = rng.choice(sorted(value))
        act = rng.random()
        if act < 0.15:
            del value[key]
        elif act < 0.3:
            value[rng.choice(["x", "self", f"{key}0", f"0{key}", f"-{key}", "9" * 20])] = value[key]
        else:
            value[key] = mutated(rng, value[key], depth + 1)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8 and depth < 6:
        place = rng.randrange(len(value))
        if rng.random() < 0.3:
            value.insert(place, rng.choice(_WEIRD))
        else:
            value[place] = mutated(rng, value[place], depth + 1)
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice([value + 1, value - 1, -value, value * 2, value / 2, str(value), value * 10**6])
    return copy.deepcopy(rng.choice(_WEIRD))


def scrambled(rng: random.Random, text: bytes) -> bytes:
    changed = bytearray(text)
    for _ in range(rng.choice([1, 2, 4])):
        place = rng.randrange(len(changed))
        if rng.random() < 0.5:
            changed[place] = rng.randrange(256)
        else:
            del changed[place : place + rng.randrange(1, 20)]
    return bytes(changed)


def test_fuzz(folder: Path) -> None:
    """Mutated configs and headers: a typed error, or a config that can be saved again; nothing else."""
    config, raw = json.loads((folder / CONFIG).read_text()), (folder / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    entries, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    alone, tree = folder / "alone", TopologyConfig.from_pretrained(folder).tree
    alone.mkdir()
    outcomes = {"refused": 0, "read": 0}
    for case in range(CASES):
        rng = random.Random(case)
        whole = config if rng.random() < 0.6 else entries
        made = scrambled(rng, json.dumps(whole).encode())
        if rng.random() < 0.7:
            made = json.dumps(mutated(rng, copy.deepcopy(whole))).encode()
        try:
            if whole is config:
                (alone / CONFIG).unlink(missing_ok=True)  # to write over a file can be slow
                (alone / CONFIG).write_bytes(made)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    TopologyConfig.from_pretrained(alone).to_dict()
            else:
                announced = len(made) if rng.random() < 0.9 else rng.choice([0, len(made) + 1, 2**40, 2**64 - 1])
                (folder / WEIGHTS).unlink()
                (folder / WEIGHTS).write_bytes(struct.pack("<Q", announced) + made + data)
                files.check_tensors(folder / WEIGHTS, tree, None)
            outcomes["read"] += 1
        except TopologyError:
            outcomes["refused"] += 1
        except Exception as error:
            if "missing required keys" in str(error):  # PEFT's, without a peft_type
                continue
            raise AssertionError(f"case {case}: {made[:1000]!r}") from error
    assert outcomes["refused"] > CASES / 2 and outcomes["read"] > CASES / 50
