"""``compare`` measures known biases, variances and costs correctly."""

import csv
import json
from typing import Any

import jax
import numpy as np
import pytest

import unrollgrad as ug
from unrollgrad.diagnostics import report, statistics
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
    "variance_of_mean",
}

UNITS = ("variance_of_mean", "variance_of_mean_se", "num_windows")
ROW = {
    **dict.fromkeys(COLUMNS, 0.0),
    "name": "zero",
    "inner_steps": 1,
    "reference_norm": 1.0,
    "bias_se": 0.0,
    "num_nonfinite": 0,
    "variance_of_mean": {1: 0.0, 4: 0.0},
    "variance_of_mean_se": {1: 0.0, 4: 0.0},
    "num_windows": 4,
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
    seen, announced = [], []
    comparison = ug.diagnostics.compare(
        problem,
        theta,
        estimators,
        reference=g.astype(np.float32),
        num_samples=4000,
        key=jax.random.key(0),
        batch_size=1000,
        progress=lambda *args: seen.append(args),
        on_row=announced.append,
        num_chains=0,
    )
    assert announced == comparison.rows
    rows = {row["name"]: row for row in comparison.rows}
    assert list(rows) == list(estimators)
    assert set(rows["pes"]) >= COLUMNS
    assert seen[-1] == ("tbptt", 4000, 4000)
    assert len(seen) == 4 * (4 + 1)  # after each batch, and before each estimator is compiled
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
    """The reference's noise is subtracted from the bias and counted in its error."""
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
        num_chains=0,
    )
    row = comparison.rows[0]
    assert comparison.reference.shape == (4000, 5)
    assert row["bias"] < 5 * row["bias_se"]
    assert row["bias_se"] < 0.1 * np.linalg.norm(g)


def test_bias_is_debiased_and_its_error_covers():
    """Over many repeats E[bias^2] is the truth, even if it is 0, and its SE is right."""
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
        naive = values + 4 / 30  # negative control: its own noise is not subtracted
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


def test_same_key_same_numbers_whatever_the_batch_and_the_devices():
    problem, theta, influence = recurrence()
    g = theory.gradient(influence).astype(np.float32)

    def measured(batch_size, devices=1):
        comparison = ug.diagnostics.compare(
            problem,
            theta,
            {"pes": ug.average(ug.pes(problem, truncation=4, sigma=0.1), 2)},
            reference=g,
            num_samples=10,
            num_chains=3,
            key=jax.random.key(2),
            batch_size=batch_size,
            devices=devices,
        )
        long_run = comparison.rows[0]["variance_of_mean"][80]
        return np.append(comparison.samples["pes"], long_run)

    by_four = measured(4)
    assert by_four.shape == (51,)
    np.testing.assert_allclose(by_four, measured(10), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_four, measured(5, devices=2), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"`devices` is 100, but jax sees 8.*jax_num_cpu_devices"):
        measured(4, devices=100)


def test_progress_counts_the_episodes_that_were_asked_for():
    """16 samples, and three of them again as chains of 20 episodes."""
    problem, theta, _ = recurrence()
    seen, rows = [], []
    ug.diagnostics.compare(
        problem,
        theta,
        {"tbptt": ug.tbptt(problem, truncation=4)},
        reference=theta,
        num_samples=16,
        key=jax.random.key(0),
        progress=lambda *at: seen.append(at),
        on_row=rows.append,
    )
    # Before each of the two sizes of a batch is compiled, nothing more is done.
    assert [done for _, done, _ in seen[:4]] == [0, 16, 16, 19]
    assert {total for *_, total in seen} == {16 + 3 * 20}
    assert seen[-1] == ("tbptt", 76, 76)
    assert [row["name"] for row in rows] == ["tbptt"]


