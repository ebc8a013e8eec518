"""The self-tuning networks' experiments at smoke scale, and the parts that they share."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.cost import stn_cost as cost
from experiments.stn import language, regularised, searches, training
from experiments.stn import stn_quadratic as quadratic
from experiments.stn import stn_regularisation as regularisation
from experiments.stn import stn_schedules as schedules
from tests.helpers import present


def test_the_lowest_loss_so_far():
    losses = np.array([[3.0, 1.0], [2.0, 5.0], [np.nan, 0.0], [2.5, 6.0], [1.0, 7.0]])
    expected = [[3, 1], [2, 5], [2, 5], [2, 5], [1, 7]]
    np.testing.assert_array_equal(training.lowest(losses), expected)
    assert training.lowest(np.full((2, 2), np.nan))[-1, 0] == np.inf


@pytest.mark.experiments
@pytest.mark.parametrize("name", ["drop 1", "decay 1"])
def test_a_range_and_its_constraint(name):
    here = regularised.RANGES[name]
    assert here.at(0.0) == here.low
    np.testing.assert_allclose(here.at(1.0), here.high)
    middle = np.sqrt(here.low * here.high) if here.log else (here.low + here.high) / 2
    np.testing.assert_allclose(here.at(0.5), middle)
    kind = here.constraint()
    np.testing.assert_allclose(kind.to_value(jnp.zeros(())), middle, rtol=1e-5)
    np.testing.assert_allclose(kind.to_value(kind.to_theta(jnp.float32(middle))), middle, rtol=1e-5)
    for end in (here.low, here.high):  # a search may choose the ends
        assert np.isfinite(kind.to_theta(jnp.float32(end)))


def test_searches_look_where_they_should():
    """A grid ties its hyperparameters, and Bayesian optimisation gathers near the minimum."""
    pytest.importorskip("optuna")
    names = ("drop 1", "drop 2", "decay 1")
    ranges = {name: regularised.RANGES[name] for name in names}
    tried, losses = {}, {}
    for kind, number in {searches.GRID: 20, searches.RANDOM: 40, searches.BAYES: 40}.items():
        seen, found = tried.setdefault(kind, []), losses.setdefault(kind, [])

        def trial(values, seen=seen, found=found):
            seen.append(values)
            found.append((values["drop 1"] - 0.2) ** 2 + (values["drop 2"] - 0.6) ** 2)
            return found[-1] if len(seen) > 1 else float("nan")  # one that diverges

        searches.search(kind, ranges, trial, number, seed=0)
        assert len(seen) == number
        for values, name in itertools.product(seen, names):
            assert ranges[name].low <= values[name] <= ranges[name].high
    assert len({(v["drop 1"], v["decay 1"]) for v in tried[searches.GRID]}) == 20
    assert all(v["drop 1"] == v["drop 2"] for v in tried[searches.GRID])
    assert np.mean(losses[searches.BAYES][20:]) < 0.4 * np.mean(losses[searches.RANDOM][20:])


@pytest.mark.experiments
def test_the_spread_by_theory_is_that_of_a_recursion():
    """Moments of the recursion are summed by hand, over many steps, from many draws of e."""
    settings = dataclasses.replace(
        quadratic.SCALES["cpu"], weights=1, hyperparameters=1, noise_rate=0.05
    )
    here = quadratic.problem(settings, 0)
    here = here._replace(direction=jnp.array([1.0]), curvature=jnp.array([0.8]))
    rng, rate, theta = np.random.default_rng(0), settings.noise_rate, 2.0
    for method in quadratic.METHODS:
        weight, slope = np.zeros(10_000), np.zeros(10_000)
        for _ in range(1000):
            e, noise = rng.standard_normal((2, len(weight)))
            noise = settings.noise * noise
            if method == "stn":
                g = 0.8 * (weight + slope * (theta + e)) + noise
                weight, slope = weight - rate * g, slope - rate * g * (theta + e)
            else:
                g = 0.8 * (weight + slope * e) + noise
                weight, slope = weight - rate * (0.8 * weight + noise), slope - rate * g * e
        found = quadratic.stationary(settings, method, here, theta)
        np.testing.assert_allclose(np.mean(slope**2), found, rtol=0.05)


@pytest.mark.experiments
def test_cutout_greys_whole_pixels():
    x = jnp.ones((64, 8, 8, 1))
    for side, most in ((0.9, 0), (2.9, 4), (3.0, 9)):
        cut = np.sum(np.asarray(regularised._cut(jnp.float32(side), x, jax.random.key(0))) == 0, 1)
        assert cut.sum((1, 2)).max() == most


@pytest.mark.experiments
def test_every_hyperparameter_of_the_conv_net_matters():
    """Each changes the training loss; none the validation loss."""
    sizes = regularised.Sizes(train=100, validation=100, batch=50, validation_batch=100)
    here = regularised.task("conv_net", sizes, 0.1, regularised.data(sizes, 0))
    params, names = here.init_params(jax.random.key(0)), regularised.NAMES["conv_net"]
    batch = here.sample_batch(jax.random.key(1))

    @jax.jit
    def losses(theta):
        key = jax.random.key(2)
        return here.loss(theta, params, batch, key), here.meta_loss(theta, params, key)

    low = dict.fromkeys(names, jnp.float32(-6.0))
    training, validation = losses(low)
    for name in names:
        other = losses({**low, name: jnp.float32(1.0)})
        assert abs(other[0] - training) > 1e-4, name
        assert other[1] == validation


@pytest.mark.experiments
def test_quadratic_smoke(tmp_path, capsys):
    settings = dataclasses.replace(quadratic.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(quadratic.EXPERIMENT, settings))
    summary = results.read_summary(folder)

    def of(metric, method):
        return summary.find(metric, method=method, radius="3")["mean"]

    for method in quadratic.METHODS:
        assert of("jacobian", method) < quadratic.CLOSE
        assert of("hypergradient", method) < 0.01
        assert of("theta", method) < 0.01
    assert of("spread_by_theory", "delta_stn") == pytest.approx(1, abs=0.1)
    assert 0.3 < of("bias", "delta_stn") < 2.5
    assert of("bias_of_wrong", "delta_stn") > 20
    assert of("steps_needed", "delta_stn") < of("steps_needed", "stn")
    assert "closed form" in capsys.readouterr().out


@pytest.mark.experiments
def test_regularisation_smoke(tmp_path, capsys):
    pytest.importorskip("optuna")
    settings = dataclasses.replace(regularisation.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(regularisation.EXPERIMENT, settings))
    summary = results.read_summary(folder)
    for method in regularisation.COLORS:
        found = summary.find("validation", method=method, hyperparameter="")["mean"]
        assert found < 1.0 < np.log(10)  # a guess
    names = {r["hyperparameter"] for r in summary.results if r["metric"] == "share"}
    assert names == set(regularised.NAMES["mlp"])
    assert all(claim.holds is None for claim in regularisation.claims(summary))  # one seed
    assert "random search: validation" in capsys.readouterr().out


@pytest.mark.experiments
def test_schedules_smoke(tmp_path, capsys):
    settings = dataclasses.replace(schedules.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(schedules.EXPERIMENT, settings))
    records = results.read(folder)
    rates = {
        method: [r.value for r in records if r.metric == "dropout" and r.labels["method"] == method]
        for method in schedules.METHODS
    }
    assert rates[schedules.REPLAY] == rates[schedules.TUNED]
    assert set(rates[schedules.LAST]) == {rates[schedules.TUNED][-1]}
    assert len(set(rates[schedules.TUNED])) > 1
    summary = results.read_summary(folder)
    losses = [summary.find("validation", method=m, rate="")["mean"] for m in schedules.METHODS]
    assert max(losses) < np.log(language.VOCABULARY)
    assert "nats per character" in capsys.readouterr().out


def test_shuffling_keeps_the_values():
    settings, rng = schedules.SCALES["smoke"], np.random.default_rng(0)
    schedule = np.linspace(0.1, 0.6, 40)
    found = schedules.used(settings, schedule, 0.3, rng)
    np.testing.assert_array_equal(np.sort(found[schedules.SHUFFLED]), np.sort(schedule))
    assert not np.array_equal(found[schedules.SHUFFLED], schedule)
    assert found[schedules.LAST] == schedule[-1]
    assert np.std(found[schedules.PERTURBED]) == pytest.approx(settings.noise, rel=0.3)


@pytest.mark.experiments
def test_dropout_keeps_the_mean():
    """Of the LSTM's logits: the loss is split there."""
    sizes = language.Sizes(hidden=8, embed=4, window=4, batch=512, train=200)
    here = language.task(sizes, 0.01, language.data(sizes))
    params = here.init_params(jax.random.key(0))
    batch = jnp.broadcast_to(here.sample_batch(jax.random.key(1))[:1], (512, 5))

    @jax.jit
    def logits(theta, key):
        return here.loss.predict({language.DROP: theta}, params, batch, key)

    kind = language.RANGE.constraint()
    high, low = (
        np.asarray(logits(kind.to_theta(jnp.float32(rate)), jax.random.key(2)))
        for rate in (0.5, 0.001)
    )
    error = high.std(0) / np.sqrt(len(high))
    assert np.mean(np.abs(high.mean(0) - low.mean(0)) < 4 * error + 0.02) > 0.98
    assert isinstance(here.loss, ug.stn.SplitLoss)


@pytest.mark.experiments
def test_cost_smoke(tmp_path, capsys):
    """The kept memory is the weights, the response's slopes, and one scale of each output."""
    settings = dataclasses.replace(cost.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(cost.EXPERIMENT, settings))
    assert "delta_stn, linear outputs" in capsys.readouterr().out
    summary = results.read_summary(folder)
    weights = sum(x.size for x in jax.tree.leaves(cost.init_params(settings, jax.random.key(0))))
    for use in settings.uses:
        assert present(summary.find("median_ratio", use=use, kind=cost.PLAIN))["mean"] == 1
        for kind in (cost.DELTA, cost.LINEAR, cost.STN):
            kept = present(summary.find("weights", use=use, kind=kind))["mean"]
            assert 2 < kept < 2 + 6 * 18 / weights
    assert len(cost.claims(summary)) == 6
