"""``fit`` with checkpoints: what is continued is what was never interrupted."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import build, quadratic, raises
from unrollgrad import checkpoints

KEY = jax.random.key(0)


def workers(num_devices=None):
    problem, theta = quadratic()
    mesh = num_devices and ug.make_worker_mesh(num_devices)
    return ug.average(build("pes", problem), 4, mesh=mesh), theta


def run(num_steps, folder=None, num_devices=None, **given):
    estimator, theta = workers(num_devices)
    given = {"optimizer": optax.adam(0.05), "key": KEY, "config": {"a": 1}, **given}
    return ug.fit(
        estimator,
        theta,
        num_steps=num_steps,
        steps_per_dispatch=2,
        checkpoint_dir=folder,
        checkpoint_every=2,
        evaluate=lambda key, theta: {"rate": jnp.exp(theta["log_rate"])},
        **given,
    )


def assert_same(a, b, **tolerance):
    """Bit for bit, unless told."""
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, **{"rtol": 0, "atol": 0, **tolerance})


def test_goes_on_where_it_was(tmp_path):
    whole = run(9)
    run(5, tmp_path)
    again = run(5, tmp_path)  # there is nothing left to do
    assert len(again.history["loss"]) == 5
    steps = run(9, tmp_path)
    # The dispatches of the interrupted run end elsewhere; the steps are the same.
    assert steps.history["evaluated_at"].tolist() == [2, 4, 5, 7, 9]
    assert_same(steps.theta, whole.theta)
    assert_same(steps.opt_state, whole.opt_state)
    assert_same(steps.worker_state, whole.worker_state)
    assert_same(steps.history["loss"], whole.history["loss"])
    for num_steps in [11, 13, 15, 17]:
        last = run(num_steps, tmp_path)
    kept = sorted(int(f.name) for f in (tmp_path / "steps").iterdir())
    ends = [2, 4, 5, *range(7, 18, 2)]
    losses = [np.mean(last.history["loss"][a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    assert kept == sorted({ends[np.argmin(losses)], 15, 17})


@pytest.mark.slow
def test_goes_on_with_another_number_of_devices(tmp_path):
    whole = run(6)
    run(2, tmp_path, num_devices=2)
    run(4, tmp_path, num_devices=4)
    assert_same(run(6, tmp_path).theta, whole.theta, rtol=1e-5)


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
    assert_same(run(8, tmp_path).theta, run(8).theta)


def test_functions_in_the_structure_have_no_address():
    def tree():
        return jax.tree_util.Partial(lambda x: x, jnp.ones(2))

    assert checkpoints.about(tree(), KEY, None) == checkpoints.about(tree(), KEY, None)


def test_one_process_at_a_time(tmp_path):
    def callback(step, theta, metrics):
        with raises(RuntimeError, f"is in use by process {os.getpid()} on"):
            run(2, tmp_path)

    run(2, tmp_path, callback=callback)
    run(4, tmp_path)  # the lock is gone with the run


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


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import jax, numpy as np
from test_checkpoints import run
def callback(step, theta, metrics):
    print(step, flush=True)
    time.sleep(0.05)
num_steps, folder = int(sys.argv[1]), sys.argv[2]
result = run(num_steps, folder, callback=callback)
np.save(folder + "/theta.npy", np.asarray(result.theta["start"]))
np.savez(folder + "/history.npz", **result.history)
print("end", len(result.history["loss"]), flush=True)
"""

FULL_DISK = """
import os, resource, sys
sys.path.insert(0, {tests!r})
from test_checkpoints import assert_same, run
num_steps, folder = int(sys.argv[1]), sys.argv[2]
def callback(step, theta, metrics):
    if step == 6:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
try:
    run(num_steps, folder, callback=callback)
except OSError as error:
    print(error, *error.__notes__, sep="\\n")
    done, result = len(error.result.history["loss"]), error.result
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
assert_same(result.theta, run(done).theta)
assert_same(run(num_steps, folder).theta, run(num_steps).theta)
print("end", done)
"""


def started(script, *arguments):
    code = script.format(tests=os.path.dirname(__file__))
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    """No file can grow: the run so far is in memory, the checkpoints before are whole."""
    process = started(FULL_DISK, 12, tmp_path)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "could not be written" in printed
    assert re.search("last checkpoint is that of step [24]", printed)
    assert int(printed.splitlines()[-1].split()[1]) in (6, 8)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, monkeypatch):
    """SIGKILL, again and again: the end is that of a run that was left alone."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    draws, kills, half_written, num_steps = np.random.default_rng(0), 0, 0, 200
    while True:
        process = started(SCRIPT, num_steps, tmp_path)
        if kills < 20:
            for _ in range(draws.integers(1, 6)):
                process.stdout.readline()
            time.sleep(draws.uniform(0, 0.1))
            process.kill()
        _, errors = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
        kills += 1
        half_written += any("tmp" in f.name for f in (tmp_path / "steps").iterdir())
    assert kills == 20
    assert half_written > 0  # some kills came while a checkpoint was being written
    whole = run(num_steps)
    np.testing.assert_array_equal(np.load(tmp_path / "theta.npy"), whole.theta["start"])
    history = np.load(tmp_path / "history.npz")
    assert set(history) == set(whole.history)
    for name, expected in whole.history.items():
        np.testing.assert_array_equal(history[name], expected, err_msg=name)


@pytest.mark.slow
def test_sigterm_saves_and_returns(tmp_path):
    process = started(SCRIPT, 24, tmp_path)
    process.stdout.readline()
    process.terminate()
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "stopped by SIGTERM after step" in errors
    steps = int(printed.split("end ")[1])
    assert 0 < steps < 24
    assert (tmp_path / "steps" / str(steps)).is_dir()
    assert_same(run(24, tmp_path).theta, run(24).theta)
