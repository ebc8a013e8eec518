"""The experiments' problems are what their docstrings say, and both families run on each."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from experiments.problems import PROBLEMS
from experiments.problems.copy_task import copy_task
from experiments.problems.digits import digits
from experiments.problems.learned_optimizer import learned_optimizer
from experiments.problems.text_lstm import VOCABULARY, encode, text_lstm

KEY = jax.random.key(0)
NETWORKS = {"text_lstm": text_lstm, "copy_task": copy_task, "learned_optimizer": learned_optimizer}
networks = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


def mean_loss(problem, theta, episodes):
    keys = jax.random.split(KEY, episodes)
    one = functools.partial(ug.episode_loss, problem)
    return float(jax.jit(jax.vmap(one, (0, None)))(keys, theta).mean())


def mean_gradient(estimator, theta, workers, windows=1):
    """Over the windows of an episode, all workers."""
    mean = ug.average(estimator, workers)

    @jax.jit
    def run():
        def window(state, i):
            estimate, state = mean.estimate(jax.random.fold_in(KEY, i), theta, state)
            return state, estimate.grad

        grads = jax.lax.scan(window, mean.init(KEY, theta), jnp.arange(windows))[1]
        return jax.tree.map(lambda g: g.mean(axis=0), grads)

    return run()


def trained(estimator, theta, workers, rate, steps):
    """Theta after steps of Adam on a mean over workers."""
    mean, optimizer = ug.average(estimator, workers), optax.adam(rate)

    @jax.jit
    def run(theta):
        def update(carry, i):
            theta, moments, state = carry
            estimate, state = mean.estimate(jax.random.fold_in(KEY, i), theta, state)
            updates, moments = optimizer.update(estimate.grad, moments)
            return (optax.apply_updates(theta, updates), moments, state), None

        begin = (theta, optimizer.init(theta), mean.init(KEY, theta))
        return jax.lax.scan(update, begin, jnp.arange(steps))[0][0]

    return run(theta)


def norm(tree):
    return float(optax.tree.norm(tree))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_every_choice_is_one_line_and_fits():
    assert set(PROBLEMS) >= {*NETWORKS, "digits", "control"}
    for choice in PROBLEMS.values():
        assert 20 < len(choice.about) < 90
        assert "\n" not in choice.about
        assert choice.horizon % choice.truncation == 0


@networks
@pytest.mark.parametrize("horizon", [4, 7])
def test_any_horizon_and_both_families(make, horizon):
    problem, theta = make(horizon)
    assert problem.horizon == horizon
    gradient = mean_gradient(ug.bptt(problem), theta, 2)
    by_es = mean_gradient(ug.pes(problem, truncation=horizon, sigma=0.01), theta, 2)
    for tree in (gradient, by_es):
        for leaf, like in zip(jax.tree.leaves(tree), jax.tree.leaves(theta), strict=True):
            assert leaf.shape == like.shape
            assert np.isfinite(leaf).all()
            assert np.abs(leaf).max() > 0


@networks
def test_the_same_theta_every_time(make):
    first, second = make(8).theta, make(8).theta
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert {x.dtype.name for x in jax.tree.leaves(first)} == {"float32"}


@pytest.mark.parametrize("make", [text_lstm, copy_task])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_recurrent_networks_compute_in_thetas_dtype(make, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        problem, theta = make(8)
        single = float(ug.episode_loss(problem, KEY, theta))
        theta = jax.tree.map(lambda x: x.astype(dtype), theta)
        _, carry = problem.init(KEY, theta)
        assert {x.dtype for x in carry} == {jnp.dtype(dtype)}
        np.testing.assert_allclose(ug.episode_loss(problem, KEY, theta), single, rtol=0.02)


def test_text_lstm_begins_as_a_guess_and_learns():
    problem, theta = text_lstm(100)
    assert sum(x.size for x in jax.tree.leaves(theta)) == 1287
    np.testing.assert_allclose(mean_loss(problem, theta, 100), 4.52, atol=0.02)
    after = trained(ug.bptt(problem), theta, workers=4, rate=0.03, steps=60)
    assert mean_loss(problem, after, 100) < 2.94  # the entropy of a character on its own
    after = trained(ug.pes(problem, truncation=10, sigma=0.1), theta, 32, 0.03, 200)
    assert mean_loss(problem, after, 100) < 3.4


def test_text_lstm_reads_the_text_in_order():
    np.testing.assert_array_equal(encode(" ~\n\té"), [0, 94, 95, 96, 96])
    problem, theta = text_lstm(6, text="abc")
    places, _ = state = problem.init(KEY, theta)
    for t in range(6):
        state, _ = problem.step(KEY, theta, state, t)
        np.testing.assert_array_equal(state[0], (places + t + 1) % 3)
    # A net that always says the next letter of "abab..." pays nothing; of "aaaa", everything.
    zeros = jax.tree.map(jnp.zeros_like, theta)
    zeros["out"]["bias"] = zeros["out"]["bias"].at[encode("a")[0]].set(50.0)
    assert float(ug.episode_loss(text_lstm(6, text="aa").problem, KEY, zeros)) < 1e-6
    np.testing.assert_allclose(
        ug.episode_loss(text_lstm(6, text="bb").problem, KEY, zeros), 50.0, rtol=1e-6
    )
    uniform = jax.tree.map(jnp.zeros_like, theta)
    np.testing.assert_allclose(
        ug.episode_loss(problem, KEY, uniform), math.log(VOCABULARY), rtol=1e-6
    )
    with pytest.raises(ValueError, match="at least 2 characters; got 'a'"):
        text_lstm(text="a")


def test_copy_task_scores_the_repetition_only():
    for horizon, lag in [(8, 4), (7, 4)]:
        problem, theta = copy_task(horizon)
        sequence, _ = state = problem.init(KEY, theta)
        assert sequence.shape == (horizon - lag, 32)
        uniform = {**theta, "out": jax.tree.map(jnp.zeros_like, theta["out"])}
        losses = []
        for t in range(horizon):
            state, loss = problem.step(KEY, uniform, state, t)
            losses.append(float(loss))
        np.testing.assert_allclose(losses[:lag], 0)
        np.testing.assert_allclose(losses[lag:], math.log(2), rtol=1e-6)
    with pytest.raises(ValueError, match="`horizon` must be at least 2"):
        copy_task(1)


def test_copy_task_truncation_hides_what_must_be_remembered():
    """tbptt's gradient of the symbols' embeddings is exactly 0; bptt's is not, nor is PES's."""
    problem, theta = copy_task(8)
    np.testing.assert_allclose(mean_loss(problem, theta, 500), math.log(2) / 2, atol=0.005)
    for truncation in (1, 2, 4):
        cut = mean_gradient(ug.tbptt(problem, truncation=truncation), theta, 8, 8 // truncation)
        assert np.abs(cut["embed"]["embedding"][:2]).max() == 0
        assert np.abs(cut["embed"]["embedding"][2]).max() > 0  # of the delimiter
    exact = mean_gradient(ug.bptt(problem), theta, 2000)
    assert np.abs(exact["embed"]["embedding"][:2]).max() > 1e-4
    cut = mean_gradient(ug.tbptt(problem, truncation=4), theta, 2000, 2)
    np.testing.assert_allclose(norm(flat(cut) - flat(exact)) / norm(exact), 0.66, atol=0.1)


def test_copy_task_is_learned_by_remembering():
    problem, theta = copy_task(8)
    whole = trained(ug.bptt(problem), theta, workers=4, rate=0.01, steps=400)
    assert mean_loss(problem, whole, 100) < 0.01
    cut = trained(ug.tbptt(problem, truncation=4), theta, workers=4, rate=0.01, steps=400)
    assert mean_loss(problem, cut, 100) > 0.1


def test_learned_optimizer_learns_to_train():
    problem, theta = learned_optimizer(20)
    assert sum(x.size for x in jax.tree.leaves(theta)) == 178
    before = mean_loss(problem, theta, 32)
    assert math.log(10) - 0.1 < before < math.log(10) + 0.4
    estimator = ug.pes(problem, truncation=10, sigma=0.03)
    after = mean_loss(problem, trained(estimator, theta, 16, 0.03, 40), 32)
    assert after < 1.9
    after = mean_loss(problem, trained(ug.bptt(problem), theta, 2, 0.03, 20), 32)
    assert after < 1.9


def test_learned_optimizer_every_step_matters_to_all_later_ones():
    """A window of K sees about K / T of the gradient at the default theta."""
    problem, theta = learned_optimizer(20)
    exact = mean_gradient(ug.bptt(problem), theta, 32)
    cut = mean_gradient(ug.tbptt(problem, truncation=5), theta, 32, 4)
    cosine = flat(cut) @ flat(exact) / norm(cut) / norm(exact)
    assert cosine > 0.9
    assert 0.15 < norm(cut) / norm(exact) < 0.5


def test_digits_is_what_it_was():
    """The default schedule and its loss; the data code is shared with the learned optimizer."""
    problem, theta = digits(20)
    np.testing.assert_allclose(np.exp(theta["log_lr"][np.array([0, 3])]), [0.1, 0.02], rtol=1e-5)
    np.testing.assert_allclose(jax.nn.sigmoid(theta["momentum_logit"]), 0.9, rtol=1e-6)
    assert 1.5 < mean_loss(problem, theta, 32) < 2.2
