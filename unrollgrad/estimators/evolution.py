"""Evolution-strategies estimators: antithetic pairs of unrolls with theta +- sigma u.

They differ in when noise is drawn, where a pair begins, and what weighs its losses. All of them run
``step`` forwards only, so it may contain a ``while_loop``, integers and jumps.
"""

from unrollgrad._checks import inner_loop
from unrollgrad._core.descriptions import described
from unrollgrad.estimators import _pairs
from unrollgrad.estimators._persistence import persistent_es
from unrollgrad.estimators._window import inner_state, made_by, nothing, windowed
from unrollgrad.noise import Noise
from unrollgrad.types import GradientEstimator, Sigma, UnrolledProblem

__all__ = ["es_single", "full_es", "gpes", "pes", "truncated_es"]


@described
def full_es(
    problem: UnrolledProblem, *, sigma: Sigma, num_pairs: int = 1, noise: Noise | None = None
) -> GradientEstimator:
    """Evolution strategies on whole episodes: the gradient of the episode-smoothed J.

    ``grad`` = mean over pairs of u (J(theta + sigma u) - J(theta - sigma u)) / (2 sigma), with u
    standard normal and both signs on the same episode. It is unbiased for the gradient of the
    episode-smoothed J, E_u[J(theta + sigma u)] with one draw u per episode, which is J's own if J
    is quadratic and O(sigma^2) from it otherwise.

    Variance: (P + 1) |g|^2 / num_pairs on a quadratic J, P = dim(theta). Time: 2 num_pairs T steps
    per call. Memory: 2 num_pairs state + 3 num_pairs theta (both signs, and the noise while it is
    drawn; 4 num_pairs theta if a leaf of fewer than 65,536 numbers is most of theta).

    Args:
        problem: The inner loop; its horizon must be static.
        sigma: Standard deviation in theta's units: float, traced scalar or pytree prefix of theta.
        num_pairs: Number of antithetic pairs; they share the episode (initial state's key, data).
        noise: The perturbation law; ``ug.noise.gaussian()`` by default.

    Returns:
        An estimator with ``truncation=None``; streaming ``data`` has leading axis ``horizon``.

    Raises:
        ValueError: If the horizon is sampled, or sigma or num_pairs is not positive.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator, key = ug.full_es(problem, sigma=0.1, num_pairs=100), jax.random.key(0)
        >>> estimate, _ = estimator.estimate(key, theta, estimator.init(key, theta))
        >>> round(float(estimate.loss), 1)
        10.3

    References:
        Salimans et al., 2017, arXiv:1703.03864. Mirrored pairs: Brockhoff et al., PPSN 2010.
    """
    pairs = _pairs.pairs(sigma, num_pairs, noise)
    fingerprint = made_by("full_es", problem)
    return windowed(problem, fingerprint, None, nothing, pairs.whole_episode, pairs.check)


@described
def truncated_es(
    problem: UnrolledProblem,
    *,
    truncation: int,
    sigma: Sigma,
    num_pairs: int = 1,
    noise: Noise | None = None,
) -> GradientEstimator:
    """Evolution strategies on one window at a time: biased, it forgets earlier influence.

    In every window all pairs restart from one mean state, which is advanced with theta itself; in
    the first they start from init(theta +- sigma u). ``grad`` = mean over pairs of u (L(theta +
    sigma u) - L(theta - sigma u)) / (2 sigma), L the window's mean loss. Theta's influence on the
    window's initial state is dropped: only with K = horizon or without memory is ``grad`` unbiased.

    Variance: (P + 1) |g_window|^2 / num_pairs for one window of quadratic losses. Time:
    (2 num_pairs + 1) K steps per call. Memory: (2 num_pairs + 1) state + 3 num_pairs theta.

    Args:
        problem: The inner loop.
        truncation: Inner steps per call (K); divides a static horizon.
        sigma: Standard deviation in theta's units: float, traced scalar or pytree prefix of theta.
        num_pairs: Number of antithetic pairs; they share the episode.
        noise: The perturbation law; ``ug.noise.gaussian()`` by default.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If a setting is not positive, or the truncation does not divide the horizon.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator, key = ug.truncated_es(problem, truncation=10, sigma=0.1), jax.random.key(0)
        >>> estimate, state = estimator.estimate(key, theta, estimator.init(key, theta))
        >>> int(estimate.info.inner_steps), int(state.episode.t)
        (30, 10)

    References:
        Metz et al., ICML 2019, arXiv:1810.10180. As a baseline: Vicol et al., ICML 2021.
    """
    truncation = inner_loop.check_truncation(problem, truncation)
    pairs, begin = _pairs.pairs(sigma, num_pairs, noise), inner_state(problem)
    fingerprint = made_by("truncated_es", problem, truncation=truncation)
    return windowed(problem, fingerprint, truncation, begin, pairs.from_mean, pairs.check)


