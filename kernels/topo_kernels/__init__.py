"""Triton kernels of the topology: routes, plans, attention, decode, distillation."""

from .attention import topology_attention
from .decode import decode_attention
from .distill import far_values
from .plan import tree_plan
from .router import MAX_ROUTER_WIDTH, PackedRouter, pack_router, route_addresses

__all__ = [
    "MAX_ROUTER_WIDTH",
    "PackedRouter",
    "decode_attention",
    "far_values",
    "pack_router",
    "route_addresses",
    "topology_attention",
    "tree_plan",
]
