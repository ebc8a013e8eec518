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
# # A learning rate that adapts, in a loop that you have
#
# `ug.apo.learning_rate(optax.sgd, 1e-3)` is an optax optimizer. It tunes its learning rate during
# the one training run, without a second one and without a schedule. You change two lines of your
# loop: the optimizer, and the arguments of `update`.
#
# It runs in less than a minute on two CPU cores. To install, run `pip install -e ".[experiments]"`
# in a checkout.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import unrollgrad as ug

# %% [markdown]
# ## The loop as it was

# %%
images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16 - 0.5, jnp.float32), jnp.asarray(labels, jnp.int32)


def batch(key, size=64):
    rows = jax.random.randint(key, (size,), 0, len(y))
    return x[rows], y[rows]


def init(key):
    a, b = jax.random.split(key)
    return {
        "in": jax.random.normal(a, (64, 32)) / 8,
        "out": jax.random.normal(b, (32, 10)) / 32**0.5,
    }


def predict(params, batch):
    return jnp.tanh(batch[0] @ params["in"]) @ params["out"]


def loss(params, batch):
    logits = predict(params, batch)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def train(optimizer, update, steps=600):
    params = init(jax.random.key(0))
    state, losses, rates = optimizer.init(params), [], []

    @jax.jit
    def step(params, state, key):
        mine, other = jax.random.split(key)
        value, grad = jax.value_and_grad(loss)(params, batch(mine))
        updates, state = update(grad, state, params, batch(mine), batch(other))
        return optax.apply_updates(params, updates), state, value

    for key in jax.random.split(jax.random.key(1), steps):
        params, state, value = step(params, state, key)
        losses.append(float(value))
        rates.append(optax.tree.get(state, "learning_rate"))
    return np.array(losses), rates


curves = {}
for rate in (0.001, 0.01, 0.1, 1.0):
    sgd = optax.sgd(rate)
    curves[f"SGD, {rate}"], _ = train(
        sgd, lambda g, s, p, mine, other, sgd=sgd: sgd.update(g, s, p)
    )

# %% [markdown]
# ## The loop with APO
#
# APO looks one step ahead on this step's batch and asks on another batch how much the predictions
# change. So `update` gets the loss, the predictions and both batches. It starts at the
# smallest rate of the four.

# %%
apo = ug.apo.learning_rate(optax.sgd, 0.001)


def update(grad, state, params, mine, other):
    return apo.update(
        grad, state, params, loss=loss, predict=predict, batch=mine, other_batch=other
    )


curves["APO, from 0.001"], rates = train(apo, update)


# %%
def smooth(losses, width=20):
    return np.convolve(losses, np.ones(width) / width, mode="valid")


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
dashes = ["--", "-.", ":", (0, (1, 3)), "-"]
for (name, losses), dash in zip(curves.items(), dashes, strict=True):
    left.plot(smooth(losses), linestyle=dash, label=name)
    print(f"{name}: mean loss of the last 100 steps {losses[-100:].mean():.3f}")
left.set(xlabel="steps", ylabel="training loss, mean of 20 steps", yscale="log")
figure.legend(loc="outside lower center", ncols=5)
right.plot(np.array(rates, float), color="C4")
right.set(xlabel="steps", ylabel="learning rate of APO", yscale="log")
plt.show()

# %% [markdown]
# The rate rises by about 10 % in each meta-step, which is every tenth step, until it levels off: a
# start that is hundreds of times too small costs some hundred steps. The best rate of the grid is
# still better at the end here: APO saves the grid, not the last per cent. Its two weights,
# `lambda_fsd` and `lambda_wsd`, decide how cautious it is; try a small grid of them. Any other
# optax optimizer works, and several hyperparameters at once: `lambda h: optax.sgd(h["rate"],
# h["momentum"])`. `python -m experiments apo_learning_rate` compares it with tuned rates.
