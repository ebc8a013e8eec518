"""Influence balancing: a linear system on which short truncations see the wrong sign."""

import jax.numpy as jnp
import numpy as np

from unrollgrad.problems.types import Example
from unrollgrad.types import UnrolledProblem

__all__ = ["influence_balancing"]


def influence_balancing(horizon: int = 3000) -> Example:
    """A 23-dimensional linear system driven by one parameter.

    s_{t+1} = A s_t + theta v; A has 0.5 on the diagonal and first superdiagonal, v has 10 entries
    +1, then 13 entries -1, and s_0 = 1; the step loss is (s_{t+1}[0] - 1)^2 / 2.

    Known: the fixed point is s[0] = -6 theta, so that theta* = -1/6 in the long run and the final
    loss at the default theta = 0.5 (a scalar) is 8. The influence of theta on s[0] over the last K
    steps is +1, +10, +16.5, +0.57, -6 for K = 1, 10, 20, 40, 100: windows below about 40 steps see
    the wrong sign, and truncated estimators move away from the optimum.

    Args:
        horizon: Inner steps in an episode.

    Example:
        >>> import unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> float(theta)
        0.5

    References:
        Tallec and Ollivier, Unbiasing truncated backpropagation through time, 2017,
        arXiv:1705.08209. Settings of Vicol et al., ICML 2021, arXiv:2112.13835.
    """
    matrix = 0.5 * (np.eye(23) + np.eye(23, k=1))
    drive = np.where(np.arange(23) < 10, 1.0, -1.0)

    def init(key, theta):
        return jnp.ones(23, jnp.result_type(theta))

    def step(key, theta, state, t):
        state = jnp.asarray(matrix, state.dtype) @ state + theta * jnp.asarray(drive, state.dtype)
        return state, 0.5 * (state[0] - 1) ** 2

    return Example(UnrolledProblem(init, step, horizon), jnp.float32(0.5))
