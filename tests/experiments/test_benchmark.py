"""``benchmark``: estimators and floors compute the same; times are not tested."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from experiments import __main__ as command
from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.cost import benchmark, benchmark_figure, floors, peers, timing, workloads
from tests.helpers import present
from unrollgrad.estimators import REGISTRY

WORKLOAD = workloads.Workload(ug.problems.lorenz, 4, 3, 6, 0.1)


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(benchmark.SCALES["smoke"], out=tmp_path, devices=(1, 8))
    folder = present(framework.execute(benchmark.EXPERIMENT, settings))
    assert (folder / "figure.png").stat().st_size > 10_000
    records = results.read(folder)
    parts = {"estimators", "workers", "devices", "truncation", "horizon", "size", "products"}
    assert {r.labels["part"] for r in records} == parts
    assert all(r.value > 0 for r in records)
    found = benchmark_figure.claims(results.read_summary(folder))
    about = [claim.says.split(":")[0] for claim in found]  # one size: no slope
    assert about == ["medium", "es_single", "pes", "es_single", "pes", "medium"]
    printed = capsys.readouterr().out
    assert "es_single" in printed
    assert "copies of theta per pair" in printed


@pytest.mark.experiments
@pytest.mark.parametrize("name", ["es_single", "truncated_es", "full_es", "tbptt", "bptt"])
def test_the_floor_runs_the_same_steps(name):
    """The floor runs as many inner steps as ``info`` counts, in as many calls."""
    case = floors.case(WORKLOAD, name, jax.random.key(0), particles=6)
    num_pairs = REGISTRY[name].least_pairs
    estimator = REGISTRY[name].build(
        WORKLOAD.make(12)[0], truncation=4, sigma=0.1, num_pairs=num_pairs
    )
    key, theta, state = case.args
    average = ug.average(estimator, case.num_workers)
    estimate = average.estimate(key, theta, state)[0]
    assert case.num_steps == estimate.info.inner_steps
    assert case.num_calls == 12 // (estimator.truncation or 12)
    (state, total), losses = case.episode(*case.args)
    assert losses.shape == (case.num_calls,)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(total))
    np.testing.assert_array_equal(state.episode.t, 0)


@pytest.mark.experiments
def test_the_forward_floor_runs_the_problem():
    """Every particle has its own theta and takes the steps of its worker's episode."""
    problem, theta = ug.problems.lorenz(horizon=12)
    keys = jax.random.split(jax.random.key(0), 2)
    near = 1 + 0.01 * jnp.arange(6.0).reshape(2, 3)
    thetas = jax.tree.map(lambda x: jnp.multiply.outer(near, x), theta)
    _, losses = floors.forwards(problem, 4, 3)(keys, thetas)
    assert losses.shape == (2, 3, 3)  # workers, windows, particles
    for worker, key in enumerate(keys):
        for particle in range(3):
            own = jax.tree.map(lambda x: x[worker, particle], thetas)  # noqa: B023
            state, total = problem.init(key, own), []
            for t in range(12):
                state, loss = problem.step(jax.random.fold_in(key, t), own, state, jnp.int32(t))
                total.append(loss)
            expected = np.reshape(total, (3, 4)).mean(axis=1)
            np.testing.assert_allclose(losses[worker, :, particle], expected, rtol=1e-3)


@pytest.mark.experiments
def test_a_floor_in_single_steps_begins_where_an_episode_does():
    problem, theta = ug.problems.lorenz(horizon=12)
    key = jax.random.key(0)
    other = jax.tree.map(lambda x: x[None] + 1, problem.init(key, theta))
    _, (losses, _) = floors.backwards(problem, 1, 12)(key[None], theta, other)
    _, expected = floors.forwards(problem, 1, 12)(
        key[None], jax.tree.map(lambda x: x[None, None], theta)
    )
    np.testing.assert_allclose(losses[0], expected[0, :, 0], rtol=1e-4)


@pytest.mark.experiments
def test_the_floor_of_backpropagation_is_its_gradient():
    """For each worker it computes the estimators' gradient from the same episode."""
    problem, theta = ug.problems.lorenz(horizon=12)
    key = jax.random.key(0)
    whole = floors.backwards(problem, 12, 1)
    _, grad = whole(key[None], theta, jax.tree.map(lambda x: x[None], problem.init(key, theta)))

    def loss(theta):
        state, total = problem.init(key, theta), 0.0
        for t in range(12):
            state, value = problem.step(jax.random.fold_in(key, t), theta, state, jnp.int32(t))
            total = total + value
        return total / 12

    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(jax.grad(loss)(theta)), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-4)


