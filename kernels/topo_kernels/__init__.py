"""Triton kernels of the hard topology attention. Imports torch and triton, nothing of `topo_adapter`."""

from .attention import topology_attention

__all__ = ["topology_attention"]
