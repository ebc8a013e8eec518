"""Bad input is refused before anything compiles; errors name argument, values and a remedy.

States are abstract (``jax.eval_shape``) unless a value is checked; a fixture asserts that no test
compiles a program.
"""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import build, counted, mistyped, quadratic, raises, rows, settings
from unrollgrad._checks import inner_loop
from unrollgrad.estimators import REGISTRY, backprop

KEY = jax.random.key(0)
NAMES = list(REGISTRY)
every = pytest.mark.parametrize("name", rows())


@pytest.fixture(scope="module")
def warm():
    """Values that the tests themselves compute once."""
    for horizon in (20, 30):
        quadratic(horizon)
    return jax.random.split(KEY, 2), jax.random.key(0, impl="rbg")


@pytest.fixture(autouse=True)
def nothing_compiles(warm):
    with counted() as programs:
        yield
    assert programs == [0]


def begun(estimator, theta):
    """An abstract state of the estimator."""
    return jax.eval_shape(estimator.init, KEY, theta)


def call(estimator, theta, state, key=KEY, **data):
    """One abstract call; a call with numbers raises the same error before it compiles."""
    return jax.eval_shape(estimator.estimate, key, theta, state, **data)


def run(name, problem, theta, **changes):
    estimator = build(name, problem, **changes)
    return call(estimator, theta, begun(estimator, theta))


def taking(setting):
    names = [n for n in NAMES if REGISTRY[n].takes(setting)]
    return pytest.mark.parametrize("name", rows(names))


@taking("truncation")
def test_truncation_that_does_not_divide_the_horizon(name):
    problem, _ = quadratic(horizon=20)
    with raises(ValueError, "truncation=7", "horizon=20", "1, 2, 4, 5, 10, 20"):
        build(name, problem, truncation=7, noise_period=14)
    with raises(ValueError, "truncation=40", "horizon=20"):
        build(name, problem, truncation=40, noise_period=40)


@taking("truncation")
@pytest.mark.parametrize("value", [0, -3])
def test_truncation_that_is_not_positive(name, value):
    problem, _ = quadratic()
    with raises(ValueError, "`truncation` must be at least 1", f"truncation={value}"):
        build(name, problem, truncation=value)


def test_sizes_that_are_no_whole_numbers():
    problem, _ = quadratic()
    for value in [2.0, True, "2", None]:
        with raises(TypeError, "`truncation` must be a whole number", repr(value)):
            ug.tbptt(problem, truncation=mistyped(value))
    assert ug.tbptt(problem, truncation=mistyped(np.int64(5))).truncation == 5


@every
@pytest.mark.parametrize("horizon", [0, -1])
def test_horizon_that_is_not_positive(name, horizon):
    problem, _ = quadratic()
    with raises(ValueError, "`problem.horizon` must be at least 1", f"={horizon}"):
        build(name, problem._replace(horizon=horizon))


@taking("sigma")
@pytest.mark.parametrize("sigma", [0.0, -0.1, float("nan"), float("inf"), {"a": 1.0, "b": -1.0}])
def test_sigma_that_is_not_positive(name, sigma):
    problem, _ = quadratic()
    where = "sigma['b']=-1.0" if isinstance(sigma, dict) else f"sigma={sigma}"
    with raises(ValueError, "`sigma` must be positive and finite", where):
        build(name, problem, sigma=sigma)


@taking("sigma")
def test_sigma_that_does_not_fit_theta(name):
    problem, theta = quadratic()
    with raises(ValueError, "`sigma` must be a number or a pytree prefix of theta"):
        run(name, problem, theta, sigma={"log_rate": 0.1})
    with raises(ValueError, "sigma['start'] has shape (2,)", "float32[3]"):
        run(name, problem, theta, sigma={"log_rate": 0.1, "start": np.ones(2)})


@taking("sigma")
def test_sigma_that_is_something_else(name):
    problem, _ = quadratic()
    for bad in ["0.1", 1j, None]:
        with raises((TypeError, ValueError), "`sigma`"):
            build(name, problem, sigma=bad)


@taking("noise")
def test_noise_that_is_something_else(name):
    problem, _ = quadratic()
    for bad in ["gaussian", ug.noise.gaussian]:
        with raises(TypeError, "`noise` must be a law", "(init, sample)"):
            REGISTRY[name].factory(
                problem,
                **{k: v for k, v in settings().items() if REGISTRY[name].takes(k)},
                noise=bad,
            )


