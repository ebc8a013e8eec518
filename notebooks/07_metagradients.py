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
# # Metagradients: which examples does a training need?
#
# A *metagradient* is the derivative of a trained network's loss by something that was fixed before
# the training. Here that is the weight of each training image. The labels of a third of the images
# are wrong; the metagradients find them, and the training improves when their images are left out.
#
# It runs in about a minute on two CPU cores. To install, run `pip install -e ".[experiments]"` in a
# checkout.

# %%
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import unrollgrad as ug
from unrollgrad import diagnostics

key = jax.random.key(0)

# %% [markdown]
# ## The training
#
# Theta has a weight for each of 400 images. The weights enter the loss of a batch; everything else
# is an ordinary training of a small network by Adam. `final_loss` says what is differentiated: the
# loss on clean images after the last step.

# %%
rng = np.random.default_rng(0)
images, labels = load_digits(return_X_y=True)
order = rng.permutation(len(labels))
x = jnp.asarray(images[order] / 16 - 0.5, jnp.float32)
y = jnp.asarray(labels[order], jnp.int32)
clean, test = (x[400:700], y[400:700]), (x[700:], y[700:])
wrong = rng.random(400) < 1 / 3
given = jnp.where(wrong, (y[:400] + rng.integers(1, 10, 400)) % 10, y[:400])


def init_params(key):
    first, second = jax.random.split(key)
    return {
        "hidden": jax.random.normal(first, (64, 32)) / 8,
        "out": jax.random.normal(second, (32, 10)) / 32**0.5,
    }


def logits(params, x, activation, scale):
    return scale * activation(x @ params["hidden"]) @ params["out"]


def make(activation=jax.nn.gelu, scale=0.1, eps_root=1e-5, batch_size=200):
    def losses(params, x, y):
        found = logits(params, x, activation, scale)
        return optax.softmax_cross_entropy_with_integer_labels(found, y)

    def loss(theta, params, rows, key):
        return jnp.mean(theta[rows] * losses(params, x[rows], given[rows]))

    problem = ug.training_problem(
        loss=loss,
        init_params=init_params,
        optimizer=lambda theta, t: optax.adam(0.01, eps_root=eps_root),
        sample_batch=lambda key: jax.random.randint(key, (batch_size,), 0, 400),
        horizon=100,
    )
    return ug.final_loss(problem, lambda key, theta, s: jnp.mean(losses(s.params, *clean)))


problem, theta = make(), jnp.ones(400)

# %% [markdown]
# ## The metagradient
#
# `bptt` goes forwards through the training, and back through every step of it. It is exact: what
# it says of an image is how the loss on the clean images would change with that image's weight. The
# images whose weight raises the loss are nearly all wrong.


# %%
def metagradient(problem):
    estimator = ug.bptt(problem, remat="step")
    return jax.jit(lambda key, theta: estimator.estimate(key, theta, estimator.init(key, theta))[0])


estimate = metagradient(problem)(key, theta)
grad = np.asarray(estimate.grad)
worst = np.argsort(-grad)[:100]
print(f"loss on the clean images: {estimate.loss:.3f}")
print(f"wrong labels among the 100 worst images: {wrong[worst].sum()}, in all {wrong.sum()}")

# %%
bins = np.linspace(grad.min(), grad.max(), 40)
plt.hist(grad[~wrong], bins, alpha=0.6, label="right label")
plt.hist(grad[wrong], bins, alpha=0.6, label="wrong label")
plt.axvline(0, color="0.4", lw=0.8)
plt.xlabel("metagradient: slope of the loss on clean images in an image's weight")
plt.ylabel("images")
plt.legend()
plt.show()

# %% [markdown]
# ## Is it to be trusted?
#
# A derivative says what a small change does. Leaving an image out is not small, and where training
# is rough, the derivative says little about it. *Metasmoothness* asks for the truth: three
# trainings, at theta, theta + h v and theta + 2 h v, and the share of the network's weights that
# moves on in the direction in which it began to move. Here v takes weight from 20 images, and with
# h = 0.5 the third training does without them.

