"""Gaussian data N(mu, s^2), whose exact denoiser and velocity are linear, and closed forms."""

import jax.numpy as jnp
import numpy as np

from unrollgrad import samplers

MU = 0.5
VP = samplers.vp()


def noise(x, alpha, sigma, s, mu=MU):
    """The exact prediction of the noise in x = alpha data + sigma noise."""
    return sigma * (x - alpha * mu) / (alpha**2 * s**2 + sigma**2)


def denoiser(theta, x, t):
    """The exact noise plus ``theta["shift"]``; the data's deviation is ``theta["s"]``."""
    return noise(x, *VP(t), theta["s"]) + theta["shift"]


def velocity(x, t, s=1.0, mu=MU):
    """The exact velocity of the flow x = t data + (1 - t) noise."""
    variance = (t * s) ** 2 + (1 - t) ** 2
    return mu + (t * s**2 - (1 - t)) / variance * (x - t * mu)


def from_(first):
    """The default schedule, stretched so that it ends at time ``first`` in place of 0."""
    return lambda t: VP(first + (1 - first) * t)


def vp(t):
    """Alpha and sigma of the default schedule, in NumPy's float64."""
    alpha = np.exp(-0.25 * t**2 * 19.9 - 0.05 * t)
    return alpha, np.sqrt(-np.expm1(2 * np.log(alpha)))


def ddim(num_steps, s, first=0.0):
    """Of DDIM's steps, first to last: the multiplier m of x, the factor c of the shift, keep."""
    alpha, sigma = vp(np.linspace(1, first, num_steps + 1))
    keep = alpha[1:] / alpha[:-1]
    c = sigma[1:] - keep * sigma[:-1]
    return keep + c * sigma[:-1] / (alpha[:-1] ** 2 * s**2 + sigma[:-1] ** 2), c, keep


def contributions(num_steps, s, first=0.0):
    """What a shift in each step, first to last, adds to the sample: c_k times the later m."""
    m, c, _ = ddim(num_steps, s, first)
    return c * np.append(np.cumprod(m[::-1])[::-1][1:], 1.0)


def linear(x, condition=None):
    return jnp.sum(x)
