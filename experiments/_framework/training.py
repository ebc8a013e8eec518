"""The outer loop of the experiments: an estimator, an optax optimizer, whole runs in one scan."""

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
        estimator: Of the gradient.
        optimizer: The outer optimizer.
        num_steps: Outer updates.
    """

    estimator: GradientEstimator
    optimizer: optax.GradientTransformation
    num_steps: int


def side_by_side(
    methods: Mapping[str, Method],
    key: Key,
    theta: Theta,
    evaluate: Callable[[Theta], dict[str, Any]],
    points: int,
    write: Write,
    progress: Progress,
) -> None:
    """Trains theta with every method from the same beginning, and writes what becomes of it.

    Every line has the labels ``estimator`` (the method's name) and ``step`` (updates so far), the
    ``inner_steps`` so far as ``info`` counts them, and what ``evaluate`` says of theta.

    Args:
        methods: By name. The same objects for all seeds compile once.
        key: Every method's updates use ``fold_in(key, i)``.
        theta: Where all begin.
        evaluate: Of a theta, a dict of numbers by metric; a function that is jitted.
        points: Lines of each method after the first; fewer where it makes fewer updates.
        write: The experiment's.
        progress: The experiment's.
    """
    total = sum(method.num_steps for method in methods.values())
    done = 0
    for name, method in methods.items():
        progress(name, done / total)
        carry = _begin(method.estimator, method.optimizer, key, theta)
        steps = 0
        numbers = {"inner_steps": 0, **evaluate(carry[0])}
        write({"estimator": name, "step": 0, **numbers})
        count = min(points, method.num_steps)
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
        estimator: Of the gradient.
        optimizer: The outer optimizer.
        key: Update i uses ``fold_in(key, i)``.
        theta: Where to begin.
        num_steps: A multiple of ``every``.
        every: Updates between the thetas that are kept.

    Returns:
        The thetas after every ``every`` updates, stacked, the first being the beginning; and each
        update's loss estimate, shape ``(num_steps,)``.

    Raises:
        ValueError: If num_steps is negative or no multiple of ``every``.
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
    """Updates ``first`` to ``end``, and the inner steps of all: one program for any number."""

    def turn(i, carry):
        carry, steps = carry
        carry, (_, spent) = _update(estimator, optimizer, key, carry, i)
        return carry, steps + spent

    return jax.lax.fori_loop(first, end, turn, (carry, jnp.int32(0)))


def _update(
    estimator: Any, optimizer: Any, key: Key, carry: Any, i: Any
) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    """Update ``i``, its loss and its inner steps."""
    theta, state, opt_state = carry
    estimate, state = estimator.estimate(jax.random.fold_in(key, i), theta, state)
    updates, opt_state = optimizer.update(estimate.grad, opt_state, theta)
    carry = optax.apply_updates(theta, updates), state, opt_state
    return carry, (estimate.loss, estimate.info.inner_steps)
