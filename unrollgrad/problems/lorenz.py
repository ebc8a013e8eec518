"""The Lorenz system, whose parameters are to be found from a trajectory."""

import jax.numpy as jnp
import numpy as np

from unrollgrad.problems.types import Example
from unrollgrad.types import UnrolledProblem

__all__ = ["TRUTH", "lorenz"]

TRUTH = (10.0, 28.0)


def lorenz(horizon: int = 2000) -> Example:
    """Euler steps of 0.005 of x' = a (y - x), y' = (r - z) x - y, z' = x y - 8/3 z.

    theta = (ln a, ln r); the step loss is (z - z_true)^2 against the trajectory of a = 10, r = 28
    from the same start (1.2, 1.3, 1.6), which the state contains as well.

    Known: J is 0 at theta = (ln 10, ln 28) = (2.303, 3.332); at the default theta = (3.116, 3.7) it
    is 750, 322 and 353 for horizons of 100, 500 and 2000. The system is chaotic: beyond about 500
    steps the gradient of J is large, of random sign, and useless; a smoothed J can be descended.

    Args:
        horizon: Inner steps in an episode.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.lorenz(horizon=100)
        >>> round(float(ug.episode_loss(problem, jax.random.key(0), theta)))
        750

    References:
        Settings of Li et al., Noise-reuse in online evolution strategies, NeurIPS 2023,
        arXiv:2304.12180.
    """

    def flow(state, a, r):
        x, y, z = state
        return state + 0.005 * jnp.stack([a * (y - x), (r - z) * x - y, x * y - 8 / 3 * z])

    def init(key, theta):
        start = jnp.asarray((1.2, 1.3, 1.6), theta.dtype)
        return {"model": start, "true": start}

    def step(key, theta, state, t):
        model = flow(state["model"], *jnp.exp(theta))
        true = flow(state["true"], *jnp.exp(jnp.asarray(np.log(TRUTH), theta.dtype)))
        return {"model": model, "true": true}, (model[2] - true[2]) ** 2

    return Example(UnrolledProblem(init, step, horizon), jnp.array([3.116, 3.7], jnp.float32))
