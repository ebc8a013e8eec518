"""Several methods train theta side by side, each by ``ug.fit``."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework.experiment import Progress, Write
from unrollgrad.running import stop_requests
from unrollgrad.types import GradientEstimator, Key, Theta

MEASURED = "measured "
"""Begins the names of a plan's numbers in the history of ``fit``, which has names of its own."""


class Method(NamedTuple):
    """One way to train theta.

    Attributes:
        estimator: The gradient estimator.
        optimizer: The outer optimizer.
        num_steps: Outer updates.
    """

    estimator: GradientEstimator
    optimizer: optax.GradientTransformation
    num_steps: int


class Plan(NamedTuple):
    """The methods that are compared, and how their curves are measured.

    Attributes:
        methods: The methods by name. Seeds that share these objects share the compiled programs.
        evaluate: A jitted function from theta to numbers by metric.
        points: At most so many points of each curve after the first, equally far apart (but for the
            last).
    """

    methods: Mapping[str, Method]
    evaluate: Callable[[Theta], dict[str, Any]]
    points: int


def side_by_side(plan: Plan, key: Key, theta: Theta, write: Write, progress: Progress) -> None:
    """Trains theta with every method from the same beginning by ``ug.fit``, and writes the curves.

    Every line has the labels ``estimator`` (the method's name) and ``step`` (updates so far), the
    ``inner_steps`` so far as ``info`` counts them, and the numbers of ``evaluate``, which are NaN
    after a method has diverged. The lines of a method are written when it ends.

    Args:
        plan: The methods, and how their curves are measured.
        key: The key of ``ug.fit``, the same for every method.
        theta: The theta with which all methods begin.
        write: Writes a line.
        progress: Shows the progress.

    Raises:
        KeyboardInterrupt: After a signal; the lines of the running method are written by then.
    """
    theta = jax.tree.map(jnp.asarray, theta)
    total = sum(method.num_steps for method in plan.methods.values())
    done = 0
    for name, method in plan.methods.items():

        def callback(step: int, *_: object, name: str = name, done: int = done) -> None:
            progress(name, (done + step) / total)

        callback(0)
        start = plan.evaluate(theta)
        write({"estimator": name, "step": 0, "inner_steps": 0, **start})
        every = -(-method.num_steps // plan.points)
        with stop_requests() as stopped:
            history, diverged = _history(plan, method, every, key, theta, callback)
        measured = len(history.get("evaluated_at", ()))
        for i, step in enumerate([*range(every, method.num_steps, every), method.num_steps]):
            if i >= measured and not diverged:
                break
            steps = int(np.sum(history["inner_steps"][:step], dtype=np.int64))
            numbers = {k: history[MEASURED + k][i] if i < measured else np.nan for k in start}
            write({"estimator": name, "step": step, "inner_steps": steps, **numbers})
        if stopped:
            raise KeyboardInterrupt
        done += method.num_steps


def _history(plan, method, every, key, theta, callback) -> tuple[dict[str, np.ndarray], bool]:
    """The history of a method's run, and whether it diverged."""

    def evaluate(_: Key, theta: Theta) -> dict[str, Any]:
        return {MEASURED + name: x for name, x in plan.evaluate(theta).items()}

    options = {"num_steps": method.num_steps, "steps_per_dispatch": every, "key": key}
    run = functools.partial(ug.fit, evaluate=evaluate, callback=callback, **options)
    try:
        return run(method.estimator, theta, method.optimizer).history, False
    except FloatingPointError as error:
        return error.result.history, True  # type: ignore[attr-defined]
