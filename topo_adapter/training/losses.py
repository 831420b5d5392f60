"""Losses of a causal LM per token, in chunks: no tensor holds the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError

#: Logits of one chunk: 128 MiB in float32, of which a handful are alive at a time.
_CHUNK_LOGITS = 2**25
_IGNORED = -100  # label of a token without a language-model loss, as everywhere in transformers

Head = Callable[[Tensor], Tensor]


def logits_head(base: PreTrainedModel) -> Head:
    """What a causal LM does to its final hidden states `[..., hidden_size]`: logits `[..., V]`, at least float32.

    The output embedding, then `logits_scaling` (Granite), `logit_scale` (Cohere) and `final_logit_softcapping`
    (Gemma) of the model's config.

    Raises:
        UnsupportedModelError: the model has no output embedding.
    """
    embedding = base.get_output_embeddings()
    if embedding is None:
        raise UnsupportedModelError(
            f"model must be a causal LM with an output embedding, got {type(base).__name__}; load it with "
            "AutoModelForCausalLM"
        )
    config = base.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)

    def head(hidden_states: Tensor) -> Tensor:
        logits = embedding(hidden_states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if scale == 1 else logits * scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    return head


def token_losses(
    hidden: Tensor,
    reference: Tensor | None,
    targets: Tensor | None,
    head: Head,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Per token: KL(reference || model) over the vocabulary, and the cross-entropy of a target, in nats.

    The head runs in chunks of tokens, and again in backward: no tensor holds the logits of all tokens.

    Args:
        hidden: `[N, hidden_size]`, final hidden states, differentiable. reference: the dense model's, no gradient
            flows to them; None = KL is 0.
        targets: int64 `[N]`, `-100` = none; None = cross-entropy is 0.
        head: hidden states to logits. chunk: tokens per chunk, >= 1; None keeps a chunk's logits at 128 MiB.

    Returns:
        Two tensors `[N]`, at least float32.
    """

    def losses(hidden: Tensor, reference: Tensor | None, targets: Tensor | None) -> Tensor:
        model = head(hidden).log_softmax(-1)
        divergence = cross_entropy = model.new_zeros(len(hidden))
        if reference is not None:
            with torch.no_grad():
                dense = head(reference).log_softmax(-1)
            divergence = F.kl_div(model, dense, reduction="none", log_target=True).sum(-1)
        if targets is not None:
            cross_entropy = F.nll_loss(model, targets, ignore_index=_IGNORED, reduction="none")
        return torch.stack([divergence, cross_entropy])

    if chunk is None:
        with torch.no_grad():
            chunk = max(1, _CHUNK_LOGITS // head(hidden[:1]).shape[-1])
    found = []
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        part = [None if x is None else x[rows] for x in (hidden, reference, targets)]
        found.append(
            checkpoint(losses, *part, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else losses(*part)  # type: ignore[arg-type]  # hidden is never None
        )
    if not found:  # a batch of padding: a gradient of zero is one still
        nothing = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).sum(-1)
        return nothing, nothing
    divergence, cross_entropy = torch.cat(found, dim=1)
    return divergence, cross_entropy


def next_tokens(labels: Tensor, real: Tensor, position_ids: Tensor | None) -> Tensor:
    """The label each token predicts, `-100` where there is none: at the end, in padding, across packed documents.

    Args:
        labels: int64 `[B, T]`, unshifted, `-100` = no loss. real: bool `[B, T]`, False in padding.
        position_ids: `[B, T]` or None; position 0 begins a document.
    """
    labels = labels.masked_fill(~real, _IGNORED)
    if position_ids is not None:
        labels = labels.masked_fill(position_ids.expand_as(labels) == 0, _IGNORED)
    return F.pad(labels[:, 1:], (0, 1), value=_IGNORED)
