"""Evolution strategies and backpropagation together: each takes noise from the other.

``pes_analytic`` and ``pes_analytic_replacement`` know what the newest noise contributes, to first
order, by backpropagation through one window; ``reparameterized_es`` weighs both estimates of the
same samples by their spread.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import unroll
from unrollgrad._core.dtypes import wide
from unrollgrad.estimators import _pairs, backprop
from unrollgrad.estimators._persistence import Persistence, Persistent
from unrollgrad.estimators._window import made_by, nothing, windowed
from unrollgrad.types import Estimate, GradientEstimator, Info, State, Theta, UnrolledProblem


class Analytic(NamedTuple):
    """What a worker carries with pairs that persist, and one state advanced with theta itself.

    Attributes:
        pairs: What the pairs carry.
        state: The inner state under theta itself.
    """

    pairs: Persistent
    state: State


def pes_analytic(
    problem: UnrolledProblem, *, truncation: int, sigma: Any, num_pairs: int = 1
) -> GradientEstimator:
    """PES with the newest window's noise as a control variate: unbiased, good for short memories.

    Backpropagation through the window, at a state that theta itself has reached, gives p, and to
    first order the newest noise u_w moves the window's loss by sigma u_w . p. So ``grad`` = p +
    mean over pairs of xi_w ((L_w+ - L_w-) / (2 sigma) - u_w . p), xi_w = u_1 + ... + u_w: what is
    subtracted has mean p, so that it is unbiased just where ``pes`` is. With ``evaluate``, p
    includes (T/K) L_end.

    Variance, of one window: that of ``pes`` less what the newest noise caused; little is left where
    the loss depends on the last window alone, most of it where memory is long. The mean over an
    episode may vary more than that of ``pes``, whose windows' noise cancels where their influences
    on the loss do, as at an optimum (52 times in a sum of 1000 windows, each with influence -1 on
    itself and 1 on later ones in all). The mean over 10 windows, P = 20, influence that decays by
    0.9, 0.5, 0.1 a window: 12.6, 10.8, 11.1 |g|^2 for pes, 8.9, 2.6, 0.11 here, 7.3, 2.2, 0.09 for
    ``pes_analytic_replacement``. Where backpropagation through a window explodes, so does this.

    Time: (2 num_pairs + 1) K steps a call and K back. Memory: as ``pes``, one state more and what K
    steps compute.

    Args:
        problem: The inner loop; its step must be differentiable.
        truncation: Inner steps per call (K); divides a static horizon.
        sigma: Standard deviation of the (Gaussian) perturbation in theta's units: a float, a traced
            scalar, or a pytree prefix of theta.
        num_pairs: Antithetic pairs; they share the episode.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If the truncation does not divide the horizon, or sigma, truncation or num_pairs
            is not positive or, when estimating, for a ``while_loop`` in the step.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator = ug.pes_analytic(problem, truncation=10, sigma=0.1)
        >>> state = estimator.init(jax.random.key(0), theta)
        >>> estimate, state = estimator.estimate(jax.random.key(1), theta, state)
        >>> int(estimate.info.inner_steps), int(state.episode.t)
        (30, 10)

    References:
        Vicol et al., Unbiased gradient estimation in unrolled computation graphs with persistent
        evolution strategies, ICML 2021, arXiv:2112.13835 ("PES + Analytic").
    """
    many = _pairs.pairs(sigma, num_pairs)
    return _analytic("pes_analytic", lambda noise: noise.now, problem, truncation, many)


def pes_analytic_replacement(
    problem: UnrolledProblem, *, truncation: int, sigma: Any, num_pairs: int = 1
) -> GradientEstimator:
    """PES whose newest window's noise is replaced by backpropagation: the released form, biased.

    ``grad`` = p + mean over pairs of xi_{w-1} ((L_w+ - L_w-) / (2 sigma) - u_w . p), p and u as in
    ``pes_analytic``, but weighed with the noise *before* this window: in the first window it is p
    itself. Variance: below that of ``pes_analytic``, see there. Unbiased for J's gradient where the
    windows' losses are quadratic; elsewhere p is the gradient of the loss itself and not of the
    smoothed one, a bias of O(sigma^2).

    Time: (2 num_pairs + 1) K steps a call and K back. Memory: as ``pes``, one state more and what K
    steps compute.

    Args:
        problem: The inner loop; its step must be differentiable.
        truncation: Inner steps per call (K); divides a static horizon.
        sigma: Standard deviation of the (Gaussian) perturbation in theta's units: a float, a traced
            scalar, or a pytree prefix of theta.
        num_pairs: Antithetic pairs; they share the episode.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If the truncation does not divide the horizon, or sigma, truncation or num_pairs
            is not positive or, when estimating, for a ``while_loop`` in the step.

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
    many = _pairs.pairs(sigma, num_pairs)
    name = "pes_analytic_replacement"
    return _analytic(name, lambda noise: noise.before, problem, truncation, many)


