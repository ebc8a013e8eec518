"""Curvature of the inner problem, as lineax operators."""

from collections.abc import Callable
from typing import Any

import jax
import lineax as lx

from unrollgrad.implicit import trees


def hessian(inner: Callable, params: Any, theta: Any) -> tuple[Any, lx.AbstractLinearOperator]:
    """The gradient of inner in the params, and the operator of its derivative.

    The gradient is linearised once, so that a product costs no more than its linear part.
    """
    gradient, push = jax.linearize(lambda p: jax.grad(inner)(p, theta), params)
    return gradient, function(push, params, lx.positive_semidefinite_tag)


def gauss_newton(predict: Callable, loss: Callable) -> Callable[[Any, Any], Any]:
    """The generalised Gauss-Newton matrix J^T L J, for ``hypergradient(curvature=...)``.

    J is the Jacobian of ``predict`` in params and L the Hessian of ``loss`` in the predictions. It
    is the Hessian less the term with the second derivative of ``predict``: positive semidefinite
    where ``loss`` is convex, and equal to it where predict is linear or the residuals vanish.

    A term of the inner loss that does not go through ``predict``, such as weight decay, is not in
    it: add its curvature to the predictions or to ``damping``.

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

    def curvature(params: Any, theta: Any) -> lx.AbstractLinearOperator:
        params = trees.check_floating("params", params)
        predictions, push = jax.linearize(lambda p: predict(p, theta), params)
        pull = jax.linear_transpose(push, params)
        _, bend = jax.linearize(lambda y: jax.grad(loss)(y, theta), predictions)
        tags = lx.positive_semidefinite_tag
        return function(lambda v: pull(bend(push(v)))[0], params, tags)

    return curvature


def damped(operator: Any, params: Any, damping: Any) -> lx.AbstractLinearOperator:
    """``operator + damping``, on vectors of one dtype."""
    wide = trees.widen(params)

    def mv(v):
        return trees.add(trees.narrow(operator.mv(trees.narrow(v, params)), wide), v, damping)

    # What still holds when a number is added to the diagonal.
    if lx.is_positive_semidefinite(operator):
        return function(mv, wide, lx.positive_semidefinite_tag)
    return function(mv, wide, lx.symmetric_tag if lx.is_symmetric(operator) else ())


def function(matvec: Callable, like: Any, tags: Any = ()) -> lx.AbstractLinearOperator:
    """A linear function on trees like ``like``.

    It stays a closure, for solvers that are called where it was made: lineax would convert it for
    use elsewhere, which fails with arrays on a mesh of explicit axes.
    """
    structure = jax.eval_shape(lambda: like)
    return lx.FunctionLinearOperator(matvec, structure, tags, closure_convert=False)
