"""Inverse-Hessian solvers that lineax does not have, as lineax solvers.

They solve H q = a, the linear system of a hypergradient. A solver that stops after a given number
of terms approximates q by intent, so it reports success.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from unrollgrad._checks import arguments
from unrollgrad._core.unroll import repeat
from unrollgrad.implicit import trees
from unrollgrad.types import ArrayTree, Key, Numeric

__all__ = ["dense", "identity", "neumann", "nystrom"]

_POWER_STEPS = 20
_KEPT_POWER_STEPS = 2
_FRESH = 0.1  # size of the random part that is added to a kept direction of norm 1
_SHARE_OF_RHO = 0.01


class _MatrixFree(lx.AbstractLinearSolver[lx.AbstractLinearOperator]):
    """The common part of the solvers here: their state is the operator itself."""

    def init(self, operator: lx.AbstractLinearOperator, options: dict):
        if operator.in_size() != operator.out_size():
            raise ValueError("the operator must be square: as many equations as unknowns.")
        return lx.linearise(operator)

    def transpose(self, state: lx.AbstractLinearOperator, options: dict):
        return state.transpose(), {}

    def conj(self, state: lx.AbstractLinearOperator, options: dict):
        return lx.conj(state), {}

    def assume_full_rank(self) -> bool:
        return True


class _Neumann(_MatrixFree):
    terms: int
    step_size: Numeric | str

    def compute(self, state: lx.AbstractLinearOperator, vector: ArrayTree, options: dict):
        alpha, stats = self.step_size, {"num_steps": jnp.int32(self.terms)}
        if isinstance(alpha, str):
            largest, stats["direction"] = _largest(state, vector, options.get("direction"))
            alpha = 1 / jnp.maximum(largest, float(jnp.finfo(jnp.float32).tiny))

        def richardson(q):
            return trees.add(q, trees.add(vector, state.mv(q), -1), alpha)

        start, steps = options.get("y0"), self.terms
        if start is None:  # the first step from zero needs no product
            start, steps = trees.scale(alpha, vector), self.terms - 1
        q = repeat(richardson, start, steps)
        return q, lx.RESULTS.successful, stats


def _largest(
    operator: lx.AbstractLinearOperator, like: ArrayTree, kept: ArrayTree | None
) -> tuple[jax.Array, ArrayTree]:
    """The magnitude of the eigenvalue of largest magnitude, from below, and its eigenvector.

    By power iteration from a random vector, or from the eigenvector that an earlier call ``kept``
    (zeros where there was none), with a small random part in case the curvature has turned away.
    """

    def multiply(v):
        return operator.mv(_unit(v))

    v: Any = optax.tree.random_like(jax.random.key(0), like)
    if kept is None:
        v = repeat(multiply, v, _POWER_STEPS)
    else:
        size = optax.tree.norm(kept)
        there = (size > 0) & jnp.isfinite(size)
        kept = jax.tree.map(lambda x: jnp.where(there, x, 0), kept)
        v = trees.add(kept, _unit(v), jnp.where(there, _FRESH, 1))
        steps = jnp.where(there, _KEPT_POWER_STEPS, _POWER_STEPS)
        v = jax.lax.fori_loop(0, steps, lambda _, v: multiply(v), v)
    return optax.tree.norm(v), _unit(v)


def _unit(v: ArrayTree) -> ArrayTree:
    """The vector with norm 1; zeros stay zeros."""
    size = optax.tree.norm(v)
    return trees.scale(1 / jnp.where(size > 0, size, 1), v)


def neumann(terms: int, step_size: Numeric | Literal["auto"] = "auto") -> lx.AbstractLinearSolver:
    """The Neumann series: q = alpha sum_{j < K} (1 - alpha H)^j a, the first ``terms`` = K terms.

    The series converges to H^-1 a for 0 < alpha < 2 / lambda_max. It multiplies the component of a
    with eigenvalue h by (1 - (1 - alpha h)^K) / h: like a damping of 1 / (alpha K), but sharper.
    If alpha is the rate of gradient descent, it equals backpropagation through the last K steps at
    a stationary point. From a warm start (``v0``) it takes K steps of q <- q + alpha (a - H q).

    Beyond 2 / lambda_max the series diverges: ``info.converged`` is False once the residual exceeds
    the residual of q = 0, and ``check=True`` compares alpha with lambda_max.

    Time: ``terms - 1`` products with H (``terms`` from a warm start). "auto" takes 20 more, or 2 if
    a ``hypergradient`` gets its previous result, which keeps the direction of largest curvature.
    Memory: two vectors.

    Args:
        terms: K, at least 1. Some code counts the K - 1 iterations after the first term instead.
        step_size: alpha; "auto" is 1 / lambda_max by power iteration. The learning rate of an
            adaptive optimizer is not a suitable value.

    Raises:
        ValueError: If ``terms`` or the step size is not positive.

    Example:
        >>> import jax.numpy as jnp, lineax as lx, unrollgrad as ug
        >>> h = lx.MatrixLinearOperator(jnp.diag(jnp.array([1.0, 0.5])))
        >>> a = jnp.ones(2)
        >>> print(lx.linear_solve(h, a, ug.implicit.neumann(3, 1.0)).value)
        [1.   1.75]

    References:
        Lorraine, Vicol and Duvenaud, Optimizing millions of hyperparameters by implicit
        differentiation, AISTATS 2020. Their "K' terms" are K' + 1 terms of the series.
    """
    return _Neumann(arguments.positive_int("terms", terms), _step_size(step_size))


def identity(step_size: Numeric = 1.0) -> lx.AbstractLinearSolver:
    """Approximates the inverse Hessian by alpha times the identity: q = alpha a (T1-T2).

    This is the first term of the Neumann series. Time: no products with H.

    Args:
        step_size: alpha.

    Raises:
        ValueError: If the step size is not positive.

    Example:
        >>> import jax.numpy as jnp, lineax as lx, unrollgrad as ug
        >>> h = lx.MatrixLinearOperator(jnp.diag(jnp.array([1.0, 0.5])))
        >>> print(lx.linear_solve(h, jnp.ones(2), ug.implicit.identity(0.1)).value)
        [0.1 0.1]

    References:
        Luketina, Berglund, Greff and Raiko, Scalable gradient-based tuning of continuous
        regularization hyperparameters, ICML 2016.
    """
    return _Neumann(1, _step_size(step_size))


class _Nystrom(_MatrixFree):
    rank: int
    rho: Numeric
    key: Key

    def compute(self, state: lx.AbstractLinearOperator, vector: ArrayTree, options: dict):
        a, unravel = ravel_pytree(vector)
        if self.rank > a.size:
            raise ValueError(f"`rank`={self.rank} is more than the {a.size} unknowns.")
        # One coordinate from each of ``rank`` stretches: distinct, without a shuffle of all.
        edges = np.array([i * a.size // self.rank for i in range(self.rank + 1)])
        chosen = jax.random.randint(self.key, (self.rank,), edges[:-1], edges[1:])

        def row(i):
            unit = jnp.zeros(a.size, a.dtype).at[i].set(1)
            return ravel_pytree(state.mv(unravel(unit)))[0]

        rows = jax.vmap(row)(chosen)
        values, vectors = _eigenpairs(rows, chosen)
        along = vectors @ a
        rho = jnp.asarray(self.rho, a.dtype)
        # Not by Woodbury's formula, which subtracts numbers that are lambda / rho times larger.
        q = (along / (values + rho)) @ vectors + (a - along @ vectors) / rho
        # H_k has the same rows as H; what rounding has changed in them must be small beside rho.
        off = jnp.linalg.norm((vectors[:, chosen].T * values[None]) @ vectors - rows)
        result = lx.RESULTS.where(
            off <= _SHARE_OF_RHO * rho, lx.RESULTS.successful, lx.RESULTS.breakdown
        )
        return unravel(q), result, {"num_steps": jnp.int32(self.rank)}


def _eigenpairs(rows: jax.Array, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The eigenvalues and eigenvectors (in rows) of C^T M^-1 C, with C ``rows`` of a matrix.

    M is their block at the columns ``chosen``. A shift of the matrix makes M positive definite in
    spite of rounding, and is subtracted from the eigenvalues (Frangella, Tropp and Udell 2023).
    """
    block = rows[:, chosen]
    block = (block + block.T) / 2
    shift = jnp.finfo(rows.dtype).eps * jnp.linalg.norm(rows)
    shift = shift + 2 * jnp.maximum(-jnp.linalg.eigvalsh(block)[0], 0)
    shift = jnp.maximum(shift, jnp.finfo(rows.dtype).tiny)
    lower = jnp.linalg.cholesky(block + shift * jnp.eye(len(block), dtype=rows.dtype))
    shifted = rows.at[jnp.arange(len(rows)), chosen].add(shift)
    half = jax.scipy.linalg.solve_triangular(lower, shifted, lower=True)
    _, sizes, vectors = jnp.linalg.svd(half, full_matrices=False)
    return jnp.maximum(sizes**2 - shift, 0), vectors


