"""Derivatives through the solution of an inner problem, whichever solver found it."""

from unrollgrad.implicit.decorators import argmin, fixed_point, one_step, root
from unrollgrad.implicit.health import HypergradientError, HypergradientInfo
from unrollgrad.implicit.hypergradient import HyperGradient, hypergradient
from unrollgrad.implicit.operators import gauss_newton
from unrollgrad.implicit.solvers import dense, identity, neumann, nystrom

__all__ = [
    "HyperGradient",
    "HypergradientError",
    "HypergradientInfo",
    "argmin",
    "dense",
    "fixed_point",
    "gauss_newton",
    "hypergradient",
    "identity",
    "neumann",
    "nystrom",
    "one_step",
    "root",
]
