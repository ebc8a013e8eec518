"""``training_problem``: any loss, any optax optimizer, theta anywhere; ``final_loss``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import numbers, raises

KEY = jax.random.key(0)


def make(optimizer, horizon=8, **changes):
    arguments: dict[str, Any] = {
        "loss": lambda theta, w, batch, key: jnp.mean((w["w"] - batch) ** 2),
        "init_params": lambda key: {"w": jax.random.normal(key, (3,))},
        "optimizer": optimizer,
        "sample_batch": lambda key: 1 + 0.1 * jax.random.normal(key, (3,)),
        "horizon": horizon,
    }
    return ug.training_problem(**arguments | changes)


def estimates(problem, theta, *factories):
    """The estimates of each estimator's first call, all in one program."""

    def both(theta):
        made = [factory(problem) for factory in factories]
        return [e.estimate(KEY, theta, e.init(KEY, theta))[0] for e in made]

    return numbers(jax.jit(both)(theta))


def pes(problem):
    return ug.pes(problem, truncation=4, sigma=0.1)


@pytest.mark.parametrize("meta_loss", [None, "before"])
def test_it_is_the_loop_written_by_hand(meta_loss):
    """SGD with momentum: losses and hypergradient equal a Python loop and its jax.grad."""
    problem = make(
        lambda theta, t: optax.sgd(jnp.exp(theta["log_lr"]), theta["momentum"]),
        meta_loss=meta_loss,
    )
    theta = {"log_lr": jnp.log(jnp.float32(0.2)), "momentum": jnp.float32(0.7)}

    def by_hand(theta):
        w = jax.random.normal(jax.random.fold_in(KEY, 0), (3,))
        velocity, losses = jnp.zeros(3), []
        for t in range(8):
            key = jax.random.fold_in(jax.random.fold_in(KEY, 1), t)
            batch = 1 + 0.1 * jax.random.normal(jax.random.split(key, 3)[0], (3,))
            velocity = theta["momentum"] * velocity + 2 * (w - batch) / 3
            new = w - jnp.exp(theta["log_lr"]) * velocity
            losses.append(jnp.mean(((w if meta_loss == "before" else new) - batch) ** 2))
            w = new
        return jnp.mean(jnp.stack(losses))

    (estimate,) = estimates(problem, theta, ug.bptt)
    value, grad = jax.jit(jax.value_and_grad(by_hand))(theta)
    np.testing.assert_allclose(estimate.loss, value, rtol=1e-5)
    for name in theta:
        np.testing.assert_allclose(estimate.grad[name], grad[name], rtol=1e-4)


