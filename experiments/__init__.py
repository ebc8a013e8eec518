"""Experiments: one file per figure or table; ``python -m experiments --help``."""
