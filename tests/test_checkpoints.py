"""``fit`` with checkpoints: a resumed run equals a run without interruption."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import build, numbers, present, quadratic, raises
from unrollgrad._fit import checkpoints

KEY = jax.random.key(0)
OUTER = optax.adam(0.05)


@functools.cache
def workers(num_devices=None):
    """Always the same object: ``fit`` keeps the program of the last estimator and optimizer."""
    problem, theta = quadratic()
    mesh = num_devices and ug.make_worker_mesh(num_devices)
    return ug.average(build("pes", problem), 4, mesh=mesh), theta


def run(num_steps, folder=None, num_devices=None, **given):
    estimator, theta = workers(num_devices)
    given: dict[str, Any] = {"optimizer": OUTER, "key": KEY, "config": {"a": 1}, **given}
    return ug.fit(
        estimator,
        theta,
        num_steps=num_steps,
        steps_per_dispatch=2,
        checkpoint_dir=folder,
        checkpoint_every=2,
        evaluate=lambda key, theta: {"rate": np.exp(theta["log_rate"])},
        **given,
    )


@functools.cache
def whole(num_steps):
    """A run without interruption."""
    return run(num_steps)


def assert_same(a, b, **tolerance):
    """Asserts bit-equality, unless tolerances are given."""
    exact: dict[str, Any] = {"rtol": 0, "atol": 0}
    for x, y in zip(*(jax.tree.leaves(numbers(tree)) for tree in (a, b)), strict=True):
        np.testing.assert_allclose(x, y, **exact | tolerance)


def test_goes_on_where_it_was(tmp_path):
    expected = whole(9)
    run(5, tmp_path)
    again = run(5, tmp_path)  # nothing is left to do
    assert len(again.history["loss"]) == 5
    steps = run(9, tmp_path)
    # The interrupted run's dispatches end elsewhere; its steps are equal.
    assert steps.history["evaluated_at"].tolist() == [2, 4, 5, 7, 9]
    assert_same(steps.theta, expected.theta)
    assert_same(steps.opt_state, expected.opt_state)
    assert_same(steps.worker_state, expected.worker_state)
    assert_same(steps.history["loss"], expected.history["loss"])
    last = run(17, tmp_path)
    kept = sorted(int(f.name) for f in (tmp_path / "steps").iterdir())
    ends = [2, 4, 5, *range(7, 18, 2)]  # the ends of all dispatches
    losses = [np.mean(last.history["loss"][a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    assert kept == sorted({ends[np.argmin(losses)], 15, 17})


def test_config_is_what_a_file_gives_back(tmp_path):
    odd = {"sizes": (1, 2), 3: None}
    run(2, tmp_path, config=odd)
    run(4, tmp_path, config=odd)
    for bad in [{"x": np.float32(1)}, {"x": float("nan")}, {"x": tmp_path}]:
        with raises(TypeError, "`config` must be what JSON can hold", "Convert it"):
            run(2, config=bad)


def test_a_damaged_checkpoint_is_named(tmp_path):
    run(6, tmp_path)
    for file in (tmp_path / "steps" / "6").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with raises(OSError, "step 6", "is damaged", "Delete", "steps/6 to go on from step 4"):
        run(8, tmp_path)
    shutil.rmtree(tmp_path / "steps" / "6")
    assert_same(run(8, tmp_path).theta, whole(8).theta)


def test_functions_in_the_structure_have_no_address():
    def tree():
        return jax.tree_util.Partial(lambda x: x, jnp.ones(2))

    assert checkpoints.about(tree(), KEY, None) == checkpoints.about(tree(), KEY, None)


def test_one_process_at_a_time(tmp_path):
    def callback(step, theta, metrics):
        with raises(RuntimeError, f"is in use by process {os.getpid()} on"):
            run(2, tmp_path)

    run(2, tmp_path, callback=callback)
    run(4, tmp_path)  # the lock ends with the run


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(2, tmp_path / "file")

    def spoil(step, theta, metrics):
        if step == 4:
            while not (tmp_path / "run" / "steps" / "2").is_dir():
                time.sleep(0.01)
            for part in (tmp_path / "run" / "steps").iterdir():
                os.rename(part, tmp_path / part.name)
            os.rmdir(tmp_path / "run" / "steps")
            (tmp_path / "run" / "steps").write_text("in the way")

    with raises(OSError, "could not be written", "make room") as caught:
        run(8, tmp_path / "run", callback=spoil)
    result = caught.value.result
    assert len(result.history["loss"]) >= 4
    assert np.isfinite(float(result.theta["log_rate"]))


def test_fewer_steps_than_were_done(tmp_path):
    run(4, tmp_path)
    with raises(ValueError, "`num_steps` is 2", "has done 4 steps", "another checkpoint_dir"):
        run(2, tmp_path)


def test_sigterm_saves_and_returns(tmp_path, capsys):
    def callback(step, theta, metrics):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    ours = signal.getsignal(signal.SIGTERM)
    stopped = run(12, tmp_path, callback=callback)
    assert "stopped by SIGTERM after step 4 of 12" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is ours
    assert len(stopped.history["loss"]) == 4
    assert_same(stopped.theta, whole(4).theta)
    assert (tmp_path / "steps" / "4").is_dir()
    assert_same(run(12, tmp_path).theta, whole(12).theta)


SCRIPT = """
import resource, sys, time
import jax
jax.config.update("jax_num_cpu_devices", 8)  # as in the tests, whose compiled programs it finds
jax.config.update("jax_cpu_enable_async_dispatch", False)
import numpy as np
from tests.test_checkpoints import run
num_steps, folder, full_at = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
def callback(step, theta, metrics):
    print(step, flush=True)
    if step == full_at:  # no file can grow any more
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    time.sleep(0.05)
notes = []
try:
    result = run(num_steps, folder, callback=callback)
