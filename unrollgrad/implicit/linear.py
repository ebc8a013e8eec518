"""Linear solves with lineax's solvers, and one that differentiates like the inverse it stands for.

The derivative of ``lineax.linear_solve`` raises where a solve stopped early, since its backward
pass cannot report it. Here a truncated solve is a result, forwards, backwards and in higher
derivatives; a solve that broke down is NaN.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import optax

from unrollgrad._core.float_leaves import unseen
from unrollgrad.implicit import operators, trees
from unrollgrad.implicit.trees import T
from unrollgrad.types import ArrayTree, Numeric

__all__ = ["Method", "Solution", "Start", "differentiable_solve", "solve"]


class Solution(NamedTuple):
    """The outcome of a linear solve.

    Attributes:
        value: The solution.
        result: Whether the solver succeeded, as lineax reports it.
        num_steps: Steps of the solver; 0 for a direct one.
        direction: The direction of largest curvature that the solver found, or None.
    """

    value: ArrayTree
    result: lx.RESULTS
    num_steps: jax.Array
    direction: ArrayTree | None = None


class Start(NamedTuple):
    """What a solve takes over from an earlier one: its solution and its direction, or None."""

    value: ArrayTree | None = None
    direction: ArrayTree | None = None


def solve(
    operator: lx.AbstractLinearOperator,
    vector: ArrayTree,
    solver: lx.AbstractLinearSolver,
    start: Start | None = None,
    preconditioner: lx.AbstractLinearOperator | None = None,
) -> Solution:
    """Solves ``operator x = vector`` for a tree of one floating dtype.

    The solver gets a vector of norm 1, so that its tolerances are relative to the vector's norm.
    ``preconditioner`` approximates the inverse of ``operator``.
    """
    sign = 1
    if lx.is_negative_semidefinite(operator) and not lx.is_positive_semidefinite(operator):
        # lineax negates the matrix too where it must, but cannot negate one for trees.
        operator, sign = operators.negated(operator, vector), -1
    size = optax.tree.norm(vector)
    unit = jnp.where(size > 0, size, 1)
    right = trees.scale(1 / unit, vector)
    norm, power = _factors(operator, right, solver)
    factor = norm * power
    options: dict = {}
    if start is not None and start.value is not None:
        options["y0"] = trees.scale(sign / (unit * factor), start.value)
    if start is not None and start.direction is not None:
        options["direction"] = start.direction
    if preconditioner is not None:
        scale = 1 / norm
        if isinstance(solver, lx.GMRES):  # it compares M r with absolute thresholds
            image = optax.tree.norm(preconditioner.mv(right))
            scale = jnp.where(image > 0, 1 / jnp.where(image > 0, image, 1), 1)
        options["preconditioner"] = operators.scaled(preconditioner, scale, right)
    matrix = operators.scaled(operator, factor, right)
    state = solver.init(matrix, options)
    value, result, stats = solver.compute(state, right, options)
    if preconditioner is not None and isinstance(solver, lx.CG):
        definite = _is_definite_along(preconditioner, trees.add(right, matrix.mv(value), -1))
        result = lx.RESULTS.where(definite, result, lx.RESULTS.breakdown)
    # Some solvers divide zero by zero where there is nothing to solve.
    value = jax.tree.map(lambda x: jnp.where(size > 0, x, 0), value)
    result = lx.RESULTS.where(size > 0, result, lx.RESULTS.successful)
    num_steps = jnp.asarray(stats.get("num_steps", 0), jnp.int32)
    value = trees.scale(sign * size * factor, value)
    return Solution(value, result, num_steps, stats.get("direction"))


def _is_definite_along(operator: lx.AbstractLinearOperator, v: ArrayTree) -> jax.Array:
    """Whether v^T operator v > 0, or v is zero: ``lineax.CG`` stops in silence where it is not."""
    size = optax.tree.norm(v)
    v = trees.scale(1 / jnp.where(size > 0, size, 1), v)
    return (size == 0) | ~(trees.dot(v, operator.mv(v)) <= 0)


def _factors(
    operator: lx.AbstractLinearOperator, right: ArrayTree, solver: lx.AbstractLinearSolver
) -> tuple[Numeric, int]:
    """Two factors of the matrix for a solver with absolute thresholds; 1 for the others.

    ``lineax.CG`` returns NaN where a curvature is below 100 d times the machine epsilon, in
    whatever units: 10 for a million unknowns in float32. Multiplied by this power of two the
    threshold is a millionth. ``lineax.LSMR`` stops early where the matrix is small, and
    ``lineax.Normal`` squares it: they get a matrix of norm about 1, for one product more.
    """
    factor, power, inner = 1, 1, solver
    if isinstance(solver, lx.LSMR | lx.Normal):
        norm = optax.tree.norm(operator.mv(right))
        factor = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 1)
        inner = getattr(solver, "inner_solver", solver)
    if isinstance(inner, lx.CG):
        least = 100 * optax.tree.size(right) * float(jnp.finfo(trees.dtype(right)).eps)
        power = 2 ** max(0, math.ceil(math.log2(1e6 * least)))
    return factor, power


class Method(NamedTuple):
    """How the linear systems of a derivative are solved."""

    solver: lx.AbstractLinearSolver
    tags: frozenset[object] = frozenset()  # lineax's, of the matrix
    preconditioner: lx.AbstractLinearOperator | None = None
    guard: Callable[[jax.Array, Any], Any] = lambda residual, x: x


def differentiable_solve(
    matvec: Callable[..., ArrayTree], vector: T, method: Method, seen: Sequence[jax.Array]
) -> T:
    """Solves ``matvec(x) = vector``, with jvp, vjp, vmap and any nesting of them.

    jax transposes a linear solve only where *all* of its right-hand side is linear in what is
    differentiated. ``unseen`` zeros tie the leaves together, so that none is constant where another
    is not: one zero is added to the vector, and 1 plus another multiplies the matrix. ``seen`` are
    the arrays in the closure of ``matvec`` that may be differentiated.
    ``method.guard(residual, x)`` looks at every solution, and at |matvec(x) - vector| / |vector|.
    """
    nothing = unseen(jax.tree.leaves(vector))
    one = 1 + unseen(seen)

    def solved(tags, inverse, matvec, vector):
        operator = operators.function(matvec, vector, tags)
        x, result, *_ = solve(operator, vector, method.solver, preconditioner=inverse)
        broken = result == lx.RESULTS.breakdown
        x = jax.tree.map(lambda y: jnp.where(broken, jnp.nan, y), x)
        size = optax.tree.norm(vector)
        missed = optax.tree.norm(trees.add(matvec(x), vector, -1))
        return x, result, missed / jnp.where(size > 0, size, 1)

    def forwards(matvec, vector):
        x, _, missed = solved(method.tags, method.preconditioner, matvec, vector)
        return method.guard(missed, x)

    def backwards(matvec, vector):
        inverse = method.preconditioner
        inverse = None if inverse is None else inverse.transpose()
        x, result, missed = solved(lx.transpose_tags(method.tags), inverse, matvec, vector)
        # With x = A^+ b the transposed solve is (A^+)^T, right for any vector, whatever is left.
        return method.guard(jnp.where(result == lx.RESULTS.successful, 0, missed), x)

    vector = jax.tree.map(lambda x: x + nothing.astype(x.dtype), vector)
    return jax.lax.custom_linear_solve(
        lambda x: trees.scale(one, matvec(x)), vector, forwards, backwards
    )
