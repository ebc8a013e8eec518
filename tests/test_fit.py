"""``fit`` equals a loop written by hand, in few dispatches of one program."""

import functools
import gc
import itertools
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import build, counted, mistyped, numbers, quadratic, raises

KEY = jax.random.key(0)
OUTER = optax.adam(0.05)


@functools.cache
def workers(num_devices=None):
    """Always the same object: ``fit`` keeps the programs of an estimator while it lives."""
    problem, theta = quadratic()
    mesh = num_devices and ug.make_worker_mesh(num_devices)
    return ug.average(build("pes", problem), 4, mesh=mesh), theta


def by_hand(estimator, theta, num_steps, data=None):
    state = estimator.init(KEY, theta)  # its content is not used: all episodes begin anew
    opt_state, losses = OUTER.init(theta), []

    @jax.jit
    def step(s, theta, opt_state, state, **given):
        estimate, state = estimator.estimate(jax.random.fold_in(KEY, s), theta, state, **given)
        updates, opt_state = OUTER.update(estimate.grad, opt_state, theta)
        return optax.apply_updates(theta, updates), opt_state, state, estimate.loss

    for s in range(num_steps):
        given = {} if data is None else {"data": data(s)}
        theta, opt_state, state, loss = step(s, theta, opt_state, state, **given)
        losses.append(float(loss))
    return theta, losses


@pytest.mark.parametrize(("num_devices", "sizes"), [(4, [4]), (None, [100, 4])])
def test_is_the_loop_by_hand_whatever_the_dispatches(num_devices, sizes):
    """One dispatch is longer than the run; the run ends within the others' last dispatch.

    The first dispatch compiles one program; later dispatches and equal runs compile nothing.
    """
    estimator, theta = workers(num_devices)
    expected, losses = by_hand(estimator, theta, 10)
    for size in sizes:
        counts = []
        with counted() as count:
            given = {"key": KEY, "callback": lambda *_: counts.append(count[0])}  # noqa: B023
            result, again = (
                ug.fit(estimator, theta, OUTER, num_steps=n, steps_per_dispatch=size, **given)
                for n in (10, 13)
            )
        assert counts[0] > 0
        assert counts == [counts[0]] * (2 if size == 100 else 3 + 4)
        chex.assert_trees_all_close(numbers(result.theta), numbers(expected), rtol=1e-5)
        np.testing.assert_allclose(result.history["loss"], losses, rtol=1e-5)
        np.testing.assert_array_equal(again.history["loss"][:10], result.history["loss"])
        assert result.history["inner_steps"].tolist() == [4 * 2 * 2 * 5] * 10
        assert set(result.history) == {
            "loss",
            "grad_norm",
            "inner_steps",
            "num_nonfinite",
            "grad_variance",
        }
    float(theta["log_rate"])  # it was not donated


def test_evaluation_and_callback_between_dispatches():
    estimator, theta = workers()
    seen = []
    result = ug.fit(
        estimator,
        theta,
        OUTER,
        num_steps=9,
        key=KEY,
        steps_per_dispatch=4,
        evaluate=lambda key, theta: {"rate": jnp.exp(theta["log_rate"])},
        callback=lambda step, theta, metrics: seen.append((step, theta, metrics)),
    )
    assert [step for step, *_ in seen] == [4, 8, 9]
    assert result.history["evaluated_at"].tolist() == [4, 8, 9]
    np.testing.assert_allclose(result.history["rate"][-1], np.exp(result.theta["log_rate"]))
    for step, theta, metrics in seen:
        assert metrics["loss"] == result.history["loss"][step - 1]
        np.testing.assert_allclose(metrics["rate"], np.exp(theta["log_rate"]), rtol=1e-6)


def test_what_evaluate_returns_is_checked():
    estimator, theta = workers()
    given = {"num_steps": 8, "key": KEY, "steps_per_dispatch": 4}

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
    assert len(caught.value.result.history["loss"]) == 8
    shapes = iter([1, 2])
    with raises(ValueError, "same names and shapes", "{'a': (1,)}", "{'a': (2,)}"):
        run(lambda key, theta: {"a": np.ones(next(shapes))})


def simple():
    """A small problem, made anew each time."""

    def step(key, theta, x, t):
        x = 0.9 * x + theta["a"] * jax.random.uniform(key)
        return x, x**2

    problem = ug.UnrolledProblem(lambda key, theta: jax.random.uniform(key), step, 20)
    return problem, {"a": jnp.float32(0.3)}


