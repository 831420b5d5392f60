"""Model cards: what a saved adapter and a merged model say of themselves, and what `push_to_hub` sends."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel
from peft_helpers import logits_of, routed, tiny, tokens
from transformers import AutoModelForCausalLM
from transformers.utils import hub

from topo_adapter import TopologyConfig, card, load_merged
from topo_adapter.card import NAME, PICTURE, as_text, hub_id, write_adapter_card, write_merged_card
from topo_adapter.core.dial import LISTED, choose, dial_curve, expected_loss, listed_densities
from topo_adapter.files import replace_text
from topo_adapter.history import MAX_RUNS, add_run

IDS = tokens(2, 24)
EXAMPLE = Path(__file__).parents[1] / "examples" / "smollm2-135m-topology"
HUB_ID = "org/a-base"
RUN: Any = {"data": "books", "steps": 1400, "tokens": 11_468_800, "seconds": 750.0, "device": "NVIDIA H100"}


LENGTH = 8192


def measured(depths: int = 10) -> Any:
    """A calibration of 2 layers with 4 heads: the later a head, the sparser and the dearer."""
    far = [[(1 - d / depths) ** 3 * (1 - h / 8) for d in range(1, depths)] for h in range(4)]
    density = [[1.0, *(0.04 + 0.9 * share for share in head)] for head in far]
    loss = [[(h + 1) * d * d / 1e4 for d in range(depths)] for h in range(4)]
    return {"length": LENGTH, "heads_per_route": 1, "density": {0: density, 3: density}, "loss": {0: loss, 3: loss}}


def calibrated(**settings: Any) -> TopologyConfig:
    defaults = {"base_model_name_or_path": HUB_ID, "task_type": "CAUSAL_LM", "calibration": measured()}
    by_hand = "visible_depth" in settings
    config = TopologyConfig(**{**defaults, **({} if by_hand else {"target_density": 0.17}), **settings})
    assert config.on_the_dial() is not by_hand
    return config


@pytest.fixture(autouse=True)
def drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take their time: they are drawn where a test asks for them."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(card, "draw_dial", lambda *_: False)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT, saving, asks the hub for the base's vocabulary."""
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *_: None)


@pytest.fixture
def pictures() -> None:
    pytest.importorskip("matplotlib")  # of the evaluation extra


def written(folder: Path, config: TopologyConfig, merged: bool = False) -> ModelCard:
    folder.mkdir(exist_ok=True)
    if merged:
        write_merged_card(config, folder, causal=True)
    else:
        write_adapter_card(config, folder)
    return ModelCard.load(folder / NAME)


def run_lines(folder: Path) -> Any:
    """The model that a card's own lines make."""
    lines = (folder / NAME).read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(re.sub(r'from_pretrained\("[^"]*"\)', f"from_pretrained({str(folder)!r})", lines), names)
    return names["model"]


