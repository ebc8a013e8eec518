"""``replay`` equals ``bptt``, keeps few states, counts its steps, goes on after it was killed."""

import collections
import contextlib
import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from tests.helpers import counted, mistyped, numbers, quadratic, raises
from tests.replayed import bits, replayed, spread, trainings
from unrollgrad._core import unroll
from unrollgrad._replay import replay as replaying
from unrollgrad._replay import schedule, storage

KEY, OTHER = jax.random.key(3), jax.random.key(4)
ROOT = Path(__file__).parents[1]


@functools.partial(jax.jit, static_argnums=0)
def whole(problem, theta):
    """What ``bptt`` estimates for the episode of ``KEY``."""
    estimator = ug.bptt(problem)
    return estimator.estimate(KEY, theta, estimator.init(KEY, theta))[0]


def furthest(a, b):
    """The largest difference of two trees, leaf by leaf, relative to the leaf's largest number."""
    pairs = zip(*(jax.tree.leaves(numbers(tree)) for tree in (a, b)), strict=True)
    return max(np.max(np.abs(x - y)) / np.max(np.abs(y)) for x, y in pairs)


@contextlib.contextmanager
def watched(monkeypatch, look):
    """Calls ``look(text, done, total)`` after every dispatch."""

    @contextlib.contextmanager
    def bar(total, unit):
        yield lambda text, done: look(text, done, total)

    with monkeypatch.context() as patch:
        patch.setattr(replaying, "progress_bar", bar)
        yield


# The schedule: numbers alone.

GRID = [
    (num_steps, arity, most)
    for num_steps in (1, 2, 3, 17, 100, 999, 1000, 1024, 3125, 4096)
    for arity in (2, 3, 5, 8, 10, 16, 64, 100)
    for most in (1, 5, 16, 100, 1000)
]


def test_the_path_to_a_leaf_is_a_way_down_a_tree():
    tree = schedule.tree(27, 3, 1)
    assert list(schedule.path(tree, 26)) == [0, 9, 18, 21, 24, 25, 26]
    assert list(schedule.path(tree, 17)) == [0, 9, 12, 15, 16, 17]
    assert list(schedule.path(tree, 9)) == [0, 9]
    assert list(schedule.path(tree, 0)) == [0]


@pytest.mark.parametrize("missing", [False, True])
def test_every_leaf_is_reached_whatever_is_stored(missing):
    """Stored states may be missing, as after a kill; those that are kept are few."""
    rng = random.Random(0)
    for num_steps, arity, most in GRID[:200]:
        tree, stored = schedule.tree(num_steps, arity, most), set[int]()
        for leaf in reversed(range(tree.num_leaves)):
            if missing and rng.random() < 0.2:
                stored = {place for place in stored if rng.random() < 0.5}
            origin, stops = schedule.moves(tree, leaf, stored)
            assert origin in {0, *stored}
            assert [origin, *stops] == sorted({origin, *stops})
            assert [origin, *stops][-1] == leaf
            stored = {place for place in {*stored, *stops} if place < leaf}
            assert len(stored) + 1 <= schedule.num_states(tree)


def test_states_and_passes_are_those_of_the_theory():
    """At most k ceil(log_k T) + 2 states, and 1 + ceil(log_k T) passes."""
    for num_steps, arity, most in GRID:
        tree = schedule.tree(num_steps, arity, most)
        levels = schedule.depth(tree)
        assert schedule.num_states(tree) <= arity * levels + 2, tree
        # One more if a dispatch is too short for a node.
        allowed = num_steps * (1 + levels + (arity > most))
        assert schedule.forward_steps(tree) <= allowed, tree


@pytest.mark.parametrize(
    ("arity", "above", "inside"), [(2, 6, 6), (4, 3, 3), (16, 2, 1), (8, 4, 0)]
)
def test_forward_steps_by_the_formula(arity, above, inside):
    tree = schedule.tree(arity ** (above + inside), arity, arity**inside)
    assert tree.leaf_steps == arity**inside
    expected = tree.num_steps * (1 + inside + above * (1 - 1 / arity))
    assert schedule.forward_steps(tree) == expected


# The computation.