def test_another_theta_or_seed_compiles_nothing_new():
    problem, theta, _ = recurrence()
    traced = []

    def step(*args):
        traced.append(1)
        return problem.step(*args)

    watched = problem._replace(step=step)
    estimator = ug.pes(watched, truncation=4, sigma=0.1)
    counts = []
    for i in range(3):
        ug.diagnostics.compare(
            watched,
            theta + i,
            {"pes": estimator},
            reference=theta,
            num_samples=3,
            key=jax.random.key(i),
        )
        counts.append(len(traced))
    assert 0 < counts[0] == counts[1] == counts[2]


def test_the_matmul_precision_is_highest_unless_told_and_recorded(tmp_path):
    seen = []
    config: Any = jax.config

    def step(key, theta, state, t):
        seen.append(config.jax_default_matmul_precision)
        return state, theta**2

    problem = ug.UnrolledProblem(lambda key, theta: 0.0, step, 4)
    for precision in ["highest", "default"]:
        given: dict[str, Any] = {} if precision == "highest" else {"matmul_precision": precision}
        comparison = ug.diagnostics.compare(
            problem,
            np.float32(1.0),
            {"pes": ug.pes(problem, truncation=4, sigma=0.1)},
            reference=np.float32(2.0),
            num_samples=3,
            num_chains=0,
            key=jax.random.key(0),
            **given,
        )
        assert set(seen) == {precision}
        seen.clear()
        summary = json.loads((comparison.save(tmp_path) / "summary.json").read_text())
        assert summary["settings"]["matmul_precision"] == precision


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
    for word in ["pes", "bias", "long run", "at equal steps"]:
        assert word in printed
    folder = comparison.save(tmp_path / "deep" / "folder")
    with open(folder / "metrics.csv") as file:
        lines = list(csv.DictReader(file))
    for row in comparison.rows:
        flat = {x["metric"]: float(x["value"]) for x in lines if x["estimator"] == row["name"]}
        assert report.row_of(row["name"], flat) == row
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["environment"]["jax"] == jax.__version__
    assert "xla_flags" in summary["environment"]
    with np.load(folder / "samples.npz") as raw:
        for name, samples in zip(raw["estimators"], raw["samples"], strict=True):
            np.testing.assert_array_equal(samples, comparison.samples[name])
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_cells_are_in_units_of_the_gradient_and_bounded_where_nothing_was_seen():
    row = {**ROW, "bias": 0.5, "bias_se": 0.1, "variance": 8.0, "reference_norm": 2.0}
    assert report.cell("bias", row) == "0.25 ± 0.05"
    assert report.cell("variance", row) == "2"
    assert report.cell("bias", {**row, "bias": 0.1}) == "< 0.15"
    assert report.cell("bias", {**row, "bias": 0.0, "bias_se": 0.0}) == "0"
    assert report.line({**row, "nmse": 3.0}) == "zero: bias 0.25 ± 0.05, variance 2, NMSE 3"


def test_the_picture_tells_a_limit_from_a_bias_and_hides_no_name():
    """Five lines end at nearly the same height, and one is far off the scale."""
    names = ("pes", "es_single", "full_es", "gpes", "tbptt")
    means = {"variance_of_mean": {1: 1.0, 4: 2.0}, "variance_of_mean_se": {1: 0.1, 4: 0.1}}
    rows = [{**ROW, **means, "name": name, "bias_se": 0.1, "variance": 2.0} for name in names]
    rows[-1] |= {"bias": 0.5}
    wild = {u: 1e9 for u in (1, 4)}
    rows.append({**rows[0], "name": "bptt", "variance": 1e9, "variance_of_mean": wild})
    figure = report.draw({"here": rows})
    bias, noise, cost = figure.axes
    hollow = [line.get_markerfacecolor() == "white" for line in bias.lines]
    assert hollow.count(True) == 5
    assert [text.get_text() for text in bias.get_yticklabels()] == [*names, "bptt"]
    figure.draw_without_rendering()
    for axis in (noise, cost):
        assert axis.get_ylim()[1] < 1e6
        named = [text for text in axis.texts if text.get_text()]
        assert len(named) == 6
        assert named[-1].get_text().startswith("bptt ↑ 1e+")
        heights = [text.get_unitless_position()[1] for text in named]
        assert np.min(np.diff(np.sort(heights))) > 0.06


