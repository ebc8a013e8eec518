"""``diagnose`` end to end: traps in which a naive tool would recommend the wrong estimator."""

import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from tests.helpers import counted, present, raises
from unrollgrad.diagnostics import diagnose

KEY = jax.random.key(0)
DERIVATIVES = {"bptt", "tbptt", "forward_mode", "dodge", "pes_analytic", "pes_analytic_replacement"}
ONE_DRAW = {"es_single", "full_es"}


def problem(step, horizon=20, init=None):
    """A problem with a scalar state that begins near 1, in every episode elsewhere."""

    def first(key, theta):
        return 1 + 0.1 * jax.random.normal(key)

    return ug.UnrolledProblem(init or first, step, horizon)


def decay(theta):
    return jnp.tanh(theta["rate"])


def traps():
    """Problems by name; each with a theta, and changes of the arguments."""
    theta = {"rate": jnp.float32(0.5)}
    dead = {"rate": jnp.float32(0.5), "unused": jnp.zeros(3)}

    def plain(key, theta, state, t):
        state = decay(theta) * state + 0.1 * jax.random.normal(key)
        return state, state**2

    def with_loop(key, theta, state, t):
        def body(carry):
            i, x = carry
            return i + 1, x * decay(theta)

        _, state = jax.lax.while_loop(lambda c: c[0] < 1 + t % 2, body, (0, state))
        return state + 0.1, state**2

    def jumps(key, theta, state, t):
        rate = jnp.round(20 * theta["rate"] + jax.random.uniform(key)) / 20
        state = 0.5 * state + rate
        return state, state**2

    def from_init(key, theta):
        return theta["rate"] + 0.1 * jax.random.normal(key)

    def fading(key, theta, state, t):
        return 0.9 * state, state**2

    def fragile(key, theta, state, t):
        rate = jnp.where(theta["rate"] > 0.505, jnp.nan, theta["rate"])
        state = rate * state + 0.1
        return state, state**2

    def rare(key, theta):
        return jnp.float32(1.0), jax.random.bernoulli(key, 0.15)

    def spikes(key, theta, state, t):
        value, spiky = state
        value = 0.5 * value + theta["rate"]
        return (value, spiky), value**2 + jnp.where(spiky, jnp.sin(1e4 * theta["rate"]), 0.0)

    return {
        "plain": (problem(plain), theta, {}),
        "dead leaf": (problem(plain), dead, {}),
        "while_loop": (problem(with_loop), theta, {}),
        "jumps": (problem(jumps), theta, {"sigma": 0.05}),
        "theta in init alone": (problem(fading, init=from_init), theta, {}),
        "not finite beyond a threshold": (problem(fragile), theta, {}),
        "heavy tail": (problem(spikes, init=rare), theta, {"sigma": 0.05}),
        "influence balancing": (*ug.problems.influence_balancing(horizon=100), {"truncation": 10}),
    }


@functools.cache
def found(name):
    of, theta, changes = traps()[name]
    settings: dict[str, Any] = {"truncation": 5, "num_workers": 16, **changes}
    return diagnose(of, theta, key=KEY, **settings)


def row(diagnosis, name):
    return next(r for r in diagnosis.ranking if r.name == name)


def test_smooth_problems_are_differentiated():
    assert found("plain").recommendation.name in ("bptt", "forward_mode", "dodge")
    assert found("plain").measurements.calibrated()


@pytest.mark.filterwarnings("ignore:.*cannot influence the loss")
def test_a_dead_leaf_costs_evolution_strategies_and_not_backpropagation():
    plain, dead = found("plain"), found("dead leaf")
    assert dead.recommendation.name in ("bptt", "forward_mode")
    ratio = row(dead, "es_single").nmse / row(plain, "es_single").nmse
    assert 1.5 < ratio < 4  # P + 1 = 5 in place of 2


def test_a_loop_without_reverse_derivatives():
    best = found("while_loop").recommendation
    assert best.name not in DERIVATIVES
    assert "while_loop" in found("while_loop").measurements.obstacle


def test_jumps_that_derivatives_do_not_see():
    diagnosis = found("jumps")
    assert diagnosis.recommendation.name not in DERIVATIVES
    assert row(diagnosis, "bptt").nmse > 0.5  # what it misses is most of the gradient


