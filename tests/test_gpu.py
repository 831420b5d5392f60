"""What only a GPU can show: the merged model runs on Triton, and fp16 loss scaling reaches the router."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import topo_kernels
from topo_adapter import TopologyCallback, TopologyConfig, TopologyTrainerMixin, initialize_routers

pytestmark = pytest.mark.gpu


def model_on_gpu(dtype: torch.dtype, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        initializer_range=0.1,
        max_position_embeddings=4096,
    )
    base = LlamaForCausalLM(config).to("cuda", dtype)
    settings = {"depth": 4, "visible_depth": {0: 0, 1: [2, 2, 3, 3], 2: [0, 1, 5, 4]}, "local_window": 32, **settings}
    model = get_peft_model(base, TopologyConfig(**settings)).eval()
    initialize_routers(model, torch.randint(0, 512, (1, 512), device="cuda"))
    model.peft_config["default"].homotopy = 1.0
    return model


@pytest.mark.parametrize("route_per", ["query_head", "kv_head"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_merged_is_unmerged(route_per: str, padded: bool) -> None:
    """float32, so that no address flips: what is left is rounding."""
    model = model_on_gpu(torch.float32, route_per=route_per)
    ids = torch.randint(0, 512, (2, 1500), device="cuda")
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :333] = 0
    with model.disable_adapter():
        dense = model(ids, attention_mask=mask).logits
    soft = model(ids, attention_mask=mask, use_cache=False).logits
    model.merge_adapter()
    with mock.patch.object(topo_kernels, "topology_attention", wraps=topo_kernels.topology_attention) as kernel:
        hard = model(ids, attention_mask=mask, use_cache=False).logits
    assert kernel.call_count == (3 if padded else 2)  # a plain layer of depth 0 is dense: SDPA's
    real = mask.bool()
    assert hard.isfinite().all()
    assert (soft - hard)[real].abs().max() < 1e-3
    assert (soft - dense)[real].abs().max() > 0.1  # the mask bites: agreement above is not agreement with dense


@torch.no_grad()
def test_decode_is_prefill() -> None:
    model = model_on_gpu(torch.float32)
    model.merge_adapter()
    prompt = torch.randint(0, 512, (1, 300), device="cuda")
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
    greedy = model(out, use_cache=False).logits.argmax(-1)
    assert torch.equal(greedy[:, 299:-1], out[:, 300:])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_scales_the_auxiliary_loss(tmp_path: Path, precision: str) -> None:
    """The auxiliary loss outweighs the LM loss here; without the fp16 factor of 65,536 it would vanish."""

    class AuxiliaryOnly(TopologyTrainerMixin, Trainer):
        pass

    class FullWeight(TopologyCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            pass

    def update(**settings: Any) -> torch.Tensor:
        model = model_on_gpu(torch.float32, gumbel_noise=False, density_weight=100.0, visible_depth=2)
        model.peft_config["default"].homotopy = 0.0
        ids = torch.randint(0, 512, (64,), generator=torch.Generator().manual_seed(3))
        rows = [{"input_ids": ids, "labels": ids} for _ in range(4)]
        args = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            **settings,
        )
        before = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "topo_routers" in n])
        AuxiliaryOnly(model=model, args=args, train_dataset=rows, callbacks=[FullWeight()]).train()
        return before - torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "topo_routers" in n])

    exact, mixed = update(), update(**{precision: True})
    assert exact.norm() > 0
    assert (mixed - exact).norm() < 0.1 * exact.norm()
