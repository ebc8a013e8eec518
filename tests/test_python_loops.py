"""What users call in a Python loop outside jit keeps nothing and compiles nothing after a while."""

import gc
import os
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import optax
import pytest

import unrollgrad as ug
from tests.helpers import counted

CALLS = int(os.environ.get("UNROLLGRAD_CALLS", "6"))
"""By hand 200: ``UNROLLGRAD_CALLS=200 pytest tests/test_python_loops.py``."""
SIZE = 5000
BATCH = jnp.ones(SIZE) / SIZE


def inner(w, theta):
    return jnp.mean((w - BATCH) ** 2) + jnp.exp(theta) * jnp.mean(w**2)


def outer(w, theta):
    return jnp.mean((w - 1) ** 2)


def descended(w, theta):
    return w - jax.grad(inner)(w, theta)


def loops():
    """By name: ``call(i)``, with arrays of its own in every call."""
    f = ug.implicit.hypergradient(outer, inner, solver=ug.implicit.neumann(3, 0.1))
    yield "hypergradient", lambda i: f(jnp.full(SIZE, 0.1 * i), jnp.float32(-1.0)).grad
    checked = ug.implicit.hypergradient(outer, inner, solver=lx.CG(1e-4, 1e-4), check=True)
    at = BATCH / (1 + jnp.exp(-1.0))
    yield "check", lambda i: checked(at + 0.0 * i, jnp.float32(-1.0)).grad
    solver = ug.implicit.neumann(3, 0.1)
    decorated = {
        "argmin": ug.implicit.argmin(inner, solver=solver),
        "root": ug.implicit.root(jax.grad(inner), solver=solver),
        "fixed_point": ug.implicit.fixed_point(
            lambda w, t: w - jax.grad(inner)(w, t), solver=solver
        ),
    }
    for name, decorator in decorated.items():
        solve = decorator(lambda init, theta: init)

        def slope(i, solve=solve):
            return jax.grad(lambda t: outer(solve(jnp.full(SIZE, 0.1 * i), t), t))(-1.0)

        yield name, slope
    unrolled = ug.bilevel.unrolled(outer, inner, optimizer=optax.sgd(0.1), num_steps=3)
    yield "unrolled", lambda i: unrolled(jnp.full(SIZE, 0.1 * i), jnp.float32(-1.0)).grad
    given: dict[str, Any] = {"inner_steps": 2, "num_steps": 2}
    given |= {"inner_optimizer": optax.sgd(0.1), "outer_optimizer": optax.sgd(0.1)}

    def solve_both(i):
        start = jnp.full(SIZE, 0.1 * i)
        return ug.bilevel.solve(inner, f, start, jnp.float32(-1.0), **given).theta

    yield "solve", solve_both
    problem = ug.UnrolledProblem(
        lambda key, theta: theta + jax.random.normal(key, (SIZE,)),
        lambda key, theta, x, t: (0.9 * x, jnp.mean(x**2)),
        4,
    )
    theta = jnp.float32(0.1)
    yield "episode_loss", lambda i: ug.episode_loss(problem, jax.random.key(i), theta + i)
    many = ug.average(ug.pes(problem, truncation=2, sigma=0.1), 2)
    state = many.init(jax.random.key(0), theta)
    yield "estimate", lambda i: many.estimate(jax.random.key(i), theta + i, state)[0].grad
    yield "init", lambda i: many.init(jax.random.key(i), theta + i)
    sgd, one = optax.sgd(0.1), {"num_steps": 1, "steps_per_dispatch": 1}

    def fitted(i):
        return ug.fit(many, theta + i, sgd, key=jax.random.key(i), **one).theta

    yield "fit", fitted
    few: dict[str, Any] = {"reference": theta, "num_samples": 3, "num_chains": 0}

    def compared(i):
        measured = {"pes": ug_pes}
        return ug.diagnostics.compare(problem, theta + i, measured, key=jax.random.key(i), **few)

    ug_pes = ug.pes(problem, truncation=2, sigma=0.1)
    yield "compare", lambda i: compared(i).samples["pes"]


def updates():
    """By name: ``call(i)``, an update of each optimizer, eagerly as optax's are called."""
    made = {
        "learning_rate": ug.apo.learning_rate(optax.adam, 1e-2, lambda_fsd=0),
        "preconditioner": ug.apo.preconditioner(1e-2, lambda_fsd=0, lambda_wsd=0.1),
    }
    for name in ("scheduled_adam", "mlp"):
        architecture = getattr(ug.learned_optimizers, name)()
        made[name] = architecture.transform(architecture.init(jax.random.key(0)))
    w = jnp.ones(SIZE)
    for name, one in made.items():
        state = one.init(w)

        def updated(i, one=one, state=state):
            given = {"loss": lambda p, batch: jnp.sum((p * batch) ** 2), "batch": BATCH}
            return one.update(w * i, state, w, **given)

        yield name, updated
    positive = ug.constraints.positive
    yield "constrain", lambda i: ug.constraints.constrain(positive, w * i)


@pytest.mark.parametrize(
    ("name", "call"), [*loops(), *updates()], ids=lambda x: x if isinstance(x, str) else ""
)
def test_nothing_grows(name, call):
    def live():
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    for i in range(3):
        jax.block_until_ready(call(i))
    before = live()
    with counted() as programs:
        for i in range(CALLS):
            jax.block_until_ready(call(3 + i))
    assert programs[0] == 0
    assert live() - before < 4 * SIZE  # less than one call's weights