def test_memory_does_not_grow_over_ten_thousand_steps():
    problem, theta = simple()
    estimator, held = ug.average(ug.tbptt(problem, truncation=5), 2), []

    def callback(step, theta, metrics):
        held.append(sum(x.nbytes for x in jax.live_arrays()))

    given = {"num_steps": 10_000, "key": KEY, "steps_per_dispatch": 50}
    ug.fit(estimator, theta, OUTER, callback=callback, **given)
    assert len(held) == 200
    assert held[-1] == held[0]


def test_streamed_data():
    base, theta = simple()

    def step(key, theta, x, t, batch):
        x, loss = base.step(key, theta, x, t)
        return x, loss + jnp.mean(batch) * x

    pes = ug.pes(base._replace(step=step), truncation=5, sigma=0.1)
    estimator = ug.average(pes, 2)

    def make(s):
        return np.random.default_rng(s).normal(size=(2, 5, 3)).astype(np.float32)

    def run(data):
        given = {"num_steps": 5, "key": KEY, "steps_per_dispatch": 2}
        return ug.fit(estimator, theta, OUTER, data=data, **given).history["loss"]

    _, losses = by_hand(estimator, theta, 5, make)
    np.testing.assert_allclose(run(make), losses, rtol=1e-5)
    np.testing.assert_allclose(run(make(s) for s in itertools.count()), losses, rtol=1e-5)
    with raises(ValueError, "`data` ended before outer step 3"):
        run(iter([make(0)] * 3))


def test_stops_where_something_is_not_finite():
    """The state counts steps; from the 12th step on the loss is not finite."""
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
    """``init`` returns an array of the caller, theta's leaf, and one array twice."""
    mine, theta = jnp.ones(2), {"s": jnp.zeros(2)}
    problem = ug.UnrolledProblem(
        lambda key, theta: (mine, mine, theta["s"]),
        lambda key, theta, s, t: ((s[0], s[1], s[2] + theta["s"]), jnp.sum(s[2] + theta["s"] - 1)),
        10,
    )
    for _ in range(2):
        ug.fit(ug.tbptt(problem, truncation=5), theta, OUTER, num_steps=3, key=KEY)
    assert float(mine.sum() + theta["s"].sum()) == 2


def test_problems_are_not_kept_alive():
    gone = []
    for _ in range(3):
        problem, theta = simple()
        gone.append(weakref.ref(problem.step))
        estimator = ug.average(ug.tbptt(problem, truncation=5), 2)
        ug.fit(estimator, theta, OUTER, num_steps=2, key=KEY)
        del problem, estimator
    gc.collect()
    assert not any(one() is not None for one in gone)


def test_estimators_in_turn_compile_once_each():
    problem, theta = simple()
    estimators = [ug.tbptt(problem, truncation=5), ug.bptt(problem)]

    def both():
        for estimator in estimators:
            ug.fit(estimator, theta, OUTER, num_steps=2, key=KEY)

    both()
    with counted() as programs:
        both()
    assert programs[0] == 0


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
        ug.fit(mistyped(quadratic()[0]), theta, OUTER, num_steps=1, key=KEY)
    with raises(TypeError, "`optimizer` must be an optax transformation", "float"):
        ug.fit(estimator, theta, mistyped(0.1), num_steps=1, key=KEY)
    with raises(TypeError, "`data` must be a function of the step", "list"):
        ug.fit(estimator, theta, OUTER, num_steps=1, key=KEY, data=mistyped([1]))
    with raises(ValueError, "`num_steps` must be at least 1"):
        ug.fit(estimator, theta, OUTER, num_steps=0, key=KEY)
    with raises(ValueError, "`steps_per_dispatch` must be at least 1"):
        ug.fit(estimator, theta, OUTER, num_steps=1, key=KEY, steps_per_dispatch=0)
    with raises(TypeError, "theta['n'] is 3"):
        ug.fit(estimator, {"n": 3}, OUTER, num_steps=1, key=KEY)
    with raises(TypeError, "`evaluate(theta)` cannot be called as evaluate(key, theta)"):
        ug.fit(estimator, theta, OUTER, num_steps=1, key=KEY, evaluate=lambda theta: {})
    with raises(TypeError, "`callback(step)` cannot be called as callback(s, theta, metrics)"):
        ug.fit(estimator, theta, OUTER, num_steps=1, key=KEY, callback=lambda step: None)
    with raises(TypeError, "`callback` must be a function", "True (bool)"):
        ug.fit(estimator, theta, OUTER, num_steps=1, key=KEY, callback=mistyped(True))
    with raises(TypeError, "`data()` cannot be called as data(step)"):
        ug.fit(estimator, theta, OUTER, num_steps=1, key=KEY, data=lambda: None)


