"""``average``: the mean over workers, its variance, and what becomes of bad workers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import build, quadratic, rows

KEY = jax.random.key(0)


@pytest.mark.parametrize("name", rows())
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


@pytest.mark.parametrize(
    ("name", "again"), [("gpes", False), ("truncated_es", False), ("tbptt", True)]
)
def test_episodes_begin_only_where_they_do(name, again, optimized):
    """``init`` runs in the windows that begin one, not in all; differentiated, in all.

    A pure callback is what XLA may move, as it may move any other part of ``init``.
    """
    plain, theta = quadratic()
    runs = []

    def count(data):
        runs.append(1)
        return np.zeros(data.shape[:-1], np.float32)

    def init(key, theta):
        data, like = jax.random.key_data(key), jax.ShapeDtypeStruct((), jnp.float32)
        zero = jax.pure_callback(count, like, data, vmap_method="broadcast_all")
        return jax.tree.map(lambda x: x + zero.astype(x.dtype), plain.init(key, theta))

    many = ug.average(build(name, plain._replace(init=init)), 4)
    state, counts = many.init(KEY, theta), []
    for i in range(5):
        runs.clear()
        _, state = jax.block_until_ready(many.estimate(jax.random.key(i), theta, state))
        counts.append(len(runs))
    assert counts[0] > 0
    assert [bool(count) for count in counts[1:4]] == [again] * 3
    assert counts[4] == counts[0]


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


@pytest.mark.parametrize("size", [3, 500])
@pytest.mark.parametrize("how", ["at once", "in batches", "on devices", "both"])
def test_grad_variance_keeps_its_digits(how, size):
    """Gradients of mean 1000 and sd 0.01, in the first call: their squares differ by 1e-10."""

    def init(key, theta):
        return jax.random.normal(key, (size,))

    def step(key, theta, state, t):
        return state, jnp.sum((1000 + 0.01 * state) * theta)

    spread = {
        "at once": {},
        "in batches": {"batch_size": 4},
        "on devices": {"mesh": ug.make_worker_mesh(8)},
        "both": {"mesh": ug.make_worker_mesh(8), "batch_size": 2},
    }[how]
    problem = ug.UnrolledProblem(init, step, 2)
    many = ug.average(ug.bptt(problem), 64, **spread)
    theta = jnp.zeros(size)
    state = many.init(KEY, theta)
    values = [many.estimate(jax.random.key(i), theta, state)[0].info for i in range(40)]
    values = np.array([info.grad_variance for info in values])
    true = size * 0.01**2 / 64
    assert abs(values.mean() / true - 1) < 0.05
    assert values.std() / np.sqrt(40) < 0.02 * true
    np.testing.assert_allclose(
        many.estimate(KEY, theta, state)[0].grad,
        1000,
        atol=0.01,  # 8 standard errors
    )


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


@pytest.mark.parametrize("how", ["at once", "in batches", "on devices"])
@pytest.mark.parametrize("name", ["pes", "truncated_es", "es_single", "tbptt"])
def test_bad_workers_are_dropped_restarted_and_counted(name, how):
    problem, call, bad = poisoned(2)
    theta = jnp.float32(0.3)
    estimator = build(name, problem)
    spread = {
        "at once": {},
        "in batches": {"batch_size": 1},  # a batch without any good worker among them
        "on devices": {"mesh": ug.make_worker_mesh(8)},
    }[how]
    many, shown = (ug.average(estimator, 8, nonfinite=n, **spread) for n in ["drop", "propagate"])
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


@pytest.mark.parametrize("num_devices", [None, 3])
def test_all_workers_bad(num_devices):
    problem = ug.UnrolledProblem(
        lambda key, theta: theta, lambda key, theta, s, t: (s, jnp.nan * theta), 5
    )
    mesh = num_devices and ug.make_worker_mesh(num_devices)
    many = ug.average(ug.pes(problem, truncation=5, sigma=0.1), 3, mesh=mesh)
    theta = jnp.float32(1.0)
    state = many.init(KEY, theta)
    with pytest.raises(FloatingPointError, match=r"all 3 workers.*\(3 a non-finite loss\)"):
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
