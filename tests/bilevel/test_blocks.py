"""BSVRB: many blocks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import unrollgrad as ug
from tests.helpers import raises
from unrollgrad import bilevel
from unrollgrad.bilevel import _block_parts

KEY = jax.random.key(0)
BLOCKS = 4
PULLS = np.linspace(0.5, 1.5, BLOCKS)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def inner(w, theta, batch, i):
    return jnp.asarray(PULLS)[i] * w**2 / 2 - w * jnp.mean(batch) * theta


def outer(w, theta, batch, i):
    return (w - jnp.mean(batch)) ** 2 / 2 + 0.1 * theta**2


DATA = bilevel.finite_sum(jnp.array([0.5, 1.5]), 2)


def blocks(sampled=BLOCKS, data=DATA, rate=0.1, **changes):
    given: dict[str, Any] = {"alpha": 1.0, "beta": 1.0, "gamma": 0.0, **changes}
    return bilevel.bsvrb(
        outer,
        inner,
        init_params=lambda key: jnp.asarray(2.0),
        num_blocks=BLOCKS,
        blocks_per_step=sampled,
        outer_data=data,
        inner_data=data,
        inner_optimizer=optax.sgd(rate),
        **given,
    )


@functools.partial(jax.jit, static_argnums=(0, 2, 4))
def run(estimator, theta, rate, key, num_steps):
    def step(carry, _):
        theta, state = carry
        out, state = estimator.estimate(key, theta, state)
        return (theta - rate * out.grad, state), out

    begin = jnp.asarray(theta), estimator.init(key, jnp.asarray(theta))
    (theta, state), seen = jax.lax.scan(step, begin, length=num_steps)
    return theta, state.carried, seen


def test_all_blocks_without_memory_are_soba():
    """One SOBA whose params are all blocks: its inner loss is the sum, its outer loss the mean."""
    index = jnp.arange(BLOCKS)
    whole = bilevel.soba(
        lambda w, theta, x: jnp.mean(jax.vmap(lambda w, i: outer(w, theta, x, i))(w, index)),
        lambda w, theta, x: jnp.sum(jax.vmap(lambda w, i: inner(w, theta, x, i))(w, index)),
        init_params=lambda key: jnp.full(BLOCKS, 2.0),
        outer_data=DATA,
        inner_data=DATA,
        inner_optimizer=optax.sgd(0.1),
    )
    theta, at, seen = run(blocks(), 1.0, 0.05, KEY, 40)
    expected, other, _ = run(whole, 1.0, 0.05, KEY, 40)
    np.testing.assert_allclose(theta, expected, rtol=1e-12)
    np.testing.assert_allclose(at.params, other.params, rtol=1e-12)
    np.testing.assert_allclose(at.v, BLOCKS * other.v, rtol=1e-12)
    assert int(seen.info.gradients[0]) == 8 * BLOCKS


def test_one_block_is_soba_with_storm():
    data, alpha = bilevel.finite_sum(jnp.array([0.5, 1.0, 2.0, 3.0, 0.1]), 2), 0.3
    one = bilevel.bsvrb(
        outer,
        inner,
        init_params=lambda key: jnp.asarray(2.0),
        num_blocks=1,
        blocks_per_step=1,
        outer_data=data,
        inner_data=data,
        inner_optimizer=optax.sgd(0.1),
        alpha=alpha,
        beta=alpha,
        gamma=1 - alpha,
    )
    soba = bilevel.soba(
        lambda w, theta, x: outer(w, theta, x, 0),
        lambda w, theta, x: inner(w, theta, x, 0),
        init_params=lambda key: jnp.asarray(2.0),
        outer_data=data,
        inner_data=data,
        inner_optimizer=optax.sgd(0.1),
        directions=bilevel.storm(alpha),
    )
    theta, at, _ = run(one, 1.0, 0.05, KEY, 40)
    expected, other, _ = run(soba, 1.0, 0.05, KEY, 40)
    np.testing.assert_allclose(theta, expected, rtol=1e-10)
    np.testing.assert_allclose(at.params[0], other.params, rtol=1e-10)


def test_tracked_hessians_solve_exactly():
    """Without noise H is exact after the first visit: v, and theta's direction at these params."""
    _, at, seen = run(blocks(tracks="hessians", rate=0.0), 1.0, 0.0, KEY, 2)
    v = (2.0 - 1.0) / PULLS
    np.testing.assert_allclose(at.v, v, rtol=1e-12)
    # d outer / d theta - B v with B = -1.
    np.testing.assert_allclose(seen.grad, 0.2 + np.mean(v), rtol=1e-12)


def test_tracked_hessians_are_solved_by_one_call():
    """Of two batched calls at once each waits for the other's threads on a CPU, for ever."""
    estimator = blocks(tracks="hessians")
    state = jax.eval_shape(estimator.init, KEY, jnp.asarray(1.0))
    compiled = jax.jit(estimator.estimate).lower(KEY, jnp.asarray(1.0), state).compile()
    assert str(compiled.as_text()).count('custom_call_target="lapack_dgetrf_ffi"') == 1


