"""Perturbation laws for the evolution-strategies family.

A law is a ``Noise``: four pure functions, of which most laws give only the first two.
``init(theta) -> law_state`` prepares the law for theta; ``sample(key, law_state, theta,
num_pairs)`` draws unit-variance perturbations: a tree like theta, each leaf with a leading axis
``num_pairs``, at least float32. The estimator multiplies them by sigma, so that the same draw
serves every sigma.
A structured law draws the factors of perturbations instead, and gives ``perturb`` and ``contract``,
which say how theta is perturbed with them and how they weigh the differences of losses.
"""

from unrollgrad.noise._dense import gaussian, orthogonal, rademacher
from unrollgrad.noise._guided import guided, share_in
from unrollgrad.noise._laws import Noise, sample
from unrollgrad.noise._low_rank import low_rank
from unrollgrad.noise._matmul import matmul

__all__ = [
    "Noise",
    "gaussian",
    "guided",
    "low_rank",
    "matmul",
    "orthogonal",
    "rademacher",
    "sample",
    "share_in",
]
