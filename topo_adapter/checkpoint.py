"""Merged models on disk: the base as transformers saves it, the topology beside it, under a model type of their own.

A topology is a mask, not a weight delta, so unlike LoRA it cannot disappear into the weights. The directory holds the
base model, `topology/` with the adapter, and a config.json whose model type is `topo_adapter`: whoever opens it without
this library is told so, and does not get the dense base model.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .card import write_merged_card
from .errors import AdapterFileError, TopologyConfigError, UnsupportedModelError
from .files import newest, replacing
from .fingerprint import fingerprint, same_base
from .layer import CHILD, MergedTopology
from .loading import load

_Mixin: Any = PreTrainedModel if TYPE_CHECKING else object  # it is put before a PreTrainedModel

SUBFOLDER = "topology"
MODEL_TYPE = "topo_adapter"
#: Say in a config which code runs: a file from elsewhere must not choose it, only the caller.
_CHOOSE_CODE = {
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
    *("auto_map", "custom_pipelines"),
}
#: What a merged model's config.json says of itself.
_OWN = ("base_config", "architectures", "dense_until")
_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class MergedModel(_Mixin):
    """Mixed into the class of a model that `merge_and_unload` returns, in place: it saves itself whole."""

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """`save_merged`."""
        save_merged(self, save_directory, **kwargs)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # of `push_to_hub`, which has put the hub's card, or an empty one, over what was saved
        _write_card(self, Path(working_dir), repository=repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)
        return (_blank, (type(self).__mro__[2],), *state)


@functools.cache
def _merged_class(base: Any) -> Any:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (MergedModel, base), names)


def _blank(base: Any) -> Any:
    """An empty instance, for copies and pickles."""
    kind = _merged_class(base)
    return kind.__new__(kind)


def mark_merged(model: Any) -> None:
    """Make a model that carries merged topologies a `MergedModel`; its class keeps its name."""
    if isinstance(model, PreTrainedModel) and not isinstance(model, MergedModel):
        kind: Any = type(model)
        model.__class__ = _merged_class(kind)


def save_merged(model: Any, directory: str | os.PathLike, **kwargs: Any) -> None:
    """Save a model returned by `merge_and_unload()` whole; its own `save_pretrained` does the same.

    What is stopped in the middle leaves the earlier save in the directory, or the new one: never parts of both.

    Args:
        kwargs: go to the base class's `save_pretrained`. A `state_dict` supplies the routers' tensors too.

    Raises:
        UnsupportedModelError: the model carries no merged topology (a PeftModel is saved by its own
            `save_pretrained`), or `push_to_hub` is asked for (call the model's method of that name).
    """
    merged = {name: module for name, module in model.named_modules() if isinstance(module, MergedTopology)}
    if not merged or not isinstance(model, MergedModel):
        raise UnsupportedModelError(
            f"model must come from merge_and_unload() of a topology adapter, got {type(model).__name__} without a "
            "merged topology; save adapters with their own save_pretrained"
        )
    if kwargs.get("push_to_hub"):
        raise UnsupportedModelError(
            "push_to_hub must be False when a merged model is saved, got True: the topology is written after the base; "
            "call model.push_to_hub(repo_id)"
        )
    child, state = f".{CHILD}.", kwargs.pop("state_dict", None)
    state = model.state_dict() if state is None else state
    base = {key: value for key, value in state.items() if child not in key}
    if not kwargs.get("is_main_process", True):
        super(MergedModel, model).save_pretrained(directory, state_dict=base, **kwargs)
        return
    routers = {
        f"base_model.model.{name}.topo_routers.{key}": state[f"{name}.router.{key}"].contiguous().cpu()
        for name, host in merged.items()
        for key in host.router.state_dict()
    }
    with replacing(Path(directory)) as whole:
        super(MergedModel, model).save_pretrained(whole, state_dict=base, **kwargs)
        folder = whole / SUBFOLDER
        folder.mkdir()
        save_file(routers, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = copy.copy(next(iter(merged.values())).topology_config)
        config.inference_mode = True  # as it is once loaded: saving again writes the same
        # what was trained beside the routers is in the base now, its head too
        config.task_type = config.modules_to_save = config.trainable_token_indices = None
        config.write(folder)  # without the card that tells how to load an adapter
        file = whole / "config.json"
        own = json.loads(file.read_text(encoding="utf-8"))
        dense_until = next(iter(merged.values())).dense_until
        about = MergedConfig(base_config=own, dense_until=dense_until, architectures=own.get("architectures"))
        about.to_json_file(file)
        _write_card(model, whole, earlier=Path(directory))


def _write_card(model: Any, folder: Path, **where: Any) -> None:
    host = next(host for host in model.modules() if isinstance(host, MergedTopology))
    write_merged_card(host.topology_config, folder, _is_causal_lm(model), dense_until=host.dense_until, **where)


def _is_causal_lm(model: Any) -> bool:
    """Whether a merged model is the causal LM of its model type."""
    return type(model).__mro__[2] is MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)


class MergedConfig(PreTrainedConfig):
    """config.json of a merged model: the base's, one level down.

    Attributes:
        base_config: the base's config.json.
        dense_until: as `merge_adapter` takes it.
    """

    model_type = MODEL_TYPE
    base_config: dict[str, Any] | None = None
    dense_until: int = 0

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Nothing but the base's config is taken from a file; what the caller asks for is left to the base."""
        own = {name: config_dict[name] for name in _OWN if name in config_dict}
        config = cls(**own)
        return (config, kwargs) if kwargs.pop("return_unused_kwargs", False) else config

    def base(self, **kwargs: Any) -> tuple[PreTrainedConfig, dict[str, Any]]:
        """The base's config, with the caller's settings, and those that it does not know.

        Raises:
            UnsupportedModelError: the file names no model type that this transformers knows.
        """
        fields = _without_code(self.base_config or {})
        kind = fields.get("model_type")
        if kind not in CONFIG_MAPPING:
            raise UnsupportedModelError(
                f"base_config must name a model type of transformers {transformers.__version__}, got {kind!r}; models "
                "of custom code have to be registered with AutoConfig first"
            )
        later = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype", "quantization_config") if name in kwargs}
        config, unused = CONFIG_MAPPING[kind].from_dict(fields, return_unused_kwargs=True, **kwargs)
        return config, {**unused, **later}

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The base's."""
        return self.base()[0].get_text_config(*args, **kwargs)


def _without_code(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_code(each) for name, each in value.items() if name not in _CHOOSE_CODE}
    return [_without_code(each) for each in value] if isinstance(value, list) else value


class MergedCausalLM:
    """What `AutoModelForCausalLM` finds for `MergedConfig`."""

    config_class = MergedConfig

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """`load_merged`. Raises UnsupportedModelError if the base is no causal LM."""
        for name in (
            "adapter_kwargs",
            "trust_remote_code",
        ):  # of the auto class; neither adapters nor code are looked for
            kwargs.pop(name, None)
        model = load_merged(directory, **kwargs)
        if not _is_causal_lm(model):
            raise UnsupportedModelError(
                f"{str(directory)!r} holds a merged {type(model).__name__}, which is not this model type's causal LM; "
                "open it with topo_adapter.load_merged"
            )
        return model


def load_merged(directory: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """Load what `save_merged` wrote, with the class that it was saved from.

    With `import topo_adapter`, `AutoModelForCausalLM.from_pretrained(directory)` does the same for causal LMs. Neither
    follows what the file says of code to run (attention implementations, hub kernels, `auto_map`).

    Args:
        directory: local path or hub id. kwargs: as for the base's `from_pretrained`.

    Raises:
        UnsupportedModelError: no merged model is there, or its base is of a kind that transformers does not know.
        AdapterFileError: nothing is there, its files are damaged, or its topology was not saved with this base.
    """
    hub = {name: kwargs[name] for name in _HUB if kwargs.get(name) is not None}
    directory = newest(Path(directory)) if os.path.isdir(directory) else directory
    try:
        fields, _ = PreTrainedConfig.get_config_dict(directory, **hub)
    except OSError as error:
        raise AdapterFileError(f"{directory} must hold a merged model, got: {error}") from error
    if fields.get("model_type") != MODEL_TYPE:
        raise UnsupportedModelError(
            f"directory must have been written by save_merged, {str(directory)!r} holds a model of type "
            f"{fields.get('model_type')!r}; open it with from_pretrained"
        )
    merged = MergedConfig.from_dict(fields)
    config, kwargs = merged.base(**kwargs)
    try:
        # or transformers only logs what is missing, and raises RuntimeError for what has another size
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = _class_of(merged, config).from_pretrained(directory, config=config, **kwargs)
    except SafetensorError as error:
        raise AdapterFileError(f"{directory} must hold the base in safetensors files, got: {error}") from error
    adapter = load(model, directory, subfolder=SUBFOLDER, **hub)
    own, mark = adapter.peft_config["default"].base_fingerprint, fingerprint(model)
    if own is not None and mark is not None and not same_base(own, mark):
        raise AdapterFileError(
            f"{directory} must hold the base that its topology was merged into, got another one's weights; save the "
            "merged model again"
        )
    for problem in ("missing_keys", "mismatched_keys"):
        if found := sorted(map(str, info[problem])):
            raise AdapterFileError(
                f"{directory} must hold the base that its config.json describes, got {len(found)} {problem}, the first "
                f"{found[:3]}; save the merged model again"
            )
    try:
        return adapter.merge_and_unload(dense_until=merged.dense_until)
    except TopologyConfigError as error:
        raise AdapterFileError(f"{directory} must hold a config.json that save_merged wrote, got: {error}") from error


def _class_of(merged: MergedConfig, config: PreTrainedConfig) -> type[PreTrainedModel]:
    (name, *_) = merged.architectures or [None]
    known = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(known, type) and issubclass(known, PreTrainedModel):
        return known
    registered = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if registered is None or registered.__name__ != name:
        raise UnsupportedModelError(
            f"architectures must name a model class of transformers {transformers.__version__}, got {name!r}"
        )
    return registered


def register_merged() -> None:
    """Make transformers' auto classes know merged models."""
    AutoConfig.register(MODEL_TYPE, MergedConfig, exist_ok=True)
    AutoModelForCausalLM.register(MergedConfig, MergedCausalLM, exist_ok=True)
