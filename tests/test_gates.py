"""What transformers can hand an attention module, or ask of it: each thing is honoured or refused, none is guessed."""

import ast
import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model
from peft_helpers import logits_of, randomise_routers, routed, tiny, tokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

import topo_adapter.hf.gates
from topo_adapter import CacheError, TopologyConfig, UnsupportedModelError
from topo_adapter.forward import arrive

BITING: dict[str, Any] = {"depth": 4, "visible_depth": 2, "router_dim": 8, "local_window": 3, "num_sink_tokens": 2}
FULL, SLIDING = "full_attention", "sliding_attention"
IDS = tokens(2, 24)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    temperature_per_head: Any = None,
    **kwargs: Any,
) -> Any:
    """Of the attention modules that this file defines; it is looked for under this name beside them."""
    return transformers.models.llama.modeling_llama.eager_attention_forward(
        module, query, key, value, attention_mask, scaling, **kwargs
    )


# ---------------------------------------------------------------- the lists: what transformers' sources name

#: Arguments of the forwards of attention modules.
HONOURED = {"hidden_states", "attention_mask", "position_ids", "cache", "past_key_values", "layer_past"}
#: Act on hidden states, queries or keys before the topology sees them, or on nothing.
BEFORE_ATTENTION = {"position_embeddings", "attention_scaling", "conv_mask", "use_cache", "codebook_idx"}
#: Handed to every layer; those that read keys from it borrow them, and are left alone.
SHARED_KEYS = {"shared_kv_states"}
REFUSED_AT_ATTACH = topo_adapter.hf.gates._LOOPS
REFUSED_AT_RUN = {*topo_adapter.hf.gates._NOT_OWN_KEYS, "output_attentions"}
#: Of modules that are no text decoder's attention: vision towers, residual mixers, another library's attention.
OF_OTHER_MODULES = {"cu_seqlens", "max_seqlen", "freqs_ci", "block_states", "partial_block_states", "q", "k", "v"}


