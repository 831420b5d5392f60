"""The adapters in examples/ fit the bases that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from topo_adapter import TopologyConfig, measure_density

EXAMPLES = sorted(path for path in (Path(__file__).parents[1] / "examples").iterdir() if path.is_dir())
LENGTH, NAME = 400, "adapter_model.safetensors"
#: What the file of an adapter that was saved before `base_facts` leaves out.
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}


@pytest.mark.filterwarnings("ignore:the adapter was trained on another base")  # of random weights
@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda path: path.name)
def test_fits_a_model_of_its_bases_shape(folder: Path, tmp_path: Path) -> None:
    """Every tensor of the file finds its place in a model of random weights, and the merged model runs sparse."""
    facts: dict[str, Any] = TopologyConfig.from_pretrained(folder).base_facts or SMOLLM2
    shape = {key: value for key, value in facts.items() if key not in ("model_type", "vocab_size")}
    small = {"vocab_size": 300, "intermediate_size": 8, "tie_word_embeddings": True}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(facts["model_type"], **shape, **small))
    model = PeftModel.from_pretrained(base, folder)
    model.save_pretrained(tmp_path)  # PEFT loads as float32: the file is not to grow
    first, again = (load_file(where / NAME) for where in (folder, tmp_path))
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name].float(), tensor.float())
    with torch.no_grad():  # what was trained since is not rounded
        next(parameter for name, parameter in model.named_parameters() if "topo_routers" in name).add_(0.013)
    model.save_pretrained(tmp_path / "trained")
    assert all(tensor.dtype == torch.float32 for tensor in load_file(tmp_path / "trained" / NAME).values())
    model = PeftModel.from_pretrained(model.unload(), folder)
    ids = torch.randint(300, (1, LENGTH))
    with torch.no_grad():
        soft = model(input_ids=ids).logits
        model.merge_adapter()
        hard = model(input_ids=ids).logits
    assert torch.isfinite(hard).all() and torch.allclose(soft, hard, atol=1e-4)
    densities = measure_density(model, ids)
    assert len(densities) == facts["num_hidden_layers"]
    assert float(torch.stack(list(densities.values())).mean()) < 0.95
