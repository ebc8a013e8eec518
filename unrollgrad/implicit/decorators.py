"""Solvers that are differentiated through the equation that they solve, not through their path."""

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optax
from jax.custom_derivatives import SymbolicZero

from unrollgrad._checks import arguments
from unrollgrad._core import eager
from unrollgrad._core.unroll import repeat
from unrollgrad.implicit import linear, operators, trees
from unrollgrad.implicit.solvers import dense
from unrollgrad.implicit.trees import T
from unrollgrad.types import ArrayTree, Numeric

__all__ = ["Solve", "argmin", "fixed_point", "one_step", "root"]

Solve = Callable[..., Any]

_MOST_LEFT = 0.01
_MOST_DENSE = 128


def root(
    optimality: Callable[..., ArrayTree],
    *,
    solver: lx.AbstractLinearSolver | None = None,
    tags: object = (),
    preconditioner: operators.Preconditioner | None = None,
    check: bool = False,
    has_aux: bool = False,
) -> Callable[[Solve], Solve]:
    """Decorates ``solve(init, *args) -> params`` where ``optimality(params, *args) = 0``.

    By the implicit function theorem, with A = d optimality / d params:

        d params = -A^-1 (d optimality / d args) d args.

    Forward mode, reverse mode and higher derivatives work under jit and vmap; they are exact at an
    exact root with an exact linear solve. ``solve`` itself is not differentiated: it may stop
    early, loop with ``while_loop`` or, outside jit, leave jax. ``init`` has no gradient. Arrays
    that ``optimality`` closes over are differentiated as its arguments are, so ``solve`` may close
    over them too.

    On jax 0.10, beware of *second* derivatives inside ``lax.scan`` or ``lax.map``: the derivative
    of ``jax.grad`` is 0 there, since jax loses the rule, as it loses the rule of its
    own ``custom_root``. jax 0.12 is right, and ``jacfwd`` of ``jacfwd`` is right on both.

    Time: one linear solve for each derivative; a product with A or A^T costs about one evaluation
    of optimality's derivative. Memory: one linearisation of optimality; the path is not kept.

    Args:
        optimality: ``optimality(params, *args, **kwargs)``, which returns a tree like params.
        solver: Solves the linear systems; a solver of lineax or of ``implicit``. By default the
            pseudo-inverse (``implicit.dense``) for at most 128 unknowns, and conjugate gradients
            on the normal equations for more: both give the derivative of least norm where A is
            singular. Where the default solver leaves more than 1 % of the right-hand side (there is
            no derivative, or A is too ill-conditioned), the derivative is NaN; in reverse mode,
            which has no such right-hand side, it is the derivative of the least-squares solution. A
            solver of yours that stops early raises no error: the derivative is then approximate,
            and NaN if the solver reports a breakdown (``lineax.BiCGStab``, mostly in float32).
        tags: What is known of A, as in lineax: ``lineax.symmetric_tag``,
            ``lineax.positive_semidefinite_tag``, a triangular one, or several. A solver that needs
            a positive semidefinite A (``lineax.CG``, ``lineax.Cholesky``) says so by itself, unless
            A is tagged negative semidefinite.
        preconditioner: An approximation of A^-1, as in lineax: an operator on vectors like params;
            or a function ``preconditioner(params, *args, **kwargs)`` that returns one for the
            solution, or returns the product with one (the ``M`` of ``jax.scipy``). ``lineax.CG``
            takes it for positive definite (for a negative A it approximates -A^-1). Systems with
            A^T, in reverse mode, get its transpose. It changes the number of steps, not the
            derivative, and has no derivative itself. The default solver is then conjugate gradients
            for any number of unknowns.
        check: Whether to raise where a solver leaves more than 1 % of the right-hand side, also
            under jit.
        has_aux: Whether ``solve`` returns ``(params, aux)``; aux has no derivative.

    Returns:
        The decorator. The decorated function has the arguments and results of ``solve``.

    Raises:
        TypeError: If ``optimality`` is not a function; when called, if a leaf of params is not
            floating, or the tree that optimality returns, or the preconditioner, is not like
            params.
        ValueError: If ``solver`` uses no preconditioner and one is given.

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
    trees.check_function("optimality", optimality)
    equation = _Equation("optimality", optimality, optimality, solver, tags, preconditioner, check)
    return _implicit(equation, has_aux)


def fixed_point(
    step: Callable[..., ArrayTree],
    *,
    solver: lx.AbstractLinearSolver | None = None,
    tags: object = (),
    preconditioner: operators.Preconditioner | None = None,
    check: bool = False,
    has_aux: bool = False,
) -> Callable[[Solve], Solve]:
    """Decorates ``solve(init, *args) -> params`` where ``params = step(params, *args)``.

    Works as ``root`` does, with A = 1 - d step / d params. The step need not be the one that
    ``solve`` takes: for the lasso or a box, pass a proximal or projected gradient step. The solver
    ``implicit.neumann(K, 1.0)`` differentiates through the last K steps.

    Args:
        step: ``step(params, *args, **kwargs)``, which returns a tree like params.
        solver: As in ``root``.
        tags: As in ``root``.
        preconditioner: As in ``root``.
        check: As in ``root``.
        has_aux: As in ``root``, which raises the same errors.

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
    trees.check_function("step", step)

    def residual(params, *args, **kwargs):
        after = step(params, *args, **kwargs)
        _check_like("step", params, after)
        return jax.tree.map(lambda x, y: x - y, params, after)

    equation = _Equation("step", step, residual, solver, tags, preconditioner, check)
    return _implicit(equation, has_aux)


