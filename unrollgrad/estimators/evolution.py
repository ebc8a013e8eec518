"""Evolution-strategies estimators: antithetic pairs of unrolls with theta +- sigma u.

``gpes`` is the one persistent implementation; ``pes`` and ``es_single`` are its two ends.
``full_es`` and ``truncated_es`` share its pairs: all differ only in when noise is drawn, where a
pair begins, and what weighs its losses.

They call ``step`` forwards only, so that ``while_loop``, integers and discontinuous losses are
fine. Where ``init`` depends on theta, what continues episodes is differentiable in forward mode
only: a ``while_loop`` begins them.
"""

from typing import Any

from unrollgrad._checks import inner_loop
from unrollgrad._core import unroll
from unrollgrad.estimators import _pairs
from unrollgrad.estimators._persistence import Persistence, check_period
from unrollgrad.estimators._window import inner_state, made_by, nothing, windowed
from unrollgrad.noise import Noise
from unrollgrad.types import GradientEstimator, UnrolledProblem


def full_es(
    problem: UnrolledProblem, *, sigma: Any, num_pairs: int = 1, noise: Noise | None = None
) -> GradientEstimator:
    """Evolution strategies on whole episodes: the gradient of the sigma-smoothed J.

    ``grad`` = mean over pairs of u (J(theta + sigma u) - J(theta - sigma u)) / (2 sigma), where u
    is standard normal and both signs see the same episode. It is unbiased for the gradient of
    E_u[J(theta + sigma u)], which is that of J itself where J is quadratic and O(sigma^2) from it
    elsewhere.

    Variance: (P + 1) |g|^2 / num_pairs on a quadratic J, P = dim(theta). Time: 2 num_pairs T steps
    a call. Memory: 2 num_pairs state + 3 num_pairs theta (both signs, and the noise as it is
    drawn; one more where a leaf of fewer than 65,536 numbers is most of theta).

    Args:
        problem: The inner loop; its horizon must be static.
        sigma: Standard deviation of the perturbation in theta's units: a float, a traced scalar, or
            a pytree prefix of theta.
        num_pairs: Antithetic pairs; they share the episode (initial state's key, data).
        noise: The perturbation law; by default ``ug.noise.gaussian()``.

    Returns:
        An estimator with ``truncation=None``; streaming ``data`` has leading axis ``horizon``.

    Raises:
        ValueError: For a sampled horizon, a sigma or num_pairs that is not positive.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator = ug.full_es(problem, sigma=0.1, num_pairs=100)
        >>> key = jax.random.key(0)
        >>> estimate, _ = estimator.estimate(key, theta, estimator.init(key, theta))
        >>> round(float(estimate.loss), 1)
        10.3

    References:
        Salimans et al., Evolution strategies as a scalable alternative to reinforcement learning,
        2017, arXiv:1703.03864. Mirrored pairs: Brockhoff et al., PPSN 2010.
    """
    inner_loop.static_horizon(problem, "full_es")
    many = _pairs.pairs(sigma, num_pairs, noise)

    def window(segment, theta, carried):
        thetas = _pairs.draw(many, theta, unroll.noise_key(segment.episode, 0))
        result = _pairs.run(segment, thetas, None)
        unit = _pairs.realised(thetas, sigma, result.losses)
        steps = 2 * num_pairs * segment.num_steps
        return _pairs.estimate(result, sigma, theta, unit, unit, steps), None

    return windowed(problem, made_by("full_es", problem), None, nothing, window, many.check)


