"""MuJoCo's swimmer and half-cheetah as Gymnasium defines them, with a linear policy.

MuJoCo's C engine steps all robots of a batch in one call behind ``jax.pure_callback``: on two CPU
cores an environment step costs 0.03 to 0.05 ms, against 0.16 to 0.7 ms (and half a minute of
compilation) in MJX at batches of 32 to 256. A step has no derivative: evolution strategies only.
"""

import functools
import threading
from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import unrollgrad as ug
from unrollgrad.problems import Example
from unrollgrad.running import need
from unrollgrad.types import Key


class Robot(NamedTuple):
    """What Gymnasium's environment adds to the model.

    Attributes:
        model: The file with the model in Gymnasium's assets, without its ending.
        substeps: MuJoCo's steps of 0.01 s in a step of the environment.
        hidden: Leading positions that the policy does not see: where on the ground the robot is.
        control_cost: Factor of the squared controls in the reward.
        rates: The law of the initial velocities, which are multiplied by 0.1.
        total_mass: In kg; None: as the model's file says.
    """

    model: str
    substeps: int
    hidden: int
    control_cost: float
    rates: Callable[..., jax.Array]
    total_mass: float | None = None


def _uniform(key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -1, 1)


ROBOTS = {
    "swimmer": Robot("swimmer", 4, 2, 1e-4, _uniform),
    "half_cheetah": Robot("half_cheetah", 5, 1, 0.1, jax.random.normal, total_mass=14.0),
}


def robot(name: str, horizon: int = 1000) -> Example:
    """A robot is to run or swim along x; the controls are W times what the policy sees.

    A step is one of Gymnasium's ``Swimmer-v4`` or ``HalfCheetah-v4`` and its loss is minus their
    reward: the mean velocity along x in the step, minus a cost of the squared controls. MuJoCo
    clips the controls to [-1, 1], the cost does not. The policy sees all positions but those of
    ``Robot.hidden``, and all velocities; nothing is normalised.

    The state is (positions, velocities), so that a step is a pure function: each begins with
    MuJoCo's solver cold, which Gymnasium's environment begins where its last step ended.

    Args:
        name: "swimmer" (theta has the shape (2, 8)) or "half_cheetah" ((6, 17)).
        horizon: Inner steps in an episode.

    Returns:
        ``Example(problem, theta)``; theta is zero.

    Raises:
        ImportError: If MuJoCo or Gymnasium is not installed.
    """
    about = ROBOTS[name]
    model, advance = engine(name)
    start = jnp.concatenate([model.qpos0, jnp.zeros(model.nv)])
    num_positions = model.nq
    dt = about.substeps * model.opt.timestep

    def init(key, theta):
        keys = jax.random.split(key)
        positions = _uniform(keys[0], (num_positions,), theta.dtype)
        rates = about.rates(keys[1], (model.nv,), theta.dtype)
        return start.astype(theta.dtype) + 0.1 * jnp.concatenate([positions, rates])

    def step(key, theta, state, t):
        controls = theta @ state[about.hidden :]
        # One array each way: handing one over costs as much as a robot's step.
        out = jax.ShapeDtypeStruct((start.size + 1,), state.dtype)
        given = jnp.concatenate([state, controls])
        found = jax.pure_callback(advance, out, given, vmap_method="broadcast_all")
        return found[:-1], about.control_cost * jnp.sum(controls**2) - found[-1] / dt

    seen = start.size - about.hidden
    return Example(
        ug.UnrolledProblem(init, step, horizon), jnp.zeros((model.nu, seen), jnp.float32)
    )


class Engine(NamedTuple):
    """MuJoCo's C engine for one robot.

    Attributes:
        model: The ``mujoco.MjModel``.
        advance: From (positions, velocities, controls) to (positions, velocities, metres along x)
            after a step of the environment, on the last axis; the other axes are a batch.
    """

    model: Any
    advance: Callable[[Any], np.ndarray]


HUGE = 1e10
"""MuJoCo takes controls and states beyond it for broken: it would zero them and warn in a file."""


@functools.cache
def engine(name: str) -> Engine:
    """The engine for a robot, on the calling thread: two threads gained nothing on two cores.

    A robot whose state or controls are not finite, or huge, stays where it is: all is NaN.
    """
    mujoco = need("mujoco", "MuJoCo", "control")
    pool = need("mujoco.rollout", "MuJoCo", "control").Rollout(nthread=0)
    model, substeps = _model(mujoco, ROBOTS[name]), ROBOTS[name].substeps
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET  # a fall into NaN is to be seen
    scratch, lock = mujoco.MjData(model), threading.Lock()
    at_rest = np.concatenate([model.qpos0, np.zeros(model.nv + model.nu)])

    def advance(given: Any) -> np.ndarray:
        given = np.asarray(given)
        flat = given.reshape(-1, given.shape[-1]).astype(np.float64)
        lost = np.logical_not(np.all(np.abs(flat) < HUGE, axis=1))  # NaN too
        flat = np.where(lost[:, None], at_rest, flat)
        begin, controls = np.split(flat, [model.nq + model.nv], axis=1)
        timed = np.concatenate([np.zeros((len(flat), 1)), begin], axis=1)
        held = np.repeat(controls[:, None], substeps, axis=1)
        with lock:  # several devices may call at once
            found, _ = pool.rollout(model, scratch, timed, held, nstep=substeps)
        end = found[:, -1, 1:]
        out = np.concatenate([end, end[:, :1] - begin[:, :1]], axis=1)
        out[lost] = np.nan
        return out.reshape(*given.shape[:-1], -1).astype(given.dtype)

    return Engine(model, advance)


def _model(mujoco: Any, about: Robot) -> Any:
    """Gymnasium's model; what MuJoCo no longer reads in it, the total mass, is set by a call."""
    folder = resources.files(need("gymnasium", "Gymnasium", "control")) / "envs/mujoco/assets"
    text = (folder / f"{about.model}.xml").read_text()
    if about.total_mass is None:
        return mujoco.MjModel.from_xml_string(text)
    text = text.replace(f' settotalmass="{about.total_mass:g}"', "")
    model = mujoco.MjModel.from_xml_string(text)
    mujoco.mj_setTotalmass(model, about.total_mass)
    mujoco.mj_setConst(model, mujoco.MjData(model))
    return model
