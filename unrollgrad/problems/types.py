"""What a canonical problem comes as."""

from typing import NamedTuple

from unrollgrad.types import Theta, UnrolledProblem


class Example(NamedTuple):
    """A problem and where to start on it.

    Attributes:
        problem: The inner loop.
        theta: Default outer parameters.
    """

    problem: UnrolledProblem
    theta: Theta
