"""Whether a hypergradient can be trusted: measurements of the inner problem and of the solve."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import optax

from unrollgrad.implicit import trees
from unrollgrad.implicit.linear import Solution, solve
from unrollgrad.types import ArrayTree, Numeric

__all__ = [
    "Case",
    "HypergradientError",
    "HypergradientInfo",
    "Symptoms",
    "check",
    "examine",
    "symptoms",
]

_LANCZOS_STEPS = 16
_PROBES = 3
_UNSOLVED = 0.01  # the share of the inner loss that a Newton step may still gain


class HypergradientInfo(NamedTuple):
    """Measurements of the inner problem and of the solve; under jit, unused ones cost nothing.

    Attributes:
        stationarity: The norm of d inner / d params; zero at an inner optimum.
        residual: |(H + damping) q - a| / |a|: 0 where the solve is exact, 1 for q = 0. It stays
            above zero if the solve has few terms, or if a has a part outside the range of H.
        iterations: Steps of the solver; 0 for a direct one.
        asymmetry: |H - H^T| / (sqrt(2) |H|) in the Frobenius norm, from three random vectors. It
            shows rounding only, unless ``curvature`` is not the Hessian of a function.
        negative_curvature: The magnitude of the most negative curvature v^T H v / v^T v found by 16
            Lanczos steps from a random vector; 0 if all curvatures found are positive.
        converged: Whether the solver reports success (a series does after its last term), and q is
            finite and no worse than q = 0, as it is when a series diverges.
        direction: The direction of largest curvature, with norm 1, that ``neumann`` found for its
            step size; None for other solvers.
    """

    stationarity: jax.Array
    residual: jax.Array
    iterations: jax.Array
    asymmetry: jax.Array
    negative_curvature: jax.Array
    converged: jax.Array
    direction: ArrayTree | None = None


class HypergradientError(ArithmeticError):
    """A hypergradient that cannot be trusted, from ``hypergradient(check=True)``."""


class Case(NamedTuple):
    """The linear system (H + damping) q = a of a hypergradient, and its solution."""

    gradient: ArrayTree  # d inner / d params
    curvature: lx.AbstractLinearOperator  # H
    operator: lx.AbstractLinearOperator  # H + damping
    vector: ArrayTree  # a
    solution: Solution


def examine(case: Case) -> HypergradientInfo:
    """Measures one case."""
    q, result, num_steps, direction = case.solution
    size = optax.tree.norm(case.vector)
    missed = optax.tree.norm(trees.add(case.vector, case.operator.mv(q), -1))
    residual = missed / jnp.where(size > 0, size, 1)
    finite = jnp.isfinite(optax.tree.norm(q))
    return HypergradientInfo(
        stationarity=optax.tree.norm(trees.widen(case.gradient)),
        residual=residual,
        iterations=num_steps,
        asymmetry=_asymmetry(case.operator, case.vector),
        negative_curvature=jnp.maximum(-_spectrum(case.operator, case.vector)[0], 0),
        converged=(result == lx.RESULTS.successful) & finite & (residual <= 1.001),
        direction=direction,
    )


def _asymmetry(operator: lx.AbstractLinearOperator, like: ArrayTree) -> jax.Array:
    keys = jax.random.split(jax.random.key(1), _PROBES)
    vectors = [optax.tree.random_like(key, like) for key in keys]
    images = [operator.mv(v) for v in vectors]
    pairs = [(i, j) for i in range(_PROBES) for j in range(i)]
    skew = sum(
        (trees.dot(vectors[i], images[j]) - trees.dot(vectors[j], images[i])) ** 2 for i, j in pairs
    ) / len(pairs)
    whole = 2 * sum(trees.dot(h, h) for h in images) / _PROBES
    return jnp.sqrt(skew / jnp.where(whole > 0, whole, 1))


def _spectrum(operator: lx.AbstractLinearOperator, like: ArrayTree) -> jax.Array:
    """Curvatures from Lanczos steps, ascending: the ends approach the spectrum's from inside."""
    steps = min(_LANCZOS_STEPS, optax.tree.size(like))
    v = optax.tree.random_like(jax.random.key(2), like)
    v = trees.scale(1 / optax.tree.norm(v), v)

    def lanczos(carry, _):
        before, v, beta = carry
        w = trees.add(operator.mv(v), before, -beta)
        alpha = trees.dot(v, w)
        w = trees.add(w, v, -alpha)
        after = optax.tree.norm(w)
        going = after > 1e-6 * (jnp.abs(alpha) + beta)  # else the Krylov space is exhausted
        after = jnp.where(going, after, 0)
        w = trees.scale(jnp.where(going, 1 / jnp.where(going, after, 1), 0), w)
        return (v, w, after), (alpha, after)

    begin = jax.tree.map(jnp.zeros_like, v), v, jnp.zeros((), trees.dtype(like))
    _, (alphas, betas) = jax.lax.scan(lanczos, begin, length=steps)
    off_diagonal = jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1)
    return jnp.linalg.eigvalsh(jnp.diag(alphas) + off_diagonal)


