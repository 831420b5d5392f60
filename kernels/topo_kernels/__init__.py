"""Triton kernels of the topology: router, plan, attention. Imports torch and triton, nothing of `topo_adapter`."""

from .attention import topology_attention
from .decode import decode_attention
from .plan import tree_plan
from .router import MAX_ROUTER_WIDTH, PackedRouter, pack_router, route_addresses

__all__ = [
    "MAX_ROUTER_WIDTH",
    "PackedRouter",
    "decode_attention",
    "pack_router",
    "route_addresses",
    "topology_attention",
    "tree_plan",
]
