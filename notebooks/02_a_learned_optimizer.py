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
# # A learned optimizer for my flax model
#
# A learned optimizer is an optax optimizer whose rule was meta-trained on many small tasks. Two
# come with the repository, in files of about a kilobyte. This notebook trains a flax model with one
# of them and then meta-trains one, in about a minute on two CPU cores. To install, run
# `pip install -e ".[experiments]"` in a checkout; to load an optimizer, `pip install unrollgrad` is
# enough.

# %%
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import nnx

import unrollgrad as ug

here = Path(ug.__file__).parents[1] / "experiments" / "learned" / "trained"

# %% [markdown]
# ## Three lines
#
# `load` returns an ordinary optax optimizer. It takes no learning rate, because it has learned the
# size of its steps. Its update reads the weights, so you must pass `params`, as for weight decay;
# `nnx.Optimizer` does that.

# %%
model = nnx.Sequential(
    nnx.Linear(8, 32, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(32, 4, rngs=nnx.Rngs(1))
)
learned = ug.learned_optimizers.load(here / "scheduled_adam.npz")
optimizer = nnx.Optimizer(model, learned, wrt=nnx.Param)


# %% [markdown]
# Use your own data and loss. Here a fixed random net, which the model does not know, assigns points
# in eight dimensions to four classes.


# %%
def batch(key):
    x = jax.random.normal(key, (32, 8))
    hidden = jnp.tanh(x @ jax.random.normal(jax.random.key(7), (8, 6)))
    return x, jnp.argmax(hidden @ jax.random.normal(jax.random.key(8), (6, 4)), axis=-1)


def loss_of(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit
def train_step(model, optimizer, key):
    x, y = batch(key)
    loss, grads = nnx.value_and_grad(loss_of)(model, x, y)
    optimizer.update(model, grads)
    return loss


def trained(transform, steps=200):
    model = nnx.Sequential(
        nnx.Linear(8, 32, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(32, 4, rngs=nnx.Rngs(1))
    )
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    keys = jax.random.split(jax.random.key(0), steps)
    return [float(train_step(model, optimizer, key)) for key in keys]


curves = {"learned": trained(learned)}
for rate in (0.001, 0.01, 0.1):
    curves[f"Adam, {rate}"] = trained(optax.adam(rate))


# %%
def smooth(losses, width=20):
    return jnp.convolve(jnp.array(losses), jnp.ones(width) / width, mode="valid")


for name, losses in curves.items():
    plt.plot(smooth(losses), "--" if "Adam" in name else "-", label=name)
plt.yscale("log")
plt.xlabel("steps")
plt.ylabel("training loss, mean of 20 steps")
plt.legend()
plt.show()

# %% [markdown]
# The optimizer was meta-trained on small MLPs and conv nets on images and on LSTMs on text, for
# 50 to 200 steps. Do not expect it to work beyond that: look at the curve before you trust it
# elsewhere. `python -m experiments evaluate_optimizer` tests optimizers on held-out tasks of
# these kinds, for up to five times as many steps.

# %% [markdown]
# ## Meta-train your own
#
# An architecture is a pair of functions: `init(key) -> theta`, and `transform(theta)`, which
# returns an optax optimizer. So `training_problem` makes the inner loop as usual, and any
# estimator gives the gradient. Here we learn a schedule of Adam, six numbers. A network that
# updates every weight, such as `ug.learned_optimizers.mlp()`, is trained in the same way, but for
# longer. Every episode (one run of the inner loop) draws fresh weights and batches of this one
# task.

# %%
architecture = ug.learned_optimizers.scheduled_adam(rate=0.001, knots=(0, 10, 30, 100))
graph = nnx.graphdef(model)


def init_params(key):
    fresh = nnx.Sequential(
        nnx.Linear(8, 32, rngs=nnx.Rngs(key)),
        nnx.tanh,
        nnx.Linear(32, 4, rngs=nnx.Rngs(jax.random.fold_in(key, 1))),
    )
    return nnx.state(fresh, nnx.Param)


problem = ug.training_problem(
    loss=lambda theta, params, data, key: loss_of(nnx.merge(graph, params), *data),
    init_params=init_params,
    optimizer=lambda theta, t: architecture.transform(theta),
    sample_batch=batch,
    horizon=100,
)
workers = ug.average(ug.pes(problem, truncation=10, sigma=0.1), 16, stagger="burn_in")
result = ug.fit(
    workers,
    architecture.init(jax.random.key(0)),
    optax.adam(0.05),
    num_steps=300,
    key=jax.random.key(1),
)
rates = jnp.exp(result.theta["log_rate"])
print("learned rates at steps 0, 10, 30, 100:", [f"{rate:.3f}" for rate in rates])

# %%
own = architecture.transform(result.theta)
curves["own"] = trained(own)
for name in ("own", "learned", "Adam, 0.01", "Adam, 0.1"):
    plt.plot(smooth(curves[name]), "--" if "Adam" in name else "-", label=name)
plt.yscale("log")
plt.xlabel("steps")
plt.ylabel("training loss, mean of 20 steps")
plt.legend()
plt.show()

# %% [markdown]
# `ug.learned_optimizers.save(path, result.theta, architecture="scheduled_adam", settings=...)`
# saves the optimizer in a file for others. For families of tasks, long runs that can be resumed,
# and comparisons of estimators, see `python -m experiments learned_optimizer --help`.
