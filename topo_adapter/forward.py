"""A routed forward: the pre-hook of an attention module, and the attention function that it calls.

The pre-hook sees hidden states, mask and cache and passes an `Arrival` on as a keyword argument; the attention module
projects and rotates as always and calls the attention function registered here, which finds the arrival among its
arguments, routes the tokens and attends. No state is kept between the two, so gradient checkpointing may run a layer as
often as it likes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .config import TopologyConfig
from .core.device import graph_is_recorded
from .core.layout import (
    SequenceLayout,
    contiguous_layout,
    layout_from_cu_seq_lens,
    layout_from_mask,
    layout_from_padding,
    layout_from_position_ids,
    layout_from_recorded_mask,
)
from .core.passes import ORDINARY, Pass
from .core.records import Keys
from .core.rule import Rule
from .core.scoring import Scoring
from .core.visibility import Visibility
from .errors import UnsupportedModelError
from .hf.cache import KeyRecords, cache_among
from .hf.gates import refuse_heads, refuse_inputs, refuse_unmodelled
from .layer import CHILD, TopologyHost
from .ops.attention import decode_attention, hard_attention, serves_decode
from .ops.head_router import HeadRouter
from .ops.objective import attach_loss, balance_loss
from .ops.plan import Plan, make_plan
from .ops.relaxation import bridged_attention
from .ops.router import Router, Routes
from .ops.visits import visited

#: Name of the attention implementation. It must contain none of the substrings that transformers looks for ("flash",
#: "sdpa", "paged", "flex_attention").
IMPLEMENTATION = "topology"


@dataclass(frozen=True)
class TopologyCall:
    """Everything the attention function needs beside q, k and v.

    config: as this forward runs it.
    """

    host: TopologyHost
    purpose: Pass
    config: TopologyConfig
    visibility: Visibility
    routes: Routes | None
    merged: bool
    training: bool
    arrival: Arrival

    @property
    def hard(self) -> bool:
        """Whether the hard topology is all that this forward asks for: merged, or in full force without gradients."""
        if self.merged:
            return True
        settled = self.config.homotopy == 1 and not self.training and not torch.is_grad_enabled()
        # the soft path in torch can be traced whole; the hard one asks for values, where no kernel runs it
        return settled and not graph_is_recorded()


@dataclass(frozen=True)
class Arrival:
    """Tokens that enter an attention module, before its queries and keys are known.

    hidden_states: `[B, T, hidden_size]`. inputs: everything the module is called with, by name. layout: of the tokens.
    records: of the cache; None without one. mask: what the layouts were read from; attention must be given the same.
    differentiable: whether the router's gradient is asked for. routed: whether anyone asks for addresses. past_length:
    cached tokens, where the router reads heads.
    """

    host: TopologyHost
    purpose: Pass
    config: TopologyConfig
    router: Router
    rule: Rule
    hidden_states: Tensor
    inputs: dict[str, Any]
    layout: SequenceLayout
    records: KeyRecords | None
    mask: Any
    merged: bool
    training: bool
    differentiable: bool
    routed: bool
    past_length: int | Tensor

    def route(self, query: Tensor, key: Tensor, scale: float) -> TopologyCall:
        """Route the tokens, and put their addresses beside the cached ones.

        Args:
            query: `[B, H, T, D]`; key: `[B, H_kv, S, D]`, cached tokens included. scale: of the attention's scores.
        """
        router, config, rule = self.router, self.config, self.rule
        chosen, logits, address = None, None, None
        if not self.routed:  # every head is dense or has no tree
            batch, length = self.hidden_states.shape[:2]
            nowhere = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=self.hidden_states.device)
            address = key_address = nowhere[0].expand(batch, router.num_heads, length)
        else:
            self.purpose.entered(router, lambda: self._seen(query, key), scale)
            several = rule.most_visits > 1 or (config.visits > 1 and self.purpose.needs_addresses)
            if self.differentiable or self.training:
                with torch.set_grad_enabled(torch.is_grad_enabled() and self.differentiable):
                    seen = self._seen(query, key)
                with torch.set_grad_enabled(self.differentiable):
                    sample = self.training and config.gumbel_noise
                    if self.purpose.needs_probabilities:
                        seen = tuple(each.detach() for each in seen)
                    chosen = router.route(
                        *seen, temperature=config.temperature, sample=sample, keep_logits=config.visits > 1
                    )
                logits, key_address = chosen.query.logits, chosen.key.address(config.arity)
                address = chosen.query.address(config.arity) if rule.most_visits == 1 else None
            elif (turned := self._turned(query, key, keep_logits=several)) is not None:
                logits, leaf, key_address = turned
                address = leaf if rule.most_visits == 1 else None
            elif several:
                logits, key_address = router.logits(*self._seen(query, key))
            else:
                address, key_address = router.addresses(*self._seen(query, key), merged=self.merged)
        if address is None:
            assert logits is not None
            visits = visited(logits, rule)
        else:
            visits = address[:, :, None]
        records = self.records
        # cached keys have addresses only: no bridge to them
        routes = chosen if self.differentiable and (records is None or records.empty) else None
        keys = Keys(key_address, self.layout) if records is None else records.append(key_address, self.layout)
        visibility = Visibility(visits, self.layout, keys, rule, logits)
        return TopologyCall(self.host, self.purpose, config, visibility, routes, self.merged, self.training, self)

    def _seen(self, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        """What the router reads of the tokens."""
        if not self.router.reads_heads:
            return (self.hidden_states,)
        query, key, rotation = query.float(), self._new(key, query.shape[2]).float(), self.host.rotation
        angles = self._angles(query)
        return (query, key) if rotation is None or angles is None else rotation.undo(query, key, angles)

    def _turned(self, query: Tensor, key: Tensor, keep_logits: bool) -> tuple[Tensor | None, Tensor, Tensor] | None:
        """`HeadRouter.turned` of the new tokens; None where the router reads something else or another way serves."""
        router, rotation = self.router, self.host.rotation
        if not isinstance(router, HeadRouter):
            return None
        key = self._new(key, query.shape[2])
        angles = self._angles(query)
        if rotation is None or angles is None:
            return router.turned(query, key, None, None, keep_logits=keep_logits, merged=self.merged)
        if rotation.pairs is None:
            return None
        first = query.shape[3] - angles[0].shape[-1] if rotation.last else 0
        return router.turned(
            *(query, key, *angles), first=first, pairs=rotation.pairs, keep_logits=keep_logits, merged=self.merged
        )

    def _angles(self, query: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines that the new tokens were turned by, if they were."""
        rotation = self.host.rotation
        return None if rotation is None else rotation.angles(self.inputs.get("position_embeddings"), query.shape[-1])

    def _new(self, key: Tensor, length: int) -> Tensor:
        """The new tokens' keys, of all."""
        past = self.past_length
        if isinstance(past, Tensor):
            return key.index_select(2, past.to(key.device) + torch.arange(length, device=key.device))
        return key[:, :, past : past + length]


