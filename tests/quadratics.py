"""Inner problems whose minimum, and outer gradient through it, are known."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Ridge(NamedTuple):
    """Linear regression with a decay for each weight, theta = log decay; outer: other data."""

    inner: Any
    outer: Any
    params: jax.Array
    theta: jax.Array
    exact: jax.Array
    hessian: jax.Array


def ridge(num_weights: int = 8, num_rows: int = 30, decay: float = 1.0) -> Ridge:
    keys = jax.random.split(jax.random.key(0), 5)
    x, x_val = (jax.random.normal(k, (num_rows, num_weights)) for k in keys[:2])
    y, y_val = (jax.random.normal(k, (num_rows,)) for k in keys[2:4])
    theta = 0.3 * jax.random.normal(keys[4], (num_weights,)) + jnp.log(decay)

    def inner(w, theta):
        return jnp.mean((x @ w - y) ** 2) / 2 + jnp.sum(jnp.exp(theta) * w**2) / 2

    def outer(w, theta):
        return jnp.mean((x_val @ w - y_val) ** 2) / 2 + 0.01 * jnp.sum(theta**2)

    def minimum(theta):
        hessian = x.T @ x / num_rows + jnp.diag(jnp.exp(theta))
        return jnp.linalg.solve(hessian, x.T @ y / num_rows)

    exact = jax.grad(lambda theta: outer(minimum(theta), theta))(theta)
    hessian = jax.hessian(inner)(minimum(theta), theta)
    return Ridge(inner, outer, minimum(theta), theta, exact, hessian)


class Quadratic(NamedTuple):
    """inner = w H w / 2 - w (C theta), outer = |w - target|^2 / 2: B = -C, everything explicit."""

    inner: Any
    outer: Any
    hessian: jax.Array
    mixed: jax.Array
    target: jax.Array


def quadratic(eigenvalues: Any, num_theta: int = 3, in_range: bool = True) -> Quadratic:
    """With the given spectrum; ``in_range`` puts C into the range of H."""
    keys = jax.random.split(jax.random.key(1), 3)
    eigenvalues = jnp.asarray(eigenvalues)
    dim = eigenvalues.size
    basis = jnp.linalg.qr(jax.random.normal(keys[0], (dim, dim)))[0]
    hessian = basis @ jnp.diag(eigenvalues) @ basis.T
    mixed = jax.random.normal(keys[1], (dim, num_theta))
    if in_range:
        mixed = basis @ ((eigenvalues != 0)[:, None] * (basis.T @ mixed))
    target = jax.random.normal(keys[2], (dim,))
    return Quadratic(
        lambda w, theta: w @ hessian @ w / 2 - w @ (mixed @ theta),
        lambda w, theta: jnp.sum((w - target) ** 2) / 2,
        hessian,
        mixed,
        target,
    )
