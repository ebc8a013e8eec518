"""``python -m experiments variance``: every problem at smoke scale, and as a command."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import unrollgrad as ug
from experiments import __main__ as cli
from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.problems import PROBLEMS
from experiments.tools import variance
from tests.helpers import present
from tests.stored import expect

ROOT = Path(__file__).parents[2]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


@pytest.mark.experiments
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_problem_at_smoke_scale(problem, tmp_path, capsys, monkeypatch):
    # text_lstm reads the standard library's source, which differs between Pythons.
    monkeypatch.setattr("inspect.getsource", lambda _: (ROOT / "LICENSE").read_text())
    settings = dataclasses.replace(variance.SCALES["smoke"], problem=problem, out=tmp_path)
    folder = present(framework.execute(variance.EXPERIMENT, settings))
    printed = capsys.readouterr().out
    assert "nan" not in printed
    summary = results.read_summary(folder)
    numbers = {}
    for name in settings.estimators:
        assert name in printed
        # Equal inner steps: 2 signs x 2 workers x 8 steps.
        assert summary.find("inner_steps", estimator=name)["mean"] == 32
        updates = 40 if name == "pes" else 20
        for metric in ["norm", "variance", f"variance_of_mean[{updates}]"]:
            numbers[f"{name} {metric}"] = summary.find(metric, estimator=name)["mean"]
    # Strict JSON has null for infinity: only for the SNR of samples without spread.
    assert {x["metric"] for x in summary.results if x["mean"] is None} <= {"snr"}
    expect(problem, numbers)


@pytest.mark.experiments
def test_every_row_rows(tmp_path, capsys):
    """Its row in the registry is enough to make an estimator available in the command."""
    settings = dataclasses.replace(
        variance.SCALES["smoke"],
        problem="linear_recurrence",
        estimators=tuple(ug.REGISTRY),
        num_chains=0,
        out=tmp_path,
    )
    folder = present(framework.execute(variance.EXPERIMENT, settings))
    (rows,) = variance.rows(results.read(folder)).values()
    assert [row["name"] for row in rows] == list(ug.REGISTRY)
    assert all(row["norm"] > 0 for row in rows)
    assert "nan" not in capsys.readouterr().out


@pytest.mark.experiments
def test_all_estimators_at_several_thetas_with_several_seeds(tmp_path, capsys):
    settings = dataclasses.replace(
        variance.SCALES["smoke"],
        problem="influence_balancing",
        estimators=variance.Settings().estimators,
        thetas=("start", "end"),
        num_steps=20,
        seeds=(0, 1),
        devices=2,
        out=tmp_path,
    )
    folder = present(framework.execute(variance.EXPERIMENT, settings))
    printed = capsys.readouterr().out
    assert "theta: start" in printed
    assert "theta: end" in printed
    rows = variance.rows(results.read(folder))
    assert list(rows) == ["start", "end"]
    for group in rows.values():
        assert [row["name"] for row in group] == list(settings.estimators)
        for row in group:
            # Equal steps: 3 workers of pes (2 x 8 each), 2 of truncated_es (3 x 8 each).
            assert row["inner_steps"] == 48
            assert (
                list(row["variance_of_mean"])
                == [1, row["num_windows"], 20 * row["num_windows"]][
                    1 if row["num_windows"] == 1 else 0 :
                ]
            )
    norms = [group[0]["reference_norm"] for group in rows.values()]
    assert norms[1] < norms[0]  # nearer to the optimum
    claims = variance.claims(results.read_summary(folder))
    says = {claim.says for claim in claims}
    assert {"pes is unbiased for the period-smoothed J", "tbptt is biased"} <= says
    assert "in the long run es_single has full_es's variance" in says
    assert next(c for c in claims if c.says == "tbptt is biased").holds


@pytest.mark.parametrize(
    ("name", "square", "error", "reference", "holds"),
    [
        ("pes", 1e-5, 1e-4, "bptt", True),
        ("pes", 0.0, 1.0, "bptt", None),  # not sensitive: no bias below |g| can be detected
        ("pes", 1.0, 0.01, "bptt", None),  # sensitive, but the smoothing counts as bias
        ("pes", 1.0, 0.01, "full_es", None),  # as before: it smooths in another way
        ("es_single", 1.0, 0.01, "full_es", False),
        ("dodge", 1.0, 0.01, "full_es", None),
        ("bptt", 1.0, 0.01, "bptt", False),
        ("tbptt", 1.0, 0.01, "bptt", True),
        ("tbptt", 0.0, 1.0, "bptt", None),
        ("tbptt", 0.0, 1e-4, "bptt", False),
    ],
)
def test_claims_need_power(name, square, error, reference, holds):
    numbers = {"squared_bias": square, "squared_bias_se": error, "reference_norm": 1.0}
    here = {"theta": "start", "estimator": name}
    config = {"thetas": ["start"], "seeds": [0], "reference": reference, "sigma": 0.1}
    config |= {"horizon": 100, "truncation": 10, "num_samples": 50, "num_chains": 10}
    summary = results.Summary(
        [{**here, "metric": k, "mean": v, "se": None, "n": 1} for k, v in numbers.items()],
        {"config": config},
    )
    (claim,) = variance.claims(summary)
    assert claim.holds is holds


@pytest.mark.parametrize(
    ("name", "other", "ratio", "se", "holds"),
    [
        (("es_single", 200), ("full_es", 20), 1.1, 0.05, True),
        (("es_single", 200), ("full_es", 20), 2.0, 0.05, False),
        (("es_single", 200), ("full_es", 20), 2.0, 0.9, None),
        (("pes", 200), ("es_single", 200), 13.2, 0.05, True),  # n = 10
        (("pes", 200), ("es_single", 200), 0.05, 0.05, False),
        (("pes", 200), ("es_single", 200), 13.2, 0.9, None),
    ],
)
def test_claims_of_the_long_run(name, other, ratio, se, holds):
    values = {other: (1.0, 0.0), name: (ratio, ratio * se)}
    found = [
        {"theta": "start", "estimator": name, "metric": f"{metric}[{u}]", "mean": x, "n": 1}
        for (name, u), pair in values.items()
        for metric, x in zip(["variance_of_mean", "variance_of_mean_se"], pair, strict=True)
    ]
    config = {"thetas": ["start"], "seeds": [0], "horizon": 100, "truncation": 10}
    config |= {"num_samples": 50, "num_chains": 10}
    (claim,) = variance.claims(results.Summary(found, {"config": config}))
    assert claim.holds is holds


@pytest.mark.experiments
def test_equal_workers(tmp_path):
    settings = dataclasses.replace(
        variance.SCALES["smoke"],
        problem="influence_balancing",
        estimators=("truncated_es", "pes", "tbptt"),
        equal="workers",
        num_chains=0,
        out=tmp_path,
    )
    (group,) = variance.rows(
        results.read(present(framework.execute(variance.EXPERIMENT, settings)))
    ).values()
    assert {row["name"]: row["inner_steps"] for row in group} == {
        "truncated_es": 48,
        "pes": 32,
        "tbptt": 16,
    }


@pytest.mark.experiments
def test_as_a_user_runs_it(tmp_path):
    flags = ["--scale", "smoke", "--problem", "linear_recurrence", "--out", str(tmp_path)]
    done = command("variance", *flags, "--sigma", "0.05")
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert str(folder) in done.stdout.replace("\n", "")
    assert "…" not in done.stdout
    assert done.stderr == ""  # no progress bar without a terminal
    config = json.loads((folder / "config.json").read_text())
    assert config["sigma"] == 0.05
    assert config["horizon"] == 8
    assert config["noise_period"] == 8  # the problem's default: two windows
    assert config["reference"] == "bptt"
    mistake = command("variance", *flags, "--truncation", "7")
    assert mistake.returncode != 0
    assert "error: `truncation` must divide" in mistake.stderr
    assert "Traceback" not in mistake.stderr
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.experiments
def test_same_seed_same_numbers(tmp_path):
    values = []
    for i, seed in enumerate([3, 3, 4]):
        settings = dataclasses.replace(
            variance.SCALES["smoke"],
            problem="linear_recurrence",
            seeds=(seed,),
            num_chains=0,
            out=tmp_path / str(i),
        )
        folder = present(framework.execute(variance.EXPERIMENT, settings))
        values.append(results.read_summary(folder).find("variance", estimator="pes")["mean"])
    assert values[0] == values[1] != values[2]


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        cli.main(["variance", "--help"])
    out = capsys.readouterr().out
    for field in dataclasses.fields(variance.Settings):
        assert f"--{field.name.replace('_', '-')}" in out


@pytest.mark.experiments
def test_ctrl_c_leaves_what_was_computed(tmp_path):
    flags = ["--problem", "influence_balancing", "--num-samples", "3000"]
    flags += ["--estimators", "tbptt", "pes", "--reference", "bptt", "--num-chains", "0"]
    arguments = [sys.executable, "-m", "experiments", "variance", *flags, "--out", str(tmp_path)]
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    lines = 0
    for _ in range(1200):
        found = list(tmp_path.glob("*/metrics.csv"))
        lines = len(found[0].read_text().splitlines()) if found else 0
        if lines > 1 or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, error = process.communicate(timeout=120)
    assert lines > 1
    # The row as it was measured, and the table of what there is.
    assert printed.startswith("tbptt: bias ")
    assert "upper limit" in printed
    assert "pes" not in printed
    assert process.returncode != 0
    assert "Traceback" not in error
    assert "interrupted" in error
    (folder,) = tmp_path.iterdir()
    assert str(folder) in error.replace("\n", "")
    summary = results.read_summary(folder)
    assert summary.about["status"] == "interrupted"
    assert summary.find("bias", estimator="tbptt") is not None
    assert summary.find("bias", estimator="pes") is None
    assert (folder / "figure.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--truncation", "7"], "truncation=7"),
        (["--truncation", "0"], "truncation=0"),
        (["--estimators", "gpes", "--noise-period", "0"], "noise_period=0"),
        (["--num-workers", "0"], "`num_workers` must be at least 1"),
        (["--num-workers", "-3"], "`num_workers` must be at least 1; got -3"),
        (["--num-samples", "2"], "`num_samples` must be at least 3"),
        (["--thetas", "end", "--num-steps", "-1"], "num_steps=-1"),
        (["--num-chains", "2"], "num_chains=2"),
        (["--seeds", str(10**20)], "too large"),
        (["--seeds"], "`seeds` must be different numbers"),
        (["--out", str(ROOT / "README.md")], "README.md"),
    ],
)
def test_a_mistake_is_a_message_and_leaves_nothing(flags, message, tmp_path):
    """``main`` catches the error; the subprocess above shows that it prints no traceback."""
    flags = ["--scale", "smoke", "--problem", "toy_regression", "--out", str(tmp_path), *flags]
    with pytest.raises((ValueError, OverflowError, OSError), match=message):
        cli.main(["variance", *flags])
    assert not list(tmp_path.iterdir())
