"""Every family under JAX's strict switches, as careful users set them.

Promotion of dtypes and ranks is decided while tracing, and so is what leaks out of a trace: most
programs are only traced.
"""

import contextlib
import functools
import gc
from typing import Any

import chex
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import numbers
from unrollgrad.estimators import REGISTRY

KEYS = list(jax.random.split(jax.random.key(0), 3))


@contextlib.contextmanager
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@contextlib.contextmanager
def no_leaks():
    """Raises if a tracer leaks; the check reads every object that is not frozen as an older one."""
    gc.freeze()
    try:
        with jax.checking_leaks():
            yield
    finally:
        gc.unfreeze()


def problem(dtype):
    """A problem that is strict itself."""
    one = jnp.asarray(1, dtype)

    def init(key, theta):
        x = jax.random.normal(key, (2,), dtype) + theta["b"]
        return {"x": x, "n": jnp.int32(0), "empty": jnp.zeros((0, 3), dtype)}

    def step(key, theta, state, t):
        x = state["x"] * theta["a"] + jax.random.normal(key, (2,), dtype)
        return state | {"x": x, "n": state["n"] + 1}, jnp.sum((x - one) ** 2)

    def evaluate(key, theta, state):
        return jnp.sum(state["x"] ** 2)

    theta = {"a": jnp.asarray(0.5, dtype), "b": jnp.zeros((2,), dtype)}
    return ug.UnrolledProblem(init, step, 4, evaluate), theta


def first_call(estimator, theta):
    return estimator.estimate(KEYS[0], theta, estimator.init(KEYS[1], theta))[0].grad


def estimators(dtype):
    unrolled, theta = problem(dtype)
    for name, row in REGISTRY.items():
        made = row.build(unrolled, truncation=2, sigma=0.1, num_pairs=3, noise_period=2)
        yield name, lambda made=made: first_call(made, theta)
    pes = ug.pes(unrolled, truncation=2, sigma=0.1)
    for stagger in ("lockstep", "breakstep", "burn_in"):
        many = ug.average(pes, 4, stagger=stagger, batch_size=2)
        yield stagger, lambda many=many: first_call(many, theta)
    spread = ug.average(pes, 4, mesh=ug.make_worker_mesh(2))
    yield "mesh", lambda: first_call(spread, theta)
    for law in (ug.noise.rademacher(), ug.noise.orthogonal()):
        es = ug.full_es(unrolled, sigma=0.1, num_pairs=2, noise=law)
        yield "law", lambda es=es: first_call(es, theta)
    trained = ug.training_problem(
        loss=lambda th, w, batch, key: jnp.sum((w * batch) ** 2) + th["a"] * jnp.sum(w**2),
        init_params=lambda key: jax.random.normal(key, (3,), dtype),
        optimizer=lambda th, t: optax.adam(jnp.exp(th["a"]), eps_root=1e-8),
        sample_batch=lambda key: jax.random.normal(key, (3,), dtype),
        horizon=4,
    )
    rate = {"a": theta["a"]}
    yield "training_problem", lambda: first_call(ug.bptt(trained), rate)


def implicit_functions(dtype):
    w, a = jnp.ones((3,), dtype), jnp.asarray(0.5, dtype)

    def inner(w, theta):
        return jnp.sum((w - theta) ** 2) + jnp.sum(w**2) * theta**2

    def outer(w, theta):
        return jnp.sum(w**2)

    solvers = [lx.CG(1e-4, 1e-4), lx.GMRES(1e-4, 1e-4), ug.implicit.dense()]
    solvers += [ug.implicit.neumann(5), ug.implicit.neumann(5, 0.1), ug.implicit.identity(1.0)]
    solvers += [ug.implicit.nystrom(2, 0.1)]
    for solver in solvers:
        f = ug.implicit.hypergradient(outer, inner, solver=solver, damping=0.1)
        yield "hypergradient", lambda f=f: f(w, a)
    half = jnp.asarray(0.5, dtype)
    decorated = {
        "root": ug.implicit.root(lambda x, a: x**2 - a),
        "fixed_point": ug.implicit.fixed_point(lambda x, a: (x + a / x) * half),
        "argmin": ug.implicit.argmin(lambda x, a: (x**2 - a) ** 2),
        "one_step": ug.implicit.one_step(lambda x, a: (x + a / x) * half),
    }
    for name, decorator in decorated.items():
        solve = decorator(lambda init, a: jnp.sqrt(a))
        yield name, lambda solve=solve: jax.grad(solve, 1)(a, a)
    unrolled = ug.bilevel.unrolled(outer, inner, optimizer=optax.sgd(0.1), num_steps=3)
    yield "unrolled", lambda: unrolled(w, a)


def optimizers(dtype):
    w = jnp.ones((2, 3), dtype)

    def loss(p, batch):
        return jnp.sum((p * batch) ** 2)

    made = {
        "learning_rate": ug.apo.learning_rate(optax.adam, 1e-2, lambda_fsd=0),
        "preconditioner": ug.apo.preconditioner(1e-2, lambda_fsd=0, lambda_wsd=0.1),
    }
    for name in ("scheduled_sgd", "scheduled_adam", "mlp", "adafactor_mlp", "rnn_mlp"):
        architecture = getattr(ug.learned_optimizers, name)()
        made[name] = architecture.transform(architecture.init(KEYS[2]))
    for name, one in made.items():
        yield name, lambda one=one: one.update(w, one.init(w), w, loss=loss, batch=w)


