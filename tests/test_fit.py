"""``fit``: the same as a loop by hand, in few dispatches of one program."""

import gc
import itertools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import build, quadratic, raises

KEY = jax.random.key(0)
OUTER = optax.adam(0.05)


def workers(**given):
    problem, theta = quadratic()
    return ug.average(build("pes", problem), 4, **given), theta


def by_hand(estimator, theta, num_steps, data=None):
    state = estimator.init(KEY, theta)  # nothing of it is used: all episodes begin anew
    opt_state, losses = OUTER.init(theta), []
    for s in range(num_steps):
        given = {} if data is None else {"data": data(s)}
        estimate, state = estimator.estimate(jax.random.fold_in(KEY, s), theta, state, **given)
        updates, opt_state = OUTER.update(estimate.grad, opt_state, theta)
        theta = optax.apply_updates(theta, updates)
        losses.append(float(estimate.loss))
    return theta, losses


@pytest.mark.parametrize("mesh", [None, 4])
def test_is_the_loop_by_hand_whatever_the_dispatches(mesh):
    estimator, theta = workers(mesh=mesh and ug.make_worker_mesh(mesh))
    expected, losses = by_hand(estimator, theta, 10)
    for size in [4, 10, 100]:
        result = ug.fit(estimator, theta, OUTER, num_steps=10, key=KEY, steps_per_dispatch=size)
        for got, wanted in zip(*map(jax.tree.leaves, (result.theta, expected)), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5)
        np.testing.assert_allclose(result.history["loss"], losses, rtol=1e-5)
        assert result.history["inner_steps"].tolist() == [4 * 2 * 2 * 5] * 10
        assert set(result.history) == {
            "loss",
            "grad_norm",
            "inner_steps",
            "num_nonfinite",
            "grad_variance",
        }
    float(theta["log_rate"])  # it was not donated


@pytest.mark.parametrize("mesh", [None, 4])
def test_one_program_for_the_whole_run(mesh):
    estimator, theta = workers(mesh=mesh and ug.make_worker_mesh(mesh))
    compiled = []
    listener = lambda event, seconds, **_: compiled.append(event)  # noqa: E731
    counts = []

    def callback(step, theta, metrics):
        counts.append(sum("backend_compile" in event for event in compiled))

    given = {"key": KEY, "steps_per_dispatch": 3, "callback": callback}
    jax.monitoring.register_event_duration_secs_listener(listener)
    ug.fit(estimator, theta, OUTER, num_steps=11, **given)
    ug.fit(estimator, theta, OUTER, num_steps=14, **given)  # nor for another run of the same
    jax.monitoring.unregister_event_duration_listener(listener)
    assert counts[0] > 0
    assert len(set(counts)) == 1
    assert len(counts) == 4 + 5


def test_memory_does_not_grow_over_ten_thousand_steps():
    estimator, theta = workers()
    held = []

    def callback(step, theta, metrics):
        held.append(sum(x.nbytes for x in jax.live_arrays()))

    ug.fit(
        estimator, theta, OUTER, num_steps=10_000, key=KEY, steps_per_dispatch=50, callback=callback
    )
    assert len(held) == 200
    assert held[-1] == held[0]


def test_evaluation_and_callback_between_dispatches():
    estimator, theta = workers()
    seen = []
    result = ug.fit(
        estimator,
        theta,
        OUTER,
        num_steps=7,
        key=KEY,
        steps_per_dispatch=3,
        evaluate=lambda key, theta: {"rate": jnp.exp(theta["log_rate"])},
        callback=lambda step, theta, metrics: seen.append((step, theta, metrics)),
    )
    assert [step for step, *_ in seen] == [3, 6, 7]
    assert result.history["evaluated_at"].tolist() == [3, 6, 7]
    np.testing.assert_allclose(result.history["rate"][-1], np.exp(result.theta["log_rate"]))
    for step, theta, metrics in seen:
        assert metrics["loss"] == result.history["loss"][step - 1]
        np.testing.assert_allclose(metrics["rate"], np.exp(theta["log_rate"]), rtol=1e-6)


@pytest.mark.parametrize("kind", ["function", "iterator"])
def test_streamed_data(kind):
    base, theta = quadratic()

    def step(key, theta, state, t, batch):
        state, loss = base.step(key, theta, state, t)
        return state, loss + jnp.mean(batch * state["x"])

    estimator = ug.average(ug.pes(base._replace(step=step), truncation=5, sigma=0.1), 2)

    def make(s):
        return np.asarray(jax.random.normal(jax.random.key(s), (2, 5, 3)))

    _, losses = by_hand(estimator, theta, 5, make)
    data = make if kind == "function" else (make(s) for s in itertools.count())
    result = ug.fit(estimator, theta, OUTER, num_steps=5, key=KEY, data=data, steps_per_dispatch=2)
    np.testing.assert_allclose(result.history["loss"], losses, rtol=1e-5)
    with raises(ValueError, "`data` ended before outer step 3"):
        ug.fit(
            estimator,
            theta,
            OUTER,
            num_steps=5,
            key=KEY,
            data=iter([make(0)] * 3),
            steps_per_dispatch=2,
        )


