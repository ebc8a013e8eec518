"""The experiments' problems satisfy their docstrings; both families run on each."""

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
EPISODES = {text_lstm: 16, copy_task: 1000, learned_optimizer: 16}
NETWORKS = {"text_lstm": text_lstm, "copy_task": copy_task, "learned_optimizer": learned_optimizer}
# The programs run for a second; optimizing them would take three times as long.
quick_to_compile = jax.jit(compiler_options={"xla_backend_optimization_level": 0})
networks = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


@functools.cache
def mean_gradient(make, factory, **settings):
    """The mean gradient of fresh workers in an episode of 8 steps; a tree like theta."""
    problem, theta = make(8)
    estimator = factory(problem, **settings)

    @quick_to_compile
    def run(keys, theta):
        def call(states, i):
            one = functools.partial(estimator.estimate, theta=theta)
            inner = jax.vmap(lambda key, state: one(jax.random.fold_in(key, i), state=state))
            estimate, states = inner(keys, states)
            return states, jax.tree.map(lambda g: g.mean(axis=0), estimate.grad)

        states = jax.vmap(estimator.init, (0, None))(keys, theta)
        _, grads = jax.lax.scan(call, states, jnp.arange(8 // (estimator.truncation or 8)))
        return jax.tree.map(lambda g: g.mean(axis=0), grads)

    return run(jax.random.split(KEY, EPISODES[make]), theta)


def losses(estimator, theta, workers, rate, steps):
    """J, estimated by a mean over workers, along steps of Adam."""
    mean, optimizer = ug.average(estimator, workers), optax.adam(rate)

    @quick_to_compile
    def run(theta):
        def update(carry, i):
            theta, moments, state = carry
            estimate, state = mean.estimate(jax.random.fold_in(KEY, i), theta, state)
            updates, moments = optimizer.update(estimate.grad, moments)
            return (optax.apply_updates(theta, updates), moments, state), estimate.loss

        begin = (theta, optimizer.init(theta), mean.init(KEY, theta))
        return jax.lax.scan(update, begin, jnp.arange(steps))[1]

    return np.asarray(run(theta))


def norm(tree):
    return float(optax.tree.norm(tree))


def test_every_choice_is_one_line_and_fits():
    assert set(PROBLEMS) >= {*NETWORKS, "digits", "control"}
    for choice in PROBLEMS.values():
        assert 20 < len(choice.about) < 90
        assert "\n" not in choice.about
        assert choice.horizon % choice.truncation == 0


@pytest.mark.experiments
@networks
def test_backpropagation_reaches_every_weight(make):
    theta, gradient = make(8).theta, mean_gradient(make, ug.bptt)
    for leaf, like in zip(jax.tree.leaves(gradient), jax.tree.leaves(theta), strict=True):
        assert leaf.shape == like.shape
        assert np.isfinite(leaf).all()
        assert np.abs(leaf).max() > 0


@pytest.mark.experiments
@networks
def test_the_same_theta_every_time(make):
    first, second = make(8).theta, make(8).theta
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert {x.dtype.name for x in jax.tree.leaves(first)} == {"float32"}


@pytest.mark.experiments
@networks
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_any_dtype_and_horizon_can_be_stepped(make, dtype):
    for horizon in (4, 7):
        problem, theta = make(horizon)
        with jax.enable_x64(dtype == jnp.float64):
            theta = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), theta)
            loss = jax.eval_shape(functools.partial(ug.episode_loss, problem), KEY, theta)
            assert loss.shape == ()
            if make is not learned_optimizer:
                _, carry = jax.eval_shape(problem.init, KEY, theta)
                assert {x.dtype for x in carry} == {jnp.dtype(dtype)}


@pytest.mark.experiments
def test_text_lstm_begins_as_a_guess_and_learns():
    problem, theta = text_lstm(100)
    assert sum(x.size for x in jax.tree.leaves(theta)) == 1287
    by_pes = losses(ug.pes(problem, truncation=10, sigma=0.1), theta, 32, 0.03, 200)
    np.testing.assert_allclose(by_pes[0], 4.52, atol=0.03)
    assert by_pes[-10:].mean() < 3.5


