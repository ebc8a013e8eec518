"""``control`` at smoke scale, MuJoCo's robots against Gymnasium's, and what the claims need."""

import dataclasses
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from experiments._framework import experiment as framework
from experiments._framework import results, tuning
from experiments.estimators import control, control_tuning
from experiments.problems import robots
from tests.helpers import present, raises
from tests.stored import expect

robot = pytest.mark.parametrize(
    ("name", "environment"), [("swimmer", "Swimmer-v5"), ("half_cheetah", "HalfCheetah-v5")]
)


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(control.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(control.EXPERIMENT, settings))
    assert folder.name.startswith("control-cart_pole")
    summary = results.read_summary(folder)
    assert all(claim.holds is None for claim in control.claims(summary))  # one seed
    assert "return at the end" in capsys.readouterr().out
    steps = {
        name: summary.find("inner_steps", estimator=name)["mean"] for name in settings.estimators
    }
    assert steps == {name: 4000 for name in settings.estimators} | {"truncated_es": 6000}
    records = [r for r in results.read(folder) if r.metric == "return"]
    (first,) = {r.value for r in records if r.step == 0}
    after = {name: summary.find("return", estimator=name)["mean"] for name in settings.estimators}
    assert after["nres"] > first  # its workers are in the middle of their second episodes
    assert all(after[name] > 0.3 * first for name in after if name != "nres")  # minus a loss
    # Cart-pole amplifies rounding: another division of XLA's code moved "nres" by a tenth.
    expect("control experiment", {"before": first, **after})


@pytest.mark.experiments
@pytest.mark.parametrize("env", ["swimmer", "half_cheetah"])
def test_smoke_of_a_robot(env, tmp_path):
    pytest.importorskip("mujoco", reason="needs the extra `control`")
    few = {"horizon": 20, "truncation": 10, "num_pairs": 2, "num_steps": 2, "num_episodes": 1}
    rates = (1e-3,) * 5
    settings = dataclasses.replace(
        control.SCALES["smoke"], out=tmp_path, env=env, learning_rates=rates, **few
    )
    folder = present(framework.execute(control.EXPERIMENT, settings))
    assert folder.name.startswith(f"control-{env}")
    found = results.read_summary(folder).find("return", estimator="es_single")["mean"]
    assert np.isfinite(found)


def test_pairs_that_do_not_divide(tmp_path):
    settings = dataclasses.replace(control.SCALES["smoke"], out=tmp_path, num_pairs=5)
    with raises(ValueError, "`--num-pairs` must be a multiple of the 10 windows", "got 5"):
        framework.execute(control.EXPERIMENT, settings)


def test_a_setting_for_each_method(tmp_path):
    settings = dataclasses.replace(control.SCALES["smoke"], out=tmp_path, sigmas=(0.1, 0.2))
    with raises(ValueError, "`--sigmas` must have a number for each of", "got (0.1, 0.2)"):
        framework.execute(control.EXPERIMENT, settings)
    settings = control.Settings(estimators=("nres", "pes_staggered"))  # the second was not tuned
    with raises(ValueError, "`--sigmas` must have a number for each of", "nres, pes_staggered"):
        control.filled(settings)


def test_settings_of_the_papers():
    """What is given stays; the rest is the environment's: published, or as tuned."""
    given = (0.1, 0.2, 0.3, 0.4, 0.5)
    filled = control.filled(control.Settings(scale="paper", env="half_cheetah", sigmas=given))
    assert (filled.sigmas, filled.num_pairs, filled.truncation) == (given, 300, 20)
    assert filled.num_steps == 1000
    assert filled.learning_rates == (3e-5, 3e-5, 3e-6, 3e-5, 3e-5)
    filled = control.filled(control.Settings(estimators=("pes", "nres")))
    tuned = control.TUNED["swimmer"]
    assert (filled.sigmas[1], filled.learning_rates[0]) == (tuned["nres"].sigma, tuned["pes"].rate)
    assert filled.num_pairs == 10


def test_what_was_tuned():
    """The settings are the best of the recorded grids, all of whose runs had other seeds.

    A recorded run of ``control`` has the record of its grid beside it.
    """
    recorded = Path(control_tuning.__file__).parents[1] / "results"
    tuned = {path.name.split("-")[1]: path for path in recorded.glob("control_tuning-*")}
    shown = {path.name.split("-")[1] for path in recorded.glob("control-*")}
    assert tuned
    assert shown <= set(tuned)
    for env, folder in tuned.items():
        records = results.read(folder)
        found = {k: (x.sigma, x.rate) for k, x in control_tuning.best(records).items()}
        assert found == control.TUNED[env], env
        assert not {r.seed for r in records} & set(control.Settings().seeds)
        assert len(set(Counter(r.labels["estimator"] for r in records).values())) == 1  # runs