def test_stops_where_something_is_not_finite():
    """The state counts steps, and from the 12th on the loss is not finite."""
    problem = ug.UnrolledProblem(
        lambda key, theta: jnp.int32(0),
        lambda key, theta, s, t: (s + 1, theta["a"] ** 2 * jnp.where(s < 12, 1, jnp.nan)),
        100,
    )
    estimator, theta = ug.tbptt(problem, truncation=2), {"a": jnp.float32(1.0), "b": jnp.ones(2)}
    with (
        pytest.warns(UserWarning, match="cannot influence"),
        raises(FloatingPointError, "outer step 6", "gradient['a'], theta['a']") as caught,
    ):
        ug.fit(estimator, theta, optax.sgd(0.1), num_steps=20, key=KEY, steps_per_dispatch=4)
    result = caught.value.result
    assert len(result.history["loss"]) == 6
    np.testing.assert_allclose(result.theta["a"], 0.8**6, rtol=1e-5)


def test_the_users_arrays_are_not_taken():
    """``init`` returns an array that is not its own, and theta's leaf, and one twice."""
    mine, theta = jnp.ones(2), {"s": jnp.zeros(2)}
    problem = ug.UnrolledProblem(
        lambda key, theta: (mine, mine, theta["s"]),
        lambda key, theta, s, t: ((s[0], s[1], s[2] + theta["s"]), jnp.sum(s[2] + theta["s"] - 1)),
        10,
    )
    for _ in range(2):
        ug.fit(ug.tbptt(problem, truncation=5), theta, OUTER, num_steps=3, key=KEY)
    assert float(mine.sum() + theta["s"].sum()) == 2


def test_what_evaluate_returns_is_checked():
    estimator, theta = workers()
    given = {"num_steps": 6, "key": KEY, "steps_per_dispatch": 3}

    def run(evaluate):
        ug.fit(estimator, theta, OUTER, evaluate=evaluate, **given)

    with raises(TypeError, "`evaluate` must return a dict of numbers", "float 0.5"):
        run(lambda key, theta: 0.5)
    with raises(TypeError, "`evaluate` must return numbers", "'a' is 'text'"):
        run(lambda key, theta: {"a": "text"})
    with raises(ValueError, "`evaluate` returns ['loss']", "rename"):
        run(lambda key, theta: {"loss": 0.5})
    names = iter("ab")
    with raises(ValueError, "same names and shapes", "{'a': ()}", "{'b': ()}") as caught:
        run(lambda key, theta: {next(names): 0.5})
    assert len(caught.value.result.history["loss"]) == 6
    shapes = iter([1, 2])
    with raises(ValueError, "same names and shapes", "{'a': (1,)}", "{'a': (2,)}"):
        run(lambda key, theta: {"a": np.ones(next(shapes))})


def test_problems_are_not_kept_alive():
    gone = []
    for _ in range(3):
        problem, theta = quadratic.__wrapped__()
        gone.append(weakref.ref(problem.step))
        estimator = ug.average(ug.pes(problem, truncation=5, sigma=0.1), 2)
        ug.fit(estimator, theta, OUTER, num_steps=2, key=KEY)
        del problem, estimator
    gc.collect()
    assert sum(one() is not None for one in gone) <= 1


def test_x64_with_float32_theta():
    with jax.enable_x64(True):
        theta = jnp.float32(0.5)
        problem, _ = ug.problems.influence_balancing(horizon=20)
        outer = optax.inject_hyperparams(optax.adam)(optax.cosine_decay_schedule(0.1, 10))
        pes = ug.pes(problem, truncation=5, sigma=0.1)
        result = ug.fit(pes, theta, outer, num_steps=4, key=jax.random.key(0))
        assert result.theta.dtype == jnp.float32
        assert np.isfinite(result.history["loss"]).all()


def test_errors():
    estimator, theta = workers()
    with raises(TypeError, "`estimator` must be a GradientEstimator", "UnrolledProblem"):
        ug.fit(quadratic()[0], theta, OUTER, num_steps=1, key=KEY)
    with raises(TypeError, "`optimizer` must be an optax transformation", "float"):
        ug.fit(estimator, theta, 0.1, num_steps=1, key=KEY)
    with raises(TypeError, "`data` must be a function of the step", "list"):
        ug.fit(estimator, theta, OUTER, num_steps=1, key=KEY, data=[1])
    with raises(ValueError, "`num_steps` must be at least 1"):
        ug.fit(estimator, theta, OUTER, num_steps=0, key=KEY)
    with raises(ValueError, "`steps_per_dispatch` must be at least 1"):
        ug.fit(estimator, theta, OUTER, num_steps=1, key=KEY, steps_per_dispatch=0)
    with raises(TypeError, "theta['n'] is 3"):
        ug.fit(estimator, {"n": 3}, OUTER, num_steps=1, key=KEY)
