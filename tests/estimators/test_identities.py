"""Exact relations between estimators, and with central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from tests.helpers import build, quadratic


def one_call(estimator, theta, key=None):
    key = jax.random.key(3) if key is None else key
    return estimator.estimate(key, theta, estimator.init(jax.random.key(2), theta))[0]


def with_evaluate(problem):
    return problem._replace(evaluate=lambda key, theta, s: jnp.sum(s["x"] ** 3) + theta["start"][0])


@pytest.mark.parametrize("change", [lambda p: p, with_evaluate])
@pytest.mark.parametrize("name", ["pes", "es_single", "gpes"])
def test_persistent_with_one_window_is_full_es(name, change):
    problem, theta = quadratic()
    problem = change(problem)
    with jax.enable_x64(True):  # a difference of losses over sigma has its digits there
        theta = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), theta)
        whole = one_call(build("full_es", problem, num_pairs=3), theta)
        window = one_call(build(name, problem, truncation=20, noise_period=40, num_pairs=3), theta)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(window), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("change", [lambda p: p, with_evaluate])
def test_tbptt_with_one_window_is_bptt_and_central_differences(change):
    problem, theta = quadratic()
    problem = change(problem)
    with jax.enable_x64(True):
        theta = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), theta)
        exact = one_call(ug.bptt(problem), theta)
        window = one_call(ug.tbptt(problem, truncation=20), theta)
        for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(window), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
        leaves, structure = jax.tree.flatten(theta)

        def loss(leaves):
            return ug.episode_loss(problem, jax.random.key(3), structure.unflatten(leaves))

        for i, (leaf, grad) in enumerate(zip(leaves, jax.tree.leaves(exact.grad), strict=True)):
            for j in np.ndindex(leaf.shape):
                h = 1e-5

                def moved(by, i=i, j=j):
                    return [x.at[j].add(by) if k == i else x for k, x in enumerate(leaves)]

                difference = (loss(moved(h)) - loss(moved(-h))) / (2 * h)
                np.testing.assert_allclose(grad[j], difference, rtol=1e-6)


def test_one_noise_per_episode_is_full_es_window_by_window():
    """The windows of ES-Single average to full ES on the same episode: nothing is seen twice."""
    problem, theta = quadratic()
    for change in [lambda p: p, with_evaluate]:
        changed = change(problem)
        whole = one_call(build("full_es", changed), theta)
        estimator = build("es_single", changed, truncation=5)
        state, grads = estimator.init(jax.random.key(9), theta), []
        for i in range(4):
            key = jax.random.key(3) if i == 0 else jax.random.key(100 + i)
            estimate, state = estimator.estimate(key, theta, state)
            grads.append(estimate.grad)
        mean = jax.tree.map(lambda *g: sum(g) / 4, *grads)
        for a, b in zip(jax.tree.leaves(whole.grad), jax.tree.leaves(mean), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4)


def test_pes_weighs_the_evaluation_at_both_ends_with_its_own_noise():
    """(T/K) (xi_t L_end - xi_{t-1} L_start), against a by-hand loop over one pair."""
    problem, theta, _ = ug.problems.linear_recurrence(dim=3, horizon=6, memory=0.9)
    evaluate = lambda key, theta, s: jnp.sum(s**2) + theta[0]  # noqa: E731
    final = ug.final_loss(problem, evaluate)
    sigma, key = 0.1, jax.random.key(3)
    estimator = ug.pes(final, truncation=2, sigma=sigma)
    state = estimator.init(jax.random.key(0), theta)
    noise, law = jax.random.fold_in(key, 2), ug.noise.gaussian()
    plus = minus = 1 + 0 * theta
    xi, start = jnp.zeros(3), jnp.zeros(2)
    for window in range(3):
        u = law.sample(jax.random.fold_in(noise, window), (), theta, 1)[0]
        for _ in range(2):
            plus, minus = 0.9 * plus + theta + sigma * u, 0.9 * minus + theta - sigma * u
        before, xi = xi, xi + u
        end = jnp.array(
            [evaluate(None, theta + sigma * u, plus), evaluate(None, theta - sigma * u, minus)]
        )
        by_hand = 3 * (xi * (end[0] - end[1]) - before * (start[0] - start[1])) / (2 * sigma)
        start = end
        estimate, state = estimator.estimate(key, theta, state)
        np.testing.assert_allclose(estimate.grad, by_hand, rtol=1e-4)


def test_deterministic_losses_agree():
    """Averaged over its windows, every estimator's loss is that of the same episode."""
    problem, theta = quadratic()
    truth = ug.episode_loss(problem, jax.random.key(3), theta)
    for name in ["full_es", "truncated_es", "pes", "es_single", "gpes", "bptt", "tbptt"]:
        estimator = build(name, problem, truncation=5, sigma=1e-4)
        windows = 20 // (estimator.truncation or 20)
        state, losses = estimator.init(jax.random.key(0), theta), []
        for _ in range(windows):
            estimate, state = estimator.estimate(jax.random.key(3), theta, state)
            losses.append(float(estimate.loss))
        np.testing.assert_allclose(np.mean(losses), truth, rtol=1e-3, err_msg=name)


def test_small_sigma_keeps_its_digits():
    """Step losses are subtracted before they are averaged."""
    problem, theta, _ = ug.problems.linear_recurrence(dim=1, horizon=1000)
    shifted = problem._replace(
        step=lambda key, th, s, t: (lambda s, loss: (s, loss + 100.0))(*problem.step(key, th, s, t))
    )
    estimate = one_call(ug.full_es(shifted, sigma=1e-2), theta)
    plain = one_call(ug.full_es(problem, sigma=1e-2), theta)
    np.testing.assert_allclose(estimate.grad, plain.grad, rtol=1e-3)


def test_an_evaluation_that_cannot_be_differentiated_at_the_start():
    """The norm of a state that begins at zero: the first window has no L_start to go through."""
    problem = ug.UnrolledProblem(
        init=lambda key, theta: jnp.zeros(3) * theta,
        step=lambda key, theta, s, t: (s + theta, 0.0),
        horizon=20,
        evaluate=lambda key, theta, s: jnp.linalg.norm(s) + jnp.sqrt(jnp.abs(theta * s[0])),
    )
    theta = jnp.float32(2.0)
    exact = one_call(ug.bptt(problem), theta)
    window = one_call(ug.tbptt(problem, truncation=20), theta)
    np.testing.assert_allclose(window.grad, exact.grad, rtol=1e-6)
    workers = ug.average(ug.tbptt(problem, truncation=5), 2)
    averaged = one_call(workers, theta)
    assert np.isfinite(averaged.grad)
    assert averaged.info.num_nonfinite == 0