def test_equals_bptt_for_three_optimizers():
    problem, theta = trainings(100)
    expected = whole(problem, theta)
    got = ug.replay(problem, KEY, theta, arity=3, steps_per_dispatch=10)
    assert furthest(got[:2], expected[:2]) < 1e-6
    assert jax.tree.map(jnp.result_type, got) == jax.tree.map(jnp.result_type, expected)


def test_equals_bptt_in_double_precision():
    with jax.enable_x64(True):
        problem, theta = trainings(100)
        expected = whole(problem, theta)
        got = ug.replay(problem, KEY, theta, arity=3, steps_per_dispatch=10)
        assert expected.loss.dtype == np.float64
        assert furthest(got[:2], expected[:2]) < 1e-12
        other = ug.replay(problem, jax.random.key(4), theta, arity=3, steps_per_dispatch=10)
        assert furthest(other[:2], expected[:2]) > 1e-3  # negative control


def step_that_counts(seen):
    """A step that counts its runs; the count is a factor of the state, so that it is not cut."""

    def count(t):
        seen[int(t)] += 1
        return np.float32(1)

    def step(key, theta, s, t):
        one = jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32), t)
        s = jnp.sin(one * s + theta)
        return s, jnp.sum(s**2)

    return step


@pytest.mark.parametrize(("num_steps", "arity", "most"), [(64, 2, 8), (100, 3, 10), (60, 8, 4)])
def test_runs_as_many_steps_as_the_schedule_says(num_steps, arity, most):
    seen = collections.Counter[int]()
    problem = ug.UnrolledProblem(
        lambda key, th: th * jnp.ones(3), step_that_counts(seen), num_steps
    )
    got = ug.replay(problem, KEY, jnp.float32(0.3), arity=arity, steps_per_dispatch=most)
    tree = schedule.tree(num_steps, arity, most)
    assert sum(seen.values()) == schedule.forward_steps(tree) == int(got.info.inner_steps)


def long_problem(size=977):
    """4096 steps of a state of ``size`` numbers, a shape that no other array has."""

    def step(key, theta, s, t):
        s = theta * jnp.roll(s, 1) + jnp.sin(s)
        return s, jnp.mean(s)

    problem = ug.UnrolledProblem(lambda key, theta: jnp.linspace(0, theta, size), step, 4096)
    return problem, jnp.float32(0.1)


@pytest.mark.parametrize(("arity", "most"), [(2, 64), (8, 100)])
def test_few_states_are_alive(arity, most, monkeypatch):
    """At T = 4096: arrays between the dispatches, and by count the branches in a dispatch."""
    problem, theta = long_problem()
    alive, levels = [], round(np.log(4096) / np.log(arity))

    def look(text, done, total):
        alive.append(sum(x.shape == (977,) for x in jax.live_arrays()))

    with watched(monkeypatch, look):
        ug.replay(problem, KEY, theta, arity=arity, steps_per_dispatch=most)
    tree = schedule.tree(4096, arity, most)
    above = max(sum(1 for _ in schedule.path(tree, i)) for i in range(tree.num_leaves))
    assert max(alive) <= above + 2  # the path, the cotangent, and a copy while it is stored
    inside = sum(unroll.branches(tree.leaf_steps, arity))
    assert max(alive) + inside <= arity * levels + 2


def test_nothing_compiles_after_the_first_dispatches(monkeypatch):
    """Neither in the call, nor in a second one with another theta and key."""
    problem, theta = quadratic(100)
    seen = []
    with counted() as programs, watched(monkeypatch, lambda *_: seen.append(programs[0])):
        ug.replay(problem, KEY, theta, steps_per_dispatch=8)
        dispatches, first = len(seen), programs[0]
        theta = jax.tree.map(lambda x: x + np.float32(0.1), theta)
        key = jax.random.key(5)
        before = programs[0]
        ug.replay(problem, key, theta, steps_per_dispatch=8)
        assert programs[0] == before
    place = [i for i, count in enumerate(seen[:dispatches]) if count == seen[dispatches - 1]]
    assert place[0] < 0.4 * dispatches
    assert first > 0


# Interrupted and killed.


class Stop(BaseException):
    """An interruption in the middle."""


