"""Climbs end on the ridge whose exponent is known, and the branches leave on both sides of it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unrollgrad.diagnostics import bifurcation

RATE, STEPS = 0.1, 20
STARTS = jnp.array([-1.4, -0.5, 0.3, 1.2])


def descend(x):
    """Wells at -1 and 1; on the barrier at 0 the curvature is -1."""
    return x - RATE * jax.grad(lambda x: (x**2 - 1) ** 2 / 4)(x)


@functools.cache
def climbed(num_updates, learning_rate):
    def one(x):
        settings = {"num_updates": num_updates, "learning_rate": learning_rate}
        found = bifurcation(descend, x, STEPS, **settings)
        last = jax.lax.fori_loop(0, 300, lambda i, x: jax.vmap(descend)(x), found.branches)
        return found, last

    return jax.jit(jax.vmap(one))(STARTS)


def test_the_exponent_at_the_barrier_is_its_closed_form():
    found, _ = climbed(200, 0.05)
    np.testing.assert_allclose(found.exponent, np.log(1 + RATE), atol=1e-4)
    np.testing.assert_allclose(found.state, 0.0, atol=5e-3)
    assert (found.before < found.exponent - 0.05).all()
    assert (found.exponent < np.log(1 + RATE) + 1e-6).all()  # nowhere more


def test_branches_find_both_wells_and_without_a_climb_they_do_not():
    _, ends = climbed(200, 0.05)
    np.testing.assert_allclose(np.sort(ends, axis=1), [[-1, 1]] * len(STARTS), atol=1e-5)
    _, plain = climbed(1, 1e-9)
    np.testing.assert_allclose(plain, np.sign(STARTS)[:, None] * [[1, 1]], atol=1e-5)


def test_the_direction_is_the_first_right_singular_vector():
    """Of a map that turns and stretches, whose eigenvectors are far from orthogonal."""
    matrix = np.array([[0.9, 3.0, 0.1], [-0.1, 0.8, 0.0], [0.2, 0.0, 1.05]])

    def step(state):
        return {"x": jnp.float32(matrix) @ state["x"], "count": state["count"] + 1}

    state = {"x": jnp.ones(3), "count": jnp.int32(7)}
    found: Any = bifurcation(step, state, 6, num_updates=1, distance=0.5)
    _, sizes, ways = np.linalg.svd(np.linalg.matrix_power(matrix, 6))
    assert sizes[0] > 1.5 * sizes[1]
    assert abs(found.direction["x"] @ ways[0]) == pytest.approx(1, abs=1e-4)
    eigenvector = np.linalg.eig(matrix)[1][:, 0].real
    assert abs(ways[0] @ eigenvector) / np.linalg.norm(eigenvector) < 0.9  # it is another one
    np.testing.assert_array_equal(np.asarray(found.direction["count"]), 0)
    np.testing.assert_array_equal(found.branches["count"], [7, 7])
    apart = found.branches["x"][0] - found.branches["x"][1]
    np.testing.assert_allclose(
        np.asarray(apart), np.asarray(found.direction["x"]), rtol=1e-4
    )  # 2 x 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "`num_steps`"),
        ({"num_updates": 0}, "`num_updates`"),
        ({"learning_rate": 0.0}, "`learning_rate` must be a positive number"),
        ({"distance": float("nan")}, "`distance` must be a positive number"),
        ({"state": jnp.int32(1)}, "number of floats"),
    ],
)
def test_mistakes(changes, message):
    settings = {"state": jnp.float32(0.5), "num_steps": 5, **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        bifurcation(descend if "state" not in changes else lambda s: s, **settings)