def argmin(
    objective: Callable[..., Numeric],
    *,
    solver: lx.AbstractLinearSolver | None = None,
    preconditioner: operators.Preconditioner | None = None,
    check: bool = False,
    has_aux: bool = False,
) -> Callable[[Solve], Solve]:
    """Decorates ``solve(init, *args) -> params`` where params minimise ``objective``.

    Works as ``root`` of the gradient does; A is the Hessian. Where A is singular (more weights than
    data), pass ``lineax.LSMR(...)`` or ``implicit.dense()`` for the derivative of the nearest
    minimum.

    Args:
        objective: ``objective(params, *args, **kwargs) -> scalar``.
        solver: As in ``root``, but the default is ``lineax.CG``, which needs positive curvature.
        preconditioner: As in ``root``.
        check: As in ``root``.
        has_aux: As in ``root``, which raises the same errors.

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
    trees.check_function("objective", objective)
    tag, gradient = lx.positive_semidefinite_tag, jax.grad(objective)
    equation = _Equation("objective", objective, gradient, solver, tag, preconditioner, check)
    return _implicit(equation, has_aux)


def one_step(
    step: Callable[..., ArrayTree], *, num_steps: int = 1, has_aux: bool = False
) -> Callable[[Solve], Solve]:
    """Decorates ``solve(init, *args) -> params``: differentiated through a few more steps only.

    The result is ``num_steps`` = K further applications of ``step`` to the params from ``solve``,
    which count as a constant. This is cheap, solves no linear system and needs no tuning. If the
    step contracts by a factor q, the error of the Jacobian at the fixed point is at most
    q^K / (1 - q) times the norm of d step / d args: 0 for Newton's step, large for slow steps.

    Args:
        step: ``step(params, *args, **kwargs)``, which returns a tree like params.
        num_steps: K.
        has_aux: As in ``root``.

    Raises:
        TypeError: If ``step`` is not a function.
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
    trees.check_function("step", step)
    num_steps = arguments.positive_int("num_steps", num_steps)

    def finish(params, args, kwargs):
        def again(params):
            after = step(params, *args, **kwargs)
            _check_like("step", params, after)
            return trees.narrow(after, params)

        return repeat(again, params, num_steps)

    return _decorator(step, has_aux, finish)


def _decorator(
    function: Callable[..., object],
    has_aux: bool,
    finish: Callable[..., ArrayTree],
    only_derivative: bool = False,
) -> Callable[[Solve], Solve]:
    """Decorates a solver: ``finish(params, args, kwargs)`` adds the derivative of its params.

    If that is all it does, it is left out where nothing is traced: no derivative is taken there.
    """

    def decorate(solve: Solve) -> Solve:
        @functools.wraps(solve)
        def solved(init, *args, **kwargs):
            out = solve(_constant(init), *_constant(args), **_constant(kwargs))
            concrete = trees.is_concrete((out, args, kwargs))
            params, aux = _constant(out) if has_aux else (_constant(out), None)
            params = trees.check_floating("params", params)
            if not (only_derivative and concrete):
                params = finish(params, *_completed(solve, function, args, kwargs))
            return (params, aux) if has_aux else params

        return solved

    return decorate