@functools.cache
def attention_forwards() -> list[ast.FunctionDef]:
    """Forwards that dispatch through the attention interface, in the files of every causal LM of this transformers."""
    models = Path(transformers.__file__).parent / "models"
    folders = {models / model_type_to_module_name(kind) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    found = []
    for file in sorted(file for folder in folders for file in folder.glob("modeling_*.py")):
        source = file.read_text(encoding="utf-8")
        if "ALL_ATTENTION_FUNCTIONS" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name == "forward":
                names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
                if "ALL_ATTENTION_FUNCTIONS" in names:
                    found.append(node)
    return found


def test_every_argument_of_an_attention_module_is_known() -> None:
    """Fails on a transformers that hands its attention modules something new: decide what it is, then name it here."""
    found = {each.arg for node in attention_forwards() for each in [*node.args.args[1:], *node.args.kwonlyargs]}
    assert {"hidden_states", "attention_mask", "layer_past"} < found and {"cache", "past_key_values"} & found
    known = HONOURED | BEFORE_ATTENTION | SHARED_KEYS | REFUSED_AT_ATTACH | REFUSED_AT_RUN | OF_OTHER_MODULES
    assert found - known == set()


def test_every_argument_of_an_attention_function_is_known() -> None:
    calls = [node for forward in attention_forwards() for node in ast.walk(forward) if isinstance(node, ast.Call)]
    interface = [node for node in calls if isinstance(node.func, ast.Name) and "attention" in node.func.id]
    passed = {keyword.arg for node in interface for keyword in node.keywords if keyword.arg}
    assert {"scaling", "dropout", "softcap", "sliding_window", "s_aux"} < passed
    only_flash_reads = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    known = topo_adapter.hf.gates._MODELLED | topo_adapter.hf.gates._NOT_MODELLED | only_flash_reads
    assert passed - known == set()


# ---------------------------------------------------------------- caches, under any name


def gpt(kind: str, **settings: Any) -> PreTrainedModel:
    """A tiny model of one of the GPT families, whose attention is far from uniform."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {
        "vocab_size": 61,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    config = CONFIG_MAPPING[kind](**sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=1.5 / weight.shape[1] ** 0.5)
    return model


GPTS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: gpt("gpt2"),
    "gpt_neox": lambda: gpt("gpt_neox", hidden_dropout=0.0, attention_dropout=0.0),
    "gpt_bigcode": lambda: gpt("gpt_bigcode"),
    "gpt_bigcode of many": lambda: gpt("gpt_bigcode", multi_query=False),
    "llama": lambda: tiny("llama", torch.float64),
}


@torch.no_grad()
def in_chunks(model: nn.Module, ids: Tensor, sizes: list[int], cache: Cache) -> Tensor:
    return torch.cat([model(input_ids=part, past_key_values=cache).logits for part in ids.split(sizes, 1)], 1)


@pytest.mark.parametrize("kind", list(GPTS))
@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_decode_is_prefill_whatever_the_cache_is_called(kind: str, merged: bool) -> None:
    base = GPTS[kind]()
    model = routed(base)
    if merged:
        model.merge_adapter()
    whole = logits_of(model, IDS)
    with model.disable_adapter():
        assert (whole - logits_of(model, IDS)).abs().max() > 0.1, "the topology must bite"
    for cache in (DynamicCache(), StaticCache(config=base.config, max_cache_len=32)):
        torch.testing.assert_close(in_chunks(model, IDS, [15, 1, 1, 5, 2], cache), whole, rtol=0, atol=1e-5)
    out = model.generate(input_ids=IDS[:, :16], max_new_tokens=6, do_sample=False)
    plain = model.generate(input_ids=IDS[:, :16], max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(out, plain)


class Renamed(LlamaAttention):
    """Llama's attention in a transformers to come: what was the cache is called `memory`.

    `change` is what it does to its mask, `drop` that it keeps its keyword arguments to itself.
    """

    change: Any = staticmethod(lambda mask, length: mask)
    drop = False

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        memory: Any = None,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (each(hidden_states).view(shape).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if memory is not None:
            k, v = (memory.inside if isinstance(memory, Box) else memory).update(k, v, self.layer_idx)
        attention_mask = self.change(attention_mask, k.shape[2])
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        kwargs = {} if self.drop else kwargs
        out, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


class Box:
    """Not a cache to look at."""

    def __init__(self, inside: Cache) -> None:
        self.inside = inside


def of_the_future(boxed: bool = False, by_position: bool = False, **attributes: Any) -> PreTrainedModel:
    """A tiny Llama with such modules; the cache comes in a box, or by position."""
    base = tiny("llama", torch.float64)

    def rename(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        cache = kwargs.pop("cache", kwargs.pop("past_key_values", None))
        memory = Box(cache) if boxed and cache is not None else cache
        if by_position:
            return (kwargs.pop("hidden_states"), memory), kwargs
        return args, {**kwargs, "memory": memory}

    for module in base.modules():
        if isinstance(module, LlamaAttention):
            module.__class__ = Renamed
            for name, value in attributes.items():
                setattr(module, name, value)
            module.register_forward_pre_hook(rename, with_kwargs=True)
    return base


@pytest.mark.parametrize("by_position", [False, True])
def test_a_cache_is_found_by_what_it_is(by_position: bool) -> None:
    model = routed(of_the_future(by_position=by_position))
    whole = logits_of(model, IDS)
    torch.testing.assert_close(whole, logits_of(routed(tiny("llama", torch.float64)), IDS))
    for _ in range(2):
        torch.testing.assert_close(in_chunks(model, IDS, [15, 1, 6, 2], DynamicCache()), whole, rtol=0, atol=1e-5)
        model.merge_adapter()


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_keys_that_nobody_addressed_are_an_error(merged: bool) -> None:
    model = routed(of_the_future(boxed=True))
    if merged:
        model.merge_adapter()
    cache = DynamicCache()
    in_chunks(model, IDS[:, :8], [8], cache)  # as many keys as tokens: nothing to see yet
    with pytest.raises(CacheError, match="1 queries to 9 keys, but the topology has addresses for 1 and 1"):
        in_chunks(model, IDS[:, 8:9], [1], cache)


@pytest.mark.parametrize("other", [(), "paged", object()])
def test_another_kind_of_cache_is_an_error(other: Any) -> None:
    host = routed(tiny()).base_model.model.model.layers[0].self_attn.topo_adapter
    hidden = torch.zeros(1, 4, 32)
    for name in ("cache", "past_key_values", "layer_past"):
        with torch.no_grad(), pytest.raises(CacheError, match=f"{name} must be a DynamicCache or StaticCache"):
            arrive(host, hidden, {"hidden_states": hidden, name: other})
    with torch.no_grad(), pytest.raises(CacheError, match="one key-value cache"):
        arrive(host, hidden, {"hidden_states": hidden, "a": DynamicCache(), "b": DynamicCache()})
    with torch.no_grad(), pytest.raises(CacheError, match="EncoderDecoderCache"):
        both = EncoderDecoderCache(DynamicCache(), DynamicCache())
        arrive(host, hidden, {"hidden_states": hidden, "cache": both})


def test_continuous_batching_refuses_where_it_is_called() -> None:
    model = routed(tiny())
    for each in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model).merge_and_unload()):
        with pytest.raises(UnsupportedModelError, match="continuous batching"):
            each.generate_batch([[5, 6, 7]], max_new_tokens=2)
    assert "init_continuous_batching" not in model.unload().__dict__


# ---------------------------------------------------------------- masks


def dense_at_depth_0(base: PreTrainedModel, merged: bool) -> PeftModel:
    """A topology in force that hides nothing: it must be the base, whatever it is given."""
    model = routed(copy.deepcopy(base), visible_depth=0)
    if merged:
        model.merge_adapter()
    return model


@pytest.mark.parametrize("attribute", [False, True], ids=["bias", "shorter"])
def test_a_mask_that_the_module_changes_is_an_error(attribute: bool) -> None:
    """As Doge's does: a learned bias, added after everything that a hook can see."""
    change = (lambda mask, length: mask[..., 1:, :]) if attribute else (lambda mask, length: mask - 0.5)
    base = of_the_future(change=change)
    base.set_attn_implementation("eager")
    for merged in (False, True):
        with pytest.raises(UnsupportedModelError, match="Renamed changes it"):
            logits_of(dense_at_depth_0(base, merged), IDS)


def test_a_view_of_the_masks_first_columns_is_the_mask() -> None:
    base = of_the_future(change=lambda mask, length: mask[:, :, :, :length])
    base.set_attn_implementation("eager")
    model, padding = routed(base), torch.ones_like(IDS)
    padding[1, :5] = 0
    expected = logits_of(routed(tiny("llama", torch.float64)), IDS, attention_mask=padding)
    out = logits_of(model, IDS, attention_mask=padding)
    torch.testing.assert_close(out[padding.bool()], expected[padding.bool()])


def test_a_module_that_loses_its_arguments_is_an_error() -> None:
    base = of_the_future(drop=True)
    for homotopy in (0.0, 1.0):  # at 0 the base would run, and the topology later be lost without a word
        with pytest.raises(UnsupportedModelError, match="must pass its keyword arguments on"):
            model = routed(copy.deepcopy(base), homotopy=homotopy).train()
            model(input_ids=IDS)


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("bias", [-1.0, -1e-6])
def test_masks_that_hold_biases_are_refused(merged: bool, bias: float) -> None:
    base = tiny("llama", torch.float64)
    length = IDS.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(2, 1, length, length, dtype=torch.float64).masked_fill(~causal, float("-inf"))
    model = dense_at_depth_0(base, merged)
    torch.testing.assert_close(logits_of(model, IDS, attention_mask=mask), logits_of(base, IDS))
    mask[..., causal.tril(-1)] = bias
    with pytest.raises(UnsupportedModelError, match="biases"):
        logits_of(model, IDS, attention_mask=mask)


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("use_cache", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize(
    "positions",
    [
        torch.arange(24) // 2,
        torch.cat([torch.arange(12), torch.arange(60, 72)]),
        torch.arange(24) * 2,
        torch.arange(50, 74),
    ],
    ids=["Self-Extend", "gap", "strided", "offset"],
)
def test_positions_of_one_text_are_the_bases(positions: Tensor, use_cache: bool, merged: bool) -> None:
    """With a cache the base takes any positions for one text; so it does beside a mask of ones without one."""
    base = tiny("llama", torch.float64)
    model, inputs = dense_at_depth_0(base, merged), {"position_ids": positions[None], "use_cache": use_cache}
    if not use_cache:
        inputs["attention_mask"] = torch.ones_like(IDS)
    torch.testing.assert_close(logits_of(model, IDS, **inputs), logits_of(base, IDS, **inputs))
    if use_cache:
        cache = DynamicCache()
        with torch.no_grad():
            parts = [
                model(input_ids=IDS[:, s], position_ids=positions[None, s], past_key_values=cache).logits
                for s in (slice(0, 9), slice(9, 17), slice(17, 24))
            ]
        torch.testing.assert_close(
            torch.cat(parts, 1), logits_of(base, IDS, position_ids=positions[None], use_cache=True)
        )


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_buffers_that_are_used_again_are_read_again(context: Any, merged: bool) -> None:
    """Decode loops of one's own keep one mask, and one tensor of positions, and write into them."""
    base = tiny("llama", torch.float64)
    model, length = dense_at_depth_0(base, merged), IDS.shape[1]
    with context():
        mask = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
        positions = torch.arange(length)[None].clone()
        for first in (0, 5):
            mask[..., :first] = False
            for inputs in ({"attention_mask": mask}, {"position_ids": positions, "use_cache": True}):
                out, expected = (each(input_ids=IDS, **inputs).logits for each in (model, base))
                torch.testing.assert_close(out[:, first:], expected[:, first:])
            positions[:, 9:] = torch.arange(length - 9)
            positions[:, 9:] += 9  # and back: what torch counts has changed, or nothing in inference mode


def test_flash_tells_documents_by_cumulated_lengths() -> None:
    host = routed(tiny()).base_model.model.model.layers[0].self_attn.topo_adapter
    hidden, ends = torch.zeros(1, 6, 32), torch.tensor([0, 2, 6], dtype=torch.int32)
    inputs = {"hidden_states": hidden, "cu_seq_lens_q": ends, "position_ids": torch.arange(6)[None]}
    with torch.no_grad():
        assert arrive(host, hidden, inputs).layout.document.unique().numel() == 1  # sdpa does not look at them
        host.base_config = copy.copy(host.base_config)
        host.base_config._attn_implementation_internal = "flash_attention_2"
        assert arrive(host, hidden, inputs).layout.position.tolist() == [[0, 1, 0, 1, 2, 3]]


# ---------------------------------------------------------------- what a module may pass to its attention


@pytest.mark.parametrize(
    "name", sorted(topo_adapter.hf.gates._NOT_MODELLED | {"key_value_states", "encoder_hidden_states"})
)
def test_what_acts_on_attention_is_refused(name: str) -> None:
    model = routed(tiny())
    logits_of(model, IDS, **{name: None})
    with pytest.raises(UnsupportedModelError, match=f"{name}'"):
        logits_of(model, IDS, **{name: torch.zeros(2, 4, 24, 24)})


def test_a_window_shorter_than_the_text_is_refused() -> None:
    model = routed(tiny())
    torch.testing.assert_close(logits_of(model, IDS, sliding_window=24), logits_of(model, IDS))
    with pytest.raises(UnsupportedModelError, match="sliding_window of 23 tokens to its attention of 24 keys"):
        logits_of(model, IDS, sliding_window=23)


def test_an_argument_of_the_models_own_attention_function_is_refused() -> None:
    """Whatever a family's eager function takes by name acts on its attention, also what this library never heard of."""
    model = routed(of_the_future())
    host = model.base_model.model.model.layers[0].self_attn.topo_adapter
    assert "temperature_per_head" in host.acting_arguments
    with pytest.raises(UnsupportedModelError, match="temperature_per_head"):
        logits_of(model, IDS, temperature_per_head=torch.ones(4))


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_bidirectional_attention_is_refused(merged: bool) -> None:
    model = routed(tiny())
    if merged:
        model.merge_adapter()
    with pytest.raises(UnsupportedModelError, match="must be causal"):
        logits_of(model, IDS, is_causal=False)
    for module in model.modules():
        if isinstance(module, LlamaAttention):
            module.is_causal = False
    with pytest.raises(UnsupportedModelError, match="must be causal"):
        logits_of(model, IDS)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_attention_weights_are_refused_where_there_are_none(family: str) -> None:
    base = tiny(family)
    base.set_attn_implementation("eager")
    model = routed(base)
    unloaded = copy.deepcopy(model).merge_and_unload()
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    for each in (model, merged, unloaded):
        for part in (each, each.get_decoder() if each is unloaded else each.base_model.model.get_decoder()):
            with pytest.raises(UnsupportedModelError, match="output_attentions must be False"):
                part(input_ids=IDS, output_attentions=True)
        with pytest.raises(UnsupportedModelError, match="output_attentions must be False"):
            each.generate(input_ids=IDS, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    unloaded.config.output_attentions = True
    with pytest.raises(UnsupportedModelError, match="output_attentions must be False"):
        unloaded(input_ids=IDS)
    unloaded.config.output_attentions = False
    with model.disable_adapter():
        assert len(model(input_ids=IDS, output_attentions=True).attentions) == 4
    model.peft_config["default"].homotopy = 0.0
    assert len(model(input_ids=IDS, output_attentions=True).attentions) == 4
    assert len(model.unload()(input_ids=IDS, output_attentions=True).attentions) == 4


@torch.no_grad()
def test_unmerged_evaluation_compiles_to_one_graph_and_exports() -> None:
    """Though without gradients it runs the hard path, which in torch asks for values, outside a graph."""
    model = routed(tiny())
    expected, base = logits_of(model, IDS), model.get_base_model()
    compiled = torch.compile(base, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(base, (), {"input_ids": IDS, "use_cache": False}, strict=False).module()
    for each in (compiled, exported):
        out = each(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- families: served, or refused with the reason

SIZES: dict[str, Any] = {
    **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1},
    "eos_token_id": None,
}
MIXED = [SLIDING, FULL, SLIDING, FULL]
GEMMA3N: dict[str, Any] = {
    **{"layer_types": MIXED, "sliding_window": 6, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61},
    **{
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [48] * 4,
    },
}
GEMMA4: dict[str, Any] = {
    **{"layer_types": MIXED, "sliding_window": 6, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61},
    **{"global_head_dim": 16, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0},
}
AFMOE: dict[str, Any] = {
    **{"sliding_window": 6, "layer_types": MIXED, "num_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 16, "num_dense_layers": 4},
}
MLA: dict[str, Any] = {
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 16, "q_lora_rank": 24},
    **{"num_key_value_heads": 4, "head_dim": 8, "first_k_dense_replace": 4},
}
SERVED: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "a window as long as the positions": ("phi3", {"sliding_window": 256}, [0, 1, 2, 3]),
    "a window beyond the positions": ("mistral", {"sliding_window": 512}, [0, 1, 2, 3]),
    "a window that the model ignores": ("llama", {"sliding_window": 6}, [0, 1, 2, 3]),
    "sliding layers alone, with a window beyond the positions": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 256, "layer_types": [SLIDING] * 4},
        [0, 1, 2, 3],
    ),
    "sliding layers beside full ones": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 256, "layer_types": MIXED},
        [1, 3],
    ),
    "layers with the keys of others": ("gemma3n_text", {**GEMMA3N, "num_kv_shared_layers": 2}, [1]),
    "gemma4": ("gemma4_text", GEMMA4, [1, 3]),
    "gemma4, layers with the keys of others": ("gemma4_text", {**GEMMA4, "num_kv_shared_layers": 2}, [1]),
    "values that are the keys": ("gemma4_text", {**GEMMA4, "attention_k_eq_v": True}, [1, 3]),
    "a view of attention's output": ("afmoe", AFMOE, [1, 3]),
    "values narrower than keys": ("deepseek_v3", MLA, [0, 1, 2, 3]),
}


