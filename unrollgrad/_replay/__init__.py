"""Exact reverse mode through long episodes: a tree of checkpoints over many dispatches."""