def test_turns():
    """Every program runs once per turn, in alternating order; the first turn is not counted."""
    ran = []
    programs = {name: lambda name=name: ran.append(name) for name in "ab"}
    turns = list(timing.in_turn(programs, 2))
    assert [turn for turn, _ in turns] == [1, 2]
    assert "".join(ran) == "abbaab"
    assert all(set(seconds) == {"a", "b"} for _, seconds in turns)


def test_numbers_with_commas(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(command, "join", lambda group, devices: None)
    monkeypatch.setattr(framework, "execute", lambda experiment, settings: given.append(settings))
    command.main(["benchmark", "--workers", "1,8,64", "--devices", "1,2", "--out", str(tmp_path)])
    assert given[0].workers == (1, 8, 64)
    assert given[0].devices == (1, 2)


@pytest.mark.experiments
@pytest.mark.parametrize("floor_fits", [True, False])
def test_what_memory_is_too_small_for(floor_fits, monkeypatch, tmp_path, capsys):
    """The rest is measured; the claim says whether the floor fits into memory."""
    quick = timing.Compiled(lambda *args: 0, 1.0, 1.0, 1)
    calls = []

    def compiled_in_turn(programs, count):
        calls.append(programs)
        if len(calls) == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        return dict.fromkeys(programs, quick)

    def floor_alone(*args):
        if not floor_fits:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes")
        return quick

    monkeypatch.setattr(benchmark, "_COMPILED", {})
    monkeypatch.setattr(timing, "compiled_in_turn", compiled_in_turn)
    monkeypatch.setattr(timing, "compiled", floor_alone)
    settings = dataclasses.replace(
        benchmark.SCALES["smoke"],
        out=tmp_path,
        workers=(),
        devices=(),
        truncations=(),
        sizes=(),
        terms=(),
    )
    folder = present(framework.execute(benchmark.EXPERIMENT, settings))
    records = results.read(folder)
    assert {r.labels["estimator"] for r in records if r.metric == "median_ratio"} == {"tbptt"}
    found = {r.metric: r.value for r in records if r.labels["estimator"] == "es_single"}
    assert found == {"out_of_memory": 1.0, "floor_fits": float(floor_fits)}
    assert "out of memory: es_single on medium, 4" in capsys.readouterr().out
    claim = benchmark_figure.claims(results.read_summary(folder))[0]
    says = f"es_single out of memory, its floor {'not' if floor_fits else 'too'}"
    assert says in claim.ours
    if floor_fits:
        assert not claim.holds


@pytest.mark.experiments
def test_other_errors_are_raised(monkeypatch, tmp_path):
    def fails(programs, count):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too many registers")

    monkeypatch.setattr(timing, "compiled_in_turn", fails)
    monkeypatch.setattr(benchmark, "_COMPILED", {})
    settings = dataclasses.replace(benchmark.SCALES["smoke"], out=tmp_path)
    with pytest.raises(jax.errors.JaxRuntimeError, match="registers"):
        framework.execute(benchmark.EXPERIMENT, settings)


def test_claims_can_fail():
    def result(part, estimator, number, metric, mean):
        labels = {"part": part, "workload": "medium", "estimator": estimator, "number": str(number)}
        return {**labels, "metric": metric, "mean": mean, "se": 0.0, "n": 1}

    for factor, holds in ((1, True), (2, False)):
        found = [result("estimators", "pes", 16, "median_ratio", 1.04 * factor)]
        found += [
            result("workers", "pes", n, "median_seconds", n ** (1.0 * factor)) for n in (8, 64)
        ]
        found += [result("size", "pes", 100, "copies_per_pair", 5.4 * factor)]
        claims = benchmark_figure.claims(results.Summary(found, {}))
        assert [claim.holds for claim in claims] == [holds] * 3


@pytest.mark.experiments
def test_outer_loops_of_peers_train_the_same():
    """The loop by hand and ours (and evosax's, if installed) are as far after the same updates."""
    task = peers.TASKS["influence balancing"]._replace(horizon=100)
    loops = peers.programs(task, 300)
    ends = {}
    for name, loop in loops.items():
        if "call" not in name and "jit" not in name:
            end = loop()
            carried = end if hasattr(end, "theta") else end[0]
            ends[name] = float(np.ravel(getattr(carried, "theta", getattr(carried, "mean", 0)))[0])
    start = float(task.make(100)[1])
    assert len(ends) >= 3
    assert abs(ends["by hand"] - start) > 0.2
    for end in ends.values():
        assert end == pytest.approx(ends["by hand"], abs=0.1 * abs(ends["by hand"] - start))