def _analytic(name, weigh, problem, truncation, many) -> GradientEstimator:
    """Both forms; ``weigh`` says which of the ``persistence.Weights`` weighs the differences."""
    truncation = inner_loop.check_truncation(problem, truncation)
    persistence = Persistence(problem, many, truncation)

    def begin(episode, theta):
        state = unroll.initial_state(problem, episode, theta)
        return Analytic(persistence.begin(episode, theta), state)

    def window(segment, theta, carried):
        result, noise, persistent = persistence.run(segment, theta, carried.pairs)
        # The evaluation at the window's start is what the noise before made it: no part of p.
        loss = backprop.window(segment, carried.state, start=0.0)
        own, state = backprop.gradient(name, loss, theta, truncation)
        weight = weigh(noise)
        steps = (2 * many.num_pairs + 1) * truncation
        out = _pairs.estimate(result, many.sigma, theta, weight, noise.before, steps)
        expected = _products(noise.unit, own.grad)

        def leaf(g, p, w):
            wide_p = p.astype(w.dtype)
            return (g.astype(w.dtype) + wide_p - _pairs.weighted_mean(expected, w)).astype(g.dtype)

        grad = jax.tree.map(leaf, out.grad, own.grad, weight)
        return Estimate(grad, out.loss, out.info), Analytic(persistent, state)

    fingerprint = made_by(name, problem, truncation=truncation, num_pairs=many.num_pairs)
    return windowed(problem, fingerprint, truncation, begin, window, many.check)


def _products(unit: Theta, grad: Theta) -> jax.Array:
    """Every pair's u . p, in at least float32."""

    def leaf(u, p):
        return jnp.tensordot(
            u.reshape(len(u), -1), p.astype(u.dtype).ravel(), 1, precision=jax.lax.Precision.HIGHEST
        )

    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(leaf, unit, grad)))


