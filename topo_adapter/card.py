"""Model cards: what a saved adapter, or a merged model, says of itself on the hub.

Our part of a card stands between two marks; the rest of it, and the metadata that are not ours, are their writer's.
Names that come from files are shown as text: they form no Markdown, HTML or YAML of their own.
"""

from __future__ import annotations

import functools
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .core.dial import at_length, listed_densities
from .core.visibility import always_density
from .files import replace_text
from .history import TrainingRun
from .picture import draw_dial

if TYPE_CHECKING:
    from .config import TopologyConfig

NAME, PICTURE = "README.md", "topology_dial.png"
#: Stands in the lines of use where the repository's name is not known.
REPOSITORY = "this/repository"
_BEGIN, _END = "<!-- topo_adapter -->", "<!-- /topo_adapter -->"
_OURS = re.compile(rf"\s*{_BEGIN}.*?{_END}\s*", re.DOTALL)
_TAGS = ("topo-adapter", "sparse-attention")
_ADAPTER_OF = "base_model:adapter:"
#: Task type -> PEFT's class that loads base and adapter; the others are loaded as causal LMs.
_AUTO = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
_ADAPTER = """import topo_adapter  # registers the adapter type; without it PEFT raises KeyError: 'TOPOLOGY'
from peft import {auto}

model = {auto}.from_pretrained("{repository}")  # loads the base too
model.merge_adapter()  # hard sparse attention"""
_MERGED = """import topo_adapter  # knows the model type; transformers alone refuses it
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repository}")"""
_MERGED_OTHER = """import topo_adapter

model = topo_adapter.load_merged("{repository}")"""
#: PEFT adds it to cards that lack it.
_PEFT = f"- PEFT {peft.__version__}"
#: Lines that PEFT and transformers add to the empty template of a card.
_MADE = re.compile(r"#+ Framework versions|- PEFT \S+|This is the model card of a .* automatically generated\.")


def write_adapter_card(config: TopologyConfig, folder: Path, repository: str = REPOSITORY) -> None:
    """Put our part and an adapter's metadata into the card of a folder, and the picture of its dial beside it."""
    card, text = _opened(folder / NAME)
    lines = _ADAPTER.format(auto=_AUTO.get(str(config.task_type), "AutoPeftModelForCausalLM"), repository=repository)
    about = (
        f"A topology adapter: with it the frozen base {_base(config)} has a learned sparse attention. The base is not "
        "in here;\non one that is loaded already the adapter is put by `peft.PeftModel.from_pretrained(base, ...)`."
    )
    lines += _turns(config, "model.merge_adapter(target_density=", "turns the dial, merged or not")
    part = _part(config, about, lines, _drawn(config, folder))
    if card is not None:
        base, named = hub_id(config.base_model_name_or_path), card.data.get("base_model")
        if base is None and isinstance(named, str) and hub_id(named) is None:
            card.data.pop("base_model")  # a path, which PEFT puts there
        _set_metadata(card, "peft", base, [f"{_ADAPTER_OF}{base}"] if base else [], config.task_type == "CAUSAL_LM")
    _save(folder, card, text, part, f"# Learned sparse attention for {_base_name(config)}", _PEFT)


def write_merged_card(
    config: TopologyConfig,
    folder: Path,
    causal: bool,
    earlier: Path | None = None,
    repository: str = REPOSITORY,
    dense_until: int = 0,
) -> None:
    """The same for a merged model's folder. A card in which somebody wrote without our marks is left as it is.

    Args:
        causal: whether transformers' auto class for causal LMs opens it.
        earlier: folder of the card that is there already; None: `folder`. dense_until: as `merge_adapter` takes it.
    """
    card, text = _opened((earlier or folder) / NAME)
    if not _is_blank(text) and _BEGIN not in text:
        return
    lines = (_MERGED if causal else _MERGED_OTHER).format(repository=repository)
    about = (
        f"The model {_base(config)} with a learned sparse attention, merged: the base's weights, and in `topology/` "
        "the routers\nthat decide what each query sees."
    )
    if dense_until:
        about += (
            f" The first\n{dense_until:,} tokens of a text see all tokens before them; the densities below leave that "
            "out."
        )
    lines += _turns(config, "topo_adapter.set_density(model, ", "turns the dial")
    part = _part(config, about, lines, _drawn(config, folder))
    if card is not None:
        base = hub_id(config.base_model_name_or_path)
        _set_metadata(card, "transformers", base, [], causal)
        if base is not None:
            card.data["base_model_relation"] = card.data.get("base_model_relation", "finetune")
    _save(folder, card, text, part, f"# Learned sparse attention in {_base_name(config)}")