def test_the_best_pair():
    """The mean over the seeds decides; what is not finite in a seed counts as the worst."""
    table = {(0.1, 1.0): (3, 3), (0.1, 2.0): (4, 4), (0.1, 3.0): (9, np.nan), (0.2, 4.0): (1, 8)}
    table |= {(0.2, 5.0): (1, 7), (0.3, 1.0): (-np.inf, 9), (0.2, 2.0): (1, 2)}
    labels = {case: dict(zip(("sigma", "rate"), map(str, case), strict=True)) for case in table}
    records = [
        results.Record(seed, None, {"estimator": "pes", **labels[case]}, "mean_return", value)
        for case, values in table.items()
        for seed, value in enumerate(values)
    ]
    found = control_tuning.best(records)
    assert found == {"pes": (0.2, 4.0, 4.5, False)}
    without = [r for r in records if r.labels["rate"] != "5.0"]
    assert control_tuning.best(without)["pes"].at_edge


@pytest.mark.experiments
def test_smoke_of_tuning(tmp_path, capsys):
    """A run with a sigma and a rate of the grid is the run that ``control`` makes with them."""
    settings = dataclasses.replace(control_tuning.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(control_tuning.EXPERIMENT, settings))
    assert folder.name.startswith("control_tuning-cart_pole")
    assert "nres  sigma" in capsys.readouterr().out
    labels = {"estimator": "nres", "sigma": "1.0", "rate": "3.0"}
    found = results.read_summary(folder).find("return", **labels)["mean"]
    sizes = control.filled(control.Settings(env="cart_pole"))
    problem, theta = control.example(sizes)
    nres = ug.average(ug.es_single(problem, truncation=10, sigma=1.0), 10, stagger="breakstep")
    key = jax.random.key(101)
    theta = ug.fit(nres, theta, optax.sgd(3.0), num_steps=4, key=key).theta
    again = control.mean_return(sizes, problem, control_tuning.TESTED, theta)
    assert abs(found / float(again) - 1) < 1e-3


def test_along_a_run():
    settings = control.filled(control.Settings())
    returns = [100.0, *range(20)]
    found = control.along(settings, "full_es", returns)
    assert found == {"mean_return": 9.5, "return_in_a_row": 1.0}  # a tenth of 20 points
    assert control.along(settings, "nres", returns) == {"mean_return": 9.5}
    cheetah = control.filled(control.Settings(env="half_cheetah"))  # a fiftieth: the first point
    assert control.along(cheetah, "full_es", returns)["return_in_a_row"] == 0.0


@pytest.mark.parametrize("other", [np.nan, 5.0])
def test_claims_can_fail(other):
    """Nres is better than all others, or worse, or diverged."""

    def claims(nres):
        found = [
            {"estimator": name, "metric": metric, "mean": mean, "se": 0.1, "n": 3}
            for name, mean in {
                "full_es": 10.0,
                "truncated_es": 8.0,
                "pes": 7.0,
                "nres": nres,
            }.items()
            for metric in ("return", "mean_return", "return_in_a_row")
        ]
        return control.claims(results.Summary(found, {"config": {"env": "half_cheetah"}}))

    good, bad = claims(20.0), claims(other)
    assert [claim.holds for claim in good] == [True] * 4
    about_nres = [claim.holds for claim in bad if claim.says.startswith("nres")]
    assert about_nres == [None if np.isnan(other) else False] * 3


@robot
def test_a_robot_moves_as_gymnasiums(name, environment):
    """Ten steps with random controls: the same positions, velocities and rewards."""
    gymnasium = pytest.importorskip("gymnasium", reason="needs the extra `control`")
    pytest.importorskip("mujoco", reason="needs the extra `control`")
    theirs = gymnasium.make(environment).unwrapped
    about, advance = robots.ROBOTS[name], robots.engine(name).advance
    num_positions = theirs.model.nq
    draw = np.random.default_rng(0)
    theirs.reset(seed=1)
    state = np.concatenate([theirs.data.qpos, theirs.data.qvel])
    for _ in range(10):
        controls = draw.uniform(-1.5, 1.5, theirs.model.nu)
        *state, moved = advance(np.concatenate([state, controls]))
        state = np.array(state)
        seen, reward, *_ = theirs.step(controls)
        expected = np.concatenate([theirs.data.qpos, theirs.data.qvel])
        np.testing.assert_allclose(state, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state[about.hidden :], seen, rtol=1e-5, atol=1e-5)
        cost = about.control_cost * np.sum(controls**2)
        assert abs(moved / theirs.dt - cost - reward) < 1e-4
    assert num_positions + theirs.model.nv == state.size
    assert np.abs(state[num_positions:]).max() > 0.1


