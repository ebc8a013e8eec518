"""The problems that experiments can be run on, by name, with settings that suit each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import unrollgrad as ug


class Choice(NamedTuple):
    """A problem on the command line.

    Attributes:
        make: ``make(horizon)`` returns a problem, a theta, and perhaps more.
        horizon: By default.
        truncation: By default.
        sigma: By default, in theta's units.
        reference: Whose mean is the truth by default: bptt, or full_es (the gradient of the
            smoothed J) where backpropagation explodes.
    """

    make: Callable[[int], Any]
    horizon: int
    truncation: int
    sigma: float
    reference: str = "bptt"


def _digits(horizon: int) -> Any:
    # Imported here: scikit-learn and flax take seconds.
    from experiments.problems.digits import digits

    return digits(horizon)


PROBLEMS = {
    "digits": Choice(_digits, horizon=100, truncation=10, sigma=0.1),
    "influence_balancing": Choice(
        ug.problems.influence_balancing, horizon=100, truncation=10, sigma=0.1
    ),
    "toy_regression": Choice(ug.problems.toy_regression, horizon=100, truncation=10, sigma=0.3),
    "linear_recurrence": Choice(
        lambda horizon: ug.problems.linear_recurrence(5, horizon, memory=0.8),
        horizon=20,
        truncation=5,
        sigma=0.1,
    ),
    "chaotic_map": Choice(
        ug.problems.chaotic_map, horizon=100, truncation=10, sigma=0.01, reference="full_es"
    ),
    "lorenz": Choice(ug.problems.lorenz, horizon=200, truncation=20, sigma=0.04),
    "control": Choice(ug.problems.control, horizon=200, truncation=20, sigma=0.3),
}