# ---------------------------------------------------------------- the pre-hook


def install(attention: Any, host: TopologyHost) -> None:
    """Make `host` the child of `attention` and route its forwards."""
    setattr(attention, CHILD, host)
    routed = copy.copy(host.base_config)
    # the public setter would recurse into sub-configs that are shared with the rest of the model
    routed._attn_implementation_internal = IMPLEMENTATION
    attention.config = routed
    attention.register_forward_pre_hook(_route_forward, with_kwargs=True)


def uninstall(attention: nn.Module) -> None:
    """Undo `install`."""
    host = getattr(attention, CHILD)
    attention.config = host.base_config
    for key, hook in list(attention._forward_pre_hooks.items()):
        if hook is _route_forward:
            del attention._forward_pre_hooks[key]
            attention._forward_pre_hooks_with_kwargs.pop(key, None)
    delattr(attention, CHILD)


def _route_forward(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    host = getattr(attention, CHILD)
    inputs = {**dict(zip(host.inputs, args, strict=False)), **kwargs}
    # None is said too: an attention function that hears nothing knows that the module lost its arguments
    return args, {**kwargs, "topology": arrive(host, inputs[host.inputs[0]], inputs)}


def arrive(host: TopologyHost, hidden_states: Tensor, inputs: dict[str, Any]) -> Arrival | None:
    """What is known of a forward before its queries and keys are: of the hidden states `[B, T, hidden_size]` that enter
    the attention module.

    Args:
        inputs: everything the module is called with, by name.

    Returns None where the base attention is all there is to run.
    """
    active = host.in_force()
    if active is None:
        return None
    router, merged, layer = active.router, active.merged, host.geometry.layer
    purpose = host.passes.current()
    if not purpose.takes(host.training):
        purpose = ORDINARY
    config = purpose.in_force(active.config)
    refuse_inputs(layer, inputs)
    cache = cache_among(inputs)
    # trainers that sample from their model do so in training mode; no gradient is asked for then
    sampling = cache is not None and not torch.is_grad_enabled()
    training = host.training and not merged and not purpose.needs_probabilities and not sampling
    dense = config.homotopy == 0 and not merged
    learning = torch.is_grad_enabled() and next(router.parameters()).requires_grad
    if training and dense and learning:
        host.schedule.miss()
    if dense and not (training or purpose.needs_probabilities or purpose.needs_addresses):
        # as of PEFT's other methods, a loss has gradients in evaluation mode too; cached keys have none, and the base
        # alone returns attention weights
        past = 0 if cache is None else cache.get_seq_length(layer)
        if not learning or isinstance(past, Tensor) or past > 0 or inputs.get("output_attentions"):
            return None

    rule = host.rule(config, router.num_heads, merged)
    differentiable = purpose.needs_probabilities or (
        not merged and not purpose.needs_addresses and torch.is_grad_enabled()
    )
    choosing = any(0 < depth <= rule.levels for depth in rule.depths)
    routed = differentiable or training or purpose.needs_addresses or choosing
    if training and cache is not None and cache.get_seq_length(layer) > 0:
        raise UnsupportedModelError(
            "the key-value cache must be empty in training: cached keys have addresses but no gradient. "
            "Train on whole sequences, or generate under torch.no_grad()."
        )
    records = None
    if cache is not None and not dense:
        window = getattr(host.base_config, "sliding_window", None)
        records = KeyRecords(cache, layer, router, routed, window)
    mask = inputs.get("attention_mask")
    query = _layout(host, hidden_states, mask, inputs, records)
    past_length: int | Tensor = 0
    if router.reads_heads and cache is not None:
        past_length = cache.get_seq_length(layer)
        if isinstance(past_length, Tensor):  # a static cache counts on in it
            past_length = past_length.clone()
    return Arrival(
        host, purpose, config, router, rule, hidden_states, inputs, query, records, mask,
        merged=merged, training=training, differentiable=differentiable, routed=routed, past_length=past_length,
    )  # fmt: skip


def _layout(
    host: TopologyHost, hidden_states: Tensor, mask: Any, inputs: dict[str, Any], records: KeyRecords | None
) -> SequenceLayout:
    """Documents and positions of the tokens of this forward, from whatever the model passes down."""
    batch, length = hidden_states.shape[:2]
    layer = host.geometry.layer
    past = None if records is None or records.empty else records
    past_length = 0 if past is None else past.length
    if mask is None:
        position_ids = inputs.get("position_ids")
        if position_ids is not None and position_ids.ndim == 3:
            # rotary sections of multimodal models have a leading axis; text tokens restart in all of them alike
            position_ids = position_ids[0]
        if past is not None:
            return past.continued_layout(batch, length, position_ids)
        # flash kernels tell packed documents by these, if they are given; others never look at them
        if "flash" in host.base_config._attn_implementation and inputs.get("cu_seq_lens_q") is not None:
            return layout_from_cu_seq_lens(inputs["cu_seq_lens_q"], batch, length)
        if position_ids is not None:
            return layout_from_position_ids(position_ids, batch, layer)
        return contiguous_layout(batch, length, hidden_states.device)
    if not isinstance(mask, Tensor):
        raise UnsupportedModelError(
            f"attention_mask must be a tensor or None, got {type(mask).__name__}; load the model with "
            "attn_implementation='sdpa', 'eager' or 'flash_attention_2'."
        )
    if mask.ndim == 2:
        real = mask.bool()[:, : int(past_length) + length]
        return layout_from_padding(real).last(length)
    if mask.ndim == 4 and mask.shape[0] == 1 < batch:
        mask = mask.expand(batch, -1, -1, -1)
    if mask.ndim == 4 and graph_is_recorded():
        return layout_from_recorded_mask(mask, past_length)
    return layout_from_mask(mask, None if past is None else past.layout, int(past_length), layer)


# ---------------------------------------------------------------- the attention function


@dataclass(frozen=True)
class Attention:
    """One call of a routed module's attention function, and the ways to run it.

    query: `[B, H, T, D]`; key, value: `[B, H_kv, S, D]`, cached tokens included. Outputs are `[B, T, H, D]`.
    """

    call: TopologyCall
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scoring: Scoring
    kwargs: dict[str, Any]

    def base(self) -> tuple[Tensor, Tensor | None]:
        """What the model runs without a topology, and its attention weights if it returns them."""
        return base_attention(self.module)(self.module, self.query, self.key, self.value, self.mask, **self.kwargs)

    @property
    def scans_cache(self) -> bool:
        """Whether the hard topology is executed without a plan."""
        return serves_decode(self.query, self.key, self.value, self.call.visibility.keys.records)

    def hard(self, plan: Plan | None = None) -> Tensor:
        """The hard topology: a few new tokens scan the cache, longer chunks sort it.

        plan: of the visibility, if there is one already.
        """
        tensors, visibility = (self.query, self.key, self.value), self.call.visibility
        if plan is None and self.scans_cache:
            out = decode_attention(*tensors, visibility, self.scoring)
        else:
            out = hard_attention(*tensors, make_plan(visibility) if plan is None else plan, self.scoring)
        return out.transpose(1, 2).contiguous()

    def bridged(self, plan: Plan | None = None, detached: bool = False) -> tuple[Tensor, Tensor]:
        """The unmerged topology's attention, and far pairs `[H]`, see `bridged_attention`.

        plan: of the visibility, if there is one already. detached: no gradient to q, k and v.
        """
        call = self.call
        q, k, v = (x.detach() if detached else x for x in (self.query, self.key, self.value))
        out, far_pairs = bridged_attention(
            q,
            k,
            v,
            call.routes,
            call.visibility,
            self.scoring,
            homotopy=call.config.homotopy,
            bridge=call.config.gradient_bridge if call.training else "full",  # evaluation takes the hard choice
            plan=plan,
        )
        return out.transpose(1, 2).contiguous(), far_pairs

    def measured_plan(self) -> Plan:
        """The plan, whose density is noted in the layer's metrics."""
        with torch.no_grad():
            plan = make_plan(self.call.visibility)
            self.call.host.metrics["density"] = (plan.visible_count() / plan.causal_count().clamp(min=1)).mean()
        return plan

    def topology(self) -> tuple[Tensor, Tensor | None]:
        """What the adapter makes of it: hard where it may be, else with its gradients and auxiliary loss."""
        call, weights = self.call, None
        if call.hard:
            # keys and queries lie below it: the model's own attention is the fastest that shows all of them
            dense = self.key.shape[2] <= call.visibility.rule.dense_until
            return self.base()[0] if dense else self.hard(), None
        plan = self.measured_plan() if call.training else None
        if call.config.homotopy > 0:
            out, far_pairs = self.bridged(plan)
        else:
            out, weights = self.base()
            if call.routes is None or not call.routes.query.probs.requires_grad:
                return out, weights
            # adds exactly zero to the base's output and the router's gradient to the backward pass
            extra, far_pairs = self.bridged(plan, detached=True)
            out = out + (extra - extra.detach())
        if call.training and call.routes is not None:
            out = _with_auxiliary_loss(out, call, far_pairs)
        return out, weights


def base_attention(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function the module would call without a topology."""
    host = getattr(attention, CHILD)
    return AttentionInterface().get_interface(host.base_config._attn_implementation, host.eager_attention)


def topology_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    topology: Arrival | Literal["lost"] | None = "lost",
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of a routed module (signature of transformers' attention interface).

    Args:
        query: `[B, H, T, D]`; key, value: `[B, H_kv, S, D]`, cached tokens included.
        topology: what the pre-hook prepared; None runs the base attention.

    Returns:
        `[B, T, H, D]`, contiguous as the base functions return it, and None (attention weights are not materialised).

    Raises:
        UnsupportedModelError: the module hands over anything that the topology does not model.
    """
    if isinstance(topology, str):
        raise UnsupportedModelError(
            f"{type(module).__name__} must pass its keyword arguments on to its attention function, got a call without "
            "the one that the topology added; leave the layer out with layers_to_transform."
        )
    if topology is None:
        return base_attention(module)(module, query, key, value, attention_mask, **kwargs)
    scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    refuse_heads(topology.host.geometry, query)
    call = topology.route(query, key, scale)
    refuse_unmodelled(module, call, query, key, attention_mask, kwargs)
    scoring = Scoring(scale, kwargs.get("softcap"))
    return call.purpose.attend(Attention(call, module, query, key, value, attention_mask, scoring, kwargs))


def _with_auxiliary_loss(out: Tensor, call: TopologyCall, far_pairs: Tensor) -> Tensor:
    host, config, routes = call.host, call.config, call.routes
    assert routes is not None
    if not far_pairs.requires_grad:  # all heads are dense: the router owes the others a gradient, which is 0
        far_pairs = far_pairs + 0.0 * sum(role.probs.sum() for role in routes)
    loss = config.density_weight * far_pairs.mean() / call.visibility.query.causal_count().clamp(min=1)
    if config.balance_weight:
        balance = balance_loss(routes, call.visibility.query.real)
        host.metrics["balance"] = balance.detach()
        loss = loss + config.balance_weight * balance
    host.metrics["auxiliary_loss"] = loss.detach()
    return attach_loss(out, host.auxiliary_ramp * loss, host) if loss.requires_grad else out


AttentionInterface.register(IMPLEMENTATION, topology_attention_forward)
# Nothing asks for this mask today: the model keeps its own implementation, only single modules carry ours. If
# a user sets it for a whole model, masks must not silently become None, which would lose padding.
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
