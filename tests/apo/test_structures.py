"""The families of preconditioners, against their explicit matrices."""

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


def matrix(structure, factors, shape):
    """P, a column for each number of the leaf, in row-major order."""
    basis = jnp.eye(int(np.prod(shape))).reshape(-1, *shape)
    columns = jax.vmap(lambda x: structure.multiply(factors, x))(basis)
    return columns.reshape(len(basis), -1).T


def drawn(structure, shape, seed=0):
    factors = structure.init(jax.ShapeDtypeStruct(shape, jnp.float64))
    leaves, tree = jax.tree.flatten(factors)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    random = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return tree.unflatten(random)


@pytest.mark.parametrize("shape", [(3, 4), (2, 2, 3, 4), (5, 1)])
def test_kronecker_is_its_matrix(shape):
    """(A x B) diag(vec S)^2 (A x B)', rows first: the last axis is the outputs."""
    factors = drawn(apo.kronecker(), shape)
    both = jnp.kron(factors["a"], factors["b"])
    explicit = both @ jnp.diag(factors["s"].ravel() ** 2) @ both.T
    found = matrix(apo.kronecker(), factors, shape)
    np.testing.assert_allclose(found, explicit, rtol=1e-6, atol=1e-6 * jnp.max(jnp.abs(explicit)))


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2), (6,)])
@pytest.mark.parametrize("name", STRUCTURES)
def test_positive_semidefinite_and_identity_first(name, shape):
    structure = STRUCTURES[name]
    for seed in range(5):
        p = matrix(structure, drawn(structure, shape, seed), shape)
        np.testing.assert_allclose(p, p.T, atol=1e-12 * jnp.max(jnp.abs(p)))
        values = jnp.linalg.eigvalsh(p)
        assert values[0] > -1e-12 * values[-1]
    first = structure.init(jax.ShapeDtypeStruct(shape, jnp.float64))
    size = int(np.prod(shape))
    np.testing.assert_array_equal(matrix(structure, first, shape), np.eye(size))


def test_kfac_is_one_of_them():
    """The inverse of a Kronecker product of two covariances, by their eigenvectors."""
    inputs, outputs = 4, 3
    x = jax.random.normal(jax.random.key(0), (20, inputs))
    y = jax.random.normal(jax.random.key(1), (20, outputs))
    of_inputs, of_outputs = x.T @ x / 20, y.T @ y / 20
    values_a, a = jnp.linalg.eigh(of_inputs)
    values_b, b = jnp.linalg.eigh(of_outputs)
    factors = {"a": a, "b": b, "s": jnp.outer(values_a, values_b) ** -0.5}
    found = matrix(apo.kronecker(), factors, (inputs, outputs))
    np.testing.assert_allclose(found, jnp.linalg.inv(jnp.kron(of_inputs, of_outputs)), rtol=1e-9)


def test_factors_of_16_bit_weights_are_float32():
    for structure in STRUCTURES.values():
        factors = structure.init(jax.ShapeDtypeStruct((3, 4), jnp.bfloat16))
        assert {x.dtype for x in jax.tree.leaves(factors)} == {jnp.dtype(jnp.float32)}
        product = structure.multiply(factors, jnp.ones((3, 4), jnp.bfloat16))
        assert product.dtype == jnp.bfloat16


def test_the_default_rule():
    rule = apo.by_shape(largest=10)

    def of(*shape):
        factors = rule("", jax.ShapeDtypeStruct(shape, jnp.float32)).init(
            jax.ShapeDtypeStruct(shape, jnp.float32)
        )
        return {name: x.shape for name, x in factors.items()}

    assert of(3, 4) == {"a": (3, 3), "b": (4, 4), "s": (3, 4)}
    assert of(1, 3, 2, 4) == {"a": (6, 6), "b": (4, 4), "s": (6, 4)}
    assert of(3, 4, 4) == {"s": (3, 4, 4)}  # too many inputs
    assert of(2, 11) == {"s": (2, 11)}
    assert of(7) == {"s": (7,)}
    assert of() == {"s": ()}
    with pytest.raises(ValueError, match="largest"):
        apo.by_shape(0)