def nystrom(rank: int, rho: Numeric, *, key: Key | None = None) -> lx.AbstractLinearSolver:
    """Takes q = (H_k + rho)^-1 a, H_k the Nystrom approximation of H from ``rank`` of its rows.

    Let C be the rows and M their block at the same columns. Then H_k = C^T M^-1 C = V^T L V, with
    eigenvalues L and orthonormal rows V, and q = V^T (L + rho)^-1 V a + (a - V^T V a) / rho. It is
    exact up to the damping rho if the rank of H is at most ``rank``. It needs no step size and
    cannot diverge for H >= 0. Rounding changes H_k by about the machine epsilon times the largest
    curvature times the condition of the drawn block: if that is more than 1 % of rho in the rows,
    the solver does not report success (in float32 from lambda_max / rho = 1e5 or so).

    Time: ``rank`` products with H at once, and rank^2 d for the eigenvectors. Memory: 2 ``rank``
    vectors.

    Args:
        rank: The number of rows; one is drawn from each of ``rank`` stretches of the coordinates.
        rho: Damping of the directions outside the rows' span, in units of H.
        key: Draws the rows; by default every call draws the same ones.

    Raises:
        ValueError: If rank or rho is not positive, or rank exceeds the number of unknowns.

    Example:
        >>> import jax.numpy as jnp, lineax as lx, unrollgrad as ug
        >>> h = lx.MatrixLinearOperator(jnp.ones((3, 3)))
        >>> solution = lx.linear_solve(h, jnp.ones(3), ug.implicit.nystrom(1, 0.1))
        >>> print(solution.value.round(3))  # (h + 0.1)^-1 a = a / 3.1
        [0.323 0.323 0.323]

    References:
        Hataya and Yamada, Nystrom method for accurate and scalable implicit differentiation,
        AISTATS 2023. Frangella, Tropp and Udell, Randomized Nystrom preconditioning, SIMAX 2023.
    """
    if trees.is_concrete(rho) and not rho > 0:
        raise ValueError(f"`rho` must be positive; got {rho}. 0.1 times the largest curvature?")
    key = jax.random.key(0) if key is None else arguments.typed_key(key)
    return _Nystrom(arguments.positive_int("rank", rank), rho, key)


def dense(rcond: float | None = None) -> lx.AbstractLinearSolver:
    """Multiplies by the pseudo-inverse: exact, and of minimal norm where H is singular.

    Time: d products with H, and a singular value decomposition in d^3. Memory: d^2 numbers.

    Args:
        rcond: Singular values below ``rcond`` times the largest count as zero; the default is d
            times the machine epsilon.

    Example:
        >>> import jax.numpy as jnp, lineax as lx, unrollgrad as ug
        >>> h = lx.MatrixLinearOperator(jnp.diag(jnp.array([2.0, 0.0])))
        >>> print(lx.linear_solve(h, jnp.ones(2), ug.implicit.dense()).value)
        [0.5 0. ]
    """
    return lx.SVD(rcond)


def _step_size(value: Numeric | str) -> Numeric | str:
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f'`step_size` must be a number or "auto"; got {value!r}.')
    elif trees.is_concrete(value) and not value > 0:
        raise ValueError(
            f'`step_size` must be positive, and below 2 / lambda_max; got {value}. Try "auto".'
        )
    return value
