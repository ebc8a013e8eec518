"""``bilevel.solve`` and ``bilevel.unrolled``."""

from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

from tests.helpers import raises
from tests.quadratics import quadratic, ridge
from unrollgrad import bilevel, implicit

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_one_minimum_is_found_from_both_starts(start):
    """On a strongly convex inner problem both starts descend alike to the outer minimum."""
    problem = ridge()
    result = bilevel.solve(
        problem.inner,
        implicit.hypergradient(problem.outer, problem.inner, solver=lx.CG(**TIGHT)),
        jnp.zeros(8),
        problem.theta,
        inner_optimizer=optax.sgd(0.3),
        inner_steps=100,
        outer_optimizer=optax.adam(0.1),
        num_steps=200,
        start=start,
        keep_v=start == "warm",
    )
    np.testing.assert_allclose(result.paths[0], problem.params, rtol=1e-6)
    np.testing.assert_allclose(result.thetas[0], problem.theta)
    assert result.outer_losses.shape == (200,)
    first = problem.outer(problem.params, problem.theta)
    np.testing.assert_allclose(result.outer_losses[0], first, rtol=1e-6)
    assert result.outer_losses[-1] < 0.99 * first
    last = problem.outer(result.params, result.thetas[-1])
    np.testing.assert_allclose(result.outer_losses[-1], last, rtol=1e-10)
    # A different trajectory ends at the same minimum.
    assert jnp.linalg.norm(result.theta - result.thetas[-1]) < 0.1


def test_the_direction_of_largest_curvature_is_kept():
    """The loop equals calls in a row, each of which starts from the one before."""
    f = implicit.hypergradient(
        lambda w, theta: jnp.sum((w - 1) ** 2),
        lambda w, theta: jnp.sum(jnp.exp(theta) * (w - 2) ** 2) / 2,
        solver=implicit.neumann(3),
    )
    w, theta = jnp.array([0.5, 3.0]), jnp.array([1.0, 0.9])
    result = bilevel.solve(
        lambda w, theta: 0.0 * jnp.sum(w),
        f,
        w,
        theta,
        inner_optimizer=optax.sgd(1.0),
        inner_steps=1,
        outer_optimizer=optax.sgd(0.1),
        num_steps=3,
    )
    kept, apart = theta, theta
    out = None
    for _ in range(3):
        out = f(w, kept, out)
        out = out._replace(v=None)
        kept, apart = kept - 0.1 * out.grad, apart - 0.1 * f(w, apart).grad
    np.testing.assert_allclose(result.theta, kept, rtol=1e-12)
    assert jnp.max(jnp.abs(kept - apart)) > 1e-6  # 20 iterations from random: another step size


def test_warm_start_projects_on_and_on_and_cold_start_once():
    """One equation for two weights: descent finds the solution nearest to its start."""
    rows = jnp.array([[1.0, 0.0], [1.0, 1.0]]) / jnp.array([[1.0], [jnp.sqrt(2.0)]])

    def inner(w, theta):
        return (jnp.stack([1 - theta, theta]) @ (rows @ w - 1)) ** 2 / 2

    def moved(w, theta, v0):
        """Moves theta from 0 to 1, so that the next step has the other equation."""
        return implicit.HyperGradient(-jnp.ones(()), jnp.zeros(()), None, None)

    def ends(start):
        return bilevel.solve(
            inner,
            moved,
            jnp.zeros(2),
            np.float64(0.0),
            inner_optimizer=optax.sgd(1.0),
            inner_steps=50,
            outer_optimizer=optax.sgd(1.0),
            num_steps=2,
            start=start,
        ).paths

    def projected(w, i):
        return w + (1 - rows[i] @ w) * rows[i]

    once = projected(jnp.zeros(2), 0)
    np.testing.assert_allclose(ends("warm"), [once, projected(once, 1)], atol=1e-9)
    np.testing.assert_allclose(ends("cold"), [once, projected(jnp.zeros(2), 1)], atol=1e-9)