@taking("num_pairs")
def test_num_pairs_that_is_not_positive(name):
    problem, _ = quadratic()
    with raises(ValueError, "`num_pairs` must be at least 1", "=0", "antithetic pairs, both signs"):
        build(name, problem, num_pairs=0)
    with raises(TypeError, "`num_pairs` must be a whole number", "31.5", "pairs, both signs"):
        build(name, problem, num_pairs=31.5)


@pytest.mark.parametrize("period", [7, 12, 0])
def test_noise_period_that_is_no_multiple_of_the_truncation(period):
    problem, _ = quadratic()
    with raises(ValueError, "`noise_period`", str(period)):
        ug.gpes(problem, truncation=5, sigma=0.1, noise_period=period)


@every
def test_theta_that_is_not_floating(name):
    problem, theta = quadratic()
    bad = {**theta, "layers": {"width": np.int32(3)}}
    with raises(TypeError, "theta['layers']['width'] is int32[]", "floating"):
        build(name, problem).init(KEY, bad)
    with raises(TypeError, "theta['layers']['width'] is int32[]"):
        estimator = build(name, problem)
        call(estimator, bad, begun(estimator, theta))
    for leaf in [3, True, 1j, KEY, "x", np.ones(2, np.complex64)]:
        with raises(TypeError, "theta['leaf']"):
            build(name, problem).init(KEY, {**theta, "leaf": leaf})


@every
@pytest.mark.parametrize("theta", [{}, (), None, {"a": None}])
def test_theta_that_is_empty(name, theta):
    problem, _ = quadratic()
    with raises(ValueError, "`theta` has no floating leaves"):
        build(name, problem).init(KEY, theta)


@every
def test_a_leaf_of_theta_that_is_empty(name):
    problem, theta = quadratic()
    with raises(ValueError, "theta['start'] is empty: float32[0]"):
        build(name, problem).init(KEY, {**theta, "start": np.zeros(0, np.float32)})


@every
def test_loss_that_is_no_scalar(name):
    problem, theta = quadratic()

    def step(key, theta, state, t):
        state, loss = problem.step(key, theta, state, t)
        return state, jnp.stack([loss, loss])

    with raises(ValueError, "the loss of `step` must be a scalar", "(2,)"):
        run(name, problem._replace(step=step), theta)
    evaluate = problem._replace(evaluate=lambda key, theta, s: s["x"])
    with raises(ValueError, "the loss of `evaluate` must be a scalar", "(3,)"):
        run(name, evaluate, theta)


def test_episode_loss_checks_the_step():
    problem, theta = quadratic()
    vector = problem._replace(step=lambda *args: (problem.step(*args)[0], jnp.ones(2)))
    with raises(ValueError, "the loss of `step` must be a scalar", "(2,)"):
        jax.eval_shape(lambda theta: ug.episode_loss(vector, KEY, theta), theta)


@every
def test_problem_that_is_none(name):
    with raises(TypeError, "`problem` must be an UnrolledProblem", "Example", "Unpack it"):
        build(name, mistyped(ug.problems.influence_balancing()))
    with raises(TypeError, "`problem` must be an UnrolledProblem", "function"):
        build(name, mistyped(lambda key: key))


@every
def test_step_of_another_signature(name):
    problem, theta = quadratic()
    needs = problem._replace(step=lambda key, theta, s, t, b: problem.step(key, theta, s, t))
    with raises(TypeError, "step(key, theta, state, t)", "estimate(..., data=)"):
        run(name, needs, theta)
    estimator = build(name, problem)
    with raises(TypeError, "step(key, theta, state, t, batch)", "only when data is streamed"):
        data = np.ones(estimator.truncation or 20)
        call(estimator, theta, begun(estimator, theta), data=data)


@every
def test_state_of_another_estimator(name):
    problem, theta = quadratic()
    estimator = build(name, problem)
    other = ug.UnrolledProblem(lambda key, th: jnp.zeros(7), problem.step, 20)
    stranger = begun(ug.pes(other, truncation=5, sigma=0.1, num_pairs=3), theta)
    with raises(TypeError, "`state` is not this estimator's", "estimator.init(key, theta)"):
        call(estimator, theta, stranger)
    if name == "pes":
        more = begun(ug.pes(problem, truncation=5, sigma=0.1, num_pairs=4), theta)
        with raises(TypeError, "state.carried.states['x']: float32[4,3] -> float32[8,3]"):
            call(estimator, theta, more)


