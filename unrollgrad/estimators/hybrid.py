"""Evolution strategies and backpropagation together, with less variance than either alone.

``pes_analytic`` and ``pes_analytic_replacement`` compute the first-order effect of the newest noise
by backpropagation through one window; ``reparameterized_es`` weighs two estimates from the same
samples by their spread.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import unroll
from unrollgrad._core.descriptions import described
from unrollgrad._core.dtypes import wide
from unrollgrad.estimators import _pairs, backprop
from unrollgrad.estimators._persistence import Persistence, Persistent, Weights
from unrollgrad.estimators._window import estimate_of, made_by, nothing, windowed
from unrollgrad.types import GradientEstimator, Sigma, State, Theta, UnrolledProblem

__all__ = ["Analytic", "pes_analytic", "pes_analytic_replacement", "reparameterized_es"]


class Analytic(NamedTuple):
    """The carried state of a worker with persistent pairs and one state under theta itself.

    Attributes:
        pairs: The carried state of the pairs.
        state: The inner state under theta itself.
    """

    pairs: Persistent
    state: State


@described
def pes_analytic(
    problem: UnrolledProblem, *, truncation: int, sigma: Sigma, num_pairs: int = 1
) -> GradientEstimator:
    """PES with the newest window's noise as a control variate: unbiased, good for short memories.

    Backpropagation through the window, from the state under theta itself, gives p: to first order
    the newest noise u_w moves the window's loss by sigma u_w . p. ``grad`` = p + mean over pairs of
    xi_w ((L_w+ - L_w-) / (2 sigma) - u_w . p), xi_w = u_1 + ... + u_w. The subtracted term has mean
    p, so the estimate is unbiased for the gradient of the period-smoothed J, as ``pes``. With
    ``evaluate``, p includes (T/K) L_end.

    Variance of one window: the variance of ``pes`` less the part caused by the newest noise. Little
    remains if the loss depends on the last window alone, most if memory is long. The mean over an
    episode may vary more than with ``pes``, where the noise of windows cancels if their influences
    on the loss cancel, as at an optimum (52 times more in a sum of 1000 windows, each with
    influence -1 on itself and 1 on all later ones together). For the mean over 10 windows, P = 20
    and influence that decays by 0.9, 0.5, 0.1 per window, it is 12.6, 10.8, 11.1 |g|^2 with
    ``pes``, 8.9, 2.6, 0.11 here and 7.3, 2.2, 0.09 with ``pes_analytic_replacement``. It explodes
    where backpropagation through a window does. Time: (2 num_pairs + 1) K steps per call and K
    back. Memory: as ``pes``, one state more and what K steps compute.

    Args:
        problem: The inner loop; its step must be differentiable.
        truncation: Inner steps per call (K); divides a static horizon.
        sigma: Standard deviation of the Gaussian perturbation in theta's units, as in ``pes``.
        num_pairs: Number of antithetic pairs; they share the episode.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If a setting is not positive, the truncation does not divide the horizon or, in
            ``estimate``, the step contains a ``while_loop``.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator, key = ug.pes_analytic(problem, truncation=10, sigma=0.1), jax.random.key(0)
        >>> estimate, state = estimator.estimate(key, theta, estimator.init(key, theta))
        >>> int(estimate.info.inner_steps), int(state.episode.t)
        (30, 10)

    References:
        Vicol et al., ICML 2021, arXiv:2112.13835 ("PES + Analytic").
    """
    pairs = _pairs.pairs(sigma, num_pairs)
    return _analytic("pes_analytic", problem, truncation, pairs, lambda noise: noise.now)


@described
def pes_analytic_replacement(
    problem: UnrolledProblem, *, truncation: int, sigma: Sigma, num_pairs: int = 1
) -> GradientEstimator:
    """PES whose newest window's noise is replaced by backpropagation: the released form, biased.

    ``grad`` = p + mean over pairs of xi_{w-1} ((L_w+ - L_w-) / (2 sigma) - u_w . p), p and u as in
    ``pes_analytic``, but weighed with the noise *before* this window: in the first window it is p
    itself. It is unbiased for J's gradient if the windows' losses are quadratic; otherwise p, the
    gradient of the loss itself and not of the smoothed loss, adds a bias of O(sigma^2). Variance:
    below ``pes_analytic``, whose docstring has numbers. Time: (2 num_pairs + 1) K steps per call
    and K back. Memory: as ``pes_analytic``, and num_pairs theta more.

    Args:
        problem: The inner loop; its step must be differentiable.
        truncation: Inner steps per call (K); divides a static horizon.
        sigma: Standard deviation of the Gaussian perturbation in theta's units, as in ``pes``.
        num_pairs: Number of antithetic pairs; they share the episode.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If a setting is not positive, the truncation does not divide the horizon or, in
            ``estimate``, the step contains a ``while_loop``.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator = ug.pes_analytic_replacement(problem, truncation=100, sigma=0.1)
        >>> state = estimator.init(jax.random.key(0), theta)
        >>> estimate, state = estimator.estimate(jax.random.key(1), theta, state)
        >>> round(float(estimate.grad), 2)
        35.72

    References:
        The code released with Vicol et al., ICML 2021, arXiv:2112.13835.
    """
    pairs, name = _pairs.pairs(sigma, num_pairs), "pes_analytic_replacement"
    return _analytic(name, problem, truncation, pairs, lambda noise: noise.before)


def _analytic(
    name: str,
    problem: UnrolledProblem,
    truncation: int,
    pairs: _pairs.Pairs,
    weigh: Callable[[Weights], Theta],
) -> GradientEstimator:
    """Makes both forms; ``weigh`` chooses the noise that weighs the loss differences."""
    truncation = inner_loop.check_truncation(problem, truncation)
    persistence = Persistence(problem, pairs, truncation)

    def begin(episode, theta):
        state = unroll.initial_state(problem, episode, theta)
        return Analytic(persistence.begin(episode, theta), state)

    def window(segment, theta, carried):
        result, noise, persistent = persistence.run(segment, theta, carried.pairs)
        # Only earlier noise influences the evaluation at the window's start: it is not part of p.
        run = functools.partial(unroll.window, segment, start=0.0)
        own, state = backprop.continued(name, segment, theta, carried.state, run)
        weight = weigh(noise)
        by_noise = pairs.weigh(weight, noise.before)
        out = _pairs.estimate(result, pairs.sigma, theta, by_noise, mean_pass=True)
        expected = pairs.mean(weight, _products(noise.unit, own.grad))

        def leaf(g, p, e):
            return (g.astype(e.dtype) + p.astype(e.dtype) - e).astype(g.dtype)

        grad = jax.tree.map(leaf, out.grad, own.grad, expected)
        return out._replace(grad=grad), Analytic(persistent, state)

    fingerprint = made_by(name, problem, truncation=truncation, num_pairs=pairs.num_pairs)
    return windowed(problem, fingerprint, truncation, begin, window, pairs.check)


def _products(unit: Theta, grad: Theta) -> jax.Array:
    """Computes u . p for every pair, in at least float32."""

    def leaf(u, p):
        u, p = u.reshape(len(u), -1), p.astype(u.dtype).ravel()
        return jnp.tensordot(u, p, 1, precision=jax.lax.Precision.HIGHEST)

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(leaf, unit, grad)))


@described
def reparameterized_es(
    problem: UnrolledProblem, *, sigma: Sigma, num_pairs: int
) -> GradientEstimator:
    """Two estimates of the episode-smoothed J's gradient from the same samples, merged.

    Every pair of whole episodes gives an evolution-strategies estimate e_i = u_i (J+ - J-) /
    (2 sigma) and a pathwise estimate r_i, the mean of backpropagation through both episodes; each
    is unbiased for the gradient of E_u[J(theta + sigma u)], the episode-smoothed J. ``grad`` = mean
    over pairs of w r_i + (1 - w) e_i with w = var(e) / (var(r) + var(e)), per leaf of theta,
    **taken from the other pairs**, so that no sample weighs itself and the merge stays unbiased.

    Variance: about the lower of the two, or less if they are similar: if gradients explode in most
    samples w goes to 0, if they are smooth w goes to 1. A single sample that explodes sets the
    others' weights to 0 but not its own, and passes through; a NaN makes the estimate NaN
    (``average`` then leaves the worker out and counts it). Time: 2 num_pairs T steps per call and
    as many back. Memory: what 2 num_pairs T steps compute.

    Args:
        problem: The inner loop; its horizon must be static and its step differentiable.
        sigma: Standard deviation of the Gaussian perturbation in theta's units, as in ``pes``.
        num_pairs: Number of antithetic pairs, at least 3; they share the episode.

    Returns:
        An estimator with ``truncation=None``; streaming ``data`` has leading axis ``horizon``.

    Raises:
        ValueError: If the horizon is sampled, sigma is not positive, there are fewer than 3 pairs
            or, in ``estimate``, the step contains a ``while_loop``.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator = ug.reparameterized_es(problem, sigma=0.1, num_pairs=4)
        >>> key = jax.random.key(0)
        >>> estimate, _ = estimator.estimate(key, theta, estimator.init(key, theta))
        >>> int(estimate.info.inner_steps)
        800

    References:
        Metz et al., ICML 2019, arXiv:1810.10180 (slightly biased: every sample weighs itself too).
    """
    pairs = _pairs.pairs(sigma, num_pairs)
    if num_pairs < 3:
        raise ValueError(
            f"`num_pairs` must be at least 3, since each pair is weighed by the spread of the "
            f"others; got {num_pairs}."
        )

    def window(segment, theta, carried):
        thetas = _pairs.draw(pairs, theta, unroll.noise_key(segment.episode, 0))
        run = backprop.whole_episode(segment)

        def one(theta):
            return backprop.gradient("reparameterized_es", run, theta, segment.num_steps)

        own = jax.vmap(one)(thetas)
        unit = _pairs.realised(thetas, sigma, own.loss)
        halves = _pairs.half_difference(own.loss)

        def leaf(x, s, u, r):
            e = u * _like(halves.astype(u.dtype), u) / jnp.asarray(s, u.dtype)
            return _merged(e, _pairs.mean_of_signs(r.astype(u.dtype))).astype(x.dtype)

        grad = jax.tree.map(leaf, theta, arguments.broadcast_sigma(sigma, theta), unit, own.grad)
        return estimate_of(grad, jnp.mean(own.loss), 2 * num_pairs * segment.num_steps), None

    fingerprint = made_by("reparameterized_es", problem)
    return windowed(problem, fingerprint, None, nothing, window, pairs.check)


def _merged(e: jax.Array, r: jax.Array) -> jax.Array:
    """Averages w r + (1 - w) e over the pairs, each w from the spread of the other pairs."""
    spread_e, spread_r = _spread_of_others(e), _spread_of_others(r)
    # If neither has any spread, the choice of w does not matter.
    both = spread_e + spread_r
    w = jnp.where(both > 0, spread_e / jnp.where(both > 0, both, 1), 1.0)
    # If the spread of the others' r is not finite, w has its limit, 0.
    w = _like(jnp.where(jnp.isfinite(spread_r), w, 0.0), e)
    return jnp.mean(jnp.where(w > 0, w * r, 0) + (1 - w) * e, axis=0)


def _like(x: jax.Array, u: jax.Array) -> jax.Array:
    """Reshapes one number per pair, to be multiplied with a leaf of leading axis ``num_pairs``."""
    return x.reshape(-1, *[1] * (u.ndim - 1))


def _spread_of_others(x: jax.Array) -> jax.Array:
    """Computes for every sample the variance of the others, summed over the coordinates."""
    x = x.reshape(len(x), -1).astype(wide(x.dtype))
    n = len(x)
    others = ~jnp.eye(n, dtype=bool)

    def one(mask):
        mean = jnp.sum(jnp.where(mask[:, None], x, 0), axis=0) / (n - 1)
        return jnp.sum(jnp.where(mask[:, None], (x - mean[None]) ** 2, 0)) / (n - 2)

    return jax.lax.map(one, others)
