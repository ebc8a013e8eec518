"""OSGM and KFAC, the baselines of the APO experiments, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.apo import rivals


def test_osgm_finds_the_best_diagonal():
    """On a diagonal quadratic the scales become 1 / h, where one step reaches the minimum."""
    h = np.array([0.2, 1.0, 3.0], np.float32)
    loss = lambda w, batch: jnp.sum(h * w**2) / 2  # noqa: E731
    optimizer = rivals.osgm(0.1, 0.3)

    def step(state, w):
        _, state = optimizer.update(h * w, state, w, loss=loss, batch=None)
        return state, None

    draws = np.random.default_rng(0).normal(size=(10_000, 3)).astype(np.float32)
    run = jax.jit(lambda draws: jax.lax.scan(step, optimizer.init(draws[0]), draws)[0])
    np.testing.assert_allclose(run(draws).scales, 1 / h, rtol=1e-3)


def test_osgm_takes_no_step_that_raises_the_loss():
    h, w = np.array([0.2, 1.0, 3.0], np.float32), np.ones(3, np.float32)
    loss = lambda w, batch: jnp.sum(h * w**2) / 2  # noqa: E731

    @jax.jit
    def update(initial):
        optimizer = rivals.osgm(initial, 0.1)
        return optimizer.update(h * w, optimizer.init(w), w, loss=loss, batch=None)

    for initial, moves in ((0.5, True), (1.0, False)):  # 1.0 > 2 / 3 raises the loss
        moved, state = update(initial)
        np.testing.assert_allclose(moved, -initial * h * w if moves else np.zeros(3))
        gradient = h**2 * w**2 * (1 - initial * h)  # of the feedback, times -|g|²
        np.testing.assert_allclose(
            state.scales, initial + 0.1 * gradient / np.sum(h**2 * w**2), rtol=1e-5
        )


def test_kfac_solves_a_regression_in_one_step():
    """For one matrix and squared error KFAC is Newton: a step of 1 ends at the minimum."""
    draws = np.random.default_rng(0)
    x, y = draws.normal(size=(50, 4)), draws.normal(size=(50, 3))

    def loss(params):
        return jnp.mean(jnp.sum((x @ params["w"] - y) ** 2, axis=-1)) / 2

    def factors(params, batch):
        return {"w": (x.T @ x / 50, jnp.eye(3))}

    with jax.enable_x64(True):
        optimizer, params = rivals.kfac(1.0, 1e-14, factors), {"w": jnp.zeros((4, 3))}

        @jax.jit
        def update():
            gradient = jax.grad(loss)(params)
            moved, _ = optimizer.update(gradient, optimizer.init(params), params, batch=None)
            return optax.apply_updates(params, moved)["w"]

        np.testing.assert_allclose(update(), np.linalg.lstsq(x, y)[0], rtol=1e-5)


def test_kfac_damping_is_factored():
    """(A + π √γ I) X (B + √γ / π I) = G, where π² is the ratio of their mean eigenvalues."""
    a, b = np.diag([4.0, 2.0]).astype(np.float32), np.diag([1.0, 0.5]).astype(np.float32)
    gradient = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    optimizer = rivals.kfac(0.5, 0.04, lambda params, batch: {"w": (a, b)})
    moved = jax.jit(
        lambda g: optimizer.update({"w": g}, optimizer.init({"w": g}), {"w": g}, batch=None)[0]
    )(gradient)["w"]
    ratio = np.sqrt(3.0 / 0.75)
    left, right = np.diag(a) + ratio * 0.2, np.diag(b) + 0.2 / ratio
    np.testing.assert_allclose(moved, -0.5 * gradient / np.outer(left, right), rtol=1e-5)