OTHER_SETTINGS = {
    "truncation": ({"truncation": 10}, "truncation=10", "truncation=5"),
    "horizon": ({"horizon": 40}, "horizon=40", "horizon=20"),
    "noise_period": ({"noise_period": 20}, "noise_period=20", "noise_period=10"),
}


@every
@pytest.mark.parametrize(("change", "theirs", "ours"), OTHER_SETTINGS.values(), ids=OTHER_SETTINGS)
def test_state_of_other_settings(name, change, theirs, ours):
    """The states have the same shapes and differ only in ``made_by``."""
    problem, theta = quadratic()
    if "horizon" not in change and not REGISTRY[name].takes(next(iter(change))):
        return
    longer = problem._replace(horizon=change.get("horizon", 20))
    other = build(name, longer, **{k: v for k, v in change.items() if k != "horizon"})
    estimator = build(name, problem)
    for make in [lambda e: e, lambda e: ug.average(e, 2)]:
        with raises(TypeError, "made by", theirs, "this is", f"{name}(", ours, "init"):
            call(make(estimator), theta, begun(make(other), theta))


def test_state_of_an_estimator_of_another_name():
    problem, theta = quadratic()
    pes = ug.pes(problem, truncation=5, sigma=0.1)
    theirs = begun(ug.gpes(problem, truncation=5, sigma=0.1, noise_period=10), theta)
    with raises(TypeError, "made by gpes(", "noise_period=10", "this is pes(truncation=5"):
        call(pes, theta, theirs)
    mean = begun(ug.tbptt(problem, truncation=5), theta)
    with raises(TypeError, "made by tbptt(truncation=5, horizon=20)", "this is truncated_es("):
        call(ug.truncated_es(problem, truncation=5, sigma=0.1), theta, mean)
    # The same estimator under another name, or with another sigma, accepts the state.
    same = ug.gpes(problem, truncation=5, sigma=0.2, noise_period=5)
    call(pes, theta, begun(same, theta))


class Bare(NamedTuple):
    """The smallest worker state that a user's own estimator may have."""

    episode: ug.Episode


def test_state_that_does_not_say_who_made_it():
    problem, theta = quadratic()
    tbptt = ug.tbptt(problem, truncation=5)
    bare = Bare(begun(tbptt, theta).episode)
    with raises(TypeError, "it is a Bare; this is tbptt("):
        call(tbptt, theta, bare)


@every
def test_step_that_does_not_return_two_things(name):
    problem, theta = quadratic()
    only_state = problem._replace(step=lambda *args: problem.step(*args)[0])
    with raises(TypeError, "`step` must return (state, loss)", "dict"):
        run(name, only_state, theta)
    with raises(TypeError, "`step` must return (state, loss)", "dict"):
        run(name, ug.final_loss(only_state, lambda key, theta, s: s["x"].sum()), theta)


@every
def test_step_that_changes_the_state(name):
    problem, theta = quadratic()

    def changed(change):
        def step(key, theta, state, t):
            state, loss = problem.step(key, theta, state, t)
            return change(state), loss

        return problem._replace(step=step)

    cases = {
        "state['n']: int32[] -> float32[]": lambda s: {**s, "n": s["n"] * 1.0},
        "state['x']: float32[3] -> float32[2]": lambda s: {**s, "x": s["x"][:2]},
        "state['new']: absent -> float32[3]": lambda s: {**s, "new": s["x"]},
        "state['n']: int32[] -> absent": lambda s: {"x": s["x"]},
        "->": lambda s: tuple(s.values()),
    }
    for message, change in cases.items():
        with raises(TypeError, "`step` must return a state", message):
            run(name, changed(change), theta)


@every
def test_state_that_holds_a_function(name):
    """It is refused when the state is made: in ``init`` or, if a call makes it, in the call."""
    problem, theta = quadratic()
    bad = problem._replace(init=lambda key, theta: {"net": [jnp.tanh]})
    with raises(TypeError, "`init` put", "state['net'][0]", "eqx.partition"):
        if build(name, problem).truncation is None:
            run(name, bad, theta)
        else:
            begun(build(name, bad), theta)


@every
def test_while_loop(name):
    def step(key, theta, state, t):
        state = jax.lax.while_loop(lambda s: s > 1.0, lambda s: 0.5 * s, state + theta)
        return state, state

    problem = ug.UnrolledProblem(lambda key, theta: jnp.float32(0.0), step, 20)
    if not REGISTRY[name].reverse_mode:
        assert run(name, problem, np.float32(0.3))[0].loss.shape == ()
        return
    with raises(ValueError, name, "while_loop", "full_es, truncated_es, pes, es_single, gpes"):
        run(name, problem, np.float32(0.3))


