"""Models of Llama-3.1-8B's shape with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from .dense import UNMASKED

NAME = "Llama-3.1-8B shape, random weights"


def llama_config(layers: int = 32) -> LlamaConfig:
    """Llama-3.1-8B, with as many layers as asked for."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )


def build(config: LlamaConfig, quantised: bool, device: str = "cuda") -> Any:
    """A model with random weights; `quantised`: linear layers but the head in 4-bit NF4."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    model.requires_grad_(False)
    model.config._attn_implementation = UNMASKED
    if quantised:
        quantise(model)
    return model


def quantise(model: nn.Module) -> None:
    """Replace the decoder's linear layers by bitsandbytes' NF4, one at a time."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                size = child.in_features, child.out_features
                packed = Linear4bit(*size, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
                weight = Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                packed.weight = weight.to(child.weight.device)  # quantises
                setattr(parent, name, packed)
