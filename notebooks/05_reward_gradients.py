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
# # Reward gradients through a sampler
#
# A flow or diffusion model makes samples, and a reward judges them. Fine-tuning the model for the
# reward is a gradient through the sampler's steps, an unroll like any other. This notebook does it
# on a model whose answers are known exactly: eight Gaussians on a circle. It shows that maximising
# the reward and sampling from the *tilted law* are two different aims.
#
# It runs in about a minute on two CPU cores. To install, run `pip install -e ".[experiments]"` in a
# checkout.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import unrollgrad as ug
from unrollgrad import samplers

# %% [markdown]
# ## A model that is exact
#
# A flow moves a latent x from noise (t = 0) to data (t = 1) with a velocity, the mean of data minus
# noise given x. For a mixture of Gaussians it has a closed form, so that nothing has to be trained.
# What we do train, theta, is a small network that is *added* to it. It returns zero at first.

# %%
ANGLES = np.pi * np.arange(8) / 4
MEANS, STD = 4 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1), 0.3


def exact(x, t):
    variance = (t * STD) ** 2 + (1 - t) ** 2
    gaps = x - t * MEANS
    weights = jax.nn.softmax(-jnp.sum(gaps**2, axis=-1) / (2 * variance))
    return weights @ (MEANS + (t * STD**2 - (1 - t)) / variance * gaps)


def velocity(theta, x, t):
    angles = jnp.pi * t * jnp.array([1.0, 2.0])
    hidden = jnp.concatenate([x / 2, t[None], jnp.sin(angles), jnp.cos(angles)])
    *layers, last = theta
    for layer in layers:
        hidden = jax.nn.silu(layer["w"] @ hidden + layer["b"])
    return exact(x, t) + last["w"] @ hidden + last["b"]


keys, sizes = jax.random.split(jax.random.key(0)), (7, 64, 64)
untrained = [
    {"w": jax.random.normal(key, (b, a)) / a**0.5, "b": jnp.zeros(b)}
    for key, a, b in zip(keys, sizes, sizes[1:], strict=False)
]
untrained.append({"w": jnp.zeros((2, 64)), "b": jnp.zeros(2)})

# %% [markdown]
# ## A reward, and the law that it tilts
#
# The reward is minus half the squared distance to the first Gaussian's mean. Two aims are possible:
#
# - The largest mean reward: all samples in one point. Variety has no value.
# - The tilted law, in proportion to p(x) exp(scale r(x)): more of what is rewarded, and still
#   everything that the model p makes. The scale says how far to go.
#
# For Gaussians the tilted law is known: each one's weight is multiplied by a number.

# %%
TARGET, SCALE = MEANS[0], 0.1
problem = samplers.flow(
    velocity,
    num_steps=20,
    sample_shape=(2,),
    reward=lambda x: -jnp.sum((x - TARGET) ** 2) / 2,
    noise="memoryless",  # adjoint matching needs this much noise in the steps
)
distances = np.sum((MEANS - TARGET) ** 2, axis=-1)
tilted = np.exp(-SCALE * distances / 2 / (1 + SCALE * STD**2))
tilted /= tilted.sum()
print("share of each Gaussian in the tilted law:", tilted.round(3))

# %% [markdown]
# ## How much of the gradient do the last steps see?
#
# DRaFT differentiates all steps, DRaFT-K the last K. `compare` measures each method's mean gradient
# against the whole one at the untrained theta. To which Gaussian a sample goes is decided early, so
# the last steps see little of the gradient: their bias is large. What they see has little noise,
# though: the product of the Jacobians of many steps is huge where a sample could go either way.

# %%
comparison = ug.diagnostics.compare(
    problem,
    untrained,
    {
        "DRaFT": ug.bptt(problem),
        "DRaFT-5": ug.bptt(problem, last=5),
        "DRaFT-1": ug.bptt(problem, last=1),
        "DRTune": samplers.skip_path(problem, 3),
    },
    reference=ug.bptt(problem),
    num_samples=1000,
    num_chains=0,
    batch_size=500,
    key=jax.random.key(1),
)
comparison.table()

# %% [markdown]
# ## Three ways to train
#
# Each is an estimator, and `fit` does the rest.

# %%
estimators = {
    "DRaFT": ug.bptt(problem),
    "DRaFT-1": ug.bptt(problem, last=1),
    "adjoint matching": samplers.adjoint_matching(problem, untrained, SCALE),
}
thetas = {"untrained": untrained}
for name, estimator in estimators.items():
    workers = ug.average(estimator, num_workers=64)
    optimizer = optax.adam(optax.linear_schedule(4e-3, 0.0, 300))
    result = ug.fit(workers, untrained, optimizer, num_steps=300, key=jax.random.key(2))
    thetas[name] = result.theta
    print(f"{name}: reward {-result.history['loss'][-20:].mean():.2f} at the end")

# %% [markdown]
# ## What they make
#
# DRaFT and DRaFT-1 end in one point, the best there is: the reward asks for no more. Adjoint
# matching has the lower reward, on purpose: its samples stay on the Gaussians, nearly in the tilted
# proportions.


# %%
@jax.jit
def draw(theta):
    keys = jax.random.split(jax.random.key(3), 2000)
    return jax.vmap(lambda key: samplers.sample(problem, key, theta))(keys)


samples = {name: np.asarray(draw(theta)) for name, theta in thetas.items()}


def shares(x):
    nearest = np.argmin(np.sum((x[:, None] - MEANS) ** 2, axis=-1), axis=-1)
    return np.bincount(nearest, minlength=8) / len(x)


found = {name: shares(x) for name, x in samples.items()}
figure, axes = plt.subplots(1, 4, figsize=(14, 3.8), sharex=True, sharey=True)
for axis, (name, x) in zip(axes, samples.items(), strict=True):
    axis.scatter(*x.T, s=2, alpha=0.4)
    for mean, expected, share in zip(MEANS, tilted, found[name], strict=True):
        text = f"{share:.2f}\n({expected:.2f})"
        axis.annotate(text, 1.5 * mean, ha="center", va="center", fontsize=8)
    axis.plot(*TARGET, "r*", ms=8)
    axis.set(title=name, xlim=(-7.5, 7.5), ylim=(-7.5, 7.5), aspect="equal")
figure.suptitle("share of each Gaussian (in brackets: of the tilted law); the star is the target")
plt.show()

# %% [markdown]
# ## Where to go from here
#
# - The manual's page on reward gradients says which method is which estimator, and has conditions,
#   guidance, LoRA, memory (`remat="step"`, `"reverse"`) and rewards without gradients.
# - `python -m experiments reward_mixture` compares ten methods at equal cost, and
#   `reward_digits` shows a classifier that is cheated.
