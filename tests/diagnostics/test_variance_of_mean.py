"""The variance of the mean of U updates equals closed forms, for all three values of U."""

import functools

import jax
import numpy as np
import pytest

import unrollgrad as ug
from unrollgrad.problems import theory

DIM, HORIZON, TRUNCATION, WORKERS = 10, 16, 2, 8
N = HORIZON // TRUNCATION
U1, UN, LONG = 1, N, 20 * N


@functools.cache
def measured(gradients):
    """Rows by name, and the exact influences; staggered workers only for identical gradients."""
    problem, theta, influence = ug.problems.linear_recurrence(DIM, HORIZON, gradients=gradients)
    influence = influence(theta)
    common = {"truncation": TRUNCATION, "sigma": 0.1}
    nres = ug.es_single(problem, **common)
    compare = functools.partial(
        ug.diagnostics.compare,
        problem,
        theta,
        reference=theory.gradient(influence).astype(np.float32),
        num_chains=400,
        batch_size=400,
        key=jax.random.key(5),
    )
    few, many = {}, {"es_single": nres, "pes": ug.pes(problem, **common)}
    if gradients == "identical":
        many["full_es"] = ug.full_es(problem, sigma=0.1)
        few["nres"] = ug.average(nres, WORKERS, stagger="burn_in")
    rows = compare(many, num_samples=1200).rows
    rows += compare(few, num_samples=400).rows if few else []
    return {row["name"]: row for row in rows}, influence


def check(row, u, expected, tolerance=0.1):
    """The value is within the tolerance, which is at least 2.5 standard errors."""
    value, se = row["variance_of_mean"][u], row["variance_of_mean_se"][u]
    assert abs(value - expected) < tolerance * expected
    assert se < tolerance / 2.5 * expected


@pytest.mark.parametrize("gradients", ["identical", "independent"])
def test_long_run(gradients):
    rows, influence = measured(gradients)
    one_noise = (DIM + 1) * np.sum(theory.gradient(influence) ** 2)
    check(rows["es_single"], LONG, one_noise)
    check(rows["pes"], LONG, theory.episode_variance(influence, TRUNCATION, TRUNCATION))
    ratio = rows["pes"]["variance_of_mean"][LONG] / one_noise
    if gradients == "identical":
        assert 0.45 < ratio < 0.7  # P/2 (1 + 1/n) + 1/n against P + 1
    else:
        assert ratio > N / 4  # grows like n: P (n + 1) / 2 + 1, and these draws of g are large


@pytest.mark.parametrize("gradients", ["identical", "independent"])
def test_one_update_and_one_episode(gradients):
    """U = 1 has the closed form of one window at a random place of the episode."""
    rows, influence = measured(gradients)
    for name, period in {"es_single": None, "pes": TRUNCATION}.items():
        single = theory.window_variance(influence, TRUNCATION, period)
        check(rows[name], U1, single / N, tolerance=0.15)
        episode = theory.episode_variance(influence, TRUNCATION, period)
        check(rows[name], UN, episode, tolerance=0.2)
        assert rows[name]["variance_of_mean"][UN] == pytest.approx(rows[name]["variance"])


def test_whole_episodes():
    """If an update is an episode, U is 1 and 20."""
    rows, influence = measured("identical")
    assert list(rows["full_es"]["variance_of_mean"]) == [1, 20]
    check(rows["full_es"], 20, (DIM + 1) * np.sum(theory.gradient(influence) ** 2))


def test_staggered_workers():
    """The long-run variance of the mean of eight workers is an eighth of one worker's."""
    rows, influence = measured("identical")
    one_noise = (DIM + 1) * np.sum(theory.gradient(influence) ** 2)
    check(rows["nres"], LONG, one_noise / WORKERS)
    # They keep their noise, so that the first updates look better than the long run is.
    nres = rows["nres"]["variance_of_mean"]
    assert nres[U1] < 0.75 * nres[LONG]
