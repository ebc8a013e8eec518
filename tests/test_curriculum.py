"""Windows and episodes grow during training without compiling again."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import unrollgrad as ug
from tests.helpers import build, mistyped, numbers, raises
from tests.statistics import Samples

KEY = jax.random.key(0)
SETTINGS = {"sigma": 0.1, "num_pairs": 2}


def assert_same(a, b):
    """Asserts equal numbers; the trees may differ in ``made_by``."""
    a, b = (jax.tree.leaves(numbers(tree)) for tree in (a, b))
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-6)


def simple(horizon=20):
    """A small problem: only the initial state has a random draw."""

    def step(key, theta, x, t):
        x = 0.9 * x + theta
        return x, x**2

    problem = ug.UnrolledProblem(lambda key, theta: jax.random.uniform(key), step, horizon)
    return problem, jnp.float32(0.3)


def stages(factory=ug.pes, **settings):
    """Two stages: truncation 2, then 5 in a longer episode."""
    (problem, theta), (longer, _) = simple(20), simple(40)
    return [
        factory(problem, truncation=2, **settings),
        factory(longer, truncation=5, **settings),
    ], theta


@pytest.mark.parametrize(
    ("factory", "settings", "workers"), [(ug.pes, SETTINGS, 3), (ug.tbptt, {}, 0)]
)
def test_each_call_is_that_of_its_stage_begun_afresh(factory, settings, workers):
    made, theta = stages(factory, **settings)
    if workers:
        made = [ug.average(e, workers) for e in made]
    growing = ug.curriculum(made, boundaries=[3])
    state, own = growing.init(KEY, theta), None
    for call, t in enumerate([2, 4, 6, 5, 10, 15]):
        key = jax.random.fold_in(KEY, call)
        estimate, new = growing.estimate(key, theta, state)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        state, number = new, int(call >= 3)
        if call in (0, 3):
            own = made[number].init(jax.random.key(9), theta)  # a placeholder for any key
        mine, own = made[number].estimate(key, theta, own)
        assert_same((estimate, state.episode), (mine, own.episode))
        assert np.all(np.asarray(state.episode.t) == t)
        assert np.all(np.asarray(state.episode.horizon) == (40 if number else 20))
    assert int(state.calls) == 6


def test_one_program_for_all_stages():
    problem, theta = simple()
    traces = []

    def counted(number):
        def step(*args):
            traces.append(number)
            return problem.step(*args)

        return problem._replace(step=step)

    made = [ug.tbptt(counted(i), truncation=k) for i, k in enumerate([1, 2, 5])]
    growing = ug.curriculum(made, boundaries=[2, 4])
    state = growing.init(KEY, theta)
    estimate: Any = jax.jit(growing.estimate)
    _, state = estimate(KEY, theta, state)
    first = list(traces)
    assert set(first) == {0, 1, 2}
    alone = ug.tbptt(counted(3), truncation=5)
    alone.estimate(KEY, theta, alone.init(KEY, theta))
    assert first.count(1) == traces.count(3)  # no more than without a curriculum
    del traces[:]
    for _ in range(5):
        _, state = estimate(KEY, theta, state)
    assert not traces
    assert estimate._cache_size() == 1

    def body(state, key):
        estimate, state = growing.estimate(key, theta, state)
        return state, estimate.info.inner_steps

    _, steps = jax.lax.scan(body, growing.init(KEY, theta), jax.random.split(KEY, 6))
    assert steps.tolist() == [1, 1, 2, 2, 5, 5]


@pytest.mark.parametrize("name", ["truncated_es", "gpes", "bptt"])
def test_other_estimators(name):
    """Two settings of each estimator; the second stage's first call begins an episode."""
    problem, theta = simple()
    first = build(name, problem)
    second = build(name, simple(40)[0], truncation=10)
    if name == "gpes":  # noise_period=10 would make it pes
        second = build(name, problem, truncation=10, noise_period=20)
    growing = ug.curriculum([first, second], boundaries=[1])
    shapes, state = jax.eval_shape(growing.init, KEY, theta), growing.init(KEY, theta)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    for _ in range(2):
        estimate, state = growing.estimate(jax.random.key(1), theta, state)
    expected, _ = second.estimate(jax.random.key(1), theta, second.init(KEY, theta))
    assert_same(estimate, expected)


def test_the_mean_gradient_of_a_stage_is_that_of_the_objective():
    """On a linear problem, where pes is exact in the mean; in a curriculum's second stage."""
    problem, theta, _ = ug.problems.linear_recurrence(dim=3, horizon=4, memory=0.5)
    made = [ug.pes(problem, truncation=k, sigma=0.1) for k in (1, 2)]
    growing = ug.curriculum(made, boundaries=[2])

    def episode(key):
        state = growing.init(key, theta)
        grads = []
        for call in range(4):
            estimate, state = growing.estimate(jax.random.fold_in(key, call), theta, state)
            grads.append(estimate.grad)
        return (grads[2] + grads[3]) / 2

    samples = Samples(jax.jit(jax.vmap(episode))(jax.random.split(KEY, 4000)))
    exact = jax.jit(jax.grad(lambda theta: ug.episode_loss(problem, KEY, theta)))(theta)
    assert samples.error_in_se(exact) < 4
    assert samples.relative_se(exact) < 0.05


def test_average_of_a_curriculum_gives_the_same_numbers():
    made, theta = stages(ug.tbptt)
    inside = ug.curriculum([ug.average(e, 2) for e in made], boundaries=[1])
    outside = ug.average(ug.curriculum(made, boundaries=[1]), 2)
    a, b = inside.init(KEY, theta), outside.init(KEY, theta)
    for call in range(3):
        key = jax.random.fold_in(KEY, call)
        one, a = inside.estimate(key, theta, a)
        two, b = outside.estimate(key, theta, b)
        assert_same(one, two)


