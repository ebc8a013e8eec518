"""Inverse-Hessian solvers that lineax does not have, as lineax solvers.

All solve H q = a for the q with which a hypergradient is made. Those that stop after a number of
terms give an approximation by intent: that they stopped is no failure.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax

from unrollgrad._checks import arguments
from unrollgrad.implicit import trees

_POWER_STEPS = 20


class _MatrixFree(lx.AbstractLinearSolver):
    """What the solvers here have in common: their state is the operator itself."""

    def init(self, operator: Any, options: dict[str, Any]) -> Any:
        if operator.in_size() != operator.out_size():
            raise ValueError("the operator must be square: as many equations as unknowns.")
        return lx.linearise(operator)

    def transpose(self, state: Any, options: dict[str, Any]) -> Any:
        return state.transpose(), {}

    def conj(self, state: Any, options: dict[str, Any]) -> Any:
        return lx.conj(state), {}

    def assume_full_rank(self) -> bool:
        return True


class _Neumann(_MatrixFree):
    terms: int
    step_size: Any

    def compute(self, state: Any, vector: Any, options: dict[str, Any]) -> Any:
        alpha = self.step_size
        if isinstance(alpha, str):
            alpha = 1 / jnp.maximum(largest_eigenvalue(state), jnp.finfo(jnp.float32).tiny)

        def richardson(q, _):
            return trees.add(q, trees.add(vector, state.mv(q), -1), alpha), None

        start = options.get("y0")
        if start is None:  # the first turn from zero needs no product
            start, turns = trees.scale(alpha, vector), self.terms - 1
        else:
            turns = self.terms
        q, _ = jax.lax.scan(richardson, start, length=turns)
        return q, lx.RESULTS.successful, {"num_steps": jnp.int32(self.terms)}


def neumann(
    terms: int, step_size: float | jax.Array | Literal["auto"] = "auto"
) -> lx.AbstractLinearSolver:
    """The Neumann series: q = alpha sum_{j < K} (1 - alpha H)^j a, the first ``terms`` = K terms.

    It tends to H^-1 a for 0 < alpha < 2 / lambda_max, and multiplies the part of a that belongs to
    the eigenvalue h by (1 - (1 - alpha h)^K) / h: like a damping of 1 / (alpha K), but sharper.
    With alpha the rate of gradient descent it is backpropagation through the last K steps, taken
    at a stationary point. With a warm start (``v0``) it takes K steps of q <- q + alpha (a - H q).

    Beyond 2 / lambda_max the series diverges: ``info.converged`` is False once its residual is
    above that of q = 0, and ``check=True`` compares alpha with lambda_max itself.

    Time: ``terms - 1`` products with H (``terms`` from a warm start), and 20 more for "auto".
    Memory: two vectors.

    Args:
        terms: K, at least 1. Some code counts K - 1 iterations after the first term.
        step_size: alpha; "auto" is 1 / lambda_max by power iteration. An adaptive optimizer's
            learning rate has nothing to do with it.

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
        differentiation, AISTATS 2020. There "K' terms" are K' + 1 of the series.
    """
    return _Neumann(arguments.positive_int("terms", terms), _step_size(step_size))


def identity(step_size: float | jax.Array = 1.0) -> lx.AbstractLinearSolver:
    """Takes q = alpha a: the inverse Hessian taken to be alpha times the identity (T1-T2).

    The first term of the Neumann series. Time: nothing.

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
    rho: Any
    key: Any

    def compute(self, state: Any, vector: Any, options: dict[str, Any]) -> Any:
        rows, columns = self._sample(state, vector)

        def apply(x):  # C x
            parts = jax.tree.map(lambda c, x: c.reshape(self.rank, -1) @ x.ravel(), columns, x)
            return sum(jax.tree.leaves(parts))

        gram = sum(
            c.reshape(self.rank, -1) @ c.reshape(self.rank, -1).T for c in jax.tree.leaves(columns)
        )
        inner = jnp.linalg.solve(rows + gram / self.rho, apply(vector))
        spread = jax.tree.map(lambda c: jnp.tensordot(inner, c, 1), columns)
        q = jax.tree.map(
            lambda a, s: (a / self.rho - s / self.rho**2).astype(a.dtype), vector, spread
        )
        return q, lx.RESULTS.successful, {"num_steps": jnp.int32(self.rank)}

    def _sample(self, operator: Any, like: Any) -> tuple[jax.Array, Any]:
        """The chosen rows at the chosen columns, and the rows, which are H times unit vectors."""
        leaves, structure = jax.tree.flatten(like)
        ends = np.cumsum([0, *(x.size for x in leaves)])
        if self.rank > ends[-1]:
            raise ValueError(f"`rank`={self.rank} is more than the {ends[-1]} unknowns.")
        # One coordinate of each of ``rank`` stretches: distinct, without a shuffle of all.
        edges = np.array([i * int(ends[-1]) // self.rank for i in range(self.rank + 1)])
        chosen = jax.random.randint(self.key, (self.rank,), edges[:-1], edges[1:])

        def unit(i):
            pieces = [
                jnp.zeros(x.size, x.dtype)
                .at[jnp.where((i >= begin) & (i < begin + x.size), i - begin, x.size)]
                .set(1, mode="drop")
                for begin, x in zip(ends[:-1], leaves, strict=True)
            ]
            shaped = [p.reshape(x.shape) for p, x in zip(pieces, leaves, strict=True)]
            return structure.unflatten(shaped)

        columns = jax.vmap(lambda i: operator.mv(unit(i)))(chosen)

        def at(i):
            parts = [
                jnp.where(
                    (i >= begin) & (i < begin + x.size),
                    c.reshape(self.rank, -1)[:, jnp.clip(i - begin, 0, x.size - 1)],
                    0,
                )
                for begin, x, c in zip(ends[:-1], leaves, jax.tree.leaves(columns), strict=True)
            ]
            return functools.reduce(jnp.add, parts)

        return jax.vmap(at)(chosen), columns


def nystrom(
    rank: int, rho: float | jax.Array, *, key: jax.Array | None = None
) -> lx.AbstractLinearSolver:
    """Takes q = (H_k + rho)^-1 a, H_k the Nystrom approximation of H from ``rank`` of its rows.

    With C the rows, M the block of them at the same columns: H_k = C^T M^-1 C, and by Woodbury
    q = a / rho - C^T (M + C C^T / rho)^-1 C a / rho^2. Exact up to the damping rho where H has no
    more than that rank. There is no step size, and nothing diverges for H >= 0.

    Time: ``rank`` products with H at once, and a rank x rank solve. Memory: ``rank`` vectors.

    Args:
        rank: How many rows, one from each of as many stretches of the coordinates.
        rho: Damping of what the rows do not see, in units of H.
        key: Which rows are drawn; by default the same in every call.

    Raises:
        ValueError: If rank or rho is not positive, or the rank is above the number of unknowns.

    Example:
        >>> import jax.numpy as jnp, lineax as lx, unrollgrad as ug
        >>> h = lx.MatrixLinearOperator(jnp.ones((3, 3)))
        >>> solution = lx.linear_solve(h, jnp.ones(3), ug.implicit.nystrom(1, 0.1))
        >>> print(solution.value.round(3))  # (h + 0.1)^-1 a = a / 3.1
        [0.323 0.323 0.323]

    References:
        Hataya and Yamada, Nystrom method for accurate and scalable implicit differentiation,
        AISTATS 2023.
    """
    if trees.is_concrete(rho) and not rho > 0:
        raise ValueError(f"`rho` must be positive; got {rho}. 0.1 times the largest curvature?")
    key = jax.random.key(0) if key is None else arguments.typed_key(key)
    return _Nystrom(arguments.positive_int("rank", rank), rho, key)


def dense(rcond: float | None = None) -> lx.AbstractLinearSolver:
    """The pseudo-inverse of the whole matrix: exact, of minimal norm where H is singular.

    Time: d products and a singular value decomposition, d^3. Memory: d^2 numbers.

    Args:
        rcond: Singular values below this share of the largest count as zero; by default d times
            the machine epsilon.

    Example:
        >>> import jax.numpy as jnp, lineax as lx, unrollgrad as ug
        >>> h = lx.MatrixLinearOperator(jnp.diag(jnp.array([2.0, 0.0])))
        >>> print(lx.linear_solve(h, jnp.ones(2), ug.implicit.dense()).value)
        [0.5 0. ]
    """
    return lx.SVD(rcond)


def largest_eigenvalue(operator: Any, steps: int = _POWER_STEPS) -> jax.Array:
    """The eigenvalue of largest magnitude, by power iteration: its magnitude, from below."""
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), operator.in_structure())
    v = optax.tree.random_like(jax.random.key(0), start)

    def turn(carry, _):
        v, _ = carry
        size = optax.tree.norm(v)
        v = operator.mv(trees.scale(1 / jnp.where(size > 0, size, 1), v))
        return (v, optax.tree.norm(v)), None

    zero = jnp.zeros((), trees.dtype(start))
    (_, largest), _ = jax.lax.scan(turn, (v, zero), length=steps)
    return largest


def _step_size(value: Any) -> Any:
    if isinstance(value, str):
        if value != "auto":
            raise ValueError(f'`step_size` must be a number or "auto"; got {value!r}.')
    elif trees.is_concrete(value) and not value > 0:
        raise ValueError(
            f'`step_size` must be positive, and below 2 / lambda_max; got {value}. Try "auto".'
        )
    return value
