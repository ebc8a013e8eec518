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
# # Tuning many hyperparameters during one training run
#
# You train weights on training data, and the training loss has hyperparameters theta: a decay per
# feature, a weight per example, an augmentation. You want the theta with the least validation loss
# at the *end* of training. Stochastic bilevel algorithms change theta while the weights train: a
# step costs a few mini-batch gradients, and one run gives both. This notebook shows how to write
# the problem, how to choose the rates, what the algorithms gain on each other, and what to do when
# a run diverges.
#
# It runs in about a minute on two CPU cores. To install, run `pip install -e ".[experiments]"` in a
# checkout. "Bilevel: which method?" in `docs/` has the summary.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import unrollgrad as ug

# %% [markdown]
# ## The problem: two losses, two data sets
#
# `inner(params, theta, batch)` is the training loss and `outer(params, theta, batch)` the
# validation loss; both are *means over a batch*. Here the model is linear, with one decay per
# feature: theta is the decays' logarithms. Only 4 of the 12 features matter, so the others should
# get a larger decay. A weak pull keeps theta near its start, so that no decay goes to infinity.

# %%
key_x, key_noise = jax.random.split(jax.random.key(0))
x = jax.random.normal(key_x, (512, 12))
y = x[:, :4] @ jnp.array([1.0, -1.0, 0.7, -0.7]) + jax.random.normal(key_noise, (512,))
x_train, y_train, x_val, y_val = x[:128], y[:128], x[128:], y[128:]


def inner(w, theta, batch):
    inputs, labels = batch
    return jnp.mean((inputs @ w - labels) ** 2) / 2 + jnp.sum(jnp.exp(theta) * w**2) / 2


def outer(w, theta, batch):
    inputs, labels = batch
    return jnp.mean((inputs @ w - labels) ** 2) / 2 + 0.002 * jnp.sum((theta + 2) ** 2)


problem = {
    "init_params": lambda key: jnp.zeros(12),
    "inner_data": ug.bilevel.finite_sum((x_train, y_train), batch_size=16),
    "outer_data": ug.bilevel.finite_sum((x_val, y_val), batch_size=16),
    "inner_optimizer": optax.sgd(0.1),
}

# %% [markdown]
# The inner problem is small enough to solve exactly, so we know what we want to minimise: h(theta),
# the validation loss of the fully trained weights.


# %%
def h(theta):
    hessian = x_train.T @ x_train / 128 + jnp.diag(jnp.exp(theta))
    w = jnp.linalg.solve(hessian, x_train.T @ y_train / 128)
    return outer(w, theta, (x_val, y_val))


theta = jnp.full(12, -2.0)
print(f"h at the start: {h(theta):.4f}")

# %% [markdown]
# ## SOBA in one line
#
# An algorithm is an estimator of theta's gradient, and `ug.fit` with an optax optimizer descends
# it. The estimator carries the weights (`state.carried.params`) and the solution v of a linear
# system, and moves them one step per call.

# %%
soba = ug.bilevel.soba(outer, inner, **problem)
run = ug.fit(soba, theta, optax.sgd(0.3), num_steps=4000, key=jax.random.key(0))
decays = np.exp(run.theta)
print(f"h at the end: {h(run.theta):.4f}")
print("decays of the 4 features that matter:", decays[:4].round(3))
print("decays of the others:                ", decays[4:].round(3))

# %% [markdown]
# ## The rates
#
# Three variables move at the same time, and theta must be the slow one. On a quadratic with inner
# curvature mu everything is known: the step is a matrix, and the run converges where its spectral
# radius is below 1. Below it is the scalar example g = mu z²/2 - z x, F = (z - 1)²/2 + 0.05 x².


# %%
def radius(mu, inner_rate, outer_rate, kappa=0.1):
    step = np.array(
        [
            [1 - inner_rate * mu, 0, inner_rate],
            [inner_rate, 1 - inner_rate * mu, 0],
            [0, -outer_rate, 1 - outer_rate * kappa],
        ]
    )
    return np.abs(np.linalg.eigvals(step)).max()