def test_theta_through_init_alone():
    """Truncation forgets all of it after the first window."""
    diagnosis = found("theta in init alone")
    assert diagnosis.recommendation.name in ("bptt", "forward_mode", "dodge")
    assert row(diagnosis, "tbptt").nmse > row(diagnosis, "bptt").nmse


def test_sigma_stays_where_losses_are_finite():
    diagnosis = found("not finite beyond a threshold")
    assert diagnosis.measurements.details.sigma < 0.005 / 4  # Gaussian noise is larger than sigma
    assert not diagnosis.measurements.details.sweep.finite().all()
    assert np.isfinite(diagnosis.recommendation.nmse)


def test_a_heavy_tail_with_a_finite_median():
    """Gradients of rare episodes are 10^4 times the median."""
    diagnosis = found("heavy tail")
    assert present(diagnosis.measurements.derivatives).tail > 1e4
    assert "heavy tail" in row(diagnosis, "bptt").reason
    assert diagnosis.recommendation.name in {"es_single", "full_es", "gpes", "pes", "truncated_es"}


def test_short_windows_with_the_wrong_sign():
    """All exponents are negative, and windows of 10 steps point uphill."""
    diagnosis = found("influence balancing")
    assert np.mean(diagnosis.measurements.details.exponents) < 0
    assert diagnosis.recommendation.name in ("bptt", "forward_mode", "dodge")
    for name in ("tbptt", "truncated_es"):
        assert row(diagnosis, name).nmse > 1


def test_sigma_under_the_resolution():
    of, theta, _ = traps()["plain"]
    with raises(ValueError, "sigma=1e-09", "resolution"):
        diagnose(of, theta, key=KEY, truncation=5, num_workers=4, sigma=1e-9)


def test_a_loss_that_is_never_finite():
    def step(key, theta, state, t):
        return state, jnp.log(-1 - theta["rate"] ** 2)

    with raises(ValueError, "not finite for any sigma"):
        diagnose(problem(step), {"rate": jnp.float32(0.5)}, key=KEY, truncation=5, num_workers=4)


def test_a_sampled_horizon_excludes_whole_episodes():
    of, theta, _ = traps()["plain"]
    of = of._replace(horizon=lambda key: jax.random.randint(key, (), 15, 26))
    diagnosis = diagnose(of, theta, key=KEY, truncation=5, num_workers=4)
    for name in ("bptt", "full_es"):
        assert "sampled" in row(diagnosis, name).reason
    assert diagnosis.recommendation.admissible
    with raises(ValueError, "`truncation` is needed"):
        diagnose(of, theta, key=KEY, num_workers=4)


def test_a_memory_limit():
    of, theta, changes = traps()["influence balancing"]
    least = row(found("influence balancing"), "bptt").bytes
    assert least is not None
    diagnosis = diagnose(of, theta, key=KEY, num_workers=16, memory_limit=16 * least - 1, **changes)
    assert "exceed the limit" in row(diagnosis, "bptt").reason
    assert diagnosis.recommendation.name != "bptt"


def test_the_same_seed_gives_the_same_numbers():
    """Costs are timed, and differ; what is estimated does not."""
    of, theta, _ = traps()["plain"]
    again = diagnose(of, theta, key=KEY, truncation=5, num_workers=16)
    a, b = found("plain").measurements, again.measurements
    np.testing.assert_array_equal(a.windows.influence, b.windows.influence)
    norms = [present(m.derivatives).episode_norm for m in (a, b)]
    np.testing.assert_array_equal(norms[0], norms[1])


def test_programs():
    """Three large ones: pairs, backpropagation, the exponent; the others are keys and constants."""
    of, theta, _ = traps()["plain"]
    with counted() as programs:
        diagnose(of, theta, key=KEY, truncation=4, num_workers=16)
    with counted() as again:
        diagnose(of, theta, key=KEY, truncation=4, num_workers=16)
    assert again[0] == 3
    assert programs[0] <= 12


def test_table_and_files(capsys, tmp_path):
    diagnosis = found("influence balancing")
    diagnosis.table()
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for word in ("bptt", "es_single", "16 workers", "Use ", "error", "exp("):
        assert word in text
    folder = diagnosis.save(tmp_path / "found")
    assert {p.name for p in folder.iterdir()} == {"ranking.csv", "summary.json", "figure.png"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["ranking"][0]["name"] == diagnosis.recommendation.name
    assert re.match(r"Use \w+", summary["verdict"][0])
