"""A swimmer of three links with a linear policy, in pure JAX."""

import jax
import jax.numpy as jnp
import numpy as np

import unrollgrad as ug
from unrollgrad.problems import Example

LINKS = 3
SEEN = 2 + 2 * LINKS
"""Number of inputs of the policy."""


def swimmer(horizon: int = 1000, *, substeps: int = 5) -> Example:
    """A swimmer of three links moves along x by two motors; the fluid resists sideways motion.

    Links have length 1 and mass 1. The resistance is 0.1 times a link's speed along itself, 5 times
    its sideways speed, and 0.4 times its rate of turning. The policy sees the first link's heading,
    the angles of both joints, the velocity of the middle, and three rates of turning; both torques
    are 3 tanh(W seen / 3). Beyond a right angle a joint pushes back. A step is 0.1 s in five parts;
    its loss is minus the velocity of the middle along x, plus 0.001 times the squared torques.
    Initial angles and rates are uniform within +-0.1.

    It replaces the papers' Swimmer-v2 (MuJoCo), which has the same number of gains (16) and of
    steps, and whose policy also begins at zero, where J is about 0.

    Args:
        horizon: Inner steps in an episode.
        substeps: Parts of a step, each 0.02 s long.

    Returns:
        ``Example(problem, theta)``; theta has the shape (2, 8).

    References:
        Coulom, Reinforcement learning using neural networks, with applications to motor control,
        2002 (the swimmer).
    """
    arm = np.tril(np.ones((LINKS, LINKS), np.float32), -1) + 0.5 * np.eye(LINKS, dtype=np.float32)
    # A torque turns one link back and the next forwards.
    between = np.diff(np.eye(LINKS, dtype=np.float32), axis=0)
    strongest, dt = 3.0, 0.02

    def middle_velocity(angles, moving, rates):
        normals = jnp.stack([-jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return jnp.mean(moving + arm @ (rates[:, None] * normals), axis=0)

    def init(key, theta):
        both = jax.random.uniform(key, (2, LINKS), theta.dtype, -0.1, 0.1)
        return {"angles": both[0], "moving": jnp.zeros(2, theta.dtype), "rates": both[1]}

    def accelerations(state, torques):
        angles, moving, rates = state["angles"], state["moving"], state["rates"]
        along = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        normals = jnp.stack([-along[:, 1], along[:, 0]], axis=-1)
        velocity = moving + arm @ (rates[:, None] * normals)
        forces = -0.1 * jnp.sum(velocity * along, axis=1, keepdims=True) * along
        forces -= 5.0 * jnp.sum(velocity * normals, axis=1, keepdims=True) * normals
        forces += arm @ (rates[:, None] ** 2 * along)  # centrifugal
        joints = between @ angles
        excess = jnp.sign(joints) * jnp.maximum(jnp.abs(joints) - jnp.pi / 2, 0)
        turning = between.T @ (torques - 20 * excess) - 0.4 * rates
        turning += jnp.sum((arm.T @ forces) * normals, axis=1)
        # Mass matrix of (the nose's position, the angles).
        shared = jnp.sum(arm, axis=0)[:, None] * normals
        corner = (arm.T @ arm) * (normals @ normals.T) + np.eye(LINKS, dtype=np.float32) / 12
        mass = jnp.block([[LINKS * jnp.eye(2, dtype=corner.dtype), shared.T], [shared, corner]])
        found = jnp.linalg.solve(mass, jnp.concatenate([jnp.sum(forces, axis=0), turning]))
        return found[:2], found[2:]

    def step(key, theta, state, t):
        angles, moving, rates = state["angles"], state["moving"], state["rates"]
        swims = middle_velocity(angles, moving, rates)
        seen = jnp.concatenate([angles[:1], between @ angles, swims, rates])
        torques = strongest * jnp.tanh(theta @ seen / strongest)

        def part(state, _):
            push, turn = accelerations(state, torques)
            moving, rates = state["moving"] + dt * push, state["rates"] + dt * turn
            state = {"angles": state["angles"] + dt * rates, "moving": moving, "rates": rates}
            return state, middle_velocity(*state.values())[0]

        state, speeds = jax.lax.scan(part, state, None, length=substeps)
        return state, 0.001 * jnp.sum(torques**2) - jnp.mean(speeds)

    return Example(
        ug.UnrolledProblem(init, step, horizon), jnp.zeros((LINKS - 1, SEEN), jnp.float32)
    )
