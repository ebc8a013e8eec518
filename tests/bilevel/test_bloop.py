"""``bilevel.bloop`` against closed forms: what a step is, and where it ends.

Programs: at most 8. The contracts of optax's transforms are in ``tests/test_optax_contract.py``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import mistyped
from unrollgrad.bilevel import bloop


def trees(seed: int, dtype=np.float32):
    draw = np.random.default_rng(seed).standard_normal
    return {"w": draw((2, 3)).astype(dtype), "b": (draw(3).astype(dtype),)}


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def test_one_step_and_the_moving_average():
    """Direction and average of three steps in NumPy; what is added is orthogonal to it."""
    optimizer = bloop(0.7, decay=0.8)
    state, average = optimizer.init(trees(0)), np.zeros(9)
    update = jax.jit(lambda g, s, h: optimizer.update(g, s, auxiliary=h))
    for i in range(3):
        main, other = trees(2 * i), trees(2 * i + 1)
        found, state = update(main, state, other)
        average = 0.8 * average + 0.2 * flat(main)
        share = average @ flat(other) / (average @ average)
        np.testing.assert_allclose(
            flat(found), flat(main) + 0.7 * (flat(other) - share * average), atol=1e-6
        )
        np.testing.assert_allclose(flat(state.average), average, atol=1e-6)
        assert abs((flat(found) - flat(main)) @ average) < 1e-5
        assert abs(0.7 * flat(other) @ average) > 1e-2  # the sum of the gradients is not
    before: Any = state
    after: Any
    broken, after = update(jax.tree.map(lambda x: x * np.float32("nan"), main), state, other)
    assert np.isnan(flat(broken)).all()
    np.testing.assert_array_equal(flat(after.average), flat(before.average))
    zero, _ = update(jax.tree.map(np.zeros_like, main), optimizer.init(main), other)
    np.testing.assert_allclose(flat(zero), 0.7 * flat(other), rtol=1e-6)


def descended(optimizer, start, gradients, num_steps):
    """The weights after the steps; ``gradients(w, step)`` are those of both losses."""

    def step(carry, i):
        w, state = carry
        main, auxiliary = gradients(w, i)
        updates, state = optimizer.update(main, state, w, auxiliary=auxiliary)
        return (optax.apply_updates(w, updates), state), None

    return jax.lax.scan(step, (start, optimizer.init(start)), jnp.arange(num_steps))[0][0]


def test_one_normal_direction_is_exact():
    """main = (nᵀw - c)² / 2, auxiliary = |w - t|² / 2: both parts contract by known factors."""
    with jax.enable_x64(True):
        draw = np.random.default_rng(0).standard_normal
        n, target, start = draw(5) / 3, draw(5), draw(5)
        rate, weight, c, steps = 0.3, 0.4, 0.8, 60
        optimizer = optax.chain(bloop(weight), optax.sgd(rate))

        def gradients(w, i):
            return (w @ n - c) * n, w - target

        found = jax.jit(lambda w: descended(optimizer, w, gradients, steps))(start)
    unit = n / np.linalg.norm(n)
    along = np.outer(unit, unit)
    on_set = target + (c - n @ target) * n / (n @ n)  # the auxiliary minimum on the set
    distance = (1 - rate * n @ n) ** steps * along @ (start - on_set)
    tangent = (1 - rate * weight) ** steps * (np.eye(5) - along) @ (start - on_set)
    np.testing.assert_allclose(found, on_set + distance + tangent, atol=1e-12)
    compromise = np.linalg.solve(np.outer(n, n) + weight * np.eye(5), c * n + weight * target)
    assert np.linalg.norm(compromise - on_set) > 0.1  # where the sum of the losses ends


def test_two_normal_directions_and_a_floor_that_falls_with_the_rate():
    """The minimiser set of |P w - c|² / 2 in five dimensions, at two constant rates."""
    with jax.enable_x64(True):
        draw = np.random.default_rng(1).standard_normal
        p, c, target = draw((2, 5)) / 2, draw(2), draw(5)
        on_set = target + np.linalg.pinv(p) @ (c - p @ target)

        def gradients(w, i):
            return p.T @ (p @ w - c), w - target

        def end(rate):
            optimizer = optax.chain(bloop(0.3), optax.sgd(rate))
            return descended(optimizer, jnp.zeros(5), gradients, 20_000)

        found = np.asarray(jax.jit(jax.vmap(end))(np.array([0.04, 0.004])))
    away = np.linalg.norm(found - on_set, axis=1)
    compromise = np.linalg.solve(p.T @ p + 0.3 * np.eye(5), p.T @ c + 0.3 * target)
    assert np.linalg.norm(compromise - on_set) > 0.1
    assert away[0] < 0.05
    assert away[1] < 0.25 * away[0]


def test_the_average_is_what_noisy_gradients_need():
    """512 chains with noise of sd 1 on the main gradient, one normal direction of 20."""
    target, rate, weight = 2.0, 0.05, 0.5

    def end(decay, key):
        optimizer = optax.chain(bloop(weight, decay=decay), optax.sgd(rate))

        def gradients(w, i):
            noise = jax.random.normal(jax.random.fold_in(key, i), w.shape)
            return w * (jnp.arange(20) == 0) + noise, w - target

        return descended(optimizer, jnp.zeros(20), gradients, 400)[0]

    keys = jax.random.split(jax.random.key(0), 256)
    over = jax.vmap(jax.vmap(end, (None, 0)), (0, None))
    found = np.asarray(jax.jit(over)(np.array([0.0, 0.99], np.float32), keys))
    errors = found.std(1) / 16
    compromise = weight * target / (1 + weight)
    assert abs(found[0].mean() - compromise) < 0.2 * compromise  # hardly anything was removed
    assert found[1].mean() + 4 * errors[1] < 0.6 * found[0].mean()


def test_numbers_that_change_and_skipped_steps():
    """Injected hyperparameters, and ``apply_if_finite`` behind it."""
    optimizer = optax.chain(
        optax.inject_hyperparams(bloop)(weight=lambda count: 1.0 / (count + 1), decay=0.5),
        optax.apply_if_finite(optax.sgd(1.0), 5),
    )
    main, other = np.array([1.0, 0.0], np.float32), np.array([5.0, 4.0], np.float32)
    state = jax.jit(optimizer.init)(main)
    update = jax.jit(lambda g, s: optimizer.update(g, s, g, auxiliary=other))
    for i in range(2):
        found, state = update(main, state)
        np.testing.assert_allclose(found, [-1.0, -4.0 / (i + 1)], rtol=1e-6)
    found, state = update(main * np.float32("nan"), state)
    np.testing.assert_array_equal(found, 0)
    found, _ = update(main, state)
    np.testing.assert_allclose(found, [-1.0, -1.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: bloop(-1.0), ValueError, "`weight` must be at least 0"),
        (lambda: bloop(mistyped("1")), TypeError, "`weight` must be a number"),
        (lambda: bloop(1.0, decay=1.0), ValueError, r"`decay` must be in \[0, 1\); got 1.0"),
        (lambda: bloop(1.0).init({"n": np.arange(3)}), TypeError, "params"),
        (lambda: call(auxiliary=None), ValueError, "needs the gradient of the auxiliary loss"),
        (lambda: call(auxiliary=[np.ones(2)]), ValueError, "a pytree like `updates`"),
        (lambda: call(auxiliary={"a": np.ones(3)}), ValueError, "auxiliary.'a'. is"),
    ],
)
def test_errors(make, error, says):
    with pytest.raises(error, match=says):
        make()


def call(**given):
    optimizer, updates = ug.bilevel.bloop(1.0), {"a": np.ones(2, np.float32)}
    return optimizer.update(updates, jax.eval_shape(optimizer.init, updates), **given)