def hub_id(name: str | os.PathLike | None) -> str | None:
    """The name of a base, if it can be one of the hub and is no local place."""
    if not isinstance(name, str) or not name:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if os.path.exists(name) else name


def as_text(name: object) -> str:
    """A name as Markdown that shows it, in one line: what could form anything is written as an entity."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(name)).split())
    line = line if len(line) <= 100 else f"{line[:97]}..."
    return "".join(c if c.isalnum() or c in " -_./,+" else f"&#{ord(c)};" for c in line)


# ---------------------------------------------------------------- the card as a file


def _opened(path: Path) -> tuple[ModelCard | None, str]:
    """A card for its metadata, and the text below them; without a card where they are no YAML, which stays as it is."""
    text = path.read_text(encoding="utf-8-sig") if path.exists() else ""
    try:
        card = ModelCard(text if text.lstrip().startswith("---") else f"---\n{{}}\n---\n{text}")
    except Exception:  # PyYAML's or the hub's own, of whatever somebody wrote
        return None, text
    return card, card.text


def _save(folder: Path, card: ModelCard | None, text: str, part: str, title: str, last: str | None = None) -> None:
    """Write a card with our part in the place of an older one, or at the end; what nobody wrote is left out.

    Args:
        title: of a card whose writer has given it none. last: a line of ours, unless the rest has it.
    """
    beside, others = _OURS.sub("\n", text), text
    if _is_blank(beside):
        beside = others = ""
    if re.search("^# ", beside, re.MULTILINE) is None:
        part = f"{title}\n\n{part}"
    if last is not None and last not in beside.splitlines():
        part += f"\n### Framework versions\n\n{last}\n"
    ours, places = f"\n\n{_BEGIN}\n{part}{_END}\n\n", iter([True])
    whole = _OURS.sub(lambda _: ours if next(places, False) else "\n\n", others)
    whole = (whole if _BEGIN in whole else f"{whole.rstrip()}{ours}").strip() + "\n"
    if card is not None:
        card.text = f"\n{whole}"
        whole = str(card)
    replace_text(folder / NAME, whole)


def _is_blank(text: str) -> bool:
    """Whether nobody has written in a card: it is the hub's template, as PEFT and transformers make it, or empty."""
    lines = {line.strip() for line in text.splitlines()} - {""}
    return all(line in _template() or _MADE.fullmatch(line) for line in lines)


@functools.cache
def _template() -> frozenset[str]:
    """Lines of the hub's empty card."""
    return frozenset(line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines())


def _set_metadata(card: ModelCard, library: str, base: str | None, tags_of_base: list[str], causal: bool) -> None:
    """What the hub asks of a card: library, base, task, and the card's own tags with ours.

    Tags that PEFT set are set anew: they may name the path of a base that is no repository.
    """
    card.data["library_name"] = library
    if base is not None:
        card.data["base_model"] = base
    tags = card.data.get("tags") or []
    others = [str(tag) for tag in ([tags] if isinstance(tags, str) else tags)]
    others = [tag for tag in others if tag not in _TAGS and not tag.startswith(_ADAPTER_OF)]
    card.data["tags"] = [*others, *tags_of_base, *_TAGS]
    if causal:
        card.data["pipeline_tag"] = card.data.get("pipeline_tag", "text-generation")


def _drawn(config: TopologyConfig, folder: Path) -> bool:
    """Whether the picture of the dial lies in the folder now."""
    if config.on_the_dial() and draw_dial(config, folder / PICTURE):
        return True
    (folder / PICTURE).unlink(missing_ok=True)  # of an earlier save
    return False


# ---------------------------------------------------------------- what it says


def _base_name(config: TopologyConfig) -> str:
    """The last part of the base's name: a path says where somebody's files lie."""
    name = str(config.base_model_name_or_path or "")
    return as_text(re.split(r"[/\\]", name.rstrip("/\\"))[-1]) or "a causal LM"


def _base(config: TopologyConfig) -> str:
    name = hub_id(config.base_model_name_or_path)
    return _base_name(config) if name is None else f"[{name}](https://huggingface.co/{name})"


def _part(config: TopologyConfig, about: str, lines: str, drawn: bool) -> str:
    sections = [
        about,
        f"## How to load\n\n```python\n{lines}\n```",
        f"## The topology\n\n{_facts(config)}",
        _dial(config, drawn),
        _training(config.training_runs or []),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _table(head: list[str], rows: list[list[str]], align: str = "---") -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, [align] * len(head), *rows])


