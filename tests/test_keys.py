"""A draw is a function of its key alone, whatever the implementation of the key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from unrollgrad._checks.arguments import typed_key

OTHERS = ("rbg", "unsafe_rbg")


@pytest.mark.parametrize("impl", OTHERS)
def test_a_key_in_a_batch_is_the_key_alone(impl):
    keys = jax.vmap(lambda i: jax.random.key(i, impl=impl))(jnp.arange(5))
    drawn = jax.vmap(lambda key: jax.random.normal(typed_key(key), (3,)))(keys)
    for key, row in zip(keys, drawn, strict=True):
        np.testing.assert_array_equal(jax.random.normal(typed_key(key), (3,)), row)
    assert len(np.unique(drawn)) == drawn.size


@pytest.mark.parametrize("impl", OTHERS)
def test_noise_is_kept_through_an_episode_of_a_staggered_worker(impl):
    """Rademacher signs and one parameter: the mean over an episode's windows is exact."""
    horizon, truncation = 8, 2
    problem = ug.UnrolledProblem(
        lambda key, theta: jnp.zeros(()), lambda k, theta, s, t: (s + theta, s + theta), horizon
    )
    one = ug.es_single(problem, truncation=truncation, sigma=0.1, noise=ug.noise.rademacher())
    many = ug.average(one, 16, stagger="burn_in")
    key, theta = jax.random.key(0, impl=impl), jnp.float32(0.0)

    @jax.jit
    def grads():
        def call(state, i):
            out, state = many.estimate(jax.random.fold_in(key, i), theta, state)
            return state, out.grad

        return jax.lax.scan(call, many.init(key, theta), jnp.arange(40))[1]

    np.testing.assert_allclose(grads().mean(), (horizon + 1) / 2, rtol=1e-5)