def test_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """It is stopped ten times, after a few dispatches each; all it loses is the last dispatch."""
    problem, theta = quadratic(100)
    run = functools.partial(ug.replay, problem, KEY, theta, arity=3, steps_per_dispatch=10)
    expected = bits(run())
    rng, left, works = random.Random(0), [0], []

    def look(text, done, total):
        works.append((done, total))
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    monkeypatch.setattr(storage, "SECONDS", 0)
    with watched(monkeypatch, look):
        for _ in range(10):
            left[0] = rng.randrange(1, 4)
            with pytest.raises(Stop):
                run(folder=tmp_path)
        assert bits(run(folder=tmp_path)) == expected
        (done, total), calls = works[-1], len(works)
        assert done == total < works[0][1] - 10 * 9  # the bar ends full, and shows what was left
        assert bits(run(folder=tmp_path)) == expected  # the folder has the result
        assert len(works) == calls
    assert not list(tmp_path.rglob("state-*"))


def test_a_folder_belongs_to_one_computation(tmp_path):
    problem, theta = quadratic(20)
    run = functools.partial(ug.replay, folder=tmp_path, steps_per_dispatch=4)
    first = run(problem, KEY, theta)
    moved = jax.tree.map(lambda x: x + np.float32(0.1), theta)
    doubled = lambda state, loss: (state, 2 * loss)  # noqa: E731
    other = problem._replace(step=lambda *args: doubled(*problem.step(*args)))
    for changed in (
        functools.partial(run, problem, jax.random.key(9), theta),
        functools.partial(run, problem, KEY, moved),
        functools.partial(run, other, KEY, theta),
        functools.partial(run, problem, KEY, theta, arity=4),
    ):
        with raises(ValueError, "another computation", "programs, theta, key", "another folder"):
            changed()
    assert bits(run(problem, KEY, theta)) == bits(first)
    (newest,) = tmp_path.rglob("pulled-0.npz")
    newest.write_bytes(newest.read_bytes()[:100])
    with raises(OSError, "pulled-0.npz is damaged", "Delete it"):
        run(problem, KEY, theta)
    newest.unlink()
    (newest.parent / "pulled-by_hand.npz").write_bytes(b"")  # not ours
    assert bits(run(problem, KEY, theta)) == bits(first)
    (about,) = tmp_path.rglob("about.json")
    for damage in (about.unlink, lambda: about.write_text(""), lambda: about.write_text("[]")):
        damage()
        with raises(ValueError, "another computation", "programs, theta, key: None ->"):
            run(problem, KEY, theta)


def switching(first, second, data):
    """Two rates, the later one from step 4 on; each step adds the mean of data in a jitted call."""
    mean = jax.jit(lambda state: jnp.mean(data) + 0 * state)

    def step(key, theta, state, t):
        state = state - jnp.where(t < 4, first, second) * (state - theta) + mean(state)
        return state, state**2

    return ug.UnrolledProblem(lambda key, theta: 0 * theta, step, horizon=8)


def test_a_folder_tells_programs_that_hardly_differ(tmp_path):
    """Operands in another order, and data inside a jitted function, make another computation."""
    run = functools.partial(ug.replay, folder=tmp_path, steps_per_dispatch=4)
    data, theta = np.arange(4, dtype=np.float32), jnp.float32(0.5)
    first = run(switching(0.1, 0.4, data), KEY, theta)
    for other in (switching(0.4, 0.1, data), switching(0.1, 0.4, data[::-1] + 1)):
        with raises(ValueError, "another computation", "programs, theta, key"):
            run(other, KEY, theta)
    assert bits(run(switching(0.1, 0.4, data), KEY, theta)) == bits(first)


def test_a_jitted_helper_may_close_over_a_key():
    inner = jax.jit(lambda state: jax.random.normal(OTHER) * state)
    problem = ug.UnrolledProblem(
        lambda key, theta: theta, lambda key, theta, s, t: (inner(s), s), horizon=2
    )
    theta = jnp.float32(0.5)
    found = ug.replay(problem, KEY, theta).grad
    np.testing.assert_allclose(found, (1 + jax.random.normal(OTHER)) / 2, rtol=1e-6)
    np.testing.assert_allclose(ug.episode_loss(problem, KEY, theta), found * theta, rtol=1e-6)


