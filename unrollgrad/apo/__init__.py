"""Amortized proximal optimization (APO): hyperparameters and preconditioners learned online."""

from unrollgrad.apo.learning_rate import learning_rate
from unrollgrad.apo.preconditioner import preconditioner
from unrollgrad.apo.proximal import ApoState, kl_divergence, squared_error
from unrollgrad.apo.structures import (
    Structure,
    by_shape,
    dense,
    diagonal,
    frozen,
    identity,
    kronecker,
)

__all__ = [
    "ApoState",
    "Structure",
    "by_shape",
    "dense",
    "diagonal",
    "frozen",
    "identity",
    "kl_divergence",
    "kronecker",
    "learning_rate",
    "preconditioner",
    "squared_error",
]
