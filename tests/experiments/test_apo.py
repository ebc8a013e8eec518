"""The APO experiments at smoke scale, and their parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.apo import (
    apo_autoencoder,
    apo_learning_rate,
    apo_regression,
    apo_rosenbrock,
    proximal_training,
)
from experiments.cost import apo_cost
from tests.helpers import present
from tests.stored import expect
from unrollgrad import apo


def smoke(module, tmp_path):
    settings = dataclasses.replace(module.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(module.EXPERIMENT, settings))
    assert (folder / "figure.png").stat().st_size > 10_000
    return results.read(folder), results.read_summary(folder)


@pytest.mark.experiments
def test_learning_rate(tmp_path, capsys):
    records, summary = smoke(apo_learning_rate, tmp_path)
    ours, fixed, step_decay, cosine, osgm = (
        apo_learning_rate.finals(records, "MLP", "SGD", method)
        for method in apo_learning_rate.methods("SGD")
    )
    assert ours["1"] < ours["0.01"] < ours["0.0001"] < np.log(10)
    expect("apo_learning_rate", [*ours.values(), *fixed.values()])
    assert len(fixed) == len(step_decay) == len(cosine) == len(osgm) == 1  # the tuned ones
    rates = [r for r in records if r.metric == "learning_rate"]
    assert {r.labels["rate"] for r in rates} == {"0.0001", "0.01", "1"}
    assert len(apo_learning_rate.claims(summary)) == 6
    assert "cosine decay" in capsys.readouterr().out


@pytest.mark.experiments
def test_labels_that_are_wrong():
    """The floor is the labels' entropy, and batches have the stated share of wrong labels."""
    task = apo_learning_rate.task("MLP", 20_000, 0.3)
    images, labels = task.sample(jax.random.key(0))
    clean = apo_learning_rate.task("MLP", 20_000, 0.0).sample(jax.random.key(0))
    np.testing.assert_array_equal(images, clean[0])
    share = float(jnp.mean(jnp.any(labels != clean[1], axis=-1)))
    assert abs(share - 0.3 * 0.9) < 4 * np.sqrt(0.27 * 0.73 / 20_000)
    p = np.array([0.7 + 0.03, *[0.03] * 9])
    np.testing.assert_allclose(apo_learning_rate.floor(0.3), -np.sum(p * np.log(p)))
    assert apo_learning_rate.floor(0.0) == 0


def test_claims_about_learning_rates_can_fail():
    """They compare what is above the floor; a run that diverged gives no verdict."""

    def result(method, rate, mean):
        labels = {"net": "MLP", "base": "SGD", "method": method, "rate": rate}
        return {**labels, "metric": "excess", "mean": mean, "se": 1e-4, "n": 5}

    names = apo_learning_rate.FIXED, apo_learning_rate.DECAY, apo_learning_rate.COSINE
    found = [
        result(name, "0.1", mean) for name, mean in zip(names, (0.05, 0.04, 0.03), strict=True)
    ]
    found.append(result(apo_learning_rate.OSGM, "1, 1", 0.09))
    ours = {
        "good": (0.028, 0.029),
        "near": (0.052, 0.053),
        "bad": (0.05, 0.06),
        "diverged": (0.05, float("nan")),
    }
    expected = {
        "good": [True] * 6,
        "near": [True, False, True, False, False, True],
        "bad": [False, False, False, False, False, True],
        "diverged": [None] * 6,
    }
    for name, means in ours.items():
        both = [
            result(apo_learning_rate.APO, r, m) for r, m in zip(("0.1", "1"), means, strict=True)
        ]
        claims = apo_learning_rate.claims(results.Summary(found + both, {}))
        assert [claim.holds for claim in claims] == expected[name]
        assert ("diverged" in claims[0].ours) == (name == "diverged")


def test_claims_about_preconditioners_can_fail():
    def result(method, mean, metric, **labels):
        return {"method": method, "metric": metric, "mean": mean, "se": 0.1, "n": 5, **labels}

    def holds(module, ours, others, metric, **labels):
        found = [result(k, v, metric, **labels) for k, v in {**ours, **others}.items()]
        return [claim.holds for claim in module.claims(results.Summary(found, {}))]

    nan, log = float("nan"), "log10_final"
    apo_name, others = apo_regression.APO, {"Adam": -7.0, "KFAC": -9.0}
    assert holds(apo_regression, {apo_name: -9.5}, others, log) == [True, True]
    assert holds(apo_regression, {apo_name: -5.0}, others, log) == [False, False]
    assert holds(apo_regression, {apo_name: nan}, others, log) == [None, None]
    assert holds(apo_regression, {apo_name: -9.5}, {"Adam": nan, "KFAC": nan}, log) == [None, None]
    names = (
        apo_rosenbrock.APO_DENSE,
        apo_rosenbrock.APO_RATE,
        apo_rosenbrock.ADAM,
        apo_rosenbrock.GRADIENT_DESCENT,
    )
    for values, verdicts in (
        ((-20, -3, -6, -1), [True, True, True]),
        ((-1, -3, -6, -9), [False, False, False]),
        ((nan, -3, -6, -1), [True, None, None]),
    ):
        ours = dict(zip(names, map(float, values), strict=True))
        assert holds(apo_rosenbrock, ours, {}, "log10_loss") == verdicts
    for ours, verdicts in ((2.0, [True, True]), (5.0, [False, False]), (nan, [None, None])):
        found = {apo_autoencoder.APO: ours, "SGD": 4.0, "Adam": 3.0}
        labels = {"dtype": "float32", "rate": "1"}
        assert holds(apo_autoencoder, found, {}, "final", **labels) == verdicts


