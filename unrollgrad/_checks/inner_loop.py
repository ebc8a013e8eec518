"""Checks of a problem and of arguments that depend on it, before anything is compiled."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments
from unrollgrad.types import ArrayTree, Key, State, Theta, UnrolledProblem

if TYPE_CHECKING:
    from jax.extend.core import ClosedJaxpr  # takes long to import

DEFAULT_HORIZON = 1000
"""The horizon of ``training_problem``, for messages."""


def check_problem(problem: object) -> None:
    """Raises TypeError unless ``problem`` is an ``UnrolledProblem``, with functions that fit."""
    if not isinstance(problem, UnrolledProblem):
        hint = ""
        if hasattr(problem, "problem") and hasattr(problem, "theta"):
            hint = " Unpack it: `problem, theta, *_ = ...`."
        raise TypeError(
            f"`problem` must be an UnrolledProblem(init, step, horizon); got a "
            f"{type(problem).__name__}.{hint}"
        )
    if callable(problem.horizon):
        check_call("horizon", problem.horizon, key=None)
    if problem.evaluate is not None:
        check_call("evaluate", problem.evaluate, key=None, theta=None, state=None)


def static_horizon(problem: UnrolledProblem, needed_by: str) -> int:
    """Returns the horizon as an int.

    Raises:
        TypeError: If ``problem`` is not an ``UnrolledProblem``.
        ValueError: If the horizon is sampled.
    """
    check_problem(problem)
    if callable(problem.horizon):
        raise ValueError(
            f"{needed_by} needs a static horizon; got problem.horizon={problem.horizon!r}, a "
            "sampler. Set a whole number with problem._replace(horizon=...), or use an estimator "
            "with a `truncation`, such as pes or tbptt."
        )
    return arguments.positive_int("problem.horizon", problem.horizon)


def check_truncation(problem: UnrolledProblem, truncation: int) -> int:
    """Returns the truncation as an int.

    Raises:
        ValueError: If it does not divide a static horizon, or ``evaluate`` meets a sampled one.
    """
    check_problem(problem)
    truncation = arguments.positive_int("truncation", truncation)
    if callable(problem.horizon):
        if problem.evaluate is not None:
            raise ValueError(
                "problem.evaluate needs a static horizon, since a window counts T/K times; got "
                f"problem.horizon={problem.horizon!r}, a sampler. Set a whole number, or drop the "
                "evaluation with problem._replace(evaluate=None)."
            )
        return truncation
    horizon = arguments.positive_int("problem.horizon", problem.horizon)
    if horizon % truncation:
        default = " (training_problem's default)" if _is_default(problem) else ""
        raise ValueError(
            f"`truncation` must divide `problem.horizon`; got truncation={truncation} and "
            f"problem.horizon={horizon}{default}. Use one of {divisors(horizon)}."
        )
    return truncation


def _is_default(problem: UnrolledProblem) -> bool:
    """Whether the horizon may be the one that ``training_problem`` has if none is passed."""
    by_us = getattr(problem.step, "__qualname__", "").startswith("training_problem.")
    return by_us and problem.horizon == DEFAULT_HORIZON


def divisors(number: int) -> str:
    """Lists the divisors of a number; of more than 24 the first and last 12."""
    found = [str(d) for d in range(1, number + 1) if number % d == 0]
    return ", ".join(found if len(found) <= 24 else [*found[:12], "...", *found[-12:]])


def check_remat(remat: object, more: str = "") -> None:
    """Raises ValueError unless ``remat`` is None, "step", "sqrt", "log" or positive numbers.

    ``more`` is what else the caller takes, for the message.
    """
    if remat is None or (isinstance(remat, str) and remat in ("step", "sqrt", "log")):
        return
    numbers = remat if isinstance(remat, tuple) else (remat,)
    counts = [
        isinstance(n, int | np.integer) and not isinstance(n, bool) and n >= 1 for n in numbers
    ]
    if not counts or not all(counts):
        raise ValueError(
            '`remat` must be None, "step", "sqrt", "log" or how many states to keep, at least 1 '
            "(several numbers, one for each level of a tree: a tuple)"
            f"{more and ', '}{more}; got {remat!r}."
        )


_STREAMED = (
    " The fifth argument of a step is the slice of `estimate(..., data=)`, there only when data is "
    'streamed (and not in `init`, where average(stagger="burn_in") runs the workers).'
)


def check_step(
    problem: UnrolledProblem, key: Key, theta: Theta, data: ArrayTree | None = None
) -> tuple["ClosedJaxpr", "ClosedJaxpr"]:
    """Traces ``init`` and one inner step abstractly, and checks what they return.

    Returns:
        The program (key, theta) -> state of ``init``, and the program
        (state, theta, key, t, data) -> (state, losses) of a step and ``evaluate``.

    Raises:
        TypeError: If ``step`` does not return (state, loss), or changes the state's structure,
            shapes or dtypes; the message lists the differing paths.
        ValueError: If the loss is not a scalar.
    """
    check_call("init", problem.init, key=key, theta=theta)

    def init(key, theta):
        return arguments.strong_state(problem.init(key, theta), "init")

    def step(state, theta, key, t, data):
        extra = () if data is None else (jax.tree.map(lambda x: jnp.asarray(x)[0], data),)
        named = {"key": key, "theta": theta, "state": state, "t": t}
        check_call(
            "step", problem.step, _STREAMED, **named, **({"batch": extra[0]} if extra else {})
        )
        for_step, for_evaluate = jax.random.split(key)
        result = problem.step(for_step, theta, state, t, *extra)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(
                f"`step` must return (state, loss); got {type(result).__name__} "
                f"{jax.tree.structure(result)}."
            )
        after = arguments.strong_state(result[0], "step")
        _check_same(state, after)
        losses = {"step": result[1]}
        if problem.evaluate is not None:
            check_call("evaluate", problem.evaluate, key=key, theta=theta, state=state)
            losses["evaluate"] = problem.evaluate(for_evaluate, theta, state)
        for made_by, loss in losses.items():
            arguments.check_loss(made_by, loss)
        return after, losses

    t = jax.ShapeDtypeStruct((), jnp.int32)
    traced_init, state = jax.make_jaxpr(init, return_shape=True)(key, theta)
    return traced_init, jax.make_jaxpr(step)(state, theta, key, t, data)


def takes(function: Callable, *arguments: object) -> bool:
    """Whether the function can be called with these arguments; some callables do not tell."""
    return _refusal(function, arguments) is None


def check_call(name: str, function: Callable, hint: str = "", /, **given: object) -> None:
    """Raises TypeError unless ``function`` can be called with the arguments, by position."""
    call = f"{name}({', '.join(given)})"
    if not callable(function):
        got = arguments.describe(function)
        raise TypeError(f"`{name}` must be a function, called as {call}; got {got}.{hint}")
    if error := _refusal(function, tuple(given.values())):
        raise TypeError(
            f"`{name}{inspect.signature(function)}` cannot be called as {call}: {error}.{hint}"
        ) from error


def _refusal(function: Callable, arguments: tuple) -> TypeError | None:
    """The error of a call with these arguments, if the function's signature has one."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        return error
    except ValueError:
        return None  # it has no signature
    return None


def _check_same(before: State, after: State) -> None:
    differences = arguments.state_differences(before, after)
    if differences:
        raise TypeError(
            "`step` must return a state with the structure, shapes and dtypes that it was given "
            f"(those of `init`); it changed:\n{differences}\nCast or reshape in `step`, or begin "
            "with the final form in `init`."
        )
