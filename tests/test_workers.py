"""``average``: the mean over workers, its variance, and the treatment of bad workers."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import unrollgrad as ug
from tests.helpers import build, numbers, over_workers, quadratic

KEY = jax.random.key(0)


@functools.cache
def simple():
    """A small problem: its state, one number, records the draws of its episode."""

    def step(key, theta, x, t):
        x = 0.9 * x + theta * jax.random.uniform(key)
        return x, x**2

    return ug.UnrolledProblem(lambda key, theta: jax.random.uniform(key), step, 20)


def test_mean_of_workers_with_folded_keys():
    """Also the spread over workers; ``estimators/test_contract.py`` has all estimators."""
    problem, theta = quadratic()
    alone = build("pes", problem)
    many = ug.average(alone, 4)
    one = jax.jit(jax.vmap(alone.estimate, (0, None, 0)))
    fold = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))
    workers = np.arange(4)
    state = many.init(KEY, theta)
    states = jax.jit(jax.vmap(alone.init, (0, None)))(fold(KEY, workers), theta)
    for call in range(3):
        key = jax.random.key(call)
        estimate, state = many.estimate(key, theta, state)
        each, states = one(fold(key, workers), theta, states)
        estimate, each = numbers((estimate, each))
        mean = jax.tree.map(lambda x: x.mean(axis=0), each)
        chex.assert_trees_all_close(estimate.grad, mean.grad, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(estimate.loss, mean.loss, rtol=1e-5)
        variance = sum(np.var(g, axis=0, ddof=1).sum() for g in jax.tree.leaves(each.grad)) / 4
        np.testing.assert_allclose(estimate.info.grad_variance, variance, rtol=1e-3)
        assert estimate.info.inner_steps == each.info.inner_steps.sum() == 4 * 2 * 2 * 5
        assert estimate.info.num_nonfinite == 0


BEGINNERS = ["gpes", "truncated_es", "tbptt", "dodge", "uoro", "pes_analytic"]


@pytest.mark.parametrize("name", BEGINNERS)
def test_episodes_begin_only_where_they_do(name, optimized):
    """``init`` runs only in calls that begin an episode, also on each device of a ``shard_map``.

    XLA may move a pure callback, as it may move any other part of ``init``; one callback depends on
    the key, the other on theta alone.
    """
    plain, theta = simple(), jnp.float32(0.3)
    runs = []

    def count(x):
        runs.append(1)
        return np.zeros(np.shape(x), np.float32)

    def counted(x):
        like, fixed = jax.ShapeDtypeStruct((), jnp.float32), jax.lax.stop_gradient(x)
        return x + jax.pure_callback(count, like, fixed, vmap_method="broadcast_all")

    def init(key, theta):
        return counted(plain.init(key, theta)) + counted(theta)

    many = ug.average(build(name, plain._replace(init=init)), 4)
    mesh, each = ug.make_worker_mesh(2), PartitionSpec("workers")
    own = [jax.random.split(jax.random.key(i), 2) for i in range(6)]

    def on_each(keys, theta, state):
        out = many.estimate(keys[0], theta, jax.tree.map(lambda x: x[0], state))
        return jax.tree.map(lambda x: x[None], out)

    alone = many.init(KEY, theta)
    pair = jax.tree.map(lambda x: jnp.stack([x, x]), alone)
    spread = jax.jit(
        jax.shard_map(on_each, mesh=mesh, in_specs=(each, PartitionSpec(), each), out_specs=each)
    )
    for estimate, keys, state in [
        (many.estimate, [keys[0] for keys in own], alone),
        (spread, own, pair),
    ]:
        counts = []
        for key in keys[:5]:
            runs.clear()
            _, state = jax.block_until_ready(estimate(key, theta, state))
            counts.append(len(runs))
        assert [bool(count) for count in counts] == [True, False, False, False, True]


def test_one_worker_has_no_spread():
    theta, one = jnp.float32(0.3), ug.average(build("pes", simple()), 1)
    estimate, _ = one.estimate(KEY, theta, one.init(KEY, theta))
    assert over_workers(estimate).grad_variance == np.inf


def test_grad_variance_is_that_of_the_mean():
    problem, theta, _ = ug.problems.linear_recurrence(dim=5, horizon=4, memory=0.5)
    many = ug.average(ug.pes(problem, truncation=2, sigma=0.1), 50)

    @jax.jit
    def draw(keys):
        state = many.init(KEY, theta)
        estimate = jax.lax.map(lambda key: many.estimate(key, theta, state)[0], keys)
        return estimate.grad, estimate.info.grad_variance

    grads, variances = map(np.asarray, draw(jax.random.split(KEY, 4000)))
    true = np.var(grads, axis=0, ddof=1).sum()
    np.testing.assert_allclose(variances.mean(), true, rtol=0.1)


@pytest.mark.parametrize(("size", "how"), [(3, "at once"), (3, "both"), (500, "both")])
def test_grad_variance_keeps_its_digits(size, how):
    """The gradients have mean 1000 and sd 0.01: their squares differ by 1e-10."""

    def init(key, theta):
        return jax.random.normal(key, (size,))

    def step(key, theta, state, t):
        return state, jnp.sum((1000 + 0.01 * state) * theta)

    # Batches and devices: batch means are combined, then device means.
    both: dict[str, Any] = {"mesh": ug.make_worker_mesh(8), "batch_size": 2}
    problem = ug.UnrolledProblem(init, step, 2)
    many = ug.average(ug.bptt(problem), 64, **(both if how == "both" else {}))
    theta = jnp.zeros(size)
    state = many.init(KEY, theta)
    estimates = [many.estimate(jax.random.key(i), theta, state)[0] for i in range(40)]
    values = np.array([over_workers(e).grad_variance for e in estimates])
    true = size * 0.01**2 / 64
    assert abs(values.mean() / true - 1) < 0.05
    assert values.std() / np.sqrt(40) < 0.02 * true
    np.testing.assert_allclose(np.asarray(estimates[0].grad), 1000, atol=0.01)  # 8 standard errors


def poisoned(num_bad):
    """A deterministic problem; workers with a low draw become NaN at step 7."""

    def init(key, theta):
        return jax.random.uniform(key), jnp.float32(1.0)

    def step(key, theta, state, t):
        draw, x = state
        bad = (draw < jnp.sort(draws)[num_bad]) & (t >= 7)
        x = (0.9 * x + theta) * jnp.where(bad, jnp.nan, 1.0)
        return (draw, x), x**2

    problem = ug.UnrolledProblem(init, step, 20)
    call = jax.random.key(5)
    begin = jax.jit(
        lambda i: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(call, i), 0))
    )
    draws = np.array([begin(i) for i in range(8)])
    return problem, call, draws < np.sort(draws)[num_bad]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("pes", "in batches"),
        ("pes", "on devices"),
        ("truncated_es", "at once"),
        ("tbptt", "at once"),
        ("uoro", "at once"),
    ],
)
def test_bad_workers_are_dropped_restarted_and_counted(name, how):
    problem, call, bad = poisoned(2)
    theta = jnp.float32(0.3)
    estimator = build(name, problem)
    spread: dict[str, Any] = {
        "at once": {},
        "in batches": {"batch_size": 1},  # some batches have no good worker
        "on devices": {"mesh": ug.make_worker_mesh(8)},
    }[how]
    many = ug.average(estimator, 8, **spread)
    state = many.init(KEY, theta)
    _, state = many.estimate(call, theta, state)  # steps 0 to 4: all losses are finite
    estimate, after = many.estimate(call, theta, state)
    assert int(over_workers(estimate).num_nonfinite) == 2
    np.testing.assert_array_equal(np.asarray(after.episode.t), np.where(bad, 0, 10))
    alone = jax.jit(lambda i, state: estimator.estimate(jax.random.fold_in(call, i), theta, state))
    mine = jax.device_put(state, jax.devices()[0])
    grads = np.asarray(jax.vmap(alone)(np.arange(8), mine)[0].grad)
    assert (np.isnan(grads) == bad).all()
    grads = grads[~bad]
    np.testing.assert_allclose(estimate.grad, np.mean(grads), rtol=1e-4)
    np.testing.assert_allclose(
        over_workers(estimate).grad_variance,
        np.var(grads, ddof=1) / len(grads),
        rtol=1e-3,
        atol=1e-6,
    )
    # In the next call they begin again and contribute.
    estimate, again = many.estimate(call, theta, after)
    assert int(over_workers(estimate).num_nonfinite) == 0
    assert np.isfinite(float(estimate.grad))
    np.testing.assert_array_equal(np.asarray(again.episode.t), np.where(bad, 5, 15))
    if name == "pes":
        shown = ug.average(estimator, 8, nonfinite="propagate", **spread)
        estimate, after = shown.estimate(call, theta, state)
        assert np.isnan(float(estimate.grad))
        assert int(over_workers(estimate).num_nonfinite) == 2
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
    assert int(over_workers(estimate).num_nonfinite) == 3


def test_all_workers_bad_because_theta_is_rounded():
    """Adam's decay rate 0.999 is 1 in bfloat16: the error names the leaf and its dtype."""
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


def test_more_inner_steps_than_an_int32_holds():
    problem = ug.UnrolledProblem(
        lambda key, theta: jnp.zeros(()), lambda k, theta, s, t: (s + theta, s), 1_000_000
    )
    key, theta, most = jax.random.key(0), jnp.float32(0.2), 2**31 - 1
    es = ug.full_es(problem, sigma=0.1, num_pairs=2000)
    jax.eval_shape(lambda: es.estimate(key, theta, es.init(key, theta)))
    one = ug.pes(problem, truncation=1000, sigma=0.1)
    for steps, total in ((2**30, most), (2**29, 3 * 2**29)):

        def counted(key, theta, state, *, data=None, steps=steps):
            return ug.Estimate(theta, theta, ug.Info(jnp.int32(steps))), state

        fake = ug.GradientEstimator(one.init, counted, 1000)
        for mesh in (None, ug.make_worker_mesh(3)):
            many = ug.average(fake, 3, mesh=mesh)
            out, _ = many.estimate(key, theta, many.init(key, theta))
            assert out.info.inner_steps == total
