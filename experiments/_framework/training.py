"""The outer loop of the experiments: an estimator and an optimizer, whole runs in one scan."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments._framework.experiment import Progress, Write
from unrollgrad.types import GradientEstimator, Key, Theta


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
        points: Points of each curve after the first; fewer if a method makes fewer updates.
    """

    methods: Mapping[str, Method]
    evaluate: Callable[[Theta], dict[str, Any]]
    points: int


def side_by_side(plan: Plan, key: Key, theta: Theta, write: Write, progress: Progress) -> None:
    """Trains theta with every method from the same beginning, and writes the curves.

    Every line has the labels ``estimator`` (the method's name) and ``step`` (updates so far), the
    ``inner_steps`` so far as ``info`` counts them, and the numbers of ``evaluate``. A method that
    diverges goes on with numbers that are not finite, which ``ug.fit`` would refuse.

    Args:
        plan: The methods, and how their curves are measured.
        key: Update i of every method uses ``fold_in(key, i)``.
        theta: The theta with which all methods begin.
        write: Writes a line.
        progress: Shows the progress.
    """
    evaluate = plan.evaluate
    total = sum(method.num_steps for method in plan.methods.values())
    done = 0
    for name, method in plan.methods.items():
        progress(name, done / total)
        carry = _begin(method.estimator, method.optimizer, key, theta)
        steps = 0
        numbers = {"inner_steps": 0, **evaluate(carry[0])}
        write({"estimator": name, "step": 0, **numbers})
        count = min(plan.points, method.num_steps)
        ends = [method.num_steps * (i + 1) // count for i in range(count)]
        for first, end in zip([0, *ends], ends, strict=False):
            carry, spent = _updates(method.estimator, method.optimizer, key, carry, first, end)
            steps += int(spent)
            write({"estimator": name, "step": end, "inner_steps": steps, **evaluate(carry[0])})
            progress(name, (done + end) / total)
        done += method.num_steps


@functools.partial(jax.jit, static_argnums=(0, 1, 4, 5))
def trajectory(
    estimator: GradientEstimator,
    optimizer: optax.GradientTransformation,
    key: Key,
    theta: Theta,
    num_steps: int,
    every: int = 1,
) -> tuple[Theta, jax.Array]:
    """Updates theta ``num_steps`` times.

    Args:
        estimator: The gradient estimator.
        optimizer: The outer optimizer.
        key: Update i uses ``fold_in(key, i)``.
        theta: Initial outer parameters.
        num_steps: A multiple of ``every``.
        every: Updates between the thetas that are kept.

    Returns:
        The initial theta and the thetas after every ``every`` updates, stacked; and each update's
        loss estimate, shape ``(num_steps,)``.

    Raises:
        ValueError: If num_steps is negative or not a multiple of ``every``.
    """
    if num_steps < 0 or num_steps % every:
        raise ValueError(
            f"`num_steps` must be a multiple of every={every}; got num_steps={num_steps}."
        )

    update = functools.partial(_update, estimator, optimizer, key)

    def stretch(carry, first):
        carry, (losses, _) = jax.lax.scan(update, carry, first + jnp.arange(every))
        return carry, (carry[0], losses)

    begin = _begin(estimator, optimizer, key, theta)
    _, (thetas, losses) = jax.lax.scan(stretch, begin, jnp.arange(0, num_steps, every))
    kept = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), begin[0], thetas)
    return kept, losses.ravel()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(estimator: Any, optimizer: Any, key: Key, theta: Theta) -> tuple[Any, Any, Any]:
    theta = jax.tree.map(jnp.asarray, theta)
    return theta, estimator.init(key, theta), optimizer.init(theta)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _updates(
    estimator: Any, optimizer: Any, key: Key, carry: Any, first: Any, end: Any
) -> tuple[Any, jax.Array]:
    """Makes updates ``first`` to ``end`` and sums their inner steps: one program for any number."""

    def turn(i, carry):
        carry, steps = carry
        carry, (_, spent) = _update(estimator, optimizer, key, carry, i)
        return carry, steps + spent

    return jax.lax.fori_loop(first, end, turn, (carry, jnp.int32(0)))


def _update(
    estimator: Any, optimizer: Any, key: Key, carry: Any, i: Any
) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    """Makes update ``i``; returns its loss and its inner steps."""
    theta, state, opt_state = carry
    estimate, state = estimator.estimate(jax.random.fold_in(key, i), theta, state)
    updates, opt_state = optimizer.update(estimate.grad, opt_state, theta)
    carry = optax.apply_updates(theta, updates), state, opt_state
    return carry, (estimate.loss, estimate.info.inner_steps)
