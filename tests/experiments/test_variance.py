"""``python -m experiments variance`` as a user runs it, small."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

import unrollgrad as ug

ROOT = Path(__file__).parents[2]


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def test_help_names_every_flag():
    out = command("variance", "--help").stdout
    flags = ["problem", "estimators", "num-workers", "num-samples", "sigma", "truncation"]
    for flag in [*flags, "horizon", "seed", "out"]:
        assert f"--{flag}" in out


@pytest.mark.parametrize(
    "problem",
    [
        "digits",
        "influence_balancing",
        "toy_regression",
        "linear_recurrence",
        "chaotic_map",
        "control",
    ],
)
def test_small_run(problem, tmp_path):
    flags = ["--problem", problem, "--horizon", "8", "--truncation", "4", "--num-samples", "4"]
    flags += ["--num-workers", "2", "--sigma", "0.05", "--seed", "1", "--out", str(tmp_path)]
    everything = problem == "linear_recurrence"
    if not everything:
        flags += ["--estimators", "pes", "tbptt"]
    done = command("variance", *flags)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    assert str(folder) in done.stdout.replace("\n", "")
    assert "…" not in done.stdout
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "figure.png",
        "metrics.csv",
        "summary.json",
    ]
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (len(ug.REGISTRY) if everything else 2)
    for row in rows:
        assert row["name"] in done.stdout
        # Equal inner steps: 2 signs x 2 workers x 8 steps; 3 workers with truncated_es.
        assert int(row["inner_steps"]) == (48 if everything else 32)
        assert "nan" not in row.values()
    config = json.loads((folder / "config.json").read_text())
    assert config["sigma"] == 0.05
    assert config["horizon"] == 8


def test_same_seed_same_numbers(tmp_path):
    flags = ["--problem", "linear_recurrence", "--num-samples", "4", "--num-workers", "3"]
    flags += ["--estimators", "tbptt", "pes"]
    values = []
    for seed, out in [("3", "a"), ("3", "b"), ("4", "c")]:
        done = command("variance", *flags, "--seed", seed, "--out", str(tmp_path / out))
        assert done.returncode == 0, done.stderr
        (folder,) = (tmp_path / out).iterdir()
        values.append(json.loads((folder / "summary.json").read_text())["rows"][1]["variance"])
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--truncation", "7"], "truncation=7"),
        (["--noise-period", "0"], "noise_period=0"),
        (["--num-workers", "0"], "`num_workers` must be at least 1"),
        (["--num-samples", "2"], "`num_samples` must be at least 3"),
        (["--seed", str(10**20)], "too large"),
        (["--out", str(ROOT / "README.md")], "README.md"),
    ],
)
def test_a_mistake_is_a_message_and_no_traceback(flags, message, tmp_path):
    done = command("variance", "--problem", "toy_regression", "--out", str(tmp_path), *flags)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
