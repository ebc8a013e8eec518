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
# # Derivatives of a solution: implicit and bilevel
#
# If the inner problem is solved to its end, the path does not matter: the derivative of the
# solution follows from the equation that it satisfies. That takes no unrolling and no memory for
# the path. Here the inner problem is ridge regression with one penalty for each feature, and the
# outer loss is the error on validation data.
#
# It runs in less than a minute on two CPU cores. To install, run `pip install -e ".[experiments]"`
# in a checkout.

# %%
import jax
import jax.numpy as jnp
import lineax as lx
import matplotlib.pyplot as plt
import numpy as np
import optax

import unrollgrad as ug

# %% [markdown]
# Twenty features, of which five matter.

# %%
rng = np.random.default_rng(0)
truth = np.where(np.arange(20) < 5, 1.0, 0.0)
x = rng.normal(size=(90, 20)).astype(np.float32)
y = (x @ truth + rng.normal(size=90)).astype(np.float32)
train, validation = (x[:45], y[:45]), (x[45:], y[45:])


domain = ug.constraints.box(0.0, 3.0)


def inner(params, theta):
    """Theta holds each feature's penalty, unconstrained."""
    error, penalty = train[0] @ params - train[1], ug.constraints.constrain(domain, theta)
    return jnp.mean(error**2) / 2 + jnp.sum(penalty * params**2) / 2


def outer(params, theta):
    return jnp.mean((validation[0] @ params - validation[1]) ** 2) / 2


theta = ug.constraints.unconstrain(domain, jnp.full(20, 0.1))

# %% [markdown]
# ## A solver of yours, made differentiable
#
# Decorate any solver with the equation that its result satisfies. The solver may be a loop that
# stops early, or another library. Forward and reverse mode, second derivatives, `jit` and `vmap`
# work.


# %%
@ug.implicit.root(jax.grad(inner))
def ridge(init, theta):
    penalty = ug.constraints.constrain(domain, theta)
    hessian = train[0].T @ train[0] / len(train[1]) + jnp.diag(penalty)
    return jnp.linalg.solve(hessian, train[0].T @ train[1] / len(train[1]))


def objective(theta):
    return outer(ridge(jnp.zeros(20), theta), theta)


slope = jax.jit(jax.grad(objective))(theta)
step = 0.03 * jnp.eye(20)[0]
difference = (objective(theta + step) - objective(theta - step)) / 0.06
print(f"derivative of the first penalty {slope[0]:.5f}, by differences {difference:.5f}")

# %% [markdown]
# ## Only a point and two losses
#
# Where the inner problem is solved by an optimizer, `hypergradient` needs the two losses and a
# solver of linear systems; `info` says whether the point is good enough. Here conjugate gradients;
# `ug.implicit.neumann` and `nystrom` are for networks.

# %%
hypergradient = ug.implicit.hypergradient(outer, inner, solver=lx.CG(1e-6, 1e-6))
found = jax.jit(hypergradient)(ridge(jnp.zeros(20), theta), theta)
print(f"largest difference of the gradients {jnp.max(jnp.abs(found.grad - slope)):.1e}")
print(f"stationarity {found.info.stationarity:.1e}, residual {found.info.residual:.1e}")

# %% [markdown]
# ## Bilevel: both loops at once
#
# `bilevel.solve` descends both. A warm start continues each inner training from the last one; a
# cold start trains afresh. With the solution unique, as here, both arrive at the same place if the
# cold one takes enough inner steps, and the warm one is cheaper.

# %%
settings = {
    "inner_optimizer": optax.sgd(0.2),
    "outer_optimizer": optax.adam(0.1),
    "num_steps": 100,
}
runs = {
    "warm, 10 inner steps": {"start": "warm", "inner_steps": 10},
    "cold, 100 inner steps": {"start": "cold", "inner_steps": 100},
    "cold, 10 inner steps": {"start": "cold", "inner_steps": 10},
}
results = {
    name: ug.bilevel.solve(inner, hypergradient, jnp.zeros(20), theta, **settings, **own)
    for name, own in runs.items()
}

# %%
best = jax.vmap(objective)
for (name, result), dash in zip(results.items(), ("-", "--", ":"), strict=True):
    plt.plot(best(result.thetas), dash, label=name)
    print(f"{name}: {objective(result.theta):.4f}")
plt.xlabel("outer steps")
plt.ylabel("validation loss of the exact solution")
plt.legend()
plt.show()

# %% [markdown]
# The penalties that were found tell the features apart. (The validation loss is now an optimistic
# number: it was optimised by 20 hyperparameters. Keep a test set.)

# %%
penalty = ug.constraints.constrain(domain, results["warm, 10 inner steps"].theta)
print("penalties of the five that matter", np.round(penalty[:5], 3))
print("median of the others", np.round(np.median(penalty[5:]), 3))
