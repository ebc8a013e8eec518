"""Learned optimizers: architectures, and files from which optax optimizers are loaded.

An architecture is a pair of functions: ``init(key) -> theta`` and ``transform(theta)``, an optax
transformation. In an inner loop it is ``optimizer=lambda theta, t: mlp().transform(theta)`` of
``training_problem``, and any estimator trains theta. Trained, ``save`` writes it, and ``load``
gives an ordinary optax optimizer.
"""

from unrollgrad.learned_optimizers.architecture import Architecture
from unrollgrad.learned_optimizers.files import ARCHITECTURES, Saved, load, read, save
from unrollgrad.learned_optimizers.mlps import adafactor_mlp, mlp, rnn_mlp
from unrollgrad.learned_optimizers.schedules import scheduled_adam, scheduled_sgd

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Saved",
    "adafactor_mlp",
    "load",
    "mlp",
    "read",
    "rnn_mlp",
    "save",
    "scheduled_adam",
    "scheduled_sgd",
]