def test_contexts_of_jax_hold_in_the_thread_that_makes_data():
    seen = []

    def data(step):
        names = ("jax_default_matmul_precision", "jax_default_prng_impl")
        seen.append(tuple(getattr(jax.config, name) for name in names))
        return np.full(2, 1 / 3)

    problem = ug.UnrolledProblem(
        lambda key, theta: jnp.zeros(()),
        lambda key, theta, state, t, batch: (state, (theta - batch) ** 2),
        2,
    )
    given = {"num_steps": 60, "key": KEY, "data": data, "steps_per_dispatch": 20}
    with jax.enable_x64(True), jax.default_matmul_precision("float32"):
        with jax.default_prng_impl("rbg"):
            result = ug.fit(ug.bptt(problem), jnp.float64(0.3), optax.sgd(0.5), **given)
        assert abs(float(result.theta) - 1 / 3) < 1e-15
    assert set(seen) == {("float32", "rbg")}


def test_what_fit_cannot_do_is_said():
    estimator, theta = workers()
    with raises(TypeError, "`optimizer` is a line search", "optax.adam"):
        ug.fit(estimator, theta, optax.lbfgs(), num_steps=2, key=KEY)

    def run(key):
        return ug.fit(estimator, theta, OUTER, num_steps=2, key=key).theta

    with raises(TypeError, "`fit`", "vmap"):
        jax.vmap(run)(jax.random.split(KEY, 2))
    with raises(TypeError, "`evaluate` must return numbers; 'nothing'"):
        ug.fit(
            estimator,
            theta,
            OUTER,
            num_steps=2,
            steps_per_dispatch=4,
            key=KEY,
            evaluate=lambda key, theta: {"nothing": np.zeros((0, 3))},
        )


def test_a_result_is_saved_and_loaded(tmp_path):
    """Every leaf has its value and dtype again: keys of workers, bfloat16, optimizer states."""
    problem, theta = ug.problems.influence_balancing(horizon=20)
    pes = ug.average(ug.pes(problem, truncation=5, sigma=0.1), 2)
    result = ug.fit(pes, theta, optax.adam(1e-3), num_steps=3, key=jax.random.key(0))
    result = result._replace(theta={"a": [result.theta, jnp.bfloat16(0.3)]})
    path = result.save(tmp_path / "runs" / "one.npz")
    for like in (result, result.theta):
        found = ug.FitResult.load(path, like)
        assert list(found.history) == list(result.history)
        np.testing.assert_array_equal(found.history["loss"], result.history["loss"])
        whole = like is result
        before, after = (r[:3] if whole else r.theta for r in (result, found))
        jax.tree.map(lambda x, y: chex.assert_equal(x.dtype, y.dtype), before, after)
        assert jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), before, after))
        assert whole or found.opt_state is None
    with raises(ValueError, "another result than `like`", "['a'][0]: float32[2] -> float32[]"):
        ug.FitResult.load(path, {"a": [jnp.zeros(2), jnp.bfloat16(0.3)]})
    path.write_text("text")
    with raises(ValueError, "is not a result that `save` wrote"):
        ug.FitResult.load(path, theta)
    first, *_, last = result.history["loss"]
    assert repr(result).startswith(f"FitResult(3 steps, loss {first:.4g} to {last:.4g}, theta=")


@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_a_traced_rate_is_refused():
    problem, theta = ug.problems.influence_balancing(horizon=20)
    pes = ug.average(ug.pes(problem, truncation=5, sigma=0.1), 2)
    with raises(TypeError, "`fit` is a loop of compiled programs", "a traced number in"):
        jax.vmap(
            lambda rate: ug.fit(pes, theta, optax.sgd(rate), num_steps=1, key=jax.random.key(0))
        )(jnp.ones(2))
