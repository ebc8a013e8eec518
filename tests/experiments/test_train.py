"""``python -m experiments train``: all problems, long runs, and resuming."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from experiments import __main__ as cli
from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.tools import train
from tests.helpers import KINDS, present, raises
from unrollgrad._fit import checkpoints

ROOT = Path(__file__).parents[2]
QUICK = ["--scale", "smoke", "--problem", "lorenz", "--estimator", "es_single"]


def execute(tmp_path, **settings):
    settings = dataclasses.replace(train.SCALES["smoke"], **settings, out=tmp_path)
    return present(framework.execute(train.EXPERIMENT, settings))


def values(folder):
    records = results.read(folder)
    found = {(r.seed, r.step, r.metric): r.value for r in records}
    assert len(found) == len(records)  # no line twice
    return found


@pytest.mark.experiments
@pytest.mark.parametrize("estimator", KINDS)
def test_every_estimator(estimator, tmp_path, capsys):
    folder = execute(tmp_path, problem="influence_balancing", estimator=estimator, devices=2)
    files = ["checkpoints", "config.json", "figure.png", "metrics.csv", "summary.json"]
    files += ["theta-0.npz"]
    assert sorted(p.name for p in folder.iterdir()) == files
    found = values(folder)
    assert {step for _, step, _ in found} == {0, 2, 4}
    for metric in ["objective", "theta", "loss", "grad_norm", "inner_steps"]:
        assert (0, 4, metric) in found
    saved = ug.FitResult.load(folder / "theta-0.npz", like=jnp.float32(0.0))
    assert saved.theta == np.float32(found[0, 4, "theta"])
    assert len(saved.history["loss"]) == 4
    assert f"objective {found[0, 4, 'objective']:.5g}" in capsys.readouterr().out


@pytest.mark.experiments
def test_a_theta_of_many_numbers(tmp_path):
    found = values(execute(tmp_path, problem="copy_task"))
    assert found[0, 4, "theta_rms"] > 0
    assert not any("[" in metric for *_, metric in found)


@pytest.mark.experiments
def test_it_learns(tmp_path):
    """Theta approaches the Lorenz system's log 10 and log 28."""
    folder = execute(tmp_path, problem="lorenz", num_steps=300, num_workers=8, truncation=4)
    found = values(folder)
    assert found[0, 300, "objective"] < 0.01 * found[0, 0, "objective"]


@pytest.mark.experiments
def test_goes_on_as_if_it_had_never_stopped(tmp_path, capsys):
    whole = execute(tmp_path / "whole", problem="lorenz", num_steps=8, seeds=(0, 1))
    cli.main(["train", *QUICK[:4], "--num-steps", "4", "--out", str(tmp_path / "part")])
    (part,) = (tmp_path / "part").iterdir()
    with open(part / "metrics.csv", "a") as file:
        file.write("0,6,objec")  # a killed run may leave half a line
    cli.main(["train", "--resume", str(part), "--num-steps", "8", "--seeds", "0", "1"])
    assert values(part) == values(whole)
    assert results.read_json(part / "config.json")["num_steps"] == 8
    assert results.read_summary(part).find("objective")["n"] == 2
    lines = (part / "metrics.csv").read_text()
    cli.main(["train", "--resume", str(part)])
    assert (part / "metrics.csv").read_text() == lines


@pytest.mark.experiments
def test_what_cannot_go_on(tmp_path):
    cli.main(["train", *QUICK, "--out", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    before = (folder / "config.json").read_text()
    for flags, said in [
        (["--sigma", "0.5"], "sigma: 0.04 -> 0.5"),
        (["--num-steps", "2"], "num_steps: 4 -> 2"),
        (["--scale", "smoke", "--problem", "control"], "problem: lorenz -> control"),
        (["--seeds", "5"], "seeds: [0] -> [5]"),
    ]:
        with raises(ValueError, "`--resume` goes on with what was begun", said, "Leave these"):
            cli.main(["train", "--resume", str(folder), *flags])
    with raises(FileNotFoundError, "is not a folder of results"):
        cli.main(["train", "--resume", str(tmp_path)])
    assert (folder / "config.json").read_text() == before
    settings = cli.resumed(["train", "--resume", str(folder)])
    with raises(ValueError, "`--devices` must divide the run's 8 workers; got 3"):
        train.filled(dataclasses.replace(settings, resume=folder, devices=3))
    with (
        checkpoints.lock(folder / "checkpoints"),
        raises(RuntimeError, "is in use by process"),
    ):
        cli.main(["train", "--resume", str(folder), "--num-steps", "6"])
    assert (folder / "config.json").read_text() == before
    assert results.read_summary(folder).about["status"] == "complete"
    for new, said in [
        (before.replace('"train"', '"variance"'), "is a run of variance, not of train"),
        (
            before.replace('"stagger"', '"place"'),
            "another version of train, which differs in",
        ),
        (before[:-3], "config.json cannot be read"),
    ]:
        (folder / "config.json").write_text(new)
        with raises(ValueError, said):
            cli.main(["train", "--resume", str(folder)])


@pytest.mark.parametrize("flag", ["num-steps", "num-workers", "num-episodes", "steps-per-dispatch"])
def test_flags_that_are_not_positive_leave_no_folder(flag, tmp_path):
    with raises(ValueError, f"`--{flag}` must be at least 1"):
        cli.main(["train", *QUICK, f"--{flag}", "0", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.experiments
def test_stopped_from_outside(tmp_path):
    """A signal, as from a cluster, stops the run; it prints how to resume, and resumes."""
    flags = [*QUICK, "--num-steps", "100", "--checkpoint-every", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments", "train", *flags],
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
    )
    while process.poll() is None:
        tables = list(tmp_path.glob("*/metrics.csv"))
        if tables and tables[0].read_text().count("objective") > 10:
            break
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    (folder,) = tmp_path.iterdir()
    assert f"to go on: python -m experiments train --resume {folder}" in errors
    assert results.read_summary(folder).about["status"] == "interrupted"
    last = max(present(r.step) for r in results.read(folder))
    assert (folder / "checkpoints" / "seed-0" / "steps" / str(last)).is_dir()
    cli.main(["train", "--resume", str(folder)])
    steps = [r.step for r in results.read(folder) if r.metric == "objective"]
    assert steps == list(range(0, 101, 2))
