"""Whether a hypergradient can be trusted: what was seen of the inner problem and of the solve."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx

from unrollgrad.implicit import trees
from unrollgrad.implicit.linear import Solution

_LANCZOS_STEPS = 16
_PROBES = 3
_MOVE = 0.01  # of the params, by one Newton step: more is an inner problem that is not solved


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
        converged: Whether the solver says that it reached its aim (a number of terms is one), its
            result is finite, and a Neumann series does not diverge.
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
    size = trees.norm(vector)
    residual = trees.norm(trees.add(vector, operator.mv(q), -1)) / jnp.where(size > 0, size, 1)
    return HypergradientInfo(
        stationarity=trees.norm(trees.widen(gradient)),
        residual=residual,
        iterations=solution.num_steps,
        asymmetry=_asymmetry(operator, vector),
        negative_curvature=jnp.maximum(-spectrum(operator, vector).smallest, 0),
        converged=(solution.result == lx.RESULTS.successful) & jnp.isfinite(trees.norm(q)),
    )


def _asymmetry(operator: Any, like: Any) -> jax.Array:
    keys = jax.random.split(jax.random.key(1), _PROBES)
    vectors = [trees.random_like(key, like) for key in keys]
    images = [operator.mv(v) for v in vectors]
    pairs = [(i, j) for i in range(_PROBES) for j in range(i)]
    skew = sum(
        (trees.dot(vectors[i], images[j]) - trees.dot(vectors[j], images[i])) ** 2 for i, j in pairs
    ) / len(pairs)
    whole = 2 * sum(trees.dot(h, h) for h in images) / _PROBES
    return jnp.sqrt(skew / jnp.where(whole > 0, whole, 1))


def spectrum(operator: Any, like: Any) -> Spectrum:
    """Lanczos from a random vector, three vectors at a time."""
    steps = min(_LANCZOS_STEPS, trees.size(like))
    v = trees.random_like(jax.random.key(2), like)
    v = trees.scale(1 / trees.norm(v), v)
    nothing = jax.tree.map(jnp.zeros_like, v)

    def turn(carry, _):
        before, v, beta = carry
        w = trees.add(operator.mv(v), before, -beta)
        alpha = trees.dot(v, w)
        w = trees.add(w, v, -alpha)
        after = trees.norm(w)
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


def check(
    operator: Any, params: Any, newton: Any, solution: Solution, info: HypergradientInfo
) -> None:
    """Raises if something is wrong, with the likely cause and what to do; needs concrete values.

    Args:
        operator: H with its damping.
        params: Where it was taken.
        newton: The Newton step, the same solve for the inner gradient.
        solution: Of the solve.
        info: What was seen.

    Raises:
        HypergradientError: If so.
    """
    tolerance = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(params)) ** 0.5
    ends = spectrum(operator, newton)
    scale = max(abs(float(ends.smallest)), abs(float(ends.largest)))
    problems = []
    if not jnp.isfinite(info.stationarity):
        problems.append(
            "the inner gradient is not finite: the inner problem has diverged. Lower its rate."
        )
    elif float(info.asymmetry) > 10 * tolerance:
        problems.append(
            f"the operator is not symmetric (asymmetry {float(info.asymmetry):.2g}), as CG and "
            "Neumann's series need it. Use lineax.GMRES, lineax.BiCGStab or "
            "lineax.Normal(lineax.CG(...)); a stop_gradient in `inner` or a `curvature` of your "
            "own are the usual causes."
        )
    elif float(info.negative_curvature) > tolerance * scale:
        negative = float(info.negative_curvature)
        problems.append(
            f"the Hessian is indefinite (curvature {-negative:.3g}, the largest {scale:.3g}): the "
            "params are at no minimum of `inner`. Take more inner steps, or "
            f"damping={2 * negative:.1g}, or curvature=implicit.gauss_newton(...)."
        )
    problems += _of_solve(operator, solution, info, ends, tolerance)
    move = float(trees.norm(newton)) / max(float(trees.norm(trees.widen(params))), 1e-30)
    if not problems and not move <= _MOVE:
        problems.append(
            f"the inner problem is not solved: its gradient has norm {float(info.stationarity):.3g}"
            f", and one Newton step would move the params by {100 * move:.3g} % of their norm. "
            "Take more inner steps, or differentiate the path instead (bilevel.unrolled, bptt)."
        )
    if problems:
        raise HypergradientError("; ".join(problems))


def _of_solve(
    operator: Any, solution: Solution, info: HypergradientInfo, ends: Spectrum, tolerance: float
) -> list[str]:
    """What is wrong with the solve itself."""
    q, result = solution.value, solution.result
    bounded = bool(result == lx.RESULTS.max_steps_reached) and float(info.residual) <= 1
    if bool(info.converged) or bounded:  # a solve of few terms is a result
        return []
    largest, iterations = float(ends.largest), int(info.iterations)
    if bool(result == lx.RESULTS.breakdown) and float(info.residual) > 1:
        return [
            f"the solve diverges (residual {float(info.residual):.2g} times the right-hand side "
            f"after {iterations} steps). Neumann's series needs step_size < 2 / lambda_max = "
            f'{2 / largest:.2g}: use step_size="auto", or another solver'
        ]
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
