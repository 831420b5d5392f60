"""What an adapter trains beside its routers, in PEFT's own wrappers: whole modules (`modules_to_save`), embeddings of
single tokens (`trainable_token_indices`); and resized embeddings, which PEFT saves with an adapter."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .config import TopologyConfig
from .errors import AdapterFileError, MergeError, TopologyConfigError, UnsupportedModelError

#: Task type -> the names of new heads that PEFT trains for it.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
#: In the keys of tensors that are an adapter's own, and have keys without its name in the adapter's file.
_OF_ADAPTERS = (".modules_to_save.", ".trainable_tokens_delta.")


def wrappers(model: nn.Module) -> dict[str, Any]:
    """PEFT's wrappers of modules that adapters train, of any method, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)}


def complete(model: nn.Module, config: TopologyConfig, others: set[str]) -> None:
    """Add the heads of the task to `config.modules_to_save`, and check what is to be trained before it is wrapped.

    Args:
        others: names of the adapters of other methods in the model.

    Raises:
        TopologyConfigError: a module or token that is not in the model. UnsupportedModelError: a module that an adapter
            of another method trains already.
    """
    given, heads = config.modules_to_save or [], _HEADS.get(config.task_type, ())
    # PEFT adds the heads to the user's object, for some tasks only after the adapter has its copy of it
    config.modules_to_save = list(dict.fromkeys([*given, *heads])) or None
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    absent = [name for name in given if name not in heads and not _matched(names, [name])]
    if absent:
        raise TopologyConfigError(
            f"modules_to_save must name modules of the model, got {absent}, which {type(model).__name__} does not have"
        )
    if heads and not _matched(names, config.modules_to_save or []):
        raise TopologyConfigError(
            f"task_type {str(getattr(config.task_type, 'value', config.task_type))!r} trains a new head named "
            f"{' or '.join(heads)}, which {type(model).__name__} does not have; name its head in modules_to_save, or "
            "leave task_type out"
        )
    embeddings = _token_embeddings(model, names, config)
    for name, wrapper in wrappers(model).items():
        taken = sorted(wrapper._get_available_adapters() & others)
        if taken and (_matched([name], config.modules_to_save or []) or name in embeddings):
            raise UnsupportedModelError(
                f"modules_to_save: {name!r} is trained by the adapter {taken[0]!r} of another method already, and one "
                "of the two would be without effect; merge_and_unload() that adapter first, or leave the module to it"
            )


def _matched(names: Iterable[str], targets: Iterable[str]) -> list[str]:
    """The modules that PEFT would wrap: their names end with a target."""
    return [name for name in names if any(name.endswith(target) for target in targets)]


def _token_embeddings(model: Any, names: list[str], config: TopologyConfig) -> set[str]:
    """The modules of `trainable_token_indices`. Raises TopologyConfigError if one is absent or has too few rows."""
    given = config.trainable_token_indices
    if given is None:
        return set()
    if not isinstance(given, dict):
        own = model.get_input_embeddings()
        given = {next(name for name, module in model.named_modules() if module is own): given}
    found: set[str] = set()
    for target, tokens in given.items():
        matched = _matched(names, [target])
        if not matched:
            raise TopologyConfigError(
                f"trainable_token_indices must name embeddings of the model, got {target!r}, which "
                f"{type(model).__name__} does not have"
            )
        for name in matched:
            rows = model.get_submodule(name).weight.shape[0]
            if max(tokens) >= rows:
                raise TopologyConfigError(
                    f"trainable_token_indices must be below the {rows} rows of {name!r}, got {max(tokens)}; call "
                    "model.resize_token_embeddings first"
                )
        found |= set(matched)
    return found


