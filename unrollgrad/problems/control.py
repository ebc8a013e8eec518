"""Cart-pole with a linear policy, in pure JAX."""

import jax
import jax.numpy as jnp

from unrollgrad.problems.types import Example
from unrollgrad.types import UnrolledProblem

__all__ = ["LQR_POLICY", "control"]

LQR_POLICY = (25.7, 27.1, 148.4, 32.1)
"""The linear-quadratic regulator of the system linearised at upright, as a theta."""


def control(horizon: int = 200) -> Example:
    """Keeps a pole upright on a cart with the force 10 tanh(theta . state / 10).

    The state is (position, velocity, angle, angular velocity), drawn uniformly from +-0.1; a step
    is 0.02 s of the usual cart-pole (cart 1 kg, pole 0.1 kg of half-length 0.5 m); the step loss is
    position^2 + 20 (1 - cos angle) + 0.001 force^2.

    Known: without control (the default theta, four zeros) the pole falls and J is about 12.8 at the
    default horizon; the regulator of the linearised system, theta = ``LQR_POLICY``, reaches about
    0.004, and (0, 0, 20, 0) about 0.09.

    Args:
        horizon: Inner steps in an episode.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.control()
        >>> 9 < float(ug.episode_loss(problem, jax.random.key(0), theta)) < 18
        True

    References:
        Barto, Sutton, Anderson, Neuronlike adaptive elements that can solve difficult learning
        control problems, 1983 (the dynamics).
    """
    gravity, total, pole, half_length, dt = 9.8, 1.1, 0.1, 0.5, 0.02

    def init(key, theta):
        return jax.random.uniform(key, (4,), theta.dtype, -0.1, 0.1)

    def step(key, theta, state, t):
        position, velocity, angle, spin = state
        force = 10 * jnp.tanh(theta @ state / 10)
        push = (force + pole * half_length * spin**2 * jnp.sin(angle)) / total
        turn = gravity * jnp.sin(angle) - jnp.cos(angle) * push
        turn = turn / (half_length * (4 / 3 - pole * jnp.cos(angle) ** 2 / total))
        thrust = push - pole * half_length * turn * jnp.cos(angle) / total
        state = state + dt * jnp.stack([velocity, thrust, spin, turn])
        position, _, angle, _ = state
        return state, position**2 + 20 * (1 - jnp.cos(angle)) + 0.001 * force**2

    return Example(UnrolledProblem(init, step, horizon), jnp.zeros(4, jnp.float32))
