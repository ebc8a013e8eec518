"""``average``: the mean over workers, its variance, and what becomes of bad workers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import build, quadratic

import unrollgrad as ug
from unrollgrad.estimators import REGISTRY

KEY = jax.random.key(0)


@pytest.mark.parametrize("name", REGISTRY)
def test_mean_of_workers_with_folded_keys(name):
    problem, theta = quadratic()
    alone = build(name, problem)
    many = ug.average(alone, 4)
    state = many.init(KEY, theta)
    states = [alone.init(jax.random.fold_in(KEY, i), theta) for i in range(4)]
    for call in range(3):
        key = jax.random.key(call)
        estimate, state = many.estimate(key, theta, state)
        grads, losses, steps = [], [], 0
        for i in range(4):
            one, states[i] = alone.estimate(jax.random.fold_in(key, i), theta, states[i])
            grads.append(np.concatenate([np.ravel(g) for g in jax.tree.leaves(one.grad)]))
            losses.append(float(one.loss))
            steps += int(one.info.inner_steps)
        mean = np.concatenate([np.ravel(g) for g in jax.tree.leaves(estimate.grad)])
        np.testing.assert_allclose(mean, np.mean(grads, axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(estimate.loss, np.mean(losses), rtol=1e-5)
        variance = np.var(grads, axis=0, ddof=1).sum() / 4
        np.testing.assert_allclose(estimate.info.grad_variance, variance, rtol=1e-3)
        assert int(estimate.info.inner_steps) == steps
        assert int(estimate.info.num_nonfinite) == 0


def test_one_worker_has_no_spread():
    problem, theta = quadratic()
    one = ug.average(build("pes", problem), 1)
    estimate, _ = one.estimate(KEY, theta, one.init(KEY, theta))
    assert estimate.info.grad_variance == jnp.inf


@pytest.mark.slow
def test_grad_variance_is_that_of_the_mean():
    problem, theta, _ = ug.problems.linear_recurrence(dim=5, horizon=4, memory=0.5)
    many = ug.average(ug.pes(problem, truncation=2, sigma=0.1), 50)
    state = many.init(KEY, theta)

    def call(key):
        estimate, _ = many.estimate(key, theta, state)
        return estimate.grad, estimate.info.grad_variance

    grads, variances = jax.lax.map(jax.jit(call), jax.random.split(KEY, 4000))
    true = np.var(np.asarray(grads), axis=0, ddof=1).sum()
    np.testing.assert_allclose(variances.mean(), true, rtol=0.1)


def poisoned(num_bad):
    """A deterministic problem in which the workers that drew a low number go NaN at step 7."""

    def init(key, theta):
        return jax.random.uniform(key), jnp.float32(1.0)

    def step(key, theta, state, t):
        draw, x = state
        bad = (draw < jnp.sort(draws)[num_bad]) & (t >= 7)
        x = (0.9 * x + theta) * jnp.where(bad, jnp.nan, 1.0)
        return (draw, x), x**2

    problem = ug.UnrolledProblem(init, step, 20)
    call = jax.random.key(5)
    episode = [jax.random.fold_in(call, i) for i in range(8)]
    draws = jnp.stack([jax.random.uniform(jax.random.fold_in(k, 0)) for k in episode])
    return problem, call, np.asarray(draws) < float(jnp.sort(draws)[num_bad])


@pytest.mark.parametrize("name", ["pes", "truncated_es", "es_single", "tbptt"])
def test_bad_workers_are_dropped_restarted_and_counted(name):
    problem, call, bad = poisoned(2)
    theta = jnp.float32(0.3)
    estimator = build(name, problem)
    many, shown = (ug.average(estimator, 8, nonfinite=n) for n in ["drop", "propagate"])
    state = many.init(KEY, theta)
    _, state = many.estimate(call, theta, state)  # steps 0 to 4: all is well
    estimate, after = many.estimate(call, theta, state)
    assert int(estimate.info.num_nonfinite) == 2
    np.testing.assert_array_equal(np.asarray(after.episode.t), np.where(bad, 0, 10))
    grads = []
    for i in np.flatnonzero(~bad):
        mine = jax.tree.map(lambda x: x[i], state)  # noqa: B023
        one, _ = estimator.estimate(jax.random.fold_in(call, i), theta, mine)
        grads.append(float(one.grad))
    np.testing.assert_allclose(estimate.grad, np.mean(grads), rtol=1e-4)
    np.testing.assert_allclose(
        estimate.info.grad_variance, np.var(grads, ddof=1) / len(grads), rtol=1e-3, atol=1e-6
    )
    # In the next call they begin again and contribute.
    estimate, after = many.estimate(call, theta, after)
    assert int(estimate.info.num_nonfinite) == 0
    np.testing.assert_array_equal(np.asarray(after.episode.t), np.where(bad, 5, 15))
    estimate, after = shown.estimate(call, theta, state)
    assert np.isnan(float(estimate.grad))
    assert int(estimate.info.num_nonfinite) == 2
    np.testing.assert_array_equal(np.asarray(after.episode.t), 10)


def test_all_workers_bad():
    problem = ug.UnrolledProblem(
        lambda key, theta: theta, lambda key, theta, s, t: (s, jnp.nan * theta), 5
    )
    many = ug.average(ug.pes(problem, truncation=5, sigma=0.1), 3)
    theta = jnp.float32(1.0)
    state = many.init(KEY, theta)
    with pytest.raises(FloatingPointError, match="all 3 workers"):
        many.estimate(KEY, theta, state)
    estimate, _ = jax.jit(many.estimate)(KEY, theta, state)
    assert np.isnan(float(estimate.grad))
    assert np.isnan(float(estimate.loss))
    assert int(estimate.info.num_nonfinite) == 3


def test_all_workers_bad_because_theta_is_rounded():
    """0.999 as a decay rate of Adam is 1 in bfloat16: the message names the leaf and its dtype."""
    problem = ug.training_problem(
        loss=lambda theta, w, batch, key: jnp.sum((w - 1.0) ** 2),
        init_params=lambda key: jnp.zeros(2),
        optimizer=lambda theta, t: optax.adam(0.1, b2=theta["b2"]),
        sample_batch=lambda key: (),
        horizon=4,
    )
    many = ug.average(ug.tbptt(problem, truncation=4), 2)
    theta = {"b2": jnp.bfloat16(0.999)}
    state = many.init(KEY, theta)
    with (
        pytest.warns(UserWarning, match="eps_root"),
        pytest.raises(FloatingPointError, match=r"theta\['b2'\] is bfloat16; a decay rate"),
    ):
        many.estimate(KEY, theta, state)


def test_all_workers_bad_with_finite_losses():
    problem = ug.UnrolledProblem(
        lambda key, theta: theta, lambda key, theta, s, t: (s, jnp.sqrt(0 * theta)), 5
    )
    many = ug.average(ug.bptt(problem), 2)
    theta = jnp.float32(1.0)
    state = many.init(KEY, theta)
    with pytest.raises(FloatingPointError, match=r"0 a non-finite loss.*it is the derivatives"):
        many.estimate(KEY, theta, state)
