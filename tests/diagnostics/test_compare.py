"""``compare`` measures what it says, on samples whose law is known."""

import csv
import json

import jax
import numpy as np
import pytest

import unrollgrad as ug
from unrollgrad.diagnostics import statistics
from unrollgrad.problems import theory

COLUMNS = {
    "name",
    "norm",
    "bias",
    "bias_se",
    "variance",
    "norm_ratio",
    "cosine",
    "snr",
    "nmse",
    "inner_steps",
    "seconds",
}


def recurrence():
    problem, theta, influence = ug.problems.linear_recurrence(5, 16, memory=0.8)
    return problem, theta, influence(theta)


def test_rows_against_closed_forms():
    problem, theta, influence = recurrence()
    g = theory.gradient(influence)
    estimators = {
        "pes": ug.pes(problem, truncation=4, sigma=0.1),
        "es_single": ug.average(ug.es_single(problem, truncation=4, sigma=0.1), 10),
        "truncated_es": ug.truncated_es(problem, truncation=4, sigma=0.1),
        "tbptt": ug.tbptt(problem, truncation=4),
    }
    seen = []
    comparison = ug.diagnostics.compare(
        problem,
        theta,
        estimators,
        reference=g.astype(np.float32),
        num_samples=4000,
        key=jax.random.key(0),
        batch_size=1000,
        progress=lambda *args: seen.append(args),
    )
    rows = {row["name"]: row for row in comparison.rows}
    assert list(rows) == list(estimators)
    assert set(rows["pes"]) >= COLUMNS
    assert seen[-1] == ("tbptt", 4000, 4000)
    assert len(seen) == 16
    norm = np.linalg.norm(g)
    cut = theory.truncated_gradient(influence, 4)
    np.testing.assert_allclose(
        rows["pes"]["variance"], theory.episode_variance(influence, 4, 4), rtol=0.15
    )
    np.testing.assert_allclose(rows["es_single"]["variance"], 6 * norm**2 / 10, rtol=0.15)
    for name in ["pes", "es_single"]:
        assert rows[name]["bias"] < 5 * rows[name]["bias_se"]
        assert rows[name]["bias"] < 0.1 * norm
    for name in ["tbptt", "truncated_es"]:
        bias = np.linalg.norm(cut - g)
        se = rows[name]["bias_se"]
        assert abs(rows[name]["bias"] - bias) < max(5 * se, 1e-4 * norm)
        assert rows[name]["bias"] > 20 * se
        np.testing.assert_allclose(rows[name]["cosine"], 1.0, atol=0.05)
    assert rows["tbptt"]["variance"] < 1e-8
    np.testing.assert_allclose(rows["tbptt"]["norm"], np.linalg.norm(cut), rtol=1e-4)
    for row in rows.values():
        np.testing.assert_allclose(row["norm_ratio"], row["norm"] / norm, rtol=1e-5)
        spread = np.sqrt(row["variance"])
        assert np.isclose(row["snr"] * spread, row["norm"]) if spread else row["snr"] == np.inf
        error = (row["bias"] ** 2 + row["variance"]) / norm**2
        np.testing.assert_allclose(row["nmse"], error, rtol=1e-5)
        assert row["seconds"] > 0
    steps = {name: row["inner_steps"] for name, row in rows.items()}
    assert steps == {"pes": 32, "es_single": 320, "truncated_es": 48, "tbptt": 16}


def test_reference_that_is_itself_sampled():
    """Its noise is taken out of the bias and counted in the error."""
    problem, theta, influence = recurrence()
    g = theory.gradient(influence)
    comparison = ug.diagnostics.compare(
        problem,
        theta,
        {"pes": ug.pes(problem, truncation=4, sigma=0.1)},
        reference=ug.es_single(problem, truncation=4, sigma=0.1),
        num_samples=4000,
        key=jax.random.key(1),
        batch_size=1000,
    )
    row = comparison.rows[0]
    assert comparison.reference.shape == (4000, 5)
    assert row["bias"] < 5 * row["bias_se"]
    assert row["bias_se"] < 0.1 * np.linalg.norm(g)


