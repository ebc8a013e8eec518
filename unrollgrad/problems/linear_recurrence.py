"""A linear recurrence: its gradient and its estimators' variances have closed forms."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from unrollgrad.types import UnrolledProblem

__all__ = ["LinearRecurrence", "linear_recurrence"]


class LinearRecurrence(NamedTuple):
    """The recurrence, a theta, and the exact influence of each step's theta on each loss.

    Attributes:
        problem: The inner loop.
        theta: Default outer parameters, a float32 vector.
        influence: ``influence(theta) -> array (T, T, P)``, float64: ``[t, tau]`` is the derivative
            of the loss of step t with respect to the theta used in step tau (``init`` uses the
            theta of step 0). ``ug.problems.theory`` computes gradients and variances from it.
    """

    problem: UnrolledProblem
    theta: jax.Array
    influence: Callable[[ArrayLike], np.ndarray]


def linear_recurrence(
    dim: int = 5,
    horizon: int = 16,
    *,
    gradients: str = "identical",
    memory: float = 0.0,
    curvature: float = 0.0,
    init_influence: float = 0.0,
    seed: int = 0,
) -> LinearRecurrence:
    """s_{t+1} = memory s_t + theta, with loss c_t . s_{t+1} + curvature |s_{t+1}|^2 / 2.

    The losses are quadratic in theta, so that antithetic differences are exactly linear in the
    noise, smoothing changes no gradient, and the closed forms in ``ug.problems.theory`` are exact.

    Args:
        dim: P, the dimension of theta and of the state.
        horizon: T.
        gradients: "identical": every step has the same direction c; "independent": c_t are
            independent standard normal draws, fixed by ``seed``.
        memory: The fraction of a step's influence that remains one step later.
        curvature: The curvature of the loss.
        init_influence: The derivative of s_0 = 1 + init_influence theta.
        seed: The seed of c and theta.

    Raises:
        ValueError: If ``gradients`` is not "identical" or "independent".

    Example:
        >>> import unrollgrad as ug
        >>> example = ug.problems.linear_recurrence(dim=3, horizon=4, memory=0.5)
        >>> example.influence(example.theta).shape
        (4, 4, 3)
    """
    if gradients not in ("identical", "independent"):
        raise ValueError(f'`gradients` must be "identical" or "independent"; got {gradients!r}.')
    draws = np.random.default_rng(seed)
    rows = 1 if gradients == "identical" else horizon
    directions = np.broadcast_to(draws.normal(size=(rows, dim)), (horizon, dim))
    theta = jnp.asarray(draws.normal(size=dim), jnp.float32)

    def init(key, theta):
        return 1 + init_influence * theta

    def step(key, theta, state, t):
        state = memory * state + theta
        direction = jnp.asarray(directions, state.dtype)[t]
        return state, direction @ state + 0.5 * curvature * state @ state

    def influence(theta):
        theta = np.asarray(theta, np.float64)
        state = 1 + init_influence * theta
        out = np.zeros((horizon, horizon, dim))
        for t in range(horizon):
            state = memory * state + theta
            slope = directions[t] + curvature * state
            decay = memory ** (t - np.arange(t + 1.0))
            decay[0] += init_influence * memory ** (t + 1.0)
            out[t, : t + 1] = decay[:, None] * slope
        return out

    return LinearRecurrence(UnrolledProblem(init, step, horizon), theta, influence)
