"""How often the paths through a merged model choose the same address, in half precision; appends to a file.

    python -m benchmarks.route_agreement --model .models/smollm2-135m --output runs/routes.jsonl

Addresses are an argmax, so rounding differences between kernels may flip some. Attention given pinned routes is
exact (tests/test_kernels.py); this measures the rest: the rate at which unmerged and merged prefill, and merged
prefill and token-by-token decode, agree on the addresses, and what that does to the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, HfArgumentParser

from topo_adapter import TopologyConfig, initialize_routers, record_routes
from topo_adapter.core.records import Records
from topo_adapter.core.tree import digits_to_address
from topo_evaluation import results


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Hub id or local path."})
    text: str = field(default="docs/method.md", metadata={"help": "A text file of at least `length` tokens."})
    length: int = field(default=2048)
    decode: int = field(default=64, metadata={"help": "Tokens decoded one by one after the rest was prefilled."})
    output: str = field(default="runs/route_agreement.jsonl", metadata={"help": "JSON lines; rows are appended."})


def addresses(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """Query and key addresses of every layer, int64 `[layers, 2, H, N]`."""
    routes = record_routes(model, ids)
    rows = [torch.stack([r.query_digits[0], r.key_digits[0]]) for r in routes.values()]
    return digits_to_address(torch.stack(rows), 2)


@torch.no_grad()
def measure(arguments: Arguments, dtype: torch.dtype, device: str) -> dict[str, float]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(device)
    ids = tokenizer(Path(arguments.text).read_text(encoding="utf-8"), return_tensors="pt").input_ids.to(device)
    if ids.shape[1] < arguments.length:
        raise ValueError(f"text must have at least {arguments.length} tokens, got {ids.shape[1]}")
    ids = ids[:, : arguments.length]
    model = get_peft_model(base, TopologyConfig(visible_depth=5)).eval()
    initialize_routers(model, ids)
    model.peft_config["default"].homotopy = 1.0
    unmerged, soft = addresses(model, ids), model(ids, use_cache=False).logits.float()
    model.merge_adapter()
    merged, hard = addresses(model, ids), model(ids, use_cache=False).logits.float()

    cache, split = DynamicCache(), arguments.length - arguments.decode
    logits = [model(ids[:, :split], past_key_values=cache).logits]
    logits += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(split, arguments.length)]
    decoded = torch.cat(logits, 1).float()
    leaves = 2 ** model.peft_config["default"].depth
    records = [Records(layer.indexer_keys, merged.shape[2], leaves).address[0].T for layer in cache.layers]
    kept = torch.stack(records).long()
    tail = slice(split, None)
    return {
        "addresses_unmerged_equal_merged": (unmerged == merged).float().mean().item(),
        "logit_difference_unmerged_merged_mean": (soft - hard).abs().mean().item(),
        "key_addresses_prefill_equal_decode": (merged[:, 1, :, tail] == kept[..., tail]).float().mean().item(),
        "logit_difference_prefill_decode_mean": (hard - decoded)[:, tail].abs().mean().item(),
        "top1_prefill_equal_decode": (hard.argmax(-1) == decoded.argmax(-1))[:, tail].float().mean().item(),
    }


def main(arguments: Arguments) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    origin = results.origin(arguments.model, device)
    settings = {name: getattr(arguments, name) for name in ("text", "length", "decode")}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = measure(arguments, dtype, device)
        row = results.make_row(origin, "route_agreement", {**settings, "dtype": str(dtype)}, found)
        results.append(arguments.output, [row])
        print(dtype, found)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