def test_bias_is_debiased_and_its_error_covers():
    """Over many repeats E[bias^2] is the truth, also where it is 0, and its SE fits."""
    draws = np.random.default_rng(0)
    for shift in [0.0, 1.0]:
        truth = np.full((1, 4), shift)
        repeats = [
            statistics.squared_distance(draws.normal(size=(30, 4)), truth) for _ in range(2000)
        ]
        values, errors = np.transpose(repeats)
        se = values.std() / np.sqrt(len(values))
        assert abs(values.mean() - 4 * shift**2) < 5 * se
        assert se < 0.02
        naive = values + 4 / 30  # with its own noise left in: rejected
        assert abs(naive.mean() - 4 * shift**2) > 5 * se
        ratio = np.sqrt(np.mean(errors**2)) / values.std()
        assert 0.9 < ratio < 1.6 if shift == 0 else 0.9 < ratio < 1.1


def test_sampled_reference_is_debiased_too():
    draws = np.random.default_rng(1)
    repeats = [
        statistics.squared_distance(draws.normal(size=(30, 4)), draws.normal(size=(20, 4)))
        for _ in range(2000)
    ]
    values, errors = np.transpose(repeats)
    assert abs(values.mean()) < 5 * values.std() / np.sqrt(2000)
    assert 0.9 < np.sqrt(np.mean(errors**2)) / values.std() < 1.8


def test_same_key_same_numbers_whatever_the_batch():
    problem, theta, influence = recurrence()
    g = theory.gradient(influence).astype(np.float32)

    def samples(batch_size):
        return ug.diagnostics.compare(
            problem,
            theta,
            {"pes": ug.pes(problem, truncation=4, sigma=0.1)},
            reference=g,
            num_samples=10,
            key=jax.random.key(2),
            batch_size=batch_size,
        ).samples["pes"]

    assert samples(4).shape == (10, 5)
    np.testing.assert_allclose(samples(4), samples(10), rtol=1e-4, atol=1e-5)


def test_table_plot_and_save(tmp_path, capsys):
    problem, theta, influence = recurrence()
    comparison = ug.diagnostics.compare(
        problem,
        theta,
        {"pes": ug.pes(problem, truncation=4, sigma=0.1), "bptt": ug.bptt(problem)},
        reference=theory.gradient(influence).astype(np.float32),
        num_samples=5,
        key=jax.random.key(0),
    )
    comparison.table()
    printed = capsys.readouterr().out
    assert "pes" in printed
    assert "bias" in printed
    folder = comparison.save(tmp_path / "deep" / "folder")
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["pes", "bptt"]
    np.testing.assert_allclose(float(rows[0]["variance"]), comparison.rows[0]["variance"])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["environment"]["jax"] == jax.__version__
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_missing_extras_are_named(monkeypatch):
    comparison = ug.diagnostics.Comparison([], {}, np.ones((1, 2)))
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs rich: pip install \"unrollgrad\[experiments\]\""):
        comparison.table()
    with pytest.raises(ImportError, match="needs matplotlib"):
        comparison.plot()


def test_a_reference_of_zero_and_samples_of_nan_still_save(tmp_path):
    rows = [{**dict.fromkeys(COLUMNS, 0.0), "name": "zero", "inner_steps": 1}]
    rows += [{**dict.fromkeys(COLUMNS, np.nan), "name": "nan", "inner_steps": 1}]
    for norm in [0.0, 1.0]:
        comparison = ug.diagnostics.Comparison(rows, {}, np.full((1, 2), norm))
        folder = comparison.save(tmp_path / str(norm))
        assert (folder / "figure.png").exists()
        assert json.loads((folder / "summary.json").read_text())["rows"][1]["bias"] is None


def test_workers_left_out_are_counted():
    problem, theta = ug.problems.chaotic_map(horizon=20)
    workers = ug.average(ug.pes(problem, truncation=10, sigma=0.1), 20)
    comparison = ug.diagnostics.compare(
        problem, theta, {"pes": workers}, reference=0.0, num_samples=10, key=jax.random.key(0)
    )
    assert comparison.rows[0]["num_nonfinite"] > 0
    assert np.isfinite(comparison.rows[0]["variance"])
