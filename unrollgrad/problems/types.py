"""The value that a factory of problems returns."""

from typing import Any, NamedTuple

from unrollgrad.types import UnrolledProblem

__all__ = ["Example"]


class Example(NamedTuple):
    """A problem and default outer parameters.

    Attributes:
        problem: The inner loop.
        theta: Default outer parameters.
    """

    problem: UnrolledProblem
    theta: Any
