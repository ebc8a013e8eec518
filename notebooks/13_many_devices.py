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
# # Many devices
#
# Workers are independent, so they spread over devices: GPUs, TPU cores, or, as here, the cores of a
# CPU that JAX shows as several devices. One argument does it, and the numbers do not change.
#
# It runs in less than a minute on two CPU cores. To install, run `pip install -e ".[experiments]"`
# in a checkout.

# %%
import jax

if jax.config.jax_num_cpu_devices < 2:
    jax.config.update("jax_num_cpu_devices", 4)  # before the first use of a device

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import unrollgrad as ug

number = jax.device_count()
print(number, jax.devices()[0].platform)

# %% [markdown]
# ## The mesh
#
# `make_worker_mesh` lays out all devices, those of other processes included.

# %%
problem, theta = ug.problems.lorenz(horizon=500)
estimator = ug.es_single(problem, truncation=50, sigma=0.04)
mesh = ug.make_worker_mesh()
workers = {
    "1 device": ug.average(estimator, 64),
    f"{number} devices": ug.average(estimator, 64, mesh=mesh),
}

# %% [markdown]
# The state of the workers lives where they run, and the gradient is the same on all devices. All
# draws are the same bits whatever the number of devices, so that the gradients agree up to the
# order in which a sum is taken.

# %%
grads = {}
for name, each in workers.items():
    state = each.init(jax.random.key(0), theta)
    found, state = each.estimate(jax.random.key(1), theta, state)
    grads[name] = np.array(found.grad)
    spread = len(state.episode.t.sharding.device_set)
    print(f"{name}: workers on {spread}, gradient {grads[name]}")

# %% [markdown]
# ## The outer loop
#
# `fit` needs no further argument. A checkpoint of a run on 4 devices continues on 2.

# %%
losses = {}
for name, each in workers.items():
    result = ug.fit(each, theta, optax.adam(0.01), num_steps=200, key=jax.random.key(2))
    losses[name] = result.history["loss"].reshape(-1, 10).mean(axis=1)
    print(f"{name}: a, r = {jnp.exp(result.theta)}")

# %%
for (name, line), dash in zip(losses.items(), ("-", "--"), strict=True):
    plt.plot(10 * (1 + np.arange(len(line))), line, dash, lw=3 if dash == "-" else 1.5, label=name)
plt.xlabel("outer steps")
plt.ylabel("loss, mean of an episode")
plt.legend()
plt.show()

# %% [markdown]
# ## More of it
#
# - The number of workers is a multiple of the number of devices. If they do not fit into memory at
#   once, `average(..., batch_size=8)` runs eight at a time on each device.
# - Several machines: call `jax.distributed.initialize()` first, make the mesh of all devices, and
#   let every process make the same calls.
# - `ug.diagnostics.compare(..., devices=4)` spreads the samples of a comparison, and
#   `python -m experiments train --devices 4` does so on the command line.
