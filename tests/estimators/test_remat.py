"""``remat`` gives the same gradient in less memory; ``last`` gives a part of it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import mistyped, numbers, quadratic, raises
from unrollgrad._core import unroll

KEY, OTHER = jax.random.key(0), jax.random.key(1)


@functools.partial(jax.jit, static_argnums=0)
def gradient(estimator, theta, data=None):
    given = {} if data is None else {"data": data}
    return estimator.estimate(OTHER, theta, estimator.init(KEY, theta), **given)[0]


def temporary(estimator, theta):
    """The bytes of temporaries that XLA plans."""
    state = jax.eval_shape(estimator.init, KEY, theta)
    compiled = estimator.estimate.lower(KEY, theta, state).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def assert_close(a, b, rtol=1e-5):
    chex.assert_trees_all_close(numbers(a), numbers(b), rtol=rtol, atol=1e-7)


PROBLEM, THETA = quadratic()
WHOLE = ug.bptt(PROBLEM)
WINDOW = ug.tbptt(PROBLEM, truncation=10)


@pytest.mark.parametrize("remat", ["step", "sqrt", 1, 3, 20, 50, "log", (2, 3), (4, 5), (2, 50)])
def test_the_same_gradient(remat):
    assert_close(gradient(ug.bptt(PROBLEM, remat=remat), THETA), gradient(WHOLE, THETA))


@pytest.mark.parametrize("remat", ["step", "sqrt", 3])
def test_the_same_gradient_of_a_window(remat):
    remade = ug.tbptt(PROBLEM, truncation=10, remat=remat)
    assert_close(gradient(remade, THETA), gradient(WINDOW, THETA))


STREAMED = PROBLEM._replace(
    step=lambda key, theta, s, t, batch: (
        PROBLEM.step(key, theta, s, t)[0],
        jnp.sum(s["x"] * batch),
    )
)
DATA = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
WHOLE_OF_DATA = ug.bptt(STREAMED)


@pytest.mark.parametrize("remat", ["step", "sqrt", 3, "log"])
def test_streamed_data(remat):
    remade = ug.bptt(STREAMED, remat=remat)
    assert_close(gradient(remade, THETA, DATA), gradient(WHOLE_OF_DATA, THETA, DATA))


def test_streamed_data_of_the_last_steps():
    expected = gradient(WHOLE_OF_DATA, THETA, DATA)
    assert_close(gradient(ug.bptt(STREAMED, last=20), THETA, DATA), expected)
    part = gradient(ug.bptt(STREAMED, last=7), THETA, DATA)
    assert float(part.loss) == pytest.approx(float(expected.loss), rel=1e-5)


def mlp_problem(horizon, width, layers, batch):
    """SGD on an MLP; theta is the log learning rate."""
    xs = np.random.default_rng(0).normal(size=(batch, width)).astype(np.float32)

    def loss(theta, params, data, key):
        h = data
        for w in params:
            h = jnp.tanh(h @ w)
        return jnp.mean(h**2)

    return ug.training_problem(
        loss=loss,
        init_params=lambda key: [
            jax.random.normal(jax.random.fold_in(key, i), (width, width)) / width**0.5
            for i in range(layers)
        ],
        optimizer=lambda theta, t: optax.sgd(jnp.exp(theta)),
        sample_batch=lambda key: jnp.asarray(xs),
        horizon=horizon,
    ), np.float32(-2.0)


def test_remat_of_steps_takes_a_quarter_of_the_memory():
    """6 layers of 256, batch 512, 20 inner steps."""
    problem, theta = mlp_problem(20, 256, 6, 512)
    plain, remade = ug.bptt(problem), ug.bptt(problem, remat="step")
    assert temporary(remade, theta) < temporary(plain, theta) / 4


def test_windows_and_last_steps_recompute_too():
    problem, theta = mlp_problem(20, 64, 4, 128)
    for make in (
        lambda remat: ug.tbptt(problem, truncation=10, remat=remat),
        lambda remat: ug.bptt(problem, last=10, remat=remat),
    ):
        assert temporary(make("step"), theta) < temporary(make(None), theta) / 2


def test_sqrt_grows_like_the_root():
    def slope(remat, lengths):
        sizes = []
        for horizon in lengths:
            problem, theta = mlp_problem(horizon, 32, 2, 32)
            sizes.append(temporary(ug.bptt(problem, remat=remat), theta))
        return np.polyfit(np.log(lengths), np.log(sizes), 1)[0]

    assert abs(slope("sqrt", [64, 256, 1024]) - 0.5) < 0.15
    assert slope(None, [64, 1024]) > 0.9  # negative control


@pytest.mark.parametrize(
    ("remat", "states"), [("log", 2 * 10), ((4, 4, 4, 4, 4), 20), ((32, 32), 64)]
)
def test_a_tree_keeps_few_states(remat, states):
    """At T = 1024: the numbers of the levels, two for the carry, and what one step computes."""
    size = 2 * 64 * 64 * 4
    one_step = temporary(ug.bptt(mlp_problem(1, 64, 2, 8)[0]), np.float32(-2.0))
    problem, theta = mlp_problem(1024, 64, 2, 8)
    assert temporary(ug.bptt(problem, remat=remat), theta) < (states + 2) * size + 2 * one_step
    if remat == "log":
        kept = temporary(ug.bptt(problem, remat="sqrt"), theta)
        assert kept > 32 * size  # negative control


@pytest.mark.parametrize("horizon", [20, 16])
def test_a_tree_of_many_workers(horizon):
    """Under ``average``: with empty leaves (20 steps of 32), and without."""
    problem, theta = quadratic(horizon)
    plain, tree = (
        gradient(ug.average(ug.bptt(problem, remat=remat), 3), theta) for remat in (None, "log")
    )
    assert_close(tree, plain)


def test_last_is_the_derivative_of_the_last_steps():
    """It is the derivative of step losses and evaluation with respect to the last thetas."""
    problem = PROBLEM._replace(evaluate=lambda key, theta, s: jnp.sum(s["x"] ** 2))

    @jax.jit
    @jax.value_and_grad
    def cut(theta, last):
        """The same episode with theta held constant up to the cut."""
        fixed = jax.lax.stop_gradient(theta)
        held = problem._replace(
            init=lambda key, _: problem.init(key, fixed),
            step=lambda key, theta, s, t: jax.tree.map(
                lambda a, b: jnp.where(t < 20 - last, a, b),
                jax.lax.stop_gradient(problem.step(key, fixed, s, t)),
                problem.step(key, theta, s, t),
            ),
        )
        return ug.episode_loss(held, OTHER, theta)

    for last in (1, 5, 19):
        got = gradient(ug.bptt(problem, last=last), THETA)
        value, exact = cut(THETA, last)
        assert_close(got.grad, exact, rtol=1e-4)
        assert float(got.loss) == pytest.approx(float(value), rel=1e-5)
        assert int(got.info.inner_steps) == 20


def test_numbers_that_do_not_divide_the_horizon_save_as_much():
    """The last segment is shorter than the others."""
    problem, theta = mlp_problem(199, 16, 2, 16)
    plain = temporary(ug.bptt(problem), theta)
    for remat in (14, 67, 100):
        assert temporary(ug.bptt(problem, remat=remat), theta) < 0.2 * plain, remat


def test_last_takes_less_memory():
    problem, theta = mlp_problem(40, 16, 2, 16)
    assert temporary(ug.bptt(problem, last=4), theta) < temporary(ug.bptt(problem), theta) / 3


def test_errors():
    problem, _ = quadratic()
    for bad in ["steps", 0, -1, 1.5, True, (), (2, 0), (2, "log")]:
        with raises(ValueError, "`remat` must be None", repr(bad)):
            ug.bptt(problem, remat=mistyped(bad))
        with raises(ValueError, "`remat` must be None", repr(bad)):
            ug.tbptt(problem, truncation=5, remat=mistyped(bad))
    with raises(ValueError, "`last`=21", "horizon of 20"):
        ug.bptt(problem, last=21)
    with raises(ValueError, "`last` must be at least 1"):
        ug.bptt(problem, last=0)


def test_a_tree_has_no_more_branches_than_steps():
    assert unroll._numbers_of_states((16, 16, 16), 4096) == (16, 16, 16)
    assert unroll._numbers_of_states((10**6, 10**6), 13) == (1, 13)
    assert unroll._numbers_of_states((10**6, 4), 13) == (4, 4)
