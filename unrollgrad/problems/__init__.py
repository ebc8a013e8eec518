"""Canonical inner problems with known answers, for tests, examples and benchmarks.

Each factory returns a NamedTuple that begins with ``problem`` and a default float32 ``theta``.
"""

from unrollgrad.problems import theory
from unrollgrad.problems.chaotic_map import chaotic_map
from unrollgrad.problems.control import LQR_POLICY, control
from unrollgrad.problems.influence_balancing import influence_balancing
from unrollgrad.problems.linear_recurrence import LinearRecurrence, linear_recurrence
from unrollgrad.problems.lorenz import lorenz
from unrollgrad.problems.toy_regression import toy_regression
from unrollgrad.problems.types import Example

__all__ = [
    "LQR_POLICY",
    "Example",
    "LinearRecurrence",
    "chaotic_map",
    "control",
    "influence_balancing",
    "linear_recurrence",
    "lorenz",
    "theory",
    "toy_regression",
]
