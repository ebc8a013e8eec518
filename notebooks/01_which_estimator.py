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
# # Which gradient estimator for my problem?
#
# You unroll an inner loop (you train a net, run an RNN, or simulate a system), it has a loss, and
# you want the gradient of that loss with respect to outer parameters theta. There are many
# estimators of this gradient, and which one is best depends on your problem. So measure: this
# notebook goes from ten lines to the picture that answers the question, and then shows three
# problems on which the answer differs.
#
# It runs in about a minute on two CPU cores. To install, run `pip install -e ".[experiments]"` in a
# checkout.

# %%
import jax
import jax.numpy as jnp
import optax

import unrollgrad as ug

# %% [markdown]
# ## Your problem, in ten lines
#
# Here the problem is the training of a small net. Theta holds the learning rate and the momentum of
# its SGD, both unconstrained (a logarithm and a logit); `sigma` and the gradient have these units.
# Any other inner loop works as well: `ug.UnrolledProblem(init, step, horizon)`.


# %%
def net(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


def target(x):
    return jnp.sin(3 * x[:, 0]) * x[:, 1]


def sample_batch(key):
    x = jax.random.normal(key, (16, 2))
    return x, target(x)


def init_params(key):
    a, b = jax.random.split(key)
    return {"hidden": jax.random.normal(a, (2, 16)), "out": 0.2 * jax.random.normal(b, (16,))}


spec = {"learning_rate": ug.constraints.positive, "momentum": ug.constraints.unit_interval}


def optimizer(theta, t):
    values = ug.constraints.constrain(spec, theta)
    return optax.sgd(values["learning_rate"], momentum=values["momentum"])


problem = ug.training_problem(
    loss=lambda theta, params, batch, key: jnp.mean((net(params, batch[0]) - batch[1]) ** 2),
    init_params=init_params,
    optimizer=optimizer,
    sample_batch=sample_batch,
    horizon=80,
)
theta = ug.constraints.unconstrain(spec, {"learning_rate": 0.005, "momentum": 0.5})
ug.constraints.report(spec, theta)

# %% [markdown]
# ## Measure
#
# `compare` freezes theta and draws independent samples of every estimator. A sample is the mean
# of the estimator's gradient over one whole episode, that is one run of the inner loop. The
# reference is backpropagation through the whole episode, which is unbiased; its own noise is
# accounted for. Every row is one worker, an independent instance of the estimator. The column "at
# equal steps" is the error if the cheaper estimators had as many more workers as cost the same.

# %%
common = {"truncation": 8, "sigma": 0.1}
candidates = {
    "bptt": ug.bptt(problem),
    "tbptt": ug.tbptt(problem, truncation=8),
    "full_es": ug.full_es(problem, sigma=0.1),
    "truncated_es": ug.truncated_es(problem, **common),
    "pes": ug.pes(problem, **common),
    "es_single": ug.es_single(problem, **common),
}
comparison = ug.diagnostics.compare(
    problem,
    theta,
    candidates,
    reference=candidates["bptt"],
    num_samples=400,
    batch_size=40,
    key=jax.random.key(0),
)
comparison.table()

# %%
comparison.plot()

# %% [markdown]
# How to read the picture:
#
# - **Left: is the estimator right?** A filled marker is a measured bias with its standard error; a
#   hollow one with an arrow is an upper limit where no bias was seen. The truncated estimators
#   (`tbptt`, `truncated_es`) have little noise and are wrong: a window (the 8 inner steps of one
#   call) ignores the effect of theta on later windows. More workers do not help.
# - **Middle: how noisy is it for an optimizer that averages?** The curve is the variance of the
#   mean of U consecutive updates, per episode spent. A worker that keeps its noise through an
#   episode (`es_single`) makes errors that add up from one window to the next: judge it at the
#   right end, not at U = 1.
# - **Right: what does it cost?** Each line starts at the measured point and shows the error as
#   workers are added. The error of unbiased estimators falls for ever; that of biased ones levels
#   off. Read it vertically at your budget of inner steps. A line is dotted where a bias that is too
#   small for this measurement would begin to show.
#
# On this problem, backpropagation is right and has little noise, because the training is smooth and
# short. Take it if it fits into memory. Otherwise the picture says how many workers an unbiased
# estimator needs.

# %% [markdown]
# ## When PES is better and when ES-Single is
#
# Both are unbiased. If the gradients of the windows agree, the variance of `pes` is down to half
# that of `es_single`. If they conflict, the variance of `pes` grows with the number of windows,
# and that of `es_single` does not. The linear recurrence shows both cases beside their closed
# forms.

# %%
for gradients in ["identical", "independent"]:
    recurrence = ug.problems.linear_recurrence(20, 32, gradients=gradients)
    influence = recurrence.influence(recurrence.theta)
    both = {
        "pes": ug.pes(recurrence.problem, truncation=2, sigma=0.1),
        "es_single": ug.es_single(recurrence.problem, truncation=2, sigma=0.1),
    }
    rows = ug.diagnostics.compare(
        recurrence.problem,
        recurrence.theta,
        both,
        reference=jnp.float32(ug.problems.theory.gradient(influence)),
        num_samples=300,
        num_chains=300,
        batch_size=300,
        key=jax.random.key(1),
    ).rows
    for row, period in zip(rows, [2, None], strict=True):
        measured = row["variance_of_mean"][20 * 16]
        exact = ug.problems.theory.episode_variance(influence, 2, period)
        print(f"{gradients:>12} {row['name']:>10}: long run {measured:7.1f}, exact {exact:7.1f}")

# %% [markdown]
# ## Where backpropagation explodes
#
# In a chaotic system the gradient of an episode is a huge random number, and rare giants dominate
# its mean. Evolution strategies differentiate the episode-smoothed J (its mean over perturbations
# of theta), which is a tame function. Its gradient, estimated by `full_es`, is the reference
# here. `ug.average` makes one estimator of many workers.

# %%
chaos, at = ug.problems.chaotic_map(horizon=100)
wild = ug.diagnostics.compare(
    chaos,
    at,
    {
        "bptt": ug.average(ug.bptt(chaos), 50),
        "es_single": ug.average(ug.es_single(chaos, truncation=10, sigma=0.01), 50),
    },
    reference=ug.average(ug.full_es(chaos, sigma=0.01), 50),
    num_samples=50,
    num_chains=0,
    key=jax.random.key(2),
)
wild.table()

# %% [markdown]
# ## In short
#
# | your problem | take |
# |---|---|
# | fits in memory, gradients do not explode | `bptt` |
# | too long for memory, or chaotic, or not differentiable | `es_single` |
# | the same, and the windows' gradients agree (see the middle panel) | `pes` |
# | the same, and the windows' gradients conflict in part | `gpes` with a noise period in between |
# | you know that the past does not matter | `tbptt`, `truncated_es` |
#
# Then measure again near the optimum. The gradient is smaller there, and a bias that did not
# matter at the start (such as the smoothing of evolution strategies, O(sigma²)) can be all that
# is left. `python -m experiments variance --thetas start middle end` does this for the problems
# that come with the repository.
