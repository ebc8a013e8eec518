"""Whether a hypergradient can be trusted: what was seen of the inner problem and of the solve."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import optax

from unrollgrad.implicit import trees
from unrollgrad.implicit.linear import Solution, solve

_LANCZOS_STEPS = 16
_PROBES = 3
_UNSOLVED = 0.01  # of the inner loss: what a Newton step would still take from it


class HypergradientInfo(NamedTuple):
    """What was seen on the way. Under jit, what is not used is not computed.

    Attributes:
        stationarity: The norm of d inner / d params, zero at an inner optimum.
        residual: The norm of (H + damping) q - a over that of a: 0 where the solve is exact, 1 for
            q = 0. It stays above zero by intent in a solve of few terms, and where a has a part
            that a singular H cannot reach.
        iterations: Steps of the solver; 0 for a direct one.
        asymmetry: The norm of H - H^T over sqrt(2) times that of H (Frobenius), from three random
            vectors: rounding only, unless the curvature is not that of a function.
        negative_curvature: The most negative curvature seen by 16 Lanczos steps from a random
            vector, its sign turned: v^T H v / v^T v = -negative_curvature. 0 where none was seen.
        converged: Whether the solver says that it reached its aim (a number of terms is one) and
            its result is finite and no worse than q = 0, which a diverging series is.
    """

    stationarity: jax.Array
    residual: jax.Array
    iterations: jax.Array
    asymmetry: jax.Array
    negative_curvature: jax.Array
    converged: jax.Array


class HypergradientError(ArithmeticError):
    """A hypergradient that cannot be trusted, from ``hypergradient(check=True)``."""


class Spectrum(NamedTuple):
    """The ends of the spectrum as Lanczos steps see them, from inside."""

    smallest: jax.Array
    largest: jax.Array


def examine(operator: Any, gradient: Any, vector: Any, solution: Solution) -> HypergradientInfo:
    """The info of a solve of ``operator q = vector``."""
    q = solution.value
    size = optax.tree.norm(vector)
    residual = optax.tree.norm(trees.add(vector, operator.mv(q), -1)) / jnp.where(size > 0, size, 1)
    return HypergradientInfo(
        stationarity=optax.tree.norm(trees.widen(gradient)),
        residual=residual,
        iterations=solution.num_steps,
        asymmetry=_asymmetry(operator, vector),
        negative_curvature=jnp.maximum(-spectrum(operator, vector).smallest, 0),
        converged=(solution.result == lx.RESULTS.successful)
        & jnp.isfinite(optax.tree.norm(q))
        & (residual <= 1.001),
    )


def _asymmetry(operator: Any, like: Any) -> jax.Array:
    keys = jax.random.split(jax.random.key(1), _PROBES)
    vectors = [optax.tree.random_like(key, like) for key in keys]
    images = [operator.mv(v) for v in vectors]
    pairs = [(i, j) for i in range(_PROBES) for j in range(i)]
    skew = sum(
        (trees.dot(vectors[i], images[j]) - trees.dot(vectors[j], images[i])) ** 2 for i, j in pairs
    ) / len(pairs)
    whole = 2 * sum(trees.dot(h, h) for h in images) / _PROBES
    return jnp.sqrt(skew / jnp.where(whole > 0, whole, 1))


def spectrum(operator: Any, like: Any) -> Spectrum:
    """Lanczos from a random vector, three vectors at a time."""
    steps = min(_LANCZOS_STEPS, optax.tree.size(like))
    v = optax.tree.random_like(jax.random.key(2), like)
    v = trees.scale(1 / optax.tree.norm(v), v)
    nothing = jax.tree.map(jnp.zeros_like, v)

    def turn(carry, _):
        before, v, beta = carry
        w = trees.add(operator.mv(v), before, -beta)
        alpha = trees.dot(v, w)
        w = trees.add(w, v, -alpha)
        after = optax.tree.norm(w)
        going = after > 1e-6 * (jnp.abs(alpha) + beta)  # else the space is used up
        after = jnp.where(going, after, 0)
        w = trees.scale(jnp.where(going, 1 / jnp.where(going, after, 1), 0), w)
        return (v, w, after), (alpha, after)

    zero = jnp.zeros((), trees.dtype(like))
    _, (alphas, betas) = jax.lax.scan(turn, (nothing, v, zero), length=steps)
    ends = jnp.linalg.eigvalsh(
        jnp.diag(alphas) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1)
    )
    return Spectrum(ends[0], ends[-1])


class Place(NamedTuple):
    """Where a hypergradient was taken: what ``check`` looks at besides the solve.

    Attributes:
        params: There.
        inner_loss: There.
        gradient: d inner / d params.
        curvature: The operator without damping.
    """

    params: Any
    inner_loss: jax.Array
    gradient: Any
    curvature: Any


def check(
    operator: Any,
    solver: lx.AbstractLinearSolver,
    solution: Solution,
    place: Place,
    info: HypergradientInfo,
) -> None:
    """Raises if something is wrong, with the likely cause and what to do; needs concrete values.

    Args:
        operator: H with its damping.
        solver: The solver.
        solution: What it returned.
        place: Where.
        info: What was seen.

    Raises:
        HypergradientError: If so.
    """
    params = place.params
    tolerance = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params)) ** 0.5
    ends = spectrum(operator, solution.value)
    scale = max(abs(float(ends.smallest)), abs(float(ends.largest)))
    symmetric = not float(info.asymmetry) > 10 * tolerance  # else there is no sign of a curvature
    problems = []
    if not jnp.isfinite(info.stationarity):
        problems.append(
            "the inner gradient is not finite: the inner problem has diverged. Lower its rate."
        )
    elif not symmetric and isinstance(solver, lx.CG | lx.Cholesky):
        problems.append(
            f"the operator is not symmetric (asymmetry {float(info.asymmetry):.2g}), as "
            f"{type(solver).__name__} needs it. Use lineax.GMRES, lineax.BiCGStab or "
            "lineax.Normal(lineax.CG(...)); a stop_gradient in `inner` or a `curvature` of your "
            "own are the usual causes."
        )
    elif symmetric and float(info.negative_curvature) > tolerance * scale:
        negative = float(info.negative_curvature)
        problems.append(
            f"the Hessian is indefinite (curvature {-negative:.3g}, the largest {scale:.3g}): the "
            "params are at no minimum of `inner`. Take more inner steps, or "
            f"damping={2 * negative:.1g}, or curvature=implicit.gauss_newton(...)."
        )
    problems += _of_solve(operator, solver, solution, info, ends, tolerance)
    if symmetric and not problems and (left := _left_to_gain(place)) > _UNSOLVED:
        problems.append(
            f"the inner problem is not solved: its gradient has norm {float(info.stationarity):.3g}"
            f", and a Newton step would still take {100 * left:.2g} % from its loss. Take more "
            "inner steps, or differentiate the path instead (bilevel.unrolled, bptt)."
        )
    if problems:
        raise HypergradientError("; ".join(problems))


def _left_to_gain(place: Place) -> float:
    """g^T H^-1 g / 2 as a share of the inner loss, by conjugate gradients."""
    gradient = trees.widen(place.gradient)
    cg = lx.CG(rtol=1e-3, atol=1e-3, max_steps=100)
    step = solve(place.curvature, gradient, cg).value
    return float(trees.dot(gradient, step)) / 2 / max(abs(float(place.inner_loss)), 1e-30)


def _of_solve(
    operator: Any,
    solver: lx.AbstractLinearSolver,
    solution: Solution,
    info: HypergradientInfo,
    ends: Spectrum,
    tolerance: float,
) -> list[str]:
    """What is wrong with the solve itself."""
    q, result = solution.value, solution.result
    largest, iterations = float(ends.largest), int(info.iterations)
    rate = getattr(solver, "step_size", "auto")
    if iterations > 1 and not isinstance(rate, str) and float(rate) * largest > 2:
        return [
            f"Neumann's series diverges: step_size={float(rate):.3g}, and it must be below 2 / "
            f"lambda_max = {2 / largest:.2g} (residual {float(info.residual):.2g} after "
            f'{iterations} terms). Use step_size="auto", or another solver'
        ]
    bounded = bool(result == lx.RESULTS.max_steps_reached) and float(info.residual) < 1
    if bool(info.converged) or bounded:  # a solve of few terms is a result
        return []
    square = float(trees.dot(q, q))
    curvature = float(trees.dot(q, operator.mv(q))) / square if 0 < square < jnp.inf else 0.0
    singular = (
        f", and the curvature along the solution is {curvature:.2g} of at most {largest:.2g}: the "
        "Hessian is singular along it"
        if abs(curvature) <= tolerance * abs(largest)
        else ""
    )
    finite = "" if jnp.isfinite(info.residual) else "non-finite solve: "
    return [
        f"{finite}the solver stopped after {iterations} steps with a residual of "
        f"{float(info.residual):.2g} of the right-hand side{singular}. Try damping="
        f"{1e-3 * max(largest, 1e-30):.1g}, or lineax.LSMR or implicit.dense() for the solution of "
        "minimal norm"
    ]
