"""The density dial: what each head loses at each visible depth, the depth map of a budget, and a report at run time.

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
(docs/log.md).

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
import numbers
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from .attention import hard_attention
from .config import Calibration, TopologyConfig
from .errors import MergeError, TopologyConfigError, UnsupportedModelError
from .layer import AttentionObserver, TopologyCall, TopologyHost, evaluating, hosts, plan_of
from .plan import Plan

_SPAN = 128  # tokens
#: Shares of the far pairs, beyond window and sinks, that the maps reveal around which losses are measured.
AROUND = (0.16, 0.08, 0.04)
#: Logits alive at once while labels are drawn, in entries (64 MiB each for the logits, their softmax and gradient).
_LOGITS_AT_ONCE = 2**24

#: Draws labels `[N]` from probabilities `[N, V]`.
Draw = Callable[[Tensor], Tensor]

#: `density_report` warns above this ratio of realised to calibrated density.
WARN_RATIO = 1.5


def calibrate(
    model: nn.Module, sequences: Tensor, *, draws: int = 1, seed: int = 0, around: Sequence[float] = AROUND
) -> Calibration:
    """Measure density and loss of every routed layer, query head and depth, and store them in the adapter's config.

    Beside the dense model and around each map: one forward per sequence (two around a map), one backward per draw (and
    one of the KL around a map), and the hard attention of each layer at every depth. No tensor of `O(T^2)`. The model
    runs in evaluation mode whatever its state (homotopy, frozen or trainable) and is left as it was: modes, gradients,
    hooks, visible depth.

    Args:
        model: a PeftModel with one active, unmerged topology adapter.
        sequences: int64 `[B, T]` token ids, unpadded, of the kind of text that the model will read, and `T` about as
            long: the table holds at this length. Evaluation texts do not belong here.
        draws: label draws per sequence, >= 1. More sequences serve better than more draws.
        seed: of the label draws.
        around: shares in (0, 1] of the far pairs (beyond window and sinks) that are visible in the maps around which
            losses are measured, beside the dense model; a share below that of the sparsest map stands for that map.

    Returns:
        The table, rounded to 4 significant digits; `loss` is the estimate of this module's docstring, the mean over
        the dense model and the maps, at least 0 and 0 at depth 0.

    Raises:
        UnsupportedModelError: no active adapter, no language-model head, weights that pass no gradient, or a gradient
            that is not finite. MergeError: the adapter is merged.
        TopologyConfigError: `sequences` is not int64 `[B, T]`, is padded, or fits window and sinks; `draws` below 1;
            `around` out of range.
    """
    layers, config = _unmerged_layers(model)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    check_sequences(sequences, config, base)
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise TopologyConfigError(f"draws must be an integer >= 1, got {draws!r}")
    if not all(0 < share <= 1 for share in around):
        raise TopologyConfigError(f"around must be shares of the far pairs in (0, 1], got {around!r}")
    _check_differentiable(base)

    generators: dict[torch.device, torch.Generator] = {}

    def draw(probs: Tensor) -> Tensor:
        if probs.device not in generators:
            generators[probs.device] = torch.Generator(probs.device).manual_seed(seed)
        return torch.multinomial(probs, 1, generator=generators[probs.device])[:, 0]

    # tensors made in inference mode cannot be saved for backward
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        rows = sequences.clone().split(1)
        tables = [_measured(base, layers, config, rows, draws, draw, {})]
        for share in around:
            known = _mean(tables)
            near = _near_share(known["length"], config.local_window, config.num_sink_tokens)
            depths = choose_depths(known, reachable(known, near + (1 - near) * share))
            tables.append(_measured(base, layers, config, rows, draws, draw, depths))
    config.calibration = _mean(tables)
    return config.calibration


def choose_depths(calibration: Calibration, target_density: float) -> dict[int, list[int]]:
    """The depth map of least estimated loss whose mean density over all routed heads is at most `target_density`.

    Losses of heads are taken as additive. Each head offers the lower convex hull of (density, loss) over its depths;
    starting from every head at its sparsest, the hull segments of all heads are taken in the order of loss saved per
    density, up to the first that exceeds the budget. The order does not depend on the target, so maps are nested:
    for `t1 <= t2` every head's depth under `t2` is at most its depth under `t1`, hence no pair that is visible at
    `t1` is hidden at `t2`, and the estimated loss at `t2` is at most that at `t1`. At the densities where a segment
    ends the map is optimal among all maps; between them it falls short of the budget by less than one segment.
    Heads that share a route (`heads_per_route` above 1) share a depth, so that the kernels can share the route, unless
    the config has `depth_per="query_head"`.

    Args:
        calibration: of `calibrate`. target_density: in (0, 1], at the calibrated length.

    Returns:
        Layer index -> depth of each query head, a `visible_depth`.

    Raises:
        TopologyConfigError: `target_density` is out of range or below what the sparsest map reaches.
    """
    return allot(calibration, target_density)[0]


def allot(calibration: Calibration, target_density: float) -> tuple[dict[int, list[int]], float]:
    """`choose_depths`, and the loss that a little more density would save there: nats per token for each unit of the
    density of one head, 0 where nothing is left to save."""
    number = isinstance(target_density, numbers.Real) and not isinstance(target_density, bool)
    if not number or not 0 < target_density <= 1:
        raise TopologyConfigError(f"target_density must be a number in (0, 1], got {target_density!r}")
    shared = calibration["heads_per_route"]
    hulls: list[list[_Choice]] = []
    for layer, heads in sorted(calibration["density"].items()):
        for first in range(0, len(heads), shared):
            members = slice(first, first + shared)
            densities = [sum(values) for values in zip(*heads[members], strict=True)]
            losses = [sum(values) for values in zip(*calibration["loss"][layer][members], strict=True)]
            hulls.append(_lower_hull(list(zip(densities, losses, range(len(losses)), strict=True))))
    total = shared * len(hulls)
    density = sum(hull[0][0] for hull in hulls)
    budget = target_density * total + 1e-9 * total  # rounding must not refuse a density that a map reaches
    if density > budget:
        raise TopologyConfigError(
            f"target_density must be at least {math.ceil(1e4 * density / total) / 1e4:g} at {calibration['length']} "
            f"tokens, what this adapter's sparsest heads reach, got {target_density}; window and sinks are always "
            "visible: lower local_window."
        )
    depths = [hull[0][2] for hull in hulls]
    # a hull's slopes fall strictly, so a route's own segments keep their order
    segments = [(-_gain(a, b), route, a, b) for route, hull in enumerate(hulls) for a, b in pairwise(hull)]
    rate = 0.0
    for loss, route, cheap, dear in sorted(segments):
        density += dear[0] - cheap[0]
        if density > budget:
            rate = -loss
            break
        depths[route] = dear[2]
    per_head = iter([depth for depth in depths for _ in range(shared)])
    found = {layer: [next(per_head) for _ in heads] for layer, heads in sorted(calibration["density"].items())}
    return found, rate


def reachable(calibration: Calibration, density: float) -> float:
    """`density`, or that of the sparsest map where it is more."""
    sparsest = [head[-1] for heads in calibration["density"].values() for head in heads]
    return max(density, math.fsum(sparsest) / len(sparsest))


def expected_loss(calibration: Calibration, depths: dict[int, list[int]]) -> float:
    """The estimated loss of a depth map, nats per token: the sum over its heads."""
    rows = ((calibration["loss"][layer][head], d) for layer, heads in depths.items() for head, d in enumerate(heads))
    return math.fsum(losses[depth] for losses, depth in rows)


@contextlib.contextmanager
def recording_density(model: nn.Module) -> Iterator[None]:
    """While active, the layers of a merged model count what their queries see, for `density_report`.

    A few small kernels per layer and forward, and nothing waits for them. Forwards of up to 16 new tokens over a
    cache scan it and make no plan to count: decoding is not recorded.

    Args:
        model: with a merged and calibrated topology adapter, or a merged model.

    Raises:
        UnsupportedModelError: no active adapter. MergeError: not merged, or not calibrated.
    """
    layers = _active_layers(model)
    for layer, config, merged in layers:
        if not merged or config.calibration is None:
            raise MergeError(
                "recording_density needs a merged adapter with a calibration, got layer "
                f"{layer.geometry.layer} {'without calibration' if merged else 'unmerged'}; call calibrate, then "
                "merge_adapter"
            )
    try:
        for layer, _, _ in layers:
            layer.density_counts = None
            layer.density_recorder = _count_density
        yield
    finally:
        for layer, _, _ in layers:
            layer.density_recorder = None


def density_report(model: nn.Module) -> dict[int, dict[str, float]]:
    """Density that the last `recording_density` saw in each layer, beside what calibration leads to expect.

    The expectation takes the share of far pairs (beyond window and sinks) that a map reveals as independent of
    length, so that texts shorter or longer than the calibrated ones compare fairly. Warns once, naming the layers
    whose realised density is more than 1.5 times the expected: the text is unlike those of the calibration, and
    neither its speed nor its quality is what the dial was set to.

    Returns:
        Layer index -> `density` and `calibrated`, means over the heads in (0, 1], and `ratio`, their quotient.

    Raises:
        UnsupportedModelError: nothing was recorded.
    """
    report = {}
    for layer in hosts(model):
        if layer.density_counts is not None:
            visible, expected, causal = layer.density_counts.tolist()
            report[layer.geometry.layer] = {
                "density": visible / causal,
                "calibrated": expected / causal,
                "ratio": visible / expected,
            }
    if not report:
        raise UnsupportedModelError(
            "density_report needs a recorded forward of a merged model, got none; run the text inside `with "
            "recording_density(model):`"
        )
    above = {layer: round(values["ratio"], 2) for layer, values in report.items() if values["ratio"] > WARN_RATIO}
    if above:
        warnings.warn(
            f"density is more than {WARN_RATIO} times what calibration leads to expect in layers (ratio) {above}: "
            "this text is far outside the calibration; calibrate on such texts, or merge at a lower target_density.",
            stacklevel=2,
        )
    return report


# ---------------------------------------------------------------------------------------------------------
# Measuring


def _active_layers(model: nn.Module) -> list[tuple[TopologyHost, TopologyConfig, bool]]:
    found = [(host, active[1], active[2]) for host in hosts(model) if (active := host.in_force()) is not None]
    if not found:
        raise UnsupportedModelError("model must have an active, enabled topology adapter; see get_peft_model")
    return found


def _unmerged_layers(model: nn.Module) -> tuple[list[TopologyHost], TopologyConfig]:
    found = _active_layers(model)
    if any(merged for _, _, merged in found):
        raise MergeError("the adapter must be unmerged to calibrate, got a merged one; call unmerge_adapter first")
    return [layer for layer, _, _ in found], found[0][1]


def _heads_per_route(layer: TopologyHost) -> int:
    active = layer.in_force()
    assert active is not None  # of _active_layers
    return layer.geometry.num_heads // active[0].num_heads


def check_sequences(sequences: Tensor, config: TopologyConfig, base: Any) -> None:
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
    if pad is None:
        return
    is_pad = sequences == pad
    ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    if pad in (*ends, text.bos_token_id):
        # the token has another use: one or a few of them are text, two at an end of a row are padding
        is_pad = torch.cat([is_pad[:, :2].all(1, True), is_pad[:, -2:].all(1, True)], 1)
    if bool(is_pad.any()):
        raise TopologyConfigError(
            f"sequences must be unpadded, got padding (token {pad}) in rows {is_pad.any(1).nonzero()[:, 0].tolist()}; "
            "cut the texts into windows of one length"
        )


def _check_differentiable(base: Any) -> None:
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


@dataclass
class _Pass:
    """What one pass over the sequences adds up, for each layer: see `_density_and_loss`.

    draws, backwards: backward passes per sequence over drawn labels, and all of them; the last may be KL's own.
    """

    depth: int
    draws: int
    backwards: int
    sums: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[int, list[Tensor]] = field(default_factory=dict)  # of a layer, until all passes have been

    def observer(self, layer: int) -> AttentionObserver:
        def observe(
            call: TopologyCall, query: Tensor, key: Tensor, value: Tensor, out: Tensor, scores: dict[str, Any]
        ) -> None:
            if not out.requires_grad:  # of the dense reference, or the first of reentrant checkpointing's two forwards
                return
            q, k, v, own = (x.detach() for x in (query, key, value, out))

            @torch.no_grad()
            def add(gradient: Tensor) -> None:
                gradients = self.gradients.setdefault(layer, [])
                gradients.append(gradient)
                if len(gradients) == self.backwards:  # the changes are the same in all of them, and cost the most
                    rows = _density_and_loss(call, q, k, v, own, gradients, self.draws, self.depth, scores)
                    self.sums[layer] = self.sums[layer] + rows if layer in self.sums else rows
                    gradients.clear()

            out.register_hook(add)

        return observe


def _measured(
    base: Any,
    layers: list[TopologyHost],
    config: TopologyConfig,
    rows: Sequence[Tensor],
    draws: int,
    draw: Draw,
    depths: dict[int, list[int]],
) -> Calibration:
    """The table around one depth map; an empty one is the dense model."""
    found = _Pass(config.sparsest_depth, draws, draws + 1 if depths else draws)
    before = config.visible_depth, config.homotopy
    try:
        for layer in layers:
            layer.observer = found.observer(layer.geometry.layer)
        config.homotopy = 1.0
        for row in rows:
            config.visible_depth = 0
            reference = _final_states(base, row) if depths else None
            config.visible_depth = dict(depths)
            _backward(base, row, draws, draw, reference)
    finally:
        config.visible_depth, config.homotopy = before
        for layer in layers:
            layer.observer = None

    shared = 1 if config.depth_per == "query_head" else math.gcd(*(_heads_per_route(layer) for layer in layers))
    table = Calibration(length=rows[0].shape[1], heads_per_route=shared, density={}, loss={})
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

    return Calibration(
        length=tables[0]["length"],
        heads_per_route=tables[0]["heads_per_route"],
        density=mean("density"),
        loss=mean("loss"),
    )


@torch.no_grad()
def _final_states(base: Any, row: Tensor) -> Tensor:
    """The last hidden states `[1, T, hidden]`."""
    row = row.to(base.get_input_embeddings().weight.device)
    return base.get_decoder()(input_ids=row, use_cache=False, return_dict=True).last_hidden_state


def _backward(base: Any, row: Tensor, draws: int, draw: Draw, reference: Tensor | None) -> None:
    """Gradients of `sum_t -log p(y_t)` for labels drawn from the model, down to the embeddings, and of the KL to the
    `reference` states' predictions, if there are any; observers see them.

    Nothing is accumulated in any `.grad`. Logits exist for a few tokens at a time.
    """
    decoder, embeddings = base.get_decoder(), base.get_input_embeddings()
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
    depth: int,
    scores: dict[str, Any],
) -> Tensor:
    """Density and loss, float64 `[2, depth + 1, H]`; one depth's change is alive at a time.

    Args:
        query: `[B, H, T, D]`; key, value: `[B, H_kv, T, D]`; own: output at the depths of `call`, `[B, T, H, D]`.
        gradients: in `own`, for `draws` draws of the labels and, unless `call` is dense, of the KL.
    """
    heads = query.shape[1]
    exact = torch.promote_types(own.dtype, torch.float32)
    rows = []
    for d in range(depth + 1):
        plan = plan_of(call, [d] * heads)
        density = (plan.visible_count() / plan.causal_count()).double()
        density = density.repeat_interleave(heads // density.numel())
        loss = torch.zeros_like(density)
        if d or any(call.depths):
            change = hard_attention(query, key, value, plan, **scores).transpose(1, 2).to(exact) - own.to(exact)
            for number, gradient in enumerate(gradients):
                moved = (change * gradient.to(exact)).sum(-1).double()  # [B, T, H]
                if number == draws:
                    loss += moved.mean((0, 1))
                    continue
                spans = torch.stack([span.sum(1) for span in moved.split(_SPAN, 1)])
                loss += spans.square().sum((0, 1)) / (2 * moved.shape[0] * moved.shape[1] * draws)
        rows.append(torch.stack([density, loss]))
    return torch.stack(rows, 1)


# ---------------------------------------------------------------------------------------------------------
# Choosing

_Choice = tuple[float, float, int]  # density, loss, depth


def _gain(cheap: _Choice, dear: _Choice) -> float:
    """Loss saved per density."""
    return (cheap[1] - dear[1]) / (dear[0] - cheap[0])


def _lower_hull(choices: list[_Choice]) -> list[_Choice]:
    """The choices on the lower convex hull, densities rising, losses falling, gains strictly falling."""
    hull: list[_Choice] = []
    for choice in sorted(choices):
        if hull and choice[1] >= hull[-1][1]:
            continue  # costs density and saves nothing
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


# ---------------------------------------------------------------------------------------------------------
# Reporting


def _count_density(call: TopologyCall, plan: Plan) -> None:
    """Add visible, expected and causal pairs of a mean head, float64 `[3]`; nothing waits for the device."""
    calibration = call.config.calibration
    assert calibration is not None  # recording_density has looked
    density = calibration["density"][call.host.geometry.layer]
    length, window, sinks = calibration["length"], call.config.local_window, call.config.num_sink_tokens
    near = _near_share(length, window, sinks)
    revealed = sum(values[d] for values, d in zip(density, call.depths, strict=True)) / len(density)
    share = max(revealed - near, 0.0) / (1 - near)  # of the far pairs
    visible, causal = plan.visible_count().mean(), plan.causal_count()
    local = visible - plan.far_count().mean()
    counts = torch.stack([visible, local + (causal - local) * share, causal])
    host = call.host
    host.density_counts = counts if host.density_counts is None else host.density_counts + counts


def _near_share(length: int, window: int, sinks: int) -> float:
    """Share of the causal pairs of one document that window and sinks make visible."""
    return _local_pairs(length, window, sinks) / _local_pairs(length, length, 0)


def _local_pairs(length: int, window: int, sinks: int) -> int:
    """Pairs that window and sinks make visible in one document."""
    full = min(length, window)  # queries whose window reaches the first token
    far = length - full
    some = min(far, sinks)
    return full * (full + 1) // 2 + far * window + some * (some + 1) // 2 + (far - some) * sinks
