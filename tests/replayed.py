"""The computation of ``test_replay.py`` that is killed: run as a program, it prints its bits.

Arguments: the folder. Theta is in the initial weights, the weights of the examples and the learning
rates of three optimizers, which train side by side.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug

OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "adam": lambda rate: optax.adam(0.1 * rate, eps_root=1e-3),
}


def trainings(horizon: int) -> tuple[ug.UnrolledProblem, Any]:
    """Three trainings of a small network in one problem; its state has a key and a counter."""
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(8, 3)), rng.normal(size=(8,))

    def network(params, x):
        return jnp.tanh(x @ params["hidden"]) @ params["out"]

    def loss(theta, params, batch, key):
        x, y, i = batch
        return jnp.mean(theta["weights"][i] * (network(params, x) - y) ** 2)

    def batch(key):
        i = jax.random.choice(key, 8, (4,))
        dtype = jnp.result_type(float)
        return jnp.asarray(inputs, dtype)[i], jnp.asarray(targets, dtype)[i], i

    parts = {
        name: ug.training_problem(
            loss=loss,
            init_params=lambda key, theta: theta["start"],
            optimizer=lambda theta, t, make=make: make(jnp.exp(theta["log_rate"])),
            sample_batch=batch,
            horizon=horizon,
        )
        for name, make in OPTIMIZERS.items()
    }

    def init(key, theta):
        states = {name: part.init(key, theta[name]) for name, part in parts.items()}
        return {"states": states, "key": key, "count": jnp.int32(0)}

    def step(key, theta, state, t):
        own = jax.random.fold_in(state["key"], state["count"])
        done = {
            name: part.step(own, theta[name], state["states"][name], t)
            for name, part in parts.items()
        }
        states = {name: new for name, (new, _) in done.items()}
        after = {"states": states, "key": own, "count": state["count"] + 1}
        return after, sum(loss for _, loss in done.values())

    def evaluate(key, theta, state):
        dtype = jnp.result_type(float)
        x, y = jnp.asarray(inputs, dtype), jnp.asarray(targets, dtype)
        errors = [network(s.params, x) - y for s in state["states"].values()]
        return sum(jnp.mean(e**2) for e in errors)

    def theta():
        start = {"hidden": jnp.asarray(rng.normal(size=(3, 4))), "out": jnp.zeros(4)}
        return {"start": start, "weights": jnp.ones(8), "log_rate": jnp.log(0.05)}

    whole = {name: theta() for name in OPTIMIZERS}
    return ug.UnrolledProblem(init, step, horizon, evaluate), whole


def spread(horizon: int) -> tuple[ug.UnrolledProblem, jax.Array]:
    """A state that lies on all devices, those of other processes too."""
    layout = jax.sharding.NamedSharding(ug.make_worker_mesh(), jax.P("workers"))

    def init(key, theta):
        start = jax.lax.with_sharding_constraint(jnp.linspace(0, 1, 16) + theta, layout)
        return {"x": start, "key": key}

    def step(key, theta, s, t):
        x = jnp.sin(s["x"]) + theta * jnp.mean(s["x"] ** 2)
        return {"x": x, "key": s["key"]}, jnp.mean(x)

    return ug.UnrolledProblem(init, step, horizon), jnp.float32(0.1)


def bits(estimate: ug.Estimate) -> str:
    """The gradient and the loss, bit for bit."""
    leaves = jax.tree.leaves((estimate.grad, estimate.loss))
    return b"".join(np.asarray(x).tobytes() for x in leaves).hex()


def replayed(folder: str | None) -> ug.Estimate:
    """The computation."""
    problem, theta = trainings(1024)
    return ug.replay(problem, jax.random.key(0), theta, folder=folder, steps_per_dispatch=8)


if __name__ == "__main__":
    print(bits(replayed(sys.argv[1])))
