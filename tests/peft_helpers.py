"""Tiny models of several families, and a stranger's attention to check ours against.

The stranger imports nothing from `topo_adapter`: docs/method.md section 2 is written down here a second time, and
the attention around it is the textbook's. It needs `record_routes` for the digits and nothing else.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from topo_adapter import TopologyConfig

#: Its tables are written by the tests that they are of.
DOCUMENT = Path(__file__).parents[1] / "docs" / "peft.md"
VOCAB = 61
LAYERS = 4
HEADS, KV_HEADS = 4, 2

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_MIXED = ["sliding_attention", "full_attention"] * (LAYERS // 2)

FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": lambda **kw: LlamaConfig(**{**_SIZES, **kw}),
    "mistral": lambda **kw: MistralConfig(**{**_SIZES, "sliding_window": None, **kw}),
    "qwen2": lambda **kw: Qwen2Config(**{**_SIZES, **kw}),
    "qwen3": lambda **kw: Qwen3Config(**{**_SIZES, "head_dim": 16, **kw}),
    "gemma2": lambda **kw: Gemma2Config(
        **_SIZES,
        head_dim=16,
        sliding_window=6,
        layer_types=_MIXED,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=7,
        attn_implementation="eager",  # transformers' sdpa refuses the soft cap
        **kw,
    ),
    "gemma3": lambda **kw: Gemma3TextConfig(
        **_SIZES, head_dim=16, sliding_window=6, layer_types=_MIXED, query_pre_attn_scalar=7, **kw
    ),
    "phi3": lambda **kw: Phi3Config(**{**_SIZES, **kw}),
}
#: Layers that a default `TopologyConfig` routes: the full-attention ones.
ROUTED = {name: [1, 3] if name in ("gemma2", "gemma3") else list(range(LAYERS)) for name in FAMILIES}


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **kwargs: Any) -> PreTrainedModel:
    """A random model whose attention is peaked enough for a mask to matter, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**kwargs)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.normal_(std=1.5 / weight.shape[1] ** 0.5)
    return model.to(dtype)


def documented(text: str, name: str, table: str) -> str:
    """The text of a document with a table between its marks of that name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    head, _, rest = text.partition(begin)
    return f"{head}{begin}{table}\n{end}{rest.partition(end)[2]}"


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids `[batch, length]` without the padding token."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def randomise_routers(model: nn.Module, seed: int = 0, adapter_name: str = "", std: float = 1.0) -> None:
    """Give every router weight, of one adapter or of all, a normal value, so that digits are diverse."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if f".topo_routers.{adapter_name}" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * std / weight.shape[-1] ** 0.5)


def routed(base: PreTrainedModel, seed: int = 0, adapter_name: str = "default", **settings: Any) -> PeftModel:
    """`base` with a topology adapter of small, biting settings and diverse random routers, in evaluation mode."""
    defaults: dict[str, Any] = {
        "depth": 4,
        "visible_depth": 2,
        "router_dim": 8,
        "local_window": 3,
        "num_sink_tokens": 2,
        "homotopy": 1.0,
    }
    model = get_peft_model(base, TopologyConfig(**{**defaults, **settings}), adapter_name=adapter_name)
    randomise_routers(model, seed)
    return model.eval()


@torch.no_grad()
def logits_of(model: nn.Module, input_ids: Tensor, **kwargs: Any) -> Tensor:
    """Logits, checked to be finite."""
    logits = model(input_ids=input_ids, **{"use_cache": False, **kwargs}).logits
    assert torch.isfinite(logits).all()
    return logits


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def twin(model: nn.Module) -> Any:
    """A copy with modules of its own and the same parameter objects: real weights take a gigabyte."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def assert_same_weights(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype and torch.equal(after[key], value), key


def loss_of(model: nn.Module, input_ids: Tensor, **kwargs: Any) -> Tensor:
    loss = model(input_ids=input_ids, labels=input_ids, **kwargs).loss
    assert torch.isfinite(loss)
    return loss


def router_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if ".topo_routers." in name}


def router_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of all routers, checked to exist, to be finite and not all zero."""
    gradients = {name: weight.grad for name, weight in router_parameters(model).items()}
    assert gradients
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
    assert sum(float(g.abs().sum()) for g in gradients.values()) > 0
    return gradients


# ---------------------------------------------------------------- the stranger

_STRANGER = "stranger"
_in_use: dict[str, Any] = {}


