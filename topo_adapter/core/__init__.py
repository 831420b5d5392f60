"""The definitions: tree, documents, what a query sees, what a map of depths is. Pure torch, no model."""
