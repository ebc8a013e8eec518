"""Several processes with ``jax.distributed`` get the same numbers and write them once."""

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments._framework.processes import Processes, join
from experiments.tools import variance
from tests import one_process
from tests.helpers import raises

ROOT = Path(__file__).parents[1]


def together(*commands, killed=False):
    """Runs the commands at the same time; returns each one's output.

    Those that are ``killed`` may end as they like.
    """
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for command in commands
    ]
    try:
        ended = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, ended, strict=True):
        assert killed or process.returncode == 0, errors
    return [printed for printed, _ in ended]


def free_address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def test_two_processes_of_four_devices_equal_one_of_eight(tmp_path):
    """Estimators and ``fit``; a signal to one process stops both, and the same call resumes."""
    address, folder = free_address(), str(tmp_path / "two")
    pair = together(*[["-m", "tests.one_process", address, "2", str(i), folder] for i in range(2)])
    first, second = (json.loads(printed.splitlines()[-1]) for printed in pair)
    assert first == second
    assert "average(..., mesh=ug.make_worker_mesh())" in first.pop("no mesh")
    assert first.pop("stopped") == 4
    assert first.pop("continued") == first["fit"]  # bit for bit
    alone = one_process.measured()
    assert alone["devices"] == 8
    assert alone["error"].startswith("all 16 workers")
    assert first.keys() == alone.keys()
    for name, expected in alone.items():
        if isinstance(expected, list):
            np.testing.assert_allclose(first[name], expected, rtol=1e-5, err_msg=name)
        else:
            assert first[name] == expected
    # The streamed data reached the right workers: worker i's gradient is i.
    variance = float(np.var(np.arange(16.0), ddof=1)) / 16
    np.testing.assert_allclose(alone["data"], [7.5, variance], rtol=1e-5)


@pytest.mark.experiments
def test_a_replay_of_two_processes_goes_on_after_both_were_killed(tmp_path):
    """They are killed at different moments, and have different files then."""

    def pair(folder, *counts, **options):
        address, path = free_address(), str(tmp_path / folder)
        command = ["-m", "tests.one_process", address, "2"]
        commands = [[*command, str(i), path, count] for i, count in enumerate(counts)]
        lines = [printed.splitlines() for printed in together(*commands, **options)]
        return [[line for line in printed if line.startswith("bits")] for printed in lines]

    whole = pair("whole", "all", "all")
    assert len(whole[0]) == 1
    assert whole[0] == whole[1]
    assert pair("killed", "10", "9", killed=True) == [[], []]
    for i in range(2):
        assert list((tmp_path / f"killed/process-{i}").glob("pulled-*.npz"))
        assert not (tmp_path / f"killed/process-{i}/pulled-0.npz").exists()  # not done
    assert pair("killed", "all", "all") == whole


@pytest.mark.experiments
def test_only_process_0_writes_and_prints(tmp_path):
    command = ["-m", "experiments", "variance", "--scale", "smoke"]
    command += ["--problem", "influence_balancing", "--thetas", "start", "end"]
    command += ["--processes", "2", "--coordinator", free_address()]
    command += ["--devices", "2", "--out", str(tmp_path / "two")]
    first, second = together(*[[*command, "--process", str(i)] for i in range(2)])
    assert "table and picture are in" in first
    assert "bias" in first
    assert "bias" not in second
    assert "picture" not in second
    settings = dataclasses.replace(
        variance.SCALES["smoke"],
        problem="influence_balancing",
        thetas=("start", "end"),
        devices=2,
        out=tmp_path / "one",
    )
    framework.execute(variance.EXPERIMENT, settings)
    numbers = []
    for name in ["one", "two"]:
        (folder,) = (tmp_path / name).iterdir()
        assert (folder / "figure.png").is_file()
        records = [r for r in results.read(folder) if "seconds" not in r.metric]
        numbers.append({(*r.labels.values(), r.metric): r.value for r in records})
        environment = results.read_summary(folder).about["environment"]
        assert environment["num_processes"] == 1 + (name == "two")
    assert numbers[0].keys() == numbers[1].keys()
    for key, value in numbers[0].items():
        np.testing.assert_allclose(numbers[1][key], value, rtol=1e-4, atol=1e-5, err_msg=str(key))


def test_flags_that_do_not_fit_together():
    for error, parts, group, devices in [
        (ValueError, ("`--process` counts from 0", "--process 2"), Processes(2, process=2), None),
        (ValueError, ("`--processes` must be at least 1",), Processes(0), None),
        (ValueError, ("`--devices` must be at least 1",), Processes(), 0),
        (ValueError, ("a multiple of --processes", "--devices 3"), Processes(2), 3),
        (ValueError, ("must be HOST:PORT; got 'here'",), Processes(2, coordinator="here"), None),
        (ValueError, ("auto` asks the cluster",), Processes("auto", process=1), None),
    ]:
        with raises(error, *parts):
            join(group, devices)
