"""Steps that would raise their own proximal objective are shortened; without that APO diverges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unrollgrad import apo
from unrollgrad.apo import _safeguard


@jax.jit
def shares(before, slopes, curvatures, lowered):
    """Shares of a step on the parabolas before + slope s + curvature s² / 2."""

    def one(slope, curvature):
        known = _safeguard.begin()._replace(lowered=lowered, weight=jnp.float32(1))
        at = lambda s: before + slope * s + curvature * s**2 / 2  # noqa: E731
        too_long = _safeguard.is_too_long(known, before, at(1.0))
        scale = _safeguard.share(too_long, before, at)
        return scale, _safeguard.remember(known, too_long, before, at(1.0), scale)

    return jax.vmap(one)(slopes, curvatures)


def test_the_share_of_a_parabola():
    """The largest 2^-k up to -2 slope / curvature, where the parabola is back at its beginning."""
    curvatures = np.array([1.9, 2.1, 3.9, 4.1, 3000.0], np.float32)
    scale, after = shares(1.0, -np.ones(5, np.float32), curvatures, 0.0)
    np.testing.assert_array_equal(scale, [1, 0.5, 0.5, 0.25, 2**-11])
    np.testing.assert_array_equal(after.shortened, [False, True, True, True, True])
    np.testing.assert_array_equal(after.total_shortened, [0, 1, 1, 1, 1])


def test_steps_that_lead_up_are_left_out_and_small_rises_are_taken():
    slopes, curvatures = np.array([1.0, 1.0], np.float32), np.zeros(2, np.float32)
    scale, _ = shares(1.0, slopes, curvatures, 0.3)  # a rise of 1 > 3 * 0.3
    assert np.all(scale < 1e-6)  # no more than the rounding of 1
    scale, after = shares(1.0, slopes, curvatures, 0.4)
    assert np.all(scale == 1)
    np.testing.assert_allclose(after.lowered, 0.9 * 0.4)  # a step that raises counts as 0
    assert np.all(shares(np.nan, slopes, curvatures, 0.0)[0] == 1)  # there is nothing to compare


def residuals(point, _):
    x, y = point
    return jnp.sqrt(2.0) * jnp.stack([1 - x, 10 * (y - x**2)])


def rosenbrock(point, _):
    return jnp.sum(residuals(point, None) ** 2) / 2


MAKERS = {
    "learning_rate": functools.partial(apo.learning_rate, optax.sgd, lambda_fsd=1.0),
    "momentum": functools.partial(
        apo.learning_rate, lambda rate: optax.sgd(rate, momentum=0.9), lambda_fsd=1.0
    ),
    "preconditioner": functools.partial(apo.preconditioner, structure=apo.dense(), lambda_fsd=10.0),
}


def descent(make, num_steps, interval=1):
    """Values of Rosenbrock's function along 5 paths, and the number of shortened steps."""
    optimizer = make(1e-3, lambda_wsd=0.0, discrepancy=apo.squared_error, meta_interval=interval)

    def step(carry, _):
        point, state = carry
        updates, state = optimizer.update(
            jax.grad(rosenbrock)(point, None), state, point,
            loss=rosenbrock, predict=residuals, batch=0.0, other_batch=0.0,
        )  # fmt: skip
        point = optax.apply_updates(point, updates)
        return (point, state), rosenbrock(point, None)

    def path(start):
        carry = start, optimizer.init(start)
        (_, state), values = jax.lax.scan(step, carry, length=num_steps)
        return values, state.safeguard.total_shortened

    starts = np.array([-1.0, 1.5]) + 0.05 * np.random.default_rng(0).normal(size=(5, 2))
    return map(np.asarray, jax.jit(jax.vmap(path))(starts))


@pytest.mark.parametrize("name", MAKERS)
def test_noiseless_descent_ends_at_the_minimum(name, monkeypatch):
    """At (1, 1) Rosenbrock's function is 0; without the safeguard every path ends in NaN."""
    with jax.enable_x64(True):
        values, shortened = descent(MAKERS[name], 2000)
        assert np.all(values[:, -1] < (1e-20 if name == "preconditioner" else 0.01))
        assert np.all(shortened > 0)
        assert np.all(values.max(axis=1) < 1.5 * values[:, 0])
        if name == "momentum":
            return  # its paths end there without the safeguard too
        monkeypatch.setattr(_safeguard, "is_too_long", lambda *numbers: jnp.bool_(False))
        values, shortened = descent(MAKERS[name], 800)  # a negative control
        assert np.any(~np.isfinite(values))
        assert np.all(shortened == 0)


def slope_noise(seed, num_steps):
    """Noise of the gradients of a mini-batch."""
    return np.random.default_rng(seed).normal(size=(num_steps, 4)).astype(np.float32)


HESSIAN = np.array([0.01, 0.1, 1.0, 10.0], np.float32)


def quadratic(w, noise):
    return jnp.sum(HESSIAN * w**2) / 2 + noise @ w


@functools.cache
def training(momentum, interval):
    """Training on the quadratic, compiled once: values, the last state and weights."""

    @jax.jit
    def run(rate, noise):
        optimizer = apo.learning_rate(
            lambda rate: optax.sgd(rate, momentum=momentum), rate, lambda_fsd=0.0, lambda_wsd=0.1,
            meta_interval=interval,
        )  # fmt: skip

        def step(carry, noise):
            w, state = carry
            gradient = jax.grad(quadratic)(w, noise)
            updates, state = optimizer.update(gradient, state, w, loss=quadratic, batch=noise)
            w = optax.apply_updates(w, updates)
            return (w, state), quadratic(w, jnp.zeros(4))

        w = jnp.ones(4)
        (w, state), values = jax.lax.scan(step, (w, optimizer.init(w)), noise)
        return values, state, w

    return run


@pytest.mark.parametrize("interval", [1, 10])
def test_a_rate_that_begins_far_too_high(interval):
    """At 1000 times the limit of stability the loss never rises, also between the meta-steps."""
    values, state, _ = training(0.0, interval)(200.0, np.zeros((300, 4), np.float32))
    values = np.asarray(values)
    limit = 2 / (10.0 + 0.1)  # of the steepest direction, with lambda_wsd
    assert 0.85 * limit < float(state.hyperparams["learning_rate"]) < 1.15 * limit
    assert np.all(np.diff(values[:50]) <= 1e-6)
    assert values[0] < float(quadratic(jnp.ones(4), jnp.zeros(4)))
    assert 10 < int(optax.tree.get(state, "total_shortened")) < 150
    assert values[-1] < 1e-2


def test_mini_batches_are_not_touched():
    """With noise and momentum the safeguard shortens no step, although some raise the loss."""
    values, state, _ = training(0.9, 1)(0.001, slope_noise(0, 300))
    assert int(state.safeguard.total_shortened) == 0
    assert np.mean(np.diff(values) > 0) > 0.1


def test_reverse_mode_passes_shortened_steps():
    """The derivative with respect to the noise is the difference quotient."""
    run, noise = training(0.0, 1), slope_noise(1, 4)

    @jax.jit
    def end(scale):
        _, state, w = run(5.0, scale * noise)
        return jnp.sum(w), state.safeguard.total_shortened

    slope, shortened = jax.jit(jax.grad(end, has_aux=True))(1.0)
    assert int(shortened) > 0
    found = (end(1.005)[0] - end(0.995)[0]) / 0.01
    np.testing.assert_allclose(slope, found, rtol=0.02)
