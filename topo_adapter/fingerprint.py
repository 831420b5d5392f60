"""A mark of the base model that an adapter was calibrated on: bases of one shape are easily taken for one another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ENTRIES = 64
#: Cosine similarity of marks below which bases are taken for different ones. Unrelated embeddings have 0 with a
#: standard deviation of 1 / 8; fine-tuning, merging and another dtype leave them nearly as they were.
_SAME = 0.8


def fingerprint(model: nn.Module) -> str | None:
    """64 entries of the input embedding, from its first 256 rows, as signed bytes in hexadecimal.

    None where they cannot be read here: no input embedding, a meta or quantized weight, or one that is sharded.
    """
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        weight = getattr(embedding, "original_module", embedding).weight  # an adapter's trained one is not the base's
    except (AttributeError, NotImplementedError):
        return None
    plain = type(weight.detach()) in (Tensor, nn.Parameter) and weight.dim() == 2 and weight.numel() > 0
    if not plain or weight.is_meta or not weight.is_floating_point():
        return None
    index = torch.arange(_ENTRIES, device=weight.device)
    entries = weight.detach()[4 * index % weight.shape[0], 31 * index % weight.shape[1]].float().cpu()
    largest = entries.abs().amax()
    if not (largest.isfinite() and largest > 0):
        return None
    return bytes((entries / largest * 127).round().to(torch.int8).view(torch.uint8).tolist()).hex()


def same_base(one: str, other: str) -> bool:
    """Whether two marks are of one base, or of one and its fine-tuned form."""
    a, b = (torch.frombuffer(bytearray.fromhex(mark), dtype=torch.int8).float() for mark in (one, other))
    return bool(torch.nn.functional.cosine_similarity(a, b, dim=0) >= _SAME)
