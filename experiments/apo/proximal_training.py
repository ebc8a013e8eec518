"""Training for the APO experiments: a task, an optimizer, and a whole run in one scan."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._framework.results import Summary
from unrollgrad import apo
from unrollgrad.types import Key


class Task(NamedTuple):
    """A network with its data and its loss.

    Attributes:
        init: ``init(key) -> params`` draws initial weights.
        sample: ``sample(key) -> batch`` draws a batch.
        predict: ``predict(params, batch) -> outputs``.
        loss: ``loss(params, batch) -> scalar``.
        evaluate: ``evaluate(params) -> scalar``, the loss on all data.
    """

    init: Callable[[Key], Any]
    sample: Callable[[Key], Any]
    predict: Callable[..., jax.Array]
    loss: Callable[..., jax.Array]
    evaluate: Callable[..., jax.Array]


def train(
    task: Task,
    optimizer: optax.GradientTransformation,
    key: Key,
    num_steps: int,
    points: int,
    reported: Callable[[Any, Any], Any] = lambda state, params: params,
) -> tuple[Any, jax.Array, jax.Array]:
    """Trains from initial weights; every step draws a second batch for the discrepancy.

    ``reported(state, params)`` gives the weights that are evaluated, for optimizers that average.

    Returns:
        The final weights, the losses on all data and the learning rates that APO has found (NaN if
        the optimizer does not adapt one); losses and rates have shape (points,).

    Raises:
        ValueError: If ``points`` does not divide ``num_steps``.
    """
    if num_steps % points:
        raise ValueError(f"`points` must divide `num_steps`={num_steps}; got points={points}.")
    optimizer = optax.with_extra_args_support(optimizer)
    key_params, key_batches = jax.random.split(key)

    def step(carry, key):
        params, state = carry
        batch, other_batch = map(task.sample, jax.random.split(key))
        gradient = jax.grad(task.loss)(params, batch)
        updates, state = optimizer.update(
            gradient,
            state,
            params,
            loss=task.loss,
            predict=task.predict,
            batch=batch,
            other_batch=other_batch,
        )
        return (optax.apply_updates(params, updates), state), None

    def stretch(carry, keys):
        (params, state), _ = jax.lax.scan(step, carry, keys)
        return (params, state), (task.evaluate(reported(state, params)), _rate(state))

    params = task.init(key_params)
    keys = jax.random.split(key_batches, (points, num_steps // points))
    (params, _), (losses, rates) = jax.lax.scan(stretch, (params, optimizer.init(params)), keys)
    return params, losses, rates


def last_tenth(losses: jax.Array | np.ndarray) -> jax.Array:
    """The final loss, averaged over the last tenth of the points to reduce noise."""
    return jnp.mean(losses[..., -max(1, losses.shape[-1] // 10) :], axis=-1)


def best(finals: dict[str, float]) -> str:
    """The rate with the lowest final value; a value that is not finite counts as infinite."""
    return min(finals, key=lambda rate: finals[rate] if math.isfinite(finals[rate]) else math.inf)


def best_results(
    summary: Summary, metric: str, *labels: str
) -> dict[tuple[str, ...], dict[str, Any]]:
    """The result with the lowest mean of each series, by the tuple of these labels' values.

    If no mean of a series is finite, its first result is returned.
    """
    out: dict[tuple[str, ...], dict[str, Any]] = {}
    for result in summary.results:
        if result["metric"] == metric:
            series = tuple(result[label] for label in labels)
            held = out.setdefault(series, result)
            if math.isfinite(result["mean"]) and not result["mean"] >= held["mean"]:
                out[series] = result
    return out


def worst(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The result with the highest mean; one that is not finite is the worst."""
    return max(results, key=lambda r: r["mean"] if math.isfinite(r["mean"]) else math.inf)


def _rate(state: object) -> jax.Array:
    if isinstance(state, apo.ApoState) and "learning_rate" in state.hyperparams:
        return state.hyperparams["learning_rate"]
    return jnp.full((), jnp.nan)
