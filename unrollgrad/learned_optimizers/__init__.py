"""Learned optimizers: architectures, and files from which optax optimizers are loaded.

An architecture is a pair of functions: ``init(key) -> theta`` and ``transform(theta)``, an optax
transformation. Pass ``optimizer=lambda theta, t: mlp().transform(theta)`` to ``training_problem``
and train theta with any estimator. ``save`` writes the trained optimizer to a file, and ``load``
returns it as an ordinary optax optimizer; ``load("scheduled_adam")`` is one that comes with the
package.
"""

from unrollgrad.learned_optimizers.architecture import Architecture
from unrollgrad.learned_optimizers.files import ARCHITECTURES, TRAINED, Saved, load, read, save
from unrollgrad.learned_optimizers.mlps import adafactor_mlp, mlp, rnn_mlp
from unrollgrad.learned_optimizers.schedules import scheduled_adam, scheduled_sgd

__all__ = [
    "ARCHITECTURES",
    "TRAINED",
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
