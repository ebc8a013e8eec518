"""Experiments on amortized proximal optimization (APO)."""