@pytest.mark.experiments
def test_regression(tmp_path, capsys):
    _, summary = smoke(apo_regression, tmp_path)
    logs = {r["method"]: r["mean"] for r in summary.results if r["metric"] == "log10_final"}
    assert set(logs) == set(apo_regression.METHODS)
    assert logs[apo_regression.APO] < -3
    assert logs[apo_regression.NATURAL] < -10
    expect("apo_regression", logs[apo_regression.APO])
    assert len(apo_regression.claims(summary)) == 2
    assert "APO preconditioner" in capsys.readouterr().out


@pytest.mark.experiments
def test_natural_gradient_takes_its_share_of_the_residual():
    """A Gauss-Newton step of 0.01 leaves 0.99 of the residual and 0.9801 of the loss."""
    with jax.enable_x64(True):
        task = apo_regression.task(0, 10.0, 8)
        params = task.init(jax.random.key(0))
        optimizer = apo_regression.natural_gradient(0.01, 1e-10)
        gradient = jax.grad(task.evaluate)(params)
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        near = task.evaluate(optax.apply_updates(params, updates))
        np.testing.assert_allclose(near / task.evaluate(params), 0.9801, atol=2e-3)


def test_best_is_finite():
    assert proximal_training.best({"a": float("nan"), "b": 2.0, "c": 1.0}) == "c"


@pytest.mark.experiments
def test_rosenbrock(tmp_path, capsys):
    _, summary = smoke(apo_rosenbrock, tmp_path)
    ends = {r["method"]: r["mean"] for r in summary.results if r["metric"] == "loss"}
    assert ends[apo_rosenbrock.NEWTON] < 1e-2
    methods = apo_rosenbrock.GRADIENT_DESCENT, apo_rosenbrock.APO_RATE, apo_rosenbrock.APO_DENSE
    expect("apo_rosenbrock", [ends[method] for method in methods])
    assert len(apo_rosenbrock.claims(summary)) == 3
    capsys.readouterr()


@pytest.mark.experiments
def test_rosenbrock_is_half_of_its_residuals_squared():
    x, y = 0.3, -0.4
    value = apo_rosenbrock.rosenbrock(jnp.array([x, y]))
    np.testing.assert_allclose(value, (1 - x) ** 2 + 100 * (y - x**2) ** 2, rtol=1e-6)


@pytest.mark.experiments
def test_autoencoder(tmp_path, capsys):
    records, summary = smoke(apo_autoencoder, tmp_path)
    found = {
        (r["dtype"], r["method"]): r["mean"]
        for r in summary.results
        if r["metric"] == "final" and r["method"] == apo_autoencoder.APO
    }
    assert set(found) == {("float32", apo_autoencoder.APO), ("bfloat16", apo_autoencoder.APO)}
    first = max(r.value for r in records if r.metric == "loss")
    assert all(value < 0.8 * first for value in found.values())
    expect("apo_autoencoder", found["float32", apo_autoencoder.APO])
    assert len(apo_autoencoder.claims(summary)) == 4
    capsys.readouterr()


@pytest.mark.experiments
def test_bernoulli_divergence():
    logits, reference = jnp.array([[0.3, -1.0]]), jnp.array([[0.5, 2.0]])
    p, q = jax.nn.sigmoid(reference), jax.nn.sigmoid(logits)
    exact = jnp.sum(p * jnp.log(p / q) + (1 - p) * jnp.log((1 - p) / (1 - q)))
    found = apo_autoencoder.bernoulli_divergence(logits, reference)
    np.testing.assert_allclose(found, [exact], rtol=1e-5)
    np.testing.assert_allclose(apo_autoencoder.bernoulli_divergence(logits, logits), [0], atol=1e-7)


@pytest.mark.experiments
def test_cost(tmp_path, capsys):
    records, _ = smoke(apo_cost, tmp_path)
    assert {r.labels["kind"] for r in records} == set(apo_cost.optimizers(apo_cost.Settings()))
    assert all(r.value > 0 for r in records if r.metric in ("milliseconds", "memory"))
    assert "copies of the weights" in capsys.readouterr().out
    settings = dataclasses.replace(apo_cost.SCALES["smoke"], num_steps=7, out=tmp_path)
    with pytest.raises(ValueError, match="must be a multiple of meta_interval=10"):
        framework.execute(apo_cost.EXPERIMENT, settings)


@pytest.mark.experiments
def test_training_loop():
    """The loop passes the same arguments to the optimizer as a loop written by hand."""
    task = apo_learning_rate.task("MLP", 8, 0.1)
    optimizer, key = apo.learning_rate(optax.sgd, 0.1, meta_interval=2), jax.random.key(0)
    params, losses, rates = proximal_training.train(task, optimizer, key, 4, 2)
    key_params, key_batches = jax.random.split(key)
    by_hand = task.init(key_params)
    state = optimizer.init(by_hand)
    for keys in jax.random.split(key_batches, (2, 2)):
        for k in keys:
            batch, other = map(task.sample, jax.random.split(k))
            updates, state = optimizer.update(
                jax.grad(task.loss)(by_hand, batch),
                state,
                by_hand,
                loss=task.loss,
                predict=task.predict,
                batch=batch,
                other_batch=other,
            )
            by_hand = optax.apply_updates(by_hand, updates)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(by_hand), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(losses[-1], task.evaluate(by_hand), rtol=1e-5)
    np.testing.assert_allclose(rates[-1], optax.tree.get(state, "learning_rate"), rtol=1e-5)
    with pytest.raises(ValueError, match="`points` must divide `num_steps`=4; got points=3"):
        proximal_training.train(task, optimizer, key, 4, 3)