except OSError as error:
    result, notes = error.result, [str(error), *error.__notes__]
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
np.save(folder + "/theta.npy", np.asarray(result.theta["start"]))
np.savez(folder + "/history.npz", **result.history)
print("end", *notes)
"""


def half_written(folder):
    return any("tmp" in file.name for file in (folder / "steps").glob("*"))


def started(folder, num_steps, full_at=-1):
    """Starts a process that calls ``run``; from step ``full_at`` on its disk is full."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(num_steps), str(folder), str(full_at)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_is(folder, expected):
    """Asserts that the finished process wrote the theta and history of this run."""
    np.testing.assert_array_equal(np.load(folder / "theta.npy"), expected.theta["start"])
    history = np.load(folder / "history.npz")
    assert set(history) == set(expected.history)
    for name, value in expected.history.items():
        np.testing.assert_array_equal(history[name], value, err_msg=name)


def test_killed_at_random_moments_and_with_a_full_disk(tmp_path):
    """The result equals an undisturbed run.

    The first process meets a full disk: it keeps the run so far in memory, and earlier checkpoints
    stay whole. Six more processes get SIGKILL, every second one while it writes a checkpoint.
    """
    draws, kills, hits, num_steps = np.random.default_rng(0), 6, 0, 60
    process = started(tmp_path, num_steps, full_at=6)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "could not be written" in printed
    assert re.search("last checkpoint is that of step [24],", printed)
    done = len(np.load(tmp_path / "history.npz")["loss"])
    assert done in (6, 8)
    assert_is(tmp_path, run(done))
    for kill in range(kills + 1):
        process = started(tmp_path, num_steps)
        if kill < kills:
            for _ in range(draws.integers(1, 4)):
                present(process.stdout).readline()
            time.sleep(draws.uniform(0, 0.1))
            while kill % 2 and process.poll() is None and not half_written(tmp_path):
                time.sleep(0.0005)
            assert process.poll() is None, "the run ended before it was killed: make it longer"
            process.kill()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == (-signal.SIGKILL if kill < kills else 0), errors
        hits += kill < kills and half_written(tmp_path)
    assert hits > 0
    assert not half_written(tmp_path)  # the remains of killed runs are removed
    assert_is(tmp_path, run(num_steps))


def test_goes_on_with_another_number_of_devices(tmp_path):
    run(2, tmp_path)
    run(4, tmp_path, num_devices=2)
    assert_same(run(6, tmp_path).theta, whole(6).theta, rtol=1e-5)


def test_refuses_another_run(tmp_path):
    run(2, tmp_path)
    with raises(ValueError, "holds another run", "config.a: 1 -> 2", "another checkpoint_dir"):
        run(4, tmp_path, config={"a": 2})
    with raises(ValueError, "key: ", "-> "):
        run(4, tmp_path, key=jax.random.key(1))
    with raises(ValueError, "opt_state", "absent"):
        run(4, tmp_path, optimizer=optax.sgd(0.05))
    problem, theta = quadratic()
    other = ug.average(build("pes", problem, truncation=10), 4)
    with raises(ValueError, "structure: ...", "truncation=5,", "truncation=10,") as caught:
        given = {"num_steps": 4, "key": KEY, "config": {"a": 1}}
        ug.fit(other, theta, optax.adam(0.05), checkpoint_dir=tmp_path, **given)
    assert len(str(caught.value)) < 800


def test_leaves_without_numbers_and_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def init(key, theta):
        return {"buffer": jnp.zeros((0, 3)), "x": jax.random.normal(key), "z": jnp.zeros((2, 0))}

    def step(key, theta, state, t):
        return state, (theta - 1) ** 2 + state["x"]

    one = ug.pes(ug.UnrolledProblem(init, step, 4), truncation=2, sigma=0.1)
    folder, sizes = "~/run", {"steps_per_dispatch": 2}
    results = [
        ug.fit(one, jnp.zeros(()), OUTER, num_steps=n, key=KEY, checkpoint_dir=place, **sizes)
        for n, place in ((2, folder), (4, folder), (4, None))
    ]
    assert_same(results[1], results[2])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("folder", ["gs://bucket/run", Path("s3://bucket/run")])
def test_a_bucket_is_refused_before_the_first_step(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with raises(ValueError, "`checkpoint_dir` must be a folder of this machine", "bucket/run"):
        run(2, folder)
    assert not list(tmp_path.iterdir())
