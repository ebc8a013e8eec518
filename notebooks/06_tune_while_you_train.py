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
# # Four ways to tune while you train, on one problem
#
# Self-tuning networks, hypergradients, persistent evolution strategies and APO tune hyperparameters
# without a training run for each value. Here all four work on one small problem whose answer is
# known, so that you see what each of them moves, what it follows, and what it costs. "Tune while
# you train" in `docs/` says which one is yours.
#
# It runs in less than a minute on two CPU cores. To install, run `pip install -e ".[experiments]"`
# in a checkout.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import unrollgrad as ug

# %% [markdown]
# ## The problem
#
# Linear regression with 20 features, of which 4 matter, on 40 rows. There are two decays: one for
# the weights of the four features, and one for those of the other sixteen. Theta holds their
# logarithms. The first decay should be small and the second one large; a weak pull towards -1 keeps
# the second from going to infinity.

# %%
key_x, key_noise = jax.random.split(jax.random.key(0))
x = jax.random.normal(key_x, (440, 20))
y = x[:, :4] @ jnp.array([1.0, -1.0, 0.7, -0.7]) + 1.5 * jax.random.normal(key_noise, (440,))
train, held_out = (x[:40], y[:40]), (x[40:], y[40:])


def decays(theta):
    return jnp.repeat(jnp.exp(theta), jnp.array([4, 16]), total_repeat_length=20)


def error(w, data):
    return jnp.mean((data[0] @ w - data[1]) ** 2) / 2


def loss(theta, w, batch, key):
    """The training loss, which is all that theta changes."""
    return error(w, batch) + jnp.sum(decays(theta) * w**2) / 2


def meta_loss(theta, w, key):
    """The validation loss."""
    return error(w, held_out) + 0.005 * jnp.sum((theta + 1) ** 2)


def init_params(key):
    return jnp.zeros(20)


# %% [markdown]
# The weights of the end of training are known, and with them h(theta), the validation loss that
# all methods should make small.


# %%
def h(theta):
    hessian = train[0].T @ train[0] / 40 + jnp.diag(decays(theta))
    return meta_loss(theta, jnp.linalg.solve(hessian, train[0].T @ train[1] / 40), None)


grid = jnp.linspace(-6, 2, 81)
surface = jax.vmap(lambda b: jax.vmap(lambda a: h(jnp.array([a, b])))(grid))(grid)
row, column = np.unravel_index(np.argmin(surface), surface.shape)
best = jnp.array([grid[column], grid[row]])
start = jnp.array([-2.0, -4.0])
print(f"h at the start {h(start):.4f}, least {h(best):.4f} at theta = {best}")

# %% [markdown]
# ## Self-tuning network: a best response that is learned
#
# Beside the weights, `delta_stn` learns how the best weights would follow theta, from perturbed
# hyperparameters in the training loss. The validation loss then moves theta through this response.
# One call takes five training steps. It needs no second derivatives, and theta may be a dropout
# rate.

# %%
network = ug.stn.delta_stn(
    loss=loss,
    meta_loss=meta_loss,
    init_params=init_params,
    sample_batch=lambda key: train,
    inner_optimizer=optax.sgd(0.1),
    response_optimizer=optax.sgd(0.1),
    sigma=0.5,
    tune_sigma=False,
    warm_up=40,
)


def place(key, theta):
    """Keeps the path of the decays in the history of ``fit``."""
    return {"place": theta["decay"] if isinstance(theta, dict) else theta}


options = {"key": jax.random.key(1), "evaluate": place}
runs = {
    "delta_stn": ug.fit(
        network, start, optax.rmsprop(0.02), num_steps=600, steps_per_dispatch=20, **options
    )
}

# %% [markdown]
# ## Hypergradient: the curvature of the loss
#
# The implicit function theorem has the derivative of the best weights, through a linear system in
# the Hessian. `soba` takes one step of the weights, of this system and of theta in each call. It is
# exact where the weights have converged, and its cost does not grow with the number of
# hyperparameters.

# %%
soba = ug.bilevel.soba(
    lambda w, theta, batch: error(w, batch) + 0.005 * jnp.sum((theta + 1) ** 2),
    lambda w, theta, batch: loss(theta, w, batch, None),
    init_params=init_params,
    outer_data=ug.bilevel.finite_sum(held_out, 400),
    inner_data=ug.bilevel.finite_sum(train, 40),
    inner_optimizer=optax.sgd(0.1),
)
runs["soba"] = ug.fit(
    soba, start, optax.rmsprop(0.005), num_steps=3000, steps_per_dispatch=100, **options
)

