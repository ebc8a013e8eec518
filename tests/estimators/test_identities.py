"""Exact relations between estimators, and between an estimator and central differences."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from tests.helpers import build, numbers, quadratic

KEY = jax.random.key(3)


@functools.partial(jax.jit, static_argnums=0)
def one_calls(estimators, theta):
    """The first estimate of each estimator in the same episode."""

    def one(estimator):
        return estimator.estimate(KEY, theta, estimator.init(jax.random.key(2), theta))[0]

    return [one(estimator) for estimator in estimators]


@functools.partial(jax.jit, static_argnums=(0, 1))
def episode(estimator, num_windows, theta):
    """The estimates of one episode's windows, stacked; each call has another key."""

    def call(state, i):
        key = jax.random.split(jax.random.fold_in(KEY, i))[0]
        estimate, state = estimator.estimate(jnp.where(i == 0, KEY, key), theta, state)
        return state, estimate

    return jax.lax.scan(call, estimator.init(jax.random.key(2), theta), jnp.arange(num_windows))[1]


def with_evaluate(problem):
    return problem._replace(evaluate=lambda key, theta, s: jnp.sum(s["x"] ** 3) + theta["start"][0])


CHANGES = pytest.mark.parametrize("change", [lambda p: p, with_evaluate], ids=["steps", "evaluate"])


def in_float64(theta):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), theta)


@CHANGES
def test_persistent_with_one_window_is_full_es(change):
    problem, theta = quadratic()
    problem = change(problem)
    with jax.enable_x64(True):  # differences of losses, divided by sigma, need its digits
        whole, *windows = one_calls(
            tuple(
                build(name, problem, truncation=20, noise_period=40, num_pairs=3)
                for name in ["full_es", "pes", "es_single", "gpes"]
            ),
            in_float64(theta),
        )
        for window in windows:
            chex.assert_trees_all_close(numbers(window), numbers(whole), rtol=1e-12)


@CHANGES
def test_tbptt_with_one_window_is_bptt_and_central_differences(change):
    problem, theta = quadratic()
    problem = change(problem)
    with jax.enable_x64(True):
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(in_float64(theta))])
        moved = flat + 1e-5 * np.concatenate([np.eye(4), -np.eye(4)])

        @jax.jit
        @jax.vmap
        def losses(x):
            return ug.episode_loss(problem, KEY, {"log_rate": x[0], "start": x[1:]})

        plus, minus = np.split(losses(moved), 2)
        exact, window = one_calls(
            (ug.bptt(problem), ug.tbptt(problem, truncation=20)), in_float64(theta)
        )
        chex.assert_trees_all_close(numbers(window), numbers(exact), rtol=1e-12)
        grad = np.concatenate([np.ravel(x) for x in jax.tree.leaves(exact.grad)])
        np.testing.assert_allclose(grad, (plus - minus) / 2e-5, rtol=1e-6)


@CHANGES
def test_one_noise_per_episode_is_full_es_window_by_window(change):
    """The windows of ES-Single average to full ES on the same episode."""
    problem, theta = quadratic()
    problem = change(problem)
    (whole,) = one_calls((build("full_es", problem),), theta)
    windows = episode(build("es_single", problem, truncation=5), 4, theta)
    mean = jax.tree.map(lambda g: g.mean(axis=0), numbers(windows.grad))
    chex.assert_trees_all_close(mean, numbers(whole.grad), rtol=2e-4)


def test_truncated_es_carries_the_state_that_theta_itself_reaches():
    """In every window the pairs restart from the state that ``tbptt`` carries."""
    problem, theta = quadratic()

    @functools.partial(jax.jit, static_argnums=0)
    def reached(estimator, theta):
        state = estimator.init(jax.random.key(2), theta)
        return estimator.estimate(KEY, theta, state)[1].carried

    es = build("truncated_es", problem, truncation=5)
    plain = reached(ug.tbptt(problem, truncation=5), theta)
    chex.assert_trees_all_close(numbers(reached(es, theta)), numbers(plain), rtol=1e-6)


def test_pes_weighs_the_evaluation_at_both_ends_with_its_own_noise():
    """It is (T/K) (xi_t L_end - xi_{t-1} L_start), as in a NumPy loop over one pair."""
    problem, theta, _ = ug.problems.linear_recurrence(dim=3, horizon=6, memory=0.9)
    final = ug.final_loss(problem, lambda key, theta, s: jnp.sum(s**2) + theta[0])
    sigma = 0.1
    grads = numbers(episode(ug.pes(final, truncation=2, sigma=sigma), 3, theta).grad)

    @jax.jit
    @jax.vmap
    def draw(window):
        key = jax.random.fold_in(jax.random.fold_in(KEY, 2), window)
        return ug.noise.gaussian().sample(key, (), theta, 1)[0]

    x = np.asarray(theta, np.float64)
    plus = minus = np.ones(3)
    xi, start = np.zeros(3), 0.0
    for u, grad in zip(np.asarray(draw(np.arange(3)), np.float64), grads, strict=True):
        for _ in range(2):
            plus, minus = 0.9 * plus + x + sigma * u, 0.9 * minus + x - sigma * u
        before, xi = xi, xi + u
        end = np.sum(plus**2) - np.sum(minus**2) + 2 * sigma * u[0]
        by_hand = 3 * (xi * end - before * start) / (2 * sigma)
        start = end
        np.testing.assert_allclose(grad, by_hand, rtol=1e-4)


@pytest.mark.parametrize("name", ["full_es", "truncated_es", "es_single", "gpes", "bptt", "tbptt"])
def test_deterministic_losses_agree(name):
    """Averaged over its windows, every estimator's loss is the loss of the same episode."""
    problem, theta = quadratic()
    estimator = build(name, problem, truncation=5, sigma=1e-4)
    windows = episode(estimator, 20 // (estimator.truncation or 20), theta)
    np.testing.assert_allclose(np.mean(windows.loss), quadratic_loss(), rtol=1e-3)


@functools.cache
def quadratic_loss():
    problem, theta = quadratic()
    return float(jax.jit(lambda theta: ug.episode_loss(problem, KEY, theta))(theta))


def test_small_sigma_keeps_its_digits():
    """Step losses are subtracted before they are averaged."""
    problem, theta, _ = ug.problems.linear_recurrence(dim=1, horizon=1000)

    @jax.jit
    def gradient(shift):
        def step(key, theta, s, t):
            s, loss = problem.step(key, theta, s, t)
            return s, loss + shift

        estimator = ug.full_es(problem._replace(step=step), sigma=1e-2, num_pairs=8)
        return estimator.estimate(KEY, theta, estimator.init(jax.random.key(2), theta))[0].grad

    np.testing.assert_allclose(gradient(100.0), gradient(0.0), rtol=1e-3)


def test_an_evaluation_that_cannot_be_differentiated_at_the_start():
    """The norm of a state that begins at zero; the first window has no gradient of L_start."""
    problem = ug.UnrolledProblem(
        init=lambda key, theta: jnp.zeros(3) * theta,
        step=lambda key, theta, s, t: (s + theta, 0.0),
        horizon=20,
        evaluate=lambda key, theta, s: jnp.linalg.norm(s) + jnp.sqrt(jnp.abs(theta * s[0])),
    )
    workers = ug.average(ug.tbptt(problem, truncation=5), 2)
    exact, window, averaged = one_calls(
        (ug.bptt(problem), ug.tbptt(problem, truncation=20), workers), jnp.float32(2.0)
    )
    np.testing.assert_allclose(window.grad, exact.grad, rtol=1e-6)
    assert np.isfinite(averaged.grad)
    assert averaged.info.num_nonfinite == 0
