"""The input of the closed forms of ``ug.problems.theory``, for any differentiable problem."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad.types import Key, Theta, UnrolledProblem


def window_influence(
    problem: UnrolledProblem, key: Key, theta: Theta, num_windows: int, data: Any = None
) -> np.ndarray:
    """The exact influence of each window's theta on each window's mean loss, in one episode.

    There is one theta for each window, and one backward pass for each window. The result serves
    ``ug.problems.theory`` as an influence whose steps are windows: truncation 1 stands for these
    windows, truncation m for windows m times as long, because the mean of the windows' mean losses
    is the mean loss of all steps.

    Args:
        problem: The inner loop, with a static horizon; ``init`` uses the theta of window 0.
        key: The key of ``init``; folded with t, of each step. An estimator's episodes draw other
            keys.
        theta: Outer parameters, which are the same in all windows.
        num_windows: The number of windows n, a divisor of the horizon.
        data: Streaming data, leaves with leading axis ``horizon``.

    Returns:
        float64 array (n, n, P): [k, j] is the derivative of the mean loss of window k with respect
        to the theta used in window j, its leaves in ``jax.tree.leaves``' order.

    Raises:
        ValueError: If num_windows does not divide the horizon.
    """
    if not isinstance(problem.horizon, int) or problem.horizon % num_windows:
        raise ValueError(
            f"`num_windows` must divide the horizon; got {num_windows} and {problem.horizon}."
        )
    jacobian = _jacobian(problem, num_windows, key, theta, data)
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(jacobian)]
    return np.concatenate([x.reshape(num_windows, num_windows, -1) for x in leaves], axis=2)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _jacobian(problem: Any, num_windows: int, key: Key, theta: Theta, data: Any) -> Theta:
    length = problem.horizon // num_windows
    init_key, step_key = jax.random.split(key)
    steps = jnp.arange(problem.horizon).reshape(num_windows, length)
    batches = jax.tree.map(lambda x: x.reshape(num_windows, length, *x.shape[1:]), data)

    def losses(thetas):
        def window(state, inputs):
            theta, steps, batches = inputs

            def step(state, inputs):
                t, batch = inputs
                streamed = () if data is None else (batch,)
                return problem.step(jax.random.fold_in(step_key, t), theta, state, t, *streamed)

            state, losses = jax.lax.scan(step, state, (steps, batches))
            return state, losses.mean()

        begin = problem.init(init_key, jax.tree.map(lambda x: x[0], thetas))
        return jax.lax.scan(window, begin, (thetas, steps, batches))[1]

    thetas = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_windows, *jnp.shape(x))), theta)
    return jax.jacrev(losses)(thetas)