@robot
def test_a_robots_problem(name, environment):
    """The loss is minus Gymnasium's reward for the linear policy; an episode repeats exactly."""
    gymnasium = pytest.importorskip("gymnasium", reason="needs the extra `control`")
    pytest.importorskip("mujoco", reason="needs the extra `control`")
    problem, theta = robots.robot(name, horizon=5)
    theta = theta + 0.1 * np.random.default_rng(0).standard_normal(theta.shape, np.float32)

    @jax.jit
    def run(keys):
        losses = jax.vmap(lambda key: ug.episode_loss(problem, key, theta))(keys)
        return losses, jax.vmap(lambda key: problem.init(key, theta))(keys)

    losses, _ = run(jax.random.split(jax.random.key(0), 3))
    again, _ = run(jax.random.split(jax.random.key(0), 3))
    np.testing.assert_array_equal(losses, again)
    assert len(set(losses.tolist())) == 3

    theirs = gymnasium.make(environment).unwrapped
    theirs.reset(seed=0)
    step = jax.jit(problem.step)
    state, key = np.concatenate([theirs.data.qpos, theirs.data.qvel]), jax.random.key(0)
    state = jnp.asarray(state, jnp.float32)
    for t in range(3):
        controls = theta @ state[robots.ROBOTS[name].hidden :]
        _, reward, *_ = theirs.step(np.asarray(controls, np.float64))
        state, loss = step(key, theta, state, jnp.int32(t))
        assert abs(float(loss) + reward) < 1e-3


@robot
def test_a_batch_of_robots(name, environment):
    """Each robot of a batch moves as it does alone, bit for bit; leading axes stay."""
    pytest.importorskip("mujoco", reason="needs the extra `control`")
    model, advance = robots.engine(name)
    draw = np.random.default_rng(0)
    given = np.float32(0.1 * draw.standard_normal((2, 3, model.nq + model.nv + model.nu)))
    found = advance(given)
    assert (found.dtype, found.shape) == (np.float32, (2, 3, model.nq + model.nv + 1))
    np.testing.assert_array_equal(found[1, 2], advance(given[1, 2]))


@robot
def test_a_lost_robot(name, environment, tmp_path, monkeypatch):
    """NaN or huge numbers are handed on as NaN; MuJoCo would zero them, and warn in a file."""
    pytest.importorskip("mujoco", reason="needs the extra `control`")
    monkeypatch.chdir(tmp_path)
    model, advance = robots.engine(name)
    rows = np.full((4, model.nq + model.nv + model.nu), 0.05)
    lost = rows.copy()
    lost[1, -1], lost[2, 0] = np.nan, 1e12
    whole, found = advance(rows), advance(lost)
    np.testing.assert_array_equal(found[[0, 3]], whole[[0, 3]])
    assert np.isnan(found[1:3]).all()
    assert np.isfinite(whole).all()
    assert not list(tmp_path.iterdir())


def test_without_mujoco(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    robots.engine.cache_clear()
    with raises(ImportError, 'needs MuJoCo: pip install "unrollgrad[control]"'):
        robots.robot("swimmer")


@pytest.mark.experiments
@pytest.mark.parametrize(("rates", "best"), [((0.1, 1.0, 3.0), 1.0), ((0.1, 1e30), 0.1)])
def test_best_rate_of_a_parabola(rates, best):
    """Gradient descent on x^2 / 2 arrives in one step with the rate 1 and diverges with 3."""
    problem = ug.UnrolledProblem(
        init=lambda key, x: x, step=lambda key, x, state, t: (state, x**2 / 2), horizon=1
    )
    trial = tuning.Trial(
        ug.bptt(problem), optax.sgd, num_steps=4, every=2, loss=lambda x: x**2 / 2 + 1e-3
    )
    keys = jax.random.split(jax.random.key(0), 2)
    found = tuning.best_rate(trial, rates, keys, jnp.float32(1))
    assert found == best