def test_equal_steps():
    """More workers, up to the costliest row's inner steps, divide the variance, not the bias."""
    cheap = {"variance": 8.0, "nmse": 1 + 8 / 4, "reference_norm": 2.0, "inner_steps": 10}
    dear = {"variance": 4.0, "nmse": 4 / 4, "reference_norm": 2.0, "inner_steps": 40}
    cheap, dear = report.at_equal_steps([cheap, dear])
    assert cheap["nmse_equal_steps"] == pytest.approx(1 + 8 / 4 / 4)
    assert dear["nmse_equal_steps"] == pytest.approx(1.0)


def test_missing_extras_are_named(monkeypatch):
    comparison = ug.diagnostics.Comparison([ROW], {}, np.ones((1, 2)), {})
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs rich: pip install \"unrollgrad\[experiments\]\""):
        comparison.table()
    with pytest.raises(ImportError, match="needs matplotlib"):
        comparison.plot()


def test_a_comparison_in_a_notebook():
    """Short as text; as a table it explains its columns, and its texts are escaped."""
    row = {**ROW, "name": "<b>", "reference_norm": 2.0, "bias": 0.5, "bias_se": 0.1, "nmse": 0.06}
    comparison = ug.diagnostics.Comparison([row], {}, np.ones((1, 2)), {"num_samples": 16})
    assert repr(comparison) == (
        "Comparison, 16 samples each, in units of |g|:\n"
        "  <b>: bias 0.25 ± 0.05, variance 0, NMSE 0.06"
    )
    table = comparison._repr_html_()
    assert "<caption>|g| = 2</caption>" in table
    assert "&lt;b&gt;</th><td>0.25 ± 0.05</td>" in table
    assert f'<th title="{report.COLUMNS["cosine"][1]}">cosine</th>' in table
    assert "left out" not in table  # nothing was left out
    assert "<b>" not in table
    assert "color" not in table


def test_a_reference_of_zero_and_samples_of_nan_still_save(tmp_path):
    for norm in [0.0, 1.0]:
        rows = [{**ROW, "reference_norm": norm}]
        rows += [{k: v if k in ("name", "inner_steps", *UNITS) else np.nan for k, v in ROW.items()}]
        comparison = ug.diagnostics.Comparison(rows, {}, np.full((1, 2), norm), {})
        comparison.table()
        folder = comparison.save(tmp_path / str(norm))
        assert (folder / "figure.png").exists()
        assert json.loads((folder / "summary.json").read_text())["rows"][1]["bias"] is None


def test_workers_left_out_are_counted_and_shown(capsys):
    problem, theta = ug.problems.chaotic_map(horizon=20)
    workers = ug.average(ug.pes(problem, truncation=10, sigma=0.1), 20)
    comparison = ug.diagnostics.compare(
        problem,
        theta,
        {"pes": workers},
        reference=np.float32(0.0),
        num_samples=10,
        num_chains=0,
        key=jax.random.key(0),
    )
    assert comparison.rows[0]["num_nonfinite"] > 0
    comparison.table()
    assert "left out" in capsys.readouterr().out
    assert np.isfinite(comparison.rows[0]["variance"])


def test_bad_input():
    problem, theta, _ = recurrence()
    estimator = ug.pes(problem, truncation=4, sigma=0.1)

    def compare(estimators=None, **changes):
        settings: dict[str, Any] = {"reference": theta, "num_samples": 5, "key": jax.random.key(0)}
        settings |= changes
        return ug.diagnostics.compare(problem, theta, estimators or {"pes": estimator}, **settings)

    for chains in [1, 2, 6, -3]:
        with pytest.raises(ValueError, match=f"num_chains={chains} and num_samples=5"):
            compare(num_chains=chains)
    other = ug.pes(problem._replace(horizon=35), truncation=7, sigma=0.1)
    with pytest.raises(ValueError, match=r"'other': its truncation=7 .* problem\.horizon=16"):
        compare({"other": other})
    with pytest.raises(TypeError, match="estimator 'pes' must be a GradientEstimator"):
        compare({"pes": ug.pes})
    growing = ug.curriculum([estimator, ug.pes(problem, truncation=8, sigma=0.1)], [3])
    with pytest.raises(ValueError, match="estimator 'growing' is a curriculum"):
        compare({"growing": growing})