outer_rates = np.geomspace(1e-5, 1, 60)
for mu in (1.0, 0.3, 0.1):
    plt.semilogx(outer_rates, [radius(mu, 0.1, rate) for rate in outer_rates], label=f"mu = {mu}")
    plt.axvline(0.1 * mu**3, color=plt.gca().lines[-1].get_color(), ls=":")
plt.axhline(1, color="k", lw=1)
plt.xlabel("outer rate (inner rate 0.1; dotted: inner rate times mu cubed)")
plt.ylabel("spectral radius of a SOBA step")
plt.ylim(0.95, 1.05)
plt.legend()
plt.show()

# %% [markdown]
# The stable outer rates end at a few times *inner rate x mu cubed*: that is why good ratios differ
# by many powers of ten between problems, and why no default exists. If a run diverges, `fit` says
# which rate is to blame:

# %%
try:
    ug.fit(soba, theta, optax.sgd(1e4), num_steps=2000, key=jax.random.key(0))
except FloatingPointError as error:
    print(*getattr(error, "__notes__", ()), sep="\n")

# %% [markdown]
# A run that did not end in NaN has the same numbers in its history:

# %%
print(ug.bilevel.advice(run.history))

# %% [markdown]
# ## Which algorithm?
#
# SOBA's steps are noisy, so with constant rates it stops at a floor. `saba` remembers the gradients
# of every batch, which removes the noise on a finite data set. `stocbio` runs ten inner steps and a
# Neumann series for each step of theta. `f2sa` needs no second derivatives. We give all of them the
# same number of gradients; `info.gradients` counts them.

# %%
BUDGET = 20_000


def curve(name, outer_rate, **settings):
    estimator = ug.bilevel.REGISTRY[name].build(outer, inner, **problem, **settings)
    first = ug.fit(estimator, theta, optax.sgd(outer_rate), num_steps=100, key=jax.random.key(1))
    cost = first.history["gradients"].mean()
    steps = int(BUDGET / cost) // 100 * 100
    found = ug.fit(
        estimator,
        theta,
        optax.sgd(outer_rate),
        num_steps=steps,
        key=jax.random.key(1),
        evaluate=lambda key, theta: {"h": h(theta)},
    )
    return found.history["evaluated_at"] * cost, found.history["h"]


candidates = {
    "soba": curve("soba", 1.0),
    "saba": curve("saba", 1.0),
    "stocbio": curve("stocbio", 1.0, linear_rate=0.1),
    "f2sa": curve("f2sa", 1.0),
}


def newton(theta, _):
    return theta - jnp.linalg.solve(jax.hessian(h)(theta), jax.grad(h)(theta)), None


best, _ = jax.lax.scan(newton, jnp.asarray(run.theta), length=10)
least = h(best) - 1e-7  # about the rounding of a float32
print(f"least h: {least:.6f}, slope {jnp.linalg.norm(jax.grad(h)(best)):.1e}")
for name, (gradients, values) in candidates.items():
    plt.semilogy(gradients, values - least, label=name)
plt.xlabel("gradients of one batch")
plt.ylabel("h - least h")
plt.legend()
plt.show()

# %% [markdown]
# On a finite data set that fits in memory, start with `saba`. With endless or augmented data start
# with `soba` or `ma_soba`, and let the rates fall. The experiment `bilevel_benchmark` has this
# comparison for all algorithms, each tuned on the same grid.
#
# ## Many inner problems under one theta
#
# `bsvrb` keeps many inner problems (users, tasks, loss scales) and visits some of them per step.
# The losses get the number of the block as a fourth argument. Here five models of different decay
# share theta.

# %%
shifts = jnp.linspace(-1, 1, 5)
blocks = ug.bilevel.bsvrb(
    lambda w, theta, batch, i: outer(w, theta, batch),
    lambda w, theta, batch, i: inner(w, theta + shifts[i], batch),
    num_blocks=5,
    blocks_per_step=2,
    **problem,
)
run = ug.fit(blocks, theta, optax.sgd(0.3), num_steps=2000, key=jax.random.key(2))
print("params of all blocks:", run.worker_state.carried.params.shape)
print("mean h over the blocks:", np.mean([h(run.theta + s) for s in shifts]).round(4))
