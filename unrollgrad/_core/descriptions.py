"""What an estimator remembers of the call that made it: its text, and the problem it is for."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import jax
import numpy as np

from unrollgrad.types import GradientEstimator, UnrolledProblem

P = ParamSpec("P")


class About(NamedTuple):
    """The call that made an estimator.

    Attributes:
        text: The call, without the problem, such as ``pes(truncation=10, sigma=0.1)``.
        problem: The problem; None if it is not known.
        explain: Optional ``explain(history) -> text``: what the history of a run that ended with
            numbers that are not finite says about its settings. ``fit`` adds it to the error.
    """

    text: str
    problem: UnrolledProblem | None = None
    explain: Callable[[dict[str, Any]], str] | None = None


def about(estimator: GradientEstimator) -> About:
    """The call that made the estimator; one that a user wrote has no problem."""
    return getattr(estimator.init, "about", About(repr(estimator)))


def described(factory: Callable[P, GradientEstimator]) -> Callable[P, GradientEstimator]:
    """Makes a factory's estimators remember its arguments: ``repr`` shows them, ``about`` too.

    The first argument is the problem, or the estimators that the new one is made of.
    """

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> GradientEstimator:
        made = factory(*args, **kwargs)
        first: Any = args[0] if args else next(iter(kwargs.values()))
        shown = [_text(x) for x in args if x is not first or not isinstance(x, UnrolledProblem)]
        shown += [f"{k}={_text(x)}" for k, x in kwargs.items() if x is not first]
        problem = first if isinstance(first, UnrolledProblem) else _problem_of(first)
        call = f"{getattr(factory, '__name__', 'estimator')}({', '.join(shown)})"
        made.init.about = About(call, problem)  # type: ignore[attr-defined]
        return made

    return make


def _problem_of(first: Any) -> UnrolledProblem | None:
    if not isinstance(first, GradientEstimator):  # several estimators, or a loss
        first = next(iter(first), None) if isinstance(first, list | tuple) else None
    return about(first).problem if isinstance(first, GradientEstimator) else None


def _text(value: object) -> str:
    """A short text: arrays by dtype and shape, so that nothing is fetched; functions by name."""
    if isinstance(value, GradientEstimator):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_text(x)}" for k, x in value.items()) + "}"
    if hasattr(value, "_fields"):  # a NamedTuple, such as a law of noise
        return type(value).__name__
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, jax.Array | np.ndarray):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return repr(value)
