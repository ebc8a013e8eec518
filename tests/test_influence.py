"""A warning names leaves of theta that cannot influence the loss, and only such leaves."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import unrollgrad as ug
from tests.helpers import build
from unrollgrad._checks import influence, inner_loop
from unrollgrad.estimators import REGISTRY

KEY = jax.random.key(0)
THETA = {"used": jnp.float32(0.5), "other": jnp.ones(2)}


def estimate(problem, theta, name="pes"):
    estimator = build(name, problem)
    return estimator.estimate(KEY, theta, estimator.init(KEY, theta))[0]


def one_step(step, init=lambda key, theta: jnp.float32(1.0), **more):
    return ug.UnrolledProblem(init, lambda key, theta, s, t: step(theta, s), 20, **more)


def accused(problem, theta=THETA):
    """The names in the warning or, if no leaf has influence, in the error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = inner_loop.check_step(problem, KEY, theta)
        try:
            influence.check_theta(theta, *trace)
        except ValueError:
            return "all"
    return str(caught[0].message).split(" cannot")[0] if caught else ""


@pytest.mark.parametrize("name", REGISTRY)
def test_a_dead_leaf_is_named(name):
    """Every estimator names it before anything is compiled."""

    def traced(problem):
        jax.eval_shape(lambda: estimate(problem, THETA, name))

    with pytest.warns(UserWarning, match=r"^theta\['other'\] cannot influence the loss") as caught:
        traced(one_step(lambda theta, s: (0.5 * s + theta["used"], s**2)))
    assert len(caught) == 1
    with pytest.raises(ValueError, match="no leaf of `theta` can influence the loss"):
        traced(one_step(lambda theta, s: (s, s**2)))


def test_a_schedule_that_overwrites_an_injected_hyperparameter():
    """init and every step write the rate into the state before optax replaces it."""
    schedule = optax.linear_schedule(0.1, 0.01, 20)
    theta = {"lr": jnp.float32(0.1), "decay": jnp.float32(-3.0)}

    def injected(theta, t, rate):
        inner = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)

        def write(state):
            return state._replace(hyperparams={"learning_rate": theta["lr"]})

        def update(updates, state, params=None):
            return inner.update(updates, write(state), params)

        return optax.GradientTransformation(lambda params: write(inner.init(params)), update)

    def problem(rate):
        return ug.training_problem(
            loss=lambda theta, w, batch, key: (
                jnp.sum((w - 1) ** 2) + jnp.exp(theta["decay"]) * jnp.sum(w**2)
            ),
            init_params=lambda key: jnp.zeros(2),
            optimizer=lambda theta, t: injected(theta, t, rate),
            sample_batch=lambda key: None,
            horizon=20,
        )

    with pytest.warns(UserWarning, match=r"theta\['lr'\] cannot .*\n?.*inject_hyperparams"):
        gradient = jax.jit(lambda theta: estimate(problem(schedule), theta, "tbptt").grad)(theta)
    assert float(gradient["lr"]) == 0
    assert float(gradient["decay"]) != 0
    gradient = jax.jit(lambda theta: estimate(problem(0.3), theta, "tbptt").grad)(theta)
    assert float(gradient["lr"]) != 0


def through_scan(theta, s):
    """Theta reaches the second carry, which reaches the first carry one iteration later."""

    def turn(carry, _):
        a, b, c = carry
        return (a + b, theta["used"] * b, c + 1), c * jnp.sum(theta["other"])

    (a, _, _), _ = jax.lax.scan(turn, (s, s, s), length=3)
    return a, a


def written(theta, s):
    box = jax.new_ref(s)
    box[...] = s + jnp.sum(theta["other"])
    return box[...], s * theta["used"]


@jax.custom_vjp
def straight_through(x, slope):
    return x


straight_through.defvjp(lambda x, slope: (x, None), lambda _, g: (g, g))


@jax.custom_jvp
def with_rule(x, slope):
    return x


with_rule.defjvp(lambda primals, tangents: (primals[0], tangents[0] + tangents[1]))


def printed(theta, s):
    jax.debug.callback(lambda x: None, jnp.sum(theta["other"]))
    return s, s * theta["used"]