OPTIMIZERS = {
    "adam": lambda theta, t: optax.adam(jnp.exp(theta), eps_root=1e-8),
    "adamw with a decay": lambda theta, t: optax.adamw(
        jnp.exp(theta) / (1 + t), weight_decay=1e-3, eps_root=1e-8
    ),
    "rmsprop": lambda theta, t: optax.rmsprop(jnp.exp(theta), eps=1e-4),
    "chain": lambda theta, t: optax.chain(
        optax.clip_by_global_norm(1.0), optax.trace(0.9), optax.scale(-jnp.exp(theta))
    ),
    "injected": lambda theta, t: optax.inject_hyperparams(optax.sgd)(jnp.exp(theta)),
    "learned": lambda theta, t: optax.stateless(
        lambda g, p: jax.tree.map(lambda g: -jnp.exp(theta) * jnp.tanh(g), g)
    ),
    "polyak": lambda theta, t: optax.polyak_sgd(scaling=jnp.exp(theta)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_any_optimizer_through_both_families(optimizer):
    problem, theta = make(optimizer), jnp.log(jnp.float32(0.1))
    exact, estimate = estimates(problem, theta, ug.bptt, lambda p: ug.full_es(p, sigma=1e-2))
    assert np.isfinite(exact.grad)
    assert exact.grad != 0
    # For one scalar and tiny sigma full ES is u^2 g, with u^2 known from its draw.
    noise = jax.random.fold_in(jax.random.fold_in(KEY, 2), 0)
    unit = ug.noise.gaussian().sample(noise, (), theta, 1)[0]
    np.testing.assert_allclose(estimate.grad, unit**2 * exact.grad, rtol=0.02)


def test_line_search_with_its_while_loop():
    problem = make(lambda theta, t: optax.lbfgs(jnp.exp(theta), memory_size=2))
    (estimate,) = estimates(problem, jnp.log(jnp.float32(0.5)), pes)
    assert np.isfinite(estimate.grad)


def test_meta_loss_sees_the_new_weights_and_theta_may_regularise():
    problem = make(
        lambda theta, t: optax.sgd(0.1),
        loss=lambda theta, w, batch, key: (
            jnp.mean((w["w"] - batch) ** 2) + jnp.exp(theta) * jnp.sum(w["w"] ** 2)
        ),
        meta_loss=lambda theta, w, key: jnp.sum(w["w"]),
        horizon=1,
    )
    theta = jnp.float32(-1.0)
    state = problem.init(KEY, theta)
    after, loss = jax.jit(problem.step)(KEY, theta, state, 0)
    np.testing.assert_allclose(loss, np.sum(after.params["w"]), rtol=1e-6)
    exact = jax.jit(jax.grad(lambda x: ug.episode_loss(problem, KEY, x)))(theta)
    start = np.asarray(jax.random.normal(jax.random.fold_in(KEY, 0), (3,)))
    np.testing.assert_allclose(exact, -0.1 * np.exp(-1) * 2 * start.sum(), rtol=1e-4)


def test_streamed_batches_replace_sampled_ones():
    batches = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    problem = make(lambda theta, t: optax.sgd(theta), sample_batch=None)
    estimator, theta = ug.bptt(problem), jnp.float32(0.1)
    state = estimator.init(KEY, theta)
    estimate, other = (
        estimator.estimate(KEY, theta, state, data=data)[0] for data in (batches, batches + 1)
    )
    assert np.isfinite(float(estimate.grad))
    assert float(other.loss) != float(estimate.loss)


def test_bf16_weights():
    """Float32 hyperparameters do not widen the state of bfloat16 weights."""
    theta = jnp.array([-2.0, 0.9])
    for optimizer in [
        lambda theta, t: optax.sgd(jnp.exp(theta[0]), theta[1]),
        lambda theta, t: optax.adam(jnp.exp(theta[0]), b1=theta[1], eps_root=1e-6),
    ]:
        problem = make(optimizer, init_params=lambda key: {"w": jnp.zeros(3, jnp.bfloat16)})
        shapes = jax.eval_shape(problem.init, KEY, theta)
        after, _ = jax.eval_shape(problem.step, KEY, theta, shapes, 0)
        assert {str(x.dtype) for x in jax.tree.leaves(after.params)} == {"bfloat16"}
        assert [x.dtype for x in jax.tree.leaves(after)] == [
            x.dtype for x in jax.tree.leaves(shapes)
        ]
    for estimate in estimates(problem, theta, ug.bptt, pes):
        assert estimate.loss.dtype == np.float32
        assert np.all(np.isfinite(estimate.grad))


def test_params_that_are_not_floating_stay_as_they_are():
    """Counters and keys among the params, as in nnx: the loss sees them, nothing trains them."""
    problem = make(
        lambda theta, t: optax.adam(theta, eps_root=1e-6),
        init_params=lambda key: {"w": jnp.zeros(3), "count": jnp.int32(3), "key": key},
        loss=lambda theta, p, batch, key: jnp.mean((p["w"] - p["count"]) ** 2),
    )
    theta = jnp.float32(0.1)
    state, _ = jax.jit(lambda: problem.step(KEY, theta, problem.init(KEY, theta), 0))()
    assert int(state.params["count"]) == 3
    assert state.params["key"].dtype == KEY.dtype
    np.testing.assert_allclose(state.params["w"], 0.1, rtol=1e-3)
    for estimate in estimates(problem, theta, ug.bptt, pes):
        assert estimate.grad != 0


def test_params_with_functions_are_refused_by_name():
    problem = make(
        lambda theta, t: optax.sgd(theta, 0.9), init_params=lambda key: {"act": [jnp.tanh]}
    )
    with pytest.raises(TypeError, match=r"`init_params` put .*state\['act'\]\[0\].*partition"):
        ug.bptt(problem).estimate(
            KEY, jnp.float32(0.1), ug.bptt(problem).init(KEY, jnp.float32(0.1))
        )


def test_final_loss_is_the_loss_of_the_final_state():
    problem, theta, _ = ug.problems.linear_recurrence(dim=3, horizon=6, memory=0.5)
    final = ug.final_loss(problem, lambda key, theta, s: jnp.sum(s**2))
    s = np.ones(3)
    for _ in range(6):
        s = 0.5 * s + np.asarray(theta)
    np.testing.assert_allclose(ug.episode_loss(final, KEY, theta), np.sum(s**2), rtol=1e-5)


def test_complex_weights_are_trained_as_their_real_and_imaginary_parts():
    target = jnp.array([1 + 2j, -1 - 1j], jnp.complex64)
    parts = jnp.concatenate([target.real, target.imag])

    def j_and_gradient(target):
        problem = ug.training_problem(
            loss=lambda theta, w, batch, key: jnp.sum(jnp.abs(w - target) ** 2),
            init_params=lambda key: jnp.zeros_like(target),
            optimizer=lambda theta, t: optax.sgd(jnp.exp(theta)),
            sample_batch=lambda key: 0.0,
            horizon=30,
        )
        estimator, key, theta = ug.bptt(problem), jax.random.key(0), jnp.log(0.2)
        out, _ = estimator.estimate(key, theta, estimator.init(key, theta))
        return out.loss, out.grad

    np.testing.assert_allclose(j_and_gradient(target), j_and_gradient(parts), rtol=1e-5)


def test_init_params_may_begin_at_theta():
    """MAML on a quadratic: d/dtheta of the loss after K steps is (1 - rate A)^K A (w_K - a)."""
    curvature, rate, steps = jnp.diag(jnp.array([0.5, 2.0])), 0.1, 5
    goal, theta = jnp.array([1.0, 0.0]), jnp.array([2.0, -1.0])

    def loss(theta, w, batch, key):
        return 0.5 * (w - goal) @ curvature @ (w - goal)

    problem = ug.training_problem(
        loss=loss,
        init_params=lambda key, theta: theta,
        optimizer=lambda theta, t: optax.sgd(rate),
        sample_batch=lambda key: 0.0,
        horizon=steps,
    )
    final = ug.final_loss(problem, lambda key, theta, s: loss(theta, s.params, None, None))
    estimator, key = ug.bptt(final), jax.random.key(0)
    out, _ = estimator.estimate(key, theta, estimator.init(key, theta))
    power = jnp.linalg.matrix_power(jnp.eye(2) - rate * curvature, steps)
    expected = power @ curvature @ power @ (theta - goal)
    np.testing.assert_allclose(out.grad, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("loss", lambda theta, params, batch: 0.0),
        ("meta_loss", lambda params: 0.0),
        ("init_params", lambda: jnp.zeros(2)),
        ("optimizer", lambda theta: optax.sgd(0.1)),
    ],
)
def test_a_function_with_other_arguments_is_named(name, function):
    functions: dict[str, Any] = {
        "loss": lambda theta, params, batch, key: jnp.sum(params**2),
        "init_params": lambda key: jnp.zeros(2),
        "optimizer": lambda theta, t: optax.sgd(theta),
        "sample_batch": lambda key: 0.0,
    }
    estimator = ug.bptt(ug.training_problem(**{**functions, name: function}, horizon=2))
    key, theta = jax.random.key(0), jnp.float32(0.1)
    with raises(TypeError, f"`{name}(", "cannot be called as", f"{name}("):
        jax.eval_shape(lambda: estimator.estimate(key, theta, estimator.init(key, theta)))
