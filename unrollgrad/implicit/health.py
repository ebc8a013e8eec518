"""Whether a hypergradient can be trusted: measurements of the inner problem and of the solve."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import optax
from chex import ArrayTree, Numeric

from unrollgrad.implicit import trees
from unrollgrad.implicit.linear import Solution, solve

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
    """

    stationarity: jax.Array
    residual: jax.Array
    iterations: jax.Array
    asymmetry: jax.Array
    negative_curvature: jax.Array
    converged: jax.Array


class HypergradientError(ArithmeticError):
    """A hypergradient that cannot be trusted, from ``hypergradient(check=True)``."""


class Case(NamedTuple):
    """The linear system (H + damping) q = a of a hypergradient, and its solution."""

    gradient: ArrayTree  # d inner / d params
    curvature: lx.AbstractLinearOperator  # H
    operator: lx.AbstractLinearOperator  # H + damping
    vector: ArrayTree  # a
    solver: lx.AbstractLinearSolver
    solution: Solution


def examine(case: Case) -> HypergradientInfo:
    """Measures one case."""
    q, result, num_steps = case.solution
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


def check(case: Case, info: HypergradientInfo, inner_loss: Numeric) -> None:
    """Raises HypergradientError, with the likely cause and a remedy; needs concrete values."""
    dtypes = {x.dtype for x in jax.tree.leaves(case.gradient)}
    tolerance = max(float(jnp.finfo(dtype).eps) for dtype in dtypes) ** 0.5
    curvatures = _spectrum(case.operator, case.vector)
    largest = float(curvatures[-1])
    scale = max(abs(float(curvatures[0])), abs(largest))
    symmetric = not float(info.asymmetry) > 10 * tolerance  # else a curvature has no sign
    problems = []
    if not jnp.isfinite(info.stationarity):
        problems.append(
            "the inner gradient is not finite: the inner problem has diverged. Lower its rate."
        )
    elif not symmetric and isinstance(case.solver, lx.CG | lx.Cholesky):
        name = type(case.solver).__name__
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
    problems += _of_solve(case, info, largest, tolerance)
    if symmetric and not problems and (left := _left_to_gain(case, inner_loss)) > _UNSOLVED:
        problems.append(
            f"the inner problem is not solved: its gradient has norm {float(info.stationarity):.3g}"
            f", and a Newton step would still take {100 * left:.2g} % from its loss. Take more "
            "inner steps, or differentiate the path instead (bilevel.unrolled, bptt)."
        )
    if problems:
        raise HypergradientError("; ".join(problems))


def _left_to_gain(case: Case, inner_loss: Numeric) -> float:
    """g^T H^-1 g / 2 as a share of the inner loss, by conjugate gradients."""
    gradient = trees.widen(case.gradient)
    cg = lx.CG(rtol=1e-3, atol=1e-3, max_steps=100)
    step = solve(case.curvature, gradient, cg).value
    return float(trees.dot(gradient, step)) / 2 / max(abs(float(inner_loss)), 1e-30)


def _of_solve(case: Case, info: HypergradientInfo, largest: float, tolerance: float) -> list[str]:
    """The problem with the solve itself, if any; ``largest`` is the largest curvature."""
    q, result, _ = case.solution
    residual, iterations = float(info.residual), int(info.iterations)
    rate = getattr(case.solver, "step_size", "auto")
    if iterations > 1 and not isinstance(rate, str) and float(rate) * largest > 2:
        return [
            f"Neumann's series diverges: step_size={float(rate):.3g}, and it must be below 2 / "
            f"lambda_max = {2 / largest:.2g} (residual {residual:.2g} after {iterations} terms). "
            'Use step_size="auto", or another solver'
        ]
    bounded = bool(result == lx.RESULTS.max_steps_reached) and residual < 1
    if bool(info.converged) or bounded:  # a solve of few terms is a result
        return []
    square = float(trees.dot(q, q))
    along = float(trees.dot(q, case.operator.mv(q))) / square if 0 < square < jnp.inf else 0.0
    singular = (
        f", and the curvature along the solution is {along:.2g}, while the largest is "
        f"{largest:.2g}: the Hessian is singular along it"
        if abs(along) <= tolerance * abs(largest)
        else ""
    )
    finite = "" if jnp.isfinite(residual) else "non-finite solve: "
    return [
        f"{finite}the solver stopped after {iterations} steps with a residual of {residual:.2g} of "
        f"the right-hand side{singular}. Try damping={1e-3 * max(largest, 1e-30):.1g}, or "
        "lineax.LSMR or implicit.dense() for the solution of minimal norm"
    ]
