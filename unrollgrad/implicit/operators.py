"""Curvature of the inner problem, as lineax operators."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from unrollgrad._checks import arguments
from unrollgrad.implicit import trees
from unrollgrad.types import ArrayTree, Numeric, Theta

__all__ = [
    "Preconditioner",
    "as_tags",
    "check_preconditioner",
    "damped",
    "function",
    "gauss_newton",
    "hessian",
    "kept_tags",
    "negated",
    "preconditioner",
    "scaled",
    "tags_for",
]


def hessian(
    inner: Callable[..., Numeric], params: ArrayTree, theta: Theta
) -> tuple[ArrayTree, lx.AbstractLinearOperator]:
    """The gradient of ``inner`` with respect to params, and the Hessian.

    The gradient is linearised once, so that a product costs no more than its linear part.
    """
    gradient, push = jax.linearize(lambda p: jax.grad(inner)(p, theta), params)
    return gradient, function(push, params, lx.positive_semidefinite_tag)


def gauss_newton(
    predict: Callable[..., ArrayTree], loss: Callable[..., Numeric]
) -> Callable[..., lx.AbstractLinearOperator]:
    """The generalised Gauss-Newton matrix J^T L J, for ``hypergradient(curvature=...)``.

    J is the Jacobian of ``predict`` with respect to params, and L is the Hessian of ``loss`` with
    respect to the predictions. The matrix is the Hessian without the term that contains the second
    derivative of ``predict``: it is positive semidefinite where ``loss`` is convex, and equals the
    Hessian where ``predict`` is linear or the residuals vanish.

    It lacks the terms of the inner loss that do not go through ``predict``, such as weight decay:
    add their curvature to the predictions or to ``damping``.

    Args:
        predict: ``predict(params, theta) -> predictions``, any pytree.
        loss: ``loss(predictions, theta) -> scalar``.

    Returns:
        ``curvature(params, theta)``, a lineax operator.

    Example:
        >>> import jax.numpy as jnp, unrollgrad as ug
        >>> x = jnp.array([[1.0, 2.0], [0.0, 1.0]])
        >>> curvature = ug.implicit.gauss_newton(
        ...     lambda w, theta: x @ w, lambda y, theta: jnp.sum(y**2) / 2)
        >>> print(curvature(jnp.zeros(2), None).as_matrix())
        [[1. 2.]
         [2. 5.]]

    References:
        Schraudolph, Fast curvature matrix-vector products for second-order gradient descent,
        Neural Computation, 2002.
    """

    def curvature(params, theta):
        params = trees.check_floating("params", params)
        predictions, push = jax.linearize(lambda p: predict(p, theta), params)
        pull = jax.linear_transpose(push, params)
        _, bend = jax.linearize(lambda y: jax.grad(loss)(y, theta), predictions)
        tags = lx.positive_semidefinite_tag
        return function(lambda v: pull(bend(push(v)))[0], params, tags)

    return curvature


def damped(
    operator: lx.AbstractLinearOperator, params: ArrayTree, damping: Numeric
) -> lx.AbstractLinearOperator:
    """``operator + damping``, on vectors of one dtype."""
    wide = trees.widen(params)

    def mv(v):
        return trees.add(trees.narrow(operator.mv(trees.narrow(v, params)), wide), v, damping)

    return function(mv, wide, kept_tags(operator) - {lx.negative_semidefinite_tag})


def scaled(
    operator: lx.AbstractLinearOperator, factor: Numeric, like: ArrayTree
) -> lx.AbstractLinearOperator:
    """``factor * operator``, on vectors like ``like``."""
    return function(lambda v: trees.scale(factor, operator.mv(v)), like, kept_tags(operator))


def negated(operator: lx.AbstractLinearOperator, like: ArrayTree) -> lx.AbstractLinearOperator:
    """``-operator``, which is negative semidefinite, on vectors like ``like``."""
    tags = kept_tags(operator) - {lx.negative_semidefinite_tag} | {lx.positive_semidefinite_tag}
    return function(lambda v: trees.scale(-1, operator.mv(v)), like, tags)


Preconditioner = lx.AbstractLinearOperator | Callable[..., object]
"""An operator, or a function of a point that returns one or a product with one."""

_PRECONDITIONED = lx.CG | lx.GMRES | lx.BiCGStab


def check_preconditioner(given: object, solver: lx.AbstractLinearSolver | None) -> None:
    """Raises unless ``given`` can be a preconditioner, and a solver that is given can use it."""
    if given is None:
        return
    if not isinstance(given, lx.AbstractLinearOperator) and not callable(given):
        raise TypeError(
            "`preconditioner` must be an operator of lineax or a function that returns one; got "
            f"{arguments.describe(given)}. For a diagonal d: lineax.DiagonalLinearOperator(1 / d)."
        )
    inner = solver.inner_solver if isinstance(solver, lx.Normal) else solver
    if inner is not None and not isinstance(inner, _PRECONDITIONED):
        raise ValueError(
            "`preconditioner` can be used by lineax.CG, GMRES, BiCGStab and Normal(CG) only; got "
            f"it with solver={solver}. Leave one of the two out."
        )


def preconditioner(
    given: Any, params: ArrayTree, args: tuple, kwargs: dict | None = None
) -> Callable[[Any], ArrayTree]:
    """The product with a preconditioner at a point, for vectors like params of any dtypes.

    Raises:
        TypeError: If it has other shapes than params.
    """
    if not isinstance(given, lx.AbstractLinearOperator):
        given = given(params, *args, **(kwargs or {}))
    if isinstance(given, lx.AbstractLinearOperator):
        multiply, like = given.mv, given.in_structure()
        out = given.out_structure()
    elif callable(given):
        multiply, like = given, params
        out = jax.eval_shape(given, params)
    else:
        raise TypeError(
            "`preconditioner` must return an operator of lineax or a function of a vector; got "
            f"{arguments.describe(given)}. Where it is the product itself, "
            "pass lambda *point: preconditioner."
        )
    for what, tree in {"takes": like, "returns": out}.items():
        if difference := arguments.shape_difference(params, tree):
            raise TypeError(
                f"`preconditioner` must map vectors like params to vectors like params; what it "
                f"{what} differs at params{difference}."
            )
    return lambda v: trees.narrow(multiply(trees.narrow(v, like)), v)


_KEPT = {
    lx.positive_semidefinite_tag: lx.is_positive_semidefinite,
    lx.negative_semidefinite_tag: lx.is_negative_semidefinite,
    lx.symmetric_tag: lx.is_symmetric,
    lx.lower_triangular_tag: lx.is_lower_triangular,
    lx.upper_triangular_tag: lx.is_upper_triangular,
    lx.tridiagonal_tag: lx.is_tridiagonal,
    lx.diagonal_tag: lx.is_diagonal,
}


def kept_tags(operator: lx.AbstractLinearOperator) -> frozenset[object]:
    """The tags of ``operator`` that hold for its product with a number > 0."""
    return frozenset(tag for tag, holds in _KEPT.items() if holds(operator))


def as_tags(tags: object) -> frozenset[object]:
    """One tag of lineax, or several, as a set."""
    several = isinstance(tags, tuple | list | set | frozenset)
    return frozenset(tags) if several else frozenset([tags])


def tags_for(
    solver: lx.AbstractLinearSolver | None, known: frozenset[object] = frozenset()
) -> frozenset[object]:
    """The tags, and what a solver takes for granted of the matrix, or of its preconditioner."""
    if isinstance(solver, lx.CG | lx.Cholesky) and lx.negative_semidefinite_tag not in known:
        return known | {lx.positive_semidefinite_tag}
    return known


def function(
    matvec: Callable[..., ArrayTree], like: ArrayTree, tags: object = ()
) -> lx.AbstractLinearOperator:
    """The square operator of a linear function on trees like ``like``.

    ``matvec`` stays a closure, for solvers that are called where it was made: closure conversion,
    lineax's default, fails for arrays on a mesh with explicit axes.
    """
    structure = jax.eval_shape(lambda: like)
    make: Any = _Square  # whose arguments pyrefly takes for its fields
    return make(matvec, structure, tags, closure_convert=False)


class _Square(lx.FunctionLinearOperator):
    """A function whose results are like its arguments.

    lineax asks a cache without bounds for the shape of the result, and would keep there, with the
    function, all arrays that it closes over.
    """

    def out_structure(self):
        return self.in_structure()

    def transpose(self) -> lx.FunctionLinearOperator:
        if lx.is_symmetric(self):
            return self
        transposed = jax.linear_transpose(self.fn, self.in_structure())
        tags = lx.transpose_tags(self.tags)
        made: Any = function(lambda v: transposed(v)[0], self.in_structure(), tags)
        return made


@lx.conj.register(_Square)
def _(operator: _Square) -> lx.AbstractLinearOperator:
    def conjugate(v):
        return jax.tree.map(jnp.conj, operator.fn(jax.tree.map(jnp.conj, v)))

    return function(conjugate, operator.in_structure(), operator.tags)