def truncated_es(
    problem: UnrolledProblem,
    *,
    truncation: int,
    sigma: Any,
    num_pairs: int = 1,
    noise: Noise | None = None,
) -> GradientEstimator:
    """Evolution strategies on one window at a time: biased, it forgets earlier influence.

    In every window all pairs restart from one mean state, which is advanced with theta itself; in
    the first window they start from init(theta +- sigma u). ``grad`` = mean over pairs of
    u (L(theta + sigma u) - L(theta - sigma u)) / (2 sigma), L the mean loss of the window: the
    influence of theta on the window's beginning is dropped, so that it is unbiased for J's gradient
    only with truncation = horizon or without memory.

    Variance: (P + 1) |g_window|^2 / num_pairs for one window of quadratic losses. Time:
    (2 num_pairs + 1) K steps a call. Memory: (2 num_pairs + 1) state + 3 num_pairs theta.

    Args:
        problem: The inner loop.
        truncation: Inner steps per call (K); divides a static horizon.
        sigma: Standard deviation of the perturbation in theta's units: a float, a traced scalar, or
            a pytree prefix of theta.
        num_pairs: Antithetic pairs; they share the episode.
        noise: The perturbation law; by default ``ug.noise.gaussian()``.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If the truncation does not divide the horizon, or sigma, truncation or num_pairs
            is not positive.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator = ug.truncated_es(problem, truncation=10, sigma=0.1)
        >>> state = estimator.init(jax.random.key(0), theta)
        >>> estimate, state = estimator.estimate(jax.random.key(1), theta, state)
        >>> int(estimate.info.inner_steps), int(state.episode.t)
        (30, 10)

    References:
        Metz et al., Understanding and correcting pathologies in the training of learned optimizers,
        ICML 2019, arXiv:1810.10180. Vicol et al., ICML 2021, arXiv:2112.13835 (as a baseline).
    """
    truncation = inner_loop.check_truncation(problem, truncation)
    many = _pairs.pairs(sigma, num_pairs, noise)

    def window(segment, theta, state):
        episode = segment.episode
        thetas = _pairs.draw(many, theta, unroll.noise_key(episode, episode.t // truncation))
        result, thetas, state = _pairs.run_from_mean(segment, thetas, theta, state)
        unit = _pairs.difference(thetas, sigma)
        steps = (2 * num_pairs + 1) * truncation
        return _pairs.estimate(result, sigma, theta, unit, unit, steps), state

    fingerprint = made_by("truncated_es", problem, truncation=truncation)
    return windowed(problem, fingerprint, truncation, inner_state(problem), window, many.check)


def gpes(
    problem: UnrolledProblem,
    *,
    truncation: int,
    sigma: Any,
    noise_period: int | None,
    num_pairs: int = 1,
    noise: Noise | None = None,
) -> GradientEstimator:
    """Generalised persistent evolution strategies: noise redrawn every ``noise_period`` steps.

    Each pair keeps its own two inner states through the episode. In a window of noise period j it
    runs with theta +- sigma u_j, and the window's losses are weighed with all noise so far:
    ``grad`` = mean over pairs of (u_1 + ... + u_j) (L+ - L-) / (2 sigma), L the mean loss of the
    window. Averaged over an episode's windows it is unbiased for the gradient of J smoothed over
    independent perturbations of the periods; for quadratic losses that is the gradient of J.
    Updates of theta inside an episode add a bias that vanishes with the outer learning rate.

    ``noise_period=truncation`` is ``pes``; None, one draw per episode, is ``es_single``. With
    ``evaluate`` a window adds (T/K) (xi_t L_end - xi_{t-1} L_start), xi the accumulated noise.

    Variance, one pair, quadratic losses, the mean over n windows with h[k, j] the influence of
    period j on the loss of window k, whose own period is J(k): (1/n^2) sum_{k,s} [P min(J(k), J(s))
    sum_{j <= min} h[k, j].h[s, j] + (sum_{j <= min} h[s, j]).(sum_{j <= min} h[k, j])]. Usually
    that lies between those of ``pes`` and ``es_single``. For one window at a random place it is
    least with a single period. Time: 2 num_pairs K steps a call. Memory: 2 num_pairs state + 4
    num_pairs theta (both signs, the noise as it is drawn, and the accumulator).

    Args:
        problem: The inner loop.
        truncation: Inner steps per call (K); divides a static horizon.
        sigma: Standard deviation of the perturbation in theta's units: a float, a traced scalar, or
            a pytree prefix of theta. It may change between calls: the accumulator holds
            unit-variance sums.
        noise_period: Inner steps between draws, a multiple of ``truncation``; None: one draw per
            episode.
        num_pairs: Antithetic pairs; they share the episode.
        noise: The perturbation law; by default ``ug.noise.gaussian()``.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If the truncation does not divide the horizon or the noise period, or sigma,
            truncation, noise_period or num_pairs is not positive.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator = ug.gpes(problem, truncation=10, sigma=0.1, noise_period=50, num_pairs=8)
        >>> state = estimator.init(jax.random.key(0), theta)
        >>> estimate, state = estimator.estimate(jax.random.key(1), theta, state)
        >>> int(estimate.info.inner_steps), int(state.episode.t)
        (160, 10)

    References:
        Li et al., Noise-reuse in online evolution strategies, NeurIPS 2023, arXiv:2304.12180.
        Vicol et al., Low-variance gradient estimation in unrolled computation graphs with
        ES-Single, ICML 2023, arXiv:2304.11153 (its appendix F).
    """
    truncation = inner_loop.check_truncation(problem, truncation)
    noise_period = check_period(noise_period, truncation)
    many = _pairs.pairs(sigma, num_pairs, noise)
    persistence = Persistence(problem, many, noise_period)

    def window(segment, theta, carried):
        result, noise, carried = persistence.run(segment, theta, carried)
        steps = 2 * num_pairs * truncation
        return _pairs.estimate(result, sigma, theta, noise.now, noise.before, steps), carried

    # `gpes` at one of its ends and the estimator that it is there take each other's states.
    name = {truncation: "pes", None: "es_single"}.get(noise_period, "gpes")
    own = {"noise_period": noise_period} if name == "gpes" else {}
    fingerprint = made_by(name, problem, truncation=truncation, **own, num_pairs=num_pairs)
    return windowed(problem, fingerprint, truncation, persistence.begin, window, many.check)


def pes(
    problem: UnrolledProblem,
    *,
    truncation: int,
    sigma: Any,
    num_pairs: int = 1,
    noise: Noise | None = None,
) -> GradientEstimator:
    """Persistent evolution strategies: fresh noise each window, all noise so far as the weight.

    ``gpes`` with ``noise_period=truncation``. ``grad`` = mean over pairs of
    (u_1 + ... + u_w) (L_w+ - L_w-) / (2 sigma) in the episode's w-th window, L_w the window's mean
    loss. Unbiased, averaged over an episode's windows, for the gradient of J smoothed over
    independent perturbations of the windows; for quadratic losses that is the gradient of J.

    Variance, one pair, quadratic losses, the mean over n windows with g[k, i] the influence of
    window i on the loss of window k: (1/n^2) sum_{k,s} [P min(k, s) sum_{i <= min(k, s)}
    g[k, i].g[s, i] + (sum_{i <= min(k, s)} g[s, i]).(sum_{i <= min(k, s)} g[k, i])]: about
    (P/2) |g|^2 where the windows agree, growing like n where they conflict. Time: 2 num_pairs K
    steps a call. Memory: 2 num_pairs state + 4 num_pairs theta.

    Args:
        problem: The inner loop.
        truncation: Inner steps per call (K); divides a static horizon.
        sigma: Standard deviation of the perturbation in theta's units: a float, a traced scalar, or
            a pytree prefix of theta.
        num_pairs: Antithetic pairs; they share the episode.
        noise: The perturbation law; by default ``ug.noise.gaussian()``.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If the truncation does not divide the horizon, or sigma, truncation or num_pairs
            is not positive.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator = ug.pes(problem, truncation=10, sigma=0.1, num_pairs=8)
        >>> state = estimator.init(jax.random.key(0), theta)
        >>> estimate, state = estimator.estimate(jax.random.key(1), theta, state)
        >>> estimate.grad.shape == theta.shape, int(state.episode.t)
        (True, 10)

    References:
        Vicol, Metz, Sohl-Dickstein, Unbiased gradient estimation in unrolled computation graphs
        with persistent evolution strategies, ICML 2021, arXiv:2112.13835.
    """
    return gpes(
        problem,
        truncation=truncation,
        sigma=sigma,
        noise_period=truncation,
        num_pairs=num_pairs,
        noise=noise,
    )


def es_single(
    problem: UnrolledProblem,
    *,
    truncation: int,
    sigma: Any,
    num_pairs: int = 1,
    noise: Noise | None = None,
) -> GradientEstimator:
    """ES-Single (noise-reuse ES): one noise per episode, kept through all its windows.

    ``gpes`` with ``noise_period=None``: full ES cut into windows. ``grad`` = mean over pairs of
    u (L+ - L-) / (2 sigma), L the window's mean loss. Unbiased, averaged over an episode's windows,
    for the gradient of E_u[J(theta + sigma u)], as ``full_es``. Workers at different places of
    their episodes make it NRES.

    Variance: (P + 1) |g|^2 / num_pairs for the mean over an episode, whatever the number of windows
    (quadratic losses). Time: 2 num_pairs K steps a call. Memory: 2 num_pairs state + 4 num_pairs
    theta, of which none is kept between calls: the noise is drawn again from the episode's key.

    Args:
        problem: The inner loop.
        truncation: Inner steps per call (K); divides a static horizon.
        sigma: Standard deviation of the perturbation in theta's units: a float, a traced scalar, or
            a pytree prefix of theta.
        num_pairs: Antithetic pairs; they share the episode.
        noise: The perturbation law; by default ``ug.noise.gaussian()``.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If the truncation does not divide the horizon, or sigma, truncation or num_pairs
            is not positive.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator = ug.es_single(problem, truncation=10, sigma=0.1, num_pairs=8)
        >>> state = estimator.init(jax.random.key(0), theta)
        >>> estimate, state = estimator.estimate(jax.random.key(1), theta, state)
        >>> estimate.grad.shape == theta.shape, int(state.episode.t)
        (True, 10)

    References:
        Vicol, Kolter, Swersky, Low-variance gradient estimation in unrolled computation graphs with
        ES-Single, ICML 2023, arXiv:2304.11153. Li et al., Noise-reuse in online evolution
        strategies, NeurIPS 2023, arXiv:2304.12180.
    """
    return gpes(
        problem,
        truncation=truncation,
        sigma=sigma,
        noise_period=None,
        num_pairs=num_pairs,
        noise=noise,
    )
