"""``learned_optimizer`` and ``evaluate_optimizer``: tasks, meta-training, evaluation."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from experiments import __main__ as cli
from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.learned import evaluate_optimizer, learned_optimizer, tasks
from experiments.learned.mixture import mean_of
from tests.helpers import present, raises
from tests.stored import expect
from unrollgrad.learned_optimizers import Architecture

KEY = jax.random.key(0)
ADAM = Architecture(lambda key: jnp.log(0.01), lambda log_rate: optax.adam(jnp.exp(log_rate)))


@functools.cache
def family(name: str, part: Literal["training", "validation", "test"] = "training"):
    sizes = {"hidden": 8, "length": 8} if name == "lstm" else {"num_rows": 64}
    return tasks.FAMILIES[name](**sizes, part=part)


@pytest.mark.experiments
@pytest.mark.parametrize("name", tasks.FAMILIES)
def test_a_guess_has_a_loss_of_one(name):
    """Fresh weights have about the loss of a guess; zero weights have it exactly."""
    made = family(name)

    @jax.jit
    def losses(key):
        task = made.draw(key)
        params = made.init(key, task)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return made.whole(params, task), made.whole(zeros, task), made.loss(zeros, task, key)

    fresh, *guesses = losses(KEY)
    assert 0.8 < fresh < 1.3
    np.testing.assert_allclose(guesses, 1, rtol=1e-5)


@pytest.mark.experiments
@pytest.mark.parametrize("name", tasks.FAMILIES)
def test_tasks_are_learned(name):
    """Adam learns the tasks for training and for tests; tasks differ from each other."""
    for part in ("training", "test"):
        made = family(name, part)
        problem = tasks.problem(made, ADAM, 60)
        drawn = [jax.tree.leaves(made.draw(jax.random.key(i))) for i in range(2)]
        assert any(not np.array_equal(a, b) for a, b in zip(*drawn, strict=True))

        @jax.jit
        def losses(key, theta, problem=problem):
            def step(state, t):
                return problem.step(jax.random.fold_in(key, t), theta, state, t)

            return jax.lax.scan(step, problem.init(key, theta), jnp.arange(60))[1]

        found = losses(KEY, jnp.log(0.01))
        assert found[-10:].mean() < 0.85 * found[:5].mean()
        assert found.max() <= tasks.CEILING
        for much in (1e3, 1e30):  # divergence, and NaN
            assert losses(KEY, jnp.log(much)).max() == tasks.CEILING
        assert np.isfinite(losses(KEY, jnp.log(1e30))).all()


@pytest.mark.experiments
def test_the_parts_share_no_image():
    parts = [tasks._images(part) for part in ("training", "validation", "test")]
    for images in ([part.digits for part in parts], [part.noise for part in parts]):
        rows = [tuple(x) for part in images for x in part]
        assert len(set(rows)) > 0.99 * len(rows)
    made = family("mlp")
    task = made.draw(KEY)
    assert len(set(task["rows"].tolist())) == 64
    assert np.any(task["patterns"] != made.draw(jax.random.key(1))["patterns"])
    assert 0.25 < np.std(task["patterns"]) < 0.5


@pytest.mark.experiments
@pytest.mark.parametrize("name", tasks.FAMILIES)
def test_families_are_made_in_one_trace_after_another(name):
    """They keep no tracer of an earlier trace."""
    tasks._images.cache_clear()
    for scale in (1.0, 2.0):

        @jax.jit
        def loss(key, scale=scale):
            made = tasks.FAMILIES[name](part="validation")
            task = made.draw(key)
            return scale * made.loss(made.init(key, task), task, key)

        assert loss(KEY) > 0


@pytest.mark.experiments
def test_masked_units_are_not_trained():
    made = family("mlp")
    task = made.draw(KEY) | {"hidden": jnp.int32(8)}
    grad = jax.grad(made.loss)(made.init(KEY, task), task, KEY)
    assert np.any(grad[0]["kernel"][:, :8])
    assert not np.any(grad[0]["kernel"][:, 8:])
    assert not np.any(grad[1]["kernel"][8:])


@pytest.mark.experiments
def test_patches_make_a_convolution():
    x = jax.random.normal(KEY, (2, 8, 8, 3))
    kernel = jax.random.normal(KEY, (27, 5))
    expected = jax.lax.conv_general_dilated(
        x,
        kernel.reshape(3, 3, 3, 5),
        (2, 2),
        ((0, 1), (0, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(tasks._patches(x) @ kernel, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.experiments
def test_the_mean_of_estimators():
    """On two quadratics: gradients, losses, steps and variances of the mean."""

    def workers(target):
        problem = ug.UnrolledProblem(
            lambda key, theta: jnp.zeros(()), lambda key, theta, s, t: (s, (theta - target) ** 2), 4
        )
        return ug.average(ug.es_single(problem, truncation=2, sigma=0.1), 8)

    both = mean_of([workers(1.0), workers(4.0)])
    theta, state = jnp.float32(0.0), both.init(KEY, jnp.float32(0.0))
    grads = []
    for i in range(400):
        out, state = jax.jit(both.estimate)(jax.random.fold_in(KEY, i), theta, state)
        grads.append(float(out.grad))
    assert int(out.info.inner_steps) == 2 * 8 * 2 * 2
    assert int(state.episode.t[0]) == 0
    np.testing.assert_allclose(out.loss, (1 + 16) / 2, rtol=0.02)
    se = np.std(grads) / np.sqrt(len(grads))
    assert abs(np.mean(grads) + 5) < 5 * se < 1
    assert 0.3 < np.var(grads) / float(out.info.grad_variance) < 3
    alone = workers(1.0)
    assert mean_of([alone]) is alone


def meta_train(out, **settings):
    settings = dataclasses.replace(learned_optimizer.SCALES["smoke"], out=out, **settings)
    return present(framework.execute(learned_optimizer.EXPERIMENT, settings))


def numbers(folder: Path) -> dict[tuple[Any, ...], float]:
    return {(r.seed, r.step, *r.labels.values(), r.metric): r.value for r in results.read(folder)}


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    folder = meta_train(tmp_path)
    found = numbers(folder)
    expect(
        "learned_optimizer experiment",
        {"/".join(map(str, k)): v for k, v in found.items() if k[-1] == "meta_loss"},
    )
    assert found[0, 12, "es_single", "inner_steps"] == 96
    assert found[0, 8, "truncated_es", "inner_steps"] == 96
    assert "meta-loss at the end" in capsys.readouterr().out
    summary = results.read_summary(folder)
    says = [claim.says for claim in learned_optimizer.claims(summary)]
    assert says[0] == "es_single ends at a lower meta-loss than truncated_es at equal inner steps"

    # The saved optimizer can be loaded and is the validated one.
    saved = ug.learned_optimizers.read(folder / "scheduled_adam-es_single-seed-0.npz")
    assert saved.notes["estimator"] == "es_single"
    assert saved.notes["horizon"] == 8
    knots = tuple(saved.settings["knots"])
    assert knots == (0, 3, 8)
    evaluate = learned_optimizer.validation(("mlp",), "scheduled_adam", (("knots", knots),), 8, 2)
    np.testing.assert_allclose(
        evaluate(KEY, saved.theta)["meta_loss"], found[0, 12, "es_single", "meta_loss"], rtol=1e-5
    )


@pytest.mark.experiments
def test_goes_on_as_if_it_had_never_stopped(tmp_path):
    flags = ["learned_optimizer", "--scale", "smoke", "--estimators", "pes", "--families", "mlp"]
    cli.main([*flags, "conv", "--out", str(tmp_path / "part")])
    (part,) = (tmp_path / "part").iterdir()
    cli.main(["learned_optimizer", "--resume", str(part), "--budget", "192", "--seeds", "0", "1"])
    whole = {"budget": 192, "seeds": (0, 1), "families": ("mlp", "conv")}
    assert numbers(part) == numbers(meta_train(tmp_path / "whole", estimators=("pes",), **whole))
    for flags, said in (
        (["--sigma", "0.5"], "sigma: 0.1 -> 0.5"),
        (["--budget", "96"], "budget: 192 -> 96"),
        (["--seeds", "0"], "seeds: [0, 1] -> [0]"),
        (["--scale", "paper"], "scale: smoke -> paper"),
    ):
        with raises(ValueError, "`--resume` goes on with what was begun", said):
            cli.main(["learned_optimizer", "--resume", str(part), *flags])


def test_settings_that_are_wrong(tmp_path):
    for changes, said in [
        ({"num_workers": 0}, "`--num-workers` must be at least 1"),
        ({"shortest": 9}, "`--shortest` must lie between 1 and --horizon=8; got 9"),
    ]:
        with raises(ValueError, said):
            meta_train(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def evaluate(out, *files):
    settings = dataclasses.replace(evaluate_optimizer.SCALES["smoke"], out=out, files=files)
    return present(framework.execute(evaluate_optimizer.EXPERIMENT, settings))


@pytest.mark.experiments
def test_evaluation(tmp_path, capsys):
    """A constant schedule gives the numbers of Adam itself; the table has the best rates."""
    rate = evaluate_optimizer.grid("Adam", 3)[1]
    rule = ug.learned_optimizers.scheduled_adam(rate=rate)
    ug.learned_optimizers.save(
        tmp_path / "constant.npz",
        rule.init(KEY),
        architecture="scheduled_adam",
        notes={"horizon": 10},
    )
    folder = evaluate(tmp_path / "out", tmp_path / "constant.npz")
    found = numbers(folder)
    expect(
        "evaluate_optimizer",
        {
            "/".join(map(str, k)): v
            for k, v in found.items()
            if k[-1].startswith("loss at 2x") and k[3] != "Adam 1"  # diverges: rounding decides
        },
    )
    for length in (1, 2, 5):
        metric = f"loss at {length}x"
        np.testing.assert_allclose(
            found[0, 10 * length, "mlp", "constant", metric],
            found[0, 10 * length, "mlp", f"Adam {rate:.3g}", metric],
            rtol=0.02,
        )
        assert (
            found[0, 10 * length, "mlp", "constant", metric]
            == (found[0, 10 * length, "mlp", "constant", "loss"])
        )
    begins = {v for k, v in found.items() if k[1] == 0 and k[0] == 0}
    assert len(begins) == 1
    printed = capsys.readouterr().out
    assert "median of Adam's rates" in printed
    assert "constant" in printed
    summary = results.read_summary(folder)
    best = evaluate_optimizer.best_rate(summary.results, "mlp", "Adam")
    assert present(best).startswith("Adam ")
    (claim,) = evaluate_optimizer.claims(summary)
    assert claim.says.startswith("mlp, constant: training loss at the horizon below")
    adam = [v for k, v in found.items() if k[0] == 0 and k[3][:4] == "Adam" and "1x" in k[4]]
    np.testing.assert_allclose(
        found[0, None, "mlp", "constant", evaluate_optimizer.OVER_BEST],
        found[0, 10, "mlp", "constant", "loss at 1x"] / min(adam),
    )


def test_claims_of_an_evaluation_can_fail():
    def summary(best, median):
        series = {"family": "mlp", "optimizer": "mine", "se": 0.1, "n": 3}
        found = {evaluate_optimizer.OVER_BEST: best, evaluate_optimizer.OVER_MEDIAN: median}
        return results.Summary([{**series, "metric": m, "mean": v} for m, v in found.items()], {})

    cases = [(0.7, 0.1, True), (1.9, 0.1, False), (0.7, 1.9, False), (0.9, 0.1, None)]
    for best, median, holds in cases:
        (claim,) = evaluate_optimizer.claims(summary(best, median))
        assert claim.holds is holds
    assert evaluate_optimizer.claims(summary(np.nan, 0.1))[0].holds is None


def test_files_that_do_not_do(tmp_path):
    out = tmp_path / "out"
    with raises(FileNotFoundError, "none.npz"):
        evaluate(out, tmp_path / "none.npz")
    rule = ug.learned_optimizers.scheduled_sgd()
    for name, notes in (("a", {"horizon": 10}), ("b", {"horizon": 20}), ("Adam", {"horizon": 10})):
        path = tmp_path / f"{name}.npz"
        theta = rule.init(KEY)
        ug.learned_optimizers.save(path, theta, architecture="scheduled_sgd", notes=notes)
    with raises(ValueError, "different horizons", "'a': 10, 'b': 20", "Give --horizon"):
        evaluate(out, tmp_path / "a.npz", tmp_path / "b.npz")
    with raises(ValueError, "`--files` must be learned optimizers", "Adam"):
        evaluate(out, tmp_path / "Adam.npz")
    assert not out.exists()


def test_signal_to_noise():
    """An expected gradient of norm 2 with a variance of 1 has a mean squared norm of 5."""
    history = {"grad_norm": np.sqrt([4.0, 6.0]), "grad_variance": np.array([0.5, 1.5])}
    assert learned_optimizer.signal_to_noise(history) == pytest.approx(4)
    history["grad_variance"] = np.array([4.0, 6.0])
    assert learned_optimizer.signal_to_noise(history) == pytest.approx(0)
