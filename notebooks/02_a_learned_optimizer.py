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
# come with the package. This notebook trains a flax model with one of them, compares it with Adam
# at its best rate, and then meta-trains one, in about a minute on two CPU cores. To install, run
# `pip install -e ".[experiments]"` in a checkout; to load an optimizer, `pip install unrollgrad` is
# enough.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import nnx

import unrollgrad as ug

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
learned = ug.learned_optimizers.load("scheduled_adam")
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


for i in range(200):
    loss = train_step(model, optimizer, jax.random.fold_in(jax.random.key(0), i))
print(f"loss after 200 steps: {loss:.3f}")

# %% [markdown]
# ## Is it better than Adam?
#
# Compare with Adam at its best, and not at a rate that was guessed: 15 rates, constant and with a
# cosine schedule. The best rate is chosen on four runs, and the numbers and curves are of eight
# other runs. One program trains all of them: the rates are mapped by `vmap`.

# %%
STEPS = 200
graph = nnx.graphdef(model)


def init_params(key):
    fresh = nnx.Sequential(
        nnx.Linear(8, 32, rngs=nnx.Rngs(key)),
        nnx.tanh,
        nnx.Linear(32, 4, rngs=nnx.Rngs(jax.random.fold_in(key, 1))),
    )
    return nnx.state(fresh, nnx.Param)


def run(transform, key):
    """The training losses of a run."""

    def step(carry, key):
        params, state = carry
        loss, grads = jax.value_and_grad(lambda p: loss_of(nnx.merge(graph, p), *batch(key)))(
            params
        )
        updates, state = transform.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    params = init_params(key)
    start = params, transform.init(params)
    return jax.lax.scan(step, start, jax.random.split(jax.random.fold_in(key, 2), STEPS))[1]


tuning, reported = jax.random.split(jax.random.key(1), 4), jax.random.split(jax.random.key(2), 8)
rates = jnp.geomspace(0.001, 1.0, 15)
families = {
    "Adam": optax.adam,
    "Adam, cosine": lambda rate: optax.adam(optax.cosine_decay_schedule(rate, STEPS)),
}


def last(losses):
    """The mean of the last 20 steps."""
    return losses[..., -20:].mean(axis=-1)


curves = {"learned": jax.jit(jax.vmap(lambda key: run(learned, key)))(reported)}
grids = {}
for name, make in families.items():
    of_rate = jax.jit(jax.vmap(lambda key, rate, make=make: run(make(rate), key), (0, None)))
    grids[name] = jnp.array([last(of_rate(tuning, rate)).mean() for rate in rates])
    best = rates[jnp.argmin(grids[name])]
    curves[f"{name}, best rate {best:.2g}"] = of_rate(reported, best)


def tell(name):
    losses = curves[name]
    error = last(losses).std(ddof=1) / len(losses) ** 0.5
    print(
        f"{name:>28}: at the end {last(losses).mean():.3f} ± {error:.3f}, all {losses.mean():.3f}"
    )


for name in curves:
    tell(name)

# %%
colors = {"learned": "C0", "own": "C2", "Adam": "C1", "Adam, cosine": "C3"}
dashes = {"learned": "-", "own": "-.", "Adam": "--", "Adam, cosine": ":"}


def look(name):
    family = name.split(", best")[0]
    return {"color": colors[family], "linestyle": dashes[family], "label": name}


def smooth(losses, width=20):
    return jnp.convolve(losses.mean(axis=0), jnp.ones(width) / width, mode="valid")


def draw(curves):
    _, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, losses in curves.items():
        left.plot(smooth(losses), **look(name))
    left.set(yscale="log", xlabel="steps", ylabel="training loss, mean of 20 steps and 8 runs")
    for name, losses in grids.items():
        right.plot(rates, losses, marker=".", **look(name))
    for name in ("learned", "own"):
        if name in curves:
            right.axhline(last(curves[name]).mean(), **look(name))
    right.set(xscale="log", yscale="log", xlabel="Adam's rate", ylabel="loss of the last 20 steps")
    left.legend()
    plt.show()


draw(curves)

# %% [markdown]
# Who wins? At the end, Adam with a cosine schedule at the best of 15 rates. The learned optimizer,
# which has no rate to choose and has never seen this task, comes second, before the best constant
# rate. The grid cost 60 runs for each of the two families. So where a grid is affordable and the
# number of steps is known, take Adam with a schedule; where one run has to do, try the learned one.
#
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
architecture = ug.learned_optimizers.scheduled_adam(rate=0.001, knots=(0, 10, 50, 200))
problem = ug.training_problem(
    loss=lambda theta, params, data, key: loss_of(nnx.merge(graph, params), *data),
    init_params=init_params,
    optimizer=lambda theta, t: architecture.transform(theta),
    sample_batch=batch,
    horizon=STEPS,
)
workers = ug.average(ug.pes(problem, truncation=20, sigma=0.1), 16, stagger="burn_in")
result = ug.fit(
    workers,
    architecture.init(jax.random.key(0)),
    optax.adam(0.05),
    num_steps=400,
    key=jax.random.key(1),
)
learned_rates = jnp.exp(result.theta["log_rate"])
print("learned rates at steps 0, 10, 50, 200:", [f"{rate:.3f}" for rate in learned_rates])

# %%
own = architecture.transform(result.theta)
curves["own"] = jax.jit(jax.vmap(lambda key: run(own, key)))(reported)
tell("own")
draw(curves)

# %% [markdown]
# At the end, the schedule that this little meta-training found is about as good as the best
# constant rate, and not as good as the cosine: 400 updates are few. Its objective is the mean over
# the whole training, and not the end.
#
# `ug.learned_optimizers.save(path, result.theta, architecture="scheduled_adam", settings=...)`
# saves the optimizer in a file for others. For families of tasks, long runs that can be resumed,
# and comparisons of estimators, see `python -m experiments learned_optimizer --help`.