def _facts(config: TopologyConfig) -> str:
    per = {"query_head": "query head", "kv_head": "key-value head"}[config.route_per]
    roles = "one, as query and as key" if config.tie_query_key else "one as query, one as key"
    width = "as wide as the model" if config.router_dim is None else f"{config.router_dim} wide"
    if config.router_input == "heads":
        width = "on each head's own queries and keys"
    rows = [
        ["Tree", f"{config.arity} children a vertex, depth {config.depth}: {config.arity**config.depth:,} leaves"],
        ["Addresses", f"of each token, for each {per}: {roles}"],
        ["Routers", f"one per attention layer, {width}"],
        ["Always visible", f"the last {config.local_window:,} tokens, and the first {config.num_sink_tokens:,}"],
    ]
    if config.visits > 1:
        most = f"each query visits its {config.visits} likeliest balls"
        if config.calibration is not None:
            most = f"each query visits up to {config.visits} balls, as many as the density dial gives its head"
        rows.append(["Visits", most])
    if config.calibration is not None:
        heads = config.calibration["density"]
        rows.append(["Sparse heads", f"{sum(map(len, heads.values())):,} in {len(heads):,} layers"])
    elif isinstance(config.visible_depth, int):
        whose = "the query's address" if config.visits == 1 else "such a ball"
        rows.append(["Visible", f"keys that share the first {config.visible_depth} digits of {whose}"])
    return _table(["", ""], rows)


def _densities(config: TopologyConfig, own: float | None = None) -> list[tuple[float, float, float]]:
    """Densities at the calibrated length and at a quarter of it, and what each is expected to cost."""
    assert config.calibration is not None  # of the callers
    length, window, sinks = config.calibration["length"], config.local_window, config.num_sink_tokens
    near, shorter = always_density(length, window, sinks), max(1, length // 4)
    return [
        (density, at_length(max(density, near), length, shorter, window, sinks), loss)
        for density, loss in listed_densities(config.calibration, window, sinks, own)
    ]


def _turns(config: TopologyConfig, call: str, what: str) -> str:
    """Lines that turn the dial to a density that the adapter reaches."""
    if config.calibration is None:
        return ""
    density, there, _ = min(_densities(config), key=lambda row: abs(row[0] - 0.3))
    shorter = max(1, config.calibration["length"] // 4)
    given = f"{math.ceil(100 * there) / 100:g}, length={shorter}"
    return f"\n{call}{density:g})  # {what}\n{call}{given})  # the same, said of texts of {shorter:,} tokens"


def _dial(config: TopologyConfig, drawn: bool) -> str:
    """The densities that a calibrated adapter can be run at, and what each is expected to cost."""
    if config.calibration is None:
        return "It is not calibrated: it has no density dial."
    length, own = config.calibration["length"], config.target_density if config.on_the_dial() else None
    said, rows = "", []
    for density, there, loss in _densities(config, own):
        mark = " (its own)" if density == own else ""
        rows.append([f"{density:.3g}{mark}", f"{there:.3g}", f"{loss:.2g}"])
        if density == own:
            said = (
                f"Unless the dial is turned, it attends to {density:.0%} of the causal pairs of texts of {length:,} "
                "tokens (window and sinks included;\nshorter texts see a larger share). Calibration expects that to "
                f"cost {loss:.2g} nats per token.\n\n"
            )
    head = [f"density at {length:,} tokens", f"at {max(1, length // 4):,} tokens", "expected loss, nats per token"]
    picture = f"\n\n![Loss over density, and the depth of every head]({PICTURE})" if drawn else ""
    return (
        f"## The density dial\n\n{said}{_table(head, rows, '---:')}\n\nDensity: share of the causal pairs that is "
        "visible, a mean over the sparse heads. Loss: KL to the dense model, estimated by the\ncalibration from its "
        f"own texts of {length:,} tokens; it is no measurement, and other texts may lose more.{picture}"
    )


def _training(runs: list[TrainingRun]) -> str:
    """What is known of the trainings; a column that no run fills is left out."""
    names = {
        "stage": "stage",
        "data": "data",
        "steps": "steps",
        "tokens": "tokens read",
        "length": "tokens per row",
        "seconds": "minutes",
        "device": "device",
        "versions": "software",
    }
    known = [name for name in names if any(name in run for run in runs)]
    rows = [[_shown(name, run.get(name)) for name in known] for run in runs]
    return f"## Training\n\n{_table([names[name] for name in known], rows)}" if known else ""


def _shown(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name == "seconds":
        return f"{value / 60:,.1f}"
    if isinstance(value, dict):
        return as_text(", ".join(f"{library} {version}" for library, version in value.items()))
    return f"{value:,}" if isinstance(value, int) else as_text(value)