def family(kind: str, settings: dict[str, Any]) -> PreTrainedModel:
    sizes = {name: value for name, value in SIZES.items() if not (kind == "phi3" and name == "head_dim")}
    config = CONFIG_MAPPING[kind](**{**sizes, **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.normal_(std=1.5 / weight.shape[1] ** 0.5)
    return model.double()


def layers_of(model: nn.Module) -> list[int]:
    return sorted(host.geometry.layer for host in topo_adapter.layer.hosts(model))


@pytest.mark.parametrize("name", list(SERVED))
def test_served_families(name: str) -> None:
    kind, settings, layers = SERVED[name]
    base = family(kind, settings)
    model = get_peft_model(copy.deepcopy(base), TopologyConfig(**BITING, homotopy=1.0)).eval()
    randomise_routers(model)
    assert layers_of(model) == layers
    whole = logits_of(model, IDS)
    assert (whole - logits_of(base, IDS)).abs().max() > 0.05, "the topology must bite"
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        torch.testing.assert_close(logits_of(model, IDS), whole, rtol=0, atol=1e-5)
        caches = [DynamicCache(config=base.config)]
        if (
            kind != "llama"
        ):  # whose static cache really has as few slots as its config says, though the model has no window
            caches.append(StaticCache(config=base.config, max_cache_len=32))
        for cache in caches:
            torch.testing.assert_close(in_chunks(model, IDS, [15, 1, 6, 2], cache), whole, rtol=0, atol=1e-5)
        if merged:
            model.unmerge_adapter()
    settings = {"depth": 4, "visible_depth": 0, "router_dim": 8, "homotopy": 1.0}
    dense = get_peft_model(copy.deepcopy(base), TopologyConfig(**settings)).eval()
    torch.testing.assert_close(logits_of(dense, IDS), logits_of(base, IDS), rtol=0, atol=1e-5)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(
        w.grad is not None and w.grad.abs().sum() > 0 for n, w in model.named_parameters() if "topo_routers" in n
    )


def test_a_wide_window_is_refused_where_the_text_outgrows_it() -> None:
    base = family("mistral", {"sliding_window": 64, "max_position_embeddings": 64})
    model = get_peft_model(base, TopologyConfig(**BITING, homotopy=1.0)).eval()
    logits_of(model, tokens(1, 64))
    with pytest.raises(UnsupportedModelError, match="sliding-window, chunked or hand-made mask"):
        logits_of(model, tokens(1, 65))


HRM: dict[str, Any] = {"num_layers_per_stack": 1, "num_hidden_layers": 2, "H_cycles": 1, "L_cycles": 1}
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "encoder-decoder": (
        lambda: transformers.BartForConditionalGeneration(
            transformers.BartConfig(
                vocab_size=61,
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                max_position_embeddings=64,
            )
        ),
        "encoder-decoder BartForConditionalGeneration",
    ),
    "T5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        "encoder-decoder T5ForConditionalGeneration",
    ),
    "attention outside the interface": (
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=2)
        ),
        "BloomAttention: it needs the attributes `config` and `layer_idx`",
    ),
    "GPT-Neo": (
        lambda: transformers.GPTNeoForCausalLM(
            transformers.GPTNeoConfig(
                vocab_size=61, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
            )
        ),
        "GPTNeoSelfAttention: ",
    ),
    "bidirectional": (
        lambda: transformers.BertLMHeadModel(
            transformers.BertConfig(
                vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
            )
        ),
        "BertSelfAttention: it is not causal",
    ),
    "sliding windows alone": (
        lambda: family("mistral", {"sliding_window": 8}),
        "MistralAttention: it has a sliding window",
    ),
    "sink logits": (
        lambda: family("gpt_oss", {"layer_types": [FULL] * 4, "num_local_experts": 2, "num_experts_per_tok": 1}),
        "learned sink logits",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_families(name: str) -> None:
    make, reason = REFUSED[name]
    model = make()
    children = {child for child, _ in model.named_modules()}
    with pytest.raises(UnsupportedModelError, match=reason):
        get_peft_model(model, TopologyConfig())
    assert {child for child, _ in model.named_modules()} == children and not model._forward_pre_hooks


def test_a_model_that_runs_its_layers_again_is_refused() -> None:
    if "hrm_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no HRM")
    from transformers.models.hrm_text.modeling_hrm_text import HrmTextAttention

    attention = HrmTextAttention(CONFIG_MAPPING["hrm_text"](**{**SIZES, "num_hidden_layers": 2}), 0)
    with pytest.raises(UnsupportedModelError, match="runs it several times in a forward"):
        topo_adapter.hf.gates.geometry_of(attention, "self_attn")


# ---------------------------------------------------------------- offloaded bases


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_adapter_on_an_offloaded_base(where: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    base, cpu = tiny(), torch.device("cpu")
    model = routed(copy.deepcopy(base))
    expected = logits_of(model, IDS)
    model.save_pretrained(tmp_path / "adapter")
    if where == "cpu":
        cpu_offload(base, execution_device=cpu)
    else:
        disk_offload(base, str(tmp_path / "weights"), execution_device=cpu)
    assert next(base.parameters()).is_meta
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits_of(loaded, IDS), expected)
    loaded.merge_adapter()
    assert torch.equal(logits_of(loaded, IDS), expected)
