"""Guided noise: unbiased whatever the subspace, with the least variance at the true share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from tests.helpers import raises
from tests.statistics import Samples

KEY = jax.random.key(0)
DIM, COUNT, RHO = 1000, 4000, 0.9


def formula(k, rho):
    return (np.sqrt(k * rho) + np.sqrt((DIM - k) * (1 - rho))) ** 2 + 1


def slope():
    """A gradient of norm 1 with the share RHO on the first coordinate."""
    rest = np.random.default_rng(0).normal(size=DIM - 1)
    rest *= np.sqrt(1 - RHO) / np.linalg.norm(rest)
    return np.concatenate([[np.sqrt(RHO)], rest]).astype(np.float32)


def direction(size=3.0):
    """The first coordinate as a subspace of theta's two leaves; its length does not matter."""
    return split(size * jnp.eye(1, DIM))


def split(rows):
    return {"a": rows[..., :600].reshape(*rows.shape[:-1], 20, 30), "b": rows[..., 600:]}


def flat(tree):
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def drawn():
    """Estimates of a linear loss's gradient, from one program."""
    g = jnp.asarray(slope())
    theta = split(jnp.zeros(DIM))
    two = {k: jnp.concatenate([u, jnp.ones_like(u), u]) for k, u in direction().items()}

    def estimates(law):
        def one(key):
            unit = law.sample(key, law.init(theta), theta, 1)
            return flat(law.contract(unit, (flat(unit) @ g)[None]))

        return jax.lax.map(one, jax.random.split(KEY, COUNT), batch_size=500)

    def dependent(key):
        """The subspace is the pair's own noise."""
        unit = ug.noise.gaussian().sample(key, (), theta, 1)
        law = ug.noise.guided(unit, 0.9)
        return flat(law.contract(unit, (flat(unit) @ g)[None]))

    @jax.jit
    def run():
        guided = {share: ug.noise.guided(direction(), share) for share in (0.1, 0.9, 0.999)}
        out = {str(share): estimates(law) for share, law in guided.items()}
        out["gaussian"] = estimates(ug.noise.gaussian())
        out["dependent"] = jax.lax.map(dependent, jax.random.split(KEY, COUNT), batch_size=500)
        out["three"] = estimates(ug.noise.guided(two, 0.9))
        return out

    return {name: Samples(np.asarray(x)) for name, x in run().items()}


def test_the_variance_is_that_of_the_formula(drawn):
    """121 in place of 1001."""
    assert abs(formula(1, RHO) - 121) < 0.5
    for name, expected in (("0.9", formula(1, RHO)), ("gaussian", DIM + 1)):
        variance, se = drawn[name].variance()
        assert se < 0.05 * expected
        assert abs(variance - expected) < 5 * se
        assert drawn[name].error_in_se(slope()) < 5.5  # the largest of a thousand


def test_another_share_has_more_variance_but_no_bias(drawn):
    """Each at the formula of its own s1 / s2."""
    best, best_se = drawn["0.9"].variance()
    for share in (0.1, 0.999):
        q = np.sqrt((1 - share) / (share * (DIM - 1)))
        expected = (1 / q + DIM - 1) * (q * RHO + 1 - RHO) + 1
        variance, se = drawn[str(share)].variance()
        assert abs(variance - expected) < 5 * se
        assert variance - best > 5 * (se + best_se)
        assert drawn[str(share)].error_in_se(slope()) < 5.5


def test_directions_that_depend_on_each_other_count_once(drawn):
    """The same direction twice and another: unbiased, and nothing is divided by zero."""
    s = drawn["three"]
    assert s.error_in_se(slope()) < 5.5
    assert s.variance()[0] < 500


def test_a_subspace_from_the_pairs_own_noise_is_biased(drawn):
    assert drawn["dependent"].error_in_se(slope()) > 20