def reparameterized_es(
    problem: UnrolledProblem, *, sigma: Any, num_pairs: int
) -> GradientEstimator:
    """Two estimates of the smoothed J's gradient from the same samples, merged by their spread.

    Every pair of whole episodes gives an evolution-strategies estimate e_i = u_i (J+ - J-) /
    (2 sigma) and a pathwise one r_i, the mean of backpropagation through both: each is unbiased for
    the gradient of E_u[J(theta + sigma u)]. ``grad`` = mean over pairs of w r_i + (1 - w) e_i with
    w = var(e) / (var(r) + var(e)), per leaf of theta, **taken from the other pairs**, so that no
    sample weighs itself and the merge stays unbiased.

    Variance: about that of the better of the two, and less where they are alike: with gradients
    that explode in most samples w goes to 0, with smooth ones to 1. A sample that explodes alone
    sets the others' weights to 0 but not its own, and passes through; one that is not a number
    makes the estimate so (``average`` then leaves the worker out and counts it). Time: 2 num_pairs
    T steps a call and as many back. Memory: what 2 num_pairs T steps compute.

    Args:
        problem: The inner loop; its horizon must be static and its step differentiable.
        sigma: Standard deviation of the (Gaussian) perturbation in theta's units: a float, a traced
            scalar, or a pytree prefix of theta.
        num_pairs: Antithetic pairs, at least 3; they share the episode.

    Returns:
        An estimator with ``truncation=None``; streaming ``data`` has leading axis ``horizon``.

    Raises:
        ValueError: For a sampled horizon, a sigma that is not positive, fewer than 3 pairs or, when
            estimating, a ``while_loop`` in the step.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator = ug.reparameterized_es(problem, sigma=0.1, num_pairs=4)
        >>> key = jax.random.key(0)
        >>> estimate, _ = estimator.estimate(key, theta, estimator.init(key, theta))
        >>> int(estimate.info.inner_steps)
        800

    References:
        Metz et al., Understanding and correcting pathologies in the training of learned optimizers,
        ICML 2019, arXiv:1810.10180 (there every sample weighs itself too: slightly biased).
    """
    inner_loop.static_horizon(problem, "reparameterized_es")
    many = _pairs.pairs(sigma, num_pairs)
    if num_pairs < 3:
        raise ValueError(
            f"`num_pairs` must be at least 3, since each pair is weighed by the spread of the "
            f"others; got {num_pairs}."
        )

    def window(segment, theta, carried):
        thetas = _pairs.draw(many, theta, unroll.noise_key(segment.episode, 0))
        loss = backprop.window(segment, None)

        def one(theta):
            out, _ = backprop.gradient("reparameterized_es", loss, theta, segment.num_steps)
            return out.loss, out.grad

        losses, grads = jax.vmap(jax.vmap(one))(thetas)
        unit = _pairs.realised(thetas, sigma, losses)
        halves = (losses[:, 0] - losses[:, 1]) / 2

        def leaf(x, s, u, r):
            r = jnp.mean(r.astype(u.dtype), axis=1)
            e = u * _like(halves.astype(u.dtype), u) / jnp.asarray(s, u.dtype)
            return _merged(e, r).astype(x.dtype)

        grad = jax.tree.map(leaf, theta, arguments.broadcast_sigma(sigma, theta), unit, grads)
        info = Info(jnp.int32(2 * num_pairs * segment.num_steps))
        return Estimate(grad, jnp.mean(losses), info), None

    fingerprint = made_by("reparameterized_es", problem)
    return windowed(problem, fingerprint, None, nothing, window, many.check)


def _merged(e: jax.Array, r: jax.Array) -> jax.Array:
    """The mean over pairs of w r + (1 - w) e, w from the spread of the other pairs."""
    spread_e, spread_r = _spread_of_others(e), _spread_of_others(r)
    # Where both are alike without spread, either will do.
    both = spread_e + spread_r
    w = jnp.where(both > 0, spread_e / jnp.where(both > 0, both, 1), 1.0)
    # Where the others' spread is not finite there is no weight: that is its limit.
    w = _like(jnp.where(jnp.isfinite(spread_r), w, 0.0), e)
    return jnp.mean(jnp.where(w > 0, w * r, 0) + (1 - w) * e, axis=0)


def _like(x: jax.Array, u: jax.Array) -> jax.Array:
    """One number per pair, to be multiplied with a leaf of leading axis ``num_pairs``."""
    return x.reshape(-1, *[1] * (u.ndim - 1))


def _spread_of_others(x: jax.Array) -> jax.Array:
    """For every sample the variance of the others, summed over the coordinates."""
    x = x.reshape(len(x), -1).astype(wide(x.dtype))
    n = len(x)
    others = ~jnp.eye(n, dtype=bool)

    def one(mask):
        mean = jnp.sum(jnp.where(mask[:, None], x, 0), axis=0) / (n - 1)
        return jnp.sum(jnp.where(mask[:, None], (x - mean) ** 2, 0)) / (n - 2)

    return jax.lax.map(one, others)
