"""What an adapter does to a model: routes, density, and what each depth costs."""
