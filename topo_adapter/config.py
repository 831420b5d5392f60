"""`TopologyConfig`: every setting of a topology adapter, documented and checked once."""

from __future__ import annotations

import numbers
import os
import re
import reprlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType

from .card import write_adapter_card
from .core.dial import Setting, check_density, choices_of, choose, covers, listed_densities
from .core.markup import table
from .core.visits import MAX_VISITS
from .errors import AdapterFileError, TopologyConfigError
from .files import Tree, check_tensors, digest_of_file, drop, find, keep, read_fields, read_header, replace_text
from .history import TrainingRun, checked_runs

#: Of the files that this version writes; it reads older ones, and no newer ones.
FORMAT_VERSION = 1
#: Largest number of leaves `arity ** depth`. Leaf distributions are vectors of this size per token and
#: head, and ride through attention as values during training, so it is a head dimension: keep it small.
MAX_LEAVES = 4096
#: Bounds that no model comes near, so that a file cannot ask for more memory, time or bits than there are.
_MAX_DEPTH, _MAX_WIDTH, _MAX_LAYERS, _MAX_NAMES, _MAX_INT = (
    MAX_LEAVES.bit_length() - 1,
    2**16,
    10_000,
    10_000,
    2**31 - 1,
)

VisibleDepth = int | dict[int, int | list[int]]


class _Choices(TypedDict, total=False):
    choices: list[list[int]]


class Calibration(_Choices):
    """What `calibrate` measured: density and loss of each routed layer, query head and visible depth.

    length: tokens per calibration sequence.
    heads_per_route: query heads that share a route and, with `depth_per='route'`, a depth; else 1.
    choices: depth and visits, `[d, m]`, of each column; see `dial.choices_of`. Left out where queries visit one ball:
        the columns are the depths `0..L + 1` then, or end at `L` for adapters with 4,096 leaves.
    density: layer index -> `[H][choices]`, realised visible pairs / causal pairs, in (0, 1].
    loss: layer index -> `[H][choices]`, estimated KL(dense || this head alone so), nats per token.
    """

    length: int
    heads_per_route: int
    density: dict[int, list[list[float]]]
    loss: dict[int, list[list[float]]]


