"""What each head costs and loses at each visible depth: the table that the density dial (dial.py) chooses from.

Loss of a head (beyond the paper). Let `o_i` be the attention output of one head at token `i`, `Delta_i(d)` its change
when that head alone sees depth `d`, `z_t` the logits of token `t` and `p_t` the dense model's prediction. KL(dense ||
changed) is 0 and minimal at the dense model: there is no first order term, and the second order is the Fisher matrix:

    sum_t KL_t = 1/2 sum_t dz_t' F_t dz_t + O(Delta^3),   dz_t = sum_i (dz_t / do_i) Delta_i,   F_t = E[s_t s_t'],

with the score `s_t`: the gradient of -log p_t(y_t) in the logits, for a label `y_t` drawn from `p_t` itself. Labels are
drawn independently, so `E[s_t s_u'] = 0` for `t != u`. Hence the gradient `g_i` of `sum_t -log p_t(y_t)` in `o_i`,
which one backward pass gives for all heads and layers, has `E[(sum_i g_i . Delta_i)^2] = 2 sum_t KL_t`: one number per
sequence and draw, chi-squared with one degree of freedom. The estimate here sums over spans of tokens instead,

    loss(d) = 1/2 mean_spans (sum_{i in span} g_i . Delta_i(d))^2 / tokens of a span    [nats per token],

so that it averages over many samples of a sequence, and leaves out the cross terms between positions of different
spans. They matter where a head's changes at many positions push the same later predictions in one direction: with
spans of one token such heads were underrated by half, with whole sequences the few samples scatter by half
(docs/notebook/2026-11-24-calibration-against-ablation.md).

Around a map. Losses of single heads beside the dense model do not add up where many heads are sparse at once: of two
that carry the same, either can be spared, but not both. So they are measured beside sparse maps too. There KL(dense ||
map) has a gradient `k_i` in `o_i`, its second order in the logits is again the Fisher matrix, of the model as it is at
the map, and with `Delta_i(d)` the change of a head from its output at the map,

    KL(dense || head moved to d) - KL(dense || map) = sum_i k_i . Delta_i(d) + second order as above + O(Delta^3).

The table is the mean over the dense model and the maps of `AROUND`: what a head costs on the way from dense to sparse
(an Aumann-Shapley value, the integral taken at a few points). Each map is chosen from the mean of what is known so far.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.utils import logging

from ..config import Calibration, TopologyConfig, VisibleDepth
from ..core.dial import DEFAULT_DENSITY, Setting, check_density, choose, reachable
from ..core.passes import Pass, changed, during
from ..core.scoring import Scoring
from ..core.visibility import always_density
from ..errors import MergeError, TopologyConfigError, UnsupportedModelError
from ..fingerprint import fingerprint
from ..forward import Attention, TopologyCall
from ..hf.gates import text_decoder
from ..layer import TopologyHost, active_layers, evaluating
from ..ops.attention import hard_attention
from ..ops.plan import make_plan
from ..ops.visits import at

_log = logging.get_logger(__name__)

_SPAN = 128  # tokens
#: Shares of the far pairs, beyond window and sinks, that the maps reveal around which losses are measured.
AROUND = (0.16, 0.08, 0.04)
#: Logits alive at once while labels are drawn, in entries (64 MiB each for the logits, their softmax and gradient).
_LOGITS_AT_ONCE = 2**24

#: Draws labels `[N]` from probabilities `[N, V]`.
Draw = Callable[[Tensor], Tensor]


def calibrate(
    model: nn.Module,
    sequences: Tensor,
    *,
    draws: int = 1,
    seed: int = 0,
    around: Sequence[float] = AROUND,
    target_density: float | None = None,
    check_padding: bool = True,
) -> Calibration:
    """Measure density and loss of every routed layer, query head and depth, and store them in the adapter's config.

    The adapter has a density of its own from then on, `target_density`, and the depths that the table gives for it.

    Beside the dense model and around each map: one forward per sequence (two around a map), one backward per draw (and
    one of the KL around a map), and the hard attention of each layer at every depth. No tensor of `O(T^2)`. The model
    runs in evaluation mode whatever its state (homotopy, frozen or trainable) and is left as it was: modes, gradients,
    hooks.

    Args:
        model: a PeftModel with one active, unmerged topology adapter.
        sequences: int64 `[B, T]` token ids, unpadded, of the kind of text that the model will read, and `T` about as
            long: the table holds at this length. They begin as its texts do (Llama 3, Gemma: with the tokenizer's
            `<bos>`). Evaluation texts do not belong here.
        draws: label draws per sequence, >= 1. More sequences serve better than more draws.
        seed: of the label draws.
        around: shares in (0, 1] of the far pairs (beyond window and sinks) that are visible in the maps around which
            losses are measured, beside the dense model; a share below that of the sparsest map stands for that map.
        target_density: in (0, 1], at this length. None keeps the adapter's own, or takes 0.17 where it has none; if no
            map is as sparse as that, the sparsest, and says so in the log.
        check_padding: refuse rows that look padded. A tokenizer whose padding token ends texts too makes some windows
            of text look so; False takes them as they are.

    Returns:
        The table, rounded to 4 significant digits; `loss` is the estimate of this module's docstring, the mean over
        the dense model and the maps, at least 0 and 0 at depth 0.

    Raises:
        UnsupportedModelError: no active adapter, no language-model head, weights that pass no gradient, or a gradient
            that is not finite. MergeError: the adapter is merged.
        TopologyConfigError: `sequences` is not int64 `[B, T]`, is padded, or fits window and sinks; `draws` below 1;
            `around` or `target_density` out of range or reach.
    """
    layers, config = _unmerged_layers(model)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    check_sequences(sequences, config, base, check_padding)
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise TopologyConfigError(f"draws must be an integer >= 1, got {draws!r}")
    if not all(0 < share <= 1 for share in around):
        raise TopologyConfigError(f"around must be shares of the far pairs in (0, 1], got {around!r}")
    check_differentiable(base)
    always = always_density(sequences.shape[1], config.local_window, config.num_sink_tokens)
    if target_density is not None:
        check_density(target_density)
        if target_density < always:  # the table could only say so an hour later
            raise TopologyConfigError(
                f"target_density must be at least {always:.4g} at {sequences.shape[1]} tokens, what window and sinks "
                f"show, got {target_density}; lower local_window, or calibrate on longer sequences."
            )

    _log.info(
        f"Calibrating: what each head costs and loses at each depth, beside the dense model and {len(around)} sparse "
        f"maps, on {len(sequences)} text(s) of {sequences.shape[1]:,} tokens."
    )
    generators: dict[torch.device, torch.Generator] = {}

    def draw(probs: Tensor) -> Tensor:
        if probs.device not in generators:
            generators[probs.device] = torch.Generator(probs.device).manual_seed(seed)
        return torch.multinomial(probs, 1, generator=generators[probs.device])[:, 0]

    # tensors made in inference mode cannot be saved for backward
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        rows = sequences.clone().split(1)
        tables = [_measured(model, base, layers, config, rows, draws, draw, None)]
        for share in around:
            known = _mean(tables)
            near = always_density(known["length"], config.local_window, config.num_sink_tokens)
            setting = choose(known, reachable(known, near + (1 - near) * share))
            tables.append(_measured(model, base, layers, config, rows, draws, draw, setting))
    config.calibration = _mean(tables)
    config.base_fingerprint = fingerprint(base)
    wanted = target_density or config.target_density or DEFAULT_DENSITY
    if target_density is None:
        least = math.ceil(1e4 * reachable(config.calibration, 0.0)) / 1e4
        if least > wanted:
            _log.warning(
                "no map is as sparse as %g at %d tokens; the adapter's density is its sparsest map's, %g",
                *(wanted, config.calibration["length"], least),
            )
        wanted = max(wanted, least)
    config.setting, config.target_density = config.setting_at(wanted), wanted
    return config.calibration


def _unmerged_layers(model: nn.Module) -> tuple[list[TopologyHost], TopologyConfig]:
    found = active_layers(model)
    if any(merged for _, _, merged in found):
        raise MergeError("the adapter must be unmerged to calibrate, got a merged one; call unmerge_adapter first")
    return [layer for layer, _, _ in found], found[0][1]


def _heads_per_route(layer: TopologyHost) -> int:
    active = layer.in_force()
    assert active is not None  # of active_layers
    return layer.geometry.num_heads // active.router.num_heads


def check_sequences(sequences: Tensor, config: TopologyConfig, base: Any, check_padding: bool = True) -> None:
    """Refuse what cannot be calibrated on: see `calibrate`."""
    if not isinstance(sequences, Tensor) or sequences.ndim != 2 or sequences.dtype != torch.int64 or not len(sequences):
        got = (
            f"{sequences.dtype} {list(sequences.shape)}" if isinstance(sequences, Tensor) else type(sequences).__name__
        )
        raise TopologyConfigError(f"sequences must be an int64 tensor [B, T] of token ids with B >= 1, got {got}")
    always = config.local_window + config.num_sink_tokens
    if sequences.shape[1] <= always:
        raise TopologyConfigError(
            f"sequences must be longer than local_window + num_sink_tokens = {always}, or every depth sees everything, "
            f"got {sequences.shape[1]} tokens"
        )
    text = base.config.get_text_config()
    pad = text.pad_token_id
    if pad is None or not check_padding:
        return
    is_pad = sequences == pad
    ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    if pad in (*ends, text.bos_token_id):
        # the token has another use: one or a few of them are text, two at an end of a row are padding
        is_pad = torch.cat([is_pad[:, :2].all(1, True), is_pad[:, -2:].all(1, True)], 1)
    if bool(is_pad.any()):
        raise TopologyConfigError(
            f"sequences must be unpadded, got padding (token {pad}) in rows {is_pad.any(1).nonzero()[:, 0].tolist()}; "
            "cut the texts into windows of one length, or pass check_padding=False if it is text"
        )


def check_differentiable(base: Any) -> None:
    """Refuse a model that cannot be calibrated: see `calibrate`."""
    if base.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"model must have a language-model head to calibrate, got {type(base).__name__}; load AutoModelForCausalLM"
        )
    for name, weight in base.named_parameters():
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            raise UnsupportedModelError(
                f"{name} must pass gradients to calibrate, got a weight that bitsandbytes has repacked for inference "
                "on this CPU; reload the model and calibrate before its first forward in evaluation mode"
            )


def _not_finite(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what} must be finite to calibrate, got NaN or infinity; load the base in bfloat16 or float32"
    )


class Calibrate(Pass):
    """Attends under a map, and adds up what the other choices of each layer would cost: `_density_and_loss`.

    Layers whose heads all have depth 0 run the base.

    Args:
        choices: depth and visits, each is measured. draws, backwards: backward passes per sequence over drawn labels,
            and all of them; the last may be KL's own.

    Attributes:
        setting: of the next forward, None is dense. sums: float64 `[2, choices, H]` by layer.
    """

    needs_addresses = True
    trains = True

    def __init__(self, choices: list[list[int]], draws: int, backwards: int) -> None:
        self.choices, self.draws, self.backwards = choices, draws, backwards
        self.setting: Setting | None = None
        self.sums: dict[int, Tensor] = {}
        self._gradients: dict[int, list[Tensor]] = {}  # of a layer, until all passes have been

    def in_force(self, config: TopologyConfig) -> TopologyConfig:
        depths: VisibleDepth = 0 if self.setting is None else dict(self.setting.depths)
        visits = None if self.setting is None else self.setting.visits
        return changed(config, visible_depth=depths, head_visits=visits, homotopy=1.0)

    def attend(self, attention: Attention) -> tuple[Tensor, Tensor | None]:
        out, weights = (
            (attention.bridged()[0], None) if any(attention.call.visibility.rule.depths) else attention.base()
        )
        if out.requires_grad:  # not of the dense reference, nor the first of reentrant checkpointing's two forwards
            out.register_hook(self._observer(attention, out.detach()))
        return out, weights

    def _observer(self, attention: Attention, own: Tensor) -> Callable[[Tensor], None]:
        call, scoring = attention.call, attention.scoring  # not the attention, which holds the layer's graph
        layer = call.host.geometry.layer
        q, k, v = (x.detach() for x in (attention.query, attention.key, attention.value))

        @torch.no_grad()
        def add(gradient: Tensor) -> None:
            gradients = self._gradients.setdefault(layer, [])
            gradients.append(gradient)
            if len(gradients) == self.backwards:  # the changes are the same in all of them, and cost the most
                rows = _density_and_loss(call, q, k, v, own, gradients, self.draws, self.choices, scoring)
                self.sums[layer] = self.sums[layer] + rows if layer in self.sums else rows
                gradients.clear()

        return add


def _measured(
    model: nn.Module,
    base: Any,
    layers: list[TopologyHost],
    config: TopologyConfig,
    rows: Sequence[Tensor],
    draws: int,
    draw: Draw,
    setting: Setting | None,
) -> Calibration:
    """The table around one map; None is the dense model."""
    with during(model, Calibrate(config.choices(), draws, draws if setting is None else draws + 1)) as found:
        for row in rows:
            found.setting = None
            reference = None if setting is None else _final_states(base, row)
            found.setting = setting
            _backward(base, row, draws, draw, reference)

    shared = 1 if config.depth_per == "query_head" else math.gcd(*(_heads_per_route(layer) for layer in layers))
    table = Calibration(length=rows[0].shape[1], heads_per_route=shared, density={}, loss={})
    if config.visits > 1:
        table["choices"] = config.choices()
    for layer in layers:
        index = layer.geometry.layer
        density, loss = found.sums[index] / len(rows)
        if not torch.isfinite(loss).all():
            raise _not_finite(f"gradients in layer {index}")
        table["density"][index] = density.T.tolist()
        table["loss"][index] = (loss - loss[0]).clamp(min=0).T.tolist()
    return table


def _mean(tables: Sequence[Calibration]) -> Calibration:
    """Rounded to 4 digits."""

    def mean(name: Literal["density", "loss"]) -> dict[int, list[list[float]]]:
        return {
            layer: [
                [float(f"{statistics.fmean(values):.4g}") for values in zip(*heads, strict=True)]
                for heads in zip(*(table[name][layer] for table in tables), strict=True)
            ]
            for layer in tables[0][name]
        }

    return {**tables[0], "density": mean("density"), "loss": mean("loss")}


@torch.no_grad()
def _final_states(base: Any, row: Tensor) -> Tensor:
    """The last hidden states `[1, T, hidden]`."""
    row = row.to(base.get_input_embeddings().weight.device)
    return text_decoder(base)(input_ids=row, use_cache=False, return_dict=True).last_hidden_state


def _backward(base: Any, row: Tensor, draws: int, draw: Draw, reference: Tensor | None) -> None:
    """Gradients of `sum_t -log p(y_t)` for labels drawn from the model, down to the embeddings, and of the KL to the
    `reference` states' predictions, if there are any; observers see them.

    Nothing is accumulated in any `.grad`. Logits exist for a few tokens at a time.
    """
    decoder, embeddings = text_decoder(base), base.get_input_embeddings()
    start: list[Tensor] = []

    def begin_graph(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        start.append(output.detach().requires_grad_())
        return start[-1]

    row = row.to(embeddings.weight.device)
    handle = embeddings.register_forward_hook(begin_graph)
    try:
        outputs = decoder(input_ids=row, use_cache=False, return_dict=True)
    finally:
        handle.remove()
    hidden = outputs.last_hidden_state
    gradients = _head_gradients(base, decoder, outputs, row, draws, draw, reference)
    for number, gradient in enumerate(gradients, start=1):
        torch.autograd.grad(hidden, start, gradient, retain_graph=number < len(gradients))


def _head_gradients(
    base: Any, decoder: nn.Module, outputs: Any, row: Tensor, draws: int, draw: Draw, reference: Tensor | None
) -> list[Tensor]:
    """Gradients in the last hidden states `[1, T, hidden]`: one for each draw of the labels, then that of the KL.

    The model's own forward makes the logits, whatever it does after the head (soft caps, scales): its decoder is made
    to return a chunk of the hidden states it has computed.
    """
    hidden = outputs.last_hidden_state.detach()
    chunk = max(1, _LOGITS_AT_ONCE // base.get_output_embeddings().weight.shape[0])

    def logits_of(states: Tensor, ids: Tensor) -> Tensor:
        with _returning(decoder, type(outputs)(**{**outputs, "last_hidden_state": states})):
            logits = base(input_ids=ids, use_cache=False, return_dict=True).logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    gradients: list[list[Tensor]] = [[] for _ in range(draws if reference is None else draws + 1)]
    for first in range(0, hidden.shape[1], chunk):
        rows = slice(first, first + chunk)
        states = hidden[:, rows].requires_grad_()
        logits = logits_of(states, row[:, rows])
        if not torch.isfinite(logits).all():  # on a GPU a draw from NaN would end the process
            raise _not_finite("logits")
        probs = logits.detach().softmax(-1)
        for number in range(draws):
            loss = nn.functional.cross_entropy(logits, draw(probs), reduction="sum")
            gradients[number] += torch.autograd.grad(loss, states, retain_graph=number + 1 < len(gradients))
        if reference is not None:
            with torch.no_grad():
                dense = logits_of(reference[:, rows], row[:, rows]).log_softmax(-1)
            loss = nn.functional.kl_div(logits.log_softmax(-1), dense, log_target=True, reduction="sum")
            gradients[-1] += torch.autograd.grad(loss, states)
    return [torch.cat(chunks, 1) for chunks in gradients]


@contextlib.contextmanager
def _returning(decoder: nn.Module, outputs: Any) -> Iterator[None]:
    """While active, the decoder returns `outputs` and computes nothing."""
    own = decoder.__dict__.get("forward")  # accelerate's hooks put one there
    decoder.__dict__["forward"] = lambda *args, **kwargs: outputs
    try:
        yield
    finally:
        if own is None:
            del decoder.__dict__["forward"]
        else:
            decoder.__dict__["forward"] = own


def _density_and_loss(
    call: TopologyCall,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own: Tensor,
    gradients: list[Tensor],
    draws: int,
    choices: list[list[int]],
    scoring: Scoring,
) -> Tensor:
    """Density and loss, float64 `[2, choices, H]`; one choice's change is alive at a time.

    Args:
        query: `[B, H, T, D]`; key, value: `[B, H_kv, T, D]`; own: output under the rule of `call`, `[B, T, H, D]`.
        gradients: in `own`, for `draws` draws of the labels and, unless `call` is dense, of the KL.
    """
    heads = query.shape[1]
    exact = torch.promote_types(own.dtype, torch.float32)
    rows = []
    for depth, visits in choices:
        plan = make_plan(at(call.visibility, [depth] * heads, [visits] * heads))
        density = (plan.visible_count() / plan.causal_count()).double()
        density = density.repeat_interleave(heads // density.numel())
        loss = torch.zeros_like(density)
        if depth or any(call.visibility.rule.depths):
            change = hard_attention(query, key, value, plan, scoring).transpose(1, 2).to(exact) - own.to(exact)
            for number, gradient in enumerate(gradients):
                moved = (change * gradient.to(exact)).sum(-1).double()  # [B, T, H]
                if number == draws:
                    loss += moved.mean((0, 1))
                    continue
                spans = torch.stack([span.sum(1) for span in moved.split(_SPAN, 1)])
                loss += spans.square().sum((0, 1)) / (2 * moved.shape[0] * moved.shape[1] * draws)
        rows.append(torch.stack([density, loss]))
    return torch.stack(rows, 1)
