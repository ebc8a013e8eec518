"""What ``fit`` returns, as users look at it: curves, pictures, notebooks; and stopping early."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import build, raises
from tests.test_progress import Terminal
from unrollgrad._core import progress
from unrollgrad.types import MadeBy, Worker

KEY = jax.random.key(0)
STILL = optax.sgd(0.0)


@functools.cache
def workers():
    """A deterministic problem: ten windows in an episode."""
    problem, theta = ug.problems.influence_balancing(horizon=50)
    return ug.average(ug.tbptt(problem, truncation=5), 2), problem, theta


@functools.cache
def frozen():
    """A run whose theta does not move, so that only the windows' losses differ."""
    estimator, _, theta = workers()
    return ug.fit(estimator, theta, STILL, num_steps=34, steps_per_dispatch=5, key=KEY)


def test_the_curve_is_the_objective_where_the_losses_are_a_saw():
    _, problem, theta = workers()
    losses = frozen().history["loss"]
    objective = float(ug.episode_loss(problem, KEY, theta))
    np.testing.assert_allclose(losses[:10], losses[20:30], rtol=1e-6)
    assert np.ptp(losses) > 0.5 * objective
    steps, values = frozen().curve()
    np.testing.assert_array_equal(steps, np.arange(10, 35))
    np.testing.assert_allclose(values, objective, rtol=1e-5)
    _, norms = frozen().curve("grad_norm")
    np.testing.assert_allclose(norms, frozen().history["grad_norm"][:10].mean(), rtol=1e-5)


def result(losses, made_by=None, **history):
    """A result whose estimator has these settings."""
    state = Worker(ug.Episode(KEY, jnp.int32(0), jnp.int32(4)), None, made_by or MadeBy("own", ()))
    return ug.FitResult({"a": jnp.ones(2)}, (), state, {"loss": np.asarray(losses), **history})


def test_the_curve_of_other_estimators():
    pes = MadeBy("pes", (("truncation", 2), ("horizon", 6)))
    steps, values = result([3.0, 6.0, 9.0, 0.0], pes).curve()
    assert (steps.tolist(), values.tolist()) == ([3, 4], [6.0, 5.0])
    assert [len(x) for x in result([3.0, 6.0], pes).curve()] == [0, 0]  # not one whole episode
    bptt = MadeBy("bptt", (("horizon", 6),))
    assert result([3.0, 6.0], bptt).curve()[1].tolist() == [3.0, 6.0]
    for unknown in (None, MadeBy("pes", (("truncation", 2), ("horizon", "sampled")))):
        with raises(ValueError, "does not tell how many windows", "Pass num_windows"):
            result([3.0, 6.0], unknown).curve()
        assert result([3.0, 6.0], unknown).curve(num_windows=2)[1].tolist() == [4.5]
    evaluated = result([3.0, 6.0], bptt, evaluated_at=[2], test=np.ones(1))
    for name in ("test", "evaluated_at", "lost"):
        with raises(ValueError, "`name` must be a record", "['loss']", repr(name)):
            evaluated.curve(name)


def axes(figure):
    figure.savefig(io.BytesIO())
    labels = [[line.get_label() for line in axis.lines] for axis in figure.axes]
    assert figure._repr_png_().startswith(b"\x89PNG")
    return labels


def test_the_picture_of_a_run():
    assert axes(frozen().plot()) == [["each step", "mean over the last whole episode"]]
    evaluated = {"evaluated_at": np.array([2]), "test": np.ones(1), "many": np.ones((1, 3))}
    assert axes(result([3.0, 6.0], **evaluated).plot()) == [["each step"], ["test"]]


def test_notebooks_show_tables_without_colours():
    estimator, _, _ = workers()
    shown = estimator._repr_html_()
    assert "average(tbptt(truncation=5), 2)" in shown
    assert "inner steps of an episode</th><td>50<" in shown
    assert "inner steps of a call</th><td>5<" in shown
    run = frozen()._repr_html_()
    steps = frozen().history["loss"]
    for part in (
        "<td>34<",
        f"{steps[0]:.4g} to {steps[-1]:.4g}",
        "mean over 10 windows",
        ">theta<",
    ):
        assert part in run
    many = result([1.0])._replace(theta={f"<{i}>": jnp.ones(2) for i in range(20)})._repr_html_()
    assert "theta[&#x27;&lt;0&gt;&#x27;]" in many
    assert "<0>" not in many
    assert "and 8 leaves more" in many
    for html in (shown, run, many):
        assert "color" not in html
        assert html.count("<table>") == html.count("</table>") == 1


def test_an_estimator_of_ones_own_in_a_notebook():
    own = ug.GradientEstimator(*build("pes", workers()[1])[:2], truncation=5)
    own = own._replace(init=lambda key, theta: None)
    assert own._repr_html_() == "<code>GradientEstimator(truncation=5)</code>"


@pytest.mark.parametrize(
    "stop", [True, np.bool_(True), jnp.array(True)], ids=["bool", "numpy", "jax"]
)
def test_a_callback_that_returns_true_stops(stop, capsys):
    """What else it returns, such as a logger's answer, does not stop."""
    estimator, _, theta = workers()
    answers, seen = iter([None, "logged", 1, False, stop, None]), []

    def callback(step, theta, metrics):
        seen.append(step)
        return next(answers)

    given = {"num_steps": 60, "steps_per_dispatch": 5, "key": KEY, "callback": callback}
    found = ug.fit(estimator, theta, STILL, **given)
    assert seen == [5, 10, 15, 20, 25]
    np.testing.assert_array_equal(found.history["loss"], frozen().history["loss"][:25])
    assert capsys.readouterr().err == ""


def test_the_bar_of_a_stopped_run_is_closed(monkeypatch):
    estimator, _, theta = workers()
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "150")
    given = {"num_steps": 60, "steps_per_dispatch": 5, "key": KEY}
    ug.fit(estimator, theta, STILL, callback=lambda step, *_: step == 15, **given)
    assert not progress.shown()
    text = terminal.getvalue()
    assert " 25%" in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is visible again


def test_a_stopped_run_is_saved_and_goes_on(tmp_path):
    estimator, _, theta = workers()

    def run(callback):
        given = {"num_steps": 34, "steps_per_dispatch": 5, "key": KEY, "checkpoint_every": 20}
        return ug.fit(
            *(estimator, theta, STILL), callback=callback, checkpoint_dir=tmp_path, **given
        )

    assert len(run(lambda step, *_: step == 15).history["loss"]) == 15
    assert (tmp_path / "steps" / "15").exists()
    seen = []
    whole = run(lambda step, *_: seen.append(step))
    assert seen == [20, 25, 30, 34]
    np.testing.assert_array_equal(whole.history["loss"], frozen().history["loss"])