def killed(folder, kills, seed):
    """Kills the program so often, each time a little after it has pulled back a random leaf."""
    rng, leaves = random.Random(seed), 1024 // 8
    for leaf in sorted(rng.sample(range(8, leaves - 4), kills), reverse=True):
        process = subprocess.Popen([sys.executable, "-m", "tests.replayed", folder], cwd=ROOT)
        try:
            while process.poll() is None:
                found = (f.stem.partition("-")[2] for f in Path(folder).rglob("pulled-*.npz"))
                if min(map(int, found), default=leaves) <= leaf:
                    break
                time.sleep(0.001)
            time.sleep(0.01 * rng.random())
            assert process.poll() is None
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    command = [sys.executable, "-m", "tests.replayed", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.experiments)])
def test_a_killed_run_ends_with_the_same_bits(kills, tmp_path):
    expected = bits(replayed(None))
    assert killed(str(tmp_path), kills, kills).strip() == expected


# Storage.


def odd_tree():
    mesh = ug.make_worker_mesh(4)
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("workers"))
    return {
        "key": jax.random.split(jax.random.key(1), 3),
        "half": jnp.arange(3, dtype=jnp.bfloat16) / 3,
        "int": jnp.int32(7),
        "empty": jnp.zeros((0, 2)),
        "spread": jax.device_put(jnp.arange(8.0), spread),
        "whole": jax.device_put(
            jnp.arange(3.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        ),
    }


def test_states_come_back_as_they_were(tmp_path, monkeypatch):
    """From the devices, from the host and from the disk: numbers, dtypes and layouts."""
    tree = odd_tree()
    with storage.opened(tmp_path, {}) as (place, queue):
        disk = storage.on_disk(place, "state", tree, queue)
        device = storage.in_memory(tree, 3)
        monkeypatch.setattr(storage, "_fit_on_devices", lambda like, number: False)
        host = storage.in_memory(tree, 3)
        for kept in (disk, device, host):
            kept.keep(5, tree)
            found = kept.find(5)
            for x, y in zip(*map(jax.tree.leaves, (found, tree)), strict=True):
                assert (x.dtype, x.sharding, x.committed) == (y.dtype, y.sharding, y.committed)
                np.testing.assert_array_equal(numbers(x), numbers(y))
            assert kept.places() == {5}
            kept.drop(5)
            assert kept.places() == set()
    assert not list(tmp_path.rglob("*.npz"))


def test_states_that_do_not_fit_are_on_the_host(monkeypatch):
    assert storage.fits(49, {"bytes_limit": 200, "bytes_in_use": 100})
    assert not storage.fits(51, {"bytes_limit": 200, "bytes_in_use": 100})
    assert storage.fits(51, None)
    problem, theta = quadratic(20)
    expected = bits(ug.replay(problem, KEY, theta, steps_per_dispatch=4))
    monkeypatch.setattr(storage, "fits", lambda size, stats: False)
    assert bits(ug.replay(problem, KEY, theta, steps_per_dispatch=4)) == expected


def test_a_state_that_is_spread_over_a_mesh(tmp_path, monkeypatch):
    problem, theta = spread(64)
    seen = []
    with counted() as programs, watched(monkeypatch, lambda *_: seen.append(programs[0])):
        got = ug.replay(problem, KEY, theta, steps_per_dispatch=8)
    assert seen[-1] == seen[len(seen) // 2]
    assert furthest(got[:2], whole(problem, theta)[:2]) < 1e-6
    again = ug.replay(problem, KEY, theta, steps_per_dispatch=8, folder=tmp_path)
    assert bits(again) == bits(got)


def test_errors():
    problem, theta = quadratic(20)
    with raises(ValueError, "`arity` must be at least 2; got 1"):
        ug.replay(problem, KEY, theta, arity=1)
    with raises(TypeError, "`steps_per_dispatch` must be a whole number"):
        ug.replay(problem, KEY, theta, steps_per_dispatch=mistyped(1.5))
    with raises(ValueError, "replay needs a static horizon"):
        ug.replay(problem._replace(horizon=lambda key: 3), KEY, theta)
    with raises(TypeError, "`replay` is a loop", "traced", 'remat="log"'):
        jax.eval_shape(functools.partial(ug.replay, problem, KEY), theta)
    looping = ug.UnrolledProblem(
        lambda key, theta: theta,
        lambda key, theta, s, t: (
            jax.lax.while_loop(lambda x: x < 3, lambda x: x + theta, s),
            s,
        ),
        10,
    )
    with raises(ValueError, "replay differentiates `step` in reverse mode", "while_loop"):
        ug.replay(looping, KEY, jnp.float32(1))
