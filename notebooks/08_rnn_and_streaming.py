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
# # An RNN that learns from a stream
#
# Here theta is all weights of a small recurrent net, one inner step reads one symbol, and the data
# arrive as a stream: nobody keeps them. The net must repeat what it saw five steps ago, and the
# windows are three steps long. So the cause of an error always lies in an earlier window.
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
from unrollgrad.diagnostics.styles import styles

DELAY, UNITS, HORIZON, WINDOW, WORKERS = 5, 12, 30, 3, 32


# %% [markdown]
# ## The inner loop
#
# `step` gets its slice of the data as a fifth argument. The loss of the first steps is left out,
# because there is nothing to repeat yet.


# %%
def init(key, theta):
    return jnp.zeros(UNITS)


def step(key, theta, hidden, t, data):
    hidden = jnp.tanh(theta["recurrent"] @ hidden + theta["input"] * data["seen"] + theta["bias"])
    error = theta["output"] @ hidden - data["wanted"]
    return hidden, jnp.where(t >= DELAY, error**2, 0.0)


problem = ug.UnrolledProblem(init, step, HORIZON)


def first_weights(key):
    recurrent, inputs, output = jax.random.split(key, 3)
    return {
        "recurrent": 0.9 * jax.random.orthogonal(recurrent, UNITS),
        "input": 0.5 * jax.random.normal(inputs, (UNITS,)),
        "bias": jnp.zeros(UNITS),
        "output": 0.1 * jax.random.normal(output, (UNITS,)),
    }


# %% [markdown]
# ## The stream
#
# One outer step needs an array of shape (workers, window) for each name. Every worker reads its own
# stream: `fit` asks for the data of step s, which the function makes here; a file or a queue would
# do as well. `fit` calls it in another thread while the device computes.


# %%
def symbols(worker, first, number):
    """Signs that depend on the worker and the place alone, as in a file."""
    places = np.arange(first, first + number)
    return np.where((places * 2654435761 + (worker + 7) * 40503 * places**2) % 97 < 48, -1.0, 1.0)


def stream(step):
    first = step * WINDOW
    both = np.stack([symbols(w, first - DELAY, WINDOW + DELAY) for w in range(WORKERS)])
    both = both.astype(np.float32)
    return {"seen": both[:, DELAY:], "wanted": both[:, :WINDOW]}


print({name: x.shape for name, x in stream(0).items()})

# %% [markdown]
# ## Train
#
# `tbptt` sees three steps back and not five. `forward_mode` carries the derivative of the hidden
# state with respect to all weights (real-time recurrent learning), and is exact; it costs as many
# tangents as there are weights. `es_single` and `pes` only run the net forwards.

# %%
theta = first_weights(jax.random.key(0))
sigma = 0.05
estimators = {
    "tbptt": ug.tbptt(problem, truncation=WINDOW),
    "forward_mode": ug.forward_mode(problem, truncation=WINDOW),
    "pes": ug.pes(problem, truncation=WINDOW, sigma=sigma),
    "es_single": ug.es_single(problem, truncation=WINDOW, sigma=sigma),
}
episode = HORIZON // WINDOW
losses = {}
for name, estimator in estimators.items():
    result = ug.fit(
        ug.average(estimator, WORKERS),
        theta,
        optax.adam(0.01),
        num_steps=1500,
        key=jax.random.key(1),
        data=stream,
        steps_per_dispatch=250,
    )
    # The loss is that of a window; the mean over an episode is the objective.
    losses[name] = result.history["loss"].reshape(-1, episode).mean(axis=1)
    print(f"{name:>12}: loss {losses[name][0]:.2f} at the start, {losses[name][-10:].mean():.2f}")

# %%
for name, style in styles(losses).items():
    steps = episode * (1 + np.arange(len(losses[name])))
    plt.plot(steps, losses[name], style.dash, color=style.color)
    plt.plot(steps[-1], losses[name][-1], style.marker, color=style.color, label=name)
plt.axhline((HORIZON - DELAY) / HORIZON, color="grey", lw=0.8)
plt.text(1100, 0.85, "a net that says 0", color="grey")
plt.xlabel("outer steps")
plt.ylabel("squared error, mean of an episode")
plt.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4)
plt.show()

# %% [markdown]
# The window that is too short stops `tbptt` from learning the task well; the estimators that carry
# something from window to window are not stopped by it. `pes` draws new noise in every window and
# is the noisiest of them here. For a net of this size `forward_mode` is the best. Its memory grows
# with (hidden state x weights); where that is too much, take `es_single`, or `ug.uoro`, which
# carries a random summary of it.
