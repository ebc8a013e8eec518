"""Settings on a schedule: an episode keeps its value, and what happens if it does not."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import build, mistyped, numbers, quadratic, raises
from tests.statistics import Samples
from unrollgrad.problems import theory

KEY = jax.random.key(0)
NAMES = ("pes", "es_single", "full_es")


def falling(call):
    """A sigma that is another one in every call."""
    return 0.2 / (1 + call)


def worker(name, problem, schedule=falling, **settings):
    return ug.scheduled(lambda s: build(name, problem, sigma=s, **settings), schedule)


def calls(estimator, theta, state, keys):
    """The estimates of consecutive calls, and the state after each."""

    def call(state, key):
        estimate, state = estimator.estimate(key, theta, state)
        return state, (estimate, state)

    return jax.lax.scan(call, state, keys)[1]


def test_an_episode_runs_as_with_the_value_of_its_first_call():
    """Three episodes of four windows; for ``full_es`` every call is an episode."""
    problem, theta = quadratic()
    keys = jax.random.split(KEY, 12)
    long = {"pes": 4, "es_single": 4, "full_es": 1}
    firsts = {name: np.arange(12) // n * n for name, n in long.items()}

    @jax.jit
    def run():
        found, expected = {}, {}
        for name in NAMES:
            one = worker(name, problem)
            found[name] = calls(one, theta, one.init(KEY, theta), keys)

            def episode(first, keys, name=name):
                fixed = build(name, problem, sigma=falling(first))
                return calls(fixed, theta, fixed.init(KEY, theta), keys)[0]

            by_episode = keys.reshape(-1, long[name])
            expected[name] = jax.vmap(episode)(jnp.arange(0, 12, long[name]), by_episode)
        return found, expected

    found, expected = run()
    for name in NAMES:
        estimates, states = found[name]
        flat = jax.tree.map(lambda x: x.reshape(12, *x.shape[2:]), expected[name])
        chex.assert_trees_all_close(numbers(estimates), numbers(flat), rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(states.carried.value, 0.2 / (1 + firsts[name]), rtol=1e-6)
        np.testing.assert_array_equal(states.carried.calls, 1 + np.arange(12))


@functools.cache
def recurrence():
    problem, theta, influence = ug.problems.linear_recurrence(
        3, 16, gradients="independent", memory=0.8
    )
    influence = influence(theta)
    return problem, theta, influence, influence.reshape(4, 4, 4, 4, 3).sum(axis=(1, 3)) / 4


@functools.cache
def drawn(name, keeps):
    """Means over the four windows of many episodes, with a sigma that falls by the call."""
    problem, theta, *_ = recurrence()
    given = {"truncation": 4, "noise_period": 8}

    def episode(key):
        kept = worker(name, problem, **given)
        first = kept if keeps else build(name, problem, **given)

        def call(state, i):
            one = kept if keeps else build(name, problem, sigma=falling(i), **given)
            estimate, state = one.estimate(jax.random.fold_in(key, i), theta, state)
            return state, estimate.grad

        return jnp.mean(jax.lax.scan(call, first.init(key, theta), jnp.arange(4))[1], axis=0)

    draw = jax.jit(lambda: jax.lax.map(episode, jax.random.split(KEY, 20_000), batch_size=4000))
    return Samples(draw())


@pytest.mark.parametrize("name", ["pes", "gpes", "es_single"])
def test_a_sigma_that_changes_inside_an_episode_biases(name):
    """The influence of window v on window w then counts sigma_v / sigma_w times."""
    *_, influence, blocks = recurrence()
    truth = theory.gradient(influence)
    ratios = falling(np.arange(4.0)) / falling(np.arange(4.0))[:, None]  # [w, v]
    biased = np.einsum("wv,wvp->p", ratios, blocks) / 4
    assert drawn(name, keeps=False).error_in_se(biased) < 5
    assert drawn(name, keeps=False).relative_se(biased) < 0.05
    assert drawn(name, keeps=False).error_in_se(truth) > 10


@pytest.mark.parametrize("name", ["pes", "es_single"])
def test_a_scheduled_sigma_does_not_bias(name):
    truth = theory.gradient(recurrence()[2])
    assert drawn(name, keeps=True).error_in_se(truth) < 5
    assert drawn(name, keeps=True).relative_se(truth) < 0.05


def test_staggered_workers_change_where_their_own_episodes_begin():
    """Three workers in breakstep: their first episodes have 2, 3 and 4 windows, later ones 4."""
    problem, theta = quadratic()
    many = ug.average(worker("pes", problem), 3, stagger="breakstep")
    _, states = jax.jit(
        lambda: calls(many, theta, many.init(KEY, theta), jax.random.split(KEY, 9))
    )()
    begun = [[max(b for b in (0, n, n + 4) if b <= c) for n in (2, 3, 4)] for c in range(9)]
    np.testing.assert_allclose(states.carried.value, falling(np.array(begun)), rtol=1e-6)


def test_a_run_resumes_in_the_middle_of_the_schedule(tmp_path):
    """Episodes of four windows begin in steps 0, 4 and 8; the run is cut in step 6."""
    problem, theta = quadratic()
    many = ug.average(worker("pes", problem, optax.linear_schedule(0.2, 0.1, 10)), 2)
    assert repr(many) == "average(scheduled(pes(truncation=5, sigma=0.2, num_pairs=2), ...), 2)"

    def run(num_steps, folder=None):
        given = {"num_steps": num_steps, "key": KEY, "steps_per_dispatch": 3}
        return ug.fit(many, theta, optax.adam(0.05), checkpoint_dir=folder, **given)

    run(6, tmp_path)
    resumed, whole = run(11, tmp_path), run(11)
    chex.assert_trees_all_equal(*(numbers(r[:3]) for r in (resumed, whole)))
    np.testing.assert_allclose(whole.worker_state.carried.value, [0.12, 0.12], rtol=1e-6)
    assert whole.worker_state.carried.calls.tolist() == [11, 11]
    assert len(whole.curve()[0]) == 11 - 3  # it knows the windows of an episode


def test_what_does_not_fit_is_refused():
    problem, theta = quadratic()
    pes = build("pes", problem)
    with raises(TypeError, "`make` must be a function of the setting", "a GradientEstimator"):
        ug.scheduled(mistyped(pes), falling)
    with raises(TypeError, "`schedule` must be a function of the call's number", "0.1 (float)"):
        ug.scheduled(lambda s: pes, mistyped(0.1))
    with raises(TypeError, "`make` must return a GradientEstimator", "float"):
        ug.scheduled(mistyped(lambda s: s), falling)
    with raises(ValueError, "`sigma` must be positive", "sigma=0.0"):
        worker("pes", problem, lambda call: 0.0 * call)
    averaged = ug.scheduled(lambda s: ug.average(pes, 2), falling)
    with raises(ValueError, "`make` must return a single worker", "ug.average(ug.scheduled("):
        averaged.init(KEY, theta)
    staged = ug.scheduled(lambda s: ug.curriculum([pes], []), falling)
    with raises(ValueError, "`make` must not return a curriculum", "Schedule the stages"):
        staged.init(KEY, theta)
    one = worker("pes", problem)
    with raises(TypeError, "it was made by pes(", "this is scheduled(estimator=pes"):
        jax.eval_shape(one.estimate, KEY, theta, jax.eval_shape(pes.init, KEY, theta))
