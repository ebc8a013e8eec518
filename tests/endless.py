"""What the contract of estimators without episodes runs: bilevel algorithms, self-tuning networks.

Theta has leaves of float64, float32 and bfloat16. A row costs three programs: ``init`` and
``estimate`` alone, and both in one over seeds, with data that are spread over four devices.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import unrollgrad as ug
from tests.helpers import counted, numbers, types

KEY = jax.random.key(0)


class Ran(NamedTuple):
    """All results that the tests of one row use."""

    theta: Any
    states: list
    estimates: list
    again: Any
    recompiled: int
    seeds: Any
    programs: int


def rows(number: int) -> dict[str, Any]:
    """The rows of the data."""
    draw = np.random.default_rng(0).standard_normal
    x, y = draw((number, 3)), draw(number)
    return {"x": jnp.asarray(x, jnp.float32), "y": (jnp.asarray(y), None)}


def theta_of_all_kinds() -> dict[str, Any]:
    """Theta with leaves of three dtypes, and a None."""
    return {
        "decay": jnp.float32(-1.0),
        "scale": [jnp.zeros(3, jnp.bfloat16), None],
        "shift": (jnp.float64(0.1),),
    }


def run(
    build: Callable[[Any], ug.GradientEstimator],
    wrap: Callable[[Any], Any],
    data: dict[str, Any],
) -> Ran:
    """Runs ``build(wrap(data))``; making data compiles programs that are not the row's."""
    theta, mesh = theta_of_all_kinds(), ug.make_worker_mesh(4)
    given = wrap(data)
    shared = wrap(jax.device_put(data, NamedSharding(mesh, P("workers"))))
    keys = jnp.stack([KEY, jax.random.key(5)])
    theta_there, keys_there = jax.device_put((theta, keys), NamedSharding(mesh, P()))
    with counted() as programs:
        estimator = build(given)
        states, estimates = [jax.jit(estimator.init)(KEY, theta)], []
        for _ in range(4):
            out, state = estimator.estimate(KEY, theta, states[-1])
            states.append(state)
            estimates.append(out)
        before = programs[0]
        saved = [np.asarray(x) if not _is_key(x) else x for x in jax.tree.leaves(states[2])]
        state = jax.tree.unflatten(jax.tree.structure(states[2]), saved)
        again = estimator.estimate(jax.random.key(9), theta, state)
        recompiled = programs[0] - before
        there = build(shared)

        @jax.jit
        @functools.partial(jax.vmap, in_axes=(0, None))
        def of_seeds(key, theta):
            return there.estimate(key, theta, there.init(key, theta))

        seeds = of_seeds(keys_there, theta_there)
    return Ran(theta, states, estimates, again, recompiled, seeds, programs[0])


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def close(a: Any, b: Any) -> None:
    """Asserts equality to the precision of the leaf: bfloat16 leaves feed the others."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-2, atol=2e-3), numbers(a), numbers(b)
    )


def check_form(row: Ran) -> None:
    """Asserts that states keep their types, ``grad`` has theta's, and nothing compiles again."""
    for before, after in zip(row.states, row.states[1:], strict=False):
        assert types(before) == types(after)
        assert jax.tree.structure(before) == jax.tree.structure(after)
    grad = row.estimates[0].grad
    assert [x.dtype for x in jax.tree.leaves(grad)] == [x.dtype for x in jax.tree.leaves(row.theta)]
    assert jax.tree.structure(grad) == jax.tree.structure(row.theta)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(numbers(row.estimates)))
    assert int(row.states[-1].episode.t) == 5
    assert row.recompiled == 0
    assert row.programs <= 3


def check_goes_on(row: Ran) -> None:
    """Asserts that a saved state continues bit for bit, whatever the key of the call."""
    expected = numbers((row.estimates[2], row.states[3]))
    for a, b in zip(jax.tree.leaves(numbers(row.again)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    moved = numbers((row.estimates[1], row.states[2]))
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(moved), strict=True)
    assert any(np.any(a != b) for a, b in pairs)


def check_seeds_and_devices(row: Ran) -> None:
    """Asserts that a seed under ``vmap`` gives the same numbers with data spread over devices."""
    first = jax.tree.map(lambda x: x[0], row.seeds)
    close(first[0].grad, row.estimates[0].grad)
    close(first[0].loss, row.estimates[0].loss)
    close(first[1].carried.params, row.states[1].carried.params)
