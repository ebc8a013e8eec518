"""What truncated reward gradients see of a linear-Gaussian sampler's gradient, in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from tests.samplers import gaussian
from tests.statistics import Samples
from unrollgrad import samplers

KEY = jax.random.key(0)
RHO, C = 0.7, 1.3
T = 50


def reward(x, condition=None):
    return -0.5 * RHO * jnp.sum((x - C) ** 2)


FIRST = 1e-3
"""The time at which the reference's table ends; elsewhere it is 0."""
SCHEDULE = gaussian.from_(FIRST)
SAMPLER = samplers.ddim(
    lambda theta, x, t: gaussian.noise(x, *SCHEDULE(t), theta["s"]) + theta["shift"],
    SCHEDULE,
    num_steps=T,
    reward=reward,
    sample_shape=(3,),
)


@functools.partial(jax.jit, static_argnums=0)
def gradients(estimator, keys, theta):
    """The estimates of ``shift`` in many episodes; the inner states of the calls are not kept."""

    def one(key):
        return estimator.estimate(key, theta, estimator.init(KEY, theta))[0].grad["shift"]

    return jax.vmap(one)(keys)


# The fractions of the reference's table: data of deviation s, the last K of 50 steps.
TABLE = {
    0.1: (0.100, 0.161, 0.262, 0.351, 0.535, 1.0),
    1.0: (0.0119, 0.0228, 0.0556, 0.113, 0.331, 1.0),
    2.0: (0.0067, 0.0129, 0.0318, 0.067, 0.251, 1.0),
}
STEPS = (1, 2, 5, 10, 25, 50)


@pytest.mark.parametrize("place", range(6))
def test_the_last_steps_see_their_share_of_the_gradient(place):
    """The gradient of ``shift`` is minus S_K times r'(x_0), and S_K/S_T is the table's."""
    last = STEPS[place]
    with jax.enable_x64(True):
        draw = jax.jit(lambda theta: samplers.sample(SAMPLER, KEY, theta))
        for s, row in TABLE.items():
            theta = {"s": jnp.float64(s), "shift": jnp.float64(0.0)}
            got = gradients(ug.bptt(SAMPLER, last=last), KEY[None], theta)[0]
            slope = float(jnp.sum(-RHO * (draw(theta) - C)))
            parts = gaussian.contributions(T, s, FIRST)
            seen, whole = np.sum(parts[T - last :]), np.sum(parts)
            assert float(got) == pytest.approx(-seen * slope, rel=1e-5)
            assert float(seen / whole) == pytest.approx(row[place], abs=6e-4)


def test_the_norm_and_the_cosine_of_a_shift_in_every_step():
    """The gradient of the last K steps is the whole one's last K entries."""

    def network(theta, x, t):
        k = jnp.round((1 - t) * T).astype(jnp.int32)
        return gaussian.noise(x, *gaussian.VP(t), 1.0) + theta[k]

    problem = samplers.ddim(
        network, gaussian.VP, num_steps=T, reward=gaussian.linear, sample_shape=()
    )
    theta = jnp.zeros(T)
    for last in (5, T):
        estimator = ug.bptt(problem, last=last)
        grad = estimator.estimate(KEY, theta, estimator.init(KEY, theta))[0].grad
        expected = -gaussian.contributions(T, 1.0)
        expected[: T - last] = 0
        np.testing.assert_allclose(grad, expected, rtol=2e-4)


@pytest.mark.parametrize(
    ("include_base", "num_noised"), [(False, 1), (False, 2), (False, 8), (True, 2)]
)
def test_the_variance_of_noised_copies(include_base, num_noised):
    """Steps from (alpha, sigma) = (.8, .6) to the sample, whose law is that of the data.

    A sample's prediction from its noised copy is mu + A (alpha (x_0 - mu) + sigma z).
    """
    alpha, sigma, n = 0.8, 0.6, num_noised
    shrink = alpha / (alpha**2 + sigma**2)

    def network(theta, x, t):
        return gaussian.noise(x, alpha, sigma, 1.0) + theta["shift"]

    def schedule(t):
        return 1 - (1 - alpha) * t, sigma * t

    problem = samplers.ddim(network, schedule, num_steps=1, reward=reward, sample_shape=())
    state = samplers.SamplerState  # the prediction from x_1 is N(mu, 1)
    problem = problem._replace(
        init=lambda key, theta: state(alpha * gaussian.MU + jax.random.normal(key) / shrink, None)
    )
    theta = {"shift": jnp.float32(0.0)}
    estimator = samplers.draft_lv(problem, n, include_base=include_base)
    samples = Samples(gradients(estimator, jax.random.split(KEY, 100_000), theta))
    a, gain = shrink * alpha, (RHO * sigma / alpha) ** 2
    base = 1 if include_base else 0
    variance = gain * ((base + n * a) ** 2 + n * (shrink * sigma) ** 2) / (base + n) ** 2
    if not include_base:
        q = (sigma / alpha) ** 2
        assert variance == pytest.approx(gain * a**2 * (1 + q / n))
    found, se = samples.variance()
    assert found == pytest.approx(variance, rel=0.05)
    assert abs(found - variance) < 4 * se < 0.03 * variance
    assert samples.error_in_se(-RHO * (C - gaussian.MU) * -sigma / alpha) < 4


