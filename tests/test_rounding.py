"""A sigma below theta's rounding is refused; the error names the loss and a valid sigma."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from tests.helpers import build, present, raises
from unrollgrad._checks.rounding import fraction_lost
from unrollgrad._core.dtypes import rounded
from unrollgrad.estimators import REGISTRY

KEY = jax.random.key(0)
PROBLEM = ug.UnrolledProblem(
    init=lambda key, theta: jnp.float32(0),
    step=lambda key, theta, s, t: (s, sum(jnp.sum(x) for x in jax.tree.leaves(theta))),
    horizon=20,
)
PERTURBING = [name for name, row in REGISTRY.items() if row.takes("sigma")]


def begin(theta, sigma, name="pes"):
    return build(name, PROBLEM, sigma=sigma).init(KEY, theta)


@functools.partial(jax.jit, static_argnums=2)
def measured(sigma, x, dtype):
    """The fraction of the perturbation that the estimators' rounding loses."""
    eps = sigma * jax.random.normal(jax.random.key(1), x.shape)
    return jnp.mean(rounded(x.astype(jnp.float32) + eps, dtype).astype(dtype) == x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_the_predicted_fraction_is_the_measured_one(dtype, scale):
    """Theta has many magnitudes, powers of two and zeros."""
    x = np.random.default_rng(0).normal(size=50_000)
    x[:5000], x[5000:7000], x[7000:9000] = 1.0, -0.25, 0.0
    x = jnp.asarray(x.astype(dtype))
    sigma = scale * float(jnp.finfo(dtype).eps) / 2
    lost = float(measured(sigma, x, dtype))
    assert abs(fraction_lost(sigma, x) - lost) < 0.02
    assert 0.1 < lost < 0.9


def test_subnormal_numbers_are_rounded_to_zero():
    x = jnp.asarray(np.array([0.0, 1e-6, 3e-5] * 5000, np.float16))

    @jax.jit
    def zeros(sigma):
        eps = sigma * jax.random.normal(KEY, x.shape)
        return jnp.mean(rounded(x.astype(jnp.float32) + eps, jnp.float16) == 0)

    for sigma in [3e-5, 1e-4]:
        assert abs(fraction_lost(sigma, x) - float(zeros(sigma))) < 0.05


SWALLOWED = {"b": np.zeros(2, np.float32), "w": np.ones((3, 2), jnp.bfloat16)}


@pytest.mark.parametrize("name", PERTURBING)
def test_a_sigma_that_rounding_swallows(name):
    with pytest.raises(
        ValueError,
        match=r"^sigma=0.001 is under bfloat16's resolution of theta\['w'\] \(97% of perturbations "
        r"round to zero\)\. Raise sigma to at least \S+, or hold theta in float32\.$",
    ):
        begin(SWALLOWED, 0.001, name)


def test_what_is_advised_passes_and_less_does_not():
    with pytest.raises(ValueError, match="resolution") as caught:
        begin(SWALLOWED, 0.001)
    least = float(present(re.search(r"at least (\S+),", str(caught.value))).group(1))
    begin(SWALLOWED, least)
    with pytest.raises(ValueError, match="resolution"):
        begin(SWALLOWED, 0.8 * least)
    begin({**SWALLOWED, "w": SWALLOWED["w"].astype(np.float32)}, 0.001)


def test_float32_and_sigmas_that_are_trees():
    with pytest.raises(ValueError, match=r"sigma=1e-08 is under float32's .* of theta \(.*float64"):
        begin(jnp.full(3, -2.0), 1e-8)
    theta = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.bfloat16)}
    with pytest.raises(ValueError, match=r"sigma\['b'\]=0.001 .* theta\['b'\].*sigma\['b'\] to"):
        begin(theta, {"a": 0.1, "b": 0.001})
    with pytest.raises(ValueError, match=r"sigma\['b'\] is under .* Raise sigma\['b'\] \S+-fold"):
        begin(theta, {"a": 0.1, "b": jnp.array([0.001, 0.002])})
    begin(theta, {"a": 0.1, "b": jnp.array([0.001, 0.1])})


def test_what_is_not_known_is_not_checked():
    theta = jnp.ones(2, jnp.bfloat16)
    jax.jit(lambda theta: begin(theta, 0.001))(theta)
    jax.jit(lambda sigma: begin(theta, sigma))(0.001)
    jax.eval_shape(build("pes", PROBLEM, sigma=0.001).init, KEY, theta)
    with pytest.raises(ValueError, match="resolution"):
        ug.average(build("pes", PROBLEM, sigma=0.001), 2).init(KEY, theta)


def test_large_leaves_are_sampled():
    x = np.ones((1000, 1000), jnp.bfloat16)
    x[:, ::2] = 100.0
    x = jnp.asarray(x)
    sigma = np.full((1000, 1), 0.01)
    assert abs(fraction_lost(sigma, x) - 0.62) < 0.02


def test_a_leaf_of_which_only_a_part_is_looked_at():
    """Above 100 000 numbers a sample decides; ``average`` also checks before it traces."""
    problem = ug.UnrolledProblem(
        lambda key, theta: jnp.zeros(()), lambda key, theta, s, t: (s, jnp.mean(theta**2)), 4
    )
    many = ug.average(ug.pes(problem, truncation=2, sigma=1e-3), 2)
    many.init(KEY, jnp.ones(200_000))
    with raises(ValueError, "sigma"):
        many.init(KEY, jnp.ones(200_000, jnp.bfloat16))
