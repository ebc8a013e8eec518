"""Sweeps over horizon, sigma and a line through theta, against closed forms and backpropagation."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import counted, quadratic, raises
from unrollgrad.diagnostics import (
    horizon_sweep,
    loss_slice,
    lyapunov,
    metasmoothness,
    sigma_sweep,
)

pytestmark = pytest.mark.optimized
KEY = jax.random.key(0)
EPISODES = jax.random.split(jax.random.split(KEY)[1], 16)
"""The keys of the episodes of ``horizon_sweep(key=KEY)``."""


def of_one_step(loss):
    """A problem whose J is ``loss(theta)``."""
    return ug.UnrolledProblem(lambda key, theta: 0.0, lambda key, theta, s, t: (s, loss(theta)), 1)


def test_norms_are_those_of_backpropagation():
    """At two horizons, with data, an ``init`` that depends on theta, and an evaluation."""
    problem, theta = quadratic(20)
    problem = problem._replace(evaluate=lambda key, theta, s: jnp.sum(s["x"] ** 2))
    sweep = horizon_sweep(problem, theta, key=KEY)
    for horizon in (10, 20):
        cut = problem._replace(horizon=horizon)
        gradient = jax.grad(lambda theta, key, cut=cut: ug.episode_loss(cut, key, theta))
        grads = jax.jit(jax.vmap(gradient, (None, 0)))(theta, EPISODES)
        rows = np.concatenate([np.asarray(g).reshape(16, -1) for g in jax.tree.leaves(grads)], 1)
        i = list(sweep.horizons).index(horizon)
        norms = np.linalg.norm(rows, axis=1)
        np.testing.assert_allclose(sweep.log_norm[i], np.log(norms).mean(), rtol=1e-4)
        variance = rows.var(axis=0, ddof=1).sum()
        np.testing.assert_allclose(sweep.log_deviation[i], 0.5 * np.log(variance), rtol=1e-4)
        heaviness = (norms.max() / np.exp(np.median(np.log(norms)))) ** 2
        np.testing.assert_allclose(sweep.heaviness[i], heaviness, rtol=1e-4)


def test_random_directions_give_the_norm():
    """In the mean square: 64 random signs of 100 coordinates, within four standard errors."""
    problem, theta, _ = ug.problems.linear_recurrence(100, 8, gradients="independent")
    exact = horizon_sweep(problem, theta, key=KEY, num_episodes=2, num_directions=100)
    some = horizon_sweep(problem, theta, key=KEY, num_episodes=2, num_directions=64)
    ratio = np.exp(2 * (some.log_norm - exact.log_norm))
    assert np.all(np.abs(ratio - 1) < 4 * math.sqrt(2 / 64))
    assert np.any(np.abs(ratio - 1) > 0.01)  # they are random
    assert np.all(exact.log_deviation == -np.inf)  # all episodes are alike


def lorenz_from_random_starts(horizon):
    problem, _ = ug.problems.lorenz(horizon)

    def init(key, theta):
        start = problem.init(key, theta)
        return {**start, "model": start["model"] + jax.random.normal(key, (3,))}

    return problem._replace(init=init), jnp.log(jnp.array([10.0, 28.0]))


def learned_optimizer(horizon):
    """A small network with steps of a size of 2 as the optimizer of a small regression."""
    small = ug.learned_optimizers.mlp(hidden=(8,), decays=(0.9,), times=(10.0,), step=2.0)
    theta = jax.jit(small.init)(jax.random.key(3))
    inputs = jax.random.normal(jax.random.key(1), (8, 3))

    def loss(theta, params, batch, key):
        return jnp.mean((jnp.sin(inputs @ params["w"]) - 0.5) ** 2)

    problem = ug.training_problem(
        loss=loss,
        init_params=lambda key: {"w": jax.random.normal(key, (3,))},
        sample_batch=lambda key: 0.0,
        optimizer=lambda theta, t: small.transform(theta),
        horizon=horizon,
    )
    return problem, theta


@pytest.mark.parametrize(
    ("make", "horizon", "least"),
    [
        (ug.problems.chaotic_map, 400, 0.45),
        (lorenz_from_random_starts, 4000, 0.004),
        (learned_optimizer, 400, 0.1),
    ],
)
def test_gradients_grow_at_the_rate_of_the_exponent(make, horizon, least):
    """Within four standard errors of the differences over the same episodes."""
    problem, theta = make(horizon)
    sweep = horizon_sweep(problem, theta, key=KEY)
    discard = horizon // 4
    exponent = functools.partial(lyapunov, problem, theta, discard=discard)
    rates = np.asarray(jax.jit(jax.vmap(lambda key: exponent(key=key).exponents[0]))(EPISODES))
    se = math.hypot(sweep.growth_se, rates.std(ddof=1) / 4)
    assert abs(sweep.growth - rates.mean()) < 4 * se
    assert rates.mean() > least
    assert se < 0.25 * rates.mean()


def test_a_gradient_that_overflows_is_measured():
    problem, theta = ug.problems.chaotic_map(400)
    sweep = horizon_sweep(problem, theta, key=KEY)
    assert sweep.overflow == 200
    estimator = ug.bptt(problem)
    gradient = estimator.estimate(KEY, theta, estimator.init(KEY, theta))[0].grad
    assert not np.isfinite(gradient)
    with counted() as programs:
        horizon_sweep(problem, theta, key=KEY)
    assert programs == [0]


GRADIENT = np.array([1.0, -2.0, 0.5], np.float32)


def test_sigma_of_a_quadratic():
    """Smoothing changes nothing: the largest sigma; variance (P + 1) |g|^2 of a pair."""
    problem = of_one_step(lambda theta: GRADIENT @ theta + jnp.sum(theta**2))
    sweep = sigma_sweep(problem, jnp.zeros(3), key=KEY, sigmas=[0.01, 0.1, 1.0], num_pairs=2000)
    size = float(np.linalg.norm(GRADIENT))
    assert sweep.suggestion == sweep.plateau == 1.0
    assert sweep.noise_wall is None
    assert np.all(np.abs(sweep.norm - size) < 4 * sweep.norm_se)
    assert np.all(sweep.norm_se < 0.05 * size)
    assert np.all(sweep.change[1:] < 1e-4)
    np.testing.assert_allclose(sweep.variance, 4 * size**2, rtol=0.15)
    np.testing.assert_allclose(sweep.steepness, 1, rtol=1e-3)
    assert abs(sweep.loss[-1] - 3) < 4 * sweep.loss_se[-1]


def test_sigma_of_a_quartic():
    """The gradient of the smoothed loss is theta^3 + 3 sigma^2 theta."""
    problem = of_one_step(lambda theta: jnp.sum(theta**4) / 4)
    sigmas = np.array([0.05, 0.1, 0.2, 0.4, 0.8])
    sweep = sigma_sweep(problem, jnp.ones(3), key=KEY, sigmas=sigmas, num_pairs=4000)
    truth = math.sqrt(3) * (1 + 3 * sigmas**2)
    assert np.all(np.abs(sweep.norm - truth) < 4 * sweep.norm_se)
    change = truth[1:] / truth[:-1] - 1
    assert np.all(np.abs(sweep.change[1:] - change) < 4 * sweep.change_se[1:])
    assert sweep.suggestion == sigmas[1:][change < 0.1][-1] == 0.2
    assert np.all(sweep.change_se[1:4] < 0.5 * (sweep.norm_se / sweep.norm)[1:4])  # common numbers


def test_sigma_in_the_noise():
    """Independent losses of variance 1/2: dim(theta) / (4 sigma^2); there is nothing to suggest."""
    problem = of_one_step(lambda theta: jnp.sin(3e4 * jnp.sum(theta) + math.pi / 4))
    sigmas = np.array([0.01, 0.03, 0.1])
    sweep = sigma_sweep(problem, jnp.zeros(5), key=KEY, sigmas=sigmas, num_pairs=1000)
    np.testing.assert_allclose(sweep.variance, 5 * 0.5 / (2 * sigmas**2), rtol=0.15)
    assert np.all(np.abs(sweep.steepness) < 0.1)
    assert sweep.noise_wall == 0.1
    assert sweep.suggestion is None
    assert "hidden by noise" in sweep.reasons()[0]


def test_sigma_of_chaos():
    """Below a wall of noise, above lost particles: there the suggestion is."""
    problem, theta = ug.problems.chaotic_map(100)
    sigmas = [1e-4, 1e-3, 3e-3, 1e-2, 1e-1]
    sweep = sigma_sweep(problem, theta, key=KEY, sigmas=sigmas, num_pairs=400)
    assert sweep.lost[-1] > 0.1
    assert sweep.lost[0] == 0
    assert sweep.suggestion in (3e-3, 1e-2)
    assert sweep.noise_wall is not None


def test_sigma_below_the_resolution():
    problem = of_one_step(lambda theta: jnp.sum(theta["w"].astype(jnp.float32)))
    theta = {"w": jnp.ones(50, jnp.bfloat16)}
    sweep = sigma_sweep(problem, theta, key=KEY, sigmas=[0.001, 0.01, 0.2], unit={"w": 1.0})
    np.testing.assert_allclose(sweep.rounded[:2], [0.97, 0.22], atol=0.01)
    assert sweep.suggestion is None or sweep.suggestion == 0.2


def logistic_maps(horizon):
    """256 logistic maps with one theta."""
    return ug.UnrolledProblem(
        lambda key, theta: jax.random.uniform(key, (256,), minval=0.1, maxval=0.9),
        lambda key, theta, s, t: (theta * s * (1 - s), jnp.mean(s)),
        horizon,
    )


def test_metasmoothness():
    """1 for a linear response, near 0 in chaos; the published formula."""
    theta = jnp.float32(3.9)
    long = metasmoothness(logistic_maps(100), theta, 1.0, [1e-4, 1e-3], key=KEY)
    assert np.all(np.abs(long.smoothness) < 4 / math.sqrt(256))
    short = metasmoothness(logistic_maps(4), theta, 1.0, 1e-3, key=KEY)
    assert short.smoothness.shape == ()
    assert short.smoothness > 0.98
    ends = []
    for offset in (0, 1e-3, 2e-3):
        end = jax.random.uniform(jax.random.fold_in(KEY, 0), (256,), minval=0.1, maxval=0.9)
        for _ in range(4):
            end = (theta + np.float32(offset)) * end * (1 - end)
        ends.append(np.asarray(end))
    size = np.abs(ends[2] - ends[0])
    agree = np.sign(ends[1] - ends[0]) * np.sign(ends[2] - ends[1])
    np.testing.assert_allclose(short.smoothness, np.sum(size * agree) / size.sum(), rtol=1e-5)
    np.testing.assert_allclose(short.response, size.mean(), rtol=1e-3)


def test_metasmoothness_of_a_training_is_that_of_its_weights():
    def problem(optimizer):
        return ug.training_problem(
            loss=lambda theta, params, batch, key: jnp.sum(theta * params),
            init_params=lambda key: jnp.ones(3),
            sample_batch=lambda key: 0.0,
            optimizer=lambda theta, t: optimizer,
            horizon=5,
        )

    plain = metasmoothness(problem(optax.sgd(0.1)), jnp.ones(3), 1.0, 0.1, key=KEY)
    assert plain.smoothness == 1
    trace = metasmoothness(problem(optax.sgd(0.1, momentum=0.0)), jnp.ones(3), 1.0, 0.1, key=KEY)
    np.testing.assert_allclose(trace.response, plain.response, rtol=1e-5)


def test_loss_slice():
    """The losses of the episode on the line; rough in chaos, smooth before it."""
    problem, theta = ug.problems.chaotic_map(200)
    line = loss_slice(problem, theta, 1.0, key=KEY, offsets=np.linspace(-0.02, 0.02, 101))
    assert line.horizons == (20, 66, 200)
    for i, horizon in enumerate(line.horizons):
        cut = problem._replace(horizon=horizon)
        loss = jax.jit(lambda theta, cut=cut: ug.episode_loss(cut, KEY, theta))
        np.testing.assert_allclose(line.loss[i, 50], loss(theta), rtol=1e-5)
    assert line.roughness[2] > 0.7
    calm = loss_slice(problem, jnp.float32(2.8), 1.0, key=KEY)
    assert calm.roughness[2] < 0.1
    assert np.all((calm.last >= 0) & (calm.last <= 1))


def test_roughness_is_1_for_independent_points():
    values = np.random.default_rng(0).normal(size=(3, 4000))
    line = ug.diagnostics.LossSlice(np.arange(4000.0), (1, 2, 3), values, values, 1.0)
    np.testing.assert_allclose(line.roughness, 1, rtol=0.05)


def test_tables_and_pictures(capsys):
    problem, theta = ug.problems.chaotic_map(100)
    sweeps = [
        horizon_sweep(problem, theta, key=KEY),
        sigma_sweep(problem, theta, key=KEY),
        loss_slice(problem, theta, key=KEY),
        metasmoothness(problem, theta, 1.0, 1e-3, key=KEY),
        lyapunov(problem, theta, key=KEY),
    ]
    for sweep in sweeps:
        sweep.table()
        if hasattr(sweep, "plot"):
            assert len(sweep.plot().axes) in (1, 2)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for words in ("e-folds per step", "uggestion", "roughness", "smoothness", "Two machines"):
        assert words in text


def test_errors():
    problem, theta = ug.problems.chaotic_map(10)
    sampled = problem._replace(horizon=lambda key: 5)
    for sweep in (horizon_sweep, sigma_sweep, loss_slice):
        with raises(ValueError, sweep.__name__, "static horizon"):
            sweep(sampled, theta, key=KEY)
    with raises(ValueError, "num_pairs", "3"):
        sigma_sweep(problem, theta, key=KEY, num_pairs=2)
    with raises(ValueError, "sigma", "-1"):
        sigma_sweep(problem, theta, key=KEY, sigmas=[-1.0])
    with raises(ValueError, "`direction` is zero"):
        loss_slice(problem, theta, 0.0, key=KEY)
    with raises(ValueError, "`direction` must be a tree like theta", "float32[3]"):
        loss_slice(problem, theta, np.ones(3, np.float32), key=KEY)
    with raises(ValueError, "`direction` is not finite"):
        metasmoothness(problem, theta, np.nan, 1e-3, key=KEY)
    for step in (-1.0, 0.0, np.inf, []):
        with raises(ValueError, "`step` must be positive", repr(step)):
            metasmoothness(problem, theta, 1.0, step, key=KEY)
    counter = problem._replace(
        init=lambda key, theta: jnp.int32(0), step=lambda key, theta, s, t: (s + 1, theta * t)
    )
    with raises(ValueError, "floating numbers of the final state", "int32"):
        metasmoothness(counter, theta, 1.0, 1e-3, key=KEY)