def test_through_an_estimator():
    """The noise, its sum over windows and its weights pass through pes.

    Each window's noise is weighed by the law that drew it, so that the subspace may move at every
    window. es_single holds its noise: there the subspace may move between episodes only.
    """
    problem, theta, influence = ug.problems.linear_recurrence(dim=4, horizon=8, memory=0.8)
    truth = np.asarray(ug.problems.theory.gradient(influence(theta)))
    two = jnp.stack([truth, jnp.array([0.0, 0.3, -0.3, -0.9])])

    def guided(place):
        return ug.noise.guided(jax.lax.dynamic_slice_in_dim(two, place % 2, 1), 0.99)

    def episodes(factory, law_of):
        def episode(number):
            key = jax.random.fold_in(KEY, number)

            def call(state, i):
                estimator = factory(problem, truncation=2, sigma=0.1, noise=law_of(i, number))
                estimate, state = estimator.estimate(jax.random.fold_in(key, i), theta, state)
                return state, estimate.grad

            start = factory(problem, truncation=2, sigma=0.1, noise=law_of(0, 0)).init(key, theta)
            return jax.lax.scan(call, start, jnp.arange(4))[1].mean(axis=0)

        return jax.vmap(episode)(jnp.arange(20_000))

    @jax.jit
    def run():
        return {
            "fixed": episodes(ug.pes, lambda i, _: ug.noise.guided(two[:1], 0.9)),
            "gaussian": episodes(ug.pes, lambda i, _: ug.noise.gaussian()),
            "by window": episodes(ug.pes, lambda i, _: guided(i)),
            "by episode": episodes(ug.es_single, lambda _, number: guided(number)),
            "held": episodes(ug.es_single, lambda i, _: guided(i)),
        }

    found = {name: Samples(x) for name, x in run().items()}
    for name in ("fixed", "by window", "by episode"):
        assert found[name].relative_se(truth) < 0.05
        assert found[name].error_in_se(truth) < 5, name
    assert found["held"].error_in_se(truth) > 7
    assert found["fixed"].variance()[0] < 0.8 * found["gaussian"].variance()[0]


def test_the_measured_share():
    rng = np.random.default_rng(0)
    g = slope()
    noise = rng.normal(size=(2, DIM)).astype(np.float32) * 0.1  # ten times the gradient's square
    share = jax.jit(ug.noise.share_in)
    one, other = (split(jnp.asarray(g + x)) for x in noise)
    assert abs(float(share(direction(), one, other)) - RHO) < 0.4
    assert float(share(direction(), one, one)) < 0.3  # one estimate: its noise counts
    exact = split(jnp.asarray(g))
    assert abs(float(share(direction(), exact, exact)) - RHO) < 1e-4


def test_errors():
    cases: list[tuple[Any, dict[str, Any], list[str]]] = [
        (ValueError, {"share": 1.5}, ["`share` must be between 0 and 1", "1.5"]),
        (ValueError, {"share": float("nan")}, ["`share` must be between 0 and 1", "nan"]),
        (TypeError, {"share": "0.5"}, ["`share` must be one number", "'0.5' (str)", "share_in"]),
        (TypeError, {"share": np.array([0.5, 0.2])}, ["`share` must be one number", "float64[2]"]),
        (ValueError, {"floor": 0}, ["`floor` must be above 0 and at most 1; got 0", "1e-3"]),
        (ValueError, {"floor": -1.0}, ["`floor`", "got -1.0"]),
        (ValueError, {"floor": 2.0}, ["`floor`", "got 2.0"]),
        (TypeError, {"floor": None}, ["`floor` must be one number", "None (NoneType)"]),
    ]
    for kind, given, words in cases:
        with raises(kind, *words):
            ug.noise.guided(np.ones((1, 3)), **({"share": 0.5} | given))
    theta = jnp.zeros(3)
    for subspace, words in (
        (np.ones(3), "expected (3, 3), got (3,)"),
        (np.ones((3, 3)), "fewer than theta has numbers; got 3 for 3"),
        ({}, "must have directions; got {}"),
        (np.ones(()), "must have directions; got array(1.)"),
    ):
        law = ug.noise.guided(subspace, 0.5)
        with raises(ValueError, "`subspace`", words):
            jax.eval_shape(lambda law=law: law.sample(KEY, (), theta, 2))
    with raises(ValueError, "`subspace`", "like `second`", "expected (1, 2), got (1, 3)"):
        ug.noise.share_in(np.ones((1, 3)), np.ones(3), np.ones(2))