STEPS = {
    # name: (step, the leaf without influence)
    "nested jit": (
        lambda th, s: (
            s,
            jax.jit(lambda a, b: jax.jit(lambda a, b: (b, a * s))(a, b))(th["used"], th["other"])[
                1
            ],
        ),
        "other",
    ),
    "derivative rule": (lambda th, s: (s, with_rule(s, jnp.sum(th["other"]))), "used"),
    "effect": (printed, ""),
    "jit": (
        lambda th, s: jax.jit(lambda a, b: (a * s, b))(th["used"], th["other"])[:1] * 2,
        "other",
    ),
    "remat": (
        lambda th, s: (s, jax.checkpoint(lambda a, b: (a * s, b))(th["used"], th["other"])[0]),
        "other",
    ),
    "cond": (
        lambda th, s: (
            s,
            jax.lax.cond(s > 0, lambda a, b: a, lambda a, b: 2 * a, th["used"], th["other"]),
        ),
        "other",
    ),
    "predicate": (
        lambda th, s: (s, jax.lax.cond(jnp.sum(th["other"]) > 0, lambda: 1.0, lambda: 2.0)),
        "used",
    ),
    "scan": (through_scan, "other"),
    "while": (
        lambda th, s: (
            s,
            jax.lax.while_loop(lambda x: x < jnp.sum(th["other"]), lambda x: x + 1, s),
        ),
        "used",
    ),
    "custom_jvp": (lambda th, s: (s, jax.nn.relu(th["used"])), "other"),
    "straight through": (lambda th, s: (s, straight_through(s, jnp.sum(th["other"]))), "used"),
    "mutable array": (written, ""),
    "index": (lambda th, s: (s, jnp.arange(9.0)[jnp.int32(th["used"])]), "other"),
    "stop_gradient": (lambda th, s: (s, jax.lax.stop_gradient(th["used"])), "other"),
    "shape": (lambda th, s: (s, jnp.zeros_like(th["other"]).sum() + th["used"]), "other"),
    "none": (lambda th, s: (s, s), "all"),
}


@pytest.mark.parametrize(("step", "dead"), STEPS.values(), ids=STEPS)
def test_reachability_through_every_kind_of_call(step, dead):
    theta = {"used": THETA["used"], "other": THETA["other"]}
    expected = dead if dead in ("", "all") else f"theta['{dead}']"
    assert accused(one_step(step), theta) == expected


def test_influence_through_the_state_takes_as_many_steps_as_it_needs():
    """Theta enters the last of five leaves, and moves up by one per step; the loss reads the first.

    Among the leaves are constants, an array that occurs twice, and theta itself.
    """
    x = jnp.float32(1.0)

    def step(theta, s):
        s = (*s[1:], theta["used"])
        return s, s[0]

    def start(key, theta):
        return (x, x, 0.0, jnp.float32(0), theta["used"])

    assert accused(one_step(step, start)) == "theta['other']"
    stale = one_step(lambda theta, s: ((s[0], jnp.sum(theta["other"])), s[0] * theta["used"]))
    assert accused(stale._replace(init=lambda key, theta: (x, x))) == "theta['other']"


def test_influence_through_init_and_evaluate():
    fixed = one_step(lambda theta, s: (s, s * theta["used"]))
    assert accused(fixed._replace(init=lambda key, theta: jnp.sum(theta["other"]))) == ""
    evaluated = fixed._replace(evaluate=lambda key, theta, s: jnp.sum(theta["other"]))
    assert accused(evaluated) == ""
    final = ug.final_loss(
        one_step(lambda theta, s: (s + theta["used"], jnp.sum(theta["other"]))),
        lambda key, theta, s: s,
    )
    assert accused(final) == "theta['other']"  # its step losses do not count


def test_many_dead_leaves_are_not_all_listed():
    theta = {f"leaf{i:02d}": jnp.float32(i) for i in range(12)}
    names = accused(one_step(lambda theta, s: (s, theta["leaf00"])), theta)
    assert names.endswith("theta['leaf08'] and 3 more")