@pytest.mark.parametrize("family", [estimators, implicit_functions, optimizers])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_strict_promotion_and_no_leaks(family, dtype):
    leaks = no_leaks if dtype == jnp.float32 else contextlib.nullcontext
    with jax.enable_x64(dtype == jnp.float64):
        for name, run in family(dtype):
            with strict(), leaks():
                try:
                    jax.eval_shape(run)
                except (TypeError, ValueError) as error:
                    raise AssertionError(f"{family.__name__}, {name}: {error}") from error


def test_a_leak_is_found():
    kept = []
    with pytest.raises(Exception, match="Leaked"), no_leaks():
        jax.eval_shape(lambda x: kept.append(x) or x, 1.0)


def test_what_runs_outside_jit():
    unrolled, theta = problem(jnp.float32)
    unrolled = unrolled._replace(evaluate=None)
    pes = ug.pes(unrolled, truncation=2, sigma=0.1)
    with strict():
        found = ug.diagnostics.compare(
            unrolled, theta, {"pes": pes}, reference=theta, num_samples=3, num_chains=0, key=KEYS[0]
        )
        assert np.isfinite(found.rows[0]["norm"])
        many = ug.average(pes, 2, stagger="breakstep")
        result = ug.fit(
            many, theta, optax.adam(0.1), num_steps=2, steps_per_dispatch=2, key=KEYS[1]
        )
        assert np.isfinite(result.history["loss"]).all()
    with jax.enable_x64(True), strict():
        result = ug.fit(pes, theta, optax.adam(0.1), num_steps=2, key=KEYS[1])
        assert np.isfinite(result.history["loss"]).all()


@functools.cache
def made():
    """Estimator, theta, optimizer, inner loss and hypergradient of the small programs."""
    unrolled = ug.UnrolledProblem(
        lambda key, theta: jax.random.normal(key),
        lambda key, theta, x, t: (x * theta, jnp.square(x - theta)),
        4,
    )
    theta = jnp.float32(0.5)
    many = ug.average(ug.es_single(unrolled, truncation=2, sigma=0.1), 2, stagger="burn_in")

    def inner(w, theta):
        return jnp.sum((w - theta) ** 2)

    approximate = ug.implicit.identity(0.5)  # half the inverse Hessian is exact here
    gradient = ug.implicit.hypergradient(lambda w, a: jnp.sum(w), inner, solver=approximate)
    return many, theta, optax.adam(0.1), inner, gradient


def fitted():
    """Three steps in two dispatches, with evaluations, and the state's keys used again."""
    many, theta, optimizer, _, _ = made()
    key, given = jax.random.clone(KEYS[0]), {"num_steps": 3, "steps_per_dispatch": 2}

    def evaluate(key, theta):
        return {"theta": theta}

    return ug.fit(many, theta, optimizer, key=key, evaluate=evaluate, **given)


def solved():
    """Without inner steps, as one-step unrolling has it."""
    _, _, optimizer, inner, gradient = made()
    given: dict[str, Any] = {"inner_optimizer": optimizer, "outer_optimizer": optimizer}
    w, a = jnp.ones(3), jnp.float32(0.5)
    return ug.bilevel.solve(
        inner, gradient, w, a, inner_steps=0, num_steps=2, start="cold", **given
    ).theta


def differentiated():
    root = ug.implicit.root(lambda x, a: x**2 - a)(lambda start, a: jnp.sqrt(a))
    return jax.grad(root, 1)(jnp.float32(1.0), jnp.float32(4.0))


def updated():
    w = jnp.ones((2, 3))
    architecture = ug.learned_optimizers.scheduled_adam()
    optimizer = architecture.transform(architecture.init(jax.random.clone(KEYS[2])))
    return optimizer.update(w, optimizer.init(w), w)[0]


@functools.cache
def without_switch(run):
    return numbers(run())


@pytest.mark.parametrize("run", [fitted, solved, differentiated, updated])
@pytest.mark.parametrize(
    "switch",
    [
        jax.disable_jit,
        jax.checking_leaks,
        functools.partial(jax.debug_key_reuse, True),
        functools.partial(jax.transfer_guard, "disallow"),
    ],
    ids=["disable_jit", "check_tracer_leaks", "debug_key_reuse", "transfer_guard"],
)
def test_switch_changes_no_number(switch, run):
    guarded = isinstance(switch, functools.partial) and switch.func is jax.transfer_guard
    if guarded and run is not fitted:
        pytest.skip("eager functions transfer their Python numbers")
    expected = without_switch(run)
    made()  # its constants are not part of the run
    with switch():
        found = run()
    # Operations that are not fused are rounded each by itself.
    chex.assert_trees_all_close(numbers(found), expected, rtol=1e-4, atol=1e-5)


def test_a_key_that_is_used_twice_is_seen():
    """The library hides no reuse by a caller: a key of two calls that both begin an episode."""
    unrolled, theta = problem(jnp.float32)
    pes = ug.pes(unrolled, truncation=2, sigma=0.1)
    with jax.debug_key_reuse(True):
        key, state = jax.random.key(1), pes.init(jax.random.key(2), theta)
        pes.estimate(key, theta, state)
        with pytest.raises(jax.errors.KeyReuseError):
            pes.estimate(key, theta, state)


@pytest.mark.parametrize("name", ["full_es", "es_single", "pes_analytic", "uoro"])
def test_init_under_a_transfer_guard(name):
    unrolled, theta = problem(jnp.float32)
    row, key = REGISTRY[name], jax.random.clone(KEYS[1])
    estimator = row.build(unrolled, truncation=2, sigma=0.1, num_pairs=3)
    with jax.transfer_guard("disallow"):
        state = estimator.init(key, theta)
    assert int(state.episode.t) == 0