@pytest.mark.experiments
def test_text_lstm_reads_the_text_in_order():
    np.testing.assert_array_equal(encode(" ~\n\té"), [0, 94, 95, 96, 96])
    problem, theta = text_lstm(6, text="abb")
    places, _ = state = problem.init(KEY, theta)
    step = jax.jit(problem.step)
    for t in range(6):
        state, _ = step(KEY, theta, state, t)
        np.testing.assert_array_equal(state[0], (places + t + 1) % 3)
    # A net that always predicts "b" is right two times of three; else the loss is its logit.
    flat_net = jax.tree.map(jnp.zeros_like, theta)
    says_b = jax.tree.map(jnp.zeros_like, theta)
    says_b["out"]["bias"] = says_b["out"]["bias"].at[encode("b")[0]].set(60.0)
    loss = jax.jit(functools.partial(ug.episode_loss, problem))
    np.testing.assert_allclose(loss(KEY, says_b), 20.0, rtol=1e-5)
    np.testing.assert_allclose(loss(KEY, flat_net), math.log(VOCABULARY), rtol=1e-5)
    with pytest.raises(ValueError, match="at least 2 characters; got 'a'"):
        text_lstm(text="a")


@pytest.mark.experiments
def test_copy_task_scores_the_repetition_only():
    for horizon, lag in [(8, 4), (7, 4)]:
        problem, theta = copy_task(horizon)
        sequence, _ = state = problem.init(KEY, theta)
        assert sequence.shape == (horizon - lag, 32)
        uniform = {**theta, "out": jax.tree.map(jnp.zeros_like, theta["out"])}
        scores, step = [], jax.jit(problem.step)
        for t in range(horizon):
            state, loss = step(KEY, uniform, state, t)
            scores.append(float(loss))
        np.testing.assert_allclose(scores[:lag], 0)
        np.testing.assert_allclose(scores[lag:], math.log(2), rtol=1e-6)
    with pytest.raises(ValueError, match="`horizon` must be at least 2"):
        copy_task(1)


@pytest.mark.experiments
def test_copy_task_truncation_hides_what_must_be_remembered():
    """tbptt's gradient for the symbols' embeddings is exactly 0; bptt's is not."""
    cut, exact = mean_gradient(copy_task, ug.tbptt, truncation=4), mean_gradient(copy_task, ug.bptt)
    assert np.abs(cut["embed"]["embedding"][:2]).max() == 0
    assert np.abs(cut["embed"]["embedding"][2]).max() > 0  # the delimiter's
    assert np.abs(exact["embed"]["embedding"][:2]).max() > 1e-4
    difference = jax.tree.map(jnp.subtract, cut, exact)
    np.testing.assert_allclose(norm(difference) / norm(exact), 0.66, atol=0.1)


@pytest.mark.experiments
def test_copy_task_is_learned_by_remembering():
    problem, theta = copy_task(8)
    whole = losses(ug.bptt(problem), theta, workers=4, rate=0.01, steps=400)
    np.testing.assert_allclose(whole[0], math.log(2) / 2, atol=0.01)
    assert whole[-20:].mean() < 0.01
    cut = losses(ug.tbptt(problem, truncation=4), theta, workers=4, rate=0.01, steps=400)
    assert cut[-20:].mean() > 0.1
    by_pes = losses(ug.pes(problem, truncation=4, sigma=0.1), theta, 32, 0.01, 400)
    assert by_pes[-20:].mean() < 0.32


@pytest.mark.experiments
def test_learned_optimizer_learns_to_train():
    problem, theta = learned_optimizer(20)
    assert sum(x.size for x in jax.tree.leaves(theta)) == 178
    by_pes = losses(ug.pes(problem, truncation=10, sigma=0.03), theta, 16, 0.03, 40)
    assert math.log(10) - 0.1 < by_pes[:2].mean() < math.log(10) + 0.4
    assert by_pes[-4:].mean() < 1.9


@pytest.mark.experiments
def test_learned_optimizer_every_step_matters_to_all_later_ones():
    """A window of K steps sees little more than K / T of the gradient at the default theta."""
    cut = mean_gradient(learned_optimizer, ug.tbptt, truncation=2)
    exact = mean_gradient(learned_optimizer, ug.bptt)
    cosine = optax.tree.vdot(cut, exact) / norm(cut) / norm(exact)
    assert cosine > 0.9
    assert 0.2 < norm(cut) / norm(exact) < 0.6


def test_digits_is_what_it_was():
    """The default schedule's loss is unchanged; the learned optimizer shares the data code."""
    theta = digits(20).theta
    np.testing.assert_allclose(np.exp(theta["log_lr"][np.array([0, 3])]), [0.1, 0.02], rtol=1e-5)
    np.testing.assert_allclose(jax.nn.sigmoid(theta["momentum_logit"]), 0.9, rtol=1e-6)