@dataclass
class TopologyConfig(PeftConfig):
    """Configuration of a learned p-adic attention topology (docs/method.md, sections 1 to 5).

    Raises:
        TopologyConfigError: a value is out of range or of the wrong type; the message names the field.
    """

    arity: int = field(default=2, metadata={"help": "p: children per tree vertex, >= 2 (a prime by convention)."})
    depth: int = field(
        default=8,
        metadata={"help": f"L: number of digits the router learns, >= 1, with arity ** depth <= {MAX_LEAVES}."},
    )
    visible_depth: VisibleDepth = field(
        default=None,  # type: ignore[assignment]  # __post_init__ resolves it
        metadata={
            "help": "D: a query sees the keys that share its first D digits; 0..depth, 0 is dense, deeper is sparser, "
            "and at depth + 1 it sees its local window and the sinks alone (if there are fewer than 4,096 leaves). "
            "None is 5, or depth if that is less. One integer, or a dict from layer index to one integer or to a list "
            "with one per query head (with route_per='kv_head' also one per KV head). Layers that a dict leaves out "
            "stay dense."
        },
    )
    visits: int = field(
        default=1,
        metadata={
            "help": f"m: most balls that a query visits, 1..{MAX_VISITS}, the likeliest of its router. Routers are "
            "trained for it, and the density dial gives each head 1 or that many. More than 1 is routed "
            "without a kernel where router_input is 'hidden_states'."
        },
    )
    head_visits: dict[int, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Balls that a query visits, 1..visits, as a dict from layer index to a list with one for each "
            "query head; layers that it leaves out, and all layers where it is None, take `visits`. Chosen with "
            "`visible_depth` by the density dial."
        },
    )
    router_input: Literal["hidden_states", "heads"] = field(
        default="hidden_states",
        metadata={
            "help": "What routers read of a token. 'hidden_states': what enters the attention module, through a hidden "
            "layer of `router_dim`. 'heads': each head's own query and key, before the rotary embedding; lost less "
            "at equal density where it was measured (one model) and is smaller. With it router_dim, tie_query_key and "
            "init_weights stay at their defaults."
        },
    )
    router_dim: int | None = field(
        default=90, metadata={"help": "Width of the router's hidden layer, >= 1; None is the model's hidden size."}
    )
    tie_query_key: bool = field(
        default=False, metadata={"help": "One address for both roles (the paper) instead of one per role on one tree."}
    )
    route_per: Literal["query_head", "kv_head"] = field(
        default="query_head", metadata={"help": "One route per query head, or one shared by the heads of a KV head."}
    )
    depth_per: Literal["route", "query_head"] = field(
        default="route",
        metadata={
            "help": "What the density dial gives one depth, with route_per='kv_head'. 'route': all heads of a KV head, "
            "so that they share the loads of its keys. 'query_head': each head its own, which loses less at equal "
            "density and decodes no faster than one route per query head. Takes effect in `calibrate`."
        },
    )
    local_window: int = field(
        default=128, metadata={"help": "W >= 1: a query always sees its last W tokens, itself included."}
    )
    num_sink_tokens: int = field(
        default=4, metadata={"help": "The first tokens of each document that every query sees, >= 0."}
    )
    init_weights: Literal["random", "collapse"] = field(
        default="random",
        metadata={
            "help": "'random': small random addresses. 'collapse': the paper's start, every token in one ball with "
            "probability 1 - 4.5e-5 per level. Both start as exactly the base model, because homotopy starts at 0; "
            "the collapsed start is saturated and learns very slowly."
        },
    )
    homotopy: float = field(
        default=0.0,
        metadata={
            "help": "c in [0, 1]: attention weights are multiplied by 1 - c + c * mask. 0 is the base model exactly, "
            "1 the topology in full force. Raised by TopologyCallback and saved with the adapter."
        },
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Current Gumbel-Softmax temperature in training, > 0. Annealed by the callback."}
    )
    gumbel_noise: bool = field(
        default=True, metadata={"help": "Sample digits in training (Gumbel-Softmax); False takes the plain softmax."}
    )
    gradient_bridge: Literal["full", "masked"] = field(
        default="full",
        metadata={
            "help": "How gradients pass the hard mask. 'full': hard forward, soft gradient for every causal pair. "
            "'masked': the paper's, hidden pairs get -inf before softmax and no gradient."
        },
    )
    balance_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the per-level Switch load-balancing loss, >= 0. Distillation needs none; raising the "
            "homotopy on a language-model loss alone does (0.01)."
        },
    )
    density_weight: float = field(
        default=0.1,
        metadata={"help": "Weight of the share of causal pairs that the tree alone makes visible (the cost), >= 0."},
    )
    calibration: Calibration | None = field(
        default=None,
        metadata={
            "help": "Density and loss of every head at every depth, measured by `calibrate`; what "
            "merge_adapter(target_density=...) chooses depths from. Stale once the routers are trained further."
        },
    )
    target_density: float | None = field(
        default=None,
        metadata={
            "help": "Density in (0, 1] at the calibrated length, window and sinks included, that `visible_depth` is "
            "chosen for from `calibration`, which it needs. Set by `calibrate`, `set_density` and "
            "merge_adapter(target_density=...). None leaves `visible_depth` as it is."
        },
    )
    training_runs: list[TrainingRun] | None = field(
        default=None,
        metadata={
            "help": "What the adapter was trained on and what that cost, run by run, for its model card; see "
            "`history.TrainingRun`. Added to by every training."
        },
    )
    base_fingerprint: str | None = field(
        default=None,
        metadata={
            "help": "64 entries of the base's input embedding as signed bytes in hexadecimal. Set by `calibrate`; "
            "loading the adapter on another base of the same shape warns."
        },
    )
    base_facts: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "What the base's own config says of it: model type, layers, heads, sizes, vocabulary, rope. Set "
            "when a fresh adapter is attached; loading it on a base of other sizes is refused, of another kind warns."
        },
    )
    weights_digest: str | None = field(
        default=None,
        metadata={
            "help": "SHA-256 of the saved tensors and of the tree they are read as. Set by saving; loading refuses a "
            "config and tensors of two saves. None, in files of before, lets any tensors pass."
        },
    )
    format_version: int = field(
        default=FORMAT_VERSION, metadata={"help": "Of the saved files. Those of a newer topo_adapter are refused."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Attention modules (suffixes or a regex); None finds every full-attention module. A regex is saved "
            "as the names that it found, and none is taken from a file."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Attention modules (suffixes or a regex) that `target_modules` leaves dense."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only these layer indices get a router; the others stay dense."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules (suffixes) that are trained whole beside the routers and saved with them, each adapter "
            "its own copy; a classifier's new head for one. The head is added for task_type SEQ_CLS, TOKEN_CLS and "
            "QUESTION_ANS."
        },
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Tokens whose input embeddings are trained and saved, as row indices >= 0; or a dict from the "
            "names (suffixes) of embeddings to such lists. Output embeddings that are tied to them follow."
        },
    )

    def __post_init__(self) -> None:
        #: Of a config from `from_pretrained`: names of the tensors beside it (none: there is no file), and where they
        #: lie if not in their usual place.
        self.names_of_weights: frozenset[str] | None = None
        self.kept_weights: Path | None = None
        self._written: Path | None = None  # tensors of the last save
        self._check_peft_fields()
        try:
            super().__post_init__()
        except ValueError as error:
            raise TopologyConfigError(f"task_type: {str(error)[:400]}") from error
        self.peft_type = PeftType.TOPOLOGY
        self._check_int("format_version", self.format_version, 1)
        if self.format_version > FORMAT_VERSION:
            raise TopologyConfigError(
                f"format_version must be at most {FORMAT_VERSION}, got {self.format_version}: the adapter was saved by "
                "a newer topo_adapter; upgrade topo_adapter to load it."
            )
        self._check_int("arity", self.arity, 2, _MAX_INT)
        self._check_int("depth", self.depth, 1, _MAX_INT)
        if self.arity > MAX_LEAVES or self.depth > _MAX_DEPTH or self.arity**self.depth > MAX_LEAVES:
            raise TopologyConfigError(
                f"arity ** depth must be at most {MAX_LEAVES} (leaf distributions have that many entries per token "
                f"and head), got {self.arity} ** {self.depth}; lower depth or arity."
            )
        self._check_int("visits", self.visits, 1, MAX_VISITS)
        if self.router_dim is not None:
            self._check_int("router_dim", self.router_dim, 1, _MAX_WIDTH)
        self._check_int("local_window", self.local_window, 1)
        self._check_int("num_sink_tokens", self.num_sink_tokens, 0)
        self._check_choice("route_per", self.route_per, ("query_head", "kv_head"))
        self._check_choice("depth_per", self.depth_per, ("route", "query_head"))
        self._check_choice("init_weights", self.init_weights, ("random", "collapse"))
        self._check_choice("gradient_bridge", self.gradient_bridge, ("full", "masked"))
        self._check_choice("router_input", self.router_input, ("hidden_states", "heads"))
        self._check_bool("tie_query_key", self.tie_query_key)
        self._check_bool("gumbel_noise", self.gumbel_noise)
        self._check_float("homotopy", self.homotopy, 0.0, 1.0)
        self._check_float("temperature", self.temperature, 0.0, float("inf"), open_low=True)
        self._check_float("balance_weight", self.balance_weight, 0.0, float("inf"))
        self._check_float("density_weight", self.density_weight, 0.0, float("inf"))
        if self.router_input == "heads":
            for name in ("router_dim", "tie_query_key", "init_weights"):
                value, default = getattr(self, name), getattr(TopologyConfig, name)
                if value != default:
                    raise TopologyConfigError(
                        f"{name} must be {default!r}, its default, with router_input='heads', whose routers have "
                        f"nothing of the kind, got {value!r}"
                    )
        if self.layers_to_transform is not None:
            layers = self.layers_to_transform
            for index in layers if isinstance(layers, (list, tuple)) else [layers]:
                self._check_int("layers_to_transform", index, 0, _MAX_LAYERS)
        self.target_modules = self._checked_names("target_modules", self.target_modules)
        self.exclude_modules = self._checked_names("exclude_modules", self.exclude_modules)
        self.modules_to_save = self._checked_modules_to_save()
        self._check_token_indices()
        given = self.visible_depth
        if given is None:
            self.visible_depth = min(5, self.depth)
        self.visible_depth, self.head_visits = self._checked_visible_depth(), self._checked_head_visits()
        self.calibration = self._checked_calibration()
        self.training_runs = checked_runs(self.training_runs)
        mark = self.base_fingerprint
        if mark is not None and not (isinstance(mark, str) and re.fullmatch("[0-9a-f]{128}", mark)):
            raise TopologyConfigError(f"base_fingerprint must be 128 hexadecimal digits or None, got {_shown(mark)}")
        if self.base_facts is not None and not isinstance(self.base_facts, dict):
            raise TopologyConfigError(f"base_facts must be a dict or None, got {_shown(self.base_facts)}")
        mark = self.weights_digest
        if mark is not None and not (isinstance(mark, str) and re.fullmatch("[0-9a-f]{64}", mark)):
            raise TopologyConfigError(f"weights_digest must be 64 hexadecimal digits or None, got {_shown(mark)}")
        if self.target_density is not None:
            check_density(self.target_density)
            chosen = self.setting_at(self.target_density)
            same_depths = given is None or self.visible_depth == chosen.depths  # a file's keys are integers again
            if not (same_depths and self.head_visits in (None, chosen.visits)):
                raise TopologyConfigError(
                    "visible_depth and head_visits must be None, or the maps of target_density, where that is given, "
                    f"got both target_density {self.target_density} and another map; set one of them to None"
                )
            self.setting = chosen

    def _check_peft_fields(self) -> None:
        wanted = {"base_model_name_or_path": (str, os.PathLike), "revision": str, "auto_mapping": dict}
        for name, kinds in wanted.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, kinds):  # type: ignore[arg-type]
                raise TopologyConfigError(f"{name} must be a {_names_of(kinds)} or None, got {_shown(value)}")
        self._check_bool("inference_mode", self.inference_mode)

    @property
    def tree(self) -> Tree:
        """What says how the routers' tensors are read."""
        return Tree(self.arity, self.depth, self.router_dim, self.tie_query_key, self.route_per, self.router_input)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The fields of an adapter_config.json.

        Raises:
            AdapterFileError: see `files.read_fields`.
        """
        read_fields(path_json_file)
        return super().from_json_file(path_json_file, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """The config of a saved adapter; the tensors beside it are checked here, before PEFT attaches anything.

        Args: as PEFT's. A directory with a config alone may be opened: its fields are good for a fresh adapter.

        Raises:
            AdapterFileError: a file is damaged, is no safetensors file, or does not belong to the other.
            TopologyConfigError: a value is out of range or of the wrong type.
        """
        source: Any = pretrained_model_name_or_path
        config = super().from_pretrained(source, subfolder=subfolder, **kwargs)
        if isinstance(config, TopologyConfig):
            config._check_weights(source, subfolder, cls._split_kwargs(kwargs)[0])
        return config

    def _check_weights(self, source: str | os.PathLike, subfolder: str | None, hub: dict[str, Any]) -> None:
        path = find(source, SAFETENSORS_WEIGHTS_NAME, subfolder, **hub)
        if path is None and find(source, WEIGHTS_NAME, subfolder, **hub) is not None:
            raise AdapterFileError(
                f"{source} must hold its tensors in {SAFETENSORS_WEIGHTS_NAME}, got {WEIGHTS_NAME}, a pickle: it is "
                "not opened. Save the adapter with safe_serialization=True."
            )
        self.names_of_weights = frozenset()
        if path is not None:
            found = check_tensors(path, self.tree, self.weights_digest)
            self.kept_weights = found if found != path else None
            self.names_of_weights = frozenset(read_header(found))

    def setting_at(self, target_density: float) -> Setting:
        """Depths and visits that the dial has for a density, from the adapter's own calibration: `dial.choose`.

        Raises:
            TopologyConfigError: there is none, or `target_density` is out of range or reach.
        """
        if self.calibration is None:
            raise TopologyConfigError(
                f"target_density must be None without a calibration, got {target_density!r}; call "
                "topo_adapter.calibrate(model, sequences) first"
            )
        return choose(self.calibration, target_density)

    @property
    def setting(self) -> tuple[Any, dict[int, list[int]] | None]:
        """`visible_depth` and `head_visits`, in force."""
        return self.visible_depth, self.head_visits

    @setting.setter
    def setting(self, new: tuple[Any, dict[int, list[int]] | None]) -> None:
        self.visible_depth, self.head_visits = new

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are saved: a map that the table gives is not written out, one set by hand is.

        The table has a line for each layer: heads divided by `|`, each with a number for every depth.
        """
        fields = super().to_dict()
        if self.calibration is not None:
            fields["calibration"] = {
                **self.calibration,
                **{name: _lines(self.calibration[name]) for name in ("density", "loss")},
            }
        if isinstance(self.target_modules, set):
            fields["target_modules"] = sorted(self.target_modules)
        if self.on_the_dial():
            fields["visible_depth"] = fields["head_visits"] = None
        else:
            fields["target_density"] = None
        return fields

    def on_the_dial(self) -> bool:
        """Whether the depths in force are those of `target_density`, and not set by hand since."""
        if self.calibration is None or self.target_density is None:
            return False
        return self.setting == self.setting_at(self.target_density)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write adapter_config.json, and the model card beside it (`card.write_adapter_card`).

        Raises:
            AdapterFileError: the tensors were saved as a pickle, with `safe_serialization=False`.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_adapter_card(self, folder)
        self.write(folder, **kwargs)

    def write(self, folder: Path, **kwargs: Any) -> None:
        """Write adapter_config.json alone, whole or not at all, with the digest of the tensors that lie beside it."""
        weights, pickled = folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME
        if pickled.exists() and not (weights.exists() and weights.stat().st_mtime_ns > pickled.stat().st_mtime_ns):
            raise AdapterFileError(
                f"safe_serialization must be True, got False, which wrote {pickled}: adapters are loaded from "
                f"{SAFETENSORS_WEIGHTS_NAME} alone. Remove the pickle and save again."
            )
        self._check_calibrated_length()
        self.format_version, self.weights_digest = FORMAT_VERSION, digest_of_file(weights, self.tree)
        with tempfile.TemporaryDirectory() as aside:  # PEFT empties the file before it writes it
            super().save_pretrained(aside, **kwargs)
            text = Path(aside, CONFIG_NAME).read_text(encoding="utf-8")
        replace_text(folder / CONFIG_NAME, text)
        for each in {weights, self._written or weights}:
            drop(each)
        self._written = weights

    def before_saving(self) -> None:
        """Keep the tensors of the last save until `write` has written the config of the next: PEFT writes over them
        first, and what stops it then would leave a pair of two saves.

        Raises:
            TopologyConfigError: the window was widened beyond the calibrated length.
        """
        self._check_calibrated_length()
        if self._written is not None:
            keep(self._written)

    def _repr_html_(self) -> str:
        """Tree and density dial, for notebooks."""
        rows: list[tuple[str, object]] = [
            ("base", self.base_model_name_or_path or "not named"),
            ("tree", f"{self.arity} children a vertex, depth {self.depth}: {self.arity**self.depth} leaves"),
            ("always visible", f"the last {self.local_window} tokens and the first {self.num_sink_tokens}"),
            ("homotopy", f"{self.homotopy:g}"),
        ]
        if self.calibration is None:
            return table((), [*rows, ("density dial", "none: not calibrated")])
        rows.append(("its own density", "none" if self.target_density is None else f"{self.target_density:g}"))
        head = (f"density at {self.calibration['length']:,} tokens", "estimated loss, nats per token")
        listed = listed_densities(self.calibration, self.local_window, self.num_sink_tokens, self.target_density)
        dial = [(f"{density:g}", f"{loss:.4f}") for density, loss in listed]
        return table((), rows) + table(head, dial, "Density dial")

    def depths_of_layer(self, layer: int, num_heads: int, num_kv_heads: int) -> list[int]:
        """The visible depth of each query head of one layer.

        Raises:
            TopologyConfigError: `visible_depth` lists another number of heads than the layer has.
        """
        if isinstance(self.visible_depth, int):
            return [self.visible_depth] * num_heads
        depths = self.visible_depth.get(layer, 0)
        if isinstance(depths, int):
            return [depths] * num_heads
        if len(depths) == num_heads:
            return list(depths)
        if self.route_per == "kv_head" and len(depths) == num_kv_heads:
            return [d for d in depths for _ in range(num_heads // num_kv_heads)]
        wanted = f"{num_heads} entries (query heads)"
        if self.route_per == "kv_head":
            wanted += f" or {num_kv_heads} (KV heads)"
        raise TopologyConfigError(f"visible_depth[{layer}] must have {wanted}, got {len(depths)}: {depths}")

    def visits_of_layer(self, layer: int, num_heads: int) -> list[int]:
        """How many balls a query of each query head of one layer visits.

        Raises:
            TopologyConfigError: `head_visits` lists another number of heads than the layer has.
        """
        visits = (self.head_visits or {}).get(layer, [self.visits] * num_heads)
        if len(visits) != num_heads:
            raise TopologyConfigError(
                f"head_visits[{layer}] must have {num_heads} entries (query heads), got {len(visits)}: {visits}"
            )
        return visits

    @property
    def sparsest_depth(self) -> int:
        """The largest visible depth: `L + 1`, window and sinks alone; `L` if the kernels have no room for it."""
        return self.depth + 1 if self.arity**self.depth < MAX_LEAVES else self.depth

    def _checked_calibration(self) -> Calibration | None:
        table: Any = self.calibration
        if table is None:
            return None
        wanted = set(Calibration.__required_keys__)
        if not isinstance(table, dict) or set(table) - set(Calibration.__optional_keys__) != wanted:
            got = sorted(map(str, table)) if isinstance(table, dict) else table
            raise TopologyConfigError(
                f"calibration must be None or a table with the keys {sorted(wanted)}, got {_shown(got)}; call "
                "calibrate()."
            )
        self._check_int("calibration['length']", table["length"], 1)
        self._check_calibrated_length()
        self._check_int("calibration['heads_per_route']", table["heads_per_route"], 1)
        choices = self.choices()
        named = table.get("choices", self.choices(1))
        if named != choices:
            raise TopologyConfigError(
                f"calibration['choices'] must be the {len(choices)} pairs of depth and visits that a head has with "
                f"visits {self.visits}, got {_shown(named)}; with other visits call calibrate() again, or set "
                "calibration and target_density to None."
            )
        density = self._checked_layers("density", table["density"], table["heads_per_route"], len(choices))
        loss = self._checked_layers("loss", table["loss"], table["heads_per_route"], len(choices))
        shape = {layer: len(heads) for layer, heads in density.items()}
        if shape != {layer: len(heads) for layer, heads in loss.items()}:
            raise TopologyConfigError(
                f"calibration['loss'] must be given for the layers and heads of calibration['density'], {shape}, got "
                f"{ {layer: len(heads) for layer, heads in loss.items()} }"
            )
        for layer, heads in density.items():
            for head, values in enumerate(heads):
                name = f"calibration['density'][{layer}][{head}]"
                seen = {(depth, visits): value for (depth, visits), value in zip(choices, values, strict=True)}
                falls = all(seen[a] >= seen[b] for a in seen for b in seen if covers(a, b))
                if values[0] != 1 or values[-1] <= 0 or not falls:
                    raise TopologyConfigError(
                        f"{name} must be 1 at depth 0, not rising with depth nor falling with visits, > 0, got {values}"
                    )
        checked = Calibration(
            length=table["length"], heads_per_route=table["heads_per_route"], density=density, loss=loss
        )
        if self.visits > 1:
            checked["choices"] = choices
        return checked

    def choices(self, visits: int | None = None) -> list[list[int]]:
        """Depth and visits of each column of a calibration; visits: None is the config's own."""
        pairs = choices_of(self.arity, self.depth, self.sparsest_depth, self.visits if visits is None else visits)
        return [list(pair) for pair in pairs]

    def _check_calibrated_length(self) -> None:
        """When a table is read, and before one is saved that no loader would take."""
        always = self.local_window + self.num_sink_tokens
        if self.calibration is not None and (length := self.calibration["length"]) <= always:
            raise TopologyConfigError(
                f"calibration['length'] must be more than local_window + num_sink_tokens = {always}, got {length}: in "
                "texts of that length nothing is hidden, and the table's densities are of another window. Call "
                "calibrate() again, or set calibration and target_density to None."
            )

    def _checked_layers(
        self, name: str, table: object, heads_per_route: int, choices: int
    ) -> dict[int, list[list[float]]]:
        """Layer -> heads -> one finite number >= 0 for each choice; JSON's string keys become integers again."""
        if not isinstance(table, dict) or not table:
            raise TopologyConfigError(
                f"calibration[{name!r}] must be a dict from layer index to heads, got {_shown(table)}"
            )
        checked: dict[int, list[list[float]]] = {}
        for layer, heads in table.items():
            index = _layer_index(layer)
            self._check_int(f"calibration[{name!r}] keys (layer indices)", index, 0, _MAX_LAYERS)
            entry = f"calibration[{name!r}][{index}]"
            if index in checked:
                raise TopologyConfigError(f"{entry} must be given once, got it twice")
            heads = _heads_of(heads) if isinstance(heads, str) else heads
            if not isinstance(heads, (list, tuple)) or not heads or len(heads) % heads_per_route:
                raise TopologyConfigError(
                    f"{entry} must be a list of heads, a multiple of heads_per_route, got {_shown(heads)}"
                )
            for values in heads:
                if not isinstance(values, (list, tuple)) or len(values) != choices:
                    of = f"depths 0..{self.sparsest_depth}" if self.visits == 1 else "one for each choice"
                    raise TopologyConfigError(f"{entry} must be lists of {choices} numbers, {of}, got {_shown(values)}")
                for value in values:
                    self._check_float(entry, value, 0.0, float("inf"))
            checked[index] = [[float(value) for value in values] for values in heads]
        return checked

    def _checked_visible_depth(self) -> VisibleDepth:
        value = self.visible_depth
        if not isinstance(value, dict):
            self._check_int("visible_depth", value, 0, self.sparsest_depth)
            return value
        checked: dict[int, int | list[int]] = {}
        for layer, depths in value.items():
            index = _layer_index(layer)
            self._check_int("visible_depth keys (layer indices)", index, 0, _MAX_LAYERS)
            if index in checked:
                raise TopologyConfigError(f"visible_depth must name each layer once, got layer {index} twice")
            for d in depths if isinstance(depths, (list, tuple)) else [depths]:
                self._check_int(f"visible_depth[{layer}]", d, 0, self.sparsest_depth)
            checked[index] = list(depths) if isinstance(depths, (list, tuple)) else depths
        return checked

    def _checked_head_visits(self) -> dict[int, list[int]] | None:
        value: Any = self.head_visits
        if value is None:
            return None
        if not isinstance(value, dict):
            raise TopologyConfigError(
                f"head_visits must be a dict from layer index to lists or None, got {_shown(value)}"
            )
        checked: dict[int, list[int]] = {}
        for layer, visits in value.items():
            index = _layer_index(layer)
            self._check_int("head_visits keys (layer indices)", index, 0, _MAX_LAYERS)
            if index in checked or not isinstance(visits, (list, tuple)):
                raise TopologyConfigError(
                    f"head_visits must be lists, each layer's given once, got {_shown(visits)} for layer {index}"
                )
            for each in visits:
                self._check_int(f"head_visits[{index}]", each, 1, self.visits)
            checked[index] = list(visits)
        return checked

    @staticmethod
    def _checked_names(name: str, value: Any) -> Any:
        """A regex or None as it is, names as a set, which is PEFT's form."""
        if value is None or isinstance(value, str):
            return value
        if not (isinstance(value, (list, tuple, set)) and value and all(isinstance(each, str) for each in value)):
            raise TopologyConfigError(f"{name} must be a list of names, a regex or None, got {_shown(value)}")
        if len(value) > _MAX_NAMES:
            raise TopologyConfigError(f"{name} must be at most {_MAX_NAMES:,} names, got {len(value):,}")
        return set(value)

    def _checked_modules_to_save(self) -> list[str] | None:
        value: Any = self.modules_to_save
        if value is None:
            return None
        if not (isinstance(value, (list, tuple, set)) and all(isinstance(name, str) and name for name in value)):
            raise TopologyConfigError(f"modules_to_save must be a list of module names or None, got {_shown(value)}")
        return sorted(value) if isinstance(value, set) else list(value)

    def _check_token_indices(self) -> None:
        value: Any = self.trainable_token_indices
        for tokens in value.values() if isinstance(value, dict) else [] if value is None else [value]:
            if not (isinstance(tokens, list) and tokens):
                raise TopologyConfigError(
                    "trainable_token_indices must be a list of token ids, a dict from embedding names to such lists, "
                    f"or None, got {_shown(value)}"
                )
            for token in tokens:
                self._check_int("trainable_token_indices", token, 0)

    @staticmethod
    def _check_int(name: str, value: object, low: int, high: int = _MAX_INT) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            wanted = f"an integer >= {low} and < 2**31" if high == _MAX_INT else f"an integer in {low}..{high}"
            raise TopologyConfigError(f"{name} must be {wanted}, got {_shown(value)}")

    @staticmethod
    def _check_float(name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
        try:
            number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else float("nan")
        except OverflowError:  # an integer beyond all floats
            number = float("inf")
        inside = low < number if open_low else low <= number
        if not inside or not number <= high or number == float("inf"):
            raise TopologyConfigError(
                f"{name} must be a finite number in {'(' if open_low else '['}{low}, {high}], got {_shown(value)}"
            )

    @staticmethod
    def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
        if value not in choices:
            raise TopologyConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {_shown(value)}")

    @staticmethod
    def _check_bool(name: str, value: object) -> None:
        if not isinstance(value, bool):
            raise TopologyConfigError(f"{name} must be True or False, got {_shown(value)}")


def _lines(layers: dict[int, list[list[float]]]) -> dict[int, str]:
    """Layer -> its heads' numbers in one line, from which `_heads_of` makes the same floats again."""
    return {layer: " | ".join(" ".join(map(repr, head)) for head in heads) for layer, heads in layers.items()}


def _heads_of(line: str) -> object:
    """The numbers of a line of `_lines`; the line itself if it is none, for whoever checks them to refuse."""
    try:
        return [[float(value) for value in head.split()] for head in line.split("|")]
    except ValueError:
        return line


def _layer_index(layer: object) -> Any:
    """JSON turns integer keys into strings; one of more digits than a layer index has is left for the checks."""
    return int(layer) if isinstance(layer, str) and layer.isdecimal() and len(layer) <= 9 else layer


_repr = reprlib.Repr()
_repr.maxlist = _repr.maxdict = _repr.maxset = _repr.maxtuple = 16
_repr.maxstring = _repr.maxlong = _repr.maxother = 120


def _shown(value: object) -> str:
    """`repr`, short enough for a message."""
    return _repr.repr(value)


def _names_of(kinds: Any) -> str:
    return " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
