"""Forward mode: exact as documented, unbiased if it is random, with bounded memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from experiments.problems import PROBLEMS
from tests.helpers import build, present, quadratic, raises
from tests.statistics import Samples, window_gradients
from unrollgrad.problems import theory

KEY, OTHER = jax.random.key(0), jax.random.key(1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _episode(estimator, num_windows, theta):
    def call(state, i):
        estimate, state = estimator.estimate(jax.random.fold_in(OTHER, i), theta, state)
        return state, (estimate.grad, estimate.loss)

    state, found = jax.lax.scan(call, estimator.init(KEY, theta), jnp.arange(num_windows))
    return found, state.episode.t


def windows(estimator, theta, num_windows):
    """The gradients of one episode's windows, shape (windows, P), and their losses."""
    (grads, losses), t = _episode(estimator, num_windows, theta)
    assert int(t) == 0
    grads = [np.asarray(x, np.float64).reshape(num_windows, -1) for x in jax.tree.leaves(grads)]
    return np.concatenate(grads, axis=1), np.asarray(losses)


def episode_mean(estimator, theta, num_windows):
    """The gradient and the loss, averaged over one episode's windows."""
    grads, losses = windows(estimator, theta, num_windows)
    return grads.mean(axis=0), losses.mean()


HORIZONS = {"learned_optimizer": 6, "copy_task": 8, "chaotic_map": 15}


# One of each kind: copy_task also has an LSTM, learned_optimizer also has an MLP.
@pytest.mark.parametrize("name", [p for p in PROBLEMS if p not in ("text_lstm", "digits")])
def test_forward_mode_is_bptt(name):
    """Whole episodes of many problems agree; the chaotic map doubles rounding errors each step."""
    horizon = HORIZONS.get(name, 40)
    problem, theta, *_ = PROBLEMS[name].make(horizon)
    exact, loss = episode_mean(ug.bptt(problem), theta, 1)
    got, own = episode_mean(ug.forward_mode(problem, truncation=horizon), theta, 1)
    assert np.linalg.norm(got - exact) < 1e-5 * np.linalg.norm(exact)
    assert own == pytest.approx(loss, rel=1e-5)


def test_forward_mode_across_windows():
    """Every window's gradient contains the influence of all earlier steps on its losses."""
    problem, theta = quadratic()
    key = jax.random.fold_in(OTHER, 0)  # the key of the first call, which begins the episode

    @jax.jit
    @jax.jacrev
    def totals(theta):
        """The sum of the windows' mean losses, up to each window's end."""
        parts = [problem._replace(horizon=5 * w) for w in (1, 2, 3, 4)]
        means = [ug.episode_loss(part, key, theta) for part in parts]
        return jnp.stack(means) * jnp.arange(1, 5)

    expected = np.concatenate([x.reshape(4, -1) for x in jax.tree.leaves(totals(theta))], axis=1)
    got, _ = windows(ug.forward_mode(problem, truncation=5), theta, 4)
    np.testing.assert_allclose(np.cumsum(got, axis=0), expected, rtol=1e-4, atol=1e-5)
    differences = np.diff(expected, axis=0, prepend=0)
    np.testing.assert_allclose(got, differences, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.mean(axis=0), expected[3] / 4, rtol=1e-5)
    biased = episode_mean(ug.tbptt(problem, truncation=5), theta, 4)[0]
    assert np.linalg.norm(biased - expected[3] / 4) > 0.1 * np.linalg.norm(expected[3] / 4)