def _completed(
    solve: Solve, function: Callable[..., object], args: tuple, kwargs: dict
) -> tuple[tuple, dict]:
    """The arguments of a call, and the defaults of those not given if ``function`` takes them."""
    try:
        parameters = list(inspect.signature(solve).parameters.values())[1:]
        given = inspect.signature(solve).bind_partial(None, *args, **kwargs).arguments
        taken = inspect.signature(function)
    except (TypeError, ValueError):  # some callables have no signature
        return args, kwargs
    missing = [p for p in parameters if p.name not in given and p.default is not p.empty]
    by_name = {p.name: p.default for p in missing if p.name in taken.parameters}
    by_place = [] if by_name or kwargs else [p.default for p in missing]
    for number in range(len(by_place), -1, -1):
        more = (*args, *by_place[:number])
        with contextlib.suppress(TypeError):
            taken.bind(None, *more, **kwargs, **by_name)
            return more, kwargs | by_name
    return args, kwargs


def _constant(tree: T) -> T:
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if _is_array(x) else x, tree)


def _is_array(x: object) -> bool:
    return isinstance(x, jax.Array | float | complex) or hasattr(x, "__jax_array__")


class _Equation(NamedTuple):
    """The equation ``residual(params, *args, **kwargs) = 0``, and how its derivative is solved."""

    name: str  # of the user's function, for error messages
    function: Callable[..., object]  # the user's
    residual: Callable[..., ArrayTree]
    solver: lx.AbstractLinearSolver | None
    tags: object  # lineax's, of A = d residual / d params
    preconditioner: operators.Preconditioner | None
    check: bool

    def guard(self, residual: jax.Array, x: T) -> T:
        """The solution, or what stands for one that leaves too much of the right-hand side."""
        bad = ~(residual <= _MOST_LEFT)
        if self.check:
            return eqx.error_if(
                x,
                bad,
                f"the derivative through `{self.name}` was not found: the linear solve leaves more "
                "than 1 % of the right-hand side. The matrix is singular, and there is no "
                "derivative, or it is too ill-conditioned for the solver: try implicit.dense().",
            )
        if self.solver is None:
            return jax.tree.map(lambda y: jnp.where(bad, jnp.nan, y), x)
        return x


def _implicit(equation: _Equation, has_aux: bool) -> Callable[[Solve], Solve]:
    """Decorates a solver of the equation; the params get the derivative of its solution."""
    operators.check_preconditioner(equation.preconditioner, equation.solver)

    # Kept by program, so that the derivative is compiled once though it is made in every call.
    @functools.lru_cache(maxsize=16)
    def attached(programs: tuple[eager.Program, ...], ends: tuple[int, ...]) -> Callable:
        # The inputs are the arguments' arrays, and what each program closes over.
        def call(number, unknowns, inputs, *vectors):
            constants = inputs[ends[number] : ends[number + 1]]
            return programs[number](list(constants), *unknowns, *inputs[: ends[0]], *vectors)

        functions = [functools.partial(call, number) for number in range(len(programs))]
        tangents = jax.jit(functools.partial(_tangents, equation, functions))

        @jax.custom_jvp
        def value(unknowns, *inputs):
            return unknowns

        def rule(primals, given):
            unknowns = value(*primals)  # with its own derivative, for the second one
            moving = {i: x for i, x in enumerate(given[1:]) if not isinstance(x, SymbolicZero)}
            if not moving:
                return unknowns, [jnp.zeros_like(x) for x in unknowns]
            return unknowns, tangents((unknowns, *primals[1:]), moving)

        value.defjvp(rule, symbolic_zeros=True)
        return value

    def finish(params, args, kwargs):
        unknowns, structure = jax.tree.flatten(params)
        functions, arrays = _flattened(equation, structure, args, kwargs)
        found = [eager.traced(functions[0], unknowns, arrays)]
        found += [eager.traced(f, unknowns, arrays, unknowns) for f in functions[1:]]
        ends = itertools.accumulate([len(arrays), *(len(closed) for _, closed, _ in found)])
        value = attached(tuple(program for program, _, _ in found), tuple(ends))
        constants = [jnp.asarray(x) for _, closed, _ in found for x in closed]
        return structure.unflatten(value(unknowns, *arrays, *constants))

    return _decorator(equation.function, has_aux, finish, only_derivative=True)