def test_each_device_its_own_curriculum():
    made, theta = stages(ug.tbptt)
    growing = ug.curriculum([ug.average(e, 2) for e in made], boundaries=[1])
    mesh = ug.make_worker_mesh(2, axis="devices")
    keys = jax.random.split(KEY, 2)

    def run(keys, theta):
        state = growing.init(keys[0], theta)
        for _ in range(2):
            estimate, state = growing.estimate(keys[0], theta, state)
        return jax.tree.map(lambda x: x[None], (estimate.grad, state.calls))

    sharded = jax.shard_map(run, mesh=mesh, in_specs=(P("devices"), P()), out_specs=P("devices"))
    many = numbers(jax.jit(sharded)(keys, theta))
    alone = jax.jit(run)(keys[1:], theta)
    assert_same(jax.tree.map(lambda x: x[1:], many), alone)


def test_what_a_curriculum_refuses():
    (first, second), theta = stages(**SETTINGS)
    made, problem = [first, second, second], simple()[0]
    with raises(ValueError, "`estimators` is empty"):
        ug.curriculum([], [])
    with raises(TypeError, "`estimators[1]` must be a GradientEstimator", "UnrolledProblem"):
        ug.curriculum([made[0], mistyped(problem)], [1])
    with raises(TypeError, "`estimators[0]` must be a GradientEstimator", "function"):
        ug.curriculum(mistyped(made[0]), [])
    with raises(ValueError, "one fewer than the stages", "1 boundaries [5] for 3 estimators"):
        ug.curriculum(made, [5])
    for bad in [[5, 5], [5, 3]]:
        with raises(ValueError, "`boundaries` must increase", str(bad)):
            ug.curriculum(made, bad)
    with raises(ValueError, "`boundaries[0]` must be at least 1", "=0"):
        ug.curriculum(made, [0, 3])
    with raises(TypeError, "`boundaries[1]` must be a whole number", "3.5"):
        ug.curriculum(made, [1, mistyped(3.5)])

    def of(*estimators):
        return ug.curriculum(estimators, range(1, len(estimators)))

    more_pairs = ug.pes(problem, truncation=5, sigma=0.1, num_pairs=3)
    other_kind = ug.es_single(problem, truncation=5, **SETTINGS)
    for other, line in [
        (more_pairs, "state.carried.states: float32[4] -> float32[6]"),
        (other_kind, "state.carried.accumulated: float32[2] -> absent"),
        (ug.average(made[1], 2), "state.episode.t: int32[] -> int32[2]"),
    ]:
        with raises(ValueError, "worker states of the same shapes", "`estimators[1]`", line):
            of(made[0], other).init(KEY, theta)
    whole = ug.GradientEstimator(
        made[1].init,
        lambda key, theta, state, *, data=None: (
            made[1].estimate(key, theta, state)[0]._replace(info=mistyped(())),
            state,
        ),
        5,
    )
    with raises(
        ValueError, "same kind of estimate", "estimate.info.inner_steps: int32[] -> absent"
    ):
        growing = of(made[0], whole)
        growing.estimate(KEY, theta, growing.init(KEY, theta))
    with raises(ValueError, "nested averages"):
        twice = ug.average(of(ug.average(made[0], 2), ug.average(made[1], 2)), 2)
        twice.init(KEY, theta)
    growing = of(*made)
    state = growing.init(KEY, theta)
    with raises(ValueError, "a curriculum takes no `data`"):
        growing.estimate(KEY, theta, state, data=jnp.ones(5))
    with raises(TypeError, "made by curriculum(", "truncation=2", "boundaries=(1, 2)", "this is"):
        ug.curriculum(made, [1, 4]).estimate(KEY, theta, state)
    with raises(TypeError, "made by pes(", "this is curriculum("):
        growing.estimate(KEY, theta, made[0].init(KEY, theta))
    with raises(TypeError, "`key` must be"):
        growing.estimate(mistyped(0), theta, state)


def test_truncation_is_that_of_the_stages_where_they_agree():
    (first, second), _ = stages(**SETTINGS)
    assert ug.curriculum([second, second], [1]).truncation == 5
    assert ug.curriculum([first, second], [1]).truncation is None
    assert ug.curriculum([first], []).truncation == 2


@pytest.mark.parametrize("name", ["pes", "tbptt"])
def test_a_horizon_that_grows_with_the_outer_step(name):
    """The jitted update makes problem and estimator from a traced length and compiles once."""
    problem, theta = simple()

    def estimator(length):
        grown = problem._replace(horizon=lambda key: length)
        return ug.average(build(name, grown), 2)

    @jax.jit
    def update(key, theta, state, length):
        return estimator(length).estimate(key, theta, state)

    compiled: Any = update
    state = estimator(5).init(KEY, theta)
    seen = []
    for call in range(8):
        estimate, state = update(jax.random.fold_in(KEY, call), theta, state, 5 + 2 * call)
        seen.append((int(state.episode.horizon[0]), int(state.episode.t[0])))
    # An episode has the length given at its beginning, rounded up to windows of 5.
    assert seen == [(5, 0), (10, 5), (10, 0), (15, 5), (15, 10), (15, 0), (20, 5), (20, 10)]
    assert compiled._cache_size() == 1
    assert np.all(np.isfinite(jax.tree.leaves(estimate.grad)[0]))
