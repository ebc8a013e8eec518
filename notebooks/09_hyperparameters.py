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
# # Hyperparameters of a flax model
#
# The learning rate, the momentum and the weight decay of an MLP on real digits, found by gradients
# of the validation loss through the whole training. The hyperparameters have domains (a rate is
# positive, a momentum lies between 0 and 1), and `ug.constraints` keeps them there.
#
# It runs in less than a minute on two CPU cores. To install, run `pip install -e ".[experiments]"`
# in a checkout.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import unrollgrad as ug

# %% [markdown]
# ## Model and data
#
# A third of the images is for training, a third for validation, which theta sees, and a third for
# the test at the end.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(labels))
x = jnp.asarray(images[order] / 16 - 0.5, jnp.float32)
y = jnp.asarray(labels[order], jnp.int32)
part = {name: (x[i::3], y[i::3]) for i, name in enumerate(("train", "validation", "test"))}


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


graph = nnx.graphdef(MLP(nnx.Rngs(0)))


def init_params(key):
    return nnx.state(MLP(nnx.Rngs(key)), nnx.Param)


def cross_entropy(params, batch):
    logits = nnx.merge(graph, params)(batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def draw(split, key, size=32):
    rows = jax.random.randint(key, (size,), 0, len(part[split][1]))
    return part[split][0][rows], part[split][1][rows]


# %% [markdown]
# ## The problem
#
# `loss` is what the inner optimizer descends, and theta may enter it: here as a weight decay.
# `meta_loss` is what theta descends. The mean of it over the whole training is the objective, so
# that fast training counts as well.

# %%
spec = {
    "learning_rate": ug.constraints.positive,
    "momentum": ug.constraints.unit_interval,
    "decay": ug.constraints.positive,
}


def training_loss(theta, params, batch, key):
    decay = ug.constraints.constrain(spec, theta)["decay"]
    return cross_entropy(params, batch) + decay / 2 * optax.tree.norm(params, squared=True)


def optimizer(theta, t):
    values = ug.constraints.constrain(spec, theta)
    return optax.sgd(values["learning_rate"], momentum=values["momentum"])


problem = ug.training_problem(
    loss=training_loss,
    init_params=init_params,
    optimizer=optimizer,
    sample_batch=lambda key: draw("train", key),
    meta_loss=lambda theta, params, key: cross_entropy(params, draw("validation", key, 64)),
    horizon=60,
)
start = {"learning_rate": 0.01, "momentum": 0.5, "decay": 0.01}
theta = ug.constraints.unconstrain(spec, start)

# %% [markdown]
# ## Descend
#
# Training is smooth and 60 steps fit into memory, so `bptt` is the estimator of choice. Theta is
# unconstrained: a step of 0.1 changes the rate by 10 %.

# %%
result = ug.fit(
    ug.average(ug.bptt(problem), 8),
    theta,
    optax.adam(0.1),
    num_steps=100,
    key=jax.random.key(0),
    steps_per_dispatch=20,
)
ug.constraints.table(spec, result.theta)

# %% [markdown]
# ## Did it help?
#
# Train again with fresh weights and batches, for the same 60 steps, and look at the images that
# nothing has seen.


# %%
@jax.jit
def accuracy(theta, key):
    key_weights, *keys = jax.random.split(key, problem.horizon + 1)
    state = problem.init(key_weights, theta)
    state, _ = jax.lax.scan(
        lambda state, at: problem.step(at[0], theta, state, at[1]),
        state,
        (jnp.stack(keys), jnp.arange(problem.horizon)),
    )
    logits = nnx.merge(graph, state.params)(part["test"][0])
    return jnp.mean(jnp.argmax(logits, axis=1) == part["test"][1])


seeds = jax.random.split(jax.random.key(100), 10)
accuracies = {}
for name, at in {"start": theta, "found": result.theta}.items():
    found = np.array([accuracy(at, key) for key in seeds])
    accuracies[name] = found.mean()
    print(f"{name}: test accuracy {found.mean():.3f} ± {found.std() / 3:.3f}")

# %%
plt.plot(result.history["loss"])
plt.xlabel("outer steps")
plt.ylabel("validation loss, mean over the training")
plt.ylim(0)
plt.show()
