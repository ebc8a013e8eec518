"""Linear solves by lineax's solvers, and one that is differentiated like the inverse it stands for.

The derivative of ``lineax.linear_solve`` itself raises where a solve stopped early, since its
backward pass has nowhere to report it; here a truncated solve is a result, forwards, backwards and
again.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import optax

from unrollgrad.implicit import operators, trees


class Solution(NamedTuple):
    """What a solver returned.

    Attributes:
        value: x.
        result: One of ``lineax.RESULTS``.
        num_steps: That the solver took; 0 for a direct one.
    """

    value: Any
    result: Any
    num_steps: jax.Array


def solve(
    operator: Any, vector: Any, solver: lx.AbstractLinearSolver, start: Any = None
) -> Solution:
    """Solves ``operator x = vector``, and says what became of it.

    The solver gets a vector of norm 1, so that its tolerances are relative to it.

    Args:
        operator: lineax's.
        vector: A tree of one floating dtype.
        solver: lineax's.
        start: Where an iterative solver begins; zero by default.
    """
    size = optax.tree.norm(vector)
    unit = jnp.where(size > 0, size, 1)
    right = trees.scale(1 / unit, vector)
    factor = _factor(operator, right, solver)
    options = {} if start is None else {"y0": trees.scale(1 / (unit * factor), start)}
    state = solver.init(_scaled(operator, factor, vector), options)
    value, result, stats = solver.compute(state, right, options)
    # Some solvers divide zero by zero where there is nothing to solve.
    value = jax.tree.map(lambda x: jnp.where(size > 0, x, 0), value)
    result = lx.RESULTS.where(size > 0, result, lx.RESULTS.successful)
    num_steps = jnp.asarray(stats.get("num_steps", 0), jnp.int32)
    return Solution(trees.scale(size * factor, value), result, num_steps)


def _factor(operator: Any, right: Any, solver: lx.AbstractLinearSolver) -> Any:
    """What the matrix is multiplied by for solvers that know absolute numbers; 1 for the others.

    ``lineax.CG`` returns NaN where a curvature is below 100 d times the machine epsilon, in
    whatever units: 10 for a million unknowns in float32. Multiplied by this power of two it is a
    millionth. ``lineax.LSMR`` stops early where the matrix is small, ``lineax.Normal`` squares it:
    they get one of norm about 1, for one product more.
    """
    factor, inner = 1, solver
    if isinstance(solver, lx.LSMR | lx.Normal):
        norm = optax.tree.norm(operator.mv(right))
        factor = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), 1)
        inner = getattr(solver, "inner_solver", solver)
    if isinstance(inner, lx.CG):
        least = 100 * optax.tree.size(right) * float(jnp.finfo(trees.dtype(right)).eps)
        factor = factor * 2 ** max(0, math.ceil(math.log2(1e6 * least)))
    return factor


def _scaled(operator: Any, factor: Any, like: Any) -> Any:
    if isinstance(factor, int) and factor == 1:
        return operator

    def mv(v):
        return trees.scale(factor, operator.mv(v))

    kinds = {lx.is_positive_semidefinite: lx.positive_semidefinite_tag}
    kinds |= {lx.is_negative_semidefinite: lx.negative_semidefinite_tag}
    kinds |= {lx.is_symmetric: lx.symmetric_tag}
    tags = frozenset(tag for has, tag in kinds.items() if has(operator))
    return operators.function(mv, like, tags)


def differentiable_solve(
    matvec: Callable[[Any], Any],
    vector: Any,
    solver: lx.AbstractLinearSolver,
    seen: Sequence[jax.Array],
    tags: Any = (),
) -> Any:
    """Solves ``matvec(x) = vector``, under jvp, vjp, vmap and again.

    jax transposes a linear solve only where *all* of its right-hand side is linear in what is
    differentiated. ``unseen`` zeros bind its leaves together, so that none of them is constant
    where another is not: one is added to the vector, and 1 plus one multiplies the matrix.

    Args:
        matvec: Linear, from vectors like ``vector`` to the same.
        vector: A tree of one floating dtype.
        solver: Of lineax.
        seen: All that ``matvec`` closes over and that may be differentiated.
        tags: lineax's, of the matrix.
    """
    nothing = unseen(jax.tree.leaves(vector))
    one = 1 + unseen(seen)

    def bound(x):
        return trees.scale(one, matvec(x))

    def run(matvec, vector):
        return solve(operators.function(matvec, vector, tags), vector, solver).value

    vector = jax.tree.map(lambda x: x + nothing.astype(x.dtype), vector)
    return jax.lax.custom_linear_solve(bound, vector, run, run)


def unseen(leaves: Sequence[jax.Array]) -> jax.Array:
    """Zero, linear in every leaf; jax does not see that it is constant, and XLA does."""
    corners = [jnp.sum(jnp.ravel(x)[:1]).real.astype(jnp.float32) for x in leaves]
    total = functools.reduce(jnp.add, corners, jnp.float32(0))
    return jax.lax.select(jnp.zeros((), bool), total, jnp.zeros_like(total))