class Symptoms(NamedTuple):
    """What ``check`` looks at beside the info, as numbers."""

    largest: jax.Array  # curvature of H + damping
    scale: jax.Array  # the largest magnitude of a curvature
    along: jax.Array  # the curvature along the solution
    stopped: jax.Array  # whether the solver stopped after its last step
    left: jax.Array  # the share of the inner loss that a Newton step would still gain
    tolerance: jax.Array  # the square root of the coarsest machine epsilon


def symptoms(case: Case, inner_loss: Numeric) -> Symptoms:
    """Measures what ``check`` needs, at the cost of about 120 products."""
    q, result, *_ = case.solution
    curvatures = _spectrum(case.operator, case.vector)
    square = trees.dot(q, q)
    along = trees.dot(q, case.operator.mv(q)) / jnp.where(square > 0, square, 1)
    eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(case.gradient))
    gradient = trees.widen(case.gradient)
    newton = solve(case.curvature, gradient, lx.CG(rtol=1e-3, atol=1e-3, max_steps=100)).value
    loss = jnp.maximum(jnp.abs(jnp.asarray(inner_loss, square.dtype)), 1e-30)
    return Symptoms(
        largest=curvatures[-1],
        scale=jnp.maximum(jnp.abs(curvatures[0]), jnp.abs(curvatures[-1])),
        along=jnp.where(jnp.isfinite(square), along, 0),
        stopped=result == lx.RESULTS.max_steps_reached,
        left=trees.dot(gradient, newton) / 2 / loss,
        tolerance=jnp.asarray(eps**0.5),
    )


def check(solver: lx.AbstractLinearSolver, info: HypergradientInfo, symptoms: Symptoms) -> None:
    """Raises HypergradientError, with the likely cause and a remedy; needs concrete values."""
    found = jax.tree.map(float, symptoms)
    tolerance, scale = found.tolerance, found.scale
    symmetric = not float(info.asymmetry) > 10 * tolerance  # else a curvature has no sign
    problems = []
    if not jnp.isfinite(info.stationarity):
        problems.append(
            "the inner gradient is not finite: the inner problem has diverged. Lower its rate."
        )
    elif not symmetric and isinstance(solver, lx.CG | lx.Cholesky):
        name = type(solver).__name__
        problems.append(
            f"the operator is not symmetric (asymmetry {float(info.asymmetry):.2g}), but {name} "
            "needs a symmetric one. Use lineax.GMRES, lineax.BiCGStab or "
            "lineax.Normal(lineax.CG(...)). Usual causes are a stop_gradient in `inner` and a "
            "`curvature` of your own."
        )
    elif symmetric and float(info.negative_curvature) > tolerance * scale:
        negative = float(info.negative_curvature)
        problems.append(
            f"the Hessian is indefinite (curvature {-negative:.3g}, the largest {scale:.3g}): the "
            "params are not at a minimum of `inner`. Take more inner steps, or "
            f"damping={2 * negative:.1g}, or curvature=implicit.gauss_newton(...)."
        )
    problems += _of_solve(solver, info, found)
    if symmetric and not problems and found.left > _UNSOLVED:
        problems.append(
            f"the inner problem is not solved: its gradient has norm {float(info.stationarity):.3g}"
            f", and a Newton step would still take {100 * found.left:.2g} % from its loss. Take "
            "more inner steps, or differentiate the path instead (bilevel.unrolled, bptt)."
        )
    if problems:
        raise HypergradientError("; ".join(problems))


def _of_solve(
    solver: lx.AbstractLinearSolver, info: HypergradientInfo, found: Symptoms
) -> list[str]:
    """The problem with the solve itself, if any."""
    residual, iterations, largest = float(info.residual), int(info.iterations), found.largest
    rate = getattr(solver, "step_size", "auto")
    if iterations > 1 and not isinstance(rate, str) and float(rate) * largest > 2:
        return [
            f"Neumann's series diverges: step_size={float(rate):.3g}, and it must be below 2 / "
            f"lambda_max = {2 / largest:.2g} (residual {residual:.2g} after {iterations} terms). "
            'Use step_size="auto", or another solver'
        ]
    bounded = bool(found.stopped) and residual < 1
    if bool(info.converged) or bounded:  # a solve of few terms is a result
        return []
    singular = (
        f", and the curvature along the solution is {found.along:.2g}, while the largest is "
        f"{largest:.2g}: the Hessian is singular along it"
        if abs(found.along) <= found.tolerance * abs(largest)
        else ""
    )
    finite = "" if jnp.isfinite(residual) else "non-finite solve: "
    return [
        f"{finite}the solver stopped after {iterations} steps with a residual of {residual:.2g} of "
        f"the right-hand side{singular}. Try damping={1e-3 * max(largest, 1e-30):.1g}, or "
        "lineax.LSMR or implicit.dense() for the solution of minimal norm"
    ]
