"""Workers at different places of their episodes: the places, and their effect."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from tests.helpers import build, numbers, over_workers, present, quadratic, raises
from tests.statistics import Samples
from unrollgrad.problems import theory

KEY = jax.random.key(0)


@functools.cache
def simple(horizon=20):
    """A small problem: its state, one number, records the draws of its episode."""

    def step(key, theta, x, t):
        x = 0.9 * x + theta * jax.random.uniform(key)
        return x, x**2

    problem = ug.UnrolledProblem(lambda key, theta: jax.random.uniform(key), step, horizon)
    return problem, jnp.float32(0.3)


def places(many, theta, calls):
    """The workers' places after ``init`` and after each call: (calls + 1, num_workers)."""
    state, out = many.init(KEY, theta), []
    for i in range(calls):
        out.append(np.asarray(state.episode.t))
        _, state = many.estimate(jax.random.key(i), theta, state)
    return np.array([*out, np.asarray(state.episode.t)])


@pytest.mark.parametrize("num_workers", [3, 9])
def test_where_workers_stand_in_breakstep(num_workers):
    """Worker i's first episode has ceil((i+1)/num_workers * T/K) windows, later ones T/K."""
    problem, theta = simple()  # T = 20, K = 5, four windows
    many = ug.average(build("tbptt", problem), num_workers, stagger="breakstep")
    first = [math.ceil((i + 1) / num_workers * 4) * 5 for i in range(num_workers)]
    assert many.init(KEY, theta).episode.horizon.tolist() == first
    expected = np.zeros((10, num_workers), int)
    for i, horizon in enumerate(first):
        for call in range(1, 10):
            t = expected[call - 1, i] + 5
            ended = t >= (horizon if call <= horizon // 5 else 20)
            expected[call, i] = 0 if ended else t
    np.testing.assert_array_equal(places(many, theta, 9), expected)


@pytest.mark.parametrize("num_workers", [3, 9])
def test_where_workers_stand_after_burn_in(num_workers):
    problem, theta = simple()
    many = ug.average(build("tbptt", problem), num_workers, stagger="burn_in")
    offsets = np.array([i * 4 // num_workers * 5 for i in range(num_workers)])
    expected = (offsets + 5 * np.arange(10)[:, None]) % 20
    np.testing.assert_array_equal(places(many, theta, 9), expected)


def test_places_do_not_overflow():
    """For 3000 workers with 10^6 windows the product index * windows would exceed int32."""
    problem, theta = simple(horizon=5 * 10**6)
    for stagger in ["breakstep", "lockstep"]:
        many = ug.average(build("tbptt", problem), 3000, stagger=stagger)
        horizons = np.asarray(many.init(KEY, theta).episode.horizon, np.int64) // 5
        first = -(-np.arange(1, 3001) * 10**6 // 3000)
        np.testing.assert_array_equal(horizons, first if stagger == "breakstep" else 10**6)


def test_burnt_in_workers_are_in_the_middle_of_ordinary_episodes():
    """Their states equal those of a single worker after as many calls, and continue alike."""
    problem, theta = simple()
    alone = build("pes", problem)
    state = ug.average(alone, 4, stagger="burn_in").init(KEY, theta)
    keys = np.asarray(jax.random.key_data(state.episode.key))

    @jax.jit
    def again(first):
        """The episode's key decides how it began: the same first call leads to the same states."""
        state, states = alone.init(KEY, theta), []
        for call in range(3):
            key = jax.random.wrap_key_data(first) if call == 0 else jax.random.key(call)
            state = alone.estimate(key, theta, state)[1]
            states.append(state)
        return states

    for i in range(1, 4):
        expected = numbers(again(keys[i])[i - 1])
        mine = jax.tree.map(lambda x: x[i], numbers(state))  # noqa: B023
        chex.assert_trees_all_close(mine, expected, rtol=1e-5, atol=1e-6)
    assert len(np.unique(keys, axis=0)) == 4


@pytest.mark.parametrize("stagger", ["breakstep", "burn_in"])
def test_sampled_horizons(stagger):
    """First episodes are cut to their share of the drawn horizon; all end at the right step."""
    problem, theta = simple()
    sampler = problem._replace(horizon=lambda key: jax.random.randint(key, (), 4, 40))
    many = ug.average(build("pes", sampler), 6, stagger=stagger)
    state = many.init(KEY, theta)
    seen = np.asarray(state.episode.t)
    assert stagger == "breakstep" or len(np.unique(seen)) > 2
    for i in range(20):
        before = state.episode
        _, state = many.estimate(jax.random.key(i), theta, state)
        moved = np.asarray(before.t) + 5
        ended = np.asarray(state.episode.t) == 0
        goes_on = ~ended & (np.asarray(before.t) > 0)
        np.testing.assert_array_equal(np.asarray(state.episode.t)[~ended], moved[~ended])
        # An episode keeps the horizon that it began with.
        same = np.asarray(state.episode.horizon) == np.asarray(before.horizon)
        assert same[goes_on].all()
        assert (np.asarray(state.episode.horizon)[~ended] > moved[~ended]).all()


@functools.cache
def recurrence():
    problem, theta, influence = ug.problems.linear_recurrence(
        3, 16, gradients="independent", memory=0.8
    )
    return problem, theta, influence(theta)


@functools.cache
def sampled(name, stagger, num_workers, calls):
    """Gradients and ``grad_variance`` of many independent averages, for each of their calls."""
    problem, theta, _ = recurrence()
    many = ug.average(build(name, problem, truncation=2), num_workers, stagger=stagger)

    def sample(key):
        def call(state, i):
            estimate, state = many.estimate(jax.random.fold_in(key, i), theta, state)
            return state, (estimate.grad, over_workers(estimate).grad_variance)

        return jax.lax.scan(call, many.init(key, theta), jnp.arange(calls))[1]

    draw = jax.jit(lambda: jax.lax.map(sample, jax.random.split(KEY, 6000), batch_size=1000))
    return tuple(map(np.asarray, draw()))


@pytest.mark.parametrize(
    ("name", "stagger", "num_workers", "calls", "which", "unbiased"),
    [
        # Negative control: workers in lockstep estimate the first window's gradient.
        ("pes", "lockstep", 3, 8, 0, False),
        ("es_single", "burn_in", 8, 4, 0, True),
        ("es_single", "burn_in", 8, 4, 3, True),
        ("es_single", "breakstep", 8, 9, 0, False),
        ("es_single", "breakstep", 8, 9, 8, True),
    ],
)
def test_a_single_call_of_staggered_workers_sees_all_windows(
    name, stagger, num_workers, calls, which, unbiased
):
    grads, claimed = (x[:, which] for x in sampled(name, stagger, num_workers, calls))
    samples, claimed = Samples(grads), Samples(claimed)
    true, se = samples.variance()
    if stagger == "lockstep":
        assert abs(claimed.mean[0] - true) < min(4 * np.hypot(claimed.se[0], se), 0.1 * true)
    elif unbiased:  # an upper bound: the windows' gradients differ
        assert claimed.mean[0] > true + 4 * np.hypot(claimed.se[0], se)
    truth = theory.gradient(recurrence()[2])
    if unbiased:
        assert samples.error_in_se(truth) < 4
        assert samples.relative_se(truth) < 0.05
    else:
        assert samples.error_in_se(truth) > 10


@pytest.mark.parametrize(
    ("name", "stagger", "num_workers", "calls", "period"),
    [("pes", "lockstep", 3, 8, 2), ("es_single", "burn_in", 8, 4, None)],
)
def test_the_squared_error_of_a_single_call(name, stagger, num_workers, calls, period):
    """B + V/N in lockstep, V/N after burn_in: how the windows' gradients differ does not shrink."""
    influence = recurrence()[2]
    g = theory.gradient(influence)
    windows = influence.reshape(8, 2, 16, 3).sum(axis=(1, 2)) / 2
    between = np.mean(np.sum((windows - g) ** 2, axis=1))
    within = (theory.window_variance(influence, 2, period) - between) / 2  # two pairs
    errors = np.sum((sampled(name, stagger, num_workers, calls)[0] - g) ** 2, axis=2)
    errors = Samples(errors.mean(axis=1))
    expected = {"lockstep": between + within / num_workers, "burn_in": within / num_workers}
    for way, value in expected.items():
        if way == stagger:
            assert errors.error_in_se(value) < 5
            assert errors.relative_se(value) < 0.02
        else:
            assert errors.error_in_se(value) > 10


@pytest.mark.parametrize("stagger", ["lockstep", "burn_in"])
def test_expectation_over_an_episode_of_calls(stagger):
    """3 workers cannot cover eight windows evenly in one call, but all calls together do."""
    influence = recurrence()[2]
    samples = Samples(sampled("pes", stagger, 3, 8)[0].mean(axis=1))
    truth = theory.gradient(influence)
    assert samples.error_in_se(truth) < 4
    assert samples.relative_se(truth) < 0.05
    assert samples.error_in_se(theory.truncated_gradient(influence, 2)) > 10


@pytest.mark.parametrize(("name", "stagger"), [("pes", "burn_in"), ("bptt", "lockstep")])
def test_every_batch_size_equals_none(name, stagger):
    """Batches of half the workers; breakstep is in ``test_in_float64``."""
    problem, theta = simple()
    results = []
    for batch_size in [None, 3]:
        many = ug.average(build(name, problem), 6, stagger=stagger, batch_size=batch_size)
        state = many.init(KEY, theta)
        estimates = []
        for i in range(2):
            estimate, state = many.estimate(jax.random.key(i), theta, state)
            estimates.append(estimate)
        results.append(numbers((estimates, state)))
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)


def test_a_smaller_batch_takes_less_memory():
    problem, theta = (
        ug.UnrolledProblem(
            lambda key, theta: jnp.zeros(()), lambda key, theta, s, t: (s, jnp.mean(theta**2)), 4
        ),
        jnp.zeros(10_000),
    )
    temporaries = []
    for batch_size in [None, 2]:
        many = ug.average(ug.es_single(problem, truncation=2, sigma=0.1), 64, batch_size=batch_size)
        state = many.init(KEY, theta)
        compiled = jax.jit(many.estimate).lower(KEY, theta, state).compile()
        temporaries.append(present(compiled.memory_analysis()).temp_size_in_bytes)
    assert temporaries[1] < temporaries[0] / 8


def test_in_float64():
    """Places stay int32, and batches lose no digits."""
    with jax.enable_x64(True):
        problem, theta = simple.__wrapped__()
        theta, grads = theta.astype(jnp.float64), []
        for stagger, batch_size in [("burn_in", 2), ("breakstep", None), ("breakstep", 2)]:
            many = ug.average(
                ug.tbptt(problem, truncation=5), 6, stagger=stagger, batch_size=batch_size
            )
            state = jax.eval_shape(many.init, KEY, theta)
            after = jax.eval_shape(many.estimate, KEY, theta, state)[1]
            for episode in [state.episode, after.episode]:
                assert episode.horizon.dtype == episode.t.dtype == jnp.int32
            if stagger == "burn_in":
                continue
            state = many.init(KEY, theta)
            for i in range(2):
                estimate, state = many.estimate(jax.random.key(i), theta, state)
            grads.append(estimate.grad)
        assert grads[0].dtype == jnp.float64
        np.testing.assert_allclose(*grads, rtol=1e-13)


def test_errors():
    problem, theta = quadratic()
    pes = build("pes", problem)
    with raises(ValueError, "`stagger` must be one of 'lockstep', 'breakstep', 'burn_in'"):
        ug.average(pes, 4, stagger="stepped")
    for stagger in ["breakstep", "burn_in"]:
        with raises(ValueError, f'stagger="{stagger}" needs an estimator with a `truncation`'):
            ug.average(ug.bptt(problem), 4, stagger=stagger)
        with raises(ValueError, "nested averages"):
            ug.average(ug.average(pes, 4), 4, stagger=stagger).init(KEY, theta)
    with raises(ValueError, "`batch_size` must divide the 4 workers; got batch_size=3", "1, 2, 4"):
        ug.average(pes, 4, batch_size=3)
    with raises(ValueError, "`batch_size` must be at least 1"):
        ug.average(pes, 4, batch_size=0)
    burnt = ug.average(pes, 4, stagger="burn_in")
    with raises(ValueError, "runs the workers in `init`, where there is no `data`", "breakstep"):
        burnt.estimate(KEY, theta, burnt.init(KEY, theta), data=jnp.zeros((4, 5)))

    def streaming(key, theta, state, t, batch):
        return problem.step(key, theta, state, t)

    burnt = ug.average(build("pes", problem._replace(step=streaming)), 4, stagger="burn_in")
    with raises(TypeError, "missing a required argument: 'batch'", 'stagger="burn_in"'):
        burnt.init(KEY, theta)
    growing = ug.curriculum([pes, pes], boundaries=[3])
    for stagger in ["breakstep", "burn_in"]:
        with raises(ValueError, "does not outlast the stages of a curriculum", "Average inside"):
            ug.average(growing, 4, stagger=stagger).init(KEY, theta)