def table_of(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table after a heading, its rule left out; every row has as many as the head."""
    lines = text.split(heading)[1].split("\n")
    start = next(index for index, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    assert {len(row) for row in rows} == {len(rows[0])}
    return [rows[0], *rows[2:]]


# ---------------------------------------------------------------- what it says


def test_metadata_of_an_adapter(tmp_path: Path) -> None:
    data = written(tmp_path, calibrated()).data.to_dict()
    assert data.pop("tags") == [f"base_model:adapter:{HUB_ID}", "topo-adapter", "sparse-attention"]
    assert data == {"base_model": HUB_ID, "library_name": "peft", "pipeline_tag": "text-generation"}
    other = written(tmp_path / "other", calibrated(task_type="SEQ_CLS", base_model_name_or_path=None))
    assert other.data.pipeline_tag is None and "base_model" not in other.data.to_dict()
    assert "AutoPeftModelForSequenceClassification.from_pretrained" in other.text


def test_metadata_of_a_merged_model(tmp_path: Path) -> None:
    data = written(tmp_path, calibrated(), merged=True).data.to_dict()
    assert data == {
        "base_model": HUB_ID,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["topo-adapter", "sparse-attention"],
    }
    write_merged_card(calibrated(), tmp_path, causal=False)
    assert "topo_adapter.load_merged(" in (tmp_path / NAME).read_text()


@pytest.mark.parametrize("merged", [False, True])
def test_text_of_a_calibrated_adapter(merged: bool, tmp_path: Path) -> None:
    config = calibrated(training_runs=[RUN, {"stage": "kl", "steps": 200, "versions": {"torch": "2.13"}}])
    text = written(tmp_path, config, merged).text
    assert text.count("\n# ") == 1 and f"[{HUB_ID}](https://huggingface.co/{HUB_ID})" in text
    lines = text.split("```python\n")[1].split("```")[0]
    assert lines.startswith("import topo_adapter") and "length=2048" in lines
    compile(lines, "card", "exec")
    facts = dict(table_of(text, "## The topology"))  # type: ignore[arg-type]
    assert facts["Tree"] == "2 children a vertex, depth 8: 256 leaves"
    assert facts["Always visible"] == "the last 128 tokens, and the first 4"
    assert facts["Sparse heads"] == "8 in 2 layers" and "Visits" not in facts
    head, *rows = table_of(text, "## The density dial")
    assert head == ["density at 8,192 tokens", "at 2,048 tokens", "expected loss, nats per token"]
    assert [row[0] for row in rows] == ["0.05", "0.1", "0.17 (its own)", "0.3", "0.5", "1"]
    assert config.calibration is not None
    loss = expected_loss(config.calibration, choose(config.calibration, 0.1))
    assert float(rows[1][2]) == pytest.approx(loss, rel=0.05) and float(rows[-1][1]) == 1
    head, *rows = table_of(text, "## Training")
    assert head == ["stage", "data", "steps", "tokens read", "minutes", "device", "software"]
    assert rows[0] == ["", "books", "1,400", "11,468,800", "12.5", "NVIDIA H100", ""]
    assert rows[1] == ["kl", "", "200", "", "", "", "torch 2.13"]


def test_several_visits_are_said(tmp_path: Path) -> None:
    text = written(tmp_path, TopologyConfig(visits=4, visible_depth=3)).text
    facts = dict(table_of(text, "## The topology"))  # type: ignore[arg-type]
    assert facts["Visits"] == "each query visits its 4 likeliest balls"
    assert facts["Visible"] == "keys that share the first 3 digits of such a ball"


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    text = written(tmp_path, TopologyConfig(base_model_name_or_path=HUB_ID, task_type="CAUSAL_LM")).text
    assert "## Training" not in text and "density" not in text.replace("no density dial", "") and ".png" not in text
    assert "target_density" not in text and "share the first 5 digits" in text


def test_a_map_by_hand_has_no_density_of_its_own(tmp_path: Path) -> None:
    made = written(tmp_path, calibrated(visible_depth=2))
    assert "(its own)" not in made.text and "Unless the dial" not in made.text and ".png" not in made.text
    assert len(table_of(made.text, "## The density dial")) == 1 + len(LISTED)


def test_the_curve_is_that_of_the_maps() -> None:
    config = TopologyConfig.from_pretrained(EXAMPLE)
    assert isinstance(config, TopologyConfig) and config.calibration is not None
    table = config.calibration
    curve = dial_curve(table)
    assert curve == sorted(curve) and curve[-1] == (pytest.approx(1.0), 0.0)
    listed = listed_densities(table, config.local_window, config.num_sink_tokens, 0.13)
    assert [density for density, _ in listed] == sorted({*LISTED, 0.13})
    for density, loss in listed:
        assert loss == pytest.approx(expected_loss(table, choose(table, density)), rel=1e-9, abs=1e-12)


# ---------------------------------------------------------------- the picture


def test_the_picture(tmp_path: Path, pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = written(tmp_path, calibrated())
    first = (tmp_path / PICTURE).read_bytes()
    assert f"]({PICTURE})" in made.text and first.startswith(b"\x89PNG") and len(first) < 30_000
    written(tmp_path, calibrated())
    assert (tmp_path / PICTURE).read_bytes() == first
    written(tmp_path, calibrated(target_density=0.3))
    assert (tmp_path / PICTURE).read_bytes() != first
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert PICTURE not in written(tmp_path, calibrated()).text and not (tmp_path / PICTURE).exists()


# ---------------------------------------------------------------- what others wrote


def test_a_users_words_and_metadata_stay(tmp_path: Path) -> None:
    mine = "---\nlicense: mit\ntags: [mine]\nmy_own: {a: 1}\n---\n\n# My card\n\nBefore.\n"
    (tmp_path / NAME).write_text(mine)
    made = written(tmp_path, calibrated())
    assert made.data.license == "mit" and made.data.my_own == {"a": 1} and "mine" in made.data.tags
    assert made.text.count("\n# ") == 1 and made.text.lstrip().startswith("# My card\n\nBefore.\n")
    (tmp_path / NAME).write_text((tmp_path / NAME).read_text() + "\nAfter.\n")
    before = (tmp_path / NAME).read_text()
    written(tmp_path, calibrated())
    assert (tmp_path / NAME).read_text() == before
    text = written(tmp_path, calibrated(local_window=64)).text  # in its place, between the words
    assert text.index("Before.") < text.index("the last 64 tokens") < text.index("After.")
    assert "the last 128 tokens" not in text and text.count("import topo_adapter") == 1


@pytest.mark.parametrize("front", ["---\n{: [\n---\n", "---\n- a list\n---\n", "---\nmodel-index: 3\n---\n"])
def test_metadata_that_are_none_stay_as_they_are(front: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(f"{front}# Mine\n")
    write_adapter_card(calibrated(), tmp_path)
    text = (tmp_path / NAME).read_text()
    assert text.startswith(f"{front}# Mine\n") and "import topo_adapter" in text


def test_an_empty_card_of_pefts_is_filled(tmp_path: Path) -> None:
    model = routed(tiny())
    model.save_pretrained(tmp_path)
    first = (tmp_path / NAME).read_text()
    assert "More Information Needed" not in first and first.count("Framework versions") == 1
    model.save_pretrained(tmp_path)  # PEFT reads it, and writes what it misses
    assert (tmp_path / NAME).read_text() == first
    template = ModelCard.from_template(ModelCardData()).content
    (tmp_path / NAME).write_text(f"{template}\n<!-- topo_adapter -->\nold\n<!-- /topo_adapter -->\n")
    model.save_pretrained(tmp_path)  # of an earlier version
    assert (tmp_path / NAME).read_text() == first
    (tmp_path / NAME).write_text(ModelCard.from_template(ModelCardData(), model_summary="A good one.").content)
    model.save_pretrained(tmp_path)
    text = (tmp_path / NAME).read_text()
    assert "A good one." in text and "More Information Needed" in text and text.count("- PEFT ") == 1


def test_a_merged_models_card_without_our_marks_is_its_writers(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("# Mine\n")
    write_merged_card(calibrated(), tmp_path, causal=True)
    assert (tmp_path / NAME).read_text() == "# Mine\n" and not (tmp_path / PICTURE).exists()
    (tmp_path / NAME).write_text("# Mine\n\n<!-- topo_adapter --><!-- /topo_adapter -->\n")
    assert "import topo_adapter" in written(tmp_path, calibrated(), merged=True).text


# ---------------------------------------------------------------- names that nobody checked

HOSTILE = [
    "a\n---\nlicense: mit\n---\n# owned",
    "x | y | z ]](http://evil) ![p](q)",
    "<script>alert(1)</script><!-- /topo_adapter -->",
    '"); import os #\n```\n',
    "--- # | `code` **b** \x1b[31m‮",
    "../../secret/place",
    "",
]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name: str, merged: bool, tmp_path: Path) -> None:
    config = calibrated(base_model_name_or_path=name)
    run: Any = {"data": name[:200], "device": name, "versions": {name: name}, "steps": 1}
    config.training_runs = add_run(None, run)
    plain = written(tmp_path / "plain", calibrated(training_runs=[RUN]))
    for _ in range(2):  # what was written is read again
        made = written(tmp_path, config, merged)
        text = (tmp_path / NAME).read_text()
        assert made.data.base_model is None and made.data.license is None
        assert yaml.safe_load(text.split("---\n")[1]) == made.data.to_dict()
        assert text.count("<!-- topo_adapter -->") == text.count("<!-- /topo_adapter -->") == 1
        assert text.rstrip().endswith("<!-- /topo_adapter -->")
        assert len(re.findall("^#", made.text, re.M)) == len(re.findall("^#", plain.text, re.M)) - merged
        assert "<script" not in text and "](http://evil" not in text and "![p]" not in text and "\x1b" not in text
        assert "../" not in made.text.split("## Training")[0] and text.count("```") == 2
        assert len(table_of(text, "## Training")) == 2


def test_names() -> None:
    assert as_text("Qwen3-0.6B_x, c++/d") == "Qwen3-0.6B_x, c++/d" and as_text("a\n\tb|c") == "a b&#124;c"
    assert len(as_text("x" * 1000)) == 100
    assert hub_id("gpt2") == "gpt2" and hub_id(HUB_ID) == HUB_ID
    for name in (None, "", Path("x"), "/home/me/base", "a/b/c", "tests", "..", "a b", "org/", "C:\\base"):
        assert hub_id(name) is None, name


def test_paths_are_not_told(tmp_path: Path) -> None:
    """PEFT names the base's path, in `base_model` and in a tag."""
    tiny().save_pretrained(tmp_path / "secret" / "my-base")
    model = routed(AutoModelForCausalLM.from_pretrained(tmp_path / "secret" / "my-base"), task_type="CAUSAL_LM")
    for _ in range(2):
        model.save_pretrained(tmp_path / "adapter")
        text = (tmp_path / "adapter" / NAME).read_text()
        assert "secret" not in text and "base_model" not in text and "my-base" in text
    assert run_lines(tmp_path / "adapter").base_model.model.model.layers[0].self_attn.topo_adapter.merged
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    text = (tmp_path / "merged" / NAME).read_text()
    assert "secret" not in text and "base_model" not in text and "my-base" in text


# ---------------------------------------------------------------- saving and pushing


def of_the_hub() -> Any:
    """An adapter on a base with a hub id."""
    base = tiny()
    base.config._name_or_path = base.name_or_path = HUB_ID
    return routed(base, task_type="CAUSAL_LM", training_runs=[RUN])


def test_the_trainings_are_saved(tmp_path: Path) -> None:
    of_the_hub().save_pretrained(tmp_path / "a")
    again = PeftModel.from_pretrained(tiny(), tmp_path / "a")
    assert again.peft_config["default"].training_runs == [RUN]
    again.save_pretrained(tmp_path / "b")
    assert table_of((tmp_path / "b" / NAME).read_text(), "## Training")[1][1] == "1,400"
    again.merge_and_unload().save_pretrained(tmp_path / "c")
    load_merged(tmp_path / "c").save_pretrained(tmp_path / "d")
    assert table_of((tmp_path / "d" / NAME).read_text(), "## Training")[1][1] == "1,400"
    runs: Any = None
    for steps in range(MAX_RUNS + 3):
        runs = add_run(runs, {"steps": steps})
    assert [run["steps"] for run in runs] == list(range(3, MAX_RUNS + 3))


class Hub:
    """Stands for the hub's API: notes what a commit would send, in a folder of its own."""

    def __init__(self, folder: Path, card: str | None = None) -> None:
        self.folder, self.card = folder, card

    def create_repo(self, repo_id: str, **settings: Any) -> Any:
        return type("Url", (), {"repo_id": repo_id})()

    def create_commit(self, repo_id: str, operations: list[Any], **settings: Any) -> str:
        for operation in operations:
            place = self.folder / operation.path_in_repo
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(operation.path_or_fileobj, place)
        return repo_id

    def load(self, repo_id: str, **settings: Any) -> ModelCard:
        if self.card is None:
            raise EntryNotFoundError("no card")
        return ModelCard(self.card)


@pytest.fixture
def the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "sent")
    monkeypatch.setattr(hub, "hf_api", lambda: made)
    load = ModelCard.load  # of files, which PEFT's saving reads

    def loading(place: Any, **settings: Any) -> ModelCard:
        return load(place, **settings) if Path(place).exists() else made.load(place, **settings)

    monkeypatch.setattr(ModelCard, "load", loading)
    return made