# %%
left_out = jnp.zeros(400).at[rng.permutation(400)[:20]].set(-1.0)
smooth = diagnostics.metasmoothness(problem, theta, left_out, [0.05, 0.5], key=key)
smooth.table()

# %% [markdown]
# This training was made to be smooth: GELU in place of ReLU, outputs that are a tenth as large, a
# constant in the square root of Adam (`eps_root`), a batch that is not small. Without all that, the
# same network is rough.

# %%
rough = make(activation=jax.nn.relu, scale=1.0, eps_root=1e-12, batch_size=20)
smoothness = diagnostics.metasmoothness(rough, theta, left_out, [0.05, 0.5], key=key)
smoothness.table()

# %% [markdown]
# What follows can be checked: leave out 20 images, train again, and compare with the sum of their
# metagradients. One `vmap` trains 100 times.


# %%
def foretold_and_measured(problem):
    grad = metagradient(problem)(key, theta).grad
    subsets = np.array([rng.permutation(400) < 20 for _ in range(100)])
    thetas = jnp.where(subsets, 0.0, theta)
    train = jax.jit(jax.vmap(lambda theta: ug.episode_loss(problem, key, theta)))
    return np.asarray((thetas - theta) @ grad), np.asarray(train(thetas) - train(theta[None]))


found = {"smooth": foretold_and_measured(problem), "rough": foretold_and_measured(rough)}
correlations = {name: np.corrcoef(*pair)[0, 1] for name, pair in found.items()}
fig, axes = plt.subplots(1, 2, figsize=(9, 4))
for axis, (name, pair) in zip(axes, found.items(), strict=True):
    axis.plot(*pair, "o", ms=4)
    axis.axline((0, 0), slope=1, color="0.5", lw=0.8)
    axis.set_title(f"{name}: correlation {correlations[name]:.2f}")
    axis.set_xlabel("change of the loss that is foretold")
axes[0].set_ylabel("change after training again")
plt.show()

# %% [markdown]
# ## Choosing the data
#
# *Metagradient descent* moves the weights by the signs of their metagradients, a random part of
# them in each outer step. Every step has a new key, and so another initial network and other
# batches. Weights are counts: 0 leaves an image out, 2 shows it twice.

# %%
counts, of_run = np.ones(400), metagradient(problem)
for i in range(20):
    weights = jnp.asarray(counts / counts.mean(), jnp.float32)
    grad = np.asarray(of_run(jax.random.fold_in(key, i), weights).grad)
    counts = np.maximum(counts - np.sign(grad) * (rng.random(400) < 0.2), 0.0)


def mean_accuracy(weights):
    """The accuracy on the test images, of the last network of eight trainings."""

    def accuracy(key, theta, state):
        found = logits(state.params, test[0], jax.nn.gelu, 0.1)
        return jnp.mean(jnp.argmax(found, -1) == test[1])

    measured = ug.final_loss(problem, accuracy)
    keys = jax.random.split(jax.random.fold_in(key, 100), 8)
    return float(jnp.mean(jax.vmap(lambda k: ug.episode_loss(measured, k, weights))(keys)))


weights = jnp.asarray(counts / counts.mean(), jnp.float32)
before, after = mean_accuracy(theta), mean_accuracy(weights)
share = counts[wrong].sum() / counts.sum()
print(f"accuracy {before:.3f} -> {after:.3f}; wrong labels: {wrong.mean():.0%} -> {share:.0%}")

# %% [markdown]
# ## Long trainings
#
# A hundred steps fit into one program. `replay` computes the same for those that do not: it keeps a
# few states, a tree of checkpoints, and runs the steps between them again, in many short programs.
# With a `folder` the same call goes on after an interruption, and ends with the same bits.

# %%
with tempfile.TemporaryDirectory() as folder:
    in_pieces = ug.replay(problem, key, theta, arity=4, steps_per_dispatch=16, folder=folder)
print(f"{in_pieces.info.inner_steps} steps forwards")
np.testing.assert_allclose(in_pieces.grad, estimate.grad, rtol=1e-3, atol=1e-7)

# %% [markdown]
# [The manual](../docs/metagradients.md) says what makes a training smooth, how many states and
# steps a tree takes, and how deep networks take less memory.