def test_the_message_names_all_estimators_that_only_go_forwards():
    forwards = [name for name, row in REGISTRY.items() if not row.reverse_mode]
    assert list(backprop.FORWARD_ONLY) == forwards


def sampled(problem):
    return problem._replace(horizon=lambda key: jax.random.randint(key, (), 1, 9))


def test_sampled_horizon_where_a_static_one_is_needed():
    problem, theta = quadratic()
    for name in NAMES:
        if build(name, problem).truncation is None:
            with raises(ValueError, f"{name} needs a static horizon", "sampler"):
                build(name, sampled(problem))
        else:
            run(name, sampled(problem), theta)
            evaluated = sampled(problem)._replace(evaluate=lambda key, theta, s: s["x"].sum())
            with raises(ValueError, "problem.evaluate needs a static horizon", "evaluate=None"):
                build(name, evaluated)
    with raises(ValueError, "final_loss needs a static horizon"):
        ug.final_loss(sampled(problem), lambda key, theta, s: 0.0)
    with raises(ValueError, "episode_loss needs a static horizon"):
        ug.episode_loss(sampled(problem), KEY, theta)
    with raises(ValueError, "compare needs a static horizon"):
        ug.diagnostics.compare(sampled(problem), theta, {}, reference=theta, num_samples=3, key=KEY)


def test_sampler_of_horizons_that_returns_no_whole_number():
    problem, theta = quadratic()
    uniform = problem._replace(horizon=lambda key: 20 * jax.random.uniform(key))
    with raises(TypeError, "`problem.horizon(key)` must return a whole number", "float32[]"):
        run("pes", uniform, theta)


@every
def test_data_of_the_wrong_axis(name):
    problem, theta = quadratic()
    with_data = problem._replace(
        step=lambda key, theta, s, t, batch: problem.step(key, theta, s, t)
    )
    estimator = build(name, with_data)
    state = begun(estimator, theta)
    axis = "horizon=20" if estimator.truncation is None else "truncation=5"
    for bad, shape in [(np.ones((4, 2)), "float32[4,2]"), (np.ones(()), "float32[]")]:
        with raises(ValueError, "data['images'] is " + shape, axis):
            call(estimator, theta, state, data={"images": bad})
    many = ug.average(estimator, 3)
    with raises(ValueError, "data['images'] is float32[2,5]", "num_workers=3"):
        call(many, theta, begun(many, theta), data={"images": np.ones((2, 5))})


@every
def test_keys_that_are_none(name, warm):
    (problem, theta), (two, rbg) = quadratic(), warm
    estimator = build(name, problem)
    many = ug.average(estimator, 2)
    state, states = begun(estimator, theta), begun(many, theta)
    for bad in [0, None, np.zeros(2), two]:
        with raises(TypeError, "`key` must be"):
            estimator.init(mistyped(bad), theta)
        with raises(TypeError, "`key` must be"):
            call(estimator, theta, state, bad)
        with raises(TypeError, "`key` must be"):
            many.init(mistyped(bad), theta)
        with raises(TypeError, "`key` must be"):
            call(many, theta, states, bad)
    call(estimator, theta, state, rbg)  # every implementation becomes the default one at the door


def test_average():
    problem, theta = quadratic()
    estimator = ug.pes(problem, truncation=5, sigma=0.1)
    with raises(ValueError, "`num_workers` must be at least 1"):
        ug.average(estimator, 0)
    with raises(ValueError, "`nonfinite` must be one of 'drop', 'propagate'", "'mask'"):
        ug.average(estimator, 2, nonfinite="mask")
    with raises(TypeError, "`estimator` must be a GradientEstimator", "UnrolledProblem"):
        ug.average(mistyped(problem), 2)
    with raises(ValueError, "nested averages"):
        begun(ug.average(ug.average(estimator, 3), 3), theta)
    three = begun(ug.average(estimator, 3), theta)
    with raises(ValueError, "`state` is that of 3 worker(s)", "num_workers=2"):
        call(ug.average(estimator, 2), theta, three)


def train(**changes):
    arguments: dict[str, Any] = {
        "loss": lambda theta, w, batch, key: jnp.sum((w - 1) ** 2),
        "init_params": lambda key: jnp.zeros(2),
        "optimizer": lambda theta, t: optax.sgd(theta),
        "sample_batch": lambda key: None,
        "horizon": 10,
    }
    return ug.training_problem(**arguments | changes)


