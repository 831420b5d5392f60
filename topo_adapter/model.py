"""`TopologyModel`: the PEFT tuner that puts a topology on every full-attention module of a model."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.config import PeftConfig
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from . import auxiliary
from .checkpoint import mark_merged
from .config import TopologyConfig
from .density import say_density, turn_dial
from .entry import discard, guard, unguard
from .errors import AdapterFileError, MergeError, TopologyConfigError, UnsupportedModelError
from .files import WRAPPER, read_tensors
from .fingerprint import facts_of, fingerprint, other_facts, same_base
from .forward import install, uninstall
from .hf.gates import execution_device, find_full_attention, geometry_of, shortest_names
from .hf.rotary import rotates_otherwise
from .layer import CHILD, MergedTopology, TopologyLayer, hosts


class TopologyModel(BaseTuner):
    """Adds a child module `topo_adapter` to each targeted attention module; no module is replaced.

    Usually made by `peft.get_peft_model(model, TopologyConfig())`.

    Raises:
        TopologyConfigError: the config does not fit the model. UnsupportedModelError: a targeted module
            cannot be routed exactly.
    """

    prefix = f"{CHILD}.topo_routers"  # what follows the target's name in the keys of its tensors
    tuner_layer_cls = TopologyLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        _check_model(model, adapter_name)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        assert isinstance(peft_config, TopologyConfig)
        auxiliary.complete(self.model, peft_config, set(self.peft_config) - self._topologies())
        if peft_config.names_of_weights == frozenset() and (peft_config.inference_mode or peft_config.homotopy > 0):
            raise AdapterFileError(
                "the adapter must have its tensors beside its adapter_config.json, got a config alone: it would run "
                "random routers. To train a fresh adapter with this config set inference_mode=False and homotopy=0."
            )
        if peft_config.names_of_weights:
            auxiliary.check_file(self.model, peft_config, peft_config.names_of_weights)
        if peft_config.target_modules is None:
            peft_config.target_modules = set(find_full_attention(self.model))  # type: ignore[assignment]
        self._check_targets(peft_config)
        self._name_targets(peft_config)
        if peft_config.names_of_weights is None:  # another base's marks would be those of a file without any
            peft_config.base_facts = peft_config.base_facts or facts_of(self.model)
            peft_config.base_fingerprint = peft_config.base_fingerprint or fingerprint(self.model)
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        _check_model(model, adapter_name)
        # the adapter's own, which training and the dial write to; the user's may serve another model
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        guard(model)

    def _topologies(self) -> set[str]:
        """Names of the model's topology adapters; those of other methods are in `peft_config` too."""
        return {name for name, config in self.peft_config.items() if isinstance(config, TopologyConfig)}

    def _targets(self, config: TopologyConfig) -> dict[str, nn.Module]:
        modules = self.model.named_modules()
        return {name: module for name, module in modules if name and self._check_target_module_exists(config, name)}

    def _check_targets(self, config: TopologyConfig) -> None:
        """Check every target before the first is touched, so that a refusal leaves the model as it was."""
        targets = self._targets(config)
        if config.exclude_modules is not None:
            everything = copy.copy(config)
            everything.exclude_modules = None
            if len(self._targets(everything)) == len(targets):
                raise TopologyConfigError(
                    f"exclude_modules must leave out a module that is targeted, got {config.exclude_modules!r}; "
                    f"targeted are {_some(list(targets))}"
                )
        auxiliary.refuse_overlap(self.model, config, targets)
        geometries = [geometry_of(module, name) for name, module in targets.items()]
        found = {geometry.layer for geometry in geometries}
        if config.calibration is not None:
            measured = {layer: len(heads) for layer, heads in config.calibration["density"].items()}
            routed = {geometry.layer: geometry.num_heads for geometry in geometries}
            if measured != routed:
                raise TopologyConfigError(
                    f"the adapter was calibrated for another model ({config.base_model_name_or_path or 'unnamed'}): "
                    f"its calibration is of {_layers_and_heads(measured)}, this {type(self.model).__name__} routes "
                    f"{_layers_and_heads(routed)}. Load it on the model that it was trained for."
                )
        self._check_base(config)
        for geometry in geometries:
            config.depths_of_layer(geometry.layer, geometry.num_heads, geometry.num_kv_heads)
            config.visits_of_layer(geometry.layer, geometry.num_heads)
        named = config.visible_depth.keys() if isinstance(config.visible_depth, dict) else []
        wanted = {
            "visible_depth": set(named),
            "head_visits": set(config.head_visits or {}),
            "layers_to_transform": _layers_to_transform(config) or set(),
        }
        for name, layers in wanted.items():
            if layers - found:
                raise TopologyConfigError(
                    f"{name} names layers {_some(sorted(layers - found))}, which are not routed; routed are "
                    f"{sorted(found)}"
                )

    def _name_targets(self, config: TopologyConfig) -> None:
        """Put names in the place of patterns: files hold no others."""
        if isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str):
            names: Any = set(shortest_names(self.model, list(self._targets(config))))
            if names:
                config.target_modules, config.exclude_modules = names, None

    def _check_base(self, config: TopologyConfig) -> None:
        """Refuse a base of other sizes than the adapter's own, warn of another one of its sizes."""
        name, kind = config.base_model_name_or_path or "unnamed", type(self.model).__name__
        sizes, others = other_facts(config.base_facts or {}, facts_of(self.model) or {})
        if sizes:
            raise TopologyConfigError(
                f"the adapter was trained on another model ({name}), from which this {kind} differs: {sizes}. "
                "Load it on the model that it was trained for."
            )
        mark = fingerprint(self.model)
        if config.base_fingerprint is not None and mark is not None:
            others.pop("vocab_size", None)  # tokens may have been added, the others are compared
            if not same_base(mark, config.base_fingerprint):
                others = {"input embedding": "another", **others}
        if others:
            warnings.warn(
                f"the adapter was trained on another base ({name}) than this {kind}, which differs: {others}. On a "
                "base that it was not trained for it hides keys at random; load it on its own base or "
                "a fine-tuned form of it.",
                stacklevel=2,
            )

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:
        # PEFT looks at layers_to_transform for suffixes only, not for full names or a regex
        if not (found := check_target_module_exists(peft_config, key)):
            return found  # excluded modules are told from others by its type
        layers = _layers_to_transform(peft_config)
        return layers is None or getattr(self.model.get_submodule(key), "layer_idx", None) in layers

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, TopologyConfig)
        known = getattr(target, CHILD, None)
        layer = TopologyLayer(target, geometry_of(target, current_key)) if known is None else known
        if peft_config.router_input == "heads" and rotates_otherwise(target):
            raise UnsupportedModelError(
                f"router_input must be 'hidden_states' for layer {layer.geometry.layer}, got 'heads': its queries and "
                "keys are turned by a function that cannot be undone here, and a router would read positions"
            )
        layer.update_layer(adapter_name, peft_config, execution_device(target))
        if known is None:  # after what may refuse: a refused module stays as it was
            layer.train(target.training)
            install(target, layer)

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        target_density: float | None = None,
        length: int | None = None,
        dense_until: int | None = None,
    ) -> None:
        """Switch the active (or the named) adapter to the hard path; see `TopologyLayer.merge`.

        Args:
            target_density: in (0, 1]; turns the adapter's dial as `set_density` does, also while it is merged. None
                merges at the depths as they are: a calibrated adapter has a density of its own.
            length: tokens of the texts in which `target_density` is meant; None is the calibrated length.
            dense_until: >= 0; tokens at positions below it see all tokens before them. Up to that length the model runs
                its own dense attention, beyond it the pairs of those first tokens come on top of `target_density`.
                Part of what a merged model is, saved with it, and not of the adapter. None is 0, or where the adapter
                is merged already leaves it as it is.

        Raises:
            MergeError: homotopy below 1, more than one adapter, or with `safe_merge` a weight that is not finite;
                `target_density` without a calibration.
            TopologyConfigError: `target_density` out of range, or below what the deepest map reaches; `length` alone;
                `dense_until` out of range.
        """
        # before any layer changes, so that a refusal leaves no half-merged model
        names = {name for layer in _layers(self.model) for name in layer.check_merge(adapter_names, safe_merge)}
        merged = {name for layer in _layers(self.model) for name in layer.merged_adapters}
        if merged and names != merged:
            raise MergeError(f"adapter {min(merged)!r} is merged already; call unmerge_adapter first")
        self._check_auxiliary(names)
        self._check_dense_until(dense_until)
        self._turn_dial(names, target_density, length)
        if not merged or (target_density is None and dense_until is None):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        self._see_all(names, dense_until)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        target_density: float | None = None,
        length: int | None = None,
        dense_until: int | None = None,
    ) -> nn.Module:
        """The base model with the hard topology and without PEFT; arguments and errors as `merge_adapter`."""
        layers = _layers(self.model)
        names = {
            name for each in layers for name in each.check_merge(each.merged_adapters or adapter_names, safe_merge)
        }
        self._check_auxiliary(names)
        self._check_dense_until(dense_until)
        self._turn_dial(names, target_density, length)
        self._see_all(names, dense_until)
        return super().merge_and_unload(progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)

    @staticmethod
    def _check_dense_until(dense_until: int | None) -> None:
        if dense_until is not None:
            TopologyConfig._check_int("dense_until", dense_until, 0)

    def _see_all(self, names: set[str], dense_until: int | None) -> None:
        for layer in _layers(self.model):
            if dense_until is not None and names & set(layer.topo_routers):
                layer.dense_until = dense_until

    def _check_auxiliary(self, names: set[str]) -> None:
        for name in names:
            auxiliary.check_merged(self.model, name, self._topologies())

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """PEFT's, which would take the trained modules of other methods' adapters out of force."""
        theirs = auxiliary.in_force(self.model, set(self.peft_config) - self._topologies())
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        for wrapper, (name, frozen) in theirs.items():
            wrapper.set_adapter(name, inference_mode=frozen)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for module in self.model.modules():
            layer: Any = getattr(module, CHILD, None)
            if not autocast_adapter_dtype and isinstance(layer, TopologyLayer) and adapter_name in layer.topo_routers:
                router: Any = layer.topo_routers[adapter_name]
                router.round_to(_dtype_of(module))

    def _turn_dial(self, names: set[str], target_density: float | None, length: int | None) -> None:
        if target_density is None and length is not None:
            raise TopologyConfigError(
                f"length says in which texts target_density is meant, got length={length} without target_density"
            )
        for name in names:
            config = self.peft_config[name]
            if target_density is None:
                say_density(config)
            elif config.calibration is None:
                raise MergeError(
                    f"target_density needs a calibrated adapter, got {name!r} without calibration; call "
                    "topo_adapter.calibrate(model, sequences) first"
                )
            else:
                turn_dial([config], target_density, length)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedModelError(
                "adapter_names: one adapter per sample is not supported for topologies; call set_adapter and run the "
                "samples of each adapter apart"
            )
        yield

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            for each in _layers(self.model):
                each.check_merge(each.merged_adapters or adapter_names, safe_merge)
        for module in list(self.model.modules()):
            layer: Any = getattr(module, CHILD, None)
            if not isinstance(layer, TopologyLayer):
                continue
            if merge and not layer.merged_adapters:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            uninstall(module)
            if merge and layer.merged_adapters:
                name = layer.merged_adapters[0]
                router, config = layer.topo_routers[name], layer.topo_configs[name]
                host = MergedTopology(module, layer.geometry, router, config, layer.dense_until)  # type: ignore[arg-type]
                host.train(module.training)
                install(module, host)
        if not hosts(self.model):
            unguard(self.model)
        # other methods' layers in the same model, LoRA for one, are PEFT's to unload
        model = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        if any(isinstance(host, MergedTopology) for host in hosts(model)):
            mark_merged(model)
        return model

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own gives the module the weight of what wrapped it, and not every module has one
        setattr(parent, child_name, new_module)

    # State dict: only our tensors go out, exactly our tensors come in.

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        assert isinstance(config, TopologyConfig)
        config.before_saving()
        own = {key: value for key, value in state_dict.items() if _marker(adapter_name) in key}
        return _AdapterTensors(_as_narrow_as_they_were(own))

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(_marker(adapter_name), f".{cls.prefix}.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        inside = model.state_dict()
        own = {key for key in inside if _marker(adapter_name) in key} | auxiliary.tensors_of(model, adapter_name)
        assert isinstance(config, TopologyConfig)
        try:
            if config.kept_weights is not None:
                state_dict, config.kept_weights = dict(read_tensors(config.kept_weights)), None
            given = {WRAPPER + key.removeprefix(WRAPPER): value for key, value in state_dict.items()}
            if len(given) < len(state_dict):
                raise AdapterFileError(f"each tensor must be given once, got some with and without {WRAPPER!r}")
            base = auxiliary.embedding_tensors(model, inside)
            if all(WRAPPER + key.removeprefix(WRAPPER) in given for key in base):  # PEFT saves all of them or none
                own |= base
            expected = {cls._remove_adapter_name_from_key(key, adapter_name): key for key in own}
            # the wrapper's name is in the file always, in the model only if it is a PeftModel
            expected = {WRAPPER + key.removeprefix(WRAPPER): value for key, value in expected.items()}
            _check_file(adapter_name, {key: inside[value] for key, value in expected.items()}, given)
        except AdapterFileError:
            discard(model, adapter_name)  # or a router with random weights would stay in force
            raise
        for layer in _layers(model):
            layer.unused.discard(adapter_name)
        return {expected[key]: value for key, value in given.items()}


class _AdapterTensors(dict):
    """Takes what PEFT adds: trained modules, resized embeddings; not the copies of the former among the latter."""

    def update(self, tensors: dict[str, Tensor]) -> None:  # type: ignore[override]
        super().update({key: value for key, value in tensors.items() if not auxiliary.of_an_adapter(key)})


def _as_narrow_as_they_were(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Routers' tensors, those of 8-bit routers in 8 bits again: PEFT loads adapters as float32.

    Nothing is rounded: matrices that 8 bits do not hold exactly were trained since, and stay with their biases.
    """

    def exact(value: Tensor, dtype: torch.dtype) -> bool:
        wide = value.dtype if value.itemsize > 1 else torch.float32  # 8-bit numbers compare on few devices
        return not value.is_meta and bool((value.to(dtype).to(wide) == value.to(wide)).all())

    matrices = [value for key, value in tensors.items() if key.endswith("weight")]
    if not all(exact(value, torch.float8_e4m3fn) for value in matrices):
        return tensors
    narrow = {}
    for key, value in tensors.items():
        dtype = torch.float8_e4m3fn if key.endswith("weight") else torch.bfloat16
        narrow[key] = value.to(dtype) if value.itemsize > dtype.itemsize and exact(value, dtype) else value
    return narrow


def _check_file(adapter_name: str, expected: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    missing, unexpected = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or unexpected:
        raise AdapterFileError(
            f"adapter {adapter_name!r} needs exactly its {len(expected)} tensors; the file lacks "
            f"{_some(missing)} and has unexpected {_some(unexpected)}. Check that adapter_config.json and the base "
            "model belong to this file."
        )
    for key, value in given.items():
        if value.shape != expected[key].shape:
            fix = "; give the base the file's number of labels (num_labels) or tokens (resize_token_embeddings)"
            raise AdapterFileError(
                f"{key} must have shape {tuple(expected[key].shape)}, got {tuple(value.shape)}"
                + (fix if f".{CHILD}." not in key else "")
            )
        if not value.is_floating_point():
            raise AdapterFileError(f"{key} must be of a float dtype, got {value.dtype}")
        if not torch.isfinite(value.float()).all():
            raise AdapterFileError(f"{key} must be finite, got NaN or infinity")


def _layers_to_transform(config: PeftConfig) -> set[int] | None:
    layers = getattr(config, "layers_to_transform", None)
    if layers is None:
        return None
    return {layers} if isinstance(layers, int) else set(layers)


def _dtype_of(attention: nn.Module) -> torch.dtype:
    """The dtype of an attention module's own weights; float32 if they are quantized."""
    own = (weight for name, weight in attention.named_parameters() if not name.startswith(f"{CHILD}."))
    return next((weight.dtype for weight in own if weight.is_floating_point() and weight.itemsize > 1), torch.float32)


def _check_model(model: nn.Module, adapter_name: str) -> None:
    if isinstance(model, PeftModel):
        raise UnsupportedModelError(
            f"model must be a transformers model, got a {type(model).__name__} with the adapters "
            f"{sorted(model.peft_config)}, which would not be saved. For LoRA beside a topology call "
            'inject_adapter_in_model(lora_config, base, adapter_name="lora"), then get_peft_model(base, '
            'TopologyConfig(), adapter_name="topology"); or merge_and_unload() the other adapter first.'
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model must be a decoder, got the encoder-decoder {type(model).__name__}: its caches hold no key addresses"
        )
    if any(isinstance(host, MergedTopology) for host in hosts(model)):
        raise UnsupportedModelError(
            "the model carries a merged topology already; load the base model afresh to add another adapter"
        )
    for module in model.modules():
        layer: Any = module
        other = isinstance(layer, BaseTunerLayer) and not isinstance(layer, (TopologyLayer, TrainableTokensLayer))
        if other and adapter_name in layer._all_available_adapter_names():
            raise TopologyConfigError(
                f"adapter_name must be another than that of the adapter in the model ({type(layer).__module__}), got "
                f"{adapter_name!r} for both: one of them would not be saved. Call get_peft_model(base, "
                'TopologyConfig(), adapter_name="topology").'
            )


def _layers_and_heads(heads: dict[int, int]) -> str:
    """'30 layers (0 to 29) of 9 heads'."""
    counts = sorted(set(heads.values()))
    span = f" ({min(heads)} to {max(heads)})" if heads else ""
    return f"{len(heads)} layers{span} of {' or '.join(map(str, counts)) or 'no'} heads"


def _layers(model: nn.Module) -> list[TopologyLayer]:
    return [host for host in hosts(model) if isinstance(host, TopologyLayer)]


def _marker(adapter_name: str) -> str:
    return f".{TopologyModel.prefix}.{adapter_name}."


def _some(keys: list[Any]) -> str:
    return f"{keys[:3]}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}" if keys else "none"
