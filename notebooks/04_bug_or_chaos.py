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
# # Is it a bug or is it chaos?
#
# A gradient through a long loop is huge, or it differs between two machines, or evolution
# strategies do not learn. It may be a wrong line of code. It may also be the problem itself: in a
# chaotic system the exact gradient is huge and useless. This notebook tells the two apart on the
# smallest chaotic system there is, and then asks which estimator still works.
#
# It runs in about a minute on two CPU cores. To install, run `pip install -e ".[experiments]"` in a
# checkout.

# %%
import jax
import jax.numpy as jnp

import unrollgrad as ug
from unrollgrad import diagnostics

key = jax.random.key(0)

# %% [markdown]
# ## The symptom
#
# A population s grows and starves: s becomes theta s (1 - s). The loss is its mean over 100 steps,
# theta is one number. The loss is about 0.6 in every episode. The gradient is not about anything.


# %%
def init(key, theta):
    return jax.random.uniform(key, (), minval=0.1, maxval=0.9)


def step(key, theta, s, t):
    s = theta * s * (1 - s)
    return s, s


problem, theta = ug.UnrolledProblem(init, step, horizon=100), jnp.float32(3.9)
losses, gradients = [], []
for i in range(4):
    episode = jax.random.key(i)
    loss, gradient = jax.value_and_grad(lambda x, k=episode: ug.episode_loss(problem, k, x))(theta)
    losses.append(float(loss))
    gradients.append(float(gradient))
    print(f"episode {i}: loss {loss:.3f}, gradient {gradient:.2e}")

# %% [markdown]
# ## Is there a NaN, or a wrong derivative?
#
# `locate_nonfinite` looks for the first number that is not finite. `check_grad` compares the
# gradient with finite differences. It does so on a short episode, since finite differences of the
# long one do not settle (its third verdict is "cannot tell").

# %%
nonfinite = diagnostics.locate_nonfinite(problem, theta, key)
print(nonfinite.reason)
short = problem._replace(horizon=8)
check = diagnostics.check_grad(short, theta, ug.bptt(short), key, num_samples=200)
check.table()

# %% [markdown]
# The code is right. This is what a bug would look like: somebody left a `stop_gradient` in the
# step.


# %%
def wrong_step(key, theta, s, t):
    s = theta * s * (1 - jax.lax.stop_gradient(s))
    return s, s


wrong = ug.UnrolledProblem(init, wrong_step, horizon=8)
caught = diagnostics.check_grad(wrong, theta, ug.bptt(wrong), key, num_samples=200)
caught.table()

# %% [markdown]
# ## Is it chaos?
#
# The *Lyapunov exponent* is the rate at which a small change of the state grows, in natural
# logarithms per step. In chaos it is positive, and the exact gradient grows at the same rate.
# `horizon_sweep` measures the gradient at every horizon. If both rates agree, nothing is wrong with
# the code: no unbiased estimator of this gradient can be small.

# %%
chaos = diagnostics.lyapunov(problem, theta, key=key, num_steps=2000)
sweep = diagnostics.horizon_sweep(problem, theta, key=key)
exponent = float(chaos.exponents[0])
print(f"exponent {exponent:.3f} per step, growth of the gradient {sweep.growth:.3f} per step")
chaos.table()

# %%
sweep.plot()

# %% [markdown]
# The table also says for how many steps two machines agree: a rounding error grows at the same rate
# as every other small change. Two runs that differ after about 34 steps in float32 are no bug.
#
# At theta = 3.2 the same code has a negative exponent. The population then oscillates between two
# values, small changes die out, and the gradient is small.

# %%
calm = diagnostics.lyapunov(problem, jnp.float32(3.2), key=key)
print(f"exponent {float(calm.exponents[0]):.3f} per step")

# %% [markdown]
# ## What can still be estimated
#
# The loss as a function of theta is rough below some scale, and smooth above it. Evolution
# strategies differentiate the loss blurred by sigma. With a sigma below that scale they see noise;
# with a large one they see another function, and beyond theta = 4 the population leaves for minus
# infinity. `sigma_sweep` shows what is in between.

# %%
smoothing = diagnostics.sigma_sweep(
    problem, theta, key=key, sigmas=[1e-4, 1e-3, 3e-3, 1e-2, 1e-1], num_pairs=400
)
print(*smoothing.reasons(), sep="\n")
smoothing.plot()

# %% [markdown]
# ## Which estimator, then?
#
# `diagnose` measures all that decides, and ranks the estimators by the error that they would have
# at the same cost. Read the first row, and the sentences below the table.

# %%
verdict = diagnostics.diagnose(
    problem, theta, key=key, truncation=10, num_workers=64, sigma=smoothing.suggestion
)
verdict.table()

# %%
verdict.plot()

# %% [markdown]
# Backpropagation, and every other estimator of the exact derivative, stands last: it is not wrong,
# but it answers a question of no use. The others estimate the slope of the blurred loss, with a
# noise that enough workers average out.
#
# ## In short
#
# | what you see | what it means |
# |---|---|
# | `locate_nonfinite` names a step, and numbers were small before | a bug in that step |
# | `check_grad` says "differs" for an exact estimator | a bug, or a jump in the loss |
# | the exponent is positive, the gradient grows at its rate | chaos: evolution strategies |
# | the exponent is negative, and the gradient grows for ever | a bug |
# | runs differ after about 17 / exponent steps in float32 | rounding, not a bug |
#
# [The manual](../docs/bug_or_chaos.md) has the other tools: slices of the loss, the cost before a
# run, and the starts at which a trajectory chooses between two ends.
