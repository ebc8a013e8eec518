"""Solvers whose results are differentiated by what they solve, not by how."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jax.custom_derivatives import SymbolicZero

from unrollgrad._checks import arguments
from unrollgrad.implicit import linear, trees

Solve = Callable[..., Any]


def root(
    optimality: Callable[..., Any],
    *,
    solver: lx.AbstractLinearSolver | None = None,
    has_aux: bool = False,
) -> Callable[[Solve], Solve]:
    """Decorates ``solve(init, *args) -> params`` where ``optimality(params, *args) = 0``.

    By the implicit function theorem, with A = d optimality / d params:

        d params = -A^-1 (d optimality / d args) d args.

    Forward and reverse mode and further derivatives, under jit and vmap; exact at an exact root
    with an exact linear solve. Nothing of ``solve`` is differentiated: it may stop early, loop
    with ``while_loop`` or, outside jit, leave jax. ``init`` has no gradient. What ``optimality``
    closes over is differentiated as its arguments are; so ``solve`` may close over it too.

    Beware of *second* derivatives inside ``lax.scan`` or ``lax.map`` on jax 0.10: a derivative of
    ``jax.grad`` is 0 there, since jax loses the rule, as it does that of its own ``custom_root``.
    jax 0.12 has it right, and so have both in ``jacfwd`` of ``jacfwd``.

    Time: of each derivative, one linear solve with products of A or A^T, each about one evaluation
    of optimality's derivative. Memory: one linearisation of optimality; no path is kept.

    Args:
        optimality: ``optimality(params, *args, **kwargs)``, a tree like params.
        solver: Of the linear systems, lineax's or ours; by default ``lineax.GMRES``, restarted
            after 200 vectors. One that stops early gives that approximation, silently.
        has_aux: ``solve`` returns ``(params, aux)``; aux has no derivative.

    Returns:
        The decorator; the decorated function takes and returns what ``solve`` does.

    Raises:
        TypeError: If ``optimality`` is no function; when called, if params have leaves that are
            not floating, or optimality returns something that is not like them.

    Example:
        >>> import jax, unrollgrad as ug
        >>> @ug.implicit.root(lambda x, a: x**2 - a)
        ... def sqrt(init, a):
        ...     return jax.lax.fori_loop(0, 20, lambda i, x: (x + a / x) / 2, init)
        >>> slope = jax.grad(sqrt, 1)
        >>> print(sqrt(1.0, 4.0), *jax.jit(jax.value_and_grad(slope, 1))(1.0, 4.0))
        2.0 0.25 -0.03125

    References:
        Blondel et al., Efficient and modular implicit differentiation, NeurIPS 2022.
    """
    return _decorator("optimality", optimality, optimality, solver, has_aux, ())


def fixed_point(
    step: Callable[..., Any],
    *,
    solver: lx.AbstractLinearSolver | None = None,
    has_aux: bool = False,
) -> Callable[[Solve], Solve]:
    """Decorates ``solve(init, *args) -> params`` where ``params = step(params, *args)``.

    As ``root``, with A = 1 - d step / d params. The step need not be the one that ``solve`` takes:
    for the lasso or a box it is a proximal or projected gradient step.
    ``implicit.neumann(K, 1.0)`` as the solver goes through the last K steps.

    Args:
        step: ``step(params, *args, **kwargs)``, a tree like params.
        solver: As in ``root``.
        has_aux: As in ``root``.

    Raises:
        TypeError: As in ``root``.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> step = lambda x, a: jnp.cos(a * x)
        >>> @ug.implicit.fixed_point(step)
        ... def solve(init, a):
        ...     return jax.lax.fori_loop(0, 100, lambda i, x: step(x, a), init)
        >>> x, slope = jax.jit(jax.value_and_grad(solve, 1))(0.5, 1.0)
        >>> print(f"{x:.4f} {slope:.4f}")  # -x sin(x) / (1 + sin(x))
        0.7391 -0.2975
    """

    def residual(params, *args, **kwargs):
        after = step(params, *args, **kwargs)
        _check_like("step", params, after)
        return jax.tree.map(lambda x, y: x - y, params, after)

    return _decorator("step", step, residual, solver, has_aux, ())


def argmin(
    objective: Callable[..., Any],
    *,
    solver: lx.AbstractLinearSolver | None = None,
    has_aux: bool = False,
) -> Callable[[Solve], Solve]:
    """Decorates ``solve(init, *args) -> params`` where params minimise ``objective``.

    As ``root`` of the gradient; A is the Hessian. Where that is singular (more weights than data)
    pass ``lineax.LSMR(...)`` or ``implicit.dense()``, the derivative of the nearest minimum.

    Args:
        objective: ``objective(params, *args, **kwargs) -> scalar``.
        solver: As in ``root``; by default ``lineax.CG``, for a minimum with positive curvature.
        has_aux: As in ``root``.

    Raises:
        TypeError: As in ``root``.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> x, y = jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([1.0, 2.0])
        >>> loss = lambda w, decay: jnp.sum((x @ w - y) ** 2) + decay * jnp.sum(w**2)
        >>> @ug.implicit.argmin(loss)
        ... def ridge(init, decay):
        ...     return jnp.linalg.solve(x.T @ x + decay * jnp.eye(2), x.T @ y)
        >>> slope = jax.jit(jax.jacobian(ridge, 1))
        >>> print(slope(jnp.zeros(2), 1.0).round(3))  # by hand: (-0.2, -0.2)
        [-0.2 -0.2]
    """

    def gradient(params, *args, **kwargs):
        return jax.grad(objective)(params, *args, **kwargs)

    tags = lx.positive_semidefinite_tag
    return _decorator("objective", objective, gradient, solver, has_aux, tags)


def one_step(
    step: Callable[..., Any], *, num_steps: int = 1, has_aux: bool = False
) -> Callable[[Solve], Solve]:
    """Decorates ``solve(init, *args) -> params`` to be differentiated through its last steps alone.

    The result is ``step`` taken ``num_steps`` times more from what solve returns, which counts as
    a constant. Cheap, no linear solve, nothing to tune. With a step that contracts by q the error
    of the Jacobian at the fixed point is at most q^K / (1 - q) of the size of d step / d args, for
    K = num_steps: exact for Newton's step, poor for a slow one.

    Args:
        step: ``step(params, *args, **kwargs)``, a tree like params.
        num_steps: K.
        has_aux: ``solve`` returns ``(params, aux)``.

    Raises:
        TypeError: If ``step`` is no function.
        ValueError: If ``num_steps`` is not positive.

    Example:
        >>> import jax, unrollgrad as ug
        >>> newton = lambda x, a: (x + a / x) / 2
        >>> @ug.implicit.one_step(newton)
        ... def sqrt(init, a):
        ...     return jax.lax.fori_loop(0, 20, lambda i, x: newton(x, a), init)
        >>> print(jax.grad(sqrt, 1)(1.0, 4.0))
        0.25

    References:
        Bolte, Pauwels and Vaiter, One-step differentiation of iterative algorithms, NeurIPS 2023.
    """
    _check_function("step", step)
    num_steps = arguments.positive_int("num_steps", num_steps)

    def decorate(solve: Solve) -> Solve:
        @functools.wraps(solve)
        def solved(init, *args, **kwargs):
            params, aux = _solved(solve, has_aux, init, args, kwargs)

            def turn(params, _):
                after = step(params, *args, **kwargs)
                _check_like("step", params, after)
                return trees.narrow(after, params), None

            params, _ = jax.lax.scan(turn, params, length=num_steps)
            return (params, aux) if has_aux else params

        return solved

    return decorate


def _decorator(
    name: str,
    given: Callable,
    residual: Callable[..., Any],
    solver: lx.AbstractLinearSolver | None,
    has_aux: bool,
    tags: Any,
) -> Callable[[Solve], Solve]:
    _check_function(name, given)

    def decorate(solve: Solve) -> Solve:
        @functools.wraps(solve)
        def solved(init, *args, **kwargs):
            params, aux = _solved(solve, has_aux, init, args, kwargs)
            params = _attached(name, residual, solver, tags, params, args, kwargs)
            return (params, aux) if has_aux else params

        return solved

    return decorate


def _solved(solve: Solve, has_aux: bool, init: Any, args: tuple, kwargs: dict) -> tuple[Any, Any]:
    """What the solver returns, all of it constant."""
    out = solve(_constant(init), *_constant(args), **_constant(kwargs))
    params, aux = out if has_aux else (out, None)
    return trees.check_floating("params", _constant(params)), _constant(aux)


def _constant(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if _is_array(x) else x, tree)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | float | complex) or hasattr(x, "__jax_array__")


def _attached(
    name: str,
    residual: Callable[..., Any],
    solver: lx.AbstractLinearSolver | None,
    tags: Any,
    params: Any,
    args: tuple,
    kwargs: dict,
) -> Any:
    """``params`` with the derivative in all that the residual depends on."""
    leaves, structure = jax.tree.flatten(params)
    inputs, rebuild = jax.tree.flatten((args, kwargs))
    places = [i for i, x in enumerate(inputs) if _is_array(x)]

    def flat(unknowns, arrays):
        given = list(inputs)
        for i, x in zip(places, arrays, strict=True):
            given[i] = x
        args, kwargs = rebuild.unflatten(given)
        params = structure.unflatten(unknowns)
        out = residual(params, *args, **kwargs)
        _check_like(name, params, out)
        return jax.tree.leaves(out)

    arrays = [jnp.asarray(inputs[i]) for i in places]
    program: Any = jax.make_jaxpr(flat)(leaves, arrays)

    def at(unknowns, *arrays_and_consts):
        arrays, consts = arrays_and_consts[: len(places)], arrays_and_consts[len(places) :]
        opened = getattr(program, "jaxpr", program)
        return jax.core.eval_jaxpr(opened, consts, *unknowns, *arrays)

    chosen = _default(leaves, tags) if solver is None else solver

    @jax.custom_jvp
    def value(unknowns, *inputs):
        return unknowns

    def rule(primals, tangents):
        where = [i for i, t in enumerate(tangents[1:]) if not isinstance(t, SymbolicZero)]
        unknowns, inputs = value(*primals), primals[1:]  # their own derivative, for the second one
        if not where:
            return unknowns, [jnp.zeros_like(x) for x in unknowns]

        def of_inputs(*some):
            whole = dict(enumerate(inputs)) | dict(zip(where, some, strict=True))
            return at(unknowns, *whole.values())

        moved = [tangents[1 + i] for i in where]
        _, push = jax.jvp(of_inputs, [inputs[i] for i in where], moved)
        wide = trees.dtype(unknowns)

        def matvec(x):
            _, out = jax.jvp(lambda u: at(u, *inputs), [unknowns], [trees.narrow(x, unknowns)])
            return [y.astype(wide) for y in out]

        seen = [x for x in (*unknowns, *inputs) if jnp.issubdtype(x.dtype, jnp.inexact)]
        vector = [-p.astype(wide) for p in push]
        x = linear.differentiable_solve(matvec, vector, chosen, seen, tags)
        return unknowns, trees.narrow(x, unknowns)

    value.defjvp(rule, symbolic_zeros=True)
    consts = [jnp.asarray(c) for c in program.consts]
    return structure.unflatten(value(leaves, *arrays, *consts))


def _default(leaves: list[jax.Array], tags: Any) -> lx.AbstractLinearSolver:
    """To the precision of the dtype, as far as that goes with rounding."""
    tolerance = float(jnp.finfo(trees.dtype(leaves)).eps) ** 0.75
    size = optax.tree.size(leaves)
    steps = max(10, min(10 * size, 1000))
    if tags:
        return lx.CG(rtol=tolerance, atol=tolerance, max_steps=steps)
    return lx.GMRES(rtol=tolerance, atol=tolerance, max_steps=steps, restart=min(size, 200))


def _check_function(name: str, function: Any) -> None:
    if not callable(function):
        raise TypeError(f"`{name}` must be a function; got a {type(function).__name__}.")


def _check_like(name: str, params: Any, out: Any) -> None:
    """Raises TypeError if ``out`` has not the structure and shapes of params."""
    if difference := arguments.shape_difference(params, out):
        raise TypeError(
            f"`{name}` must return a tree like params, with one equation for each of their "
            f"numbers; it differs at params{difference}."
        )