def test_unrolled_is_neumanns_series_at_a_minimum():
    problem, alpha = ridge(), 0.3

    @jax.jit
    def found(params, theta):
        pairs = []
        for terms in (1, 5):
            descent = {"optimizer": optax.sgd(alpha), "num_steps": terms}
            f = bilevel.unrolled(problem.outer, problem.inner, **descent)
            solver = implicit.neumann(terms, alpha)
            g = implicit.hypergradient(problem.outer, problem.inner, solver=solver)
            pairs.append([(x.grad, x.outer_loss) for x in (f(params, theta), g(params, theta))])
        return pairs

    for (grad, loss), (true_grad, true_loss) in found(problem.params, problem.theta):
        np.testing.assert_allclose(grad, true_grad, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(loss, true_loss, rtol=1e-9)


@pytest.mark.parametrize("remat", [None, "step"])
def test_unrolled_tunes_the_inner_rate(remat):
    problem = quadratic([1.0, 0.3])

    def inner(w, log_rate):
        return problem.inner(w, jnp.ones(3))

    def outer(w, log_rate):
        return inner(w, log_rate)

    settings: dict[str, Any] = {
        "inner_optimizer": lambda log_rate: optax.sgd(jnp.exp(log_rate)),
        "inner_steps": 0,
        "outer_optimizer": optax.adam(optax.cosine_decay_schedule(0.1, 200), b2=0.9),
        "num_steps": 200,
        "start": "cold",
        "every": 50,
    }
    f = bilevel.unrolled(
        outer, inner, optimizer=settings["inner_optimizer"], num_steps=3, remat=remat
    )
    result = bilevel.solve(inner, f, jnp.zeros(2), jnp.log(0.1), **settings)
    assert result.thetas.shape == (4,)
    rates = jnp.linspace(0.1, 1.9, 181)
    losses = jax.vmap(lambda rate: f(jnp.zeros(2), jnp.log(rate)).outer_loss)(rates)
    np.testing.assert_allclose(jnp.exp(result.theta), rates[jnp.argmin(losses)], rtol=0.02)


@pytest.mark.parametrize("inject", [False, True])
def test_the_inner_optimizer_follows_theta(inject):
    """It does so even if its state stores the first theta's rate, and its momentum continues."""

    def optimizer(rate):
        if inject:
            make = optax.inject_hyperparams(optax.sgd)
            return make(learning_rate=rate, momentum=0.5)
        return optax.sgd(rate, momentum=0.5)

    def moved(w, theta, v0):
        return implicit.HyperGradient(-jnp.ones(()), w, None, None)

    result = bilevel.solve(
        lambda w, theta: w**2 / 2,
        moved,
        np.float64(1.0),
        np.float64(0.0),
        inner_optimizer=optimizer,
        inner_steps=1,
        outer_optimizer=optax.sgd(0.1),
        num_steps=6,
        every=2,
    )
    w, momentum, path = 1.0, 0.0, []
    for i in range(6):
        momentum = 0.5 * momentum + w
        w -= 0.1 * i * momentum
        path.append(w)
    np.testing.assert_allclose(result.outer_losses, path, rtol=1e-9)
    np.testing.assert_allclose(result.paths, path[1::2], rtol=1e-9)
    np.testing.assert_allclose(result.thetas, [0.1, 0.3, 0.5], rtol=1e-9)


def test_errors():
    problem = ridge()
    f = implicit.hypergradient(problem.outer, problem.inner, solver=lx.CG(**TIGHT))

    def run(**changes):
        settings: dict[str, Any] = {
            "inner_optimizer": optax.sgd(0.3),
            "inner_steps": 1,
            "outer_optimizer": optax.sgd(0.1),
            "num_steps": 4,
        }
        bilevel.solve(problem.inner, f, jnp.zeros(8), problem.theta, **(settings | changes))

    with raises(ValueError, "`start`", "'hot'"):
        run(start="hot")
    with raises(ValueError, "`every`=3", "num_steps=4"):
        run(every=3)
    with raises(ValueError, "`inner_steps`", "-1"):
        run(inner_steps=-1)
    with raises(ValueError, "`inner_steps`", "2.5"):
        run(inner_steps=2.5)
    with raises(ValueError, "`num_steps`", "0"):
        run(num_steps=0)
    f = bilevel.unrolled(problem.outer, problem.inner, optimizer=optax.sgd(0.1), num_steps=2)
    with raises(ValueError, "`keep_v=True`", "v = None"):
        run(keep_v=True)
    with raises(ValueError, "`num_steps`", "0"):
        bilevel.unrolled(problem.outer, problem.inner, optimizer=optax.sgd(0.1), num_steps=0)


def test_unrolled_through_its_start():
    """MAML on a quadratic: grad = (1 - rate A)^K (w_K - b)."""
    curvature, rate, steps = jnp.diag(jnp.array([0.5, 2.0])), 0.1, 5
    a, b, theta = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), jnp.array([2.0, -1.0])
    f = bilevel.unrolled(
        lambda w, theta: jnp.sum((w - b) ** 2) / 2,
        lambda w, theta: (w - a) @ curvature @ (w - a) / 2,
        optimizer=optax.sgd(rate),
        num_steps=steps,
        start=lambda params, theta: theta,
    )
    power = jnp.linalg.matrix_power(jnp.eye(2) - rate * curvature, steps)
    expected = power @ (a + power @ (theta - a) - b)
    np.testing.assert_allclose(f(theta, theta).grad, expected, rtol=1e-5)
