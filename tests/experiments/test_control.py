"""``control`` at smoke scale: all methods learn, truncated ES less than the others."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from experiments._framework import experiment as framework
from experiments._framework import results, tuning
from experiments.estimators import control
from experiments.problems.swimmer import swimmer
from tests.helpers import present, raises
from tests.stored import expect


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(control.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(control.EXPERIMENT, settings))
    summary = results.read_summary(folder)
    claims = control.claims(summary)
    assert len(claims) == 9
    assert all(claim.holds is None for claim in claims)  # one seed
    assert [claim.ours == "not run" for claim in claims].count(True) == 6
    assert "steps to full ES's J" in capsys.readouterr().out
    records = results.read(folder)
    for name in ("full_es", "es_single"):
        assert summary.find("inner_steps", estimator=name)["mean"] == settings.budget
    first = {r.value for r in records if r.metric == "loss" and r.step == 0}
    assert len(first) == 1
    after = {
        name: summary.find("loss", estimator=name)["mean"]
        for name in ("full_es", "truncated_es", "es_single")
    }
    assert all(loss < 0.2 * min(first) for loss in after.values())
    expect("control experiment", {"before": first.pop(), "full_es": after["full_es"]})


def test_one_update_of_few_pairs_costs_what_a_window_does():
    settings = control.SCALES["cpu"]
    problem, _ = control.PROBLEMS[settings.problem](settings.horizon)
    costs = {name: cost for name, (_, cost) in control.estimators(settings, problem).items()}
    assert costs == {
        "full_es": 20_000,
        "full_es_few": 2000,
        "truncated_es": 2100,
        "pes": 2000,
        "es_single": 2000,
        "nres": 2000,
    }


def test_along_a_curve():
    curve = [(0, 0.0), (10, -1.0), (20, -0.5), (30, -2.0)]
    assert control.loss_at(25, curve) == -0.5
    assert control.loss_at(30, curve) == -2.0
    assert control.steps_to(-0.7, curve) == 10
    assert control.steps_to(-3.0, curve) == float("inf")


def test_pairs_that_do_not_divide(tmp_path):
    settings = dataclasses.replace(control.SCALES["smoke"], out=tmp_path, num_pairs=5)
    with raises(ValueError, "`--num-pairs` must be a multiple of the 10 windows", "got 5"):
        framework.execute(control.EXPERIMENT, settings)


def test_steps_to():
    curve = [(0, 3.0), (10, 1.0), (20, 2.0), (30, 0.5)]
    assert control.steps_to(1.0, curve) == 10
    assert control.steps_to(0.6, curve) == 30
    assert control.steps_to(0.1, curve) == math.inf


def test_claims_can_fail():
    def found(metric, steps):
        return [
            {"estimator": n, "metric": metric, "mean": m, "se": 1.0, "n": 3}
            for n, m in steps.items()
        ]

    steps = {"full_es": 10.0, "full_es_few": 5.0, "pes": 7.0, "es_single": 9.0, "nres": None}
    summary = results.Summary(found("steps", steps), {"config": {"problem": "swimmer"}})
    holds = {claim.says: claim.holds for claim in control.claims(summary)}
    assert holds["pes reaches full ES's J in fewer environment steps than full_es"] is True
    assert holds["es_single reaches full ES's J in fewer environment steps than full_es"] is False
    assert holds["nres reaches full ES's J in fewer environment steps than full_es"] is False


@pytest.mark.experiments
@pytest.mark.parametrize(("rates", "best"), [((0.1, 1.0, 3.0), 1.0), ((0.1, 1e30), 0.1)])
def test_best_rate_of_a_parabola(rates, best):
    """Gradient descent on x^2 / 2 arrives in one step with the rate 1 and diverges with 3."""
    problem = ug.UnrolledProblem(
        init=lambda key, x: x, step=lambda key, x, state, t: (state, x**2 / 2), horizon=1
    )
    trial = tuning.Trial(
        ug.bptt(problem), optax.sgd, num_steps=4, every=2, loss=lambda x: x**2 / 2 + 1e-3
    )
    keys = jax.random.split(jax.random.key(0), 2)
    found = tuning.best_rate(trial, rates, keys, jnp.float32(1))
    assert found == best


@pytest.mark.experiments
def test_the_swimmer():
    """It rests without motors; forces and momentum balance; some policies swim."""
    problem, theta = swimmer(300)
    losses = jax.vmap(lambda key: ug.episode_loss(problem, key, theta))
    keys = jax.random.split(jax.random.key(0), 8)
    assert abs(jnp.mean(losses(keys))) < 0.01
    draws = 0.5 * jax.random.normal(jax.random.key(1), (64, *theta.shape))
    found = jax.lax.map(lambda theta: ug.episode_loss(problem, keys[0], theta), draws)
    assert jnp.all(jnp.isfinite(found))
    assert found.min() < -0.1


@pytest.mark.experiments
def test_the_swimmer_moves_as_lagrange_says():
    """One short step satisfies the links' Euler-Lagrange equations, derived by autodiff."""
    links, dt = 3, 0.02
    key = jax.random.key(3)
    angles, rates = jax.random.normal(key, (2, links))
    moving = jnp.array([0.3, -0.2])
    theta = jax.random.normal(key, (2, 8))

    def middles(q):
        along = jnp.stack([jnp.cos(q[2:]), jnp.sin(q[2:])], axis=-1)
        ends = q[:2] + jnp.concatenate([jnp.zeros((1, 2)), jnp.cumsum(along, axis=0)])
        return (ends[:-1] + ends[1:]) / 2

    def energy(q, v):
        velocity = jax.jvp(middles, (q,), (v,))[1]
        return 0.5 * jnp.sum(velocity**2) + 0.5 * jnp.sum(v[2:] ** 2) / 12

    q, v = jnp.concatenate([jnp.zeros(2), angles]), jnp.concatenate([moving, rates])
    velocity = jax.jvp(middles, (q,), (v,))[1]
    along = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    normals = jnp.stack([-along[:, 1], along[:, 0]], axis=-1)
    drag = -0.1 * jnp.sum(velocity * along, 1, keepdims=True) * along
    drag -= 5.0 * jnp.sum(velocity * normals, 1, keepdims=True) * normals
    (force,) = jax.vjp(middles, q)[1](drag)
    seen = jnp.concatenate([angles[:1], jnp.diff(angles), velocity.mean(axis=0), rates])
    torques = 3 * jnp.tanh(theta @ seen / 3)
    joints = jnp.diff(angles)
    held = torques - 20 * jnp.sign(joints) * jnp.maximum(jnp.abs(joints) - jnp.pi / 2, 0)
    force += jnp.concatenate(
        [jnp.zeros(2), jnp.diff(jnp.concatenate([jnp.zeros(1), held, jnp.zeros(1)])) * -1]
    )
    force = force.at[2:].add(-0.4 * rates)
    mass = jax.hessian(energy, 1)(q, v)
    swept = jax.jvp(lambda q: jax.grad(energy, 1)(q, v), (q,), (v,))[1]
    expected = v + dt * jnp.linalg.solve(mass, force + jax.grad(energy)(q, v) - swept)

    problem, _ = swimmer(1, substeps=1)
    state = {"angles": angles, "moving": moving, "rates": rates}
    state, _ = problem.step(key, theta, state, jnp.int32(0))
    got = jnp.concatenate([state["moving"], state["rates"]])
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
