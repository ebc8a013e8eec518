"""Constraints: inverses, derivatives, units, and refused values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import raises
from unrollgrad import constraints
from unrollgrad.constraints import box, constrain, free, positive, unconstrain, unit_interval

INSIDE = {
    "positive": (positive, np.logspace(-30, 30, 301)),
    "unit_interval": (
        unit_interval,
        np.concatenate([np.logspace(-30, -1, 201), np.linspace(0.1, 0.99, 90)]),
    ),
    "box": (box(-2.0, 3.0), np.linspace(-1.97, 2.97, 301)),
    "narrow box": (box(10.0, 10.5), np.linspace(10.1, 10.4, 31)),
    "free": (free, np.linspace(-1e6, 1e6, 301)),
}
every = pytest.mark.parametrize(("constraint", "values"), INSIDE.values(), ids=INSIDE)
dtypes = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])


@every
@dtypes
def test_there_and_back(constraint, values, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        values = jnp.asarray(values, dtype)
        theta: Any = unconstrain(constraint, values)
        back = jax.jit(lambda theta: constrain(constraint, theta))(theta)
        assert theta.dtype == back.dtype == dtype
        theta, values, back = (np.asarray(x, np.float64) for x in (theta, values, back))
        scale = 3.0 if constraint.name == "box(-2, 3)" else np.maximum(np.abs(values), 1e-300)
        ulps = np.abs(back - values) / scale / float(jnp.finfo(dtype).eps)
        assert np.max(ulps / np.maximum(1, np.abs(theta))) < 2


@every
@dtypes
def test_derivatives_in_both_modes_and_far_out(constraint, values, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        theta = jnp.asarray([-1e4, -50, -10, -1, 0, 1, 10, 50, 80], dtype)

        @jax.jit
        def derivatives(theta):
            reverse = jax.vmap(jax.grad(constraint.to_value))
            forward = lambda x: jax.jvp(constraint.to_value, (x,), (jnp.ones_like(x),))[1]  # noqa: E731
            return reverse(theta), jax.vmap(forward)(theta), reverse(-1e3 * theta)

        reverse, forward, far_out = map(np.asarray, derivatives(theta))
        np.testing.assert_array_equal(reverse, forward)
        assert reverse.dtype == dtype
        x = np.asarray(theta, np.float64)
        s = np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x)))
        width = {"box(-2, 3)": 5, "box(10, 10.5)": 0.5}.get(constraint.name, 1)
        truth = {"positive": np.exp(x), "free": np.ones_like(x)}.get(
            constraint.name, width * s * (1 - s)
        )
        # It is accurate even where sigmoid (1 - sigmoid) has lost its digits.
        normal = float(jnp.finfo(dtype).smallest_normal)
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            np.asarray(reverse, np.float64), truth, rtol=6 * eps, atol=2 * normal
        )
        assert not np.isnan(far_out).any()


def test_a_value_never_leaves_its_closed_box():
    theta = np.linspace(-200, 200, 4001, dtype=np.float32)
    for low, high in [(0.1, 0.3), (-1.0, 1e-3), (1e-8, 7.0)]:
        value = np.asarray(constrain(box(low, high), theta))
        assert value.min() >= np.float32(low)
        assert value.max() <= np.float32(high)
        assert (np.diff(value) >= 0).all()


def test_a_tree_with_a_prefix_and_mixed_dtypes():
    kinds = {"net": positive, "mix": [unit_interval, free]}
    values = {
        "net": {"a": jnp.ones(3, jnp.bfloat16), "b": np.float64(2.0)},
        "mix": [0.25, 3],
    }
    theta: Any = unconstrain(kinds, values)
    assert [x.dtype.name for x in jax.tree.leaves(theta)] == ["float32"] * 2 + [
        "bfloat16",
        "float32",
    ]
    assert not any(x.weak_type for x in jax.tree.leaves(theta))
    np.testing.assert_allclose(theta["mix"][0], -np.log(3), rtol=1e-6)
    assert float(theta["mix"][1]) == 3
    back = jax.jit(lambda x: constrain(kinds, x))(theta)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), back, values)


def test_report_in_both_units(capsys):
    theta = {"constraint": jnp.log(jnp.array([0.1, 1.0])), "momentum": jnp.bfloat16(0)}
    kinds = {"constraint": positive, "momentum": unit_interval}
    first, second = constraints.report(kinds, theta)
    assert first["leaf"] == "['constraint']"
    assert second == {
        "leaf": "['momentum']",
        "constraint": "unit_interval",
        "theta": 0.0,
        "value": 0.5,
    }
    np.testing.assert_allclose(first["theta"], [-2.302585, 0.0])
    np.testing.assert_allclose(first["value"], [0.1, 1.0], rtol=1e-6)
    constraints.table(kinds, theta)
    shown = capsys.readouterr().out
    for part in ["['constraint']", "positive", "-2.3026", "0.1", "unit_interval", "0.5"]:
        assert part in shown


def test_inside_a_problem():
    """Theta is unbounded, momentum stays below 1; both families estimate the same slope."""
    kinds = {"rate": positive, "momentum": unit_interval}

    def optimizer(theta, t):
        values = constrain(kinds, theta)
        return optax.sgd(values["rate"], values["momentum"])

    problem = ug.training_problem(
        loss=lambda theta, w, batch, key: jnp.mean((w - batch) ** 2),
        init_params=lambda key: jnp.zeros(3),
        optimizer=optimizer,
        sample_batch=lambda key: jnp.ones(3),
        horizon=8,
    )
    theta = unconstrain(kinds, {"rate": 0.1, "momentum": 0.5})
    key = jax.random.key(0)
    # As many orthogonal directions as numbers give the gradient, up to O(sigma^2).
    full = ug.full_es(problem, sigma=1e-2, num_pairs=2, noise=ug.noise.orthogonal())

    @jax.jit
    def gradients(theta):
        made = ug.bptt(problem), full
        return [e.estimate(key, theta, e.init(key, theta))[0].grad for e in made]

    exact, estimate = gradients(theta)
    for name in kinds:
        np.testing.assert_allclose(estimate[name], exact[name], rtol=0.01)
        # d J / d theta = d J / d value * d value / d theta, and J falls in both values here.
        assert exact[name] < 0


@pytest.mark.parametrize(
    ("constraint", "value", "got"),
    [
        (positive, 0.0, "got 0.0 as float32"),
        (positive, jnp.bfloat16(-2), "got -2.0 as bfloat16"),
        (positive, np.inf, "got inf"),
        (unit_interval, 1, "got 1.0 as float32"),
        (unit_interval, 1 - 1e-9, "got 1.0 as float32"),  # equals 1 in float32
        (unit_interval, jnp.array([0.5, 1.5, -1.0]), "got 1.5 as float32 (2 of 3 values)"),
        (box(2, 3), 3.0, "got 3.0"),
        (box(2, 3), 1.0, "got 1.0"),
        (free, np.nan, "got nan"),
    ],
)
def test_values_outside_or_at_the_boundary(constraint, value, got):
    where = [f"values['x']['y'] must be in the domain of `{constraint.name}`", constraint.domain]
    with raises(ValueError, *where, got, "Move it inside"):
        unconstrain({"x": constraint}, {"x": {"y": value}})
    with raises(ValueError, *where, got):  # a constant inside jit is also a concrete value
        jax.jit(lambda: unconstrain({"x": constraint}, {"x": {"y": value}}))()
    traced = jax.jit(lambda v: unconstrain(constraint, v))(jnp.asarray(value, jnp.float32))
    assert not jnp.isfinite(traced).all()


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (0.0, np.inf), (np.nan, 1.0)])
def test_a_box_that_is_none(low, high):
    with raises(ValueError, "`low` and `high` must be finite", f"low={low}, high={high}"):
        box(low, high)


def test_trees_that_do_not_fit():
    theta = {"a": jnp.float32(0), "b": jnp.float32(0)}
    with raises(ValueError, "`constraints` must be a Constraint or a pytree prefix of theta", "'b"):
        constrain({"a": positive}, theta)
    with raises(ValueError, "pytree prefix of values", "'b"):
        unconstrain({"a": positive}, theta)
    with raises(TypeError, "constraints['a'] must be a Constraint", "'positive'", "unit_interval"):
        constrain({"a": "positive", "b": free}, theta)
    with raises(TypeError, "values['a'] must be a real number", "'1'"):
        unconstrain(positive, {"a": "1"})
    with raises(TypeError, "values['a'] must be a real number", "bool"):
        unconstrain(positive, {"a": True})
    with raises(TypeError, "theta['a'] is int32"):
        constrain(positive, {"a": jnp.int32(1)})


def test_a_constraint_of_ones_own():
    below_one = constraints.Constraint(
        "below_one", "value < 1", lambda x: 1 - jnp.exp(x), lambda v: jnp.log(1 - v)
    )
    np.testing.assert_allclose(constrain(below_one, unconstrain(below_one, -3.0)), -3.0, rtol=1e-6)
    with raises(ValueError, "below_one", "value < 1", "got 2.0"):
        unconstrain(below_one, 2.0)
