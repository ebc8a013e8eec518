"""Finite differences, the first NaN, and the cost before a run."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from tests.helpers import counted, quadratic, raises
from unrollgrad.diagnostics import check_grad, costs, estimate_cost, locate_nonfinite

KEY = jax.random.key(0)


def scaled(estimator, factors):
    """The estimator with its leaves multiplied, as a mistake would."""

    def estimate(key, theta, state, *, data=None):
        out, state = estimator.estimate(key, theta, state, data=data)
        return out._replace(grad=jax.tree.map(lambda g, f: f * g, out.grad, factors)), state

    return ug.GradientEstimator(estimator.init, estimate, estimator.truncation)


def test_backpropagation_agrees_and_mistakes_are_named():
    problem, theta = quadratic(20)
    problem = problem._replace(evaluate=lambda key, theta, s: jnp.sum(s["x"] ** 2))
    right = check_grad(problem, theta, ug.bptt(problem), KEY)
    assert right.leaves == ("theta['log_rate']", "theta['start']")
    assert right.passed
    assert np.all(right.relative < 1e-3)
    wrong = scaled(ug.bptt(problem), {"log_rate": 1.0, "start": 1.01})
    assert check_grad(problem, theta, wrong, KEY).verdicts == ("agrees", "differs")
    with counted() as programs:
        check_grad(problem, theta, ug.bptt(problem), KEY)
    assert programs == [0]


def test_evolution_strategies_agree_within_their_noise():
    problem, theta, _ = ug.problems.linear_recurrence(3, 8, gradients="independent")
    pes = ug.pes(problem, truncation=2, sigma=0.1, num_pairs=200)
    found = check_grad(problem, theta, pes, KEY, num_samples=64)
    assert found.passed
    assert found.error[0] < 0.1 * abs(found.expected[0])
    cut = ug.truncated_es(problem, truncation=2, sigma=0.1, num_pairs=200)
    problem, theta, _ = ug.problems.linear_recurrence(3, 8, memory=0.9)
    cut = ug.truncated_es(problem, truncation=2, sigma=0.1, num_pairs=200)
    assert check_grad(problem, theta, cut, KEY, num_samples=64).verdicts == ("differs",)


def test_chaos_cannot_be_checked(capsys):
    problem, theta = ug.problems.chaotic_map(60)
    found = check_grad(problem, theta, ug.bptt(problem), KEY)
    assert not found.passed
    found.table()
    assert "verdict" in capsys.readouterr().out
    with raises(ValueError, "num_samples", "2"):
        check_grad(problem, theta, ug.bptt(problem), KEY, num_samples=1)
    with raises(ValueError, "truncation", "7"):
        check_grad(problem, theta, ug.tbptt(problem._replace(horizon=7), truncation=7), KEY)


THETA = {"a": 2.0, "b": 3.0}


def loop(step, horizon=10, start=1.0, **rest):
    """A problem with a float, an int and a key in its state; ``step(x, theta, t)`` is the float."""

    def init(key, theta):
        return {"key": key, "n": jnp.int32(0), "x": start * theta["a"]}

    def inner(key, theta, s, t):
        x = step(s["x"], theta, t)
        return {"key": key, "n": s["n"] + 1, "x": x}, x * 1.0

    return ug.UnrolledProblem(init, inner, horizon, **rest)


CASES = {
    "nothing": (loop(lambda x, theta, t: 0.5 * x), (None, None, None, None)),
    "a logarithm": (
        loop(lambda x, theta, t: jnp.where(t < 4, x, jnp.log(-x * theta["b"]))),
        ("forward", 4, "state['x']", "nan"),
    ),
    "an explosion": (loop(lambda x, theta, t: 1e5 * x), ("forward", 7, "state['x']", "inf")),
    "the start": (
        loop(lambda x, theta, t: x, start=np.inf),
        ("forward", None, "state['x']", "inf"),
    ),
    "the loss": (
        loop(lambda x, theta, t: x)._replace(step=lambda key, theta, s, t: (s, s["x"] / (t - 3.0))),
        ("forward", 3, "loss", "inf"),
    ),
    "the evaluation": (
        loop(lambda x, theta, t: x, evaluate=lambda key, theta, s: jnp.log(-s["x"])),
        ("forward", None, "evaluate", "nan"),
    ),
    "a root backwards": (
        loop(lambda x, theta, t: jnp.where(t == 4, jnp.sqrt(theta["b"] * abs(t - 4)), x)),
        ("backward", 4, "theta['b']", "nan"),
    ),
    "an untaken branch": (
        loop(lambda x, theta, t: jnp.where(x > 0, x, jnp.sqrt(x - theta["a"]))),
        ("backward", 9, "state['x']", "nan"),
    ),
    "backwards explosion": (
        loop(lambda x, theta, t: jnp.sin(1e6 * x), 20),
        ("backward", None, None, None),
    ),
    "no derivative": (
        loop(lambda x, theta, t: jax.lax.while_loop(lambda y: y > 1, lambda y: y / 2, x)),
        (None, None, None, None),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_number_that_is_not_finite(case):
    problem, (direction, step, leaf, value) = CASES[case]
    found = locate_nonfinite(problem, THETA, KEY)
    assert found.direction == direction
    if case == "backwards explosion":
        assert 10 < found.step < 16  # 1e6 a step, with cosines; about 38 / 6 steps before the end
        assert "explosion" in found.reason
        return
    assert (found.step, found.leaf, found.value) == (step, leaf, value)
    if case == "an explosion":
        assert found.before > 1e30
        assert "explosion" in found.reason
    elif direction is not None and step is not None:
        assert "one operation" in found.reason


def test_theta_has_to_be_finite(capsys):
    problem, _ = CASES["nothing"]
    with raises(ValueError, "theta['b'] is not finite"):
        locate_nonfinite(problem, {"a": 1.0, "b": np.nan}, KEY)
    locate_nonfinite(problem, THETA, KEY).table()
    assert "are finite" in capsys.readouterr().out


def test_bytes_and_seconds(capsys, monkeypatch):
    """Kept states cost memory; 50 times as many steps 50 times the time."""
    found = {}
    for horizon in (200, 10_000):
        problem, theta = ug.problems.lorenz(horizon)
        found[horizon] = estimate_cost(problem, theta, ug.bptt(problem))
    ratio = found[10_000].temporary_bytes / found[200].temporary_bytes
    assert 40 < ratio < 60
    assert 10 < found[10_000].seconds / found[200].seconds < 250
    estimator = ug.bptt(problem)
    state = estimator.init(KEY, theta)
    jax.block_until_ready(estimator.estimate(KEY, theta, state))
    begun = time.perf_counter()
    jax.block_until_ready(estimator.estimate(KEY, theta, state))
    took = time.perf_counter() - begun
    assert took / 30 < found[10_000].seconds < 30 * took
    found[200].table()
    assert "KiB" in capsys.readouterr().out
    monkeypatch.setattr(costs, "_seconds", lambda *args: None)
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
    unknown = estimate_cost(problem, theta, ug.tbptt(problem, truncation=100))
    assert unknown[:5] == (None,) * 5
    unknown.table()
    assert "not known" in capsys.readouterr().out


def test_operations_are_counted():
    def program(x):
        def body(x, _):
            x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: jnp.sin(jnp.cos(x)), x)
            return x, None

        return jax.lax.scan(body, x, length=7)[0]

    operations, elements = costs._work(jax.make_jaxpr(program)(jnp.ones((3, 3))).jaxpr)
    body, read = 27, 1  # a product has 9 sums of 3, more than a sine and a cosine of 9
    assert 7 * (2 + 1) <= operations <= 7 * 10
    assert 7 * (body + read) <= elements <= 7 * (body + 10 * read + 9)