@described
def gpes(
    problem: UnrolledProblem,
    *,
    truncation: int,
    sigma: Sigma,
    noise_period: int | None,
    num_pairs: int = 1,
    noise: Noise | None = None,
) -> GradientEstimator:
    """Generalised persistent evolution strategies: noise redrawn every ``noise_period`` steps.

    Each pair keeps its own two inner states through the episode. In a window of noise period j it
    runs with theta +- sigma u_j, and all noise so far weighs the window's losses: ``grad`` = mean
    over pairs of (u_1 + ... + u_j) (L+ - L-) / (2 sigma), L the window's mean loss. Averaged over
    an episode's windows it is unbiased for the gradient of the period-smoothed J, the mean of J
    over an independent perturbation in each period; for quadratic losses that is J's gradient, and
    otherwise it differs from ``es_single``'s target, the episode-smoothed J, by O(sigma^2). Updates
    of theta inside an episode add a bias that vanishes with the outer learning rate. With
    ``evaluate`` a window adds (T/K) (xi_t L_end - xi_{t-1} L_start), xi the accumulated noise.

    Variance, one pair, quadratic losses, the mean over an episode: a function of the m periods
    alone, so that ``pes`` with m windows has the same. With c[i, j] the influence of period j on J
    through the losses of periods max(i, j) and later: P sum_{i,j} |c[i, j]|^2 + sum_{i,j}
    c[i, j].c[j, i]. Without influence across periods that is sum_j (P j + 1) |c[j, j]|^2.
    If the windows' gradients vary independently around a mean, m as large as the signal-to-noise
    ratio of their mean is best, and the variance is then below both ``pes``'s and ``es_single``'s
    (``ug.problems.theory`` derives it; ``theory.best_noise_period``). One window at a random place
    has least with one period. Time: 2 num_pairs K steps per call. Memory: 2 num_pairs state + 4
    num_pairs theta (both signs, noise while it is drawn, accumulator).

    Args:
        problem: The inner loop.
        truncation: Inner steps per call (K); divides a static horizon.
        sigma: Standard deviation in theta's units: float, traced scalar or pytree prefix of theta.
            It may change between episodes: see ``scheduled``, which says what a change inside one
            would do.
        noise_period: Inner steps between draws, a multiple of K; None: one draw per episode.
        num_pairs: Number of antithetic pairs; they share the episode.
        noise: The perturbation law; ``ug.noise.gaussian()`` by default.
            Factors of earlier periods (``ug.noise.low_rank``) are drawn again, and none is kept.
            ``ug.noise.guided``'s subspace may change between noise periods.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If a setting is not positive, or K does not divide horizon or noise period.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator = ug.gpes(problem, truncation=10, sigma=0.1, noise_period=50, num_pairs=8)
        >>> state = estimator.init(jax.random.key(0), theta)
        >>> estimate, state = estimator.estimate(jax.random.key(1), theta, state)
        >>> int(estimate.info.inner_steps), int(state.episode.t)
        (160, 10)

    References:
        Li et al., NeurIPS 2023, arXiv:2304.12180. Vicol et al., ICML 2023, its appendix F.
    """
    return persistent_es(problem, truncation, noise_period, _pairs.pairs(sigma, num_pairs, noise))