def test_training_problem():
    theta = np.float32(0.1)
    with raises(ValueError, "no batch", "data="):
        run("pes", train(sample_batch=None), theta, noise_period=5)
    with raises(TypeError, "`optimizer` must be a function", "lambda theta, t: optax"):
        train(optimizer=optax.adam(0.1))
    with raises(ValueError, "the loss of `loss` must be a scalar", "(2,)"):
        run("pes", train(loss=lambda theta, w, batch, key: w - 1), theta)


def test_functions_that_take_other_arguments():
    """They are refused when they are passed, with the arguments that they will get."""
    with raises(TypeError, "`sample_batch()` cannot be called as sample_batch(key)"):
        train(sample_batch=lambda: None)
    with raises(TypeError, "`sample_batch` must be a function, called as", "float64[3]"):
        train(sample_batch=np.zeros(3))
    with raises(TypeError, "optimizer(theta, t)", "optax.sgd takes its settings", "lambda theta"):
        train(optimizer=optax.sgd)
    for makes in (lambda: 0.0, lambda a, b, c: 0.0):
        with raises(TypeError, "as init_params(key): ", "It may also take (key, theta)"):
            begun(build("tbptt", train(init_params=makes)), np.float32(0.1))
    with raises(TypeError, "`evaluate(theta, s)` cannot be called as evaluate(key, theta, state)"):
        ug.final_loss(train(), lambda theta, s: s)
    with raises(TypeError, "`evaluate(theta, s)` cannot be called as", "(key, theta, state)"):
        ug.tbptt(train()._replace(evaluate=lambda theta, s: s), truncation=5)
    with raises(TypeError, "`horizon()` cannot be called as", "(key)"):
        ug.tbptt(train(horizon=lambda: 7), truncation=5)


def test_the_default_horizon_is_named():
    """It is seen in the problem, and where it does not fit."""
    default = inspect.signature(ug.training_problem).parameters["horizon"].default
    assert default == inner_loop.DEFAULT_HORIZON == 1000
    problem = train(horizon=default)
    assert repr(problem) == "UnrolledProblem(init, step, horizon=1000)"
    assert "horizon=drawn, evaluate=last" in repr(problem._replace(horizon=drawn, evaluate=last))
    with raises(ValueError, "problem.horizon=1000 (training_problem's default). Use one of"):
        ug.pes(problem, truncation=7, sigma=0.1)
    for own in (train(horizon=999), problem._replace(step=mistyped(lambda *_: None))):
        with raises(ValueError, f"problem.horizon={own.horizon}. Use one of"):
            ug.pes(own, truncation=7, sigma=0.1)
    shown = ug.full_es(problem, sigma=0.1)._repr_html_()
    assert "inner steps of an episode</th><td>1000<" in shown
    assert "inner steps of a call</th><td>those of an episode<" in shown


def drawn(key):
    return 7


def last(key, theta, state):
    return state


def test_compare():
    problem, theta = quadratic()
    estimators = {"pes": ug.pes(problem, truncation=5, sigma=0.1)}

    def compare(**changes):
        arguments: dict[str, Any] = {"estimators": estimators, "reference": theta}
        arguments |= {"num_samples": 3, "key": KEY, **changes}
        return ug.diagnostics.compare(problem, theta, **arguments)

    with raises(ValueError, "`num_samples` must be at least 3", "got 2"):
        compare(num_samples=2)
    with raises(ValueError, "`estimators` is empty"):
        compare(estimators={})
    with raises(ValueError, "truncation=15 does not divide", "made for another problem"):
        other = ug.pes(problem._replace(horizon=30), truncation=15, sigma=0.1)
        compare(estimators={"pes": other})
    shorter = problem._replace(horizon=10)
    for one in (ug.pes(shorter, truncation=5, sigma=0.1), ug.full_es(shorter, sigma=0.1)):
        for made in (one, ug.average(one, 2)):
            with raises(ValueError, "made for another problem: its horizon is 10"):
                compare(estimators={"other": made})
            with raises(ValueError, "made for another problem: its horizon is 10"):
                compare(reference=made)
    other = problem._replace(init=lambda *at: problem.init(*at))
    other = ug.average(ug.pes(other, truncation=5, sigma=0.1), 2)
    with raises(ValueError, "average(pes(truncation=5, sigma=0.1), 2), was made", "differ in init"):
        compare(estimators=[other])
    with raises(ValueError, "`reference` must be a gradient with theta's structure"):
        compare(reference={"log_rate": 1.0})