def test_what_thetas_values_say_against_it_is_said():
    """The program is compiled for any theta; theta's values are checked before."""
    problem = ug.UnrolledProblem(lambda key, th: 0.0, lambda key, th, s, t: (s, th**2), 4)
    with pytest.raises(ValueError, match="under bfloat16's resolution of theta"):
        ug.diagnostics.compare(
            problem,
            jax.numpy.bfloat16(1.0),
            {"pes": ug.pes(problem, truncation=4, sigma=1e-3)},
            reference=jax.numpy.bfloat16(2.0),
            num_samples=3,
            key=jax.random.key(0),
        )


def test_repetitions_are_pooled_without_a_bias_of_the_pooling():
    """Pooling repetitions of an unbiased sampler shows no bias, and the error shrinks."""
    draws = np.random.default_rng(3)
    rows: list[dict[str, Any]] = [
        {"name": "x", **statistics.describe(draws.normal(size=(30, 4)) + 1, np.ones((1, 4)))}
        for _ in range(400)
    ]
    one = statistics.pooled(rows[:1])
    assert one == rows[0]
    row = statistics.pooled(rows)
    assert row["bias"] < 3 * row["bias_se"]
    naive = np.array([r["bias"] for r in rows])
    assert naive.mean() > 3 * naive.std(ddof=1) / np.sqrt(400)  # the mean of the roots is biased
    assert row["squared_bias_se"] < 0.1 * rows[0]["squared_bias_se"]
    assert row["variance"] == pytest.approx(np.mean([r["variance"] for r in rows]))
    # With very different gradients the ratios are ratios of averages and stay consistent.
    large = {"variance": 10.0, "squared_bias": 0.0, "squared_bias_se": 1.0, "norm": 1.0}
    large |= {"reference_norm": 1.0, "inner_steps": 10, "name": "x"}
    small = {**large, "variance": 1e-3, "norm": 0.01, "reference_norm": 0.01}
    both = statistics.pooled([large, small])
    (row, _) = report.at_equal_steps([both, {**both, "inner_steps": 40}])
    assert 0 < row["nmse_equal_steps"] == pytest.approx(both["nmse"] / 4)


def test_no_bias_is_seen_where_there_is_none_and_a_tenth_is_found():
    """Of 20 seeds, at most one bias of an unbiased estimator exceeds 3 SE; 1.1 g exceeds it."""
    problem, theta, influence = recurrence()
    g = theory.gradient(influence).astype(np.float32)
    workers = ug.average(ug.es_single(problem, truncation=4, sigma=0.1), 100)
    right, wrong = [], []
    for seed in range(20):
        comparison = ug.diagnostics.compare(
            problem,
            theta,
            {"workers": workers},
            reference=g,
            num_samples=100,
            num_chains=0,
            batch_size=100,
            key=jax.random.key(seed),
        )
        right += comparison.rows
        planted = 1.1 * comparison.samples["workers"].astype(np.float64)
        wrong.append(statistics.describe(planted, comparison.reference))
    inside = [row["bias"] <= 3 * row["bias_se"] for row in right]
    assert sum(inside) >= 19
    assert all(row["bias_se"] < 0.05 * np.linalg.norm(g) for row in wrong)
    seen = [row["bias"] for row in wrong if row["bias"] > 3 * row["bias_se"]]
    assert len(seen) >= 19
    assert np.mean(seen) == pytest.approx(0.1 * np.linalg.norm(g), rel=0.15)
