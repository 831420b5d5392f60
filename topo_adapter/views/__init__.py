"""Pictures of what an adapter does to a text; `topo_adapter.viz` offers them."""
