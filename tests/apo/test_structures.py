"""The families of preconditioners equal their explicit matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unrollgrad import apo

STRUCTURES = {
    "kronecker": apo.kronecker(),
    "dense": apo.dense(),
    "diagonal": apo.diagonal(),
    "identity": apo.identity(),
}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def matrices(structure, factors, shape):
    """P for each entry of the factors' leading axis, with the weights in row-major order."""
    basis = np.eye(int(np.prod(shape))).reshape(-1, *shape)

    @jax.jit
    def columns(factors):
        of_one = lambda f: jax.vmap(lambda x: structure.multiply(f, x))(basis)  # noqa: E731
        return jax.vmap(of_one)(factors)

    columns = np.asarray(columns(factors))
    return columns.reshape(*columns.shape[:2], -1).swapaxes(1, 2)


def drawn(structure, shape, number=1):
    """Random factors, with a leading axis."""
    factors = jax.eval_shape(lambda: structure.init(jax.ShapeDtypeStruct(shape, jnp.float64)))
    draws = np.random.default_rng(0)
    return jax.tree.map(lambda x: draws.normal(size=(number, *x.shape)).astype(x.dtype), factors)


@pytest.mark.parametrize("shape", [(3, 4), (2, 2, 3, 4), (5, 1)])
def test_kronecker_is_its_matrix(shape):
    """P = (A x B) diag(vec S)^2 (A x B)' in row-major order: the last axis is the outputs."""
    factors = drawn(apo.kronecker(), shape)
    (found,) = matrices(apo.kronecker(), factors, shape)
    a, b, s = (factors[name][0] for name in "abs")
    both = np.kron(a, b)
    explicit = both @ np.diag(s.ravel() ** 2) @ both.T
    np.testing.assert_allclose(found, explicit, rtol=1e-6, atol=1e-6 * np.max(np.abs(explicit)))


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2), (6,)])
@pytest.mark.parametrize("name", STRUCTURES)
def test_positive_semidefinite_and_identity_first(name, shape):
    structure = STRUCTURES[name]
    first = structure.init(jax.ShapeDtypeStruct(shape, jnp.float64))
    factors = jax.tree.map(
        lambda x, draws: np.concatenate([np.asarray(x)[None], draws]),
        first,
        drawn(structure, shape, 5),
    )
    begin, *found = matrices(structure, factors, shape)
    np.testing.assert_array_equal(begin, np.eye(int(np.prod(shape))))
    for p in found:
        np.testing.assert_allclose(p, p.T, atol=1e-12 * np.max(np.abs(p)))
        values = np.linalg.eigvalsh(p)
        assert values[0] > -1e-12 * values[-1]


def test_kfac_is_one_of_them():
    """The inverse of a Kronecker product of two covariances is in the family."""
    inputs, outputs = 4, 3
    draws = np.random.default_rng(0)
    x, y = draws.normal(size=(20, inputs)), draws.normal(size=(20, outputs))
    of_inputs, of_outputs = x.T @ x / 20, y.T @ y / 20
    values_a, a = np.linalg.eigh(of_inputs)
    values_b, b = np.linalg.eigh(of_outputs)
    factors = {"a": a, "b": b, "s": np.outer(values_a, values_b) ** -0.5}
    batch = jax.tree.map(lambda x: x[None], factors)
    (found,) = matrices(apo.kronecker(), batch, (inputs, outputs))
    np.testing.assert_allclose(found, np.linalg.inv(np.kron(of_inputs, of_outputs)), rtol=1e-9)


def test_factors_of_16_bit_weights_are_float32():
    for structure in STRUCTURES.values():
        like = jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)
        factors = jax.eval_shape(lambda: structure.init(like))  # noqa: B023
        assert {x.dtype for x in jax.tree.leaves(factors)} == {jnp.dtype(jnp.float32)}
        assert jax.eval_shape(structure.multiply, factors, like).dtype == jnp.bfloat16


def test_the_default_rule():
    rule = apo.by_shape(largest=10)

    def of(*shape):
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
        factors = jax.eval_shape(lambda: rule("", leaf).init(leaf))
        return {name: x.shape for name, x in factors.items()}

    assert of(3, 4) == {"a": (3, 3), "b": (4, 4), "s": (3, 4)}
    assert of(1, 3, 2, 4) == {"a": (6, 6), "b": (4, 4), "s": (6, 4)}
    assert of(3, 4, 4) == {"s": (3, 4, 4)}  # too many inputs
    assert of(2, 11) == {"s": (2, 11)}
    assert of(7) == {"s": (7,)}
    assert of() == {"s": ()}
    with pytest.raises(ValueError, match="largest"):
        apo.by_shape(0)
