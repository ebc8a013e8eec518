"""Adjoint matching reaches the tilted law if the noise is memoryless, and else a known part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import mistyped, numbers, present, raises
from tests.samplers import gaussian
from tests.statistics import Samples
from unrollgrad import samplers
from unrollgrad.samplers import _step

pytestmark = pytest.mark.optimized
KEY = jax.random.key(0)
T = 400


def controlled(noise, num_steps=T):
    """The flow of N(1/2, 1) with the control u_k(x) = A_k + B_k x in units of the noise."""
    exact = samplers.flow(
        lambda theta, x, t: gaussian.velocity(x, t),
        num_steps=num_steps,
        reward=gaussian.linear,
        sample_shape=(),
        noise=noise,
    )
    rule = _step.step_of("test", exact).coefficients

    def network(theta, x, t):
        k = jnp.round(t * num_steps).astype(jnp.int32)
        c = rule(k, x.dtype)
        control = theta["shift"][k] + theta["slope"][k] * x
        return gaussian.velocity(x, t) + c.noise / c.move * control

    problem = samplers.flow(
        network, num_steps=num_steps, reward=gaussian.linear, sample_shape=(), noise=noise
    )
    return problem, {"shift": jnp.zeros(num_steps), "slope": jnp.zeros(num_steps)}


@functools.partial(jax.jit, static_argnums=(0, 2))
def drawn(problem, theta, number):
    keys = jax.random.split(jax.random.key(7), number)
    return jax.vmap(lambda key: samplers.sample(problem, key, theta))(keys)


def share_of_noise(noise):
    """The share of the tilt that a constant noise reaches for s = 1; memoryless: all."""
    return 1.0 if noise == "memoryless" else 1 - np.exp(-np.pi * noise**2 / 2)


@pytest.mark.parametrize("noise", ["memoryless", 1.0])
def test_the_tilted_law(noise):
    """Data N(1/2, 1) and the reward x: the tilted law is N(3/2, 1)."""
    problem, theta = controlled(noise)
    matching = ug.average(samplers.adjoint_matching(problem, theta, 1.0), 128)
    result = ug.fit(matching, theta, optax.sgd(0.4), num_steps=100, key=KEY)
    samples = Samples(drawn(problem, result.theta, 100_000))
    assert samples.se[0] < 0.004
    expected = 0.5 + share_of_noise(noise)
    assert samples.mean[0] == pytest.approx(expected, rel=0.01)
    assert samples.variance()[0] == pytest.approx(1.0, rel=0.02)
    # The control is lambda sigma s^2 t/V, and does not depend on x.
    found = numbers(result.theta)
    assert np.max(np.abs(found["slope"])) < 2e-3
    if noise == "memoryless":
        t = np.arange(40, T - 40) / T
        exact = np.sqrt(2 * (1 - t) / t / T) * t / (t**2 + (1 - t) ** 2)
        np.testing.assert_allclose(found["shift"][40:-40], exact, rtol=0.02)


@functools.partial(jax.jit, static_argnums=0)
def gradient(estimator, key, theta):
    return estimator.estimate(key, theta, estimator.init(KEY, theta))[0]


def nonlinear(noise: samplers.flows.Noise = "memoryless"):
    """A small network on two coordinates, with a curved reward and a penalty on its weights."""

    def network(theta, x, t):
        return theta["out"] @ jnp.tanh(theta["in"] @ x + t)

    problem = samplers.flow(
        network,
        num_steps=8,
        reward=lambda x: -jnp.sum((x - 1.0) ** 4) / 4 + x[0] * x[1],
        sample_shape=(2,),
        noise=noise,
    )
    reward = present(problem.evaluate)
    problem = problem._replace(
        evaluate=lambda key, theta, state: reward(key, theta, state) + jnp.sum(theta["out"] ** 2)
    )
    keys = jax.random.split(KEY)
    weights = {
        "in": jax.random.normal(keys[0], (5, 2)),
        "out": jax.random.normal(keys[1], (2, 5)) / 3,
    }
    return problem, weights


def regularised(problem, base, scale):
    """The problem whose loss is -scale reward + 1/2 sum |u|^2, written with step losses."""
    parts = _step.step_of("test", problem)

    def step(key, theta, state, t):
        after, _ = problem.step(key, theta, state, t)
        c = parts.coefficients(t, state.x.dtype)
        moved = parts.output(theta, state, c) - parts.output(base, state, c)
        return after, 4.0 * jnp.sum((c.move / c.noise * moved) ** 2)  # J is the mean of 8 steps

    return problem._replace(
        step=step, evaluate=lambda key, theta, state: scale * problem.evaluate(key, theta, state)
    )


def assert_close(a, b, rtol=1e-4):
    for x, y in zip(jax.tree.leaves(numbers(a)), jax.tree.leaves(numbers(b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * float(np.max(np.abs(y))))


def test_the_basic_adjoint_is_the_gradient_of_the_regularised_reward():
    problem, base = nonlinear()
    theta = jax.tree.map(lambda x: 1.1 * x + 0.05, base)
    basic = samplers.adjoint_matching(problem, base, 3.0, adjoint="basic")
    exact = gradient(ug.bptt(regularised(problem, base, 3.0)), KEY, theta)
    found = gradient(basic, KEY, theta)
    assert_close(found.grad, exact.grad)
    lean = gradient(samplers.adjoint_matching(problem, base, 3.0), KEY, theta)
    assert float(found.loss) == float(lean.loss)
    with pytest.raises(AssertionError):  # negative control: the lean one is another estimate
        assert_close(lean.grad, exact.grad)


def test_at_the_base_both_are_the_gradient_of_the_reward():
    problem, base = nonlinear()
    exact = jax.tree.map(lambda g: 3.0 * g, gradient(ug.bptt(problem), KEY, base).grad)
    for adjoint in ("lean", "basic"):
        matching = samplers.adjoint_matching(problem, base, 3.0, adjoint=adjoint)
        assert_close(gradient(matching, KEY, base).grad, exact)


def test_ddpm_is_controlled_in_all_steps_but_the_last():
    """In closed form: a shift in every step of the exact denoiser of N(1/2, 1), for the reward x.

    At the base the gradient is the one of ``bptt`` without the last step, which has no noise. Where
    it vanishes the samples' mean has moved by the variance that the noise of the steps made.
    """
    num_steps, scale = 20, 3.0
    alpha, sigma = gaussian.vp(np.linspace(1, 0, num_steps + 1))
    a, b, g, h = alpha[:-1], alpha[1:], sigma[:-1], sigma[1:]
    noise = h / g * np.sqrt(g**2 - (a / b * h) ** 2)
    move = np.sqrt(np.maximum(h**2 - noise**2, 0)) - b * g / a
    through = b / a + move * g / (a**2 + g**2)  # what a step passes on of x
    later = np.append(np.cumprod(through[::-1])[::-1][1:], 1.0)
    law = functools.partial(
        samplers.ddim,
        schedule=gaussian.VP,
        num_steps=num_steps,
        reward=gaussian.linear,
        sample_shape=(),
        eta=1.0,
    )

    def network(theta, x, t):
        k = jnp.round((1 - t) * num_steps).astype(jnp.int32)
        return gaussian.noise(x, *gaussian.VP(t), 1.0) + theta[k]

    problem, base = law(network), np.zeros(num_steps, np.float32)
    matching = samplers.adjoint_matching(problem, base, scale)
    whole = numbers(gradient(ug.bptt(problem), KEY, base).grad)
    found = numbers(gradient(matching, KEY, base).grad)
    np.testing.assert_allclose(whole, -move * later, rtol=1e-4)
    np.testing.assert_allclose(found[:-1], scale * whole[:-1], rtol=1e-4)
    assert found[-1] == 0 != whole[-1]
    best = np.append(scale * (noise**2 / move * later)[:-1], 0.0)
    left = numbers(gradient(matching, KEY, best.astype(np.float32)).grad)
    assert np.max(np.abs(left)) < 1e-4 * np.max(np.abs(found))
    # The mean has moved by ``scale`` times the variance of the base's samples, which forgot x_T.
    variance = np.sum((noise * later) ** 2) + np.prod(through) ** 2
    assert np.sum(move * later * best) == pytest.approx(scale * variance, rel=1e-3)


def test_some_steps_stand_for_all():
    """With 3 of 8 steps the mean over many draws is the whole gradient, and one draw is not.

    The episode is the same in all calls but for the noise key: ``reward`` is linear and the control
    a shift, so that the gradient does not depend on the samples.
    """
    problem, theta = controlled("memoryless", num_steps=8)
    whole = gradient(samplers.adjoint_matching(problem, theta, 1.0), KEY, theta).grad["shift"]
    some = samplers.adjoint_matching(problem, theta, 1.0, regression_steps=3)
    keys = jax.random.split(KEY, 4000)
    draws = numbers(jax.jit(jax.vmap(lambda key: gradient(some, key, theta).grad["shift"]))(keys))
    assert np.all(np.sum(draws != 0, axis=1) == 3)
    samples = Samples(draws)
    assert samples.error_in_se(whole) < 4
    assert samples.relative_se(whole) < 0.03


def test_errors():
    problem, base = nonlinear()
    with raises(ValueError, "`adjoint_matching` needs a sampler with noise", "memoryless"):
        samplers.adjoint_matching(nonlinear("none")[0], base, 1.0)
    still = samplers.ddim(
        lambda theta, x, t: x,
        gaussian.VP,
        num_steps=1,
        reward=gaussian.linear,
        sample_shape=(),
        eta=1.0,
    )
    with raises(ValueError, "no step of this one has any", "num_steps=1", "two steps or more"):
        samplers.adjoint_matching(still, np.zeros(1), 1.0)
    with raises(ValueError, '`adjoint` must be "lean" or "basic"', "'full'"):
        samplers.adjoint_matching(problem, base, 1.0, adjoint=mistyped("full"))
    with raises(ValueError, "`regression_steps`=9", "8 steps"):
        samplers.adjoint_matching(problem, base, 1.0, regression_steps=9)
    with raises(ValueError, "`base` must have theta's structure", "base['in']"):
        matching = samplers.adjoint_matching(problem, {**base, "in": base["out"]}, 1.0)
        matching.init(KEY, base)
    with raises(ValueError, "`reward_scale` must be at least 0"):
        samplers.adjoint_matching(problem, base, -1.0)
