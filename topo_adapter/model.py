"""`TopologyModel`: the PEFT tuner that puts a topology on every full-attention module of a model."""

from __future__ import annotations

from typing import Any

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from .config import TopologyConfig
from .errors import AdapterFileError, TopologyConfigError, UnsupportedModelError
from .layer import CHILD, MergedTopology, TopologyLayer, geometry_of, hosts, install, sliding_window_of, uninstall


class TopologyModel(BaseTuner):
    """Adds a child module `topo_adapter` to each targeted attention module; no module is replaced.

    Usually made by `peft.get_peft_model(model, TopologyConfig())`.

    Raises:
        TopologyConfigError: the config does not fit the model. UnsupportedModelError: a targeted module
            cannot be routed exactly.
    """

    prefix = "topo_routers"
    tuner_layer_cls = TopologyLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        assert isinstance(peft_config, TopologyConfig)
        _check_model(self.model)
        if peft_config.target_modules is None:
            peft_config.target_modules = find_full_attention(self.model)
        if isinstance(peft_config.target_modules, list):
            peft_config.target_modules = set(peft_config.target_modules)  # type: ignore[assignment]  # PEFT's form
        if isinstance(peft_config.visible_depth, dict):
            layers = model_config.get("num_hidden_layers") or model_config.get("text_config", {}).get(
                "num_hidden_layers"
            )
            beyond = [layer for layer in peft_config.visible_depth if layers is not None and layer >= layers]
            if beyond:
                raise TopologyConfigError(f"visible_depth names layers {beyond}, but the model has {layers} layers")
        return peft_config

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
        layer = getattr(target, CHILD, None)
        if layer is None:
            layer = TopologyLayer(target, geometry_of(target, current_key))
            layer.train(target.training)
            install(target, layer)
        elif not isinstance(layer, TopologyLayer):
            raise UnsupportedModelError(
                f"{current_key} carries a merged topology already; load the base model afresh to add another adapter"
            )
        layer.update_layer(adapter_name, peft_config, next(target.parameters()).device)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for layer in _layers(self.model):  # before any layer changes, so that a refusal leaves no half-merged model
            layer.check_merge()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            for each in _layers(self.model):
                each.check_merge(each.merged_adapters or adapter_names)
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
                host = MergedTopology(module, layer.geometry, router, config)  # type: ignore[arg-type]
                host.train(module.training)
                install(module, host)
        # other methods' layers in the same model, LoRA for one, are PEFT's to unload
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

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
        return {key: value for key, value in state_dict.items() if _marker(adapter_name) in key}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(_marker(adapter_name), f".{CHILD}.{cls.prefix}.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        own = {key: value for key, value in model.state_dict().items() if _marker(adapter_name) in key}
        expected = {cls._remove_adapter_name_from_key(key, adapter_name): key for key in own}
        wrapper = "base_model.model."  # in the file always, in the model only if it is a PeftModel
        expected = {wrapper + key.removeprefix(wrapper): value for key, value in expected.items()}
        given = {wrapper + key.removeprefix(wrapper): value for key, value in state_dict.items()}
        missing, unexpected = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
        if missing or unexpected:
            raise AdapterFileError(
                f"adapter {adapter_name!r} needs exactly its {len(expected)} router tensors; the file lacks "
                f"{_some(missing)} and has unexpected {_some(unexpected)}. Check that adapter_config.json and the "
                "base model belong to this file."
            )
        for key, value in given.items():
            shape = own[expected[key]].shape
            if value.shape != shape:
                raise AdapterFileError(f"{key} must have shape {tuple(shape)}, got {tuple(value.shape)}")
            if not torch.isfinite(value).all():
                raise AdapterFileError(f"{key} must be finite, got NaN or infinity")
        return {expected[key]: value for key, value in given.items()}


def find_full_attention(model: Any) -> list[str]:
    """Names of the full-attention modules of the text decoder, as suffixes where a suffix is enough.

    Raises:
        UnsupportedModelError: there is none.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(module) for module in decoder.modules()}
    names = []
    for name, module in model.named_modules():
        causal = getattr(module, "is_causal", False) and isinstance(getattr(module, "layer_idx", None), int)
        if id(module) in inside and causal and hasattr(module, "config") and sliding_window_of(module) is None:
            names.append(name)
    if not names:
        raise UnsupportedModelError(
            f"target_modules: found no full-attention module in {type(model).__name__}; name the modules yourself, or "
            "the model has only sliding-window or linear attention, which the topology cannot make sparser."
        )
    suffixes = {name.rsplit(".", 1)[-1] for name in names}
    matched = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in suffixes]
    return sorted(suffixes) if sorted(matched) == sorted(names) else names


def _check_model(model: nn.Module) -> None:
    if any(isinstance(host, MergedTopology) for host in hosts(model)):
        raise UnsupportedModelError(
            "the model carries a merged topology already; load the base model afresh to add another adapter"
        )


def _layers(model: nn.Module) -> list[TopologyLayer]:
    return [host for host in hosts(model) if isinstance(host, TopologyLayer)]


def _marker(adapter_name: str) -> str:
    return f".{CHILD}.{TopologyModel.prefix}.{adapter_name}."


def _some(keys: list[str]) -> str:
    return f"{keys[:3]}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}" if keys else "none"