def _flattened(
    equation: _Equation, structure: jax.tree_util.PyTreeDef, args: tuple, kwargs: dict
) -> tuple[list[Callable[..., list[jax.Array]]], list[jax.Array]]:
    """The residual as a function ``f(unknowns, arrays)`` of leaves, and the arguments' arrays.

    The unknowns are the leaves of params, whose structure is given. If there is a preconditioner,
    the second function is its product ``g(unknowns, arrays, vector)``.
    """
    leaves, rebuild = jax.tree.flatten((args, kwargs))
    places = [i for i, x in enumerate(leaves) if _is_array(x)]

    def point(unknowns, arrays):
        given = dict(enumerate(leaves)) | dict(zip(places, arrays, strict=True))
        return structure.unflatten(unknowns), *rebuild.unflatten(given.values())

    def residual(unknowns, arrays):
        params, args, kwargs = point(unknowns, arrays)
        out = equation.residual(params, *args, **kwargs)
        _check_like(equation.name, params, out)
        return jax.tree.leaves(out)

    def precondition(unknowns, arrays, vector):
        unknowns, arrays = jax.lax.stop_gradient((unknowns, arrays))
        product = operators.preconditioner(equation.preconditioner, *point(unknowns, arrays))
        return jax.tree.leaves(product(structure.unflatten(vector)))

    arrays = [jnp.asarray(leaves[i]) for i in places]
    return [residual] if equation.preconditioner is None else [residual, precondition], arrays


def _tangents(
    equation: _Equation,
    functions: list[Callable[..., list[jax.Array]]],
    at: tuple,
    moving: dict[int, jax.Array],
) -> list[jax.Array]:
    """-A^-1 (d residual / d inputs) tangents, with the unknowns and the inputs in ``at``.

    ``moving`` has the tangents of those inputs that are not constant.
    """
    residual, *preconditioners = functions
    unknowns, *inputs = at

    def of_moving(*some):
        whole = dict(enumerate(inputs)) | dict(zip(moving, some, strict=True))
        return residual(unknowns, list(whole.values()))

    _, push = jax.jvp(of_moving, [inputs[i] for i in moving], list(moving.values()))
    wide = trees.dtype(unknowns)

    def matvec(x):
        tangent = trees.narrow(x, unknowns)
        _, out = jax.jvp(lambda u: residual(u, inputs), [unknowns], [tangent])
        return [y.astype(wide) for y in out]

    def precondition(v):
        out = preconditioners[0](unknowns, inputs, *trees.narrow(v, unknowns))
        return [y.astype(wide) for y in out]

    seen = [x for x in (*unknowns, *inputs) if jnp.issubdtype(x.dtype, jnp.inexact)]
    vector = [-p.astype(wide) for p in push]
    tags = operators.tags_for(equation.solver, operators.as_tags(equation.tags))
    solver = equation.solver or _default(unknowns, tags, bool(preconditioners))
    inverse = None
    if preconditioners:
        inverse = operators.function(precondition, vector, operators.tags_for(solver))
    method = linear.Method(solver, tags, inverse, equation.guard)
    return trees.narrow(linear.differentiable_solve(matvec, vector, method, seen), unknowns)


def _default(
    leaves: list[jax.Array], tags: frozenset[object], preconditioned: bool
) -> lx.AbstractLinearSolver:
    """A solver whose tolerance is about the precision of the dtype."""
    tolerance = float(jnp.finfo(trees.dtype(leaves)).eps) ** 0.75
    size = optax.tree.size(leaves)
    cg = lx.CG(rtol=tolerance, atol=tolerance, max_steps=max(10, min(10 * size, 1000)))
    if lx.positive_semidefinite_tag in tags:
        return cg
    return dense() if size <= _MOST_DENSE and not preconditioned else lx.Normal(cg)


def _check_like(name: str, params: ArrayTree, out: ArrayTree) -> None:
    """Raises TypeError unless ``out`` has the structure and shapes of params."""
    if difference := arguments.shape_difference(params, out):
        raise TypeError(
            f"`{name}` must return a tree like params, with one equation for each of their "
            f"numbers; it differs at params{difference}."
        )
