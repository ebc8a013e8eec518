"""The logistic map: one parameter makes it chaotic, then unbounded."""

import jax
import jax.numpy as jnp

from unrollgrad.problems.types import Example
from unrollgrad.types import UnrolledProblem

__all__ = ["chaotic_map"]


def chaotic_map(horizon: int = 100) -> Example:
    """s_{t+1} = theta s_t (1 - s_t) from a random s_0 in (0.1, 0.9); the step loss is s_{t+1}.

    Known: the Lyapunov exponent is -0.92 at theta = 3.2 (a stable cycle), +0.50 at the default
    theta = 3.9 (a scalar) and ln 2 at 4. At 3.9 backpropagated gradients grow like exp(0.5 t):
    after 100 steps their median is 7e18, although J stays between 0.5 and 0.65 from theta = 3.8 to
    4. Beyond 4, trajectories leave [0, 1] for minus infinity: with a sigma of 0.05 about one worker
    in a hundred becomes non-finite in a window of 10 steps.

    Args:
        horizon: Inner steps in an episode.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.chaotic_map()
        >>> 0.5 < float(ug.episode_loss(problem, jax.random.key(0), theta)) < 0.7
        True

    References:
        Metz et al., Gradients are not all you need, 2021, arXiv:2111.05803 (on such systems).
    """

    def init(key, theta):
        return jax.random.uniform(key, (), jnp.result_type(theta), 0.1, 0.9)

    def step(key, theta, state, t):
        state = theta * state * (1 - state)
        return state, state

    return Example(UnrolledProblem(init, step, horizon), jnp.float32(3.9))