def test_the_law_of_alignprop():
    """Drawn as its code draws it: int(N(42, 5^2)), again until it is in [1, 50)."""
    law = samplers.alignprop_cutoff(50)
    assert law == samplers.alignprop_cutoff(50, mean=42.0, std=5.0)
    draws = np.random.default_rng(0).normal(42, 5, 1_000_000)
    counts = np.bincount(50 - draws[(draws >= 1) & (draws < 50)].astype(int), minlength=50)[1:]
    assert len(law.probabilities) == 49
    np.testing.assert_allclose(law.probabilities, counts / counts.sum(), atol=2e-3)
    for num_steps in (20, 200):  # the same share of the steps, but for the whole part
        shares = samplers.alignprop_cutoff(num_steps).probabilities
        share = np.dot(np.arange(1, num_steps), shares) / num_steps
        assert share == pytest.approx(counts @ np.arange(1, 50) / counts.sum() / 50, abs=0.02)
    drawn = jax.jit(jax.vmap(law))(jax.random.split(KEY, 50_000))
    assert (
        abs(np.mean(drawn) - np.dot(np.arange(1, 50), law.probabilities)) < 4 * np.std(drawn) / 223
    )


STRAIGHT = samplers.ddim(
    gaussian.denoiser, gaussian.VP, num_steps=10, reward=gaussian.linear, sample_shape=()
)
NARROW = {"s": jnp.float32(0.3), "shift": jnp.float32(0.0)}
WIDE_LAW = samplers.cutoff(range(10, 0, -1))


@pytest.mark.parametrize(
    ("law", "unbiased"),
    [
        (WIDE_LAW, True),
        (lambda key: jax.random.randint(key, (), 1, 11), True),
        (WIDE_LAW, False),
    ],
    ids=["weighted", "weighted with counted probabilities", "plain"],
)
def test_a_random_number_of_last_steps(law, unbiased):
    """Weighted, its mean is the whole gradient; plain, the k-th step counts P(K >= k) times."""
    estimator = ug.bptt(STRAIGHT, last=law, unbiased=unbiased)
    samples = Samples(gradients(estimator, jax.random.split(KEY, 40_000), NARROW))
    parts = -gaussian.contributions(10, 0.3)[::-1]
    assert samples.relative_se(parts.sum()) < 0.01
    if unbiased:
        assert samples.error_in_se(parts.sum()) < 4
    else:
        survival = np.cumsum(WIDE_LAW.probabilities[::-1])[::-1]
        assert samples.error_in_se(np.sum(survival * parts)) < 4
        assert samples.error_in_se(parts.sum()) > 20


@pytest.mark.parametrize(("steps", "early_stop"), [(3, 0.4), (4, 0.0)])
def test_the_linear_skip_path(steps, early_stop):
    """All values that the gradient may take, and their mean over stops and offsets."""
    t = np.arange(10, -1, -1) / 10
    alpha, sigma = gaussian.vp(t)
    _, c, keep = gaussian.ddim(10, 0.3)
    values, chances = [], []
    stops = max(1, round(early_stop * 10))
    for stop in range(10 - stops, 10):
        weights = np.array([c[k] * np.prod(keep[k + 1 : stop]) / alpha[stop] for k in range(stop)])
        weights = np.append(weights, -sigma[stop] / alpha[stop])
        stride = (stop + 1) // steps
        for offset in range(stride):
            values.append(-np.sum(weights[offset : offset + steps * stride : stride]))
            chances.append(1 / (stops * stride))
    estimator = samplers.skip_path(STRAIGHT, steps, early_stop=early_stop)
    samples = Samples(gradients(estimator, jax.random.split(KEY, 4000), NARROW))
    distance = np.abs(samples.x / np.unique(np.round(values, 8)) - 1)  # some values are equal
    assert np.max(np.min(distance, axis=1)) < 1e-4
    assert np.all(np.min(distance, axis=0) < 1e-4)
    assert samples.error_in_se(np.dot(values, chances)) < 4
