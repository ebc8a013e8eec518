"""Amortized proximal optimization."""
