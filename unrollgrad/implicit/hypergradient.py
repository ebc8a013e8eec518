"""The gradient of an outer loss through the optimum of an inner one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import lineax as lx

from unrollgrad._checks import arguments
from unrollgrad._core import eager
from unrollgrad.implicit import health, linear, operators, trees
from unrollgrad.types import ArrayTree, Numeric, Theta

__all__ = ["HyperGradient", "hypergradient", "start_of"]


class HyperGradient(NamedTuple):
    """A hypergradient.

    Attributes:
        grad: A tree like theta.
        outer_loss: ``outer(params, theta)``.
        v: The solution q of (H + damping) q = d outer / d params, like params in one dtype of at
            least float32. It warm-starts the next call.
        info: Measurements of the solve. ``v`` and ``info`` are None if nothing was solved.
    """

    grad: Any
    outer_loss: jax.Array
    v: ArrayTree | None
    info: health.HypergradientInfo | None


def hypergradient(
    outer: Callable[..., Numeric],
    inner: Callable[..., Numeric],
    *,
    solver: lx.AbstractLinearSolver,
    damping: Numeric = 0.0,
    mixed: Callable[..., Numeric] | None = None,
    curvature: Callable[..., lx.AbstractLinearOperator] | None = None,
    preconditioner: operators.Preconditioner | None = None,
    check: bool = False,
) -> Callable[..., HyperGradient]:
    """The gradient of theta -> outer(params*(theta), theta), where params* minimises inner.

    By the implicit function theorem, at params with d inner / d params = 0:

        H q = a,   grad = d outer / d theta - B^T q,

    with H = d2 inner / d params^2, a = d outer / d params, B = d2 inner / d theta d params. It is
    exact if the params are a minimum, H is invertible and the solve is exact. The inner optimizer
    does not matter, and its learning rate gets no gradient. If H is singular (more weights than
    data), a solver of minimal norm (``lineax.LSMR``, ``dense``) gives the derivative of the minimum
    that is nearest to the params; ``damping`` and few terms of a series approximate it. Away from a
    minimum the error is proportional to the distance to it (``info.stationarity``).

    Time: one gradient of outer, the solver's products with H (each about two gradients of inner;
    inner's gradient is linearised once) and one product with B^T. All of ``info`` costs 20
    products; under jit its unused fields cost nothing. Memory: the linearised gradient and the
    solver's vectors, whatever the size of theta.

    On several devices: with batches sharded over a mesh, and params and theta replicated, each
    product is one all-reduce inside jit. (lineax's operators do not work inside ``shard_map``.)

    Args:
        outer: ``outer(params, theta) -> scalar``.
        inner: ``inner(params, theta) -> scalar``, the loss that params minimise; it closes over its
            batch.
        solver: A solver of lineax (``CG(rtol, atol)``, ``Normal(CG(...))``, ``GMRES``,
            ``BiCGStab``, ``LSMR``) or of ``implicit``: ``neumann``, ``identity``, ``nystrom``,
            ``dense``. It gets a right-hand side of norm 1, so that its tolerances are relative.
            lineax's ``CG`` recomputes its residual every ten steps, a product more each time;
            ``stabilise_every=None`` leaves that out.
        damping: Added to H. The result is exact for inner + damping / 2 |params - here|^2.
        mixed: inner on another batch, for B.
        curvature: ``curvature(params, theta)``, an operator in place of H: ``gauss_newton(...)``.
        preconditioner: As in ``root``, an approximation of (H + damping)^-1, or a function
            ``preconditioner(params, theta)`` that returns it.
        check: Whether to raise if the result cannot be trusted. It works outside jit only (not in
            ``bilevel.solve``) and costs up to 140 products.

    Returns:
        ``f(params, theta, v0=None) -> HyperGradient(grad, outer_loss, v, info)``. The solve starts
        at ``v0``, the ``v`` of an earlier call. If ``v0`` is the earlier HyperGradient itself,
        ``neumann(step_size="auto")`` also takes over the direction of largest curvature, so that
        its step size costs 2 products in place of 20; with ``v=None`` in it, the direction alone.

    Raises:
        TypeError: If outer or inner is not a function; when called, if leaves are not floating or
            ``v0`` is not like ``v``.
        ValueError: If damping is negative, or ``solver`` uses no preconditioner and one is given;
            when called, if a loss is not a scalar.
        HypergradientError: If ``check`` finds a problem; the message says what to do.

    Example:
        >>> import jax, jax.numpy as jnp, lineax as lx, unrollgrad as ug
        >>> x, y = jnp.array([1.0, 2.0]), jnp.array([2.0, 3.0])
        >>> inner = lambda w, decay: jnp.sum((x * w - y) ** 2) / 2 + decay * w**2 / 2
        >>> outer = lambda w, decay: (w - 1) ** 2 / 2
        >>> f = jax.jit(ug.implicit.hypergradient(outer, inner, solver=lx.CG(1e-6, 1e-6)))
        >>> w = 8 / (5 + 1.0)  # the minimum for a decay of 1; dw / d decay = -8 / 36
        >>> print(f"{f(w, 1.0).grad:.4f}, by hand {(w - 1) * -8 / 36:.4f}")
        -0.0741, by hand -0.0741

    References:
        Pedregosa, Hyperparameter optimization with approximate gradient, ICML 2016.
        Lorraine, Vicol and Duvenaud, Optimizing millions of hyperparameters by implicit
        differentiation, AISTATS 2020.
    """
    for name, function in {"outer": outer, "inner": inner}.items():
        trees.check_function(name, function)
    if not isinstance(solver, lx.AbstractLinearSolver):
        raise TypeError(
            "`solver` must come from lineax or unrollgrad.implicit, such as lineax.CG(1e-6, 1e-6) "
            f"or implicit.neumann(20); got {arguments.describe(solver)}."
        )
    if trees.is_concrete(damping) and not damping >= 0:
        raise ValueError(f"`damping` must not be negative; got {damping}.")
    operators.check_preconditioner(preconditioner, solver)
    mixed = inner if mixed is None else mixed

    @eager.compiled
    def run(params, theta, start):
        for name, loss in {"outer": outer, "inner": inner, "mixed": mixed}.items():
            arguments.check_loss(name, jax.eval_shape(loss, params, theta))
        outer_loss, (a, direct) = jax.value_and_grad(outer, argnums=(0, 1))(params, theta)
        if curvature is None:
            gradient, operator = operators.hessian(inner, params, theta)
        else:
            gradient, operator = jax.grad(inner)(params, theta), curvature(params, theta)
            if check or operators.tags_for(solver):
                operator = lx.TaggedLinearOperator(operator, lx.positive_semidefinite_tag)
        undamped = operators.damped(operator, params, 0.0)
        operator = operators.damped(operator, params, damping)
        a = trees.widen(trees.narrow(a, params))
        for given in start:
            if given is not None and (problem := arguments.leaf_differences(a, given, "v0")):
                raise TypeError(
                    "`v0` must be the `v` of an earlier call with like params; expected -> got:\n"
                    + "\n".join(problem)
                )
        inverse = None
        if preconditioner is not None:
            product = operators.preconditioner(preconditioner, params, (theta,))
            inverse = operators.function(product, a, operators.tags_for(solver))
        solution = linear.solve(operator, a, solver, start, inverse)
        at, along = (params,), (trees.narrow(solution.value, params),)
        _, along = jax.jvp(lambda p: jax.grad(mixed, argnums=1)(p, theta), at, along)
        grad = jax.tree.map(lambda b, m: (b - m).astype(b.dtype), direct, along)
        case = health.Case(gradient, undamped, operator, a, solution)
        out = HyperGradient(grad, outer_loss, solution.value, health.examine(case))
        return out, health.symptoms(case, inner(params, theta)) if check else None

    def f(
        params: ArrayTree, theta: Theta, v0: ArrayTree | HyperGradient | linear.Start | None = None
    ) -> HyperGradient:
        params, theta = trees.check_floating("params", params), arguments.floating_theta(theta)
        if isinstance(v0, HyperGradient):
            v0 = start_of(v0)
        start = v0 if isinstance(v0, linear.Start) else linear.Start(v0)
        out, symptoms = run(params, theta, start)
        if symptoms is not None and out.info is not None and trees.is_concrete(out):
            health.check(solver, out.info, symptoms)
        return out

    return f


def start_of(out: HyperGradient) -> linear.Start:
    """What the next call can take over from a result."""
    return linear.Start(out.v, None if out.info is None else out.info.direction)