def test_push_to_hub_of_an_adapter(the_hub: Hub) -> None:
    model = of_the_hub()
    model.add_adapter("second", TopologyConfig(depth=3))
    model.push_to_hub("me/my-adapter")
    names = {str(path.relative_to(the_hub.folder)) for path in the_hub.folder.rglob("*") if path.is_file()}
    files = {"adapter_config.json", "adapter_model.safetensors", NAME}
    assert names == files | {f"second/{name}" for name in files}
    made = ModelCard.load(the_hub.folder / NAME)
    assert made.data.library_name == "peft" and made.data.base_model == HUB_ID
    assert f"base_model:adapter:{HUB_ID}" in made.data.tags and "More Information Needed" not in made.text
    assert 'from_pretrained("me/my-adapter")' in made.text and "books" in made.text
    loaded = PeftModel.from_pretrained(tiny(), the_hub.folder)
    assert torch.equal(logits_of(loaded.eval(), IDS), logits_of(model, IDS))


def test_push_to_hub_of_a_merged_model(the_hub: Hub, pictures: None) -> None:
    model = of_the_hub()
    config = model.peft_config["default"]
    table = measured(config.sparsest_depth + 1)
    config.calibration = {
        **table,
        **{name: {layer: table[name][0] for layer in range(4)} for name in ("density", "loss")},
    }
    merged = model.merge_and_unload(target_density=0.4)
    merged.push_to_hub("me/merged", tags=["mine"])
    names = {str(path.relative_to(the_hub.folder)) for path in the_hub.folder.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", NAME, PICTURE} < names
    assert {"topology/adapter_config.json", "topology/adapter_model.safetensors"} < names
    made = ModelCard.load(the_hub.folder / NAME)
    assert made.data.library_name == "transformers" and made.data.base_model == HUB_ID
    assert made.data.tags == ["mine", "topo-adapter", "sparse-attention"]
    assert 'from_pretrained("me/merged")' in made.text and "0.4 (its own)" in made.text
    loaded = AutoModelForCausalLM.from_pretrained(the_hub.folder)
    assert torch.equal(logits_of(loaded, IDS), logits_of(merged, IDS))
    turned = run_lines(the_hub.folder).model.layers[0].self_attn.topo_adapter.topology_config
    assert turned.target_density == pytest.approx(0.3, abs=0.02)
    (the_hub.folder / NAME).write_text((the_hub.folder / NAME).read_text().replace("0.4", "9.9") + "\nMine.\n")
    loaded.save_pretrained(the_hub.folder)
    text = (the_hub.folder / NAME).read_text()
    assert "9.9" not in text and "0.4 (its own)" in text and text.endswith("\nMine.\n")


def test_a_push_keeps_the_words_on_the_hub(the_hub: Hub) -> None:
    the_hub.card = "---\nlicense: mit\n---\n# Mine\n\n<!-- topo_adapter -->old<!-- /topo_adapter -->\n\nAfter.\n"
    of_the_hub().push_to_hub("me/my-adapter")
    made = ModelCard.load(the_hub.folder / NAME)
    assert made.data.license == "mit" and made.text.startswith("\n# Mine\n") and made.text.endswith("After.\n")
    assert made.text.count("import topo_adapter") == 1 and "old" not in made.text


def test_a_push_of_another_methods_adapter_is_as_before(the_hub: Hub) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])).push_to_hub("me/lora")
    assert "topo" not in (the_hub.folder / NAME).read_text()
    assert json.loads((the_hub.folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("é\n", "two\r\nlines\n"):
        replace_text(tmp_path / "f", text)
        assert (tmp_path / "f").read_bytes() == text.encode() and [p.name for p in tmp_path.iterdir()] == ["f"]
