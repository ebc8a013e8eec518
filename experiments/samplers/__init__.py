"""Reward gradients through samplers: all methods at equal evaluations, on truths that are known."""
