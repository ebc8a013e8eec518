"""Evolution strategies and backpropagation together: each takes noise from the other.

``pes_analytic`` and ``pes_analytic_replacement`` know what the newest noise contributes, to first
order, by backpropagation through one window; ``reparameterized_es`` weighs both estimates of the
same samples by their spread.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad import checks, problem_checks, resolution, unroll
from unrollgrad.estimators import backprop, pairs, persistence, worker
from unrollgrad.noise import gaussian, wide
from unrollgrad.types import (
    Episode,
    Estimate,
    GradientEstimator,
    Info,
    Key,
    State,
    Theta,
    UnrolledProblem,
)


class AnalyticState(NamedTuple):
    """The state of a worker with pairs that persist, and one state advanced with theta itself.

    Attributes:
        episode: Where it stands.
        states: The pairs' inner states, leading axes ``(num_pairs, 2)``.
        accumulated: The unit-variance noise of the finished windows, leading axis ``num_pairs``.
        evaluated: (T/K) ``evaluate`` at the end of the last window, ``(num_pairs, 2)``; None
            without ``evaluate``.
        state: The inner state under theta itself.
        made_by: The estimator whose it is.
    """

    episode: Episode
    states: State
    accumulated: Theta
    evaluated: jax.Array | None
    state: State
    made_by: worker.MadeBy


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
    return _analytic("pes_analytic", lambda noise: noise.now, problem, truncation, sigma, num_pairs)


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
    return _analytic(
        "pes_analytic_replacement",
        lambda noise: noise.before,
        problem,
        truncation,
        sigma,
        num_pairs,
    )


def _analytic(name, weigh, problem, truncation, sigma, num_pairs) -> GradientEstimator:
    """Both forms; ``weigh`` says with which of the ``persistence.Weights``."""
    truncation = problem_checks.check_truncation(problem, truncation)
    law = pairs.check(sigma, num_pairs, gaussian())
    made_by = worker.made_by(name, problem, truncation=truncation, num_pairs=num_pairs)

    def init(key: Key, theta: Theta) -> AnalyticState:
        theta = checks.floating_theta(theta)
        resolution.check(sigma, theta)
        both = persistence.init_pairs(
            problem, key, theta, truncation, truncation, num_pairs, made_by
        )
        mean = worker.init_mean(problem, key, theta, truncation, made_by)
        return AnalyticState(
            both.episode, both.states, both.accumulated, both.evaluated, mean.state, made_by
        )

    def estimate(key: Key, theta: Theta, state: AnalyticState, *, data: Any = None):
        key, theta = worker.admit(problem, init, key, theta, state, data, truncation, "truncation")
        episode = unroll.continue_or_begin(problem, key, state.episode, truncation)
        thetas = pairs.draw(
            law, sigma, num_pairs, theta, persistence.noise_key(episode, truncation)
        )
        window, noise = persistence.run_pairs(
            problem, episode, sigma, thetas, state, truncation, truncation, data
        )
        # The evaluation at the window's start is what the noise before made it: no part of p.
        loss = backprop.window(problem, episode, state.state, truncation, data, start=0.0)
        own, after = backprop.gradient(name, loss, theta, truncation)
        weight = weigh(noise)
        steps = (2 * num_pairs + 1) * truncation
        out = pairs.estimate(window, sigma, theta, weight, noise.before, inner_steps=steps)
        expected = _products(noise.unit, own.grad)

        def leaf(g, p, w):
            wide_p = p.astype(w.dtype)
            return (g.astype(w.dtype) + wide_p - pairs.weighted_mean(expected, w)).astype(g.dtype)

        grad = jax.tree.map(leaf, out.grad, own.grad, weight)
        return Estimate(grad, out.loss, out.info), AnalyticState(
            unroll.advance(episode, truncation),
            window.state,
            noise.accumulated,
            window.end,
            after,
            made_by,
        )

    return worker.compiled(init, estimate, truncation)


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
    horizon = problem_checks.static_horizon(problem, "reparameterized_es")
    law = pairs.check(sigma, num_pairs, gaussian())
    if num_pairs < 3:
        raise ValueError(
            f"`num_pairs` must be at least 3, since each pair is weighed by the spread of the "
            f"others; got {num_pairs}."
        )
    made_by = worker.made_by("reparameterized_es", problem)

    def init(key: Key, theta: Theta) -> worker.EpisodeState:
        resolution.check(sigma, checks.floating_theta(theta))
        return worker.init_episode(problem, key, theta, horizon, made_by)

    def estimate(key: Key, theta: Theta, state: worker.EpisodeState, *, data: Any = None):
        key, theta = worker.admit(problem, init, key, theta, state, data, horizon, "horizon")
        episode = unroll.new_episode(problem, key, horizon)
        thetas = pairs.draw(law, sigma, num_pairs, theta, unroll.noise_key(episode, 0))
        loss = backprop.window(problem, episode, None, horizon, data)

        def one(theta):
            out, _ = backprop.gradient("reparameterized_es", loss, theta, horizon)
            return out.loss, out.grad

        losses, grads = jax.vmap(jax.vmap(one))(thetas)
        unit = pairs.realised(thetas, sigma, losses)
        halves = (losses[:, 0] - losses[:, 1]) / 2

        def leaf(x, s, u, r):
            r = jnp.mean(r.astype(u.dtype), axis=1)
            e = u * _like(halves.astype(u.dtype), u) / jnp.asarray(s, u.dtype)
            spread_e, spread_r = _spread_of_others(e), _spread_of_others(r)
            # Where both are alike without spread, either will do.
            both = spread_e + spread_r
            w = jnp.where(both > 0, spread_e / jnp.where(both > 0, both, 1), 1.0)
            # Where the others' spread is not finite there is no weight: that is its limit.
            w = _like(jnp.where(jnp.isfinite(spread_r), w, 0.0), u)
            return jnp.mean(jnp.where(w > 0, w * r, 0) + (1 - w) * e, axis=0).astype(x.dtype)

        grad = jax.tree.map(leaf, theta, checks.broadcast_sigma(sigma, theta), unit, grads)
        info = Info(jnp.int32(2 * num_pairs * horizon))
        out = Estimate(grad, jnp.mean(losses), info)
        return out, worker.EpisodeState(unroll.advance(episode, horizon), made_by)

    return worker.compiled(init, estimate, None)


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
