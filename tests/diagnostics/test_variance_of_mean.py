"""The variance of the mean of U updates against closed forms: one window, an episode, many."""

import functools

import jax
import numpy as np
import pytest

import unrollgrad as ug
from unrollgrad.problems import theory

pytestmark = pytest.mark.slow

DIM, HORIZON, TRUNCATION, WORKERS = 10, 16, 2, 8
N = HORIZON // TRUNCATION
U1, UN, LONG = 1, N, 20 * N


@functools.cache
def measured(gradients):
    problem, theta, influence = ug.problems.linear_recurrence(DIM, HORIZON, gradients=gradients)
    influence = influence(theta)
    common = {"truncation": TRUNCATION, "sigma": 0.1}
    nres = ug.es_single(problem, **common)
    comparison = ug.diagnostics.compare(
        problem,
        theta,
        {
            "full_es": ug.full_es(problem, sigma=0.1),
            "es_single": nres,
            "pes": ug.pes(problem, **common),
            "nres": ug.average(nres, WORKERS, stagger="burn_in"),
        },
        reference=theory.gradient(influence).astype(np.float32),
        num_samples=1200,
        num_chains=1200,
        batch_size=1200,
        key=jax.random.key(5),
    )
    return {row["name"]: row for row in comparison.rows}, influence


def check(row, u, expected, tolerance=0.1):
    """Within the tolerance of the issue, and that is at least 2.5 standard errors."""
    value, se = row["variance_of_mean"][u], row["variance_of_mean_se"][u]
    assert abs(value - expected) < tolerance * expected
    assert se < tolerance / 2.5 * expected


@pytest.mark.parametrize("gradients", ["identical", "independent"])
def test_long_run(gradients):
    rows, influence = measured(gradients)
    one_noise = (DIM + 1) * np.sum(theory.gradient(influence) ** 2)
    check(rows["full_es"], 20, one_noise)
    check(rows["es_single"], LONG, one_noise)
    # Eight workers: per episode-pair spent it is eight times that of their mean.
    check(rows["nres"], LONG, one_noise / WORKERS)
    check(rows["pes"], LONG, theory.episode_variance(influence, TRUNCATION, TRUNCATION))
    ratio = rows["pes"]["variance_of_mean"][LONG] / one_noise
    if gradients == "identical":
        assert 0.45 < ratio < 0.7  # P/2 (1 + 1/n) + 1/n against P + 1
    else:
        assert ratio > N / 4  # grows like n: P (n + 1) / 2 + 1, and these draws of g are large


@pytest.mark.parametrize("gradients", ["identical", "independent"])
def test_one_update_and_one_episode(gradients):
    """U = 1 has the closed form of one window at a random place; staggered it is an update's."""
    rows, influence = measured(gradients)
    for name, period in {"es_single": None, "pes": TRUNCATION}.items():
        single = theory.window_variance(influence, TRUNCATION, period)
        check(rows[name], U1, single / N, tolerance=0.15)
        episode = theory.episode_variance(influence, TRUNCATION, period)
        check(rows[name], UN, episode, tolerance=0.2)
        assert rows[name]["variance_of_mean"][UN] == pytest.approx(rows[name]["variance"])
    # Staggered workers keep their noise: the first updates look better than the long run is.
    nres = rows["nres"]["variance_of_mean"]
    assert nres[U1] < 0.75 * nres[LONG] if gradients == "identical" else nres[U1] > 0
    full = rows["full_es"]["variance_of_mean"]
    assert list(full) == [1, 20]
