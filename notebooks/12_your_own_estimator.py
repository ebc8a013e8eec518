# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write your own gradient estimator
#
# An estimator is a pair of pure functions, `init` and `estimate`. What returns them is an estimator
# like any other: `average`, `fit`, `compare`, checkpoints and many devices work with it. Here we
# write forward gradients, which the library has as `ug.dodge`, and put them to the test.
#
# It runs in less than a minute on two CPU cores. To install, run `pip install -e ".[experiments]"`
# in a checkout.

# %%
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import unrollgrad as ug

# %% [markdown]
# ## The idea
#
# Draw a random direction v and differentiate along it alone, forwards. The slope along v, times v,
# is the gradient on average: E[v v'] is the identity. It needs no memory for the path, and its
# variance grows with the number of parameters P: (P + 1) |g|².
#
# ## The two functions
#
# `init(key, theta)` makes the state of a worker, which has a field `episode`. `estimate(key, theta,
# state, data=None)` returns an `Estimate` and the next state; `data` is for streams. This estimator
# runs a whole episode in every call, so its state holds nothing else and never changes.


# %%
class State(NamedTuple):
    episode: ug.Episode


def forward_gradient(problem):
    """The slope of an episode's loss along a random direction, times the direction."""

    def init(key, theta):
        return State(ug.Episode(key, jnp.int32(0), jnp.int32(problem.horizon)))

    def estimate(key, theta, state, *, data=None):
        key_direction, key_episode = jax.random.split(key)
        leaves, tree = jax.tree.flatten(theta)
        keys = jax.random.split(key_direction, len(leaves))
        draws = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        direction = jax.tree.unflatten(tree, draws)

        def objective(theta):
            return ug.episode_loss(problem, key_episode, theta)

        loss, slope = jax.jvp(objective, (theta,), (direction,))
        grad = jax.tree.map(lambda v: slope * v, direction)
        return ug.Estimate(grad, loss, ug.Info(jnp.int32(problem.horizon))), state

    return ug.GradientEstimator(init, jax.jit(estimate))


# %% [markdown]
# ## Is it right?
#
# The linear recurrence has a gradient in closed form. An unbiased estimator must agree with it
# within the error of the measurement, and the variance must be the one that the theory gives:
# (P + 1) |g|², where P = 5.

# %%
recurrence = ug.problems.linear_recurrence(5, 20, memory=0.8)
problem, theta = recurrence.problem, recurrence.theta
exact = ug.problems.theory.gradient(recurrence.influence(theta))
comparison = ug.diagnostics.compare(
    problem,
    theta,
    {
        "forward_gradient": forward_gradient(problem),
        "full_es": ug.full_es(problem, sigma=0.1),
        "tbptt": ug.tbptt(problem, truncation=5),
    },
    reference=jnp.asarray(exact, jnp.float32),
    num_samples=2000,
    num_chains=0,
    batch_size=500,
    key=jax.random.key(0),
)
comparison.table()

# %%
comparison.plot()

# %% [markdown]
# ## Use it
#
# It averages over workers and trains theta as any other: here two constants of the Lorenz system.

# %%
problem, theta = ug.problems.lorenz(horizon=100)
result = ug.fit(
    ug.average(forward_gradient(problem), 16),
    theta,
    optax.adam(0.01),
    num_steps=300,
    key=jax.random.key(1),
)
losses = result.history["loss"]
print(f"loss {losses[0]:.3g} at the start, {losses[-1]:.3g} at the end")

# %% [markdown]
# ## If a call runs one window
#
# Pass `truncation` as the third field of `GradientEstimator`, keep the inner state of the worker in
# the state, and follow the episode: a call that finds `state.episode.t == 0` begins one, and a call
# that reaches the horizon sets t to 0. Three rules keep the rest of the library right:
#
# - State in and state out have the same structure, shapes and dtypes.
# - All randomness comes from the keys that you are given.
# - `grad`, averaged over the windows of an episode, estimates the gradient of the mean loss per
#   step.
#
# The shortest examples in the library are `unrollgrad/estimators/backprop.py` and `forward.py`.
