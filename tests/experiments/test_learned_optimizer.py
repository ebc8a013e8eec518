"""``learned_optimizer`` and ``evaluate_optimizer``: tasks, meta-training, going on, evaluation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import raises
from stored import expect

import unrollgrad as ug
from experiments import __main__ as cli
from experiments import evaluate_optimizer, learned_optimizer, results
from experiments import experiment as framework
from experiments.learned_optimizers import tasks
from experiments.learned_optimizers.mixture import mean_of
from unrollgrad.learned_optimizers import Architecture

KEY = jax.random.key(0)
ADAM = Architecture(lambda key: jnp.log(0.01), lambda log_rate: optax.adam(jnp.exp(log_rate)))


@functools.cache
def family(name, held_out=False):
    sizes = {"hidden": 8, "length": 8} if name == "lstm" else {"num_rows": 64}
    return tasks.FAMILIES[name](**sizes, held_out=held_out)


@pytest.mark.parametrize("name", tasks.FAMILIES)
def test_a_guess_has_a_loss_of_one(name):
    """Fresh weights guess, near enough; zero weights exactly."""
    made = family(name)
    task = made.draw(KEY)
    params = made.init(KEY, task)
    assert 0.8 < made.whole(params, task) < 1.3
    zeros = jax.tree.map(jnp.zeros_like, params)
    np.testing.assert_allclose(made.whole(zeros, task), 1, rtol=1e-5)
    np.testing.assert_allclose(made.loss(zeros, task, KEY), 1, rtol=1e-5)


@pytest.mark.parametrize("name", tasks.FAMILIES)
def test_tasks_are_learned(name):
    """By Adam, on tasks and on held-out ones, that differ from each other."""
    for held_out in (False, True):
        made = family(name, held_out)
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
        assert losses(KEY, jnp.log(1e3)).max() == tasks.CEILING


def test_held_out_images_are_others():
    (train, _), (held_out, _) = tasks._images(False), tasks._images(True)
    assert {tuple(x) for x in np.asarray(train[1])}.isdisjoint(map(tuple, np.asarray(held_out[1])))
    rows = [tuple(x) for part in (train[0], held_out[0]) for x in np.asarray(part)]
    assert len(set(rows)) > 0.99 * len(rows)


def test_masked_units_are_not_trained():
    made = family("mlp")
    task = made.draw(KEY) | {"hidden": jnp.int32(8)}
    grad = jax.grad(made.loss)(made.init(KEY, task), task, KEY)
    assert np.any(grad[0]["kernel"][:, :8])
    assert not np.any(grad[0]["kernel"][:, 8:])
    assert not np.any(grad[1]["kernel"][8:])


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


def test_the_mean_of_estimators():
    """Of two quadratics: gradients, losses, steps and variances as of their mean."""

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
    assert abs(np.mean(grads) + 5) < 5 * se < 0.5
    assert 0.3 < np.var(grads) / float(out.info.grad_variance) < 3
    alone = workers(1.0)
    assert mean_of([alone]) is alone


def meta_train(out, **settings):
    settings = dataclasses.replace(learned_optimizer.SCALES["smoke"], out=out, **settings)
    return framework.execute(learned_optimizer.EXPERIMENT, settings)


def numbers(folder):
    return {(r.seed, r.step, *r.labels.values(), r.metric): r.value for r in results.read(folder)}


def test_smoke(tmp_path, capsys):
    folder = meta_train(tmp_path)
    found = numbers(folder)
    expect(
        "learned_optimizer",
        {"/".join(map(str, k)): v for k, v in found.items() if k[-1] == "meta_loss"},
    )
    assert found[0, 12, "es_single", "inner_steps"] == 96
    assert found[0, 8, "truncated_es", "inner_steps"] == 96
    assert "meta-loss at the end" in capsys.readouterr().out
    summary = results.read_summary(folder)
    says = [claim.says for claim in learned_optimizer.claims(summary)]
    assert says[0] == "es_single ends at a lower meta-loss than truncated_es at equal inner steps"

    # What it leaves can be loaded, and is what it validated.
    saved = ug.learned_optimizers.read(folder / "scheduled_adam-es_single-seed-0.npz")
    assert saved.notes["estimator"] == "es_single"
    evaluate = learned_optimizer.validation(("mlp",), saved.build(), 8, 2)
    np.testing.assert_allclose(
        evaluate(KEY, saved.theta)["meta_loss"], found[0, 12, "es_single", "meta_loss"], rtol=1e-5
    )


@pytest.mark.slow
def test_goes_on_as_if_it_had_never_stopped(tmp_path):
    flags = ["learned_optimizer", "--scale", "smoke", "--estimator", "pes", "--points", "4"]
    cli.main([*flags, "--inner-steps", "192", "--out", str(tmp_path / "part")])
    (part,) = (tmp_path / "part").iterdir()
    cli.main(["learned_optimizer", "--resume", str(part), "--inner-steps", "288"])
    longer = meta_train(tmp_path / "longer", inner_steps=288, points=4, estimator=("pes",))
    mine, theirs = numbers(part), numbers(longer)
    last = max(step for _, step, *_ in theirs)
    assert {k: v for k, v in mine.items() if k[1] == last} == {
        k: v for k, v in theirs.items() if k[1] == last
    }
    with raises(ValueError, "`--resume` goes on with what was begun", "sigma: 0.01 -> 0.5"):
        cli.main(["learned_optimizer", "--resume", str(part), "--sigma", "0.5"])
    with raises(ValueError, "inner_steps: 288 -> 96"):
        cli.main(["learned_optimizer", "--resume", str(part), "--inner-steps", "96"])


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
    return framework.execute(evaluate_optimizer.EXPERIMENT, settings)


def test_evaluation(tmp_path, capsys):
    """A schedule that is constant gives Adam's own numbers; the table has the best rates."""
    rate = evaluate_optimizer.grid("Adam", 3)[1]
    rule = ug.learned_optimizers.scheduled_adam(rate=rate)
    ug.learned_optimizers.save(
        tmp_path / "constant.npz", rule.init(KEY), architecture="scheduled_adam"
    )
    folder = evaluate(tmp_path / "out", tmp_path / "constant.npz")
    found = numbers(folder)
    expect(
        "evaluate_optimizer",
        {"/".join(map(str, k)): v for k, v in found.items() if k[-1].startswith("loss at 2x")},
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
    assert best.startswith("Adam ")
    first, second = evaluate_optimizer.claims(summary)
    assert "below the best of Adam's rates" in first.says
    assert "at 2x the horizon is below the median of Adam's rates" in second.says


def test_files_that_are_none(tmp_path):
    with raises(FileNotFoundError, "none.npz"):
        evaluate(tmp_path / "out", tmp_path / "none.npz")
    assert not (tmp_path / "out").exists()
