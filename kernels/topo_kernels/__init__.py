"""Triton kernels of the topology: routes, visits, plans, attention, decode, distillation."""

from .attention import topology_attention
from .bridge import bridged_topology_attention
from .decode import decode_attention
from .distill import far_mass
from .heads import PackedHeadRouter, pack_head_router, route_heads
from .leaves import MAX_TILE_LEAVES
from .plan import tree_plan
from .router import MAX_ROUTER_WIDTH, PackedRouter, pack_router, route_addresses
from .types import LocalPlan, LocalTensors, Plan, PlanTensors, Scoring
from .visits import likeliest_balls

__all__ = [
    "MAX_ROUTER_WIDTH",
    "MAX_TILE_LEAVES",
    "LocalPlan",
    "LocalTensors",
    "PackedHeadRouter",
    "PackedRouter",
    "Plan",
    "PlanTensors",
    "Scoring",
    "bridged_topology_attention",
    "decode_attention",
    "far_mass",
    "likeliest_balls",
    "pack_head_router",
    "pack_router",
    "route_addresses",
    "route_heads",
    "topology_attention",
    "tree_plan",
]