# %% [markdown]
# ## Persistent evolution strategies: whole training runs, side by side
#
# `pes` perturbs theta in many trainings and looks at the validation loss along them. It needs no
# derivatives at all, so that it tunes the learning rate, too. Its objective is another one: the
# mean validation loss *during* 100 training steps from zero, not at the end of training.

# %%
problem = ug.training_problem(
    loss=lambda theta, w, batch, key: loss(theta["decay"], w, batch, key),
    init_params=init_params,
    sample_batch=lambda key: train,
    horizon=100,
    optimizer=lambda theta, t: optax.sgd(jnp.exp(theta["rate"])),
    meta_loss=lambda theta, w, key: meta_loss(theta["decay"], w, key),
)
pes = ug.average(ug.pes(problem, truncation=10, sigma=0.1), 20, stagger="breakstep")
first = {"decay": start, "rate": jnp.log(0.01)}
runs["pes"] = ug.fit(pes, first, optax.adam(0.03), num_steps=600, steps_per_dispatch=20, **options)
print(f"learning rate that pes found: {np.exp(runs['pes'].theta['rate']):.3f}")

# %% [markdown]
# ## What they found, and what it cost
#
# A path for each of the three on the map of h. The cost is counted in gradients of the training
# loss: two for a training step of `delta_stn`, four for a step of `soba`, one for an inner step of
# `pes` (and a validation loss, which is not counted).

# %%
costs = {
    "delta_stn": 2 * 5 * 600,
    "soba": 4 * 3000,
    "pes": int(runs["pes"].history["inner_steps"].sum()),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
levels = float(surface.min()) + np.geomspace(0.003, 1, 9)
left.contour(grid, grid, surface, levels, colors="0.75", linewidths=0.8)
left.plot(*best, "k*", markersize=14, label="least h")
for i, (name, run) in enumerate(runs.items()):
    path = np.vstack([start, run.history["place"]])
    left.plot(*path.T, f"C{i}", marker=".", markersize=3, label=name)
    print(f"{name:>9}: theta {path[-1].round(2)}, h {h(path[-1]):.4f}, {costs[name]} gradients")
left.set(xlabel="log decay of the 4 features", ylabel="log decay of the other 16")
_ = left.legend()

# %% [markdown]
# ## APO: the optimizer, not the loss
#
# APO adapts what the best weights do not depend on: the learning rate, here from one that is a
# hundred times too small. It looks at the training loss after one step and at how far the
# predictions move. The decays are those that `delta_stn` found; APO could not find them.

# %%
theta = runs["delta_stn"].theta


def train_loss(w, batch):
    return loss(theta, w, batch, None)


def trained(optimizer, update):
    def step(carry, _):
        w, state = carry
        value, grad = jax.value_and_grad(train_loss)(w, train)
        updates, state = update(grad, state, w)
        return (optax.apply_updates(w, updates), state), value

    w = init_params(None)
    return jax.lax.scan(step, (w, optimizer.init(w)), None, 300)[1]


apo = ug.apo.learning_rate(optax.sgd, 0.001, lambda_fsd=0.1, lambda_wsd=0.1)


def with_apo(grad, state, w):
    return apo.update(
        grad,
        state,
        w,
        loss=train_loss,
        predict=lambda w, batch: batch[0] @ w,
        batch=train,
        other_batch=train,
    )


curves = {f"SGD, {rate}": trained(optax.sgd(rate), optax.sgd(rate).update) for rate in (0.001, 0.1)}
curves["APO, from 0.001"] = trained(apo, with_apo)
for name, losses in curves.items():
    right.plot(losses - min(map(jnp.min, curves.values())) + 1e-6, label=name)
    print(f"{name}: training loss {losses[-1]:.4f}")
right.set(yscale="log", xlabel="training steps", ylabel="training loss above the least")
right.legend()
plt.show()

# %% [markdown]
# ## Which one?
#
# - `soba` follows h itself and ends nearest to its minimum. Take hypergradients if the training
#   loss is smooth in theta, above all for many hyperparameters.
# - `delta_stn` ends close to it, at half the cost here, and without second derivatives. Take it for
#   dropout rates and augmentation, for which there is no derivative.
# - `pes` finds another theta, since its objective is another one: good weights early. It is the
#   only one that tunes the decays and the learning rate together, at many times the cost.
# - APO is for the optimizer's own settings, while you train with fixed hyperparameters.