def refuse_overlap(model: nn.Module, config: TopologyConfig, routed: Iterable[str]) -> None:
    """Check that no routed module is, or is inside, one of `modules_to_save`.

    Raises:
        TopologyConfigError: one is: its router would be copied with it, and be trained twice.
    """
    names = _matched([name for name, _ in model.named_modules()], config.modules_to_save or [])
    for whole in names:
        inside = [name for name in routed if name == whole or name.startswith(f"{whole}.")]
        if inside:
            raise TopologyConfigError(
                f"modules_to_save: {whole!r} cannot be trained whole while {inside[0]!r} is routed; add it to "
                "exclude_modules, or take it out of modules_to_save"
            )


def check_file(model: nn.Module, config: TopologyConfig, given: Collection[str]) -> None:
    """Check that a file holds what the config trains beside the routers: PEFT looks for it once all is attached.

    Args:
        given: names of the file's tensors, without the wrapper's.

    Raises:
        AdapterFileError: it lacks some of it.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    wanted = {
        f"{name}.{key}"
        for name in _matched(modules, config.modules_to_save or [])
        for key in getattr(modules[name], "original_module", modules[name]).state_dict()
    }
    embeddings = _token_embeddings(model, list(modules), config)
    rows = {f"{name}.token_adapter.trainable_tokens_delta" for name in embeddings}
    # of tied embeddings one has the rows
    absent = wanted - set(given) | (rows if rows.isdisjoint(given) else set())
    if absent:
        raise AdapterFileError(
            f"the adapter's file must hold the tensors that its config trains beside the routers (modules_to_save "
            f"{config.modules_to_save}, trainable_token_indices), got none for {sorted(absent)[:3]}; check that "
            "adapter_config.json belongs to the file"
        )


def in_force(model: nn.Module, names: set[str]) -> dict[Any, tuple[str, bool]]:
    """The wrappers in which one of the adapters `names` is active, which one, and whether it is frozen."""
    return {
        wrapper: (min(active), not any(weight.requires_grad for weight in wrapper.parameters()))
        for wrapper in wrappers(model).values()
        if (active := names & set(wrapper.active_adapters))
    }


def tensors_of(model: nn.Module, adapter_name: str) -> set[str]:
    """Names, in the model's state dict, of what an adapter trains beside its routers."""
    return {
        f"{name.removeprefix('_fsdp_wrapped_module.')}.{key}"
        for name, wrapper in wrappers(model).items()
        if adapter_name in wrapper._get_available_adapters()
        for key in wrapper.adapter_state_dict_load_map(adapter_name).values()
    }


def embedding_tensors(model: Any, keys: Iterable[str]) -> set[str]:
    """Names, among those of the state dict, of the base's embedding tensors, which PEFT saves if they were resized."""
    if not hasattr(model, "get_input_embeddings"):
        return set()
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if any(module is each for each in layers))
    return {key for key in keys if key.startswith(prefixes) and not of_an_adapter(key)}


def of_an_adapter(key: str) -> bool:
    """Whether a tensor of the state dict is an adapter's copy, and not the base's."""
    return any(part in key for part in _OF_ADAPTERS)


def check_merged(model: nn.Module, adapter_name: str, topologies: set[str]) -> None:
    """Check that the modules in force are those of the adapter that is to be merged.

    Args:
        topologies: names of the model's topology adapters.

    Raises:
        MergeError: they are another adapter's.
    """
    for name, wrapper in wrappers(model).items():
        wanted = {adapter_name} & wrapper._get_available_adapters()
        if set(wrapper.active_adapters) & topologies != wanted:
            raise MergeError(
                f"adapter {adapter_name!r} must be active to be merged, because it or another adapter trains {name!r}: "
                f"call set_adapter({adapter_name!r}) first"
            )


def discard(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter's modules out of the model; where it was the last one, the wrapper too."""
    for name, wrapper in wrappers(model).items():
        if adapter_name in wrapper._get_available_adapters():
            wrapper.delete_adapter(adapter_name, [name for name in wrapper.active_adapters if name != adapter_name])
            if not wrapper._get_available_adapters():
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, wrapper.original_module)