@pytest.mark.parametrize("name", ["forward_mode", "dodge"])
def test_evaluate(name):
    """If theta is one number, ``dodge`` is exact too."""
    problem, theta = ug.problems.influence_balancing(horizon=60)
    problem = problem._replace(
        evaluate=lambda key, theta, s: 0.5 * (s[0] - 1) ** 2 + theta * jax.random.normal(key)
    )
    exact, loss = episode_mean(ug.bptt(problem), theta, 1)
    periods = [] if name == "forward_mode" else [10, 20]
    for truncation, period in [(60, None), (10, None), *((10, p) for p in periods)]:
        estimator = build(name, problem, truncation=truncation, noise_period=period)
        got, own = episode_mean(estimator, theta, 60 // truncation)
        if period is None:
            np.testing.assert_allclose(got, exact, rtol=1e-5)
        assert own == pytest.approx(loss, rel=1e-5)


def test_uoro_reads_the_evaluation_as_bptt_does():
    """If the state has no influence, the direct gradient is the whole gradient, exactly."""
    problem, theta = quadratic()
    problem = problem._replace(
        step=lambda key, theta, s, t: (jax.lax.stop_gradient(s), jnp.sum(theta["start"] ** 2)),
        init=lambda key, theta: jax.lax.stop_gradient(quadratic()[0].init(key, theta)),
        evaluate=lambda key, theta, s: jnp.exp(theta["log_rate"]) * jax.random.normal(key),
    )
    exact, loss = episode_mean(ug.bptt(problem), theta, 1)
    got, own = episode_mean(ug.uoro(problem, truncation=5), theta, 4)
    np.testing.assert_allclose(got, exact, rtol=1e-5)
    assert own == pytest.approx(loss, rel=1e-5)


def recurrence():
    return ug.problems.linear_recurrence(
        dim=4, horizon=20, memory=0.8, curvature=0.1, init_influence=2.0
    )


def samples(estimator, theta, num_windows, num_episodes=10_000):
    draws = window_gradients(estimator, jax.random.key(7), theta, num_windows, num_episodes)
    return Samples(draws.mean(axis=1))


@functools.cache
def recurrence_samples(name, period):
    """Samples on the recurrence, and the exact influences."""
    problem, theta, influence = recurrence()
    estimator = build(name, problem, truncation=5, noise_period=period)
    return samples(estimator, theta, 4), influence(theta)


@pytest.mark.parametrize(
    ("name", "period"), [("dodge", None), ("dodge", 5), ("dodge", 10), ("uoro", None)]
)
def test_unbiased(name, period):
    s, influence = recurrence_samples(name, period)
    truth = theory.gradient(influence)
    wrong = theory.truncated_gradient(influence, truncation=5)
    assert s.relative_se(truth) < 0.03
    assert s.error_in_se(truth) < 5
    assert s.error_in_se(wrong) > 20


def test_dodge_that_forgets_is_rejected():
    """Negative control: weighting with the last direction alone has the truncation bias."""
    problem, theta, influence = recurrence()
    truth = theory.gradient(influence(theta))
    estimator = ug.dodge(problem, truncation=5, noise_period=5)

    def forgetful(key, theta, state, *, data=None):
        empty = jax.tree.map(jnp.zeros_like, state.carried.accumulated)
        carried = state.carried._replace(accumulated=empty)
        return estimator.estimate(key, theta, state._replace(carried=carried))

    s = samples(estimator._replace(estimate=forgetful), theta, 4)
    assert s.error_in_se(truth) > 20


def test_variance_of_dodge():
    """The variance with one direction is (P - 1) |g|^2, and P = 1 is exact."""
    s, influence = recurrence_samples("dodge", None)
    square = np.sum(theory.gradient(influence) ** 2)
    variance, se = s.variance()
    assert se < 0.03 * 3 * square
    assert abs(variance - 3 * square) < 5 * se
    assert abs(variance - 5 * square) > 20 * se  # the variance of Gaussian directions


@pytest.mark.parametrize(("name", "period"), [("dodge", None), ("dodge", 5), ("uoro", None)])
def test_the_loss_at_the_end_alone(name, period):
    """``evaluate`` depends on the state; windows, random directions."""
    problem, theta, _ = recurrence()
    final = ug.final_loss(problem, lambda key, theta, s: jnp.sum(s**2) + theta[0] * jnp.sum(s))
    # The last state is 0.8^20 (1 + 2 theta) + (1 + 0.8 + ... + 0.8^19) theta.
    x = np.asarray(theta, np.float64)
    slope = 2 * 0.8**20 + np.sum(0.8 ** np.arange(20))
    state = 0.8**20 + slope * x
    direct = np.array([state.sum(), 0, 0, 0])  # negative control: the state as a constant
    truth = slope * (2 * state + x[0]) + direct
    s = samples(build(name, final, truncation=5, noise_period=period), theta, 4)
    assert s.relative_se(truth) < 0.05
    assert s.error_in_se(truth) < 5
    assert s.error_in_se(direct) > 10


def test_training_problems():
    """Theta is the learning rate of Adam and a penalty; the truth is from backpropagation."""

    def optimizer(theta, t):
        # uoro's noise in Adam's v grows by 1 / (1 - b2) and more: a small b2 bounds it.
        return optax.adam(jnp.exp(theta["log_lr"]), b2=0.9, eps_root=1e-2)

    problem = ug.training_problem(
        loss=lambda theta, w, batch, key: (
            jnp.mean((batch @ w - 1.0) ** 2) + jnp.exp(theta["log_penalty"]) * jnp.sum(w**2)
        ),
        init_params=lambda key: jnp.full(3, 0.5),
        optimizer=optimizer,
        sample_batch=lambda key: jnp.array([[1.0, 0.2, 0.3], [0.1, -1.0, 0.4]]),
        horizon=6,
    )
    theta = {"log_lr": np.log(np.float32(0.1)), "log_penalty": np.float32(-2.0)}
    exact = episode_mean(ug.bptt(problem), theta, 1)[0]
    got = episode_mean(ug.forward_mode(problem, truncation=2), theta, 3)[0]
    np.testing.assert_allclose(got, exact, rtol=1e-4)
    biased = episode_mean(ug.tbptt(problem, truncation=2), theta, 3)[0]
    for estimator in [ug.dodge(problem, truncation=2), ug.uoro(problem, truncation=2)]:
        s = samples(estimator, theta, 3)
        assert s.relative_se(exact) < 0.05
        assert s.error_in_se(exact) < 5
        assert s.error_in_se(biased) > 10


def test_init_shares_the_signs_of_the_first_step():
    """``uoro`` gives the same numbers whether ``init`` or the first step makes the first state.

    Two steps, the second one's loss c . s2: the first step's signs v estimate ds1/dtheta =
    (1 + memory i) v v^T, i = d init / dtheta. The variance of half the sum of both gradients is
    (P - 1) |c memory (1 + memory i)|^2 / 4. With signs w of their own for ``init``, it would be
    (P - 1) (|c i memory (1 + memory)|^2 + |c memory|^2) / 4 + (P + 1) memory^3 i |c|^2 / 2.
    """
    dim, memory, i = 4, 0.8, 2.0
    problem, theta, influence = ug.problems.linear_recurrence(
        dim=dim, horizon=2, memory=memory, init_influence=i
    )

    def step(key, theta, s, t):
        return problem.step(key, theta, jnp.where(t == 0, problem.init(key, theta), s), t)

    inside = problem._replace(init=lambda key, theta: jnp.ones(dim), step=step)
    s, other = (samples(ug.uoro(p, truncation=1), theta, 2) for p in (problem, inside))
    np.testing.assert_allclose(s.x, other.x, rtol=1e-5, atol=1e-5)
    influences = influence(theta)
    assert s.error_in_se(theory.gradient(influences)) < 5
    square = np.sum(influences[1, 1] ** 2)
    shared = (dim - 1) * (memory * (1 + memory * i)) ** 2 * square / 4
    cross = (dim + 1) * memory**3 * i * square / 2
    separate = (dim - 1) * ((i * memory * (1 + memory)) ** 2 + memory**2) * square / 4 + cross
    variance, se = s.variance()
    assert abs(variance - shared) < 5 * se
    assert abs(variance - separate) > 100 * se


def test_uoro_refuses_complex_states():
    problem = ug.UnrolledProblem(
        lambda key, theta: {"z": jnp.zeros(2, jnp.complex64)},
        lambda key, theta, s, t: ({"z": s["z"] * 1j + theta}, jnp.sum(jnp.abs(s["z"]) ** 2)),
        20,
    )
    with raises(TypeError, "uoro cannot carry complex", "state['z'] is complex64[2]", "`dodge`"):
        jax.eval_shape(ug.uoro(problem, truncation=5).init, KEY, jnp.float32(0.1))


def test_uoro_in_half_precision():
    """The sum of the squares of 70 000 state entries would overflow float16."""
    problem = ug.UnrolledProblem(
        lambda key, theta: jnp.zeros(70_000, jnp.float16),
        lambda key, theta, s, t: (
            (0.5 * s + theta).astype(jnp.float16),
            jnp.mean(s.astype(jnp.float32)),
        ),
        20,
    )
    got, _ = episode_mean(ug.uoro(problem, truncation=5), jnp.float32(0.1), 4)
    assert np.isfinite(got).all()


def test_the_tangents_must_fit():
    problem, theta = quadratic()
    estimator = ug.forward_mode(problem, truncation=5, max_bytes=100)
    # 4 tangents, each with 3 floats of state and 4 of direction.
    with raises(ValueError, "4 tangents", "12 bytes of state and 16", "`max_bytes`", "`dodge`"):
        jax.eval_shape(estimator.init, KEY, theta)
    fits = ug.forward_mode(problem, truncation=5, max_bytes=4 * 28)
    jax.eval_shape(fits.init, KEY, theta)
    with raises(ValueError, "`max_bytes` must be at least 1"):
        ug.forward_mode(problem, truncation=5, max_bytes=0)


@pytest.mark.parametrize("name", ["forward_mode", "dodge", "uoro"])
def test_memory_does_not_grow_with_the_truncation(name):
    def temporary(truncation):
        problem, theta = quadratic(horizon=640)
        estimator = build(name, problem, truncation=truncation, noise_period=None)
        state = jax.eval_shape(estimator.init, KEY, theta)
        compiled = jax.jit(estimator.estimate).lower(KEY, theta, state).compile()
        return present(compiled.memory_analysis()).temp_size_in_bytes

    # Each step (and tangent) keeps 4 bytes of loss, but no state.
    assert temporary(640) - temporary(10) < 640 * (4 * 6) + 1000


def test_a_while_loop_is_fine_in_forward_mode_and_not_for_uoro():
    def step(key, theta, state, t):
        state = jax.lax.while_loop(lambda s: s > 1.0, lambda s: 0.5 * s, state + theta)
        return state, state

    problem = ug.UnrolledProblem(lambda key, theta: jnp.float32(0.0), step, 20)
    theta = jnp.float32(0.3)
    epsilon = 1e-3
    loss = jax.jit(lambda theta: ug.episode_loss(problem, KEY, theta))
    difference = (loss(theta + epsilon) - loss(theta - epsilon)) / (2 * epsilon)
    for name in ["forward_mode", "dodge"]:
        got, _ = episode_mean(build(name, problem, noise_period=None), theta, 4)
        np.testing.assert_allclose(got, difference, rtol=1e-2)
    with raises(ValueError, "uoro", "while_loop", "forward_mode"):
        episode_mean(build("uoro", problem), theta, 4)
