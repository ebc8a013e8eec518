"""Self-tuning networks through ``ug.fit``: alternation, warm-up, checkpoints, the schedule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug

KINDS = {"decay": ug.constraints.positive, "drop": ug.constraints.box(0.0, 0.9)}
DATA = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
WARM_UP, STEPS = 10, 40


def loss(theta, params, batch, key):
    """Ridge regression with dropout of its inputs."""
    values = ug.constraints.constrain(KINDS, theta)
    keep = jax.random.bernoulli(key, 1 - values["drop"], batch.shape) / (1 - values["drop"])
    fit = jnp.mean(((batch * keep) @ params["w"] - batch[:, 0]) ** 2)
    return fit + values["decay"] * jnp.sum(params["w"] ** 2)


@functools.cache
def estimator():
    data = jnp.asarray(DATA)
    return ug.stn.delta_stn(
        loss=loss,
        meta_loss=lambda theta, params, key: jnp.mean((data @ params["w"] - data[:, 0]) ** 2),
        init_params=lambda key: {"w": jnp.zeros(4)},
        sample_batch=lambda key: jax.random.choice(key, data, (16,)),
        inner_optimizer=optax.sgd(0.05),
        response_optimizer=optax.adam(0.01),
        sigma=0.3,
        train_steps=5,
        num_perturbations=4,
        warm_up=WARM_UP,
    )


OPTIMIZER = optax.rmsprop(0.05)


def fit(num_steps, **kwargs):
    theta = ug.constraints.unconstrain(KINDS, {"decay": 0.1, "drop": 0.5})
    key = jax.random.key(3)
    return ug.fit(
        estimator(), theta, OPTIMIZER, num_steps=num_steps, key=key, steps_per_dispatch=20, **kwargs
    )


@pytest.fixture(scope="module")
def whole():
    return fit(STEPS)


def test_alternation_warm_up_and_descent(whole):
    history = whole.history
    assert np.all(history["inner_steps"] == 5)
    assert history["theta"].shape == history["sigma"].shape == (STEPS, 2)
    warm = slice(0, WARM_UP + 1)
    for name in ("theta", "sigma"):
        assert np.all(history[name][warm] == history[name][0])
        assert np.all(history[name][WARM_UP + 1] != history[name][0])
    assert np.all(history["grad_norm"][:WARM_UP] == 0)
    assert np.all(history["grad_norm"][WARM_UP:] > 0)
    assert history["train_loss"][WARM_UP] < 0.7 * history["train_loss"][0]  # weights trained
    values = ug.constraints.constrain(KINDS, whole.theta)
    assert values["decay"] < 0.08  # neither helps: the targets are exact
    assert values["drop"] < 0.45
    assert history["loss"][-1] < history["loss"][WARM_UP]


def test_a_checkpoint_resumes_bit_for_bit(whole, tmp_path):
    fit(STEPS // 2, checkpoint_dir=tmp_path)
    again = fit(STEPS, checkpoint_dir=tmp_path)
    assert set(again.history) == set(whole.history)
    for name, x in whole.history.items():
        np.testing.assert_array_equal(again.history[name], x)
    for a, b in zip(jax.tree.leaves(again.theta), jax.tree.leaves(whole.theta), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_schedule_in_its_own_units(whole):
    found = ug.stn.schedule(whole.history, whole.theta, KINDS)
    np.testing.assert_allclose(found.values["decay"], np.exp(whole.history["theta"][:, 0]), 1e-6)
    np.testing.assert_allclose(found.values["decay"][0], 0.1, rtol=1e-5)
    np.testing.assert_allclose(found.values["drop"][0], 0.5, rtol=1e-5)
    assert list(found.steps[:3]) == [0, 5, 10]
    for step, call in ((0, 0), (64, 12), (65, 13), (10**6, STEPS - 1)):
        assert float(found.at(step)["drop"]) == found.values["drop"][call]
    replayed = jax.jit(jax.vmap(found.at))(jnp.arange(5 * STEPS))
    np.testing.assert_array_equal(replayed["decay"], np.repeat(found.values["decay"], 5))


def test_the_picture_of_the_schedule(whole):
    pytest.importorskip("matplotlib")
    found = ug.stn.schedule(whole.history, whole.theta, KINDS)
    axes = found.plot().axes
    assert [a.get_ylabel() for a in axes] == ["decay", "drop", "validation\nloss"]
    np.testing.assert_array_equal(axes[1].lines[0].get_ydata(), found.values["drop"])
    np.testing.assert_array_equal(axes[1].lines[0].get_xdata(), found.steps)


def test_average_runs_replicas(whole):
    """Each trains by itself, and the gradient is their mean."""
    average = ug.average(estimator(), 2)
    state = average.init(jax.random.key(0), whole.theta)
    out, after = average.estimate(jax.random.key(1), whole.theta, state)
    assert out.info.inner_steps == 10
    assert np.all(np.asarray(after.episode.t) == 2)