@pytest.mark.parametrize("tracks", ["products", "hessians"])
def test_both_forms_find_the_minimum(tracks):
    """Batches of one row of two, one block of four per step."""
    data = bilevel.finite_sum(jnp.array([0.9, 1.1]), 1)
    estimator = blocks(1, data, 0.05, tracks=tracks, alpha=0.5, beta=0.5, gamma=0.5)
    theta, _, _ = run(estimator, 1.0, 0.005, KEY, 6000)
    # h = mean (theta / pull - 1)^2 / 2 + 0.1 theta^2
    expected = np.mean(1 / PULLS) / (np.mean(1 / PULLS**2) + 0.2)
    np.testing.assert_allclose(theta, expected, atol=0.03)


def test_sampled_blocks_move_as_fast_as_all():
    """With small rates a block's mean movement over sweeps is that of a step on all blocks."""
    steps, seeds = 40, 400
    keys = jax.random.split(KEY, seeds)

    def moved(estimator):
        return jax.vmap(lambda key: run(estimator, 0.5, 0.0, key, steps)[1].params)(keys) - 2.0

    some, every = moved(blocks(1, rate=1e-4)), moved(blocks(rate=1e-4))[0]
    se = np.std(some, 0) / np.sqrt(seeds)
    # Steps after a block's last visit are not made up for yet: BLOCKS - 1 of them on average.
    late = every * (1 - (BLOCKS - 1) / steps)
    assert np.all(np.abs(np.mean(some, 0) - late) < 4 * se + 1e-3 * np.abs(late))
    slow = moved(blocks(1, rate=1e-4, catch_up=False))
    assert np.all(np.abs(np.mean(slow, 0)) < 0.5 * np.abs(every))


def test_subsets_are_uniform():
    draws = jax.jit(jax.vmap(lambda n: _block_parts.subset(KEY, n, 7, 3)))(jnp.arange(4000))
    assert all(len(set(row)) == 3 for row in np.asarray(draws))
    found = np.bincount(np.asarray(draws).ravel(), minlength=7) / 4000
    np.testing.assert_allclose(found, 3 / 7, atol=4 * np.sqrt(12 / 49 / 4000))
    pairs = np.zeros((7, 7))
    for row in np.asarray(draws):
        pairs[np.ix_(row, row)] += 1 / 4000
    off = pairs[~np.eye(7, dtype=bool)]
    np.testing.assert_allclose(off, 3 * 2 / 42, atol=5 * np.sqrt(6 / 49 / 4000))


def test_blocks_spread_over_devices():
    """The same numbers, and the arrays stay spread."""
    estimator = blocks(2, alpha=0.5, beta=0.5, gamma=0.5)
    mesh = ug.make_worker_mesh(4)
    theta = jnp.asarray(1.0)
    alone = jax.jit(estimator.init)(KEY, theta)

    def spread(x):
        split = x.ndim > 0 and x.shape[0] == BLOCKS
        return jax.device_put(x, NamedSharding(mesh, P("workers") if split else P()))

    carried = jax.tree.map(spread, alone.carried)
    episode = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P())), alone.episode)
    state = alone._replace(carried=carried, episode=episode)
    key, at = (jax.device_put(x, NamedSharding(mesh, P())) for x in (KEY, theta))
    for _ in range(3):
        out, state = estimator.estimate(key, at, state)
        expected, alone = estimator.estimate(KEY, theta, alone)
        np.testing.assert_allclose(out.grad, expected.grad, rtol=1e-12)
    np.testing.assert_allclose(state.carried.params, alone.carried.params, rtol=1e-12)
    assert state.carried.params.sharding.spec == P("workers")


def test_bad_arguments():
    with raises(ValueError, "`blocks_per_step`=5", "num_blocks=4", "at most 4"):
        blocks(5)
    with raises(ValueError, '`tracks` must be "products" or "hessians"', "'both'"):
        blocks(tracks="both")
    with raises(ValueError, "`alpha` must be in (0, 1]", "1.5"):
        blocks(alpha=1.5)


def test_samplers_of_a_block():
    """``sample_batch(key, i)`` gets the block's number."""
    estimator = bilevel.bsvrb(
        lambda w, theta, x, i: (w - x) ** 2 / 2,
        lambda w, theta, x, i: (w - x - theta) ** 2 / 2,
        init_params=lambda key: jnp.asarray(0.0),
        num_blocks=BLOCKS,
        blocks_per_step=BLOCKS,
        outer_data=lambda key, i: i * 1.0,
        inner_data=lambda key, i: i * 1.0,
        inner_optimizer=optax.sgd(0.5),
    )
    theta, at, _ = run(estimator, 0.0, 0.0, KEY, 60)
    np.testing.assert_allclose(at.params, np.arange(BLOCKS), atol=1e-6)
    assert theta == 0