@described
def pes(
    problem: UnrolledProblem,
    *,
    truncation: int,
    sigma: Sigma,
    num_pairs: int = 1,
    noise: Noise | None = None,
) -> GradientEstimator:
    """Persistent evolution strategies: fresh noise each window, all noise so far as the weight.

    ``gpes`` with ``noise_period=truncation``: ``grad`` = mean over pairs of (u_1 + ... + u_w)
    (L_w+ - L_w-) / (2 sigma) in the episode's w-th window, L_w its mean loss. Averaged over an
    episode's windows it is unbiased for the gradient of the period-smoothed J, whose periods are
    the windows; for quadratic losses that is J's gradient.

    Variance: the formula of ``gpes`` with m = n windows. Without influence across windows it is
    sum_w (P w + 1) |G_w|^2, with G_w window w's share of g: about (P/2) |g|^2 if the shares are
    equal, less if they fall, (P/2) n |g|^2 if they are independent, and any multiple of |g|^2 if
    they cancel. It is at least ``theory.least_ratio(n, P)`` times ``es_single``'s, about
    1 / (1 + ln n). Time: 2 num_pairs K steps per call. Memory: 2 num_pairs state + 4 num_pairs
    theta.

    Args:
        problem: The inner loop.
        truncation: Inner steps per call (K); divides a static horizon.
        sigma: Standard deviation in theta's units: float, traced scalar or pytree prefix of theta.
        num_pairs: Number of antithetic pairs; they share the episode.
        noise: The perturbation law; ``ug.noise.gaussian()`` by default.
            Factors of earlier windows (``ug.noise.low_rank``) are drawn again, and none is kept.
            ``ug.noise.guided``'s subspace may change at every call.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If a setting is not positive, or the truncation does not divide the horizon.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator, key = ug.pes(problem, truncation=10, sigma=0.1), jax.random.key(0)
        >>> estimate, state = estimator.estimate(key, theta, estimator.init(key, theta))
        >>> estimate.grad.shape == theta.shape, int(state.episode.t)
        (True, 10)

    References:
        Vicol, Metz, Sohl-Dickstein, ICML 2021, arXiv:2112.13835.
    """
    return persistent_es(problem, truncation, truncation, _pairs.pairs(sigma, num_pairs, noise))


@described
def es_single(
    problem: UnrolledProblem,
    *,
    truncation: int,
    sigma: Sigma,
    num_pairs: int = 1,
    noise: Noise | None = None,
) -> GradientEstimator:
    """ES-Single (noise-reuse ES): one noise per episode, kept through all its windows.

    ``gpes`` with ``noise_period=None``: ``grad`` = mean over pairs of u (L+ - L-) / (2 sigma), with
    L the window's mean loss. Averaged over an episode's windows it is unbiased for the gradient of
    the episode-smoothed J, E_u[J(theta + sigma u)], as ``full_es``. With workers at all places of
    the episode it is NRES.

    Variance: (P + 1) |g|^2 / num_pairs for the mean over an episode of quadratic losses, however
    many windows it has. Time: 2 num_pairs K steps per call. Memory: 2 num_pairs state + 3 num_pairs
    theta, as ``full_es``; only the states are kept: the episode's key gives the noise again.

    Args:
        problem: The inner loop.
        truncation: Inner steps per call (K); divides a static horizon.
        sigma: Standard deviation in theta's units: float, traced scalar or pytree prefix of theta.
        num_pairs: Number of antithetic pairs; they share the episode.
        noise: The perturbation law; ``ug.noise.gaussian()`` by default.
            ``ug.noise.guided``'s subspace may change between episodes.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If a setting is not positive, or the truncation does not divide the horizon.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator, key = ug.es_single(problem, truncation=10, sigma=0.1), jax.random.key(0)
        >>> estimate, state = estimator.estimate(key, theta, estimator.init(key, theta))
        >>> estimate.grad.shape == theta.shape, int(state.episode.t)
        (True, 10)

    References:
        Vicol, Kolter, Swersky, ICML 2023, arXiv:2304.11153. Li et al., NeurIPS 2023 (NRES).
    """
    return persistent_es(problem, truncation, None, _pairs.pairs(sigma, num_pairs, noise))