class Stranger:
    """A base model that runs section 2's mask, written from the page.

    Args:
        base: plain transformers model; the stranger gets a copy that shares its weights.
        window, sinks: the two settings the mask needs beside the routes. arity: for visits after the first.
    """

    def __init__(self, base: PreTrainedModel, window: int, sinks: int, arity: int = 2) -> None:
        self.model = twin(base).eval()
        self.model.config._attn_implementation = _STRANGER
        self.window, self.sinks, self.arity = window, sinks, arity

    @contextlib.contextmanager
    def attending(
        self,
        records: dict[int, Any],
        padding: Tensor | None = None,
        documents: Tensor | None = None,
        *,
        batch: int = 1,
        length: int = 0,
        **change: int,
    ) -> Iterator[PreTrainedModel]:
        """The model while it attends to what `records` (of `record_routes`) make visible.

        Args:
            padding: `[B, T]`, 0 marks padding. documents: `[B, T]`, labels of packed documents.
            change: `window`, `sinks`, `dense_until`, or `depth` (added to every visible depth).
        """
        if records:
            batch, _, length, _ = next(iter(records.values())).query_digits.shape
        real = torch.ones(batch, length, dtype=torch.bool) if padding is None else padding.bool()
        documents = torch.zeros(batch, length, dtype=torch.long) if documents is None else documents
        window, sinks = change.get("window", self.window), change.get("sinks", self.sinks)
        causal, position, sink = _real_pairs(real, documents, sinks)
        gap = position[:, :, None] - position[:, None, :]
        near = (gap < window) | (position < change.get("dense_until", 0))[:, :, None]
        masks = {
            layer: _visible(record, causal, near, sink, change.get("depth", 0), self.arity)
            for layer, record in records.items()
        }
        _in_use.update(masks=masks, causal=causal, gap=gap)
        try:
            yield self.model
        finally:
            _in_use.clear()

    def logits(
        self,
        input_ids: Tensor,
        records: dict[int, Any],
        padding: Tensor | None = None,
        documents: Tensor | None = None,
        position_ids: Tensor | None = None,
        **change: int,
    ) -> Tensor:
        """Logits of whole sequences; arguments as `attending`."""
        with self.attending(records, padding, documents, **change) as model:
            return logits_of(model, input_ids, position_ids=position_ids)


def _real_pairs(real: Tensor, documents: Tensor, sinks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Causal pairs `[B, T, T]`, positions `[B, T]` and sink pairs, counted token by token over real tokens."""
    batch, length = real.shape
    position = torch.full((batch, length), -1)
    for b in range(batch):
        seen: dict[int, int] = {}
        for t in range(length):
            if real[b, t]:
                document = int(documents[b, t])
                position[b, t] = seen.get(document, 0)
                seen[document] = seen.get(document, 0) + 1
    index = torch.arange(length)
    causal = (index[:, None] >= index) & real[:, :, None] & real[:, None, :]
    causal &= documents[:, :, None] == documents[:, None, :]
    return causal, position, (position < sinks)[:, None, :].expand_as(causal)


def _visible(record: Any, causal: Tensor, near: Tensor, sink: Tensor, deeper: int, arity: int) -> Tensor:
    """`[B, H, T, T]`: causal and (same first D digits as one of the visits, or near, or a sink)."""
    heads = []
    for h, depth in enumerate(record.visible_depth.tolist()):
        levels = record.query_digits.shape[-1]
        seen = near | sink
        for number, leaf in enumerate(record.visits[:, h].unbind(1)):
            same = torch.full_like(causal, depth + deeper <= levels)  # nothing is below the leaves
            same &= (leaf >= 0)[:, :, None]
            for level in range(max(0, min(depth + deeper, levels))):
                digit = leaf // arity**level % arity if number else record.query_digits[:, h, :, level]
                same &= digit[:, :, None] == record.key_digits[:, h, None, :, level]
            seen = seen | same
        heads.append(causal & seen)
    return torch.stack(heads, 1)


def _stranger_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    visible = _in_use["masks"].get(module.layer_idx)
    if visible is None:  # a layer without routes: what the base does
        visible = _in_use["causal"][:, None]
        if sliding_window is not None:
            visible = visible & (_in_use["gap"] < sliding_window)[:, None]
    repeats = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(repeats, 1).transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    probs = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num()  # rows of padding see nothing
    return (probs @ value.repeat_interleave(repeats, 1)).transpose(1, 2), None


AttentionInterface.register(_STRANGER, _stranger_attention)
